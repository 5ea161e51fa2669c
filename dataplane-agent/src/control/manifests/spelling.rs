//! Finds near misses of the words that are read. What is not read is passed over, so a slip in a word that
//! matters would drop its meaning silently: a policy with a wrong group, a pod with a wrong account. Such a slip
//! is an error of the file instead, which suggests the word that was likely meant.
//!
//! Specs of policies refuse unknown fields by themselves. Others have many fields that are not modelled here, so
//! only slips are refused in them, by the reader of [`super::yaml`].

use strsim::{jaro_winkler, osa_distance};

use super::object::wrong;
use super::yaml::{Node, NodeError};

/// An API group with kinds that are read.
struct Group {
    name: &'static str,
    versions: &'static [&'static str],
    /// Kinds that are read.
    read: &'static [&'static str],
    /// Other kinds of the group.
    others: &'static [&'static str],
    /// `true` if these are all kinds of the group.
    all: bool,
}

const GROUPS: [Group; 4] = [
    Group {
        name: "security.istio.io",
        versions: &["v1", "v1beta1"],
        read: &["AuthorizationPolicy", "PeerAuthentication"],
        others: &["RequestAuthentication"],
        all: true,
    },
    Group {
        name: "",
        versions: &["v1"],
        read: &["Namespace", "ServiceAccount", "Node", "Pod", "Service"],
        others: &[
            "Binding",
            "ComponentStatus",
            "ConfigMap",
            "Endpoints",
            "Event",
            "LimitRange",
            "PersistentVolume",
            "PersistentVolumeClaim",
            "PodTemplate",
            "ReplicationController",
            "ResourceQuota",
            "Secret",
        ],
        all: true,
    },
    Group {
        name: "discovery.k8s.io",
        versions: &["v1", "v1beta1"],
        read: &["EndpointSlice"],
        others: &[],
        all: true,
    },
    Group {
        name: "gateway.networking.k8s.io",
        versions: &["v1", "v1beta1", "v1alpha2"],
        read: &["Gateway", "HTTPRoute"],
        // Only kinds with names close to ours; more come with every release.
        others: &[
            "GatewayClass",
            "GRPCRoute",
            "TCPRoute",
            "TLSRoute",
            "UDPRoute",
        ],
        all: false,
    },
];

/// The kind of a list of objects; other kinds of list end in it.
pub(crate) const LIST: &str = "List";

/// Returns `true` if objects of this kind are read.
///
/// # Errors
/// The kind or the group is likely a slip, or the version is not one that is read. The error has the field at
/// fault, and a suggestion.
pub(crate) fn kind(api_version: &str, kind: &str) -> Result<bool, (&'static str, String)> {
    let (name, version) = api_version.rsplit_once('/').unwrap_or(("", api_version));
    if kind == LIST {
        return Ok(false);
    }
    let group = GROUPS.iter().find(|group| group.name == name);
    // Without a slash the text may also be a group without its version.
    let Some(group) = group.filter(|group| {
        !group.name.is_empty() || GROUPS[1].versions.contains(&version) || is_version(version)
    }) else {
        return match meant_group(if name.is_empty() { version } else { name }, kind) {
            Some(group) => Err((
                "apiVersion",
                format!(
                    "`{api_version}` is not read, did you mean `{}`?",
                    shown(group)
                ),
            )),
            None => Ok(false),
        };
    };
    if group.read.contains(&kind) {
        return match group.versions.contains(&version) {
            true => Ok(true),
            false => Err((
                "apiVersion",
                format!("`{api_version}` is not read, `{}` is", shown(group)),
            )),
        };
    }
    if group.others.contains(&kind) || (kind.ends_with(LIST) && group.all) {
        return Ok(false);
    }
    if let Some(other) = GROUPS.iter().find(|group| group.read.contains(&kind)) {
        let what = format!(
            "`{api_version}` has no {kind}, did you mean `{}`?",
            shown(other)
        );
        return Err(("apiVersion", what));
    }
    let of_all = GROUPS.iter().flat_map(|group| group.read);
    let is_near = of_all.clone().any(|known| near(kind, known));
    if group.all || is_near {
        let known: Vec<&'static str> = if group.all && !is_near {
            group.read.to_vec()
        } else {
            of_all.copied().collect()
        };
        return Err(("kind", unknown("kind", kind, &known)));
    }
    Ok(false)
}

/// Returns the group that was likely meant by `name`, if it has this kind.
fn meant_group(name: &str, kind: &str) -> Option<&'static Group> {
    GROUPS.iter().find(|group| {
        let has_kind = group.read.iter().any(|known| near(kind, known));
        let is_near = match group.name {
            "" => ["core", "v1"].iter().any(|known| near(name, known)),
            "security.istio.io" => {
                near(name, group.name) || name.to_ascii_lowercase().contains("istio")
            }
            known => near(name, known) || osa_distance(name, known) <= known.len() / 5,
        };
        has_kind && is_near
    })
}

fn shown(group: &Group) -> String {
    let version = group.versions.first().copied().unwrap_or_default();
    match group.name {
        "" => version.to_owned(),
        name => format!("{name}/{version}"),
    }
}

fn is_version(text: &str) -> bool {
    let digits = text.strip_prefix('v').unwrap_or_default();
    digits.starts_with(|c: char| c.is_ascii_digit())
}

/// The label by which namespaces and pods join the mesh, and its values.
const MODE: (&str, &[&str]) = ("istio.io/dataplane-mode", &["ambient", "none"]);

/// The annotation of a service or a namespace with the meaning of `spec.trafficDistribution`.
pub(crate) const DISTRIBUTION: &str = "networking.istio.io/traffic-distribution";

/// The values of both.
const DISTRIBUTIONS: [&str; 3] = ["PreferClose", "PreferSameZone", "PreferSameNode"];

/// Returns `true` for one of these, in any case of letters: istiod reads the annotation so.
pub(crate) fn is_distribution(word: &str) -> bool {
    let mut all = DISTRIBUTIONS.iter();
    all.any(|is| is.eq_ignore_ascii_case(word))
}

/// Checks the parts of an object that the types do not check.
///
/// # Errors
/// A field or a value is likely a slip.
pub(crate) fn check(node: &Node, kind: &str) -> Result<(), NodeError> {
    match kind {
        // A field beside the spec was meant to be in it.
        "AuthorizationPolicy" | "PeerAuthentication" => {
            let known = ["apiVersion", "kind", "metadata", "spec", "status"];
            match node.keys().find(|key| !known.contains(key)) {
                Some(key) => Err(wrong(node, key, unknown("field", key, &known))),
                None => Ok(()),
            }
        }
        "Namespace" => mode(node).and_then(|()| distribution_annotation(node)),
        "Pod" => mode(node),
        "Service" => {
            const FIELD: &str = "trafficDistribution";
            if let Some(spec) = node.field("spec") {
                let word = spec.field(FIELD).and_then(Node::text);
                let slip = word.and_then(|word| slip("word", word, &DISTRIBUTIONS));
                if let Some(what) = slip {
                    return Err(wrong(node, &format!("spec.{FIELD}"), what));
                }
            }
            distribution_annotation(node)
        }
        _ => Ok(()),
    }
}

fn mode(node: &Node) -> Result<(), NodeError> {
    let (label, modes) = MODE;
    named(node, "labels", "label", label, |word| {
        slip("mode", word, modes)
    })
}

fn distribution_annotation(node: &Node) -> Result<(), NodeError> {
    named(node, "annotations", "annotation", DISTRIBUTION, |word| {
        slip("word", word, &DISTRIBUTIONS).filter(|_| !is_distribution(word))
    })
}

/// Checks the name of a label or an annotation, and its value with `slip`, which describes what is wrong.
fn named(
    node: &Node,
    field: &str,
    what: &str,
    name: &str,
    slip: impl Fn(&str) -> Option<String>,
) -> Result<(), NodeError> {
    let Some(all) = node.field("metadata").and_then(|meta| meta.field(field)) else {
        return Ok(());
    };
    let near = all.keys().find(|key| *key != name && near(key, name));
    let wrong_name = near.map(|key| unknown(what, key, &[name]));
    let word = all.field(name).and_then(Node::text);
    match wrong_name.or_else(|| word.and_then(slip)) {
        Some(what) => Err(wrong(node, &format!("metadata.{field}"), what)),
        None => Ok(()),
    }
}

/// Returns the message for a word that is none of `known`, but likely one of them misspelt.
fn slip(what: &str, word: &str, known: &[&str]) -> Option<String> {
    let slip = !known.contains(&word) && known.iter().any(|known| near(word, known));
    slip.then(|| unknown(what, word, known))
}

/// Returns `true` if the names differ only in the case of letters, or, if they are long, in one letter that was
/// added, removed, changed, or swapped with its neighbour.
pub(crate) fn is_slip(name: &str, meant: &str) -> bool {
    let (name, meant) = (name.to_lowercase(), meant.to_lowercase());
    name == meant || (meant.len() >= 6 && osa_distance(&name, &meant) <= 1)
}

/// Returns `true` if `word` is likely meant to be `known`.
fn near(word: &str, known: &str) -> bool {
    let (word, known) = (word.to_ascii_lowercase(), known.to_ascii_lowercase());
    osa_distance(&word, &known) <= (known.len() / 6).max(1)
}

/// Returns the known word that is most similar, if any is similar.
pub(crate) fn nearest<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    let lower = word.to_ascii_lowercase();
    let likeness = |known: &str| jaro_winkler(&lower, &known.to_ascii_lowercase());
    known
        .iter()
        .copied()
        .max_by(|one, other| likeness(one).total_cmp(&likeness(other)))
        .filter(|nearest| likeness(nearest) > 0.7)
}

/// Returns the message for a word that is none of `known`.
pub(crate) fn unknown(what: &str, word: &str, known: &[&str]) -> String {
    match nearest(word, known) {
        Some(nearest) => format!("unknown {what} `{word}`, did you mean `{nearest}`?"),
        None => format!("unknown {what} `{word}`, known are {}", known.join(", ")),
    }
}

//! PeerAuthentication, translated to DENY policies against peers without mTLS.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde::Deserialize;

use super::authorization_policy::{DRY_RUN_ANNOTATION, Selector};
use super::object::{ByKey, Meta, Resource, all_in, selects, wrong};
use super::yaml::{Node, NodeError};
use crate::mesh::policy::{Action, Clause, Match, Policy, PolicyScope, Rule, StringMatch};

const STATIC_STRICT: &str = "istio_converted_static_strict";

/// The fields of a PeerAuthentication that are read.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PeerAuthentication {
    selector: Option<Selector>,
    mtls: Option<Mtls>,
    #[serde(default)]
    port_level_mtls: BTreeMap<u16, Mtls>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Mtls {
    #[serde(default)]
    mode: Mode,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
enum Mode {
    #[default]
    Unset,
    Disable,
    Permissive,
    Strict,
}

impl Mode {
    /// Returns `true` for strict; `None` if the level above decides.
    fn strict(self) -> Option<bool> {
        match self {
            Mode::Unset => None,
            // The node always offers mTLS, so there is nothing to disable.
            Mode::Disable | Mode::Permissive => Some(false),
            Mode::Strict => Some(true),
        }
    }
}

impl PeerAuthentication {
    pub(crate) fn read(node: &Node) -> Result<Self, NodeError> {
        #[derive(Deserialize)]
        struct Raw {
            spec: PeerAuthentication,
        }
        let Raw { spec } = node.read()?;
        if let Some(path) = node.field("spec").and_then(Node::null) {
            return Err(wrong(node, &format!("spec.{path}"), "no value"));
        }
        if node.annotation(DRY_RUN_ANNOTATION).is_some() {
            let what = format_args!("{DRY_RUN_ANNOTATION}: is for AuthorizationPolicies alone");
            return Err(wrong(node, "metadata.annotations", what));
        }
        if spec.labels().is_none() && !spec.port_level_mtls.is_empty() {
            return Err(wrong(node, "spec.portLevelMtls", "needs a selector"));
        }
        if spec.port_level_mtls.contains_key(&0) {
            return Err(wrong(node, "spec.portLevelMtls", "`0` is not a port"));
        }
        Ok(spec)
    }

    /// Returns the labels of the pods that it applies to; `None` if it applies to all.
    pub(crate) fn labels(&self) -> Option<&BTreeMap<String, String>> {
        self.selector
            .as_ref()
            .map(|selector| &selector.match_labels)
            .filter(|l| !l.is_empty())
    }

    fn mode(&self) -> Mode {
        self.mtls.unwrap_or_default().mode
    }
}

/// All PeerAuthentications, prepared for queries by pod.
pub(crate) struct PeerAuthentications<'a> {
    all: &'a ByKey<PeerAuthentication>,
    root: &'a str,
    mesh: bool,
}

impl<'a> PeerAuthentications<'a> {
    pub(crate) fn new(all: &'a ByKey<PeerAuthentication>, root: &'a str) -> Self {
        let mut this = Self {
            all,
            root,
            mesh: false,
        };
        this.mesh = this
            .level(root)
            .and_then(|found| found.body.mode().strict())
            .unwrap_or(false);
        this
    }

    /// Returns the one that applies to a whole namespace.
    fn level(&self, namespace: &str) -> Option<&'a Resource<PeerAuthentication>> {
        first(self.level_all(namespace), self.mesh)
    }

    fn level_all(&self, namespace: &str) -> Vec<&'a Resource<PeerAuthentication>> {
        let all = all_in(self.all, namespace).map(|(_, found)| &**found);
        all.filter(|found| found.body.labels().is_none()).collect()
    }

    /// Returns those that select a pod.
    fn of_pod(&self, pod: &Meta) -> Vec<&'a Resource<PeerAuthentication>> {
        let namespace = &*pod.key.namespace;
        let all = all_in(self.all, namespace).map(|(_, found)| &**found);
        let selected = all.filter(|found| {
            let labels = found.body.labels();
            namespace != self.root && labels.is_some_and(|labels| selects(labels, &pod.labels))
        });
        selected.collect()
    }

    /// Returns how many have no effect, whatever pods there are: another one holds in their place, or they have a
    /// selector in the root namespace.
    pub(crate) fn without_effect(&self) -> usize {
        let (root, namespaces) = (self.root, self.namespaces());
        let replaced =
            namespaces.map(|namespace| self.level_all(namespace).len().saturating_sub(1));
        let of_root = all_in(self.all, root).filter(|(_, found)| found.body.labels().is_some());
        replaced.sum::<usize>() + of_root.count()
    }

    fn namespaces(&self) -> impl Iterator<Item = &'a str> + use<'a> {
        let namespaces: BTreeSet<&str> = self.all.keys().map(|key| &*key.namespace).collect();
        namespaces.into_iter()
    }

    /// Reports where several are for the same namespace, or for the mesh, and which of them holds.
    pub(crate) fn tell(&self, problems: &mut Vec<String>) {
        for namespace in self.namespaces() {
            let parent = namespace != self.root && self.mesh;
            tell_others(&self.level_all(namespace), parent, problems);
        }
    }

    /// Reports where several select a pod, and which of them holds.
    pub(crate) fn tell_of_pod(&self, pod: &Meta, problems: &mut Vec<String>) {
        let found = self.of_pod(pod);
        if found.len() > 1 {
            tell_others(&found, self.inherited(&pod.key.namespace), problems);
        }
    }

    /// Returns `true` if a namespace's pods are strict as long as nothing selects them.
    fn inherited(&self, namespace: &str) -> bool {
        self.level(namespace)
            .and_then(|found| found.body.mode().strict())
            .unwrap_or(self.mesh)
    }

    /// Returns the key of the policy that a pod gets.
    pub(crate) fn key(&self, pod: &Meta) -> Option<Arc<str>> {
        let namespace = &*pod.key.namespace;
        let parent = self.inherited(namespace);
        let own = first(self.of_pod(pod), parent);
        let mode = own.map_or(Mode::Unset, |own| own.body.mode());
        let strict = mode.strict().unwrap_or(parent);
        if let Some(own) = own {
            let port_is = |modes: &[Mode]| {
                own.body
                    .port_level_mtls
                    .values()
                    .any(|port| modes.contains(&port.mode))
            };
            let converted = match mode {
                Mode::Strict => port_is(&[Mode::Permissive, Mode::Disable]),
                // istiod does the same: DISABLE alone does not loosen what is inherited.
                Mode::Unset if parent => port_is(&[Mode::Permissive]),
                _ => port_is(&[Mode::Strict]),
            };
            if converted {
                return Some(format!("{namespace}/{}", converted_name(own)).into());
            }
        }
        strict.then(|| format!("{}/{STATIC_STRICT}", self.root).into())
    }

    /// Returns the policies, and reports those without effect. `others`: there are PeerAuthentications besides
    /// these.
    pub(crate) fn translate(&self, others: bool, problems: &mut Vec<String>) -> Vec<Policy> {
        let mut policies = Vec::new();
        if others || !self.all.is_empty() {
            policies.push(deny(
                self.root,
                STATIC_STRICT.into(),
                vec![rule([in_clear()])],
            ));
        }
        for found in self.all.values() {
            let namespace = &*found.meta.key.namespace;
            if found.body.labels().is_none() {
                continue;
            }
            if namespace == self.root {
                let key = &found.meta.key;
                problems.push(format!(
                    "PeerAuthentication {key}: one with a selector has no effect in the root namespace"
                ));
                continue;
            }
            let rules = self.rules(found);
            if !rules.is_empty() {
                policies.push(deny(namespace, converted_name(found).into(), rules));
            }
        }
        policies
    }

    /// Returns the rules for one with ports. UNSET inherits, also through an UNSET namespace; istiod makes no policy
    /// there, and so leaves all ports open.
    fn rules(&self, found: &Resource<PeerAuthentication>) -> Vec<Rule> {
        let own = found.body.mode().strict();
        let ports = |strict| {
            let all = found.body.port_level_mtls.iter();
            all.filter(move |(_, mtls)| mtls.mode.strict() == Some(strict))
                .map(|(&port, _)| port)
        };
        if !own.unwrap_or_else(|| self.inherited(&found.meta.key.namespace)) {
            return ports(true)
                .map(|port| {
                    rule([Match {
                        destination_ports: vec![port],
                        ..in_clear()
                    }])
                })
                .collect();
        }
        let mut clauses: Vec<Match> = ports(false)
            .map(|port| Match {
                not_destination_ports: vec![port],
                ..Match::default()
            })
            .collect();
        if clauses.is_empty() {
            return Vec::new();
        }
        // The order is istiod's; it does not change the meaning.
        clauses.insert(if own.is_some() { 0 } else { clauses.len() }, in_clear());
        vec![rule(clauses)]
    }
}

/// Reports of each but the one that holds that it does not. `inherited`: see [`first`].
fn tell_others(
    found: &[&Resource<PeerAuthentication>],
    inherited: bool,
    problems: &mut Vec<String>,
) {
    let Some(holds) = first(found.iter().copied(), inherited) else {
        return;
    };
    let others = found
        .iter()
        .filter(|other| other.meta.key != holds.meta.key);
    for other in others {
        let dated = found.iter().all(|found| found.meta.created.is_some());
        let why = match dated {
            true => "is the older one",
            false => "is the stricter one, and not all have a creationTimestamp",
        };
        let (holds, other) = (&holds.meta.key, &other.meta.key);
        problems.push(format!(
            "PeerAuthentication {other}: {holds} is for the same pods and holds in its stead: it {why}"
        ));
    }
}

/// Returns the one that holds among several for the same pods: the oldest. If one has no creation timestamp, age
/// cannot decide, since the time at which it was first seen is lost in a restart; then the one that lets in
/// the least in clear holds.
fn first<'a>(
    found: impl IntoIterator<Item = &'a Resource<PeerAuthentication>>,
    inherited: bool,
) -> Option<&'a Resource<PeerAuthentication>> {
    let found: Vec<_> = found.into_iter().collect();
    if found.iter().all(|found| found.meta.created.is_some()) {
        let age =
            |found: &&Resource<PeerAuthentication>| (found.meta.created, found.meta.key.clone());
        return found.into_iter().min_by_key(age);
    }
    found.into_iter().min_by_key(|found| {
        let ports = |strict| {
            let all = found.body.port_level_mtls.values();
            all.filter(|port| port.mode.strict() == Some(strict))
                .count()
        };
        let is_open = !found.body.mode().strict().unwrap_or(inherited);
        (
            is_open,
            ports(false),
            Reverse(ports(true)),
            found.meta.key.clone(),
        )
    })
}

fn converted_name(found: &Resource<PeerAuthentication>) -> String {
    format!("converted_peer_authentication_{}", found.meta.key.name)
}

/// Matches peers without an identity.
fn in_clear() -> Match {
    Match {
        not_principals: vec![StringMatch::Presence],
        ..Match::default()
    }
}

fn rule(clauses: impl IntoIterator<Item = Match>) -> Rule {
    let clauses = clauses
        .into_iter()
        .map(|made| Clause {
            matches: vec![made],
        })
        .collect();
    Rule { clauses }
}

fn deny(namespace: &str, name: Arc<str>, rules: Vec<Rule>) -> Policy {
    Policy {
        name,
        namespace: namespace.into(),
        scope: PolicyScope::WorkloadSelector,
        action: Action::Deny,
        rules,
        dry_run: false,
    }
}

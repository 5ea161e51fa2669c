//! Checks to whom manifests apply: reports policies that apply to nobody, and namespaces with pods that nobody
//! has put into the mesh or kept out of it. Both are signs of a slip in a name, but no error of a file: what is
//! missing may come later.

use std::collections::{BTreeMap, BTreeSet};

use super::object::{Key, Meta, Objects, all_in, selects};
use super::peer_authentication::PeerAuthentications;
use super::pod::MODE_LABEL;
use super::spelling::nearest;

/// Number of names shown if none is similar.
const SHOWN: usize = 5;

type Labels = BTreeMap<String, String>;

/// Returns a line for each policy that applies to nobody, and for each namespace with pods but no manifest.
/// `root`: the namespace whose policies are for the whole mesh.
pub(crate) fn problems(objects: &Objects, root: &str) -> Vec<String> {
    let pods = || objects.pods.values().map(|pod| &*pod.meta);
    let written: BTreeSet<&str> = objects.namespaces.keys().map(|key| &*key.name).collect();
    let with_pods: BTreeSet<&str> = pods().map(|pod| &*pod.key.namespace).collect();
    let known: Vec<&str> = written.union(&with_pods).copied().collect();
    let mut problems = Vec::new();
    for (kind, key, selector) in policies(objects) {
        let namespace = &*key.namespace;
        if namespace != root && !known.contains(&namespace) {
            problems.push(format!(
                "{kind} {key}: applies to no namespace that a manifest has{}",
                meant(namespace, &known)
            ));
            continue;
        }
        // A PeerAuthentication with a selector has no effect there; its translation reports that.
        let is_selected = |labels| match namespace == root {
            true => pods().any(|pod| selects(labels, &pod.labels)),
            false => {
                let mut own = all_in(&objects.pods, namespace);
                own.any(|(_, pod)| selects(labels, &pod.meta.labels))
            }
        };
        if let Some(labels) = selector.filter(|labels| !labels.is_empty())
            && !is_selected(labels)
        {
            let labels: Vec<String> = labels.iter().map(|(k, v)| format!("{k}: {v}")).collect();
            problems.push(format!(
                "{kind} {key}: selects no pod ({})",
                labels.join(", ")
            ));
        }
    }
    let without_pods: Vec<&str> = written.difference(&with_pods).copied().collect();
    for namespace in with_pods.difference(&written) {
        let undecided =
            |pod: &&Meta| *pod.key.namespace == **namespace && pod.label(MODE_LABEL).is_none();
        if let Some(pod) = pods().find(undecided) {
            let meant = match nearest(namespace, &without_pods) {
                Some(near) => format!("; did you mean it by Namespace {near}?"),
                None => String::new(),
            };
            problems.push(format!(
                "Pod {}: is of namespace {namespace}, of which no manifest is, and so not in the mesh{meant}",
                pod.key
            ));
        }
    }
    problems
}

/// Returns the number of policies that are not enforced, whatever pods there are.
pub(crate) fn not_enforced(objects: &Objects, root: &str) -> usize {
    let authorization = objects.authorization_policies.values();
    let authorization = authorization.filter(|found| !found.body.is_enforced());
    let peer = PeerAuthentications::new(&objects.peer_authentications, root);
    authorization.count() + peer.without_effect()
}

/// Returns policies of both kinds, each with the labels of its selector, if it has one.
fn policies(objects: &Objects) -> impl Iterator<Item = (&'static str, &Key, Option<&Labels>)> {
    let authorization = objects.authorization_policies.iter();
    let authorization =
        authorization.map(|(key, found)| ("AuthorizationPolicy", key, found.body.selector()));
    let peer = objects.peer_authentications.iter();
    let peer = peer.map(|(key, found)| ("PeerAuthentication", key, found.body.labels()));
    authorization.chain(peer)
}

/// Returns a hint at the namespace that was likely meant.
fn meant(namespace: &str, known: &[&str]) -> String {
    let only = || (known.len() == 1).then(|| known[0]);
    match nearest(namespace, known).or_else(only) {
        Some(near) => format!("; did you mean {near}?"),
        None if known.is_empty() => String::new(),
        None => {
            let shown = &known[..known.len().min(SHOWN)];
            let more = if shown.len() < known.len() {
                ", …"
            } else {
                ""
            };
            format!("; they have {}{more}", shown.join(", "))
        }
    }
}

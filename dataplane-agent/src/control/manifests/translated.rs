//! The translation of all objects, updated as they change: a changed object's namespace is translated again,
//! and the mesh gets the differences.
//!
//! The translation of a namespace depends on its own objects, on the policies of the mesh's root namespace, and
//! on cluster-wide facts: nodes, gateways, networks. Endpoints that are written by hand may be pods of any
//! namespace; if there are any, all namespaces are one part.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;

use super::super::enrolled::Enrolled;
use super::object::{Identity, Key, Objects};
use super::translate::{LocalPodSpec, MeshConfig, MeshContext, Translation, translate_part};
use crate::mesh::{Delta, Mesh};

/// The key of the part that has all namespaces. No namespace has this name.
const ALL_NAMESPACES: &str = "";

/// The translation of all objects.
#[derive(Debug)]
pub struct Translated {
    config: MeshConfig,
    /// The parts by namespace, or one part with all.
    parts: BTreeMap<Arc<str>, Part>,
    /// The networks that workloads are or have been in.
    networks: BTreeSet<Arc<str>>,
    /// The slices with endpoints that are written by hand.
    manual_slices: BTreeSet<Key>,
}

/// The pods that are enrolled, and the uids of those that are captured on this node.
pub type Enrolment<'a> = (&'a Enrolled, &'a BTreeSet<Arc<str>>);

/// The results of one namespace: uids and keys of what is in the mesh, and the rest in full.
#[derive(Debug, Default)]
struct Part {
    workloads: Vec<Arc<str>>,
    services: Vec<Arc<str>>,
    policies: Vec<Arc<str>>,
    local: Vec<LocalPodSpec>,
    problems: Vec<String>,
}

impl Part {
    fn is_empty(&self) -> bool {
        let meshed = [&self.workloads, &self.services, &self.policies];
        meshed.iter().all(|all| all.is_empty()) && self.local.is_empty() && self.problems.is_empty()
    }
}

/// The namespaces that must be translated again.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stale {
    all: bool,
    namespaces: BTreeSet<Arc<str>>,
}

impl Stale {
    /// Everything is stale.
    pub fn all() -> Self {
        Self {
            all: true,
            ..Self::default()
        }
    }

    /// Returns `true` if nothing is stale.
    pub fn is_empty(&self) -> bool {
        !self.all && self.namespaces.is_empty()
    }

    /// Marks the namespace of this workload's pod as stale; all, if the uid is not a pod's.
    pub fn pod(&mut self, uid: &str) {
        // `<cluster>//Pod/<namespace>/<name>`
        match uid.rsplit('/').nth(1) {
            Some(namespace) => self.namespace(&namespace.into()),
            None => self.all = true,
        }
    }

    /// Adds everything that another value marks as stale.
    pub fn add(&mut self, other: Self) {
        self.all |= other.all;
        self.namespaces.extend(other.namespaces);
    }

    /// Marks a namespace as stale.
    pub fn namespace(&mut self, namespace: &Arc<str>) {
        self.namespaces.insert(Arc::clone(namespace));
    }
}

impl Translated {
    /// Creates an empty translation.
    pub fn new(config: MeshConfig) -> Self {
        Self {
            config,
            parts: BTreeMap::new(),
            networks: BTreeSet::new(),
            manual_slices: BTreeSet::new(),
        }
    }

    /// Returns the names of the mesh.
    pub fn config(&self) -> &MeshConfig {
        &self.config
    }

    /// Returns the pods of this node.
    pub fn local(&self) -> impl Iterator<Item = &LocalPodSpec> {
        self.parts.values().flat_map(|part| &part.local)
    }

    /// Returns the configuration that is not supported, and what happens instead.
    pub fn problems(&self) -> impl Iterator<Item = &String> {
        self.parts.values().flat_map(|part| &part.problems)
    }

    /// Returns `true` if the objects contain a workload with this uid.
    pub fn has_workload(&self, uid: &str) -> bool {
        let mut all = self.parts.values().flat_map(|part| &part.workloads);
        all.any(|own| **own == *uid)
    }

    /// Returns `true` if the objects contain a policy with this key.
    pub fn has_policy(&self, key: &str) -> bool {
        let mut all = self.parts.values().flat_map(|part| &part.policies);
        all.any(|own| **own == *key)
    }

    /// Updates the translation after `touched` objects have changed. `stale`: what must be translated again for
    /// other reasons. `here`: see [`super::translate()`].
    ///
    /// Returns the differences from `mesh`.
    pub fn update(
        &mut self,
        (objects, touched): (&Objects, &[Identity]),
        mut stale: Stale,
        here: Enrolment<'_>,
        mesh: &Mesh,
    ) -> Delta {
        let was_whole = !self.manual_slices.is_empty();
        for (kind, key) in touched {
            self.mark_stale(objects, (kind, key), &mut stale);
        }
        let all = || BTreeSet::from_iter(self.parts.keys().cloned());
        let (mut parts, mut before) = if !self.manual_slices.is_empty() {
            (BTreeSet::from([ALL_NAMESPACES.into()]), all())
        } else if stale.all || was_whole {
            (self.every_namespace(objects), all())
        } else {
            (stale.namespaces.clone(), stale.namespaces)
        };
        loop {
            let made: Vec<_> = parts
                .iter()
                .map(|part| {
                    (
                        Arc::clone(part),
                        self.translate_namespace(objects, part, here),
                    )
                })
                .collect();
            let workloads = made.iter().flat_map(|(_, made)| &made.workloads);
            let known = self.networks.len();
            self.networks
                .extend(workloads.map(|of| Arc::clone(&of.network)));
            if self.networks.len() == known {
                return self.take(objects, made, before, here, mesh);
            }
            // The services of all namespaces get addresses in a new network.
            if self.manual_slices.is_empty() {
                parts = self.every_namespace(objects);
                before = self.parts.keys().cloned().collect();
            }
        }
    }

    /// Marks as stale what depends on a changed object.
    fn mark_stale(&mut self, objects: &Objects, (kind, key): (&str, &Key), stale: &mut Stale) {
        let root = *key.namespace == *self.config.root_namespace;
        match kind {
            "Node" | "Gateway" => stale.all = true,
            "Namespace" => {
                stale.all |= *key.name == *self.config.root_namespace;
                stale.namespace(&key.name);
                return;
            }
            "AuthorizationPolicy" => stale.all |= root,
            "PeerAuthentication" => {
                stale.all |= root;
                // The policy for STRICT is in the root namespace as long as there is any PeerAuthentication.
                stale.namespace(&self.config.root_namespace.as_str().into());
            }
            "EndpointSlice" => {
                let slice = objects.endpoint_slices.get(key);
                match slice.is_some_and(|slice| slice.body.is_by_hand(&key.namespace)) {
                    true => self.manual_slices.insert(key.clone()),
                    false => self.manual_slices.remove(key),
                };
            }
            _ => {}
        }
        stale.namespace(&key.namespace);
    }

    fn every_namespace(&self, objects: &Objects) -> BTreeSet<Arc<str>> {
        let mut all = objects.all_namespaces();
        // It has the policy for STRICT, even if it has no objects.
        all.insert(self.config.root_namespace.as_str().into());
        all
    }

    /// Replaces the parts `before` by new ones. Returns the differences from `mesh`.
    fn take(
        &mut self,
        objects: &Objects,
        mut made: Vec<(Arc<str>, Translation)>,
        before: BTreeSet<Arc<str>>,
        here: Enrolment<'_>,
        mesh: &Mesh,
    ) -> Delta {
        let mut delta = Delta::default();
        for part in before {
            let old = self.parts.remove(&part).unwrap_or_default();
            delta
                .workloads
                .extend(old.workloads.into_iter().map(|uid| (uid, None)));
            delta
                .services
                .extend(old.services.into_iter().map(|key| (key, None)));
            delta
                .policies
                .extend(old.policies.into_iter().map(|key| (key, None)));
        }
        // Problems of the root namespace's policies come with each namespace's; they are kept for the root only.
        let root: Arc<str> = self.config.root_namespace.as_str().into();
        made.sort_by_key(|(part, _)| *part != root);
        let mut of_root: Option<HashSet<String>> = None;
        for (part, made) in made {
            let mut problems = made.problems;
            if part != root && &*part != ALL_NAMESPACES {
                let told = of_root.get_or_insert_with(|| match self.parts.get(&root) {
                    Some(root) => root.problems.iter().cloned().collect(),
                    None => {
                        let made = self.translate_namespace(objects, &root, here);
                        made.problems.into_iter().collect()
                    }
                });
                problems.retain(|problem| !told.contains(problem));
            }
            let mut kept = Part {
                local: made.local,
                problems,
                ..Part::default()
            };
            for workload in made.workloads {
                let uid = Arc::clone(&workload.uid);
                kept.workloads.push(Arc::clone(&uid));
                put_if_changed(&mut delta.workloads, uid, workload, |uid| {
                    mesh.workload(uid)
                });
            }
            for service in made.services {
                let key: Arc<str> = service.key().into();
                kept.services.push(Arc::clone(&key));
                put_if_changed(&mut delta.services, key, service, |key| mesh.service(key));
            }
            for policy in made.policies {
                let key: Arc<str> = policy.key().into();
                kept.policies.push(Arc::clone(&key));
                put_if_changed(&mut delta.policies, key, policy, |key| mesh.policy(key));
            }
            if !kept.is_empty() {
                self.parts.insert(part, kept);
            }
        }
        delta
    }

    /// Translates the objects of one part.
    fn translate_namespace(
        &self,
        objects: &Objects,
        part: &Arc<str>,
        here: Enrolment<'_>,
    ) -> Translation {
        let context = MeshContext {
            networks: self.networks.clone(),
            peer_authentications: !objects.peer_authentications.is_empty(),
        };
        if &**part == ALL_NAMESPACES {
            return translate_part((objects, here.0, here.1), &self.config, &context);
        }
        let own = objects.of_namespace(part, &self.config.root_namespace);
        let mut made = translate_part((&own, here.0, here.1), &self.config, &context);
        made.policies.retain(|policy| policy.namespace == *part);
        made
    }
}

/// Adds a value to the delta; if the mesh has it already, drops its removal instead.
fn put_if_changed<'a, T: PartialEq + 'a>(
    delta: &mut BTreeMap<Arc<str>, Option<T>>,
    key: Arc<str>,
    value: T,
    there: impl Fn(&str) -> Option<&'a Arc<T>>,
) {
    match there(&key).is_some_and(|there| **there == value) {
        true => delta.remove(&key),
        false => delta.insert(key, Some(value)),
    };
}

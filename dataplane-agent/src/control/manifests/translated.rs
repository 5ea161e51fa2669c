//! The translation of all objects, updated as they change: a pod that has changed is translated again, or the
//! namespace of any other object, and the mesh gets the differences.
//!
//! The translation of a namespace depends on its own objects, on the policies of the mesh's root namespace, and
//! on cluster-wide facts: nodes, gateways, networks. Nothing depends on a pod but what is made of itself, and the
//! networks. Endpoints that are written by hand may be pods of any namespace; if there are any, all namespaces are
//! one part.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;

use super::super::enrolled::Enrolled;
use super::object::{Identity, Key, Objects};
use super::translate::{
    LocalPodSpec, MeshConfig, MeshContext, PodProblems, TranslatedPod, Translation, pod_uid,
    translate_part, translate_pods,
};
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
    workloads: BTreeSet<Arc<str>>,
    services: Vec<Arc<str>>,
    policies: Vec<Arc<str>>,
    /// By the workload's uid.
    local: BTreeMap<Arc<str>, LocalPodSpec>,
    /// But for those of pods.
    problems: Vec<String>,
    of_pods: PodProblems,
}

impl Part {
    fn is_empty(&self) -> bool {
        let meshed = [&self.services, &self.policies];
        meshed.iter().all(|all| all.is_empty())
            && self.workloads.is_empty()
            && self.local.is_empty()
            && self.problems.is_empty()
            && self.of_pods.is_empty()
    }
}

/// A namespace with some of its pods by their uids, each translated, or `None` if its object is gone.
type PodsMade = (Arc<str>, BTreeMap<Arc<str>, Option<TranslatedPod>>);

/// What must be translated again.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stale {
    all: bool,
    namespaces: BTreeSet<Arc<str>>,
    /// Names of pods by their namespaces.
    pods: BTreeMap<Arc<str>, BTreeSet<Arc<str>>>,
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
        !self.all && self.namespaces.is_empty() && self.pods.is_empty()
    }

    /// Marks this workload's pod as stale; everything, if the uid is not a pod's.
    pub fn workload(&mut self, uid: &str) {
        // `<cluster>//Pod/<namespace>/<name>`
        let mut parts = uid.rsplit('/');
        match (parts.next(), parts.next()) {
            (Some(name), Some(namespace)) => self.pod(&namespace.into(), &name.into()),
            _ => self.all = true,
        }
    }

    /// Marks a pod as stale.
    pub fn pod(&mut self, namespace: &Arc<str>, name: &Arc<str>) {
        let of = self.pods.entry(Arc::clone(namespace)).or_default();
        of.insert(Arc::clone(name));
    }

    /// Adds everything that another value marks as stale.
    pub fn add(&mut self, other: Self) {
        self.all |= other.all;
        self.namespaces.extend(other.namespaces);
        for (namespace, names) in other.pods {
            self.pods.entry(namespace).or_default().extend(names);
        }
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
        self.parts.values().flat_map(|part| part.local.values())
    }

    /// Returns the configuration that is not supported, and what happens instead; each problem once.
    pub fn problems(&self) -> impl Iterator<Item = &String> {
        let all = self.parts.values();
        let all = all.flat_map(|part| part.problems.iter().chain(part.of_pods.values().flatten()));
        let mut told = HashSet::new();
        all.filter(move |problem| told.insert(*problem))
    }

    /// Returns `true` if the objects contain a workload with this uid.
    pub fn has_workload(&self, uid: &str) -> bool {
        self.parts.values().any(|part| part.workloads.contains(uid))
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
        let is_whole = !self.manual_slices.is_empty();
        let (mut parts, mut before) = if is_whole {
            (BTreeSet::from([ALL_NAMESPACES.into()]), all())
        } else if stale.all || was_whole {
            (self.every_namespace(objects), all())
        } else {
            (stale.namespaces.clone(), stale.namespaces)
        };
        let mut pods = stale.pods;
        pods.retain(|namespace, _| !is_whole && !parts.contains(namespace));
        loop {
            let made = parts.iter().map(|part| {
                let made = self.translate_namespace(objects, part, here);
                (Arc::clone(part), made)
            });
            let made: Vec<_> = made.collect();
            let made_pods = pods.iter().map(|(namespace, names)| {
                let made = self.translate_pods(objects, (namespace, names), here);
                (Arc::clone(namespace), made)
            });
            let made_pods: Vec<PodsMade> = made_pods.collect();
            let workloads = made.iter().flat_map(|(_, (made, _))| &made.workloads);
            let of_pods = made_pods.iter().flat_map(|(_, made)| made.values());
            let of_pods = of_pods.flatten().filter_map(|made| made.workload.as_ref());
            let known = self.networks.len();
            let networks = workloads.chain(of_pods).map(|of| Arc::clone(&of.network));
            self.networks.extend(networks);
            if self.networks.len() == known {
                let mut delta = self.take(objects, made, before, here, mesh);
                for made in made_pods {
                    self.take_pods(made, mesh, &mut delta);
                }
                return delta;
            }
            // The services of all namespaces get addresses in a new network.
            if !is_whole {
                parts = self.every_namespace(objects);
                before = self.parts.keys().cloned().collect();
                pods.clear();
            }
        }
    }

    /// Marks as stale what depends on a changed object.
    fn mark_stale(&mut self, objects: &Objects, (kind, key): (&str, &Key), stale: &mut Stale) {
        let root = *key.namespace == *self.config.root_namespace;
        match kind {
            "Pod" => return stale.pod(&key.namespace, &key.name),
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
        mut made: Vec<(Arc<str>, (Translation, PodProblems))>,
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
        for (part, (made, of_pods)) in made {
            let mut problems = made.problems;
            if part != root && &*part != ALL_NAMESPACES {
                let told = of_root.get_or_insert_with(|| match self.parts.get(&root) {
                    Some(root) => root.problems.iter().cloned().collect(),
                    None => {
                        let (made, _) = self.translate_namespace(objects, &root, here);
                        made.problems.into_iter().collect()
                    }
                });
                problems.retain(|problem| !told.contains(problem));
            }
            let local = made.local.into_iter();
            let mut kept = Part {
                local: local.map(|pod| (Arc::clone(&pod.uid), pod)).collect(),
                problems,
                of_pods,
                ..Part::default()
            };
            for workload in made.workloads {
                let uid = Arc::clone(&workload.uid);
                kept.workloads.insert(Arc::clone(&uid));
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

    /// Replaces some pods of a namespace. Adds the differences from `mesh` to `delta`.
    fn take_pods(&mut self, (namespace, pods): PodsMade, mesh: &Mesh, delta: &mut Delta) {
        let part = self.parts.entry(Arc::clone(&namespace)).or_default();
        for (uid, made) in pods {
            if part.workloads.remove(&uid) {
                delta.workloads.insert(Arc::clone(&uid), None);
            }
            part.local.remove(&uid);
            part.of_pods.remove(&uid);
            let Some(made) = made else {
                continue;
            };
            if let Some(local) = made.local {
                part.local.insert(Arc::clone(&uid), local);
            }
            if !made.problems.is_empty() {
                part.of_pods.insert(Arc::clone(&uid), made.problems);
            }
            if let Some(workload) = made.workload {
                part.workloads.insert(Arc::clone(&uid));
                put_if_changed(&mut delta.workloads, uid, workload, |uid| {
                    mesh.workload(uid)
                });
            }
        }
        if part.is_empty() {
            self.parts.remove(&namespace);
        }
    }

    /// Translates the objects of one part.
    fn translate_namespace(
        &self,
        objects: &Objects,
        part: &Arc<str>,
        here: Enrolment<'_>,
    ) -> (Translation, PodProblems) {
        let context = MeshContext {
            networks: self.networks.clone(),
            peer_authentications: !objects.peer_authentications.is_empty(),
        };
        if &**part == ALL_NAMESPACES {
            return translate_part((objects, here.0, here.1), &self.config, &context);
        }
        let own = objects.of_namespace(part, &self.config.root_namespace);
        let (mut made, of_pods) = translate_part((&own, here.0, here.1), &self.config, &context);
        made.policies.retain(|policy| policy.namespace == *part);
        (made, of_pods)
    }

    /// Translates pods of a namespace.
    fn translate_pods(
        &self,
        objects: &Objects,
        (namespace, names): (&Arc<str>, &BTreeSet<Arc<str>>),
        here: Enrolment<'_>,
    ) -> BTreeMap<Arc<str>, Option<TranslatedPod>> {
        let own = objects.of_pods(namespace, names, &self.config.root_namespace);
        let made = translate_pods((&own, here.0, here.1), &self.config);
        let made = made.into_iter();
        let made = made.map(|pod| (Arc::clone(&pod.uid), Some(pod)));
        let gone = names.iter().map(|name| {
            let (namespace, name) = (Arc::clone(namespace), Arc::clone(name));
            (pod_uid(&self.config, &Key { namespace, name }), None)
        });
        gone.chain(made).collect()
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

//! A change of the mesh.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::policy::Policy;
use super::service::Service;
use super::workload::Workload;

/// A set of changes: for each key the new value, or `None` if the object is gone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Delta {
    /// By uid.
    pub workloads: BTreeMap<Arc<str>, Option<Workload>>,
    /// By key, `namespace/hostname`.
    pub services: BTreeMap<Arc<str>, Option<Service>>,
    /// By key, `namespace/name`.
    pub policies: BTreeMap<Arc<str>, Option<Policy>>,
}

impl Delta {
    /// Returns a change that adds or replaces these objects. Of two with the same key the later one counts.
    pub fn of(workloads: Vec<Workload>, services: Vec<Service>, policies: Vec<Policy>) -> Self {
        let workloads = workloads.into_iter().map(|of| (of.uid.clone(), Some(of)));
        let services = services.into_iter().map(|of| (of.key().into(), Some(of)));
        let policies = policies.into_iter().map(|of| (of.key().into(), Some(of)));
        Self {
            workloads: workloads.collect(),
            services: services.collect(),
            policies: policies.collect(),
        }
    }

    /// Keeps only the workloads of one node, and removes from the mesh those that are now on another one.
    pub fn retain_node(&mut self, node: &str) {
        self.services.clear();
        self.policies.clear();
        for workload in self.workloads.values_mut() {
            workload.take_if(|workload| *workload.node != *node);
        }
    }

    /// Returns `true` if it changes nothing.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the number of objects that it changes.
    pub fn len(&self) -> usize {
        self.workloads.len() + self.services.len() + self.policies.len()
    }
}

#[cfg(test)]
mod whole {
    use std::collections::BTreeSet;

    use super::*;
    use crate::mesh::Mesh;

    impl Delta {
        /// Returns the change that leaves `mesh` with exactly these objects: equal ones are left out, and
        /// those that are not named here are removed.
        pub(crate) fn from(mut self, mesh: &Mesh) -> Self {
            complete(
                &mut self.workloads,
                mesh.workloads().map(|of| (&of.uid, of)),
            );
            complete(&mut self.services, mesh.services());
            complete(&mut self.policies, mesh.policies());
            self
        }
    }

    /// Drops the entries that equal those of `there`, and adds a removal for each that only `there` has.
    fn complete<'a, T: PartialEq + 'a>(
        said: &mut BTreeMap<Arc<str>, Option<T>>,
        there: impl Iterator<Item = (&'a Arc<str>, &'a Arc<T>)>,
    ) {
        let mut same = BTreeSet::new();
        let mut gone = Vec::new();
        for (key, is) in there {
            match said.get(key) {
                Some(Some(value)) if *value == **is => {
                    same.insert(Arc::clone(key));
                }
                Some(_) => {}
                None => gone.push(Arc::clone(key)),
            }
        }
        said.retain(|key, _| !same.contains(key));
        said.extend(gone.into_iter().map(|key| (key, None)));
    }
}

//! What is to be another in the mesh.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::policy::Policy;
use super::service::Service;
use super::workload::Workload;

/// Changes, each a new value or the word that there is none any more. Of two of one key the later one
/// holds.
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
    /// These are there.
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

    /// Whether nothing is to change.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How much is to change.
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
        /// What makes of a mesh one that has this and nothing else: what is in it already is left out, and
        /// what is not said is gone.
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

    /// Leaves what is other than `there`, and says of what is there alone that it is gone.
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

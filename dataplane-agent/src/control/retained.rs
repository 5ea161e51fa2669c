//! Keeps a pod whose object is gone in the mesh for as long as it is served, with the policies that it names.
//! Its connections are decided as before until the last one ends.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::mesh::{Delta, Mesh, Workload};

/// The uids of the workloads and the keys of the policies that are retained.
#[derive(Debug, Default)]
pub(super) struct RetainedPods {
    workloads: BTreeSet<Arc<str>>,
    policies: BTreeSet<Arc<str>>,
}

/// Tells if a workload's uid or a policy's key is configured.
pub(super) type IsConfigured<'a> = &'a dyn Fn(&str) -> bool;

impl RetainedPods {
    /// Returns true if a pod is known only because it is retained.
    pub(super) fn has(&self, uid: &str) -> bool {
        self.workloads.contains(uid)
    }

    /// Removes from `delta`, a change of `mesh`, the removal of pods that are served, and of their policies;
    /// adds the removal of retained ones that are not served any more. `workload`, `policy`: what is
    /// configured after the change.
    pub(super) fn keep(
        &mut self,
        served: &BTreeSet<Arc<str>>,
        (workload, policy): (IsConfigured<'_>, IsConfigured<'_>),
        mesh: &Mesh,
        delta: &mut Delta,
    ) {
        self.workloads.retain(|uid| !workload(uid));
        for uid in self.workloads.difference(served) {
            delta.workloads.insert(Arc::clone(uid), None);
        }
        self.workloads.retain(|uid| served.contains(uid));
        for uid in served {
            if let (Some(None), Some(last)) = (delta.workloads.get(uid), mesh.workload(uid)) {
                // It is no service's endpoint any more.
                let mut last = Workload::clone(last);
                last.services = Arc::default();
                delta.workloads.insert(Arc::clone(uid), Some(last));
                self.workloads.insert(Arc::clone(uid));
            }
        }
        let workloads = self.workloads.iter().filter_map(|uid| mesh.workload(uid));
        let named: BTreeSet<&Arc<str>> = workloads.flat_map(|last| last.policies.iter()).collect();
        self.policies.retain(|key| !policy(key));
        for key in self.policies.iter().filter(|key| !named.contains(key)) {
            delta.policies.insert(Arc::clone(key), None);
        }
        self.policies.retain(|key| named.contains(key));
        for key in named {
            if delta.policies.get(key) == Some(&None) {
                delta.policies.remove(key);
                self.policies.insert(Arc::clone(key));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::policy::{Action, Policy, PolicyScope};
    use crate::mesh::workload::Endpoint;
    use crate::mesh::workload::tests::workload;

    fn policy() -> Policy {
        Policy {
            name: "p".into(),
            namespace: "ns".into(),
            scope: PolicyScope::WorkloadSelector,
            action: Action::Allow,
            rules: Vec::new(),
            dry_run: false,
        }
    }

    /// A mesh of one pod that serves somebody and names a policy.
    fn mesh() -> Mesh {
        let mut pod = workload(&["ns/p"]);
        pod.services = Arc::new([("ns/s".into(), Endpoint::default())].into());
        Mesh::of(vec![pod], Vec::new(), vec![policy()])
    }

    /// A delta that removes all of the mesh.
    fn gone() -> Delta {
        Delta::default().from(&mesh())
    }

    #[test]
    fn a_served_pod_and_its_policies_are_known_until_it_has_left() {
        let mut retained = RetainedPods::default();
        let mut mesh = mesh();
        let uid = workload(&[]).uid;
        let served = BTreeSet::from([Arc::clone(&uid)]);
        let no = |_: &str| false;
        let mut delta = gone();
        retained.keep(&served, (&no, &no), &mesh, &mut delta);
        mesh.apply(delta);
        let left = mesh.workload(&uid).expect("it is served");
        assert!(left.services.is_empty(), "nobody is sent there any more");
        assert!(mesh.policies_of(left).unknown.is_empty());
        // Nothing changes as long as it is served.
        let mut delta = Delta::default();
        retained.keep(&served, (&no, &no), &mesh, &mut delta);
        assert!(delta.is_empty());
        retained.keep(&BTreeSet::new(), (&no, &no), &mesh, &mut delta);
        mesh.apply(delta);
        assert_eq!((mesh.workloads().count(), mesh.policies().len()), (0, 0));
        let mut delta = Delta::default();
        retained.keep(&BTreeSet::new(), (&no, &no), &mesh, &mut delta);
        assert!(delta.is_empty());
    }

    #[test]
    fn one_that_comes_back_stays_when_it_is_not_served_any_more() {
        let mut retained = RetainedPods::default();
        let mut mesh = mesh();
        let uid = workload(&[]).uid;
        let served = BTreeSet::from([Arc::clone(&uid)]);
        let mut delta = gone();
        retained.keep(&served, (&|_| false, &|_| false), &mesh, &mut delta);
        mesh.apply(delta);
        let mut delta = Delta::of(vec![workload(&["ns/p"])], Vec::new(), vec![policy()]);
        retained.keep(&served, (&|_| true, &|_| true), &mesh, &mut delta);
        mesh.apply(delta);
        let mut delta = Delta::default();
        retained.keep(&BTreeSet::new(), (&|_| true, &|_| true), &mesh, &mut delta);
        assert!(delta.is_empty());
    }

    #[test]
    fn one_that_is_not_served_goes_at_once() {
        let mut delta = gone();
        RetainedPods::default().keep(
            &BTreeSet::new(),
            (&|_| false, &|_| false),
            &mesh(),
            &mut delta,
        );
        assert_eq!(delta, gone());
    }
}

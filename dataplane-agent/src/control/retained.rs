//! Keeps a pod whose object is gone in the mesh for as long as it is served, with the policies that apply to it.
//! Its connections are decided as before until the last one ends.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::mesh::policy::{Policy, PolicyScope};
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
        self.policies.retain(|key| !policy(key));
        let mut named = BTreeSet::new();
        for uid in &self.workloads {
            let changed = delta.workloads.get(uid).and_then(Option::as_ref);
            let Some(last) = changed.or_else(|| mesh.workload(uid).map(Arc::as_ref)) else {
                continue;
            };
            named.extend(last.policies.iter().cloned());
            let shared = shared_and_removed(last, mesh, delta);
            if !shared.is_empty() {
                let mut last = last.clone();
                last.policies = last.policies.iter().chain(&shared).cloned().collect();
                delta.workloads.insert(Arc::clone(uid), Some(last));
                named.extend(shared);
            }
        }
        for key in self.policies.difference(&named) {
            delta.policies.insert(Arc::clone(key), None);
        }
        self.policies.retain(|key| named.contains(key));
        for key in named {
            if delta.policies.get(&key) == Some(&None)
                && let Some(last) = mesh.policy(&key)
            {
                // For other pods it is gone.
                let of_selected = Policy {
                    scope: PolicyScope::WorkloadSelector,
                    ..Policy::clone(last)
                };
                match last.scope == of_selected.scope {
                    true => delta.policies.remove(&key),
                    false => delta.policies.insert(Arc::clone(&key), Some(of_selected)),
                };
                self.policies.insert(key);
            }
        }
    }
}

/// Returns the keys of the policies that apply to a workload without being named by it, and that a change removes.
fn shared_and_removed(workload: &Workload, mesh: &Mesh, delta: &Delta) -> Vec<Arc<str>> {
    let removed = delta.policies.iter().filter(|(_, policy)| policy.is_none());
    let shared = removed.filter(|(key, _)| {
        let applies = mesh.policy(key).is_some_and(|policy| match policy.scope {
            PolicyScope::Global => true,
            PolicyScope::Namespace => policy.namespace == workload.namespace,
            PolicyScope::WorkloadSelector => false,
        });
        applies && !workload.policies.contains(key)
    });
    shared.map(|(key, _)| Arc::clone(key)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::policy::Action;
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

    /// Those of its namespace, and of the whole mesh, which it does not name.
    #[test]
    fn a_served_pod_is_decided_by_all_policies_that_applied_and_others_are_not() {
        let removed = [
            ("all", PolicyScope::Namespace),
            ("root", PolicyScope::Global),
        ];
        let [of_namespace, of_all] = removed.map(|(name, scope)| Policy {
            name: name.into(),
            scope,
            ..policy()
        });
        let other = Workload {
            uid: "c//Pod/ns/other".into(),
            ..workload(&[])
        };
        let mut mesh = Mesh::of(
            vec![workload(&["ns/p"]), other.clone()],
            Vec::new(),
            vec![policy(), of_namespace.clone(), of_all.clone()],
        );
        let uid = workload(&[]).uid;
        let served = BTreeSet::from([Arc::clone(&uid)]);
        let mut retained = RetainedPods::default();
        let no = |_: &str| false;
        // First the pod and the policy of its namespace, later that of the mesh.
        let left = Delta::of(vec![other.clone()], Vec::new(), vec![of_all]);
        let last = Delta::of(vec![other.clone()], Vec::new(), Vec::new());
        for left in [left, last] {
            let mut delta = left.from(&mesh);
            retained.keep(&served, (&|uid| *uid == *other.uid, &no), &mesh, &mut delta);
            mesh.apply(delta);
            let decided = mesh.policies_of(mesh.workload(&uid).expect("it is served"));
            assert!(decided.unknown.is_empty());
            assert_eq!(decided.policies.len(), 3);
        }
        let others = mesh.policies_of(mesh.workload(&other.uid).expect("configured"));
        assert!(others.policies.is_empty(), "{others:?}");
        // One that is configured again counts once.
        let again = Delta::of(Vec::new(), Vec::new(), vec![of_namespace.clone()]);
        mesh.apply(again);
        let is_again = |key: &str| *key == *of_namespace.key();
        let mut delta = Delta::default();
        retained.keep(&served, (&no, &is_again), &mesh, &mut delta);
        assert!(delta.is_empty());
        let decided = mesh.policies_of(mesh.workload(&uid).expect("it is served"));
        assert_eq!(decided.policies.len(), 3);
        retained.keep(&BTreeSet::new(), (&no, &is_again), &mesh, &mut delta);
        mesh.apply(delta);
        assert_eq!((mesh.workloads().count(), mesh.policies().len()), (1, 1));
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

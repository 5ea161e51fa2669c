//! Which step is next for each pod: what is wanted against what is, as a pure function.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// What control wants, reduced to names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Want {
    /// Pods to be captured: the cookie of each one's network namespace, and its uid.
    pub pods: BTreeMap<u64, Arc<str>>,
    /// Pods that are wanted and were not found (again): what is captured of them stays so.
    pub waiting: BTreeSet<Arc<str>>,
    /// Network namespaces that no longer have a process or a name.
    pub gone: BTreeSet<u64>,
}

/// How far a pod is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Captured by a predecessor, served by nobody.
    Adopted,
    /// Captured and served.
    Serving,
    /// No longer captured; what runs goes on.
    Draining,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Step {
    /// Capture and serve it.
    Enrol(u64),
    /// It was draining: capture it again.
    Revive(u64),
    /// Capture no more, and let what runs go on.
    Leave(u64),
    /// There is nothing left in it: cut what is, and forget it.
    Cut(u64),
    /// Nobody served it: put back what was changed.
    Undo(u64),
}

/// The steps that bring `have` to `want`. Never more than one per pod; when they are done, ask again.
///
/// A uid is served in one network namespace at a time: a pod that comes back in a new one waits
/// until the old one is gone.
pub fn diff(want: &Want, have: &BTreeMap<u64, (Arc<str>, Phase)>) -> Vec<Step> {
    let mut steps = Vec::new();
    for (&cookie, (uid, phase)) in have {
        let wanted = want.pods.get(&cookie) == Some(uid);
        // Taken over from a predecessor, or lost from sight: passing in clear would be wrong, and
        // the pod that is wanted may well be this one.
        let undecided = want.waiting.contains(uid) && !want.pods.values().any(|other| other == uid);
        let gone = want.gone.contains(&cookie);
        match phase {
            Phase::Adopted if gone => steps.push(Step::Undo(cookie)),
            Phase::Adopted if wanted => steps.push(Step::Enrol(cookie)),
            Phase::Adopted if undecided => {}
            Phase::Adopted => steps.push(Step::Undo(cookie)),
            Phase::Serving | Phase::Draining if gone => steps.push(Step::Cut(cookie)),
            Phase::Serving if wanted || undecided => {}
            Phase::Serving => steps.push(Step::Leave(cookie)),
            Phase::Draining if wanted => steps.push(Step::Revive(cookie)),
            Phase::Draining => {}
        }
    }
    for (&cookie, uid) in &want.pods {
        let elsewhere = have.iter().any(|(&other, (served, phase))| {
            other != cookie && served == uid && *phase != Phase::Adopted
        });
        if !have.contains_key(&cookie) && !elsewhere && !want.gone.contains(&cookie) {
            steps.push(Step::Enrol(cookie));
        }
    }
    steps
}

#[cfg(test)]
mod tests {
    use proptest::collection::{btree_map, btree_set};
    use proptest::prelude::*;

    use super::*;

    fn uid(number: u64) -> Arc<str> {
        format!("pod-{number}").into()
    }

    fn want() -> impl Strategy<Value = Want> {
        (
            btree_map(0..6_u64, 0..4_u64, 0..5),
            btree_set(0..4_u64, 0..3),
            btree_set(0..6_u64, 0..3),
        )
            .prop_map(|(pods, waiting, gone)| Want {
                pods: pods
                    .into_iter()
                    .map(|(cookie, pod)| (cookie, uid(pod)))
                    .collect(),
                waiting: waiting.into_iter().map(uid).collect(),
                gone,
            })
    }

    fn have() -> impl Strategy<Value = BTreeMap<u64, (Arc<str>, Phase)>> {
        let phase = prop_oneof![
            Just(Phase::Adopted),
            Just(Phase::Serving),
            Just(Phase::Draining)
        ];
        btree_map(0..6_u64, (0..4_u64, phase), 0..5).prop_map(|have| {
            have.into_iter()
                .map(|(cookie, (pod, phase))| (cookie, (uid(pod), phase)))
                .collect()
        })
    }

    /// What the room makes of a step, as far as `diff` sees it.
    fn apply(have: &mut BTreeMap<u64, (Arc<str>, Phase)>, want: &Want, step: &Step) {
        match step {
            Step::Enrol(cookie) | Step::Revive(cookie) => {
                have.insert(*cookie, (want.pods[cookie].clone(), Phase::Serving));
            }
            Step::Leave(cookie) => {
                if let Some(pod) = have.get_mut(cookie) {
                    pod.1 = Phase::Draining;
                }
            }
            Step::Cut(cookie) | Step::Undo(cookie) => _ = have.remove(cookie),
        }
    }

    proptest! {
        /// Draining pods end by themselves; then nothing is left to do, and it is what was wanted.
        #[test]
        fn it_comes_to_rest_where_it_was_told_to(want in want(), mut have in have()) {
            for _ in 0..4 {
                for step in diff(&want, &have) {
                    apply(&mut have, &want, &step);
                }
                have.retain(|_, (_, phase)| *phase != Phase::Draining);
            }
            prop_assert_eq!(diff(&want, &have), vec![]);
            for (cookie, (uid, phase)) in &have {
                let wanted = want.pods.get(cookie) == Some(uid) && *phase == Phase::Serving;
                prop_assert!(wanted || want.waiting.contains(uid), "{cookie} {uid} {phase:?}");
                prop_assert!(!want.gone.contains(cookie));
            }
        }

        /// A pod that is wanted is never let go, whether it is in sight or not.
        #[test]
        fn what_is_wanted_stays_captured(want in want(), have in have()) {
            for step in diff(&want, &have) {
                if let Step::Leave(cookie) | Step::Undo(cookie) | Step::Cut(cookie) = step {
                    let uid = &have[&cookie].0;
                    let here = want.pods.get(&cookie) == Some(uid);
                    prop_assert!(want.gone.contains(&cookie) || !here);
                    let elsewhere = want.pods.values().any(|other| other == uid);
                    prop_assert!(
                        want.gone.contains(&cookie) || elsewhere || !want.waiting.contains(uid)
                    );
                }
            }
        }

        #[test]
        fn one_step_per_pod(want in want(), have in have()) {
            let steps = diff(&want, &have);
            let cookies: BTreeSet<u64> = steps
                .iter()
                .map(|step| match step {
                    Step::Enrol(cookie)
                    | Step::Revive(cookie)
                    | Step::Leave(cookie)
                    | Step::Cut(cookie)
                    | Step::Undo(cookie) => *cookie,
                })
                .collect();
            prop_assert_eq!(cookies.len(), steps.len());
        }
    }
}

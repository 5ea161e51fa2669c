//! The next step of each pod, decided from what is wanted and what there is, as a pure function.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// What control wants, reduced to keys.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Want {
    /// The uid of each pod that is to be captured, by the cookie of its network namespace.
    pub pods: BTreeMap<u64, Arc<str>>,
    /// Uids of wanted pods that were not found (again). As far as they are captured they stay so.
    pub unlocated: BTreeSet<Arc<str>>,
    /// Network namespaces that no longer have a process or a name.
    pub gone: BTreeSet<u64>,
}

impl Want {
    /// Returns `true` if a pod that is captured, or not (`captured`), is to be so from now on. It is if it is
    /// wanted, or if a pod of its uid was not found anywhere: that may well be this one, left by a predecessor or
    /// lost from sight. If that pod was found in another namespace this one is its earlier instance, such as after
    /// a forced deletion: it stays captured if it is, since nothing but its end takes it out of the mesh.
    pub fn keeps_captured(&self, cookie: u64, uid: &Arc<str>, captured: bool) -> bool {
        let is_earlier = self.pods.values().any(|other| other == uid);
        let wanted = self.pods.contains_key(&cookie)
            || match is_earlier {
                true => captured,
                false => self.unlocated.contains(uid),
            };
        wanted && !self.gone.contains(&cookie)
    }
}

/// The present state of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Has {
    /// The workload's uid.
    pub uid: Arc<str>,
    /// How far the pod is.
    pub phase: Phase,
    /// `true` if the kernel captures the pod. A pod that is served is meant to be captured.
    pub captured: bool,
    /// `true` if the pod is served as what is wanted in its namespace now, or nothing is wanted there.
    pub unchanged: bool,
    /// `true` if no proxy carries connections of the pod. One may carry those of an unserved pod, from an earlier
    /// node process.
    pub cleared: bool,
}

/// How far a pod is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// It has an undo record, and nobody serves it. It may be captured.
    Unserved,
    /// Captured and served.
    Serving,
    /// No longer captured; its connections go on. It is served, or a proxy may carry what an earlier node process
    /// has leased.
    Draining,
    /// Its connections are being cut; it is unserved after that.
    Cutting,
}

/// A step that the reconciler takes for one pod.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Step {
    /// Captures and serves the pod.
    Enrol(u64),
    /// Captures a leaving pod again, or has it unserved again if it is not served.
    Revive(u64),
    /// Cuts the connections of a pod that is to be served as something else. It stays captured, unserved.
    StopServing(u64),
    /// Stops capturing the pod, and lets its connections go on.
    Leave(u64),
    /// Cuts what is left of a pod whose namespace is gone. It is unserved then.
    ForceRemove(u64),
    /// Undoes what was changed for an unserved pod.
    Undo(u64),
}

/// Returns the steps that bring `have` to `want`, at most one per pod. Call it again when they are done.
///
/// What is wanted in a namespace never waits for another namespace: a pod that comes back under its name is
/// enrolled while its earlier instance is still there. A captured pod that is to be served as something else is not
/// released in between.
pub fn diff(want: &Want, have: &BTreeMap<u64, Has>) -> Vec<Step> {
    let mut steps = Vec::new();
    for (&cookie, has) in have {
        let wanted = want.pods.contains_key(&cookie);
        let kept = want.keeps_captured(cookie, &has.uid, has.captured);
        let gone = want.gone.contains(&cookie);
        match has.phase {
            Phase::Unserved if gone => steps.push(Step::Undo(cookie)),
            Phase::Unserved if wanted => steps.push(Step::Enrol(cookie)),
            Phase::Unserved if kept => {}
            Phase::Unserved if !has.cleared => steps.push(Step::Leave(cookie)),
            Phase::Unserved => steps.push(Step::Undo(cookie)),
            Phase::Serving | Phase::Draining if gone => steps.push(Step::ForceRemove(cookie)),
            Phase::Serving | Phase::Draining if wanted && !has.unchanged => {
                steps.push(Step::StopServing(cookie));
            }
            Phase::Serving if kept => {}
            Phase::Serving => steps.push(Step::Leave(cookie)),
            Phase::Draining if wanted => steps.push(Step::Revive(cookie)),
            Phase::Draining | Phase::Cutting => {}
        }
    }
    let new = want.pods.keys();
    let new = new.filter(|cookie| !have.contains_key(cookie) && !want.gone.contains(cookie));
    steps.extend(new.map(|&cookie| Step::Enrol(cookie)));
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
            .prop_map(|(pods, unlocated, gone)| Want {
                pods: pods
                    .into_iter()
                    .map(|(cookie, pod)| (cookie, uid(pod)))
                    .collect(),
                unlocated: unlocated.into_iter().map(uid).collect(),
                gone,
            })
    }

    fn have() -> impl Strategy<Value = BTreeMap<u64, Has>> {
        let phase = prop_oneof![
            Just(Phase::Unserved),
            Just(Phase::Serving),
            Just(Phase::Draining),
            Just(Phase::Cutting)
        ];
        let of_pod = (0..4_u64, phase, any::<[bool; 3]>());
        btree_map(0..6_u64, of_pod, 0..5).prop_map(|have| {
            have.into_iter()
                .map(|(cookie, (pod, phase, [captured, unchanged, cleared]))| {
                    let uid = uid(pod);
                    let captured = match phase {
                        Phase::Serving => true,
                        Phase::Draining => false,
                        Phase::Unserved | Phase::Cutting => captured,
                    };
                    (
                        cookie,
                        Has {
                            uid,
                            phase,
                            captured,
                            unchanged,
                            cleared: cleared && phase == Phase::Unserved,
                        },
                    )
                })
                .collect()
        })
    }

    /// Generates both, consistent with each other: what is served under another uid is not unchanged.
    fn want_and_have() -> impl Strategy<Value = (Want, BTreeMap<u64, Has>)> {
        (want(), have()).prop_map(|(want, mut have)| {
            for (cookie, has) in &mut have {
                has.unchanged &= want.pods.get(cookie).is_none_or(|uid| *uid == has.uid);
            }
            (want, have)
        })
    }

    /// Applies a step as the reconciler would, as far as `diff` sees it.
    fn apply(have: &mut BTreeMap<u64, Has>, want: &Want, step: &Step) {
        match step {
            Step::Enrol(cookie) | Step::Revive(cookie) => {
                let (uid, phase) = (want.pods[cookie].clone(), Phase::Serving);
                have.insert(
                    *cookie,
                    Has {
                        uid,
                        phase,
                        captured: true,
                        unchanged: true,
                        cleared: false,
                    },
                );
            }
            Step::StopServing(cookie) => {
                have.get_mut(cookie).expect("it is there").phase = Phase::Cutting;
            }
            Step::ForceRemove(cookie) => {
                let has = have.get_mut(cookie).expect("it is there");
                (has.phase, has.captured) = (Phase::Cutting, false);
            }
            Step::Leave(cookie) => {
                let has = have.get_mut(cookie).expect("it is there");
                (has.phase, has.captured) = (Phase::Draining, false);
            }
            Step::Undo(cookie) => _ = have.remove(cookie),
        }
    }

    /// Nobody serves any more what was in one of these phases.
    fn end(have: &mut BTreeMap<u64, Has>, phases: &[Phase]) {
        let all = have.values_mut();
        for has in all.filter(|has| phases.contains(&has.phase)) {
            (has.phase, has.cleared) = (Phase::Unserved, true);
        }
    }

    /// The wishes for a pod, or for its namespace.
    #[derive(Clone, Copy, Debug)]
    enum Is {
        Wanted,
        WantedAsAnother,
        OutOfSight,
        WantedElsewhere,
        WantedElsewhereAndFree,
        Gone,
        GoneAndWanted,
        NotWanted,
        NotWantedAndCarried,
    }

    #[test]
    fn each_step_fits_how_far_the_pod_is() {
        use Is::*;
        use Phase::*;
        let next = |phase, is| {
            let mut want = Want::default();
            if let Wanted | WantedAsAnother | GoneAndWanted = is {
                want.pods.insert(1, uid(1));
            }
            if let Gone | GoneAndWanted = is {
                want.gone.insert(1);
            }
            if let OutOfSight = is {
                want.unlocated.insert(uid(1));
            }
            let mut have = BTreeMap::new();
            if let WantedElsewhere | WantedElsewhereAndFree = is {
                want.pods.insert(2, uid(1));
                let (uid, phase) = (uid(1), Serving);
                have.insert(
                    2,
                    Has {
                        uid,
                        phase,
                        captured: true,
                        unchanged: true,
                        cleared: false,
                    },
                );
            }
            let unchanged = !matches!(is, WantedAsAnother);
            have.insert(
                1,
                Has {
                    uid: uid(1),
                    phase,
                    captured: !matches!((phase, is), (Draining, _) | (_, WantedElsewhereAndFree)),
                    unchanged,
                    cleared: !matches!(is, NotWantedAndCarried),
                },
            );
            diff(&want, &have)
        };
        for (phase, is, step) in [
            (Unserved, Wanted, Some(Step::Enrol(1))),
            (Unserved, WantedAsAnother, Some(Step::Enrol(1))),
            (Unserved, OutOfSight, None),
            (Unserved, WantedElsewhere, None),
            (Unserved, WantedElsewhereAndFree, Some(Step::Undo(1))),
            (Unserved, Gone, Some(Step::Undo(1))),
            (Unserved, GoneAndWanted, Some(Step::Undo(1))),
            (Unserved, NotWanted, Some(Step::Undo(1))),
            (Unserved, NotWantedAndCarried, Some(Step::Leave(1))),
            (Serving, Wanted, None),
            (Serving, WantedAsAnother, Some(Step::StopServing(1))),
            (Serving, OutOfSight, None),
            (Serving, WantedElsewhere, None),
            (Serving, Gone, Some(Step::ForceRemove(1))),
            (Serving, GoneAndWanted, Some(Step::ForceRemove(1))),
            (Serving, NotWanted, Some(Step::Leave(1))),
            (Draining, Wanted, Some(Step::Revive(1))),
            (Draining, WantedAsAnother, Some(Step::StopServing(1))),
            (Draining, OutOfSight, None),
            (Draining, WantedElsewhere, None),
            (Draining, Gone, Some(Step::ForceRemove(1))),
            (Draining, GoneAndWanted, Some(Step::ForceRemove(1))),
            (Draining, NotWanted, None),
            (Cutting, Wanted, None),
            (Cutting, WantedAsAnother, None),
            (Cutting, Gone, None),
            (Cutting, NotWanted, None),
        ] {
            let expected: Vec<Step> = step.into_iter().collect();
            assert_eq!(next(phase, is), expected, "{phase:?}, {is:?}");
        }
    }

    proptest! {
        /// Draining and cutting end by themselves; then nothing is left to do, and all is as wanted.
        #[test]
        fn it_comes_to_rest_where_it_was_told_to((want, mut have) in want_and_have()) {
            for _ in 0..4 {
                for step in diff(&want, &have) {
                    apply(&mut have, &want, &step);
                }
                end(&mut have, &[Phase::Draining, Phase::Cutting]);
            }
            prop_assert_eq!(diff(&want, &have), vec![]);
            for (cookie, has) in &have {
                let wanted = want.pods.get(cookie) == Some(&has.uid)
                    && has.phase == Phase::Serving
                    && has.unchanged;
                let is_earlier = has.captured && want.pods.values().any(|other| *other == has.uid);
                prop_assert!(
                    wanted || is_earlier || want.unlocated.contains(&has.uid),
                    "{cookie} {has:?}"
                );
                prop_assert!(!want.gone.contains(cookie));
            }
        }

        /// A wanted pod is never released, whether it is in sight or not; nor is an earlier instance of it.
        #[test]
        fn what_is_wanted_stays_captured((want, have) in want_and_have()) {
            for step in diff(&want, &have) {
                if let Step::Leave(cookie) | Step::Undo(cookie) | Step::ForceRemove(cookie) = step {
                    let Has { uid, captured, .. } = &have[&cookie];
                    let gone = want.gone.contains(&cookie);
                    prop_assert!(gone || !want.pods.contains_key(&cookie));
                    let elsewhere = want.pods.values().any(|other| other == uid);
                    prop_assert!(gone || elsewhere || !want.unlocated.contains(uid));
                    prop_assert!(gone || !(elsewhere && *captured));
                }
            }
        }

        /// It does not wait for other pods of its name, however long they take to end.
        #[test]
        fn what_is_wanted_is_served_without_waiting_for_what_drains((want, mut have) in want_and_have()) {
            // The second round is for pods that must stop being served before they are enrolled anew.
            for _ in 0..2 {
                for step in diff(&want, &have) {
                    apply(&mut have, &want, &step);
                }
                end(&mut have, &[Phase::Cutting]);
            }
            for (cookie, uid) in &want.pods {
                let (uid, phase) = (uid.clone(), Phase::Serving);
                let served = have.get(cookie)
                    == Some(&Has { uid, phase, captured: true, unchanged: true, cleared: false });
                prop_assert!(served || want.gone.contains(cookie), "{cookie}");
            }
        }

        #[test]
        fn one_step_per_pod((want, have) in want_and_have()) {
            let steps = diff(&want, &have);
            let cookies: BTreeSet<u64> = steps
                .iter()
                .map(|step| match step {
                    Step::Enrol(cookie)
                    | Step::Revive(cookie)
                    | Step::StopServing(cookie)
                    | Step::Leave(cookie)
                    | Step::ForceRemove(cookie)
                    | Step::Undo(cookie) => *cookie,
                })
                .collect();
            prop_assert_eq!(cookies.len(), steps.len());
        }
    }
}

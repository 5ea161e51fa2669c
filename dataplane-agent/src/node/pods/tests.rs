//! What `status` tells of a pod.

use std::path::Path;

use super::*;
use crate::control::enrolled::tests::pod;
use crate::node::capture::PodStatus;
use crate::node::machine::FoundPod;
use crate::sys::netns::Netns;

/// The cookie of the network namespace that the pod was found in before.
const BEFORE: u64 = 7;

/// What is told of a pod that is wanted, and that was captured in `BEFORE`: in this state.
fn told(pod: &LocalPodSpec, scan: &Scan, state: PodState) -> (State, String, bool) {
    let captured = PodStatus {
        uid: pod.uid.clone(),
        inode: 1,
        cgroup: 1,
        enrolled: 0,
        state,
        forwards: false,
    };
    let status = Status::from([(BEFORE, captured)]);
    let (state, reason) = super::state(pod, scan, &status, Known::Yes);
    (
        state,
        reason.unwrap_or_default(),
        is_here(pod, scan, &status),
    )
}

fn found(pod: &LocalPodSpec, cookie: u64) -> Scan {
    let found = FoundPod {
        netns: Netns::open(Path::new("/proc/self/ns/net")).expect("our own"),
        cookie,
        groups: Vec::new(),
    };
    Scan {
        found: BTreeMap::from([(pod.uid.clone(), found)]),
        ..Scan::default()
    }
}

fn missing(pod: &LocalPodSpec, why: NotFound) -> Scan {
    Scan {
        waiting: BTreeMap::from([(pod.uid.clone(), why)]),
        ..Scan::default()
    }
}

fn broken() -> PodState {
    PodState::Broken { why: "lost".into() }
}

#[test]
fn a_pod_that_is_found_is_told_of_as_it_is_captured() {
    let pod = pod("a", "1");
    let scan = found(&pod, BEFORE);
    let (state, _, here) = told(&pod, &scan, PodState::Up);
    assert_eq!((state, here), (State::Up, true));
    let (state, reason, _) = told(&pod, &scan, broken());
    assert_eq!((state, &*reason), (State::Broken, "lost"));
}

#[test]
fn a_pod_that_is_wanted_while_it_drains_is_told_not_to_be_captured() {
    let pod = pod("a", "1");
    let (state, reason, here) = told(&pod, &found(&pod, BEFORE), PodState::Draining);
    assert_eq!((state, here), (State::Waiting, true));
    assert_eq!(reason, format!("{BEING_ENROLLED}; {NOT_CAPTURED}"));
}

#[test]
fn a_pod_that_came_again_and_is_not_found_waits_whatever_was_found_before() {
    let pod = pod("a", "1");
    for state in [PodState::Up, broken()] {
        let scan = missing(&pod, NotFound::Nowhere("nobody has 10.0.0.1".into()));
        let (state, reason, here) = told(&pod, &scan, state);
        assert_eq!((state, here), (State::Waiting, false), "{reason}");
        assert_eq!(reason, format!("nobody has 10.0.0.1; {SERVED_BEFORE}"));
    }
    // It may be the one that was found.
    let scan = missing(&pod, NotFound::Doubtful("two have 10.0.0.1".into()));
    let (state, _, here) = told(&pod, &scan, PodState::Up);
    assert_eq!((state, here), (State::Waiting, true));
    // Nothing is served yet of what a predecessor has captured.
    let scan = missing(&pod, NotFound::NotYet("nothing runs in it".into()));
    let (state, reason, here) = told(&pod, &scan, PodState::Unserved { captured: true });
    assert_eq!((state, here), (State::Waiting, true));
    assert!(
        reason.ends_with("it stays captured, and nothing passes"),
        "{reason}"
    );
}

//! The pods that leave. They stay captured until other nodes do not dial them any more.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

use crate::node::capture::Desired;

/// Time between the removal of a pod's record and the end of its capture, in which other nodes stop dialling
/// it.
const DEREGISTER_DELAY: Duration = Duration::from_secs(1);

/// The pods that leave, by the cookie of their network namespace: a new pod of the same name may exist already.
#[derive(Debug, Default)]
pub(super) struct LeavingPods(BTreeMap<u64, Leaving>);

#[derive(Debug)]
struct Leaving {
    pod: Desired,
    /// When it is released. `None` as long as its record is there.
    release_at: Option<Instant>,
}

impl LeavingPods {
    /// Adds a pod, if it is not there yet.
    pub(super) fn add(&mut self, pod: Desired) {
        self.0.entry(pod.cookie).or_insert(Leaving {
            pod,
            release_at: None,
        });
    }

    /// Removes the pods whose time is over, and those that do not leave any more or are gone (`is_over`).
    /// `is_held`: true if a pod's record is not removed yet.
    pub(super) fn release(
        &mut self,
        is_over: impl Fn(u64) -> bool,
        is_held: impl Fn(&Desired) -> bool,
        now: Instant,
    ) {
        self.0.retain(|cookie, leaving| {
            leaving.release_at = match is_held(&leaving.pod) {
                true => None,
                false => leaving.release_at.or(Some(now + DEREGISTER_DELAY)),
            };
            !is_over(*cookie) && leaving.release_at.is_none_or(|when| when > now)
        });
    }

    /// The pods.
    pub(super) fn pods(&self) -> impl Iterator<Item = &Desired> {
        self.0.values().map(|leaving| &leaving.pod)
    }

    /// When the next one is released.
    pub(super) fn next_release(&self) -> Option<Instant> {
        self.0
            .values()
            .filter_map(|leaving| leaving.release_at)
            .min()
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::mesh::Identity;
    use crate::sys::netns::Netns;

    fn pod(cookie: u64) -> Desired {
        Desired {
            uid: "uid".into(),
            namespace: "ns".into(),
            name: "a".into(),
            identity: Identity::new("td", "ns", "default"),
            addresses: Vec::new(),
            netns: Netns::open(Path::new("/proc/self/ns/net")).expect("our own"),
            cookie,
            groups: Vec::new(),
        }
    }

    #[test]
    fn a_pod_that_leaves_has_its_time_from_when_its_record_is_removed() {
        let (mut leaving, begin) = (LeavingPods::default(), Instant::now());
        let mut stays = |held: bool, seconds: u64| {
            leaving.add(pod(1));
            let now = begin + Duration::from_secs(seconds);
            leaving.release(|_| false, |_| held, now);
            (leaving.pods().count() == 1, leaving.next_release())
        };
        let at = |seconds| Some(begin + Duration::from_secs(seconds));
        assert_eq!(stays(true, 0), (true, None));
        assert_eq!(stays(true, 60), (true, None));
        assert_eq!(stays(false, 61), (true, at(62)));
        assert_eq!(stays(false, 61), (true, at(62)));
        assert_eq!(stays(false, 62), (false, None));
    }

    #[test]
    fn a_held_pod_holds_no_other_and_is_released_when_it_is_gone() {
        let (mut leaving, begin) = (LeavingPods::default(), Instant::now());
        leaving.add(pod(1));
        leaving.add(pod(2));
        let is_held = |pod: &Desired| pod.cookie == 1;
        leaving.release(|_| false, is_held, begin);
        leaving.release(|_| false, is_held, begin + DEREGISTER_DELAY);
        let left: Vec<u64> = leaving.pods().map(|pod| pod.cookie).collect();
        assert_eq!(left, [1]);
        leaving.release(|cookie| cookie == 1, is_held, begin);
        assert_eq!(leaving.pods().count(), 0);
    }
}

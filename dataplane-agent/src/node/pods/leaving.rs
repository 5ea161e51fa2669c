//! The pods that leave. They stay captured until other nodes do not dial them any more.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::node::capture::Desired;

/// Time between the removal of a pod's record and the end of its capture, in which other nodes stop dialling
/// it.
const DEREGISTER_DELAY: Duration = Duration::from_secs(1);

/// The pods that leave.
#[derive(Debug, Default)]
pub(super) struct LeavingPods {
    /// Those that were found, by the cookie of their network namespace: a new pod of the same name may exist already.
    found: BTreeMap<u64, (Desired, Notice)>,
    /// The uids of those that were not, such as what a predecessor has captured.
    unlocated: BTreeMap<Arc<str>, Notice>,
}

/// The time in which other nodes are told of a pod that leaves.
#[derive(Debug, Default)]
struct Notice {
    /// When the pod is released. `None` as long as its record is there.
    release_at: Option<Instant>,
}

impl Notice {
    /// Returns `true` if it is over. `is_held`: true if the pod's record is not removed yet.
    fn is_over(&mut self, is_held: bool, now: Instant) -> bool {
        self.release_at = match is_held {
            true => None,
            false => self.release_at.or(Some(now + DEREGISTER_DELAY)),
        };
        self.release_at.is_some_and(|when| when <= now)
    }
}

impl LeavingPods {
    /// Adds a pod, if it is not there yet.
    pub(super) fn add(&mut self, pod: Desired) {
        self.found
            .entry(pod.cookie)
            .or_insert((pod, Notice::default()));
    }

    /// Adds a pod that was not found, if it is not there yet.
    pub(super) fn add_unlocated(&mut self, uid: Arc<str>) {
        self.unlocated.entry(uid).or_default();
    }

    /// Removes the pods whose time is over, and those that do not leave any more or are gone: of a network namespace
    /// (`is_over`), or of a uid (`is_wanted`). `is_held`: true if the record of the pod of a uid is not removed yet.
    pub(super) fn release(
        &mut self,
        is_over: impl Fn(u64) -> bool,
        is_wanted: impl Fn(&Arc<str>) -> bool,
        is_held: impl Fn(&str) -> bool,
        now: Instant,
    ) {
        self.found.retain(|cookie, (pod, notice)| {
            !notice.is_over(is_held(&pod.uid), now) && !is_over(*cookie)
        });
        self.unlocated
            .retain(|uid, notice| !notice.is_over(is_held(uid), now) && !is_wanted(uid));
    }

    /// The pods that were found.
    pub(super) fn pods(&self) -> impl Iterator<Item = &Desired> {
        self.found.values().map(|(pod, _)| pod)
    }

    /// The uids of the others.
    pub(super) fn unlocated(&self) -> impl Iterator<Item = &Arc<str>> {
        self.unlocated.keys()
    }

    /// When the next one is released.
    pub(super) fn next_release(&self) -> Option<Instant> {
        let found = self.found.values().map(|(_, notice)| notice);
        let notices = found.chain(self.unlocated.values());
        notices.filter_map(|notice| notice.release_at).min()
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
            uid: cookie.to_string().into(),
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
            leaving.add_unlocated("other".into());
            let now = begin + Duration::from_secs(seconds);
            leaving.release(|_| false, |_| false, |_| held, now);
            let stay = leaving.pods().count() == 1;
            assert_eq!(stay, leaving.unlocated().count() == 1);
            (stay, leaving.next_release())
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
        leaving.add_unlocated("3".into());
        leaving.add_unlocated("4".into());
        let is_held = |uid: &str| ["1", "3"].contains(&uid);
        leaving.release(|_| false, |_| false, is_held, begin);
        leaving.release(|_| false, |_| false, is_held, begin + DEREGISTER_DELAY);
        let left: Vec<u64> = leaving.pods().map(|pod| pod.cookie).collect();
        assert_eq!(left, [1]);
        let left: Vec<&str> = leaving.unlocated().map(|uid| &**uid).collect();
        assert_eq!(left, ["3"]);
        leaving.release(|cookie| cookie == 1, |uid| &**uid == "3", is_held, begin);
        assert_eq!(leaving.unlocated().count(), 0);
        assert_eq!(leaving.pods().count(), 0);
    }
}

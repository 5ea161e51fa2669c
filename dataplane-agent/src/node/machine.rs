//! Finds this node's pods on the machine: network namespaces, their addresses and processes, and which of
//! them is a pod's.
//!
//! A pod is recognised by what it cannot choose: the cgroup that its engine gave it, what it is captured as
//! already, and which namespaces existed at what time. Addresses only narrow down the namespaces that are
//! left. A failed look changes nothing: what was found stays found, and a namespace only counts as gone after
//! several looks in a row have missed it, and no process of its pod can keep it out of sight.

mod cgroups;
mod claims;
mod events;
mod hidden;
mod locate;
mod newer;
mod pod_cgroups;
mod scan_schedule;
mod scanner;
mod snapshot;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use self::scan_schedule::{IDLE_INTERVAL, POLL_INTERVAL, WAITING_INTERVAL};
pub use self::scanner::Scanner;
use self::snapshot::MachineSnapshot;
use crate::control::manifests::{LocalPodSpec, Wanted};
use crate::node::capture::Status;
use crate::sys::cgroup::{self, CgroupId};
use crate::sys::netns::Netns;
use crate::sys::processes::{self, Namespace};

/// Number of whole looks in a row that must miss a namespace until it counts as gone.
const MISSES_UNTIL_GONE: u32 = 3;
/// Shortest time between two misses that count: a change of the configuration or of capture may bring
/// several looks within a moment. A little less than the time between regular looks.
const MIN_MISS_INTERVAL: Duration = Duration::from_millis(900);

/// A pod's namespace and cgroups.
#[derive(Clone, Debug)]
pub struct FoundPod {
    /// Its network namespace.
    pub netns: Netns,
    /// The namespace's cookie.
    pub cookie: u64,
    /// The folders of its own cgroups, with their ids; more may come.
    pub groups: Vec<(PathBuf, CgroupId)>,
}

/// Finds the network namespaces and cgroups of pods.
#[derive(Debug)]
pub struct PodLocator {
    /// Mount point of cgroup v2.
    root: PathBuf,
    /// The cgroup below which all pods are.
    pods: PathBuf,
    /// The agent's cgroup.
    agent: PathBuf,
    /// Inode numbers of namespaces that no pod can have: the agent's, and that of process 1.
    hosts: BTreeSet<u64>,
    /// Number of looks so far.
    looks: u64,
    /// Number of the look that first saw each namespace, by cookie.
    since: BTreeMap<u64, u64>,
    /// The place of each pod of this node, by uid, in the mesh or not.
    locations: BTreeMap<Arc<str>, PodLocation>,
    /// Pods whose namespace is gone, and the last look that saw it: a namespace that was there by then is not
    /// the one that came in its place.
    lost: BTreeMap<Arc<str>, (SearchKey, u64)>,
    /// Namespaces of pods that are located or captured, by cookie.
    sightings: BTreeMap<u64, NamespaceSighting>,
}

/// The properties of a pod that its place was found by. If one changes, the pod is looked for again.
#[derive(Clone, Debug, PartialEq, Eq)]
struct SearchKey {
    pod_uid: Arc<str>,
    addresses: Vec<IpAddr>,
    path: Option<PathBuf>,
}

#[derive(Debug)]
struct PodLocation {
    key: SearchKey,
    netns: Netns,
    cookie: u64,
    groups: Vec<(PathBuf, CgroupId)>,
    /// Number of the first look that saw the namespace.
    since: u64,
    /// Number of the last look by whose end one of `groups` was there.
    last: u64,
    /// Processes outside of `groups`, and when each was first seen there.
    outside: BTreeMap<u32, Instant>,
}

/// When a namespace was seen, and missed.
#[derive(Debug, Default)]
struct NamespaceSighting {
    inode: u64,
    /// The processes that were in it when it was last seen.
    processes: BTreeSet<u32>,
    /// Number of looks in a row that have missed it since.
    misses: u32,
    /// Time of the last miss that counted.
    missed: Option<Instant>,
    /// The folders of its pod's cgroups, with their ids, as far as they are known.
    groups: Vec<(PathBuf, CgroupId)>,
    /// True if it may only be out of sight, however many looks have missed it.
    is_hidden: bool,
    /// Number of the last look that saw it.
    last: u64,
}

/// Why a pod was not found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NotFound {
    /// It does not run yet.
    NotYet(String),
    /// Nothing on this machine matches it: it does not run here, or its manifest is wrong.
    Nowhere(String),
    /// It may be here, but cannot be told from others, or not be inspected.
    Doubtful(String),
}

impl NotFound {
    /// Returns the reason, for people.
    pub fn why(&self) -> &str {
        match self {
            Self::NotYet(why) | Self::Nowhere(why) | Self::Doubtful(why) => why,
        }
    }
}

/// The result of a look.
#[derive(Clone, Debug, Default)]
pub struct Scan {
    /// The pods that were found, by uid.
    pub found: BTreeMap<Arc<str>, FoundPod>,
    /// The pods that were not found, and why.
    pub waiting: BTreeMap<Arc<str>, NotFound>,
    /// Pods that were found, and may be in a newer namespace by now; why that is not known.
    pub doubts: BTreeMap<Arc<str>, String>,
    /// Cookies of the namespaces of pods that are gone.
    pub gone: BTreeSet<u64>,
    /// Processes of a pod's namespace that are outside of its cgroups, by the pod's uid.
    pub outside: BTreeMap<Arc<str>, OutsideProcesses>,
    /// The reason why the look failed; what was found before holds.
    pub failed: Option<String>,
}

/// Number of processes of a pod's namespace that have been outside of its cgroups for some time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OutsideProcesses {
    /// All of them.
    pub processes: usize,
    /// The part of them that is outside of all pods' cgroup too: its traffic is not captured.
    pub in_clear: usize,
}

impl PodLocator {
    /// Creates a locator of the pods below the cgroup `pods`.
    ///
    /// # Errors
    /// The cgroup does not exist, or is not of version 2; `/proc` cannot be read.
    pub fn new(pods: &Path) -> io::Result<Self> {
        let root = cgroup::root()?;
        let pods = fs::canonicalize(pods)?;
        cgroup::id(&root, &pods)?;
        Ok(Self {
            agent: cgroup::own(&root)?.unwrap_or_else(|| root.clone()),
            root,
            pods,
            hosts: Netns::of_host()?.iter().map(Netns::inode).collect(),
            looks: 0,
            since: BTreeMap::new(),
            locations: BTreeMap::new(),
            lost: BTreeMap::new(),
            sightings: BTreeMap::new(),
        })
    }

    /// Looks for the pods of this node. `captured` are the pods that are captured now.
    pub fn scan(&mut self, pods: &[LocalPodSpec], captured: &Status) -> Scan {
        let now = Instant::now();
        let failed = match processes::namespaces() {
            Ok(scan) => {
                self.looks += 1;
                let mut snapshot = MachineSnapshot::new(scan, &self.hosts);
                self.record_sightings(&snapshot, captured, now);
                self.record_hidden(captured);
                self.forget_stale_locations(pods);
                return self.find(pods, captured, &mut snapshot, now);
            }
            Err(error) => format!("the machine cannot be looked at: {error}"),
        };
        let mut scan = Scan::default();
        for pod in pods.iter().filter(|pod| pod.wanted == Wanted::Yes) {
            match self.locations.get(&pod.uid) {
                Some(location)
                    if location.key == SearchKey::of(pod) && !location.groups.is_empty() =>
                {
                    scan.found.insert(pod.uid.clone(), location.found());
                }
                _ => {
                    let why = NotFound::Doubtful(failed.clone());
                    scan.waiting.insert(pod.uid.clone(), why);
                }
            }
        }
        scan.gone = self.gone();
        scan.failed = Some(failed);
        scan
    }

    /// Records which namespaces this look saw, and which it missed.
    fn record_sightings(&mut self, snapshot: &MachineSnapshot, captured: &Status, now: Instant) {
        let looks = self.looks;
        let namespaces = snapshot.seen.namespaces.values();
        let cookies: BTreeSet<u64> = namespaces.filter_map(|of| of.cookie).collect();
        self.since.retain(|cookie, _| cookies.contains(cookie));
        for cookie in cookies {
            self.since.entry(cookie).or_insert(looks);
        }
        let located: BTreeSet<u64> = self
            .locations
            .values()
            .map(|location| location.cookie)
            .collect();
        self.sightings
            .retain(|cookie, _| captured.contains_key(cookie) || located.contains(cookie));
        for (cookie, pod) in captured {
            self.sightings
                .entry(*cookie)
                .or_insert_with(|| NamespaceSighting {
                    inode: pod.inode,
                    last: looks,
                    ..NamespaceSighting::default()
                });
        }
        for (cookie, sighting) in &mut self.sightings {
            let namespace = snapshot.seen.namespace(sighting.inode, *cookie);
            if let Some(namespace) = namespace {
                sighting.processes = namespace.processes.iter().copied().collect();
            }
            if namespace.is_some() || !sighting.processes.is_disjoint(&snapshot.seen.hidden) {
                (sighting.misses, sighting.missed) = (0, None);
                // What this look saw at its end may have come after what it saw at its begin had gone.
                if namespace.is_none_or(|namespace| namespace.is_still(sighting.inode)) {
                    sighting.last = looks;
                }
            } else if sighting
                .missed
                .is_none_or(|missed| now.saturating_duration_since(missed) >= MIN_MISS_INTERVAL)
            {
                sighting.misses += 1;
                // The end of this look: it may have stood still since it began.
                sighting.missed = Some(Instant::now());
            }
        }
    }

    /// Forgets the places of pods that have changed, or whose namespace is gone.
    fn forget_stale_locations(&mut self, pods: &[LocalPodSpec]) {
        let keys: BTreeMap<&Arc<str>, SearchKey> = pods
            .iter()
            .map(|pod| (&pod.uid, SearchKey::of(pod)))
            .collect();
        let gone = self.gone();
        let (sightings, lost) = (&self.sightings, &mut self.lost);
        self.locations.retain(|uid, location| {
            let same = keys.get(uid) == Some(&location.key);
            let is_gone = gone.contains(&location.cookie);
            if same && is_gone {
                let last = sightings
                    .get(&location.cookie)
                    .map_or(0, |sighting| sighting.last);
                lost.insert(uid.clone(), (location.key.clone(), last));
            }
            same && !is_gone
        });
        lost.retain(|uid, (key, _)| keys.get(uid) == Some(key));
    }

    /// Returns `true` if a look saw this namespace before the pod's own went: it is not the one that came in its place.
    fn is_older(&self, namespace: &Namespace, pod: &LocalPodSpec) -> bool {
        let Some((_, lost)) = self
            .lost
            .get(&pod.uid)
            .filter(|(key, _)| *key == SearchKey::of(pod))
        else {
            return false;
        };
        let since = namespace.cookie.and_then(|cookie| self.since.get(&cookie));
        since.is_some_and(|since| since <= lost)
    }

    /// Returns the number of the look that first saw this namespace.
    fn since(&self, namespace: &Namespace) -> u64 {
        let since = namespace.cookie.and_then(|cookie| self.since.get(&cookie));
        since.map_or(self.looks, |since| *since)
    }

    fn gone(&self) -> BTreeSet<u64> {
        let gone = self
            .sightings
            .iter()
            .filter(|(_, sighting)| sighting.misses >= MISSES_UNTIL_GONE && !sighting.is_hidden);
        gone.map(|(cookie, _)| *cookie).collect()
    }

    /// Returns the longest time until the next look, after one with this result. `is_watching`: the kernel
    /// reports changes of cgroups and mounts.
    fn max_interval(&self, scan: &Scan, is_watching: bool, now: Instant) -> Duration {
        let is_missed =
            |sighting: &NamespaceSighting| (1..MISSES_UNTIL_GONE).contains(&sighting.misses);
        let is_new = |since: &Instant| now.saturating_duration_since(*since) < MIN_MISS_INTERVAL;
        let may_be_here = |missing: &NotFound| matches!(missing, NotFound::Doubtful(_));
        if !is_watching
            || scan.failed.is_some()
            || self.sightings.values().any(is_missed)
            || self
                .locations
                .values()
                .any(|location| location.outside.values().any(is_new))
        {
            POLL_INTERVAL
        } else if scan.waiting.values().any(may_be_here) || !scan.doubts.is_empty() {
            WAITING_INTERVAL
        } else {
            IDLE_INTERVAL
        }
    }

    fn find(
        &mut self,
        pods: &[LocalPodSpec],
        captured: &Status,
        snapshot: &mut MachineSnapshot,
        now: Instant,
    ) -> Scan {
        let mut scan = Scan {
            gone: self.gone(),
            ..Scan::default()
        };
        let mut why = self.locate(pods, captured, snapshot, &mut scan.doubts);
        for pod in pods.iter().filter(|pod| pod.wanted == Wanted::Yes) {
            let uid = &pod.uid;
            if self.locations.contains_key(uid)
                && let Err(reason) = self.update_cgroups(uid, captured, snapshot, now, &mut scan)
            {
                why.insert(uid.clone(), reason);
            }
            match self.locations.get(uid) {
                Some(location) if !location.groups.is_empty() => {
                    scan.found.insert(uid.clone(), location.found());
                }
                _ => {
                    let reason = why.remove(uid);
                    let reason =
                        reason.unwrap_or_else(|| NotFound::Doubtful("its cgroups are gone".into()));
                    scan.waiting.insert(uid.clone(), reason);
                }
            }
        }
        scan
    }
}

impl SearchKey {
    fn of(pod: &LocalPodSpec) -> Self {
        Self {
            pod_uid: pod.pod_uid.clone(),
            addresses: pod.addresses.clone(),
            path: pod.netns_path.clone(),
        }
    }
}

impl PodLocation {
    fn found(&self) -> FoundPod {
        FoundPod {
            netns: self.netns.clone(),
            cookie: self.cookie,
            groups: self.groups.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::capture::{PodState, PodStatus};

    fn machine() -> PodLocator {
        PodLocator {
            root: "/c".into(),
            pods: "/c".into(),
            agent: "/c/agent".into(),
            hosts: BTreeSet::new(),
            looks: 0,
            since: BTreeMap::new(),
            locations: BTreeMap::new(),
            lost: BTreeMap::new(),
            sightings: BTreeMap::new(),
        }
    }

    /// Looks a second later. The look sees these processes in namespace 1, or nothing of it if there are none.
    fn scan(machine: &mut PodLocator, processes: &[u32], hidden: &[u32]) -> BTreeSet<u64> {
        let last = machine
            .sightings
            .get(&7)
            .and_then(|sighting| sighting.missed);
        let now = last.unwrap_or_else(Instant::now) + Duration::from_secs(1);
        let namespace = |_| Namespace {
            cookie: Some(7),
            processes: processes.to_vec(),
            ..Namespace::default()
        };
        let namespace = processes.first().map(namespace);
        scan_at(machine, namespace, hidden, now)
    }

    fn scan_at(
        machine: &mut PodLocator,
        namespace: Option<Namespace>,
        hidden: &[u32],
        now: Instant,
    ) -> BTreeSet<u64> {
        let pod = PodStatus {
            uid: "pod".into(),
            inode: 1,
            cgroup: 0,
            enrolled: 0,
            state: PodState::Unserved { captured: true },
            forwards: false,
        };
        let scan = processes::Look {
            namespaces: namespace.into_iter().map(|of| (1, of)).collect(),
            hidden: hidden.iter().copied().collect(),
        };
        machine.looks += 1;
        machine.record_sightings(
            &MachineSnapshot::new(scan, &BTreeSet::new()),
            &Status::from([(7, pod)]),
            now,
        );
        machine.gone()
    }

    #[test]
    fn looks_within_a_moment_miss_a_namespace_once() {
        let mut machine = machine();
        scan(&mut machine, &[100], &[]);
        let now = Instant::now();
        for _ in 0..2 * MISSES_UNTIL_GONE {
            assert_eq!(scan_at(&mut machine, None, &[], now), [].into());
        }
        let later = |looks| now + Duration::from_secs(looks);
        assert_eq!(scan_at(&mut machine, None, &[], later(1)), [].into());
        assert_eq!(scan_at(&mut machine, None, &[], later(2)), [7].into());
    }

    #[test]
    fn a_namespace_is_gone_whoever_has_its_number() {
        let mut machine = machine();
        scan(&mut machine, &[100], &[]);
        let now = Instant::now();
        let of = |cookie| Namespace {
            cookie,
            ..Namespace::default()
        };
        for look in 0..3 {
            assert_eq!(machine.gone(), [].into());
            let now = now + Duration::from_secs(look);
            scan_at(&mut machine, Some(of(Some(8))), &[], now);
        }
        assert_eq!(machine.gone(), [7].into());
        // What cannot be told from it counts as it.
        let later = now + Duration::from_secs(4);
        assert_eq!(scan_at(&mut machine, Some(of(None)), &[], later), [].into());
    }

    #[test]
    fn a_namespace_that_has_the_number_of_one_that_ended_is_not_as_old_as_that() {
        let mut machine = machine();
        let of = |cookie| Namespace {
            cookie: Some(cookie),
            ..Namespace::default()
        };
        let now = Instant::now();
        scan_at(&mut machine, Some(of(8)), &[], now);
        scan_at(&mut machine, Some(of(9)), &[], now);
        assert_eq!((machine.looks, &machine.since), (2, &[(9, 2)].into()));
    }

    #[test]
    fn a_look_counts_a_namespace_to_its_end_only_if_it_is_there_then() {
        let mut machine = machine();
        let mut look = |path: &str| {
            let namespace = Namespace {
                cookie: Some(7),
                path: path.into(),
                ..Namespace::default()
            };
            scan_at(&mut machine, Some(namespace), &[], Instant::now());
            let sighting = &machine.sightings[&7];
            (sighting.misses, sighting.last)
        };
        // The root of procfs has number 1, as the namespace of these looks has.
        assert_eq!(look("/proc"), (0, 1));
        assert_eq!(look("/proc/0/ns/net"), (0, 1));
        assert_eq!(look("/proc"), (0, 3));
    }

    #[test]
    fn looks_that_stood_still_after_they_began_miss_a_namespace_once() {
        let mut machine = machine();
        scan(&mut machine, &[100], &[]);
        let read = Instant::now();
        for seconds in (0..2 * u64::from(MISSES_UNTIL_GONE)).rev() {
            let began = read - Duration::from_secs(seconds);
            assert_eq!(scan_at(&mut machine, None, &[], began), [].into());
        }
    }

    #[test]
    fn a_namespace_is_gone_after_several_looks_and_not_once_it_is_seen_again() {
        let mut machine = machine();
        for _ in 0..2 {
            assert_eq!(scan(&mut machine, &[100], &[]), [].into());
            for _ in 1..MISSES_UNTIL_GONE {
                assert_eq!(scan(&mut machine, &[], &[]), [].into());
            }
            assert_eq!(scan(&mut machine, &[], &[]), [7].into());
        }
        // Its process still runs, but may not be inspected any more.
        scan(&mut machine, &[100], &[]);
        for _ in 0..=MISSES_UNTIL_GONE {
            assert_eq!(scan(&mut machine, &[], &[100]), [].into());
        }
    }
}

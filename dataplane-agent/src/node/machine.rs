//! What is on this machine: network namespaces, their addresses and processes, and which of them is
//! a pod's.
//!
//! What a pod is comes from what it cannot choose: the cgroup that its engine gave it, what it is
//! captured as already, and what was there when. Its addresses only say which of the namespaces that
//! are left may be its own. A look that failed is no news: what was found stays found, and nothing is
//! gone that was not missed by several looks in a row.

mod cgroups;
mod claims;
mod due;
mod events;
mod grow;
mod looks;
mod place;
mod seen;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use self::due::{POLL, SLOW, WAITING};
pub use self::looks::Looks;
use self::seen::Seen;
use crate::control::manifests::{LocalPodSpec, Wanted};
use crate::node::capture::Status;
use crate::sys::cgroup::{self, CgroupId};
use crate::sys::netns::Netns;
use crate::sys::processes;

/// So many whole looks in a row must miss a namespace until it counts as gone.
const MISSES: u32 = 3;
/// Looks that come sooner after the last miss than this count for nothing: a change of the configuration
/// or of capture may bring several within a moment. A little less than the time between regular ones.
const APART: Duration = Duration::from_millis(900);

/// A pod's namespace and cgroups.
#[derive(Clone, Debug)]
pub struct Found {
    /// Its network namespace.
    pub netns: Netns,
    /// The namespace's cookie.
    pub cookie: u64,
    /// The folders of the cgroups that are its alone, with their ids; more may come.
    pub groups: Vec<(PathBuf, CgroupId)>,
}

/// Looks for pods.
#[derive(Debug)]
pub struct Machine {
    /// Where cgroup v2 is mounted.
    root: PathBuf,
    /// What holds all pods.
    pods: PathBuf,
    /// What the agent is in.
    agent: PathBuf,
    /// Namespaces that are nobody's pod: the agent's, and that of process 1.
    hosts: BTreeSet<u64>,
    /// How many looks there were.
    looks: u64,
    /// In which look each namespace was first seen, by inode numbers.
    since: BTreeMap<u64, u64>,
    /// Where each pod of this node is, by uid, in the mesh or not.
    places: BTreeMap<Arc<str>, Place>,
    /// Pods whose namespace is gone, and the last look that saw it: what was there by then is not what
    /// came in its place.
    lost: BTreeMap<Arc<str>, (Key, u64)>,
    /// Namespaces of pods that are here or captured, by cookie.
    sights: BTreeMap<u64, Sight>,
}

/// Of which pod a namespace was found: another one is looked for anew.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Key {
    pod_uid: Arc<str>,
    addresses: Vec<IpAddr>,
    path: Option<PathBuf>,
}

#[derive(Debug)]
struct Place {
    key: Key,
    netns: Netns,
    cookie: u64,
    groups: Vec<(PathBuf, CgroupId)>,
    /// Processes outside of these, and when each was first seen there.
    outside: BTreeMap<u32, Instant>,
}

/// When a namespace was seen.
#[derive(Debug, Default)]
struct Sight {
    inode: u64,
    /// The processes that were in it.
    processes: BTreeSet<u32>,
    /// How many looks in a row have missed it since.
    misses: u32,
    /// When the last of them did.
    missed: Option<Instant>,
    /// The last look that saw it.
    last: u64,
}

/// Why a pod was not found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Missing {
    /// It does not run yet.
    NotYet(String),
    /// Nothing on this machine has what it should have: it does not run here, or is said to be another.
    Nowhere(String),
    /// It may be here, and cannot be told from others, or not be looked at.
    Doubtful(String),
}

impl Missing {
    /// For people.
    pub fn why(&self) -> &str {
        match self {
            Self::NotYet(why) | Self::Nowhere(why) | Self::Doubtful(why) => why,
        }
    }
}

/// What a look brought.
#[derive(Clone, Debug, Default)]
pub struct Look {
    /// The pods that were found, by uid.
    pub found: BTreeMap<Arc<str>, Found>,
    /// Those that were not, and why.
    pub waiting: BTreeMap<Arc<str>, Missing>,
    /// Cookies of the namespaces of pods that are gone.
    pub gone: BTreeSet<u64>,
    /// Processes of a pod's namespace that are outside of its cgroups.
    pub outside: BTreeMap<Arc<str>, Outside>,
    /// Why the machine could not be looked at; what was found before holds.
    pub failed: Option<String>,
}

/// How many processes of a pod's namespace are outside of its cgroups, and were so in the look before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outside {
    /// All of them.
    pub processes: usize,
    /// Those that are outside of the pods' cgroup too: what they send is not captured.
    pub in_clear: usize,
}

impl Machine {
    /// Of pods below a cgroup.
    ///
    /// # Errors
    /// The cgroup is not there, or not of version 2; `/proc` is not there.
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
            places: BTreeMap::new(),
            lost: BTreeMap::new(),
            sights: BTreeMap::new(),
        })
    }

    /// Looks for the pods of this node. `captured` is what capture has of them.
    pub fn look(&mut self, pods: &[LocalPodSpec], captured: &Status) -> Look {
        let now = Instant::now();
        let failed = match processes::namespaces() {
            Ok(look) => {
                self.looks += 1;
                let mut seen = Seen::new(look, &self.hosts);
                self.sight(&seen, captured, now);
                self.forget(pods);
                return self.find(pods, captured, &mut seen, now);
            }
            Err(error) => format!("the machine cannot be looked at: {error}"),
        };
        let mut look = Look::default();
        for pod in pods.iter().filter(|pod| pod.wanted == Wanted::Yes) {
            match self.places.get(&pod.uid) {
                Some(place) if place.key == Key::of(pod) && !place.groups.is_empty() => {
                    look.found.insert(pod.uid.clone(), place.found());
                }
                _ => {
                    let why = Missing::Doubtful(failed.clone());
                    look.waiting.insert(pod.uid.clone(), why);
                }
            }
        }
        look.gone = self.gone();
        look.failed = Some(failed);
        look
    }

    /// Notes which namespaces are there.
    fn sight(&mut self, seen: &Seen, captured: &Status, now: Instant) {
        let looks = self.looks;
        self.since
            .retain(|inode, _| seen.namespaces.contains_key(inode));
        for inode in seen.namespaces.keys() {
            self.since.entry(*inode).or_insert(looks);
        }
        let placed: BTreeSet<u64> = self.places.values().map(|place| place.cookie).collect();
        self.sights
            .retain(|cookie, _| captured.contains_key(cookie) || placed.contains(cookie));
        for (cookie, pod) in captured {
            self.sights.entry(*cookie).or_insert_with(|| Sight {
                inode: pod.inode,
                last: looks,
                ..Sight::default()
            });
        }
        for (cookie, sight) in &mut self.sights {
            let path = self.places.values().find_map(|place| {
                let path = place.key.path.as_ref()?;
                (place.cookie == *cookie).then_some(path)
            });
            if let Some(namespace) = seen.namespaces.get(&sight.inode) {
                sight.processes = namespace.processes.iter().copied().collect();
                (sight.misses, sight.missed, sight.last) = (0, None, looks);
            } else if path.is_some_and(|path| may_hold(path, sight.inode))
                || !sight.processes.is_disjoint(&seen.hidden)
            {
                (sight.misses, sight.missed, sight.last) = (0, None, looks);
            } else if sight.missed.is_none_or(|missed| now - missed >= APART) {
                sight.misses += 1;
                sight.missed = Some(now);
            }
        }
    }

    /// Forgets where pods are that are others now, or whose namespace is gone.
    fn forget(&mut self, pods: &[LocalPodSpec]) {
        let keys: BTreeMap<&Arc<str>, Key> =
            pods.iter().map(|pod| (&pod.uid, Key::of(pod))).collect();
        let gone = self.gone();
        let (sights, lost) = (&self.sights, &mut self.lost);
        self.places.retain(|uid, place| {
            let same = keys.get(uid) == Some(&place.key);
            let is_gone = gone.contains(&place.cookie);
            if same && is_gone {
                let last = sights.get(&place.cookie).map_or(0, |sight| sight.last);
                lost.insert(uid.clone(), (place.key.clone(), last));
            }
            same && !is_gone
        });
        lost.retain(|uid, (key, _)| keys.get(uid) == Some(key));
    }

    fn gone(&self) -> BTreeSet<u64> {
        let gone = self
            .sights
            .iter()
            .filter(|(_, sight)| sight.misses >= MISSES);
        gone.map(|(cookie, _)| *cookie).collect()
    }

    /// The longest time until the next look, after one that brought this. `is_told`: whether changes of
    /// cgroups are told.
    fn longest(&self, look: &Look, is_told: bool, now: Instant) -> Duration {
        let is_missed = |sight: &Sight| (1..MISSES).contains(&sight.misses);
        let is_new = |since: &Instant| now - *since < APART;
        let may_be_here = |missing: &Missing| matches!(missing, Missing::Doubtful(_));
        if !is_told
            || look.failed.is_some()
            || self.sights.values().any(is_missed)
            || self
                .places
                .values()
                .any(|place| place.outside.values().any(is_new))
        {
            POLL
        } else if look.waiting.values().any(may_be_here) {
            WAITING
        } else {
            SLOW
        }
    }

    fn find(
        &mut self,
        pods: &[LocalPodSpec],
        captured: &Status,
        seen: &mut Seen,
        now: Instant,
    ) -> Look {
        let mut look = Look {
            gone: self.gone(),
            ..Look::default()
        };
        let mut why = self.place(pods, captured, seen);
        for pod in pods.iter().filter(|pod| pod.wanted == Wanted::Yes) {
            let uid = &pod.uid;
            if self.places.contains_key(uid)
                && let Err(reason) = self.regroup(uid, captured, seen, now, &mut look)
            {
                why.insert(uid.clone(), reason);
            }
            match self.places.get(uid) {
                Some(place) if !place.groups.is_empty() => {
                    look.found.insert(uid.clone(), place.found());
                }
                _ => {
                    let reason = why.remove(uid);
                    let reason = reason.unwrap_or_else(|| Missing::Doubtful(String::new()));
                    look.waiting.insert(uid.clone(), reason);
                }
            }
        }
        look
    }
}

impl Key {
    fn of(pod: &LocalPodSpec) -> Self {
        Self {
            pod_uid: pod.pod_uid.clone(),
            addresses: pod.addresses.clone(),
            path: pod.netns_path.clone(),
        }
    }
}

impl Place {
    fn found(&self) -> Found {
        Found {
            netns: self.netns.clone(),
            cookie: self.cookie,
            groups: self.groups.clone(),
        }
    }
}

/// Whether a path names the namespace, or cannot be asked.
fn may_hold(path: &Path, inode: u64) -> bool {
    match fs::metadata(path) {
        Ok(of) => of.ino() == inode,
        Err(error) => error.kind() != io::ErrorKind::NotFound,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::capture::{PodState, PodStatus};

    fn machine() -> Machine {
        Machine {
            root: "/c".into(),
            pods: "/c".into(),
            agent: "/c/agent".into(),
            hosts: BTreeSet::new(),
            looks: 0,
            since: BTreeMap::new(),
            places: BTreeMap::new(),
            lost: BTreeMap::new(),
            sights: BTreeMap::new(),
        }
    }

    /// Looks a second later, and sees the processes of namespace 1, or none of it.
    fn look(machine: &mut Machine, processes: &[u32], hidden: &[u32]) -> BTreeSet<u64> {
        let last = machine.sights.get(&7).and_then(|sight| sight.missed);
        let now = last.unwrap_or_else(Instant::now) + Duration::from_secs(1);
        look_at(machine, processes, hidden, now)
    }

    fn look_at(
        machine: &mut Machine,
        processes: &[u32],
        hidden: &[u32],
        now: Instant,
    ) -> BTreeSet<u64> {
        let pod = PodStatus {
            uid: "pod".into(),
            inode: 1,
            cgroup: 0,
            state: PodState::Unserved { captured: true },
            forwards: false,
        };
        let mut look = processes::Look::default();
        if !processes.is_empty() {
            let namespace = look.namespaces.entry(1).or_default();
            namespace.processes = processes.to_vec();
        }
        look.hidden = hidden.iter().copied().collect();
        machine.looks += 1;
        machine.sight(
            &Seen::new(look, &BTreeSet::new()),
            &Status::from([(7, pod)]),
            now,
        );
        machine.gone()
    }

    #[test]
    fn looks_within_a_moment_miss_a_namespace_once() {
        let mut machine = machine();
        look(&mut machine, &[100], &[]);
        let now = Instant::now();
        for _ in 0..2 * MISSES {
            assert_eq!(look_at(&mut machine, &[], &[], now), [].into());
        }
        let later = |looks| now + Duration::from_secs(looks);
        assert_eq!(look_at(&mut machine, &[], &[], later(1)), [].into());
        assert_eq!(look_at(&mut machine, &[], &[], later(2)), [7].into());
    }

    #[test]
    fn a_namespace_is_gone_after_several_looks_and_not_once_it_is_seen_again() {
        let mut machine = machine();
        for _ in 0..2 {
            assert_eq!(look(&mut machine, &[100], &[]), [].into());
            for _ in 1..MISSES {
                assert_eq!(look(&mut machine, &[], &[]), [].into());
            }
            assert_eq!(look(&mut machine, &[], &[]), [7].into());
        }
        // Its process is there, and may not be looked at any more.
        look(&mut machine, &[100], &[]);
        for _ in 0..=MISSES {
            assert_eq!(look(&mut machine, &[], &[100]), [].into());
        }
    }
}

//! What is on this machine: network namespaces, their addresses and processes, and which of them is
//! a pod's.
//!
//! Only namespaces that the initial user namespace owns are looked at: any user can give any
//! address to one of their own. A pod that was found stays found as long as its namespace is there.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::manifests::LocalPodSpec;
use crate::sys::cgroup::{self, CgroupId};
use crate::sys::netns::Netns;

/// A pod's namespace and cgroup.
#[derive(Clone, Debug)]
pub struct Found {
    /// Its network namespace.
    pub netns: Netns,
    /// The namespace's cookie.
    pub cookie: u64,
    /// The folder of its cgroup.
    pub folder: PathBuf,
    /// Its cgroup.
    pub cgroup: CgroupId,
    /// Whether that is its alone: a slice that its processes' groups happen to have above them is not.
    pub alone: bool,
    /// Its addresses, as its manifest has them.
    addresses: Vec<IpAddr>,
    /// A name that its manifest gives; another one is another namespace.
    path: Option<PathBuf>,
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
    found: BTreeMap<Arc<str>, Found>,
    seen: BTreeMap<u64, Seen>,
}

/// A namespace in one look.
#[derive(Debug, Default)]
struct Seen {
    /// Ways to open it.
    path: PathBuf,
    /// The cgroups of its processes, a place for each; none where ours does not show it.
    processes: Vec<Option<PathBuf>>,
    /// Its descriptor and addresses, once they were asked for.
    opened: Option<Option<(Netns, Vec<IpAddr>)>>,
}

/// What a look brought.
#[derive(Debug, Default)]
pub struct Look {
    /// The pods that were found, by uid.
    pub found: BTreeMap<Arc<str>, Found>,
    /// Those that were not, and why.
    pub waiting: BTreeMap<Arc<str>, String>,
    /// Cookies of the namespaces of pods that are gone.
    pub gone: BTreeSet<u64>,
    /// How many processes of a pod's namespace are outside of its cgroup: what they send is not
    /// captured, unless they are below the pods' cgroup.
    pub outside: BTreeMap<Arc<str>, usize>,
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
            found: BTreeMap::new(),
            seen: BTreeMap::new(),
        })
    }

    /// Looks for these pods.
    pub fn look(&mut self, wanted: &[&LocalPodSpec]) -> Look {
        self.see();
        let mut look = Look::default();
        let before = std::mem::take(&mut self.found);
        for (uid, found) in before {
            let there = self.is_there(&found);
            if !there {
                look.gone.insert(found.cookie);
            }
            let same = wanted.iter().any(|pod| {
                pod.uid == uid && pod.addresses == found.addresses && pod.netns_path == found.path
            });
            if there && same {
                self.found.insert(uid, found);
            }
        }
        for pod in wanted {
            if !self.found.contains_key(&pod.uid) {
                match self.find(pod) {
                    Ok(found) => _ = self.found.insert(pod.uid.clone(), found),
                    Err(why) => _ = look.waiting.insert(pod.uid.clone(), why),
                }
            }
            if let Some(found) = self.found.get(&pod.uid)
                && let Some(seen) = self.seen.get(&found.netns.inode())
            {
                let inside = |folder: &Option<PathBuf>| {
                    folder
                        .as_ref()
                        .is_some_and(|folder| folder.starts_with(&found.folder))
                };
                let outside = seen
                    .processes
                    .iter()
                    .filter(|folder| !inside(folder))
                    .count();
                look.outside.insert(pod.uid.clone(), outside);
            }
        }
        look.found.clone_from(&self.found);
        look
    }

    /// Which namespaces there are, with their processes.
    fn see(&mut self) {
        let mut seen: BTreeMap<u64, Seen> = BTreeMap::new();
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let process = entry.path();
            let path = process.join("ns/net");
            // It may have ended since, or be none.
            let Ok(of) = fs::metadata(&path) else {
                continue;
            };
            if self.hosts.contains(&of.ino()) {
                continue;
            }
            let folder = fs::read_to_string(process.join("cgroup")).ok();
            let folder = folder.and_then(|text| cgroup::of_process(&self.root, &text));
            let namespace = seen.entry(of.ino()).or_default();
            namespace.path = path;
            namespace.processes.push(folder);
        }
        for entry in fs::read_dir("/run/netns").into_iter().flatten().flatten() {
            if let Ok(of) = fs::metadata(entry.path())
                && !self.hosts.contains(&of.ino())
            {
                // A name outlives processes: the better way in.
                seen.entry(of.ino()).or_default().path = entry.path();
            }
        }
        self.seen = seen;
    }

    fn is_there(&self, found: &Found) -> bool {
        let named = || {
            let of = found.path.as_ref().and_then(|path| fs::metadata(path).ok());
            of.is_some_and(|of| of.ino() == found.netns.inode())
        };
        self.seen.contains_key(&found.netns.inode()) || named()
    }

    fn find(&mut self, pod: &LocalPodSpec) -> Result<Found, String> {
        if pod.addresses.is_empty() {
            return Err("it has no address yet (status.podIPs)".into());
        }
        let netns = match &pod.netns_path {
            Some(path) => self.named(path, &pod.addresses)?,
            None => self.with_addresses(&pod.addresses)?,
        };
        let seen = self.seen.get(&netns.inode());
        let processes = seen.map_or(&[][..], |seen| &seen.processes);
        let folder = self.folder(processes)?;
        let alone = is_its_alone(&folder, processes);
        for (uid, other) in &self.found {
            if other.netns.inode() == netns.inode() {
                return Err(format!("its network namespace is that of {uid}"));
            }
            if other.folder == folder {
                return Err(format!("its cgroup {} is that of {uid}", folder.display()));
            }
        }
        let cgroup = cgroup::id(&self.root, &folder)
            .map_err(|error| format!("its cgroup {}: {error}", folder.display()))?;
        let cookie = netns
            .cookie()
            .map_err(|error| format!("its network namespace cannot be entered: {error}"))?;
        Ok(Found {
            netns,
            cookie,
            folder,
            cgroup,
            alone,
            addresses: pod.addresses.clone(),
            path: pod.netns_path.clone(),
        })
    }

    fn named(&self, path: &Path, addresses: &[IpAddr]) -> Result<Netns, String> {
        let netns = Netns::open(path).map_err(|error| format!("{}: {error}", path.display()))?;
        if self.hosts.contains(&netns.inode()) {
            return Err(format!(
                "{} is the host's network namespace",
                path.display()
            ));
        }
        let interfaces = netns
            .interfaces()
            .map_err(|error| format!("{}: {error}", path.display()))?;
        match addresses
            .iter()
            .find(|address| !interfaces.addresses.contains(address))
        {
            Some(address) => Err(format!("{} does not have {address}", path.display())),
            None => Ok(netns),
        }
    }

    fn with_addresses(&mut self, addresses: &[IpAddr]) -> Result<Netns, String> {
        let mut matches = Vec::new();
        for seen in self.seen.values_mut() {
            let opened = seen.opened.get_or_insert_with(|| open(&seen.path));
            if let Some((netns, has)) = opened
                && addresses.iter().all(|address| has.contains(address))
            {
                matches.push((netns.clone(), seen.path.clone()));
            }
        }
        let all = list(addresses);
        match matches.as_slice() {
            [] => Err(format!("no network namespace of this machine has {all}")),
            [(netns, _)] => Ok(netns.clone()),
            [(_, one), (_, two), ..] => Err(format!(
                "more than one network namespace has {all} ({}, {}): name its own in the annotation {}",
                one.display(),
                two.display(),
                super::manifests::pod::NETNS_ANNOTATION,
            )),
        }
    }

    /// The deepest cgroup that has all processes that are below the pods' one.
    fn folder(&self, processes: &[Option<PathBuf>]) -> Result<PathBuf, String> {
        if processes.is_empty() {
            return Err("no process is in its network namespace yet".into());
        }
        let below = processes
            .iter()
            .flatten()
            .filter(|folder| folder.starts_with(&self.pods));
        let all: BTreeSet<&PathBuf> = below.clone().collect();
        let common = below.cloned().reduce(|one, other| common(&one, &other));
        match common {
            // What is in the agent's own cgroup is not captured: it would be the agent itself.
            Some(folder) if self.agent.starts_with(&folder) && folder != self.pods => Err(format!(
                "its cgroup {} has the agent in it: start its processes in one of their own",
                folder.display()
            )),
            Some(folder) if folder != self.pods => Ok(folder),
            Some(_) => {
                let some: Vec<String> = all
                    .iter()
                    .take(4)
                    .map(|at| at.display().to_string())
                    .collect();
                Err(format!(
                    "its processes have no cgroup of their own: they are in {}",
                    some.join(", ")
                ))
            }
            None => Err(format!(
                "none of its processes is below {}",
                self.pods.display()
            )),
        }
    }
}

/// Whether a cgroup is a pod's alone: one of its processes is in it itself, or it is named as container
/// engines name what is above a pod's containers (`pod<uid>`, `…-pod<uid>.slice`, `…libpod_pod_…`).
fn is_its_alone(folder: &Path, processes: &[Option<PathBuf>]) -> bool {
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    processes.iter().flatten().any(|own| own == folder)
        || name.starts_with("pod")
        || name.contains("-pod")
        || name.contains("_pod")
}

fn open(path: &Path) -> Option<(Netns, Vec<IpAddr>)> {
    let netns = Netns::open(path).ok()?;
    if !netns.is_the_hosts().unwrap_or(false) {
        return None;
    }
    let addresses = netns.interfaces().ok()?.addresses;
    Some((netns, addresses))
}

fn common(one: &Path, other: &Path) -> PathBuf {
    let pairs = one.components().zip(other.components());
    pairs.take_while(|(a, b)| a == b).map(|(a, _)| a).collect()
}

fn list(addresses: &[IpAddr]) -> String {
    let texts: Vec<String> = addresses.iter().map(ToString::to_string).collect();
    texts.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slice_above_two_containers_is_no_pods_alone() {
        for (folder, processes, expected) in [
            ("/c/web", &["/c/web"][..], true),
            ("/c/web", &["/c/web", "/c/web/inner"], true),
            (
                "/c/machine.slice",
                &["/c/machine.slice/a", "/c/machine.slice/b"],
                false,
            ),
            (
                "/c/kubepods/pod1f",
                &["/c/kubepods/pod1f/a", "/c/kubepods/pod1f/b"],
                true,
            ),
            (
                "/c/kubepods-besteffort-pod1f.slice",
                &["/c/kubepods-besteffort-pod1f.slice/a"],
                true,
            ),
        ] {
            let all: Vec<_> = processes.iter().map(|own| Some(own.into())).collect();
            assert_eq!(is_its_alone(Path::new(folder), &all), expected, "{folder}");
        }
    }

    #[test]
    fn a_pods_cgroup_is_its_own_and_not_the_agents() {
        let machine = Machine {
            root: "/c".into(),
            pods: "/c/pods".into(),
            agent: "/c/pods/session".into(),
            hosts: BTreeSet::new(),
            found: BTreeMap::new(),
            seen: BTreeMap::new(),
        };
        let folder = |processes: &[&str]| {
            let all: Vec<_> = processes.iter().map(|folder| Some(folder.into())).collect();
            machine
                .folder(&all)
                .map_err(|why| why.split(':').next().unwrap_or("").to_owned())
        };
        assert_eq!(
            folder(&["/c/pods/a/x", "/c/pods/a/y"]),
            Ok("/c/pods/a".into())
        );
        assert_eq!(folder(&["/c/pods/a", "/c/else"]), Ok("/c/pods/a".into()));
        for (processes, why) in [
            (
                &["/c/pods/session"][..],
                "its cgroup /c/pods/session has the agent in it",
            ),
            (
                &["/c/pods/a", "/c/pods/b"],
                "its processes have no cgroup of their own",
            ),
            (&["/c/pods"], "its processes have no cgroup of their own"),
            (&["/c/else"], "none of its processes is below /c/pods"),
            (&[], "no process is in its network namespace yet"),
        ] {
            assert_eq!(folder(processes), Err(why.into()), "{processes:?}");
        }
    }
}

//! The result of one look; namespaces are opened only as needed.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::Path;

use super::cgroups;
use super::claims::Unresolved;
use crate::control::manifests::{LocalPodSpec, pod};
use crate::sys::cgroup;
use crate::sys::interfaces::{Interfaces, is_of_the_namespace};
use crate::sys::netns::Netns;
use crate::sys::processes::{self, Namespace};

/// One look, and the namespaces that were opened in it.
pub(super) struct MachineSnapshot {
    pub seen: processes::Look,
    /// The processes of the host's namespaces.
    pub hosts: BTreeSet<u32>,
    /// Namespaces that were opened, by inode number.
    pub opened: BTreeMap<u64, Opened>,
}

/// A namespace that may be a pod's; `None` if it is not the machine's own, or is gone.
pub(super) type Opened = Result<Option<Candidate>, String>;

#[derive(Debug)]
pub(super) struct Candidate {
    pub netns: Netns,
    /// An error means that it has more interfaces or addresses than are read, or such as cannot be read: anybody can make
    /// them in their own.
    pub addresses: Result<Vec<IpAddr>, String>,
    /// `None` until it is asked for. An error here only concerns pods of these addresses: processes of a namespace can
    /// cause one on purpose.
    pub who: Option<Result<CandidateIdentity, String>>,
}

/// The properties that distinguish namespaces with the same addresses.
#[derive(Debug)]
pub(super) struct CandidateIdentity {
    pub cookie: u64,
    /// The uids of the pods for which the kubelet made its processes' cgroups.
    pub uids: BTreeSet<String>,
}

impl MachineSnapshot {
    pub(super) fn new(seen: processes::Look, hosts: &BTreeSet<u64>) -> Self {
        let of_host = hosts.iter().filter_map(|inode| seen.namespaces.get(inode));
        Self {
            hosts: of_host
                .flat_map(|of| of.processes.iter().copied())
                .collect(),
            seen,
            opened: BTreeMap::new(),
        }
    }

    /// Opens a namespace, once per look.
    pub(super) fn open(&mut self, inode: u64) -> Result<Option<&Candidate>, &String> {
        let Some(namespace) = self.seen.namespaces.get(&inode) else {
            return Ok(None);
        };
        let opened = self.opened.entry(inode).or_insert_with(|| {
            let Some(netns) = open(namespace, inode).map_err(wrong(namespace))? else {
                return Ok(None);
            };
            let addresses = match Interfaces::of(&netns) {
                Err(error) if is_of_the_namespace(&error) => Err(wrong(namespace)(error)),
                found => Ok(found.map_err(wrong(namespace))?.addresses),
            };
            Ok(Some(Candidate {
                addresses,
                who: None,
                netns,
            }))
        });
        opened.as_ref().map(Option::as_ref)
    }

    /// Returns what distinguishes an opened namespace from others, asked once per look; `None` if it is not open.
    pub(super) fn identify(
        &mut self,
        inode: u64,
        root: &Path,
        pods: &Path,
    ) -> Option<&Result<CandidateIdentity, String>> {
        let namespace = self.seen.namespaces.get(&inode)?;
        let candidate = self.opened.get_mut(&inode)?.as_mut().ok()?.as_mut()?;
        let netns = &candidate.netns;
        let identify = || {
            Ok(CandidateIdentity {
                cookie: netns.cookie()?,
                uids: uids(&namespace.processes, root, pods)?,
            })
        };
        let who = &mut candidate.who;
        Some(who.get_or_insert_with(|| identify().map_err(wrong(namespace))))
    }

    /// Returns the identity of a namespace that was asked for it, if there was no error.
    pub(super) fn identity(&self, inode: u64) -> Option<(&Candidate, &CandidateIdentity)> {
        let candidate = self.opened.get(&inode)?.as_ref().ok()?.as_ref()?;
        Some((candidate, candidate.who.as_ref()?.as_ref().ok()?))
    }

    /// Describes for people a namespace that has a pod's addresses and was there before the pod's own went.
    pub(super) fn describe_older(&self, of: &LocalPodSpec, inode: u64) -> String {
        format!(
            "{} has {}, but was there before the pod's own network namespace went: if it is the pod's, name it in the \
             annotation {}",
            self.path(inode),
            addresses(of),
            pod::NETNS_ANNOTATION,
        )
    }

    /// Describes a doubt for people.
    pub(super) fn describe(&self, of: &LocalPodSpec, doubt: &Unresolved) -> String {
        let all = addresses(of);
        let path = |inode: &u64| self.path(*inode);
        match doubt {
            Unresolved::None => format!("no network namespace of this machine has {all}"),
            Unresolved::Several(several) => {
                let some: Vec<String> = several.iter().take(2).map(path).collect();
                format!(
                    "more than one network namespace has {all} ({}): name its own in the annotation {}",
                    some.join(", "),
                    pod::NETNS_ANNOTATION,
                )
            }
            Unresolved::Shared(namespace, other) => format!(
                "the network namespace that has {all} ({}) may be that of {other}",
                path(namespace)
            ),
        }
    }

    fn path(&self, inode: u64) -> String {
        let namespace = self.seen.namespaces.get(&inode);
        namespace.map_or_else(String::new, |of| of.path.display().to_string())
    }
}

fn wrong(namespace: &Namespace) -> impl Fn(io::Error) -> String {
    let path = namespace.path.display().to_string();
    move |error| format!("{path} cannot be looked into: {error}")
}

fn addresses(of: &LocalPodSpec) -> String {
    let all: Vec<String> = of.addresses.iter().map(ToString::to_string).collect();
    all.join(", ")
}

fn open(namespace: &Namespace, inode: u64) -> io::Result<Option<Netns>> {
    let netns = match Netns::open(&namespace.path) {
        Err(error) if processes::has_ended(&error) => return Ok(None),
        netns => netns?,
    };
    // Any user can make a namespace in a user namespace, and give it any address.
    let is_same = netns.inode() == inode && netns.is_the_hosts()?;
    Ok(is_same.then_some(netns))
}

/// Returns the uids of the pods for which the kubelet made the cgroups of these processes.
fn uids(processes: &[u32], root: &Path, pods: &Path) -> io::Result<BTreeSet<String>> {
    let mut uids = BTreeSet::new();
    for pid in processes {
        match fs::read(format!("/proc/{pid}/cgroup")) {
            Err(error) if processes::has_ended(&error) => {}
            text => {
                if let Some(folder) = cgroup::of_process(root, &text?) {
                    uids.extend(cgroups::uid_of(&folder, pods));
                }
            }
        }
    }
    Ok(uids)
}

//! Finds pods that have come back under their name in another namespace, with the same addresses, while the former one is
//! still there.
//!
//! A newer namespace is taken for a pod's by what nobody chooses who could have made it: it is mounted where the pod's
//! annotation says, its processes are in the cgroup of the pod's uid, or it came after the pod's engine had removed the
//! pod's cgroups. Otherwise it is only told, and the pod is not up.

use std::collections::BTreeSet;
use std::net::IpAddr;

use super::cgroups;
use super::claims::Unresolved;
use super::snapshot::MachineSnapshot;
use super::{NotFound, PodLocation, PodLocator};
use crate::control::manifests::{LocalPodSpec, Wanted};
use crate::node::capture::Status;

/// The namespaces in which a pod that was found in another one may be by now.
pub(super) enum Newer {
    /// It is in one of these.
    Known(BTreeSet<u64>),
    /// It may be in one of these.
    Possible(BTreeSet<u64>),
    /// It is not known which.
    Unknown(NotFound),
}

impl PodLocator {
    /// Finds the namespaces that may be newer instances of pods that have one: those that no pod has, with all of the
    /// pod's addresses, unless they are known to be older than its own.
    pub(super) fn newer_instances<'a>(
        &self,
        pods: &'a [LocalPodSpec],
        captured: &Status,
        taken: &BTreeSet<u64>,
        snapshot: &mut MachineSnapshot,
    ) -> Vec<(&'a LocalPodSpec, Newer)> {
        let mut free = Vec::new();
        let inodes: Vec<u64> = snapshot.seen.namespaces.keys().copied().collect();
        for inode in inodes {
            if !taken.contains(&inode)
                && !self.hosts.contains(&inode)
                && let Ok(Some(candidate)) = snapshot.open(inode)
                && let Ok(addresses) = &candidate.addresses
            {
                let addresses = addresses.clone();
                free.push((self.since(&snapshot.seen.namespaces[&inode]), addresses));
            }
        }
        let mut newer = Vec::new();
        for pod in pods.iter().filter(|pod| pod.wanted == Wanted::Yes) {
            let Some(location) = self.locations.get(&pod.uid) else {
                continue;
            };
            let may_be = |(since, addresses): &(u64, Vec<IpAddr>)| {
                *since >= location.since && pod.addresses.iter().all(|own| addresses.contains(own))
            };
            let is_elsewhere = match &pod.netns_path {
                // A path that leads nowhere says nothing.
                Some(path) => snapshot
                    .seen
                    .at(path)
                    .is_ok_and(|inode| inode != location.netns.inode()),
                None => free.iter().any(may_be),
            };
            if is_elsewhere {
                // Nor is it one that is older, or that is captured as this pod: an earlier instance.
                let namespaces = snapshot.seen.namespaces.iter();
                let earlier = namespaces.filter(|(_, namespace)| {
                    let is = namespace.cookie.and_then(|cookie| captured.get(&cookie));
                    self.since(namespace) < location.since || is.is_some_and(|is| is.uid == pod.uid)
                });
                let mut others = taken.clone();
                others.extend(earlier.map(|(inode, _)| *inode));
                let found = self.candidates(pod, pods, captured, &others, snapshot);
                let found = self.newer(pod, location, found, snapshot);
                newer.extend(found.map(|newer| (pod, newer)));
            }
        }
        newer
    }

    /// Decides whether these candidates are known to be newer than the namespace in which a pod was found.
    fn newer(
        &self,
        pod: &LocalPodSpec,
        location: &PodLocation,
        found: Result<BTreeSet<u64>, NotFound>,
        snapshot: &MachineSnapshot,
    ) -> Option<Newer> {
        let namespaces = match found {
            Ok(namespaces) => match &pod.netns_path {
                // A mount is made by who may; a process's number is given to any other one.
                Some(path) if snapshot.seen.is_of_process(path) => {
                    return Some(Newer::Possible(namespaces));
                }
                Some(_) => return Some(Newer::Known(namespaces)),
                None => namespaces,
            },
            Err(why) => return Some(Newer::Unknown(why)),
        };
        let since = |inode: &u64| self.since(&snapshot.seen.namespaces[inode]);
        let own = BTreeSet::from_iter(pod.cgroup_uids().map(cgroups::normalize_uid));
        let is_named = |inode: &u64| {
            let identity = snapshot.identity(*inode);
            identity.is_some_and(|(_, who)| !who.uids.is_disjoint(&own))
        };
        let mut groups = location.groups.iter();
        let was_named = groups.any(|(folder, _)| {
            cgroups::uid_of(folder, &self.pods).is_some_and(|uid| own.contains(&uid))
        });
        // The look by whose end the former instance was still there.
        let last = match (namespaces.iter().any(is_named), was_named) {
            (false, true) => return None,
            (true, false) => 0,
            (true, true) => location.since,
            (false, false) if self.is_over(location, snapshot) => location.last,
            (false, false) => self.looks,
        };
        let are_newer = namespaces.iter().all(|inode| since(inode) > last);
        match are_newer {
            _ if namespaces.is_empty() => None,
            true => Some(Newer::Known(namespaces)),
            false => Some(Newer::Possible(namespaces)),
        }
    }

    /// Returns `true` if a pod's engine has ended it: all its cgroups were removed, and no process is in its namespace.
    fn is_over(&self, location: &PodLocation, snapshot: &MachineSnapshot) -> bool {
        let seen = &snapshot.seen;
        let namespace = seen.namespace(location.netns.inode(), location.cookie);
        !location.groups.is_empty()
            && namespace.is_none_or(|namespace| namespace.processes.is_empty())
            && self.existing_cgroups(&location.groups).is_empty()
    }

    /// Says for people why it is not known whether a pod is in one of these namespaces; `None` if it is in none.
    pub(super) fn doubt(
        &self,
        pod: &LocalPodSpec,
        newer: Newer,
        snapshot: &MachineSnapshot,
    ) -> Option<String> {
        let mut namespaces = match newer {
            Newer::Known(namespaces) | Newer::Possible(namespaces) => namespaces,
            Newer::Unknown(why) => return Some(why.why().to_owned()),
        };
        // Some may have been found to be a pod's meanwhile, if only this one's.
        let taken: BTreeSet<u64> = self
            .locations
            .values()
            .map(|location| location.netns.inode())
            .collect();
        namespaces.retain(|inode| !taken.contains(inode));
        let location = self.locations.get(&pod.uid)?;
        (!namespaces.is_empty()).then(|| {
            namespaces.insert(location.netns.inode());
            let several = Unresolved::Several(namespaces.into_iter().collect());
            snapshot.describe(pod, &several)
        })
    }
}

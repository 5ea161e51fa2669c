//! Finds the namespace of a pod that has none yet, or that is in a newer one.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::Path;
use std::sync::Arc;

use super::cgroups;
use super::claims::{self, Claims, Unresolved};
use super::newer::Newer;
use super::snapshot::{Candidate, CandidateIdentity, MachineSnapshot};
use super::{NamespaceSighting, NotFound, PodLocation, PodLocator, SearchKey};
use crate::control::manifests::LocalPodSpec;
use crate::mesh::workload::named;
use crate::node::capture::Status;
use crate::sys::interfaces::Interfaces;
use crate::sys::netns::Netns;

impl PodLocator {
    /// Finds the namespaces of pods that have none yet, and newer ones of others. Returns why some still have none.
    /// `doubts` gets those that have one, and of which it is not known whether it is a newer one by now.
    pub(super) fn locate(
        &mut self,
        pods: &[LocalPodSpec],
        captured: &Status,
        snapshot: &mut MachineSnapshot,
        doubts: &mut BTreeMap<Arc<str>, String>,
    ) -> BTreeMap<Arc<str>, NotFound> {
        let mut why = BTreeMap::new();
        let mut claims = Claims::new();
        let taken: BTreeSet<u64> = self
            .locations
            .values()
            .map(|location| location.netns.inode())
            .collect();
        for pod in pods {
            if self.locations.contains_key(&pod.uid) {
                continue;
            }
            if pod.addresses.is_empty() {
                let reason = "it has no address yet (status.podIPs)".to_owned();
                why.insert(pod.uid.clone(), NotFound::NotYet(reason));
                continue;
            }
            match self.candidates(pod, pods, captured, &taken, snapshot) {
                Ok(namespaces) => _ = claims.insert(pod.uid.clone(), namespaces),
                Err(reason) => _ = why.insert(pod.uid.clone(), reason),
            }
        }
        let newer = self.newer_instances(pods, captured, &taken, snapshot);
        let known = newer.iter().filter_map(|(pod, newer)| match newer {
            Newer::Known(namespaces) => Some((pod.uid.clone(), namespaces.clone())),
            Newer::Possible(_) | Newer::Unknown(_) => None,
        });
        claims.extend(known);
        let mut unresolved = Vec::new();
        for (uid, resolved) in claims::resolve(claims) {
            let Some(pod) = pods.iter().find(|pod| pod.uid == uid) else {
                continue;
            };
            match resolved {
                Ok(inode) => {
                    if let Some((candidate, who)) = snapshot.identity(inode) {
                        let location = PodLocation {
                            key: SearchKey::of(pod),
                            netns: candidate.netns.clone(),
                            cookie: who.cookie,
                            groups: Vec::new(),
                            since: self.since(&snapshot.seen.namespaces[&inode]),
                            last: self.looks,
                            outside: BTreeMap::new(),
                        };
                        self.sightings.entry(location.cookie).or_insert_with(|| {
                            NamespaceSighting {
                                inode,
                                last: self.looks,
                                ..NamespaceSighting::default()
                            }
                        });
                        self.locations.insert(uid, location);
                    }
                }
                Err(_) if self.locations.contains_key(&uid) => {}
                Err(doubt) => unresolved.push((pod, doubt)),
            }
        }
        for (pod, newer) in newer {
            if let Some(doubt) = self.doubt(pod, newer, snapshot) {
                doubts.insert(pod.uid.clone(), doubt);
            }
        }
        for (pod, doubt) in unresolved {
            let told = snapshot.describe(pod, &doubt);
            let missing = match doubt {
                Unresolved::None => NotFound::Nowhere(told + &self.except_that_of(pod)),
                Unresolved::Several(_) | Unresolved::Shared(..) => NotFound::Doubtful(told),
            };
            why.insert(pod.uid.clone(), missing);
        }
        why
    }

    /// Names the pod that was found and has these addresses: it leaves none for another pod that claims them too.
    fn except_that_of(&self, pod: &LocalPodSpec) -> String {
        let has_all = |location: &PodLocation| {
            let there = &location.key.addresses;
            pod.addresses.iter().all(|address| there.contains(address))
        };
        let other = self
            .locations
            .iter()
            .find(|(_, location)| has_all(location));
        other.map_or_else(String::new, |(uid, _)| {
            format!(" but that of pod {}", named(uid))
        })
    }

    /// Returns the namespaces that may be a pod's.
    pub(super) fn candidates(
        &self,
        pod: &LocalPodSpec,
        pods: &[LocalPodSpec],
        captured: &Status,
        taken: &BTreeSet<u64>,
        snapshot: &mut MachineSnapshot,
    ) -> Result<BTreeSet<u64>, NotFound> {
        if let Some(path) = &pod.netns_path {
            let inode = self.netns_at(path, pod, snapshot)?;
            let owner = self
                .locations
                .iter()
                .find(|(_, location)| location.netns.inode() == inode);
            return match owner {
                Some((uid, _)) => Err(NotFound::Doubtful(format!(
                    "its network namespace is that of {uid}"
                ))),
                None => Ok([inode].into()),
            };
        }
        let own = BTreeSet::from_iter(pod.cgroup_uids().map(cgroups::normalize_uid));
        let others: BTreeSet<String> = pods
            .iter()
            .flat_map(|other| other.cgroup_uids().map(cgroups::normalize_uid))
            .filter(|uid| !own.contains(uid))
            .collect();
        let (mut named, mut unnamed) = (BTreeSet::new(), BTreeSet::new());
        let (mut before, mut older, mut failed) = (None, None, None);
        let namespaces = snapshot.seen.namespaces.iter();
        let all: Vec<(u64, bool)> = namespaces
            .map(|(inode, namespace)| (*inode, self.is_older(namespace, pod)))
            .collect();
        for (inode, is_older) in all {
            if taken.contains(&inode) || self.hosts.contains(&inode) {
                continue;
            }
            let candidate = match snapshot.open(inode) {
                Ok(Some(candidate)) => candidate,
                Ok(None) => continue,
                Err(_) if is_older => continue,
                Err(error) => {
                    failed.get_or_insert_with(|| error.clone());
                    continue;
                }
            };
            match &candidate.addresses {
                Ok(addresses) if pod.addresses.iter().all(|of| addresses.contains(of)) => {}
                Ok(_) => continue,
                // It keeps no other pod from being found: whose it is, is not known by its addresses.
                Err(error) => {
                    let error = error.clone();
                    if !is_older
                        && let Some(Ok(who)) = snapshot.identify(inode, &self.root, &self.pods)
                        && (!who.uids.is_disjoint(&own)
                            || captured
                                .get(&who.cookie)
                                .is_some_and(|is| is.uid == pod.uid))
                    {
                        failed.get_or_insert(error);
                    }
                    continue;
                }
            }
            if is_older {
                older = Some(inode);
                continue;
            }
            let who = match snapshot.identify(inode, &self.root, &self.pods) {
                Some(Ok(who)) => who,
                Some(Err(error)) => {
                    failed.get_or_insert_with(|| error.clone());
                    continue;
                }
                None => continue,
            };
            match captured.get(&who.cookie) {
                // Of two instances the newer one.
                Some(is) if is.uid == pod.uid => before = before.max(Some((is.enrolled, inode))),
                // It is captured as another pod, which will be found in it.
                Some(is)
                    if !self.locations.contains_key(&is.uid)
                        && pods.iter().any(|pod| pod.uid == is.uid) =>
                {
                    continue;
                }
                _ => {}
            }
            if !who.uids.is_disjoint(&own) {
                named.insert(inode);
            } else if who.uids.is_disjoint(&others) && (own.is_empty() || who.uids.is_empty()) {
                unnamed.insert(inode);
            }
        }
        let is_named = !named.is_empty();
        let candidates = if is_named { named } else { unnamed };
        match (before, failed) {
            // The pod is captured in this one already.
            (Some((_, before)), _) if candidates.contains(&before) => Ok([before].into()),
            // A namespace that could not be inspected may have the address too.
            (_, Some(error)) if !is_named => Err(NotFound::Doubtful(error)),
            _ if candidates.is_empty()
                && let Some(older) = older =>
            {
                Err(NotFound::Doubtful(snapshot.describe_older(pod, older)))
            }
            _ => Ok(candidates),
        }
    }

    /// Returns the namespace that a pod's annotation names.
    fn netns_at(
        &self,
        path: &Path,
        pod: &LocalPodSpec,
        snapshot: &mut MachineSnapshot,
    ) -> Result<u64, NotFound> {
        let wrong = |error: io::Error| {
            let told = format!("{}: {error}", path.display());
            match error.kind() {
                io::ErrorKind::NotFound => NotFound::Nowhere(told),
                _ => NotFound::Doubtful(told),
            }
        };
        let inode = snapshot.seen.at(path).map_err(wrong)?;
        let netns = Netns::open(&snapshot.seen.namespaces[&inode].path).map_err(wrong)?;
        if netns.inode() != inode {
            return Err(wrong(io::Error::other("it changed while it was looked at")));
        }
        if self.hosts.contains(&inode) {
            let told = format!("{} is the host's network namespace", path.display());
            return Err(NotFound::Doubtful(told));
        }
        let addresses = Interfaces::of(&netns).map_err(wrong)?.addresses;
        if let Some(address) = pod
            .addresses
            .iter()
            .find(|address| !addresses.contains(address))
        {
            let told = format!("{} does not have {address}", path.display());
            return Err(NotFound::Doubtful(told));
        }
        let who = CandidateIdentity {
            cookie: netns.cookie().map_err(wrong)?,
            uids: BTreeSet::new(),
        };
        let candidate = Candidate {
            netns,
            addresses: Ok(addresses),
            who: Some(Ok(who)),
        };
        snapshot.opened.insert(inode, Ok(Some(candidate)));
        Ok(inode)
    }
}

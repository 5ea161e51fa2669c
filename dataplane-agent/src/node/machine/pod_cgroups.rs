//! Finds the cgroups of a pod, also those that it gets later, and forgets those that are gone.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use dataplane_ebpf::pod::{CGROUPS, DEPTH};

use super::cgroups::{CgroupError, CgroupQuery};
use super::snapshot::MachineSnapshot;
use super::{MIN_MISS_INTERVAL, NotFound, OutsideProcesses, PodLocator, Scan};
use crate::node::capture::{PodState, Status};
use crate::sys::cgroup::{self, CgroupId};
use crate::sys::processes;

impl PodLocator {
    /// Updates the cgroups that are a pod's alone: adds those that its processes have come to, and drops those that
    /// were removed. If all are gone, the pod keeps the last ones: nobody is in them, and it stays found.
    pub(super) fn update_cgroups(
        &mut self,
        uid: &Arc<str>,
        captured: &Status,
        snapshot: &MachineSnapshot,
        now: Instant,
        scan: &mut Scan,
    ) -> Result<(), NotFound> {
        let Some(location) = self.locations.get(uid) else {
            return Ok(());
        };
        let own: BTreeSet<u32> = snapshot
            .seen
            .namespace(location.netns.inode(), location.cookie)
            .map(|namespace| namespace.processes.iter().copied().collect())
            .unwrap_or_default();
        let failed = |error: io::Error| {
            NotFound::Doubtful(format!("its processes cannot be looked at: {error}"))
        };
        let mut folders = Vec::new();
        for pid in &own {
            // A process outside of our cgroup namespace is outside of what is captured: its folder is `None`.
            if let Some(folder) = self.cgroup_of(*pid).map_err(failed)? {
                folders.push((*pid, folder));
            }
        }
        let is_covered = |groups: &[(PathBuf, CgroupId)], folder: &Option<PathBuf>| {
            folder
                .as_ref()
                .is_some_and(|folder| groups.iter().any(|(group, _)| folder.starts_with(group)))
        };
        let mut groups = self.existing_cgroups(&location.groups);
        let is_new = location.groups.is_empty();
        let uncovered = |(_, folder): &(u32, Option<PathBuf>)| !is_covered(&groups, folder);
        if folders.iter().any(uncovered) || groups.is_empty() {
            let query = CgroupQuery {
                pods: &self.pods,
                agent: &self.agent,
                own: &own,
                hosts: &snapshot.hosts,
                members: &cgroup::members,
            };
            let found = query.of_pod(&folders.iter().filter_map(|(_, of)| of.clone()).collect());
            let added = match found {
                Ok(found) => self
                    .add_cgroups(uid, &groups, found, captured)
                    .map_err(NotFound::Doubtful),
                Err(CgroupError::Failed(error)) => return Err(failed(error)),
                Err(CgroupError::Wrong(why)) if folders.is_empty() => Err(NotFound::NotYet(why)),
                Err(CgroupError::Wrong(why)) => Err(NotFound::Doubtful(why)),
            };
            match added {
                Ok(added) => groups = added,
                Err(why) if is_new => return Err(why),
                Err(_) => {}
            }
        }
        let mut known = groups.clone();
        known.retain(|(_, group)| group.level <= DEPTH);
        let outside = folders
            .iter()
            .filter(|(_, folder)| !is_covered(&known, folder));
        // A process that enters the namespace for a moment, as with `ip netns exec`, is not reported. From when it
        // was seen to when the next look began: this process may stand still in between.
        let seen = Instant::now();
        let first = |pid: &u32| location.outside.get(pid).copied().unwrap_or(seen);
        let since: BTreeMap<u32, Instant> =
            outside.clone().map(|(pid, _)| (*pid, first(pid))).collect();
        let stays = outside
            .filter(|(pid, _)| now.saturating_duration_since(since[pid]) >= MIN_MISS_INTERVAL);
        let is_below = |folder: &Option<PathBuf>| {
            let folder = folder.as_ref();
            folder.is_some_and(|folder| folder.starts_with(&self.pods))
        };
        let outside = OutsideProcesses {
            processes: stays.clone().count(),
            in_clear: stays.filter(|(_, folder)| !is_below(folder)).count(),
        };
        scan.outside.insert(uid.clone(), outside);
        if let Some(location) = self.locations.get_mut(uid) {
            location.outside = since;
            if !groups.is_empty() {
                location.last = self.looks;
                location.groups = groups;
            }
        }
        Ok(())
    }

    /// Returns the cgroups that still exist. A folder that was made again is another cgroup, with another id,
    /// and may belong to anybody, so it is checked again.
    pub(super) fn existing_cgroups(
        &self,
        groups: &[(PathBuf, CgroupId)],
    ) -> Vec<(PathBuf, CgroupId)> {
        let remains = |(folder, was): &&(PathBuf, CgroupId)| match cgroup::id(&self.root, folder) {
            Ok(is) => is == *was,
            Err(error) => error.kind() != io::ErrorKind::NotFound,
        };
        groups.iter().filter(remains).cloned().collect()
    }

    /// Adds `found` to a pod's cgroups, up to the number that a pod may have. It loses none, and takes none of
    /// another pod's.
    fn add_cgroups(
        &self,
        uid: &Arc<str>,
        groups: &[(PathBuf, CgroupId)],
        found: Vec<PathBuf>,
        captured: &Status,
    ) -> Result<Vec<(PathBuf, CgroupId)>, String> {
        let mut groups = groups.to_vec();
        let mut why = None;
        for folder in found {
            let id = match cgroup::id(&self.root, &folder) {
                Ok(id) => id,
                Err(error) => {
                    why.get_or_insert(format!("its cgroup {}: {error}", folder.display()));
                    continue;
                }
            };
            let located = self.locations.iter().find(|(other, location)| {
                *other != uid && location.groups.iter().any(|(_, group)| group.id == id.id)
            });
            let owner = located.map(|(other, _)| other).or_else(|| {
                captured.values().find_map(|pod| {
                    let stays = pod.uid != *uid && pod.state != PodState::Draining;
                    (stays && pod.cgroup == id.id).then_some(&pod.uid)
                })
            });
            if let Some(owner) = owner {
                let taken = format!(
                    "its cgroup {} is that of {owner}: start its processes in one of their own",
                    folder.display()
                );
                why.get_or_insert(taken);
            } else if !groups.iter().any(|(group, _)| folder.starts_with(group)) {
                groups.retain(|(group, _)| !group.starts_with(&folder));
                if groups.len() < CGROUPS as usize {
                    groups.push((folder, id));
                }
            }
        }
        match (groups.is_empty(), why) {
            (true, Some(why)) => Err(why),
            _ => Ok(groups),
        }
    }

    /// Returns a process's cgroup; `None` if it has ended, `Some(None)` if the cgroup is not visible to us.
    #[expect(
        clippy::option_option,
        reason = "one has ended, the other is elsewhere"
    )]
    fn cgroup_of(&self, pid: u32) -> io::Result<Option<Option<PathBuf>>> {
        match fs::read(format!("/proc/{pid}/cgroup")) {
            Err(error) if processes::has_ended(&error) => Ok(None),
            text => Ok(Some(cgroup::of_process(&self.root, &text?))),
        }
    }
}

//! Finds the cgroups of a pod, and those that it has later, and lets go of those that are gone.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use dataplane_ebpf::pod::{CGROUPS, DEPTH};

use super::cgroups::{Asked, NoGroup};
use super::seen::Seen;
use super::{APART, Look, Machine, Missing, Outside};
use crate::node::capture::{PodState, Status};
use crate::sys::cgroup::{self, CgroupId};
use crate::sys::processes;

impl Machine {
    /// Finds the cgroups that are a pod's alone: more than before, if processes came in others, and
    /// without those that were removed. A pod that has had some keeps the last ones: nobody is in them
    /// any more, and it stays found.
    pub(super) fn regroup(
        &mut self,
        uid: &Arc<str>,
        captured: &Status,
        seen: &Seen,
        now: Instant,
        look: &mut Look,
    ) -> Result<(), Missing> {
        let Some(place) = self.places.get(uid) else {
            return Ok(());
        };
        let own: BTreeSet<u32> = seen
            .namespaces
            .get(&place.netns.inode())
            .map(|namespace| namespace.processes.iter().copied().collect())
            .unwrap_or_default();
        let failed = |error: io::Error| {
            Missing::Doubtful(format!("its processes cannot be looked at: {error}"))
        };
        let mut folders = Vec::new();
        for pid in &own {
            // Outside of what our cgroup namespace shows is outside of what is captured.
            if let Some(folder) = self.cgroup_of(*pid).map_err(failed)? {
                folders.push((*pid, folder));
            }
        }
        let is_covered = |groups: &[(PathBuf, CgroupId)], folder: &Option<PathBuf>| {
            folder
                .as_ref()
                .is_some_and(|folder| groups.iter().any(|(group, _)| folder.starts_with(group)))
        };
        let mut groups = self.remaining(&place.groups);
        let is_new = place.groups.is_empty();
        let uncovered = |(_, folder): &(u32, Option<PathBuf>)| !is_covered(&groups, folder);
        if folders.iter().any(uncovered) || groups.is_empty() {
            let asked = Asked {
                pods: &self.pods,
                agent: &self.agent,
                own: &own,
                hosts: &seen.hosts,
                members: &cgroup::members,
            };
            let found = asked.of_pod(&folders.iter().filter_map(|(_, of)| of.clone()).collect());
            let grown = match found {
                Ok(found) => self
                    .grown(uid, &groups, found, captured)
                    .map_err(Missing::Doubtful),
                Err(NoGroup::Failed(error)) => return Err(failed(error)),
                Err(NoGroup::Wrong(why)) if folders.is_empty() => Err(Missing::NotYet(why)),
                Err(NoGroup::Wrong(why)) => Err(Missing::Doubtful(why)),
            };
            match grown {
                Ok(grown) => groups = grown,
                Err(why) if is_new => return Err(why),
                Err(_) => {}
            }
        }
        let mut known = groups.clone();
        known.retain(|(_, group)| group.level <= DEPTH);
        let outside = folders
            .iter()
            .filter(|(_, folder)| !is_covered(&known, folder));
        // What enters the namespace for a moment, as `ip netns exec` does, is not told.
        let first = |pid: &u32| place.outside.get(pid).copied().unwrap_or(now);
        let since: BTreeMap<u32, Instant> =
            outside.clone().map(|(pid, _)| (*pid, first(pid))).collect();
        let stays = outside.filter(|(pid, _)| now - since[pid] >= APART);
        let is_below = |folder: &Option<PathBuf>| {
            let folder = folder.as_ref();
            folder.is_some_and(|folder| folder.starts_with(&self.pods))
        };
        let outside = Outside {
            processes: stays.clone().count(),
            in_clear: stays.filter(|(_, folder)| !is_below(folder)).count(),
        };
        look.outside.insert(uid.clone(), outside);
        if let Some(place) = self.places.get_mut(uid) {
            place.outside = since;
            if !groups.is_empty() {
                place.groups = groups;
            }
        }
        Ok(())
    }

    /// Those that are still there. A folder that was made again is another cgroup, with another id, and
    /// may be anybody's: whose it is is asked anew.
    fn remaining(&self, groups: &[(PathBuf, CgroupId)]) -> Vec<(PathBuf, CgroupId)> {
        let remains = |(folder, was): &&(PathBuf, CgroupId)| match cgroup::id(&self.root, folder) {
            Ok(is) => is == *was,
            Err(error) => error.kind() != io::ErrorKind::NotFound,
        };
        groups.iter().filter(remains).cloned().collect()
    }

    /// What a pod has with what it had, as many as a pod may have: nothing is taken from it, nor from
    /// another pod.
    fn grown(
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
            let placed = self.places.iter().find(|(other, place)| {
                *other != uid && place.groups.iter().any(|(_, group)| group.id == id.id)
            });
            let owner = placed.map(|(other, _)| other).or_else(|| {
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

    /// A process's cgroup; none if it has ended, the inner none if it is not shown to us.
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

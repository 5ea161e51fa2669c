//! Decides whether a namespace that no process and no mount shows is gone, or only out of sight.
//!
//! Any user may take the first thread of a process into a network namespace of their own, while other threads, or
//! sockets, keep the former one. Nobody leaves the cgroup that an engine has made without privileges, so a namespace is
//! not gone while a process of its pod's cgroups may have it.

use std::io;
use std::path::{Path, PathBuf};

use super::{MISSES_UNTIL_GONE, PodLocator};
use crate::node::capture::Status;
use crate::sys::cgroup::{self, CgroupId};
use crate::sys::processes;

impl PodLocator {
    /// Records which of the namespaces that were missed often enough may be out of sight only.
    pub(super) fn record_hidden(&mut self, captured: &Status) {
        for location in self.locations.values() {
            if let Some(sighting) = self.sightings.get_mut(&location.cookie) {
                sighting.groups.clone_from(&location.groups);
            }
        }
        for (cookie, sighting) in &mut self.sightings {
            sighting.is_hidden = sighting.misses >= MISSES_UNTIL_GONE && {
                let mut is_unknown = false;
                if sighting.groups.is_empty()
                    && let Some(pod) = captured.get(cookie).filter(|pod| pod.cgroup != 0)
                {
                    // A predecessor has found it.
                    match cgroup::find(&self.root, &self.pods, pod.cgroup) {
                        Ok(found) => sighting.groups = found.into_iter().collect(),
                        Err(_) => is_unknown = true,
                    }
                }
                let mut groups = sighting.groups.iter();
                let may_have = |group| may_have(&self.root, group, sighting.inode).unwrap_or(true);
                // Who cannot be asked may have it.
                is_unknown || groups.any(may_have)
            };
        }
    }
}

/// Returns `true` if a process in this cgroup or below it may have the network namespace of this inode number.
fn may_have(root: &Path, (folder, group): &(PathBuf, CgroupId), inode: u64) -> io::Result<bool> {
    let is_same = match cgroup::id(root, folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => false,
        // One that was made again is another one.
        is => is? == *group,
    };
    if !is_same || !cgroup::is_populated(folder)? {
        return Ok(false);
    }
    // One that has ended meanwhile is an error: it may have left another one.
    for pid in cgroup::members(folder)? {
        if processes::may_hide_in(pid, inode)? {
            return Ok(true);
        }
    }
    Ok(false)
}

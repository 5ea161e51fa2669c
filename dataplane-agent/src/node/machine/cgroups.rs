//! Finds a pod's own cgroups, from where its processes are.
//!
//! Container engines and the kubelet give each pod, or each of its containers, a cgroup with a name of a known
//! form; the outermost cgroup with such a name is taken, whichever containers came first. If no cgroup has such
//! a name, it is the lowest one that has all processes of the pod and no others. A cgroup that was a pod's once
//! stays so until it is removed; more may come.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};

/// The facts from which a pod's cgroups are found.
pub(super) struct CgroupQuery<'a> {
    /// The cgroup that holds all pods.
    pub pods: &'a Path,
    /// The cgroup that the agent is in.
    pub agent: &'a Path,
    /// The processes of the pod's namespace.
    pub own: &'a BTreeSet<u32>,
    /// The processes of the host's namespaces.
    pub hosts: &'a BTreeSet<u32>,
    /// The processes in a cgroup and below it.
    pub members: &'a dyn Fn(&Path) -> io::Result<Vec<u32>>,
}

/// Why a pod has no cgroup yet.
#[derive(Debug)]
pub(super) enum CgroupError {
    /// Its processes do not lead to cgroups of its own, for this reason.
    Wrong(String),
    /// The machine could not be inspected.
    Failed(io::Error),
}

impl From<io::Error> for CgroupError {
    fn from(error: io::Error) -> Self {
        Self::Failed(error)
    }
}

impl CgroupQuery<'_> {
    /// Returns the cgroups of a pod whose processes are in these folders; none of them is below another.
    pub(super) fn of_pod(
        &self,
        processes: &BTreeSet<PathBuf>,
    ) -> Result<Vec<PathBuf>, CgroupError> {
        let wrong = |what: String| Err(CgroupError::Wrong(what));
        if processes.is_empty() {
            return wrong("no process is in its network namespace yet".into());
        }
        let below: Vec<&PathBuf> = processes
            .iter()
            .filter(|folder| folder.starts_with(self.pods))
            .collect();
        if below.is_empty() {
            return wrong(format!(
                "none of its processes is below {}",
                self.pods.display()
            ));
        }
        let (mut groups, mut plain) = (BTreeSet::new(), BTreeSet::new());
        for folder in &below {
            match named(folder, self.pods) {
                Some(group) => _ = groups.insert(group),
                None => _ = plain.insert((*folder).clone()),
            }
        }
        plain.retain(|folder| folder != self.pods);
        let shared: Vec<PathBuf> = groups
            .union(&plain)
            .filter(|group| self.agent.starts_with(group))
            .cloned()
            .collect();
        // A cgroup that has the agent in it is not captured: that would capture the agent itself.
        groups.retain(|group| !self.agent.starts_with(group));
        plain.retain(|group| !self.agent.starts_with(group));
        groups.extend(self.unnamed(plain, groups.is_empty())?);
        let all: Vec<PathBuf> = groups.iter().cloned().collect();
        groups.retain(|group| {
            !all.iter()
                .any(|other| other != group && group.starts_with(other))
        });
        match (groups.is_empty(), shared.first()) {
            (false, _) => Ok(groups.into_iter().collect()),
            (true, Some(group)) => wrong(format!(
                "its cgroup {} has the agent in it: start its processes in one of their own",
                group.display()
            )),
            (true, None) => {
                let some: Vec<String> = below
                    .iter()
                    .take(4)
                    .map(|at| at.display().to_string())
                    .collect();
                wrong(format!(
                    "its processes have no cgroup of their own: they are in {}",
                    some.join(", ")
                ))
            }
        }
    }

    /// Finds the pod's among cgroups without a known name: the lowest that has them all, if it has no other
    /// processes. Otherwise those that have no processes of the host. One that has some, since a shell of the host
    /// entered the pod, is taken only if it is the only one and nothing else was found.
    fn unnamed(&self, folders: BTreeSet<PathBuf>, only: bool) -> io::Result<BTreeSet<PathBuf>> {
        let common = folders
            .iter()
            .cloned()
            .reduce(|one, other| common(&one, &other));
        if let Some(common) = common
            && folders.len() > 1
            && common.starts_with(self.pods)
            && common != self.pods
            && !self.agent.starts_with(&common)
            && self.all_members(&common, |pid| self.own.contains(pid))?
        {
            return Ok([common].into());
        }
        let (mut alone, mut with_host) = (BTreeSet::new(), BTreeSet::new());
        for folder in folders {
            match self.all_members(&folder, |pid| !self.hosts.contains(pid))? {
                true => alone.insert(folder),
                false => with_host.insert(folder),
            };
        }
        Ok(if only && alone.is_empty() && with_host.len() == 1 {
            with_host
        } else {
            alone
        })
    }

    fn all_members(&self, folder: &Path, is: impl Fn(&u32) -> bool) -> io::Result<bool> {
        match (self.members)(folder) {
            // It was removed after its last process ended.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            members => Ok(members?.iter().all(is)),
        }
    }
}

/// Returns the outermost cgroup on the path to a process that an engine or the kubelet made for one pod or
/// one container.
pub(super) fn named(process: &Path, pods: &Path) -> Option<PathBuf> {
    let below = process.strip_prefix(pods).ok()?;
    let mut group = pods.to_owned();
    for name in below {
        group.push(name);
        let name = name.to_str()?;
        if pod_uid(name).is_some() || is_container(name) {
            return Some(group);
        }
    }
    None
}

/// Returns the uid of the pod for which the kubelet made a process's cgroup. Only the outermost name counts, and
/// only if all cgroups above it are the kubelet's: below its own cgroup, a pod may use any name.
pub(super) fn uid_of(process: &Path, pods: &Path) -> Option<String> {
    let group = named(process, pods)?;
    let above = group.parent()?.strip_prefix(pods).ok()?;
    let is_same = above
        .iter()
        .all(|name| name.to_str().is_some_and(is_kubelet_parent));
    let uid = pod_uid(group.file_name()?.to_str()?)?;
    is_same.then(|| normalize_uid(uid))
}

/// Returns a pod's uid in the form in which uids are compared: systemd's names have `_` for `-`.
pub(super) fn normalize_uid(uid: &str) -> String {
    uid.replace('_', "-")
}

/// Returns the uid in the kubelet's name of a pod's cgroup: `pod<uid>`, or `kubepods[-<class>]-pod<uid>.slice`.
fn pod_uid(name: &str) -> Option<&str> {
    let uid = match name.strip_suffix(".slice") {
        Some(slice) => slice.rsplit_once("-pod")?.1,
        None => name.strip_prefix("pod")?,
    };
    let is_uid = uid.len() >= 32
        && uid
            .chars()
            .all(|c| c.is_ascii_hexdigit() || c == '-' || c == '_');
    is_uid.then_some(uid)
}

/// Returns `true` for the cgroups around those of pods: `kubepods`, a QoS class in it, or `kubelet` around it;
/// with systemd, a slice of these words.
fn is_kubelet_parent(name: &str) -> bool {
    let mut words = name.strip_suffix(".slice").unwrap_or(name).split('-');
    words.all(|word| matches!(word, "kubelet" | "kubepods" | "burstable" | "besteffort"))
}

/// Returns `true` for a name that engines give to a container's cgroup, or Podman to a pod's: it ends in an id of
/// 64 hex digits; systemd-nspawn and LXC use a prefix.
fn is_container(name: &str) -> bool {
    let bare = name
        .strip_suffix(".scope")
        .or_else(|| name.strip_suffix(".slice"))
        .unwrap_or(name);
    let id = bare.rsplit(['-', '_']).next().unwrap_or_default();
    let is_id = id.len() == 64 && id.chars().all(|c| c.is_ascii_hexdigit());
    is_id
        || name.starts_with("lxc.payload.")
        || name.starts_with("systemd-nspawn@")
        || (name.starts_with("machine-") && name.ends_with(".scope"))
}

fn common(one: &Path, other: &Path) -> PathBuf {
    let pairs = one.components().zip(other.components());
    pairs.take_while(|(a, b)| a == b).map(|(a, _)| a).collect()
}

#[cfg(test)]
mod tests;

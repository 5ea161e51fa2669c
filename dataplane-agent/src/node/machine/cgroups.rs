//! Which cgroups are a pod's alone, from where its processes are.
//!
//! Container engines and the kubelet give each pod, or each container of it, a cgroup that they name
//! so; the outermost one of such a name is taken, whichever containers were there first. Where nothing
//! is named, it is the lowest cgroup that has all processes of the pod and no others. What is the pod's
//! once stays so until it is removed: more may come.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};

/// What is asked of the machine.
pub(super) struct CgroupQuery<'a> {
    /// The cgroup that holds all pods.
    pub pods: &'a Path,
    /// The cgroup that the agent is in.
    pub agent: &'a Path,
    /// The processes of the pod's namespace.
    pub own: &'a BTreeSet<u32>,
    /// The processes of the host's.
    pub hosts: &'a BTreeSet<u32>,
    /// The processes in a cgroup and below it.
    pub members: &'a dyn Fn(&Path) -> io::Result<Vec<u32>>,
}

/// Why a pod has no cgroup yet.
#[derive(Debug)]
pub(super) enum CgroupError {
    /// What is wrong with where its processes are.
    Wrong(String),
    /// The machine could not be asked.
    Failed(io::Error),
}

impl From<io::Error> for CgroupError {
    fn from(error: io::Error) -> Self {
        Self::Failed(error)
    }
}

impl CgroupQuery<'_> {
    /// The cgroups of a pod whose processes are in these; none of them is below another.
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
        // What is in the agent's own cgroup is not captured: it would be the agent itself.
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

    /// Of cgroups that nobody named: the lowest that has them all, if it has nothing else. Otherwise
    /// those that the pod shares with nobody; with the host, as a shell that went into the pod does,
    /// only if there is one, and it is all that there is.
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
            // It went with its last process.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            members => Ok(members?.iter().all(is)),
        }
    }
}

/// The outermost cgroup on the way to a process that an engine or the kubelet made for one pod, or for
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

/// The uid of the pod that the kubelet made a process's cgroup for. It is believed of the outermost
/// name alone, and where nothing but the kubelet's own is above it: what is below a cgroup of its own
/// a pod may name as it likes.
pub(super) fn uid_of(process: &Path, pods: &Path) -> Option<String> {
    let group = named(process, pods)?;
    let above = group.parent()?.strip_prefix(pods).ok()?;
    let is_same = above
        .iter()
        .all(|name| name.to_str().is_some_and(is_kubelet_parent));
    let uid = pod_uid(group.file_name()?.to_str()?)?;
    is_same.then(|| normalize_uid(uid))
}

/// A pod's uid, as it is compared: systemd's names have another sign between its parts.
pub(super) fn normalize_uid(uid: &str) -> String {
    uid.replace('_', "-")
}

/// `pod<uid>`, or `kubepods[-<class>]-pod<uid>.slice`: as the kubelet names a pod's cgroup.
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

/// Whether it is a cgroup in which the kubelet makes those of pods: `kubepods`, one of a class of
/// quality in it, or `kubelet` around it; with systemd, a slice of these words.
fn is_kubelet_parent(name: &str) -> bool {
    let mut words = name.strip_suffix(".slice").unwrap_or(name).split('-');
    words.all(|word| matches!(word, "kubelet" | "kubepods" | "burstable" | "besteffort"))
}

/// As engines name the cgroup of a container, or Podman that of a pod: by an id of 64 digits, with
/// words before it; as systemd-nspawn and LXC do: by a name.
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

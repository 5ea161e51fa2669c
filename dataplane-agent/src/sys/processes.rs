//! One look at the network namespaces of this machine, by the processes and the names that hold them.
//!
//! What a look does not find is gone only if the look was whole: [`namespaces`] fails where something
//! kept it from looking, and says what it was not allowed to see.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::caps;

/// Where named network namespaces are.
const NAMES: &str = "/run/netns";

/// Where the kernel tells of the process namespace that this process is in.
const OWN: &str = "/proc/self/ns/pid";
/// The inode of the machine's first one, `PROC_PID_INIT_INO`, the same since Linux 3.8:
/// <https://github.com/torvalds/linux/blob/v6.1/include/linux/proc_ns.h>.
const FIRST: u64 = 0xEFFF_FFFC;

/// Refuses where the processes of the machine are not seen. From within a container's process namespace
/// those of the pods are not there, and pods whose processes are gone are let go. A node that is itself
/// a container (kind, LXC) has another first process than the machine; whoever sees that one sees the
/// node's pods, and is in another cgroup than it.
///
/// # Errors
/// The first process that is seen is of our own container, or none can be seen; what to set.
pub fn refuse_in_other_namespace() -> Result<(), String> {
    let unknown = |what: &str, error: io::Error| {
        format!("{what}: {error}: cannot tell whether the processes of the pods are seen from here")
    };
    let own = fs::metadata(OWN).map_err(|error| unknown(OWN, error))?;
    if own.ino() == FIRST {
        return Ok(());
    }
    let group = |process: &str| {
        let path = format!("/proc/{process}/cgroup");
        fs::read_to_string(&path).map_err(|error| unknown(&path, error))
    };
    if group("1")? != group("self")? {
        return Ok(());
    }
    Err(format!(
        "{OWN} is pid:[{}], not the machine's own pid:[{FIRST}], and its first process is in our own \
         cgroup: the processes of the pods are not seen from there; start it with `hostPID: true` \
         (Kubernetes) or `--pid=host` (podman, docker)",
        own.ino()
    ))
}

/// What one look found.
#[derive(Debug, Default)]
pub struct Look {
    /// The namespaces, by their inode numbers.
    pub namespaces: BTreeMap<u64, Namespace>,
    /// The processes that may not be looked at, although the agent has what it takes to see its pods':
    /// those of another user namespace above it, for one.
    pub hidden: BTreeSet<u32>,
}

/// A network namespace that somebody holds.
#[derive(Debug, Default)]
pub struct Namespace {
    /// A way to open it: its name if it has one, which outlives processes.
    pub path: PathBuf,
    /// The processes in it.
    pub processes: Vec<u32>,
}

/// Looks at all processes, and at the names in `/run/netns`.
///
/// # Errors
/// Something kept it from looking, such as a lack of descriptors, or of the right to see other
/// processes. What it would have found is not known then, and nothing may be taken for gone.
pub fn namespaces() -> io::Result<Look> {
    let mut look = Look::default();
    let may_see = caps::may_see_processes();
    let own = fs::metadata("/proc/self/ns/net")?;
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        let (path, inode) = match of_process(&entry.path()) {
            Ok(Some(found)) => found,
            Ok(None) => continue,
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied && may_see => {
                look.hidden.insert(pid);
                continue;
            }
            Err(error) => return Err(error),
        };
        let namespace = look.namespaces.entry(inode).or_default();
        namespace.path = path;
        namespace.processes.push(pid);
    }
    let names = match fs::read_dir(NAMES) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(look),
        names => names?,
    };
    for entry in names {
        let path = entry?.path();
        if let Some(of) = stat(&path)?
            && of.dev() == own.dev()
        {
            look.namespaces.entry(of.ino()).or_default().path = path;
        }
    }
    Ok(look)
}

/// The namespace that a process is in: of its first thread, or of another one where that has ended.
fn of_process(process: &Path) -> io::Result<Option<(PathBuf, u64)>> {
    let path = process.join("ns/net");
    if let Some(of) = stat(&path)? {
        return Ok(Some((path, of.ino())));
    }
    let tasks = match fs::read_dir(process.join("task")) {
        Err(error) if has_ended(&error) => return Ok(None),
        tasks => tasks?,
    };
    for task in tasks {
        let path = match task {
            Err(error) if has_ended(&error) => return Ok(None),
            task => task?.path().join("ns/net"),
        };
        if let Some(of) = stat(&path)? {
            return Ok(Some((path, of.ino())));
        }
    }
    Ok(None)
}

/// What is there; none if it has ended meanwhile.
fn stat(path: &Path) -> io::Result<Option<fs::Metadata>> {
    match fs::metadata(path) {
        Err(error) if has_ended(&error) => Ok(None),
        of => of.map(Some),
    }
}

/// Whether a process has ended while it was looked at.
pub fn has_ended(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_look_finds_the_namespace_that_it_is_in_itself() {
        let own = fs::metadata("/proc/self/ns/net").expect("/proc is there");
        let look = namespaces().expect("it may look");
        let found = look.namespaces.get(&own.ino()).expect("it is there");
        assert!(found.processes.contains(&std::process::id()), "{found:?}");
    }
}

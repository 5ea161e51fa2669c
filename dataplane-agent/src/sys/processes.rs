//! One look at the network namespaces of this machine, by the processes and the mounts that hold them.
//!
//! What a look does not find is gone only if the look was whole: [`namespaces`] fails where something
//! kept it from looking, and says what it was not allowed to see.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::caps;

/// Where the kernel tells of the process namespace that this process is in.
const OWN_PID_NS: &str = "/proc/self/ns/pid";
/// The inode of the machine's first one, `PROC_PID_INIT_INO`, the same since Linux 3.8:
/// <https://github.com/torvalds/linux/blob/v6.1/include/linux/proc_ns.h>.
const INIT_PID_NS: u64 = 0xEFFF_FFFC;

/// Refuses where the processes of the machine are not seen, or not their cgroups. From within a container's process namespace
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
    let own = fs::metadata(OWN_PID_NS).map_err(|error| unknown(OWN_PID_NS, error))?;
    let first = fs::read("/proc/1/cgroup").map_err(|error| unknown("/proc/1/cgroup", error))?;
    refuse_outside(&first)?;
    if own.ino() == INIT_PID_NS {
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
        "{OWN_PID_NS} is pid:[{}], not the machine's own pid:[{INIT_PID_NS}], and its first process is in our own \
         cgroup: the processes of the pods are not seen from there; start it with `hostPID: true` \
         (Kubernetes) or `--pid=host` (podman, docker)",
        own.ino()
    ))
}

/// Refuses where the first process' group, from its `/proc/<pid>/cgroup`, is outside of our cgroup
/// namespace: those of the pods are beside it.
fn refuse_outside(first: &[u8]) -> Result<(), String> {
    let named = first
        .split(|byte| *byte == b'\n')
        .find(|line| line.starts_with(b"0::/.."));
    named.map_or(Ok(()), |line| {
        Err(format!(
            "the first process is in cgroup {}, outside of our own cgroup namespace, and so are the \
             cgroups of the pods; start it with `privileged: true` (Kubernetes) or `--cgroupns=host` \
             (podman, docker)",
            String::from_utf8_lossy(line.get(3..).unwrap_or_default()),
        ))
    })
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
    /// A way to open it: where it is mounted if it is, which outlives processes.
    pub path: PathBuf,
    /// The processes in it.
    pub processes: Vec<u32>,
}

/// Looks at all processes, and at what is mounted: that is how a namespace has a name, in `/run/netns`
/// or elsewhere.
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
    for (inode, path) in mounted(&fs::read("/proc/self/mountinfo")?) {
        let namespace = look.namespaces.entry(inode).or_default();
        // Something else may be mounted over it: then it is there, by a way that is none.
        let is_there =
            fs::metadata(&path).is_ok_and(|of| (of.dev(), of.ino()) == (own.dev(), inode));
        if is_there || namespace.processes.is_empty() {
            namespace.path = path;
        }
    }
    Ok(look)
}

/// The network namespaces that are mounted somewhere, and where, from the text of
/// `/proc/self/mountinfo`.
fn mounted(mounts: &[u8]) -> impl Iterator<Item = (u64, PathBuf)> {
    mounts.split(|byte| *byte == b'\n').filter_map(|line| {
        let mut words = line.split(|byte| *byte == b' ').skip(3);
        let (root, at) = (words.next()?, words.next()?);
        let inode = root.strip_prefix(b"net:[")?.strip_suffix(b"]")?;
        let inode = std::str::from_utf8(inode).ok()?.parse().ok()?;
        Some((inode, PathBuf::from(OsString::from_vec(unescaped(at)))))
    })
}

/// A path as it is; the kernel writes `\040` for a blank, and so on.
fn unescaped(mut word: &[u8]) -> Vec<u8> {
    let mut path = Vec::with_capacity(word.len());
    while let [first, rest @ ..] = word {
        let digits = rest
            .get(..3)
            .and_then(|digits| std::str::from_utf8(digits).ok());
        let byte = digits.and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match byte {
            Some(byte) if *first == b'\\' => {
                path.push(byte);
                word = &rest[3..];
            }
            _ => {
                path.push(*first);
                word = rest;
            }
        }
    }
    path
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
    fn mounted_namespaces_are_found_wherever_they_are() {
        let mounts = b"22 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw\n\
            90 22 0:4 net:[4026532008] /run/netns/a\\040b rw shared:9 - nsfs nsfs rw\n\
            91 22 0:4 mnt:[4026532009] /run/m rw - nsfs nsfs rw\n\
            92 22 0:4 net:[4026532010] /srv/\xff\\134x rw - nsfs nsfs rw\n";
        let path = |bytes: &[u8]| PathBuf::from(OsString::from_vec(bytes.to_vec()));
        assert_eq!(
            mounted(mounts).collect::<Vec<_>>(),
            [
                (4_026_532_008, path(b"/run/netns/a b")),
                (4_026_532_010, path(b"/srv/\xff\\x")),
            ]
        );
    }

    #[test]
    fn a_look_finds_the_namespace_that_it_is_in_itself() {
        let own = fs::metadata("/proc/self/ns/net").expect("/proc is there");
        let look = namespaces().expect("it may look");
        let found = look.namespaces.get(&own.ino()).expect("it is there");
        assert!(found.processes.contains(&std::process::id()), "{found:?}");
    }
}

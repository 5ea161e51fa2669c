//! A scan for the network namespaces of this machine, by the processes and the mounts that hold them.
//!
//! A namespace that a scan does not find is gone only if the scan was complete: [`namespaces`] fails if something
//! kept it from looking, and returns the processes that it may not see.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::caps;
use super::netns::Netns;

/// The process namespace of this process.
const OWN_PID_NS: &str = "/proc/self/ns/pid";
/// The inode of the machine's initial process namespace, `PROC_PID_INIT_INO`, the same since Linux 3.8:
/// <https://github.com/torvalds/linux/blob/v6.1/include/linux/proc_ns.h>.
const INIT_PID_NS: u64 = 0xEFFF_FFFC;

/// Fails if the processes of the node's pods, or their cgroups, are not visible. In a container's process
/// namespace they are not, and pods without processes would be taken for gone. A node that is itself a container
/// (kind, LXC) has another first process than the machine; an agent that sees this process sees the node's pods,
/// and is in another cgroup than that process.
///
/// # Errors
/// The first visible process is of our own container, or none is visible; the text says what to set.
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

/// Fails if the first process' group, from its `/proc/<pid>/cgroup`, is outside of our cgroup namespace: then
/// the pods' groups, which are beside it, are outside too.
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

/// The result of a scan.
#[derive(Debug, Default)]
pub struct Look {
    /// The namespaces, by their inode numbers.
    pub namespaces: BTreeMap<u64, Namespace>,
    /// The processes that may not be looked at, although the agent has the capability for those of its pods:
    /// for example those of a user namespace above its own.
    pub hidden: BTreeSet<u32>,
}

impl Look {
    /// Returns the namespace with this inode number and cookie, or one with this number whose cookie is not known.
    pub fn namespace(&self, inode: u64, cookie: u64) -> Option<&Namespace> {
        let namespace = self.namespaces.get(&inode)?;
        namespace
            .cookie
            .is_none_or(|is| is == cookie)
            .then_some(namespace)
    }

    /// Returns the inode number of the namespace at a path: that of a mount, `/proc/<pid>/ns/net`, or a link to one of
    /// these in `/run/netns`. Nothing is asked of any other path, as its file system may never answer.
    ///
    /// # Errors
    /// None was there at the time of this look (`NotFound`); the process is hidden (`PermissionDenied`); the path is
    /// none of these (`InvalidInput`).
    pub fn at(&self, path: &Path) -> io::Result<u64> {
        let path = without_var(path);
        if let Some(inode) = self.held_at(&path) {
            return Ok(inode);
        }
        if path.parent() == Some(Path::new(NAMED)) {
            let target = without_var(&fs::read_link(&path)?);
            return self.held_at(&target).ok_or(io::ErrorKind::NotFound.into());
        }
        match process_of(&path) {
            Some(pid) if self.hidden.contains(&pid) => Err(io::ErrorKind::PermissionDenied.into()),
            Some(_) => Err(io::ErrorKind::NotFound.into()),
            None => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "no network namespace is mounted there, and it is not /proc/<pid>/ns/net",
            )),
        }
    }

    /// Returns `true` unless a network namespace is mounted at this path.
    pub fn is_of_process(&self, path: &Path) -> bool {
        let path = without_var(path);
        let mut mounts = self.namespaces.values().flat_map(|of| &of.mounts);
        !mounts.any(|at| without_var(at) == path)
    }

    fn held_at(&self, path: &Path) -> Option<u64> {
        let process = process_of(path);
        let is_there = |namespace: &Namespace| {
            let is_of = |pid| namespace.processes.contains(&pid);
            process.is_some_and(is_of) || namespace.mounts.iter().any(|at| without_var(at) == path)
        };
        let mut namespaces = self.namespaces.iter();
        let found = namespaces.find(|(_, namespace)| is_there(namespace));
        found.map(|(inode, _)| *inode)
    }
}

/// The folder of named namespaces.
const NAMED: &str = "/run/netns";

/// Returns a path below `/run` if it is one below `/var/run`, which is the same folder.
fn without_var(path: &Path) -> PathBuf {
    match path.strip_prefix("/var/run") {
        Ok(below) => Path::new("/run").join(below),
        Err(_) => path.to_owned(),
    }
}

/// Returns the process of a path `/proc/<pid>/ns/net`.
fn process_of(path: &Path) -> Option<u32> {
    let pid = path.strip_prefix("/proc").ok()?.to_str()?;
    pid.strip_suffix("/ns/net")?.parse().ok()
}

/// A network namespace that a process or a mount holds.
#[derive(Debug, Default)]
pub struct Namespace {
    /// Its cookie, by which it is told from an earlier one of its inode number: the number of one
    /// that has ended is given out again at once. `None` if it may not be entered, or cannot be opened by its mount.
    pub cookie: Option<u64>,
    /// A path to open it by: that of its mount if there is one, as that outlives processes.
    pub path: PathBuf,
    /// Where it is mounted, and nothing over it.
    pub mounts: Vec<PathBuf>,
    /// The processes in it.
    pub processes: Vec<u32>,
}

impl Namespace {
    /// Returns `true` if the namespace with this inode number is still where this look opened it.
    pub fn is_still(&self, inode: u64) -> bool {
        fs::metadata(&self.path).is_ok_and(|there| there.ino() == inode)
    }
}

/// Scans all processes and all mounts, as named namespaces are mounted in `/run/netns` or elsewhere.
///
/// # Errors
/// Something kept it from looking, such as a lack of descriptors, or of the right to see other processes. Then
/// the scan is not complete, and no namespace may be taken for gone.
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
        let known = look.namespaces.get(&inode).and_then(|of| of.cookie);
        let cookie = match known.map_or_else(|| cookie(&path, inode), |known| Ok(Some(known))) {
            Err(error) if has_ended(&error) => continue,
            cookie => cookie?,
        };
        let namespace = look.namespaces.entry(inode).or_default();
        namespace.cookie = cookie;
        namespace.path = path;
        namespace.processes.push(pid);
    }
    for (inode, path) in mounted(&fs::read("/proc/self/mountinfo")?) {
        let namespace = look.namespaces.entry(inode).or_default();
        // Something else may be mounted over it: then it exists, but cannot be opened by this path.
        let is_there =
            fs::metadata(&path).is_ok_and(|of| (of.dev(), of.ino()) == (own.dev(), inode));
        if is_there && namespace.cookie.is_none() {
            namespace.cookie = match cookie(&path, inode) {
                Err(error) if has_ended(&error) => None,
                cookie => cookie?,
            };
        }
        if is_there {
            namespace.mounts.push(path.clone());
        }
        if is_there || namespace.processes.is_empty() {
            namespace.path = path;
        }
    }
    Ok(look)
}

/// Returns the cookie of the namespace at a path; `None` if that is another one by now, or may not be entered.
fn cookie(path: &Path, inode: u64) -> io::Result<Option<u64>> {
    let netns = Netns::open(path)?;
    if netns.inode() != inode {
        return Ok(None);
    }
    match netns.cookie() {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(None),
        cookie => cookie.map(Some),
    }
}

/// Returns the inodes and paths of the mounted network namespaces, from the text of `/proc/self/mountinfo`.
fn mounted(mounts: &[u8]) -> impl Iterator<Item = (u64, PathBuf)> {
    mounts.split(|byte| *byte == b'\n').filter_map(|line| {
        let mut words = line.split(|byte| *byte == b' ').skip(3);
        let (root, at) = (words.next()?, words.next()?);
        let inode = root.strip_prefix(b"net:[")?.strip_suffix(b"]")?;
        let inode = std::str::from_utf8(inode).ok()?.parse().ok()?;
        Some((inode, PathBuf::from(OsString::from_vec(unescaped(at)))))
    })
}

/// Returns a path without the kernel's octal escapes, such as `\040` for a blank.
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

/// Returns the namespace of a process: that of its first thread, or of another one if that has ended.
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

/// Returns `true` if a process may keep the network namespace of this inode number out of sight: a thread of it is there,
/// or is in one that the initial user namespace does not own. Any user gets into such a one, and keeps sockets of the
/// one before.
///
/// # Errors
/// It cannot be looked at, or has ended.
pub fn may_hide_in(pid: u32, inode: u64) -> io::Result<bool> {
    // It is outside of our process namespace.
    if pid == 0 {
        return Ok(true);
    }
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let netns = task.and_then(|task| Netns::open(&task.path().join("ns/net")));
        let netns = match netns {
            Err(error) if has_ended(&error) => continue,
            netns => netns?,
        };
        if netns.inode() == inode || !netns.is_the_hosts()? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Returns the metadata of a path; `None` if the process has ended meanwhile.
fn stat(path: &Path) -> io::Result<Option<fs::Metadata>> {
    match fs::metadata(path) {
        Err(error) if has_ended(&error) => Ok(None),
        of => of.map(Some),
    }
}

/// Returns `true` if the error says that a process has ended while it was looked at.
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
    fn a_namespace_is_still_there_if_its_path_leads_to_it() {
        let path = "/proc/self/ns/net";
        let own = fs::metadata(path).expect("our own").ino();
        let at = |path: &str| Namespace {
            path: path.into(),
            ..Namespace::default()
        };
        assert!(at(path).is_still(own));
        assert!(!at(path).is_still(own + 1));
        assert!(!at("/proc/0/ns/net").is_still(own));
    }

    #[test]
    fn a_namespace_is_found_by_its_path_without_a_question_to_the_path() {
        let of = |mounts: &[&str], processes: &[u32]| Namespace {
            mounts: mounts.iter().map(PathBuf::from).collect(),
            processes: processes.to_vec(),
            ..Namespace::default()
        };
        let look = Look {
            namespaces: BTreeMap::from([
                (1, of(&["/run/netns/a", "/run/docker/netns/b"], &[])),
                (2, of(&["/var/run/netns/c"], &[70])),
            ]),
            hidden: BTreeSet::new(),
        };
        let at = |path: &str| look.at(Path::new(path)).map_err(|error| error.kind());
        for (path, inode) in [
            ("/run/netns/a", 1),
            ("/var/run/netns/a", 1),
            ("/run/docker/netns/b", 1),
            ("/run/netns/c", 2),
            ("/proc/70/ns/net", 2),
        ] {
            assert_eq!(at(path), Ok(inode), "{path}");
        }
        for path in ["/run/netns/there-is-none", "/proc/71/ns/net"] {
            assert_eq!(at(path), Err(io::ErrorKind::NotFound), "{path}");
        }
        for path in [
            "/proc/self/ns/net",
            "/proc/70/root/run/netns/c",
            "/run/netns/../../mnt/d",
            "/mnt/d",
            "run/netns/a",
        ] {
            assert_eq!(at(path), Err(io::ErrorKind::InvalidInput), "{path}");
        }
    }

    #[test]
    fn a_look_finds_the_namespace_that_it_is_in_itself() {
        let own = fs::metadata("/proc/self/ns/net").expect("/proc is there");
        let look = namespaces().expect("it may look");
        let found = look.namespaces.get(&own.ino()).expect("it is there");
        assert!(found.processes.contains(&std::process::id()), "{found:?}");
    }
}

//! Control groups, version 2: the mount, and the group of a process.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// A control group, as the kernel programs identify it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CgroupId {
    /// Its id: the inode number of its folder.
    pub id: u64,
    /// Its depth; the root is 0.
    pub level: u32,
}

/// Returns the path at which the hierarchy of version 2 is mounted.
///
/// # Errors
/// `/proc/self/mounts` cannot be read; there is no such mount.
pub fn root() -> io::Result<PathBuf> {
    let of = |pid: &str| fs::read_to_string(format!("/proc/{pid}/mounts"));
    mount_of(&of("self")?, "cgroup2").ok_or_else(|| {
        let of_init = of("1").ok();
        let of_init = of_init.and_then(|mounts| mount_of(&mounts, "cgroup2"));
        io::Error::new(io::ErrorKind::NotFound, not_mounted(of_init.as_deref()))
    })
}

/// Returns why no hierarchy is there, and the remedy. `of_init`: where the machine's first process has it.
fn not_mounted(of_init: Option<&Path>) -> String {
    match of_init {
        Some(at) => format!(
            "no cgroup v2 hierarchy is mounted here, and process 1 has one at {}: `ip netns exec` takes it away, as it \
             mounts another /sys; use `nsenter --net=/run/netns/NAME` in its place",
            at.display()
        ),
        None => "no cgroup v2 hierarchy is mounted (mount -t cgroup2 none /sys/fs/cgroup)".into(),
    }
}

/// Returns the first mount of a file system type in the text of `/proc/self/mounts`.
pub fn mount_of(mounts: &str, kind: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let mut words = line.split(' ');
        let (_, folder, of) = (words.next()?, words.next()?, words.next()?);
        (of == kind).then(|| PathBuf::from(folder.replace("\\040", " ")))
    })
}

/// Returns the group of a folder below `root`.
///
/// # Errors
/// The folder does not exist, or is not below `root`.
pub fn id(root: &Path, folder: &Path) -> io::Result<CgroupId> {
    let below = folder
        .strip_prefix(root)
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "not below the cgroup v2 root"))?;
    Ok(CgroupId {
        id: fs::metadata(folder)?.ino(),
        level: u32::try_from(below.components().count()).unwrap_or(u32::MAX),
    })
}

/// Returns the processes in a group and in those below it; 0 stands for one outside of our process namespace.
///
/// # Errors
/// One of the folders cannot be read.
pub fn members(folder: &Path) -> io::Result<Vec<u32>> {
    let text = fs::read_to_string(folder.join("cgroup.procs"))?;
    let mut members: Vec<u32> = text.lines().map(|pid| pid.parse().unwrap_or(0)).collect();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if !entry.file_type()?.is_dir() {
            continue;
        }
        match self::members(&entry.path()) {
            // A threaded group: its processes are listed in the threaded domain above it.
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
            below => members.extend(below?),
        }
    }
    Ok(members)
}

/// Returns `true` if a process is in a group, which is not the root, or in those below it.
///
/// # Errors
/// The group cannot be read.
pub fn is_populated(folder: &Path) -> io::Result<bool> {
    let events = fs::read_to_string(folder.join("cgroup.events"))?;
    Ok(!events.lines().any(|line| line == "populated 0"))
}

/// Finds the group with this id at `folder` or below it. One that is removed meanwhile is passed over.
///
/// # Errors
/// A group cannot be read.
pub fn find(root: &Path, folder: &Path, id: u64) -> io::Result<Option<(PathBuf, CgroupId)>> {
    match find_there(root, folder, id) {
        Err(error) if is_removed(&error) => Ok(None),
        found => found,
    }
}

fn find_there(root: &Path, folder: &Path, id: u64) -> io::Result<Option<(PathBuf, CgroupId)>> {
    let group = self::id(root, folder)?;
    if group.id == id {
        return Ok(Some((folder.to_owned(), group)));
    }
    // All are read first: no descriptor is held for each level.
    let below = fs::read_dir(folder)?.collect::<io::Result<Vec<_>>>()?;
    for entry in below {
        if entry.file_type().is_ok_and(|kind| kind.is_dir())
            && let Some(found) = find(root, &entry.path(), id)?
        {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

fn is_removed(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV)
}

/// Returns the folder of this process's group; `None` if that is outside of our cgroup namespace.
///
/// # Errors
/// `/proc` cannot be read.
pub fn own(root: &Path) -> io::Result<Option<PathBuf>> {
    let text = fs::read("/proc/self/cgroup")?;
    Ok(of_process(root, &text))
}

/// Returns the folder of a process's group, from its `/proc/<pid>/cgroup`; `None` if that group is outside of
/// our cgroup namespace. A group's name may have any bytes, not only UTF-8.
pub fn of_process(root: &Path, text: &[u8]) -> Option<PathBuf> {
    let mut lines = text.split(|byte| *byte == b'\n');
    let path = lines.find_map(|line| line.strip_prefix(b"0::/"))?;
    // The group was removed while its last process was ending.
    let path = path.strip_suffix(b" (deleted)").unwrap_or(path);
    if path.is_empty() {
        return Some(root.to_owned());
    }
    let mut parts = path.split(|byte| *byte == b'/');
    // A path with an empty first part would be joined as an absolute one.
    let is_below = parts.all(|part| !matches!(part, b"" | b"." | b".."));
    is_below.then(|| root.join(OsStr::from_bytes(path)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_ip_netns_exec_takes_the_hierarchy_away_that_is_told() {
        let told = not_mounted(Some(Path::new("/sys/fs/cgroup")));
        assert!(
            told.contains("at /sys/fs/cgroup: `ip netns exec`") && told.contains("nsenter --net="),
            "{told}"
        );
        assert!(not_mounted(None).contains("mount -t cgroup2"));
    }

    #[test]
    fn mounts_and_groups_are_read_as_the_kernel_writes_them() {
        let mounts = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup2 /sys/fs/cgroup/uni\\040fied cgroup2 rw 0 0\n";
        let root = mount_of(mounts, "cgroup2").expect("a mount");
        assert_eq!(root, Path::new("/sys/fs/cgroup/uni fied"));
        assert_eq!(mount_of(mounts, "bpf"), None);
        let of = |text: &str| of_process(Path::new("/c"), text.as_bytes());
        assert_eq!(of("1:cpu:/x\n0::/a/b\n"), Some("/c/a/b".into()));
        assert_eq!(of("0::/\n"), Some("/c".into()));
        for outside in ["0::/../x\n", "0::/a/../../x\n", "0:://etc\n", "0::/./x\n"] {
            assert_eq!(of(outside), None, "{outside}");
        }
        assert_eq!(of("0::/a/b (deleted)\n"), Some("/c/a/b".into()));
        assert_eq!(of("1:cpu:/x\n"), None);
    }
}

//! Resource limits of the process.

use std::fs;
use std::io;
use std::path::Path;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::cgroup;

/// Raises the soft limit of open files to the hard limit: each connection takes two, and the usual soft limit
/// is 1024.
///
/// # Errors
/// The kernel refuses.
pub fn raise_files() -> nix::Result<()> {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)
}

/// Returns the limit of open files.
///
/// # Errors
/// The kernel refuses.
pub fn files() -> nix::Result<u64> {
    getrlimit(Resource::RLIMIT_NOFILE).map(|(now, _)| now)
}

/// Returns the number of files that the process has open. Linux before 6.2 lists them one by one.
///
/// # Errors
/// `/proc` cannot be read; there are no descriptors left.
pub fn open_files() -> io::Result<u64> {
    let folder = Path::new("/proc/self/fd");
    match fs::metadata(folder)?.len() {
        0 => Ok(fs::read_dir(folder)?.count() as u64),
        count => Ok(count),
    }
}

/// Returns the memory for this process, in bytes: the machine's, or the limit of its cgroup or of one above it
/// if that is lower; 0 if none of them can be read.
pub fn memory() -> u64 {
    let machine = fs::read_to_string("/proc/meminfo").ok();
    let machine = machine.and_then(|text| total(&text));
    let groups = cgroup::root().ok().and_then(|root| {
        let own = cgroup::own(&root).ok()??;
        let groups = own.ancestors().take_while(|group| group.starts_with(&root));
        groups.filter_map(cgroup_limit).min()
    });
    machine.into_iter().chain(groups).min().unwrap_or(0)
}

/// Returns the machine's memory in bytes, from the text of `/proc/meminfo`.
fn total(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kilobytes: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kilobytes * 1024)
}

/// Returns the memory limit of a cgroup in bytes; `None` if it is `max`, or cannot be read.
fn cgroup_limit(group: &Path) -> Option<u64> {
    let text = fs::read_to_string(group.join("memory.max")).ok()?;
    text.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_as_the_kernel_writes_it() {
        let text = "MemTotal:        8124516 kB\nMemFree:  1 kB\n";
        assert_eq!(total(text), Some(8_124_516 * 1024));
        assert_eq!(total("MemTotal: ?"), None);
        assert!(memory() > 1 << 20);
        let group = tempfile::tempdir().expect("a folder");
        for (text, bound) in [("max\n", None), ("4194304\n", Some(4 << 20))] {
            fs::write(group.path().join("memory.max"), text).expect("a file");
            assert_eq!(cgroup_limit(group.path()), bound);
        }
    }
}

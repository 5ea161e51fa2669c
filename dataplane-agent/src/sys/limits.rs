//! Limits of the process.

use std::fs;
use std::path::Path;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::cgroup;

/// Raises the number of files that may be open to the most that needs no privilege: each connection
/// takes two, and shells allow 1024.
///
/// # Errors
/// The kernel refuses.
pub fn raise_files() -> nix::Result<()> {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)
}

/// How many files may be open.
///
/// # Errors
/// The kernel refuses.
pub fn files() -> nix::Result<u64> {
    getrlimit(Resource::RLIMIT_NOFILE).map(|(now, _)| now)
}

/// How much memory there is for this process: the machine's, or less where its cgroup, or one above
/// that, says so. Where none of it can be read, none is known of.
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

/// In bytes, from the text of `/proc/meminfo`.
fn total(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kilobytes: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kilobytes * 1024)
}

/// The bound of a cgroup; none if it says `max`, or has none to say.
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

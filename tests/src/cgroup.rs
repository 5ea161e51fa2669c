//! Cgroups of version 2. Their guards remove them, and kill the processes in them.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Returns the mount point of version 2.
pub fn root() -> PathBuf {
    let mounts = fs::read_to_string("/proc/self/mounts").expect("/proc is mounted");
    let mut folders = mounts.lines().filter_map(|line| {
        let words: Vec<&str> = line.split(' ').collect();
        (words.get(2) == Some(&"cgroup2")).then(|| PathBuf::from(words[1]))
    });
    folders.next().expect("a cgroup v2 hierarchy is mounted")
}

/// A cgroup, removed on drop.
#[derive(Debug)]
pub struct Cgroup {
    /// Its folder.
    pub folder: PathBuf,
}

impl Cgroup {
    /// Creates it.
    pub fn new(folder: &Path) -> Self {
        fs::create_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
        Self {
            folder: folder.to_owned(),
        }
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        remove(&self.folder);
    }
}

/// Removes a cgroup with those below it, and kills the processes in them.
pub fn remove(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove(&entry.path());
        }
    }
    for _ in 0..200 {
        let processes = fs::read_to_string(folder.join("cgroup.procs"));
        for pid in processes.unwrap_or_default().lines() {
            if let Ok(pid) = pid.parse() {
                let pid = nix::unistd::Pid::from_raw(pid);
                let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
            }
        }
        match fs::remove_dir(folder) {
            Ok(()) => return,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return,
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
    eprintln!("{} is left behind", folder.display());
}

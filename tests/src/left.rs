//! The removal of leftovers: if a world's process was killed, as by Ctrl-C, the next test process removes its
//! world. Nothing else is touched, and no world that is in use.

use std::collections::BTreeSet;
use std::fs::{self, DirEntry, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::mount::MntFlags;

use crate::cgroup;

/// Removes the worlds of test processes that are gone.
pub fn sweep() {
    let left = entries(&cgroup::root()).chain(entries(Path::new("/run/netns")));
    // The names are `dp-t<process>n<number>`, followed by more for a namespace.
    let worlds: BTreeSet<String> = left
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let id = name.strip_prefix("dp-")?.split('-').next()?;
            let (process, _) = id.strip_prefix('t')?.split_once('n')?;
            let process = u32::from_str_radix(process, 16).ok()?;
            (!lives(id, process)).then(|| id.to_owned())
        })
        .collect();
    for id in worlds {
        eprintln!("clearing what a killed test left: {id}");
        clear(&id);
    }
}

/// Removes a world's cgroups, namespaces and folders; returns `true` if there were any.
pub fn clear(id: &str) -> bool {
    let mut found = false;
    let top = cgroup::root().join(format!("dp-{id}"));
    if top.exists() {
        found = true;
        cgroup::remove(&top);
    }
    for entry in entries(Path::new("/run/netns")) {
        let name = entry.file_name();
        if name.to_string_lossy().starts_with(&format!("dp-{id}-")) {
            found = true;
            let _ = Command::new("ip")
                .args(["netns", "del"])
                .arg(&name)
                .status();
        }
    }
    for folder in folders(id) {
        found = true;
        let flags = MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW;
        let _ = nix::mount::umount2(&folder.join("bpf"), flags);
        let _ = fs::remove_dir_all(folder);
    }
    found
}

/// Locks a world's folder for as long as this process lives.
pub(crate) fn lock(folder: &Path) -> File {
    let lock = File::create(folder.join(LOCK)).expect("a file");
    lock.lock().expect("nobody else knows of it");
    lock
}

/// Returns the prefix of the name of a world's folder.
pub(crate) fn folder_prefix(id: &str) -> String {
    format!("dataplane-{id}-")
}

const LOCK: &str = "lock";

/// Returns `true` if the process of a world lives. Its lock decides, as its ID may belong to another process
/// by now, or to a zombie.
fn lives(id: &str, process: u32) -> bool {
    let lock = folders(id).find_map(|folder| File::open(folder.join(LOCK)).ok());
    match lock {
        Some(lock) => lock.try_lock().is_err(),
        None => Path::new(&format!("/proc/{process}")).exists(),
    }
}

/// Returns the folders of a world. Only our own folders count, and no links, as any user can create such names.
fn folders(id: &str) -> impl Iterator<Item = PathBuf> {
    let prefix = folder_prefix(id);
    let own = nix::unistd::geteuid().as_raw();
    entries(&std::env::temp_dir())
        .filter(move |entry| entry.file_name().to_string_lossy().starts_with(&prefix))
        .map(|entry| entry.path())
        .filter(move |path| {
            fs::symlink_metadata(path).is_ok_and(|found| found.is_dir() && found.uid() == own)
        })
}

fn entries(folder: &Path) -> impl Iterator<Item = DirEntry> + use<> {
    fs::read_dir(folder).into_iter().flatten().flatten()
}

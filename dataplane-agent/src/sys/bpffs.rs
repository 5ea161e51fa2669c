//! The BPF file system, where pins live.

use std::io;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::statfs::{FsType, statfs};

/// `BPF_FS_MAGIC` of `linux/magic.h`.
const MAGIC: FsType = FsType(0xcafe_4a11);

/// What a folder is that shall be one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Folder {
    /// A BPF file system is mounted there.
    Mounted,
    /// It is empty: one can be mounted there.
    Empty,
    /// It has something in it that a mount would hide.
    Occupied,
}

/// What a folder is.
///
/// # Errors
/// It is not there, or cannot be read.
pub fn look(folder: &Path) -> io::Result<Folder> {
    if is_mounted(folder)? {
        return Ok(Folder::Mounted);
    }
    match std::fs::read_dir(folder)?.next() {
        None => Ok(Folder::Empty),
        Some(_) => Ok(Folder::Occupied),
    }
}

/// Whether one is mounted there.
///
/// # Errors
/// The folder is not there.
pub fn is_mounted(folder: &Path) -> io::Result<bool> {
    Ok(statfs(folder)?.filesystem_type() == MAGIC)
}

/// One that is mounted. If it was not before, it is unmounted with this, unless it is kept or used.
#[derive(Debug)]
pub struct Mounted(Option<PathBuf>);

impl Mounted {
    /// It stays.
    pub fn keep(mut self) {
        if let Some(folder) = self.0.take() {
            tracing::info!(folder = %folder.display(), "mounted a BPF file system");
        }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let Some(folder) = &self.0 else { return };
        // Somebody may have begun to use it. What is open keeps it mounted; what is pinned does not.
        if !is_used(folder) {
            let _ = umount2(folder, MntFlags::empty());
        }
    }
}

/// Whether somebody has made something in one. The kernel's own names have dots, and no others have.
fn is_used(folder: &Path) -> bool {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.file_name())
        .any(|name| !name.as_encoded_bytes().contains(&b'.'))
}

/// Mounts one there, unless it is: systemd does so at boot, other machines may not.
///
/// # Errors
/// The folder is not there, or has something in it that would be hidden; CAP_SYS_ADMIN is missing.
pub fn ensure(folder: &Path) -> io::Result<Mounted> {
    match look(folder)? {
        Folder::Mounted => return Ok(Mounted(None)),
        Folder::Occupied => return Err(occupied()),
        Folder::Empty => {}
    }
    mount_at(folder)?;
    Ok(Mounted(Some(folder.to_owned())))
}

/// Why none can be mounted where there is something else.
pub fn occupied() -> io::Error {
    let kind = io::ErrorKind::DirectoryNotEmpty;
    io::Error::new(kind, "it is no BPF file system, and is not empty")
}

/// Runs `work` where `folder` is a new BPF file system that nobody else sees: it is gone with all
/// that is pinned in it when `work` is done, and also when the process is killed meanwhile.
///
/// # Errors
/// The folder is not there; CAP_SYS_ADMIN is missing.
pub fn in_private<T: Send>(folder: &Path, work: impl FnOnce() -> T + Send) -> io::Result<T> {
    // On a thread that ends: its mounts end with it.
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNS)?;
            let private = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
            mount(None::<&Path>, "/", None::<&Path>, private, None::<&Path>)?;
            mount_at(folder)?;
            Ok(work())
        });
        match thread.join() {
            Ok(done) => done,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

fn mount_at(folder: &Path) -> io::Result<()> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("bpf"), folder, Some("bpf"), flags, Some("mode=700"))?;
    Ok(())
}

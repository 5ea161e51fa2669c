//! The BPF file system, in which maps, programs and links are pinned.

use std::io;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::statfs::{FsType, statfs};

/// `BPF_FS_MAGIC` of `linux/magic.h`.
const MAGIC: FsType = FsType(0xcafe_4a11);

/// The state of a folder that a BPF file system is to be mounted on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Folder {
    /// A BPF file system is mounted there.
    Mounted,
    /// It is empty: a BPF file system can be mounted there.
    Empty,
    /// It has contents that a mount would hide.
    Occupied,
}

/// Returns the state of a folder.
///
/// # Errors
/// It does not exist, or cannot be read.
pub fn look(folder: &Path) -> io::Result<Folder> {
    if is_mounted(folder)? {
        return Ok(Folder::Mounted);
    }
    match std::fs::read_dir(folder)?.next() {
        None => Ok(Folder::Empty),
        Some(_) => Ok(Folder::Occupied),
    }
}

/// Returns `true` if a BPF file system is mounted there.
///
/// # Errors
/// The folder does not exist.
pub fn is_mounted(folder: &Path) -> io::Result<bool> {
    Ok(statfs(folder)?.filesystem_type() == MAGIC)
}

/// A mounted BPF file system. If [`ensure`] mounted it, dropping this unmounts it, unless it is in use or
/// [`Mounted::keep`] was called.
#[derive(Debug)]
pub struct Mounted(Option<PathBuf>);

impl Mounted {
    /// Leaves it mounted.
    pub fn keep(mut self) {
        if let Some(folder) = self.0.take() {
            tracing::info!(folder = %folder.display(), "mounted a BPF file system");
        }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let Some(folder) = &self.0 else { return };
        // Another process may use it by now. Open files prevent the unmount, pins do not.
        if !is_used(folder) {
            let _ = umount2(folder, MntFlags::empty());
        }
    }
}

/// Returns `true` if something is pinned in it. Only the kernel's own files have names with a dot.
fn is_used(folder: &Path) -> bool {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.file_name())
        .any(|name| !name.as_encoded_bytes().contains(&b'.'))
}

/// Mounts a BPF file system there, unless there is one: systemd does so at boot, other machines may not.
///
/// # Errors
/// The folder does not exist, or has contents that would be hidden; CAP_SYS_ADMIN is missing.
pub fn ensure(folder: &Path) -> io::Result<Mounted> {
    match look(folder)? {
        Folder::Mounted => return Ok(Mounted(None)),
        Folder::Occupied => return Err(occupied()),
        Folder::Empty => {}
    }
    mount_at(folder)?;
    Ok(Mounted(Some(folder.to_owned())))
}

/// Returns the error for [`Folder::Occupied`].
pub fn occupied() -> io::Error {
    let kind = io::ErrorKind::DirectoryNotEmpty;
    io::Error::new(kind, "it is no BPF file system, and is not empty")
}

/// Runs `work` with a new BPF file system on `folder` that no other thread sees. It is gone, with its pins,
/// when `work` is done or the process is killed.
///
/// # Errors
/// The folder does not exist; CAP_SYS_ADMIN is missing.
pub fn in_private<T: Send>(folder: &Path, work: impl FnOnce() -> T + Send) -> io::Result<T> {
    // The mount namespace ends with this thread.
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

//! The BPF file system, where pins live.

use std::io;
use std::path::Path;

use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{FsType, statfs};

/// `BPF_FS_MAGIC` of `linux/magic.h`.
const MAGIC: FsType = FsType(0xcafe_4a11);

/// Whether one is mounted there.
///
/// # Errors
/// The folder is not there.
pub fn is_mounted(folder: &Path) -> io::Result<bool> {
    Ok(statfs(folder)?.filesystem_type() == MAGIC)
}

/// Mounts one there, unless it is: systemd does so at boot, other machines may not.
///
/// # Errors
/// The folder is not there, or has something in it that would be hidden; CAP_SYS_ADMIN is missing.
pub fn ensure(folder: &Path) -> io::Result<()> {
    if !is_mounted(folder)? {
        if std::fs::read_dir(folder)?.next().is_some() {
            let kind = io::ErrorKind::DirectoryNotEmpty;
            return Err(io::Error::new(kind, "it is none, and is not empty"));
        }
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        mount(Some("bpf"), folder, Some("bpf"), flags, Some("mode=700"))?;
        tracing::info!(folder = %folder.display(), "mounted a BPF file system");
    }
    Ok(())
}

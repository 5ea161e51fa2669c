//! Locks on files and folders that their owner may remove.

use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long a process that only tests a lock may hold it.
const PROBE_TIME: Duration = Duration::from_millis(100);

/// Locks the file that `open` opens at a path, exclusively or shared as `lock` does, until the result is
/// dropped. Returns none if another process has a lock that excludes this one.
///
/// # Errors
/// The file cannot be opened or locked.
pub fn lock(
    path: &Path,
    open: impl Fn() -> io::Result<File>,
    lock: fn(&File) -> Result<(), TryLockError>,
) -> io::Result<Option<File>> {
    let deadline = Instant::now() + PROBE_TIME;
    loop {
        let file = open()?;
        match lock(&file) {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                std::thread::sleep(PROBE_TIME / 10);
                continue;
            }
            Err(TryLockError::WouldBlock) => return Ok(None),
            Err(TryLockError::Error(error)) => return Err(error),
        }
        // The owner of an exclusive lock may remove the file; a lock on a removed file excludes nobody.
        if is_at(path, &file)? {
            return Ok(Some(file));
        }
    }
}

/// Returns whether an open file is the one at this path.
///
/// # Errors
/// The open file cannot be queried.
pub fn is_at(path: &Path, file: &File) -> io::Result<bool> {
    let own = file.metadata()?;
    let there = fs::symlink_metadata(path);
    Ok(there.is_ok_and(|there| (there.dev(), there.ino()) == (own.dev(), own.ino())))
}

//! Allows one demo at a time, and removes the leftovers of one that was killed.

use std::fs::File;
use std::io::{Read, Seek, Write};

use dataplane_tests::left;
use nix::fcntl::{Flock, FlockArg};

const LOCK: &str = "/run/dataplane-demo.lock";

/// Locks the one demo of this machine, and removes the leftovers of one that was killed.
///
/// # Errors
/// Another one runs; the text says which.
pub(crate) fn only() -> Result<Flock<File>, String> {
    let text = |error: std::io::Error| format!("{LOCK}: {error}");
    let mut options = File::options();
    let mut file = options
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(LOCK)
        .map_err(text)?;
    let mut pid = String::new();
    file.read_to_string(&mut pid).map_err(text)?;
    let mut lock = Flock::lock(file, FlockArg::LockExclusiveNonblock)
        .map_err(|_| format!("another demo runs (process {})", pid.trim()))?;
    lock.rewind().and_then(|()| lock.set_len(0)).map_err(text)?;
    writeln!(lock, "{}", std::process::id()).map_err(text)?;
    if left::clear(crate::bookinfo::WORLD) {
        println!("took away what a demo left that was killed");
    }
    Ok(lock)
}

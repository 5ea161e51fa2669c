//! Limits of the process.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Raises the number of files that may be open to the most that needs no privilege: each connection
/// takes two, and shells allow 1024.
///
/// # Errors
/// The kernel refuses.
pub fn raise_files() -> nix::Result<()> {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)
}

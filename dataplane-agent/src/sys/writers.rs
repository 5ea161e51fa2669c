//! Detection of writers of a file.

use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

use super::regular_file;

/// `F_SETSIG` of `asm-generic/fcntl.h`; the same number on all architectures that we build for.
const F_SETSIG: libc::c_int = 10;

/// Returns `true` if a process of this machine has a file open for writing.
///
/// The kernel grants a read lease only on a file that nobody has open for writing. The lease is given up at
/// once; a process that opens the file for writing meanwhile waits for that, and we get SIGURG, which is ignored
/// by default.
///
/// # Errors
/// The kernel grants no lease: the file is another user's, or its file system has no leases.
pub fn has_writers(path: &Path) -> io::Result<bool> {
    let file = regular_file::open(path)?;
    let set = |command, argument: libc::c_int| {
        // SAFETY: the descriptor is open for as long as `file` lives, and neither command takes a pointer.
        match unsafe { libc::fcntl(file.as_raw_fd(), command, argument) } {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        }
    };
    set(F_SETSIG, libc::SIGURG)?;
    match set(libc::F_SETLEASE, libc::F_RDLCK) {
        // Closing the file, whose descriptor is not shared, ends the lease.
        Ok(()) => Ok(false),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(true),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn who_has_a_file_open_for_writing_is_seen_and_who_reads_it_is_not() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let path = file.path().to_owned();
        assert!(has_writers(&path).expect("our own file"));
        let kept = file.into_temp_path();
        let reader = File::open(&kept).expect("a file");
        assert!(!has_writers(&path).expect("our own file"));
        drop(reader);
        // Many times, to show that no lease is left behind.
        for _ in 0..1000 {
            assert!(!has_writers(&path).expect("our own file"));
        }
        let writer = File::options()
            .append(true)
            .open(&kept)
            .expect("nothing is in its way");
        assert!(has_writers(&path).expect("our own file"));
        drop(writer);
    }
}

//! The process at the other end of a Unix socket.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// The process that connected, or had listened, when the connection was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its process ID; 0 if this process cannot see it, as from another PID namespace.
    pub pid: i32,
    /// Its user ID.
    pub uid: u32,
}

impl Peer {
    /// Returns the peer of a connected Unix socket.
    ///
    /// # Errors
    /// It is no connected Unix socket.
    pub fn of(socket: &impl AsFd) -> io::Result<Self> {
        let mut found = libc::ucred {
            pid: 0,
            uid: 0,
            gid: 0,
        };
        let mut length = size_of::<libc::ucred>() as libc::socklen_t;
        // SAFETY: the descriptor is open; value and length are ours and agree.
        let done = unsafe {
            libc::getsockopt(
                socket.as_fd().as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERCRED,
                (&raw mut found).cast(),
                &raw mut length,
            )
        };
        if done == 0 {
            let libc::ucred { pid, uid, .. } = found;
            Ok(Self { pid, uid })
        } else {
            Err(io::Error::last_os_error())
        }
    }
}

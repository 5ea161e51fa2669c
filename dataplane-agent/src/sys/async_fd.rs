//! Descriptors that the async runtime watches.

use std::io;
use std::net::TcpListener;
use std::os::fd::{AsRawFd, OwnedFd};

use aya::maps::{MapData, RingBuf};
use aya_log::EbpfLogger;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A type that keeps one descriptor, always the same, open as long as it lives.
pub trait Owner: AsRawFd {}

impl Owner for OwnedFd {}
impl Owner for TcpListener {}
impl Owner for RingBuf<MapData> {}
impl<T: log::Log> Owner for EbpfLogger<T> {}

/// Watches a descriptor for readability, on this thread's runtime.
///
/// # Errors
/// The runtime cannot watch it.
pub fn readable<T: Owner>(of: T) -> io::Result<AsyncFd<T>> {
    watch(of, Interest::READABLE)
}

/// Watches a descriptor for urgent data, on this thread's runtime.
///
/// # Errors
/// As for [`readable`].
pub fn urgent<T: Owner>(of: T) -> io::Result<AsyncFd<T>> {
    watch(of, Interest::PRIORITY)
}

fn watch<T: Owner>(of: T, interest: Interest) -> io::Result<AsyncFd<T>> {
    // SAFETY: an `Owner` keeps its one descriptor open until it is dropped, and `AsyncFd` drops it
    // after it has stopped watching.
    let watched = unsafe { AsyncFd::register_with_interest(of, interest) };
    watched.map_err(|error| io::Error::other(error.to_string()))
}

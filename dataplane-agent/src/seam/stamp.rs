//! The stamp on the agent's own sockets in a pod's network namespace: by it the kernel programs know
//! them, and capture what any other socket connects to. It is on the socket alone, so it does not
//! matter which cgroup the agent is in, or who else is in that one.

use std::io;
use std::net::TcpStream;
use std::sync::{Mutex, PoisonError};

use aya::maps::{MapData, SkStorage};

/// Puts stamps; the default, which tests have, puts none.
#[derive(Debug, Default)]
pub struct Stamp(Option<Mutex<SkStorage<MapData, u32>>>);

impl Stamp {
    /// That of the map `AGENT`.
    pub fn new(map: SkStorage<MapData, u32>) -> Self {
        Self(Some(Mutex::new(map)))
    }

    /// Puts it on a socket that is not connected yet.
    ///
    /// # Errors
    /// The kernel refuses: connected all the same, the socket would be captured and come back to the
    /// agent.
    pub fn put(&self, socket: &TcpStream) -> io::Result<()> {
        let Some(map) = &self.0 else {
            return Ok(());
        };
        let mut map = map.lock().unwrap_or_else(PoisonError::into_inner);
        let done = map.insert(socket, 1, 0);
        done.map_err(|error| {
            io::Error::other(format!(
                "kernel map `AGENT`: {:#}",
                anyhow::Error::new(error)
            ))
        })
    }
}

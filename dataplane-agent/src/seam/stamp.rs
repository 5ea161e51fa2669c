//! The stamp on the agent's own sockets in a pod's network namespace: by it the kernel programs know
//! them, and capture what any other socket connects to. It is on the socket alone, so it does not
//! matter which cgroup the agent is in, or who else is in that one.

use std::io;
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use aya::maps::{Map, MapData, SkStorage};

/// Puts stamps; the default, which tests have, puts none.
#[derive(Debug, Default)]
pub struct Stamp(Option<Agent>);

/// The map `AGENT`.
#[derive(Debug)]
struct Agent {
    descriptor: OwnedFd,
    map: Mutex<SkStorage<MapData, u32>>,
}

impl Stamp {
    /// That of the map `AGENT`, which this descriptor is of. To have it is enough: who puts stamps needs no
    /// right to load programs or to look maps up.
    ///
    /// # Errors
    /// It is no such map; there are no descriptors left.
    pub fn of(descriptor: OwnedFd) -> io::Result<Self> {
        let map = MapData::from_fd(descriptor.try_clone()?).map_err(told)?;
        let map = Map::from_map_data(map).and_then(SkStorage::try_from);
        Ok(Self(Some(Agent {
            descriptor,
            map: Mutex::new(map.map_err(told)?),
        })))
    }

    /// What it can be lent by; none if it puts none.
    pub fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.0.as_ref().map(|agent| agent.descriptor.as_fd())
    }

    /// Puts it on a socket that is not connected yet.
    ///
    /// # Errors
    /// The kernel refuses: connected all the same, the socket would be captured and come back to the
    /// agent.
    pub fn put(&self, socket: &TcpStream) -> io::Result<()> {
        let Some(agent) = &self.0 else {
            return Ok(());
        };
        let mut map = agent.map.lock().unwrap_or_else(PoisonError::into_inner);
        map.insert(socket, 1, 0).map_err(told)
    }
}

fn told(error: aya::maps::MapError) -> io::Error {
    io::Error::other(format!(
        "kernel map `AGENT`: {:#}",
        anyhow::Error::new(error)
    ))
}

//! How many connections there may be at once: to and from each pod, and of the node.
//!
//! A connection is one that a pod makes, one that comes to it in clear or as a stream of a tunnel, and
//! a tunnel itself, idle ones included: each takes memory and descriptors. Pods' bounds keep one pod
//! from taking all that the node has; the node's keeps the daemon from being killed for its memory.

pub mod handshakes;

use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

pub use handshakes::{Handshakes, Turn};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// How many connections and tunnels there may be to one pod.
pub const INBOUND: usize = 16_384;
/// How many connections and tunnels there may be from one pod.
pub const OUTBOUND: usize = 16_384;

/// What is reckoned for a connection. An idle one takes some 20 KiB and a busy one up to some MiB.
const MEMORY: u64 = 128 << 10;
/// Descriptors of a connection: its two ends.
const DESCRIPTORS: u64 = 2;
/// Descriptors that are for other things: listeners, programs, maps, namespaces.
const OTHERS: u64 = 1024;

/// The node's bound. Clones share it.
#[derive(Clone, Debug)]
pub struct NodePlaces {
    free: Arc<Semaphore>,
    all: usize,
    /// The most that were taken at once, since that was asked for.
    peak: Arc<AtomicUsize>,
}

/// The bounds of one pod.
#[derive(Debug)]
pub struct PodPlaces {
    inbound: Arc<Semaphore>,
    outbound: Arc<Semaphore>,
}

/// The place of a connection or a tunnel; free again when dropped.
#[derive(Debug)]
pub struct Place {
    _pod: OwnedSemaphorePermit,
    _node: OwnedSemaphorePermit,
}

/// Which bound is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Full {
    /// Of connections to the pod.
    #[error("too many inbound connections of the pod")]
    Inbound,
    /// Of connections from the pod.
    #[error("too many outbound connections of the pod")]
    Outbound,
    /// Of all connections of the node.
    #[error("too many connections of the node")]
    Node,
}

impl Full {
    /// The stable word for it.
    pub fn reason(self) -> &'static str {
        match self {
            Self::Inbound => "too_many_inbound_connections",
            Self::Outbound => "too_many_outbound_connections",
            Self::Node => "too_many_connections_of_node",
        }
    }
}

impl NodePlaces {
    /// Of so many places.
    pub fn new(all: usize) -> Self {
        Self {
            free: Arc::new(Semaphore::new(all)),
            all,
            peak: Arc::default(),
        }
    }

    /// As many as fit into half of the `memory`, or as are `wanted`, and never more than there are
    /// descriptors for.
    pub fn fitting(wanted: Option<usize>, memory: u64, descriptors: u64) -> Self {
        // Where there are few, most are for connections still.
        let others = OTHERS.min(descriptors / 4);
        let fit = |number: u64| usize::try_from(number).unwrap_or(usize::MAX);
        let by_descriptors = fit((descriptors - others) / DESCRIPTORS);
        let by_memory = wanted.unwrap_or_else(|| fit(memory / 2 / MEMORY));
        Self::new(
            by_memory
                .min(by_descriptors)
                .clamp(1, Semaphore::MAX_PERMITS),
        )
    }

    /// How many there may be.
    pub fn all(&self) -> usize {
        self.all
    }

    /// How many there are.
    pub fn taken(&self) -> usize {
        self.all - self.free.available_permits()
    }

    /// The most that there have been at once since this was asked before.
    pub fn peak(&self) -> usize {
        self.peak.swap(self.taken(), Ordering::Relaxed)
    }

    /// A place for what comes to a pod.
    ///
    /// # Errors
    /// There is none left, of the pod or of the node.
    pub fn inbound(&self, pod: &PodPlaces) -> Result<Place, Full> {
        self.take(&pod.inbound, Full::Inbound)
    }

    /// A place for what a pod opens.
    ///
    /// # Errors
    /// As [`NodePlaces::inbound`].
    pub fn outbound(&self, pod: &PodPlaces) -> Result<Place, Full> {
        self.take(&pod.outbound, Full::Outbound)
    }

    fn take(&self, pod: &Arc<Semaphore>, full: Full) -> Result<Place, Full> {
        let of = |semaphore: &Arc<Semaphore>| Arc::clone(semaphore).try_acquire_owned();
        let place = Place {
            _pod: of(pod).map_err(|_| full)?,
            _node: of(&self.free).map_err(|_| Full::Node)?,
        };
        self.peak.fetch_max(self.taken(), Ordering::Relaxed);
        Ok(place)
    }
}

impl PodPlaces {
    /// Of so many places.
    pub fn new(inbound: usize, outbound: usize) -> Self {
        Self {
            inbound: Arc::new(Semaphore::new(inbound)),
            outbound: Arc::new(Semaphore::new(outbound)),
        }
    }
}

impl Default for PodPlaces {
    fn default() -> Self {
        Self::new(INBOUND, OUTBOUND)
    }
}

/// Whose an address is: of IPv6 the network of 64 bits, all of which one host can have.
pub fn source(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(v4) => v4.into(),
        IpAddr::V6(v6) => Ipv6Addr::from(u128::from(v6) & !u128::from(u64::MAX)).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_addresses_of_one_network_are_one_source() {
        let of = |text: &str| source(text.parse().expect("an address"));
        assert_eq!(of("fd00::1:2:3:4"), of("fd00::5"));
        assert_ne!(of("fd00:0:0:1::1"), of("fd00::1"));
        assert_ne!(of("192.0.2.1"), of("192.0.2.2"));
        assert_eq!(of("::ffff:192.0.2.1"), of("192.0.2.1"));
    }

    #[test]
    fn each_bound_holds_has_its_own_word_and_leaves_the_others_their_places() {
        let node = NodePlaces::new(4);
        let (one, other) = (PodPlaces::new(2, 1), PodPlaces::new(16, 16));
        let first = [node.inbound(&one), node.inbound(&one)];
        assert!(first.iter().all(Result::is_ok));
        assert_eq!(node.inbound(&one).expect_err("full"), Full::Inbound);
        let out = node.outbound(&one).expect("its own bound");
        assert_eq!(node.outbound(&one).expect_err("full"), Full::Outbound);
        let last = node.inbound(&other).expect("another pod's");
        assert_eq!(node.inbound(&other).expect_err("full"), Full::Node);
        assert_eq!(node.taken(), 4);
        drop((first, out));
        assert_eq!(node.taken(), 1);
        assert_eq!((node.peak(), node.peak()), (4, 1));
        // What the node refused has not kept the pod's place.
        let more: Vec<_> = (0..3).map(|_| node.inbound(&other)).collect();
        assert!(more.iter().all(Result::is_ok));
        drop((last, more));
        assert_eq!(node.taken(), 0);
        assert_eq!(other.inbound.available_permits(), 16);
    }

    #[test]
    fn the_nodes_bound_fits_its_memory_and_its_descriptors() {
        let all =
            |wanted, memory, descriptors| NodePlaces::fitting(wanted, memory, descriptors).all();
        assert_eq!(all(None, 8 << 30, 1 << 20), 32_768);
        assert_eq!(all(None, 64 << 30, 4096), 1536);
        assert_eq!(all(Some(100), 8 << 30, 1 << 20), 100);
        assert_eq!(all(Some(100_000), 8 << 30, 4096), 1536);
        assert_eq!(all(None, 0, 0), 1);
        assert!(all(None, u64::MAX, u64::MAX) > 1 << 20);
    }
}

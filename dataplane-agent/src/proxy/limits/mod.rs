//! Bounds on the connections that are open at once: to and from each pod, and of the node.
//!
//! A connection is one that a pod makes, one that comes to it in clear or as a stream of a tunnel, and a tunnel
//! itself, idle ones included: each takes memory and descriptors. The node's bound keeps the daemon from being killed
//! for its memory. Nobody can take all of it: a pod's connections of one kind are never more than the places left for
//! all others, so one greedy pod gets half, two get a third each, and a pod that has nothing yet gets in. The
//! [`memory`] that busy connections need is shared in the same way, and so are the places of one pod among its
//! [`peers`], though a peer may have several times what it leaves.

pub mod handshakes;
mod idle;
pub mod memory;
pub mod peers;

use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

pub use handshakes::{Handshakes, Turns};
pub use idle::{Idle, IdleTunnels};
use memory::{Memory, PodMemory, Share};
pub use peers::Peer;
use peers::Peers;

use crate::mesh::Identity;

/// Most connections of one pod and one kind.
pub const MAX_PER_KIND: usize = 16_384;

/// A peer may have at most this many times as many connections as are left to its pod for other peers. A single peer
/// gets seven eighths of what the pod may have.
const MAX_PEER_RATIO: usize = 7;

/// Bytes that are planned for one connection: an idle one takes some 20 KiB, and each may always hold up to 48 KiB to
/// be sent and 64 KiB received by a tunnel. What busy ones hold beyond that has its own bound ([`memory`]).
const MEMORY: u64 = 128 << 10;
/// The descriptors of one connection: its two ends.
const DESCRIPTORS: u64 = 2;
/// The descriptors of one pod, in a process that is both halves of the agent: it takes 19.
const POD_DESCRIPTORS: u64 = 20;
/// Least bytes for what waits to be sent, and for what is not delivered, however little memory there is.
const MIN_BUFFERED: u64 = 64 << 20;
/// Descriptors that are kept for other things: the node's programs and maps, files, and pods that are about to come.
const RESERVED_FILES: u64 = 1024;

/// The places for connections of the node. Clones share them.
#[derive(Clone, Debug)]
pub struct NodePlaces {
    taken: Arc<AtomicUsize>,
    /// The number of places. It may become less than what is taken.
    all: Arc<AtomicUsize>,
    /// What it is at most, and why.
    bounds: Bounds,
    /// `true` once a shortage of descriptors was logged.
    told: Arc<AtomicBool>,
    /// The most places taken at once since [`Self::peak`] was last called.
    peak: Arc<AtomicUsize>,
    handshakes: Handshakes,
    /// Bytes that wait to be sent.
    unsent: Memory,
    /// Bytes that were received by tunnels and are not delivered.
    undelivered: Memory,
}

/// What the number of places follows from.
#[derive(Clone, Copy, Debug)]
struct Bounds {
    /// The number that is asked for, or fits into the memory.
    most: usize,
    /// `true` if it is asked for.
    wanted: bool,
    /// How many descriptors the process may have.
    descriptors: u64,
}

impl Bounds {
    /// Returns the number of places beside this many pods.
    fn places(&self, pods: usize) -> usize {
        // With few descriptors, at most a quarter is kept for other things.
        let others = RESERVED_FILES.min(self.descriptors / 4);
        let of_pods = POD_DESCRIPTORS.saturating_mul(pods.try_into().unwrap_or(u64::MAX));
        let left = self
            .descriptors
            .saturating_sub(others.saturating_add(of_pods));
        self.most.min(fit(left / DESCRIPTORS)).max(1)
    }

    /// Returns what is short beside this many pods: there are fewer places than are asked for, or pods take more than
    /// half of them.
    fn shortage(&self, pods: usize) -> Option<String> {
        let (all, descriptors) = (self.places(pods), self.descriptors);
        let short = (self.wanted && all < self.most) || all < self.places(0) / 2;
        let asked = match self.wanted {
            true => format!(" of the {} asked for", self.most),
            false => String::new(),
        };
        short.then(|| {
            format!(
                "there is room for {all} connections{asked}: the process may have {descriptors} open files, and \
                 {pods} pods take {POD_DESCRIPTORS} each, a connection {DESCRIPTORS}; raise the limit (LimitNOFILE=, \
                 ulimit -n)"
            )
        })
    }
}

/// Returns the number, or the nearest one that there is.
fn fit(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

/// The connections of a pod that have a bound together, by who can open them: one party's cannot keep out
/// another's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Connections that the pod opens, and the tunnels for them.
    Outbound,
    /// Connections to it in clear, from anybody.
    InClear,
    /// Tunnels to it and their streams, from authenticated peers.
    Tunnelled,
}

/// The places and the memory that one pod's connections have taken, by kind.
#[derive(Debug, Default)]
pub struct PodPlaces {
    taken: [Arc<AtomicUsize>; 3],
    /// The idle tunnels that it has opened.
    pub idle: IdleTunnels,
    peers: Peers,
    unsent: PodMemory,
    undelivered: PodMemory,
}

/// The place of a connection or a tunnel; free again when dropped.
#[derive(Debug)]
pub struct Place {
    of_pod: Arc<AtomicUsize>,
    of_peer: Option<Peer>,
    of_node: Arc<AtomicUsize>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.of_node.fetch_sub(1, Ordering::Relaxed);
        self.of_pod.fetch_sub(1, Ordering::Relaxed);
        if let Some(peer) = &self.of_peer {
            peer.count().fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl PodPlaces {
    /// Returns the peer that connects to the pod from this address. A peer with an identity uses tunnels.
    pub fn peer(&self, identity: Option<&Identity>, address: IpAddr) -> Peer {
        self.peers.of(identity, address)
    }
}

/// The bound that is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Full {
    /// The pod's bound for inbound connections.
    #[error("too many inbound connections of the pod")]
    Inbound,
    /// The pod's bound for outbound connections.
    #[error("too many outbound connections of the pod")]
    Outbound,
    /// A peer's bound: it has many connections to the pod, and few are left for others.
    #[error("too many connections of the peer")]
    Peer,
    /// The node's bound: the pod already has as many connections as are left.
    #[error("too many connections of the node")]
    Node,
}

impl Full {
    /// The stable word for it.
    pub fn reason(self) -> &'static str {
        match self {
            Self::Inbound => "too_many_inbound_connections",
            Self::Outbound => "too_many_outbound_connections",
            Self::Peer => "too_many_connections_of_peer",
            Self::Node => "too_many_connections_of_node",
        }
    }
}

impl NodePlaces {
    /// Returns `all` places, with default bounds of memory.
    pub fn new(all: usize) -> Self {
        Self::within(Bounds {
            most: all,
            wanted: false,
            descriptors: u64::MAX,
        })
    }

    fn within(bounds: Bounds) -> Self {
        Self {
            taken: Arc::default(),
            all: Arc::new(AtomicUsize::new(bounds.places(0))),
            bounds,
            told: Arc::default(),
            peak: Arc::default(),
            handshakes: Handshakes::new(handshakes::OF_NODE),
            unsent: Memory::default(),
            undelivered: Memory::default(),
        }
    }

    /// Sets the bounds, in bytes, of what waits to be sent and of what is not delivered.
    #[must_use]
    pub fn with_memory(self, unsent: u64, undelivered: u64) -> Self {
        Self {
            unsent: Memory::new(unsent),
            undelivered: Memory::new(undelivered),
            ..self
        }
    }

    /// Returns as many places as are `wanted`, or as fit into half of the `memory` (in bytes), and never more than
    /// there are descriptors for, see [`Self::leave_room`]. Another eighth of the memory is for what waits to be sent, and a quarter for what is
    /// not delivered.
    pub fn fitting(wanted: Option<usize>, memory: u64, descriptors: u64) -> Self {
        Self::within(Bounds {
            most: wanted.unwrap_or_else(|| fit(memory / 2 / MEMORY)),
            wanted: wanted.is_some(),
            descriptors,
        })
        .with_memory(
            (memory / 8).max(MIN_BUFFERED),
            (memory / 4).max(MIN_BUFFERED),
        )
    }

    /// Leaves room for the descriptors of this many pods: there are fewer places while there are more pods. Logs once
    /// if descriptors are short.
    pub fn leave_room(&self, pods: usize) {
        self.all.store(self.bounds.places(pods), Ordering::Relaxed);
        if let Some(shortage) = self.bounds.shortage(pods)
            && !self.told.swap(true, Ordering::Relaxed)
        {
            tracing::warn!("{shortage}");
        }
    }

    /// Returns the pod's share of the memory for bytes that wait to be sent.
    pub fn unsent(&self, pod: &PodPlaces) -> Share {
        self.unsent.share(&pod.unsent)
    }

    /// Returns the pod's share of the memory for bytes that tunnels have received and that are not delivered.
    pub fn undelivered(&self, pod: &PodPlaces) -> Share {
        self.undelivered.share(&pod.undelivered)
    }

    /// Returns the bytes that wait to be sent, and those that are not delivered, of all pods, without what each
    /// connection may always hold.
    pub fn held(&self) -> (usize, usize) {
        (self.unsent.held(), self.undelivered.held())
    }

    /// Returns the number of places.
    pub fn all(&self) -> usize {
        self.all.load(Ordering::Relaxed)
    }

    /// Returns the number of places taken.
    pub fn taken(&self) -> usize {
        self.taken.load(Ordering::Relaxed)
    }

    /// Returns the most places taken at once since the last call.
    pub fn peak(&self) -> usize {
        self.peak.swap(self.taken(), Ordering::Relaxed)
    }

    /// Takes a place for one more handshake with a pod. If there are too many, another handshake gives way.
    pub fn begin(&self, of_pod: &Handshakes, peer: IpAddr) -> Turns {
        Turns {
            of_pod: of_pod.begin(peer),
            of_node: self.handshakes.begin(peer),
        }
    }

    /// Takes a place for one more connection from a pod, or for a tunnel that it opens.
    ///
    /// # Errors
    /// The pod's bound is reached, or the node has no place left for this pod.
    pub fn take(&self, pod: &PodPlaces) -> Result<Place, Full> {
        self.take_of(pod, Kind::Outbound, None)
    }

    /// Takes a place for one more connection of a peer to a pod, or for a tunnel of the peer.
    ///
    /// # Errors
    /// It fails as [`Self::take`] does, or the places that are left to the pod are kept for other peers.
    pub fn take_for(&self, pod: &PodPlaces, peer: &Peer) -> Result<Place, Full> {
        let kind = if peer.is_known() {
            Kind::Tunnelled
        } else {
            Kind::InClear
        };
        self.take_of(pod, kind, Some(peer))
    }

    fn take_of(&self, pod: &PodPlaces, kind: Kind, peer: Option<&Peer>) -> Result<Place, Full> {
        let all = self.all();
        let more = |taken: usize| (taken < all).then_some(taken + 1);
        let taken = &self.taken;
        let before = taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
        let left = all - before.map_err(|_| Full::Node)?;
        let of_pod = Arc::clone(&pod.taken[kind as usize]);
        let has = of_pod.fetch_add(1, Ordering::Relaxed);
        let of_peer = peer.map(|peer| peer.count().fetch_add(1, Ordering::Relaxed));
        let place = Place {
            of_pod,
            of_peer: peer.cloned(),
            of_node: Arc::clone(taken),
        };
        if has >= MAX_PER_KIND {
            return Err(match kind {
                Kind::Outbound => Full::Outbound,
                Kind::InClear | Kind::Tunnelled => Full::Inbound,
            });
        }
        if has >= left {
            return Err(Full::Node);
        }
        // Each place that the pod takes also leaves the node one less.
        let others = (MAX_PER_KIND - has).min((left - has).div_ceil(2)) - 1;
        if of_peer.is_some_and(|has| has > 0 && has >= MAX_PEER_RATIO * others) {
            return Err(Full::Peer);
        }
        self.peak.fetch_max(self.taken(), Ordering::Relaxed);
        Ok(place)
    }
}

/// Returns the source that an address counts for. For IPv6 that is its /64 network, all of which one host can have.
pub fn source(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(v4) => v4.into(),
        IpAddr::V6(v6) => Ipv6Addr::from(u128::from(v6) & !u128::from(u64::MAX)).into(),
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[test]
    fn the_addresses_of_one_network_are_one_source() {
        let of = |text: &str| source(text.parse().expect("an address"));
        assert_eq!(of("fd00::1:2:3:4"), of("fd00::5"));
        assert_ne!(of("fd00:0:0:1::1"), of("fd00::1"));
        assert_ne!(of("192.0.2.1"), of("192.0.2.2"));
        assert_eq!(of("::ffff:192.0.2.1"), of("192.0.2.1"));
    }

    /// Takes places until none is given, at most `most`.
    fn fill(node: &NodePlaces, pod: &PodPlaces, peer: Option<&Peer>, most: usize) -> Vec<Place> {
        let one = || match peer {
            Some(peer) => node.take_for(pod, peer),
            None => node.take(pod),
        };
        (0..most).map_while(|_| one().ok()).collect()
    }

    fn peers(pod: &PodPlaces, tunnelled: bool) -> impl Iterator<Item = Peer> {
        let who = tunnelled.then(|| Identity::new("td", "ns", "peer"));
        (1_u32..).map(move |address| pod.peer(who.as_ref(), Ipv4Addr::from(address).into()))
    }

    #[test]
    fn each_bound_holds_and_has_its_own_word() {
        let node = NodePlaces::new(10 * MAX_PER_KIND);
        let pod = PodPlaces::default();
        let places = fill(&node, &pod, None, usize::MAX);
        assert_eq!(places.len(), MAX_PER_KIND);
        assert_eq!(node.take(&pod).expect_err("full"), Full::Outbound);
        assert_eq!(
            node.taken(),
            MAX_PER_KIND,
            "what was refused keeps no place"
        );
        drop(places);
        for tunnelled in [false, true] {
            let mut peers = peers(&pod, tunnelled);
            let places = peers
                .by_ref()
                .take(MAX_PER_KIND)
                .map(|peer| node.take_for(&pod, &peer));
            let places: Vec<Place> = places.collect::<Result<_, _>>().expect("places");
            let late = peers.next().expect("a peer");
            assert_eq!(node.take_for(&pod, &late).expect_err("full"), Full::Inbound);
            assert_eq!(node.taken(), places.len());
        }
        assert_eq!(
            (node.peak(), node.peak(), node.taken()),
            (MAX_PER_KIND, 0, 0)
        );
    }

    #[test]
    fn a_peer_that_takes_all_it_can_keeps_no_other_out() {
        for tunnelled in [false, true] {
            for all in [10 * MAX_PER_KIND, 120] {
                let node = NodePlaces::new(all);
                let pod = PodPlaces::default();
                let mut peers = peers(&pod, tunnelled);
                let (greedy, second) = (peers.next().expect("one"), peers.next().expect("one"));
                let first = fill(&node, &pod, Some(&greedy), usize::MAX);
                assert_eq!(first.len(), MAX_PER_KIND.min(all / 2) * 7 / 8);
                assert_eq!(node.take_for(&pod, &greedy).expect_err("full"), Full::Peer);
                let others = fill(&node, &pod, Some(&second), usize::MAX);
                assert!(others.len() >= first.len() / 8);
                assert!(node.take_for(&pod, &peers.next().expect("one")).is_ok());
                drop(others);
                assert!(
                    node.take_for(&pod, &greedy).is_err(),
                    "nothing of its own is free"
                );
                drop(first);
                assert!(node.take_for(&pod, &greedy).is_ok());
                assert_eq!(node.taken(), 0);
            }
        }
    }

    #[test]
    fn however_greedy_some_are_whoever_has_nothing_yet_gets_in() {
        let node = NodePlaces::new(120);
        let pods: [PodPlaces; 4] = Default::default();
        let first = fill(&node, &pods[0], None, usize::MAX);
        assert_eq!(first.len(), 60);
        assert_eq!(node.take(&pods[0]).expect_err("full"), Full::Node);
        let peer = peers(&pods[0], true).next();
        let to_it = fill(&node, &pods[0], peer.as_ref(), 5);
        assert_eq!(to_it.len(), 5, "peers of the same pod");
        let others: Vec<_> = pods[1..]
            .iter()
            .map(|pod| fill(&node, pod, None, usize::MAX))
            .collect();
        assert!(others.iter().all(|places| places.len() >= 5), "{others:?}");
        let late = PodPlaces::default();
        let peer = peers(&late, true).next().expect("one");
        assert!(node.take_for(&late, &peer).is_ok());
        drop((first, to_it, others));
        assert_eq!(node.taken(), 0);
    }

    #[test]
    fn handshakes_with_many_pods_have_a_bound_together() {
        use futures_util::FutureExt;
        let node = NodePlaces::new(1);
        let peer = |last: u8| IpAddr::from([192, 0, 2, last]);
        let over = |turns: &mut Turns| turns.over().now_or_never().is_some();
        let mut known = node.begin(&Handshakes::default(), peer(1));
        let mut silent: Vec<Turns> = (0..handshakes::OF_NODE + 100)
            .map(|_| node.begin(&Handshakes::default(), peer(2)))
            .collect();
        let ended = silent
            .iter_mut()
            .filter_map(|turns| over(turns).then_some(()));
        assert_eq!(ended.count(), 101);
        assert!(!over(&mut known));
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

    #[test]
    fn pods_that_come_leave_less_room_for_connections_and_give_it_back() {
        let node = NodePlaces::fitting(None, 64 << 30, 4096);
        let pod = PodPlaces::default();
        let mut places = fill(&node, &pod, None, usize::MAX);
        assert_eq!(places.len(), 768);
        node.leave_room(100);
        assert_eq!(node.all(), 536);
        assert_eq!(node.taken(), 768, "what runs goes on");
        assert_eq!(
            node.take(&PodPlaces::default()).expect_err("full"),
            Full::Node
        );
        places.truncate(535);
        let last = node.take(&PodPlaces::default()).expect("there is one left");
        assert_eq!(
            node.take(&PodPlaces::default()).expect_err("full"),
            Full::Node
        );
        drop(last);
        node.leave_room(10_000);
        assert_eq!(node.all(), 1);
        node.leave_room(0);
        assert_eq!(node.all(), 1536);
        // Memory has less room anyway.
        let node = NodePlaces::fitting(Some(100), 8 << 30, 1 << 20);
        node.leave_room(500);
        assert_eq!(node.all(), 100);
    }

    #[test]
    fn a_shortage_of_descriptors_is_told_with_its_numbers() {
        let shortage = |wanted: Option<usize>, pods| {
            NodePlaces::fitting(wanted, 64 << 30, 4096)
                .bounds
                .shortage(pods)
        };
        assert_eq!(shortage(None, 0), None);
        assert_eq!(shortage(None, 70), None);
        let told = shortage(None, 100).expect("pods take two thirds");
        assert!(
            told.starts_with("there is room for 536 connections: the process may have 4096 open files, and 100 pods take 20 each"),
            "{told}"
        );
        assert_eq!(shortage(Some(1000), 50), None);
        let told = shortage(Some(1000), 60).expect("it is less than asked for");
        assert!(
            told.starts_with("there is room for 936 connections of the 1000 asked for"),
            "{told}"
        );
    }
}

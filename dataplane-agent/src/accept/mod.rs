//! Room 2: takes connections.

use std::net::SocketAddr;
use std::sync::Arc;

pub use crate::capture::LocalPod;
use crate::identity::Identity;

/// One connection of one enrolled pod, or one CONNECT stream to it: TLS finished, peer verified.
#[derive(Debug)]
pub struct Accepted<I> {
    /// The bytes.
    pub io: I,
    /// The pod that it is of.
    pub pod: Arc<LocalPod>,
    /// The other end of the TCP connection that was accepted: the pod itself for outbound.
    pub peer: SocketAddr,
    /// Outbound: where the pod connects to. Inbound: the pod's own address and port.
    pub destination: SocketAddr,
    /// Which way, and how it came.
    pub direction: Direction,
}

/// Which way a connection goes, and how it came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the pod.
    Outbound,
    /// To the pod, in clear.
    InboundPlain,
    /// To the pod, in HBONE, from a peer of verified identity.
    InboundHbone {
        /// The peer's identity, from its certificate.
        identity: Identity,
        /// `host=` of the request's `forwarded` header: the service that the peer asked for.
        service: Option<Arc<str>>,
    },
}

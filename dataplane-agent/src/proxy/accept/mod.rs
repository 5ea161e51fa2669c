//! Room 2: takes connections.
//!
//! Door out: an [`Accepted`]. A TCP connection makes one; a tunnel makes one for each CONNECT stream.

pub mod hbone;
pub mod listener;
pub mod pod;
mod ports;

use std::mem::MaybeUninit;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use http::StatusCode;
use tokio::io::Interest;
use tokio::net::TcpStream;

pub use self::pod::{Clients, LocalPod};
use crate::mesh::Identity;
use crate::proxy::hbone::stream::Waiting;
pub use crate::seam::Instance;

/// One connection of one enrolled pod, or one CONNECT stream to it: TLS finished, peer verified.
#[derive(Debug)]
pub struct Accepted<I> {
    /// The byte stream.
    pub io: I,
    /// The local pod at one end of it.
    pub pod: Arc<LocalPod>,
    /// The other end of the TCP connection that was accepted; for an outbound one that is the pod itself.
    pub peer: SocketAddr,
    /// Outbound: the address and port that the pod connects to. Inbound: the pod's own.
    pub destination: SocketAddr,
    /// The direction and the protocol.
    pub direction: Direction,
}

/// The direction of a connection as its pod sees it, and how it was accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the pod.
    Outbound,
    /// To the pod, in clear.
    InboundPlain,
    /// To the pod, in HBONE, from a peer of verified identity.
    InboundHbone {
        /// The address that the tunnel came to.
        at: IpAddr,
        /// The peer's identity, from its certificate.
        identity: Identity,
        /// `host=` of the request's `forwarded` header: the service that the peer asked for.
        service: Option<Arc<str>>,
    },
}

/// The byte stream of an accepted connection.
#[derive(Debug)]
pub enum Io {
    /// A TCP connection of which nothing was read.
    Tcp(TcpStream),
    /// A CONNECT stream whose answer is not sent yet.
    Stream(Waiting),
}

impl Io {
    /// Completes when the client has reset it before it was connected, and no unread bytes are left.
    pub async fn gone(&mut self) {
        match self {
            Self::Tcp(tcp) => {
                // An error means that there is no runtime any more.
                let _ = tcp.ready(Interest::ERROR).await;
                let left = socket2::SockRef::from(&*tcp).peek(&mut [MaybeUninit::uninit()]);
                if left.is_ok_and(|bytes| bytes > 0) {
                    // The relay will meet the reset after it has read these bytes, once it is connected.
                    std::future::pending::<()>().await;
                }
            }
            Self::Stream(waiting) => waiting.gone().await,
        }
    }

    /// Ends it before anything was carried: answers a stream with `status`, and resets a TCP connection. That one is
    /// not closed in order, since the client must not take it for an answer.
    pub fn refuse(self, status: StatusCode) {
        match self {
            // Dropping the socket resets it: its linger time is zero.
            Self::Tcp(_) => {}
            Self::Stream(waiting) => waiting.refuse(status),
        }
    }
}

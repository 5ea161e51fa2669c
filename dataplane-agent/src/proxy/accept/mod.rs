//! Room 2: takes connections.
//!
//! Door out: an [`Accepted`]. A TCP connection is one; a tunnel is as many as it has CONNECT
//! streams.

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
        /// The address that the tunnel came to.
        at: IpAddr,
        /// The peer's identity, from its certificate.
        identity: Identity,
        /// `host=` of the request's `forwarded` header: the service that the peer asked for.
        service: Option<Arc<str>>,
    },
}

/// What an accepted connection's bytes come and go by.
#[derive(Debug)]
pub enum Io {
    /// A TCP connection of which nothing was read.
    Tcp(TcpStream),
    /// A stream of a tunnel, which waits for its answer.
    Stream(Waiting),
}

impl Io {
    /// Completes when the client has reset it before it was connected, and has left nothing to deliver.
    pub async fn gone(&mut self) {
        match self {
            Self::Tcp(tcp) => {
                // An error means that there is no runtime any more.
                let _ = tcp.ready(Interest::ERROR).await;
                let left = socket2::SockRef::from(&*tcp).peek(&mut [MaybeUninit::uninit()]);
                if left.is_ok_and(|bytes| bytes > 0) {
                    // Connected, it breaks where that was read.
                    std::future::pending::<()>().await;
                }
            }
            Self::Stream(waiting) => waiting.gone().await,
        }
    }

    /// Ends it without having carried anything: a stream is told why, a TCP connection is reset. A
    /// reset, and not an end of file: the client must not take it for an answer.
    pub fn refuse(self, status: StatusCode) {
        match self {
            // Dropping it resets it, as it was made.
            Self::Tcp(_) => {}
            Self::Stream(waiting) => waiting.refuse(status),
        }
    }
}

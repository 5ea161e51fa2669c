//! Room 5: moves bytes. [`carry()`] takes only connections with a `Permit`.

pub mod carry;
pub mod connector;
mod ends;
pub mod hbone;
pub mod plain;
pub mod pool;
pub mod relay;

#[cfg(test)]
mod tests;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::SystemTime;

use futures_util::future::LocalBoxFuture;

pub use carry::{Carried, Carrier, carry};
pub use pool::Pool;

use crate::mesh::Identity;
use crate::observe::{Failure, Flag};
use crate::proxy::authorize::LocalPod;
use crate::proxy::limits::memory::Share;
use crate::proxy::limits::{Full, Place};

/// The means that transport needs of others: connections from a pod's network namespace, TLS in its name, and places.
pub trait Connector {
    /// Connects from the pod, from the address `from` or, without one, from the address that the pod's routes choose.
    fn connect<'a>(
        &'a self,
        pod: &'a LocalPod,
        from: Option<IpAddr>,
        to: SocketAddr,
    ) -> LocalBoxFuture<'a, io::Result<tokio::net::TcpStream>>;
    /// Connects to the pod's app, as the client at `from`.
    fn connect_as<'a>(
        &'a self,
        pod: &'a LocalPod,
        from: IpAddr,
        to: SocketAddr,
    ) -> LocalBoxFuture<'a, io::Result<tokio::net::TcpStream>>;
    /// Returns the pod's TLS settings as a client of any of `expected`, and when its certificate expires. An error is
    /// a text.
    fn client_tls<'a>(
        &'a self,
        pod: &'a LocalPod,
        expected: &'a [Identity],
    ) -> LocalBoxFuture<'a, Result<(Arc<rustls::ClientConfig>, SystemTime), String>>;
    /// Takes a place for one more tunnel of the pod.
    ///
    /// # Errors
    /// A bound of connections is reached.
    fn place(&self, pod: &LocalPod) -> Result<Place, Full>;
    /// Returns the pod's share of the memory for bytes that wait to be sent.
    fn unsent(&self, pod: &LocalPod) -> Share;
    /// Returns the pod's share of the memory for bytes that tunnels have received and that are not delivered.
    fn undelivered(&self, pod: &LocalPod) -> Share;
}

/// Why a connection was not carried to its end. All that waited for the same tunnel get a clone.
#[derive(Clone, Debug, thiserror::Error)]
pub enum TransportError {
    /// The next hop refuses or cannot be reached.
    #[error("connection failed: {0}")]
    Connect(Arc<io::Error>),
    /// Nothing answered on a peer's tunnel port.
    #[error("connection timed out, maybe a NetworkPolicy is blocking HBONE port 15008: {0}")]
    Blocked(Arc<io::Error>),
    /// The TLS handshake failed, or the peer's identity is not one of those expected.
    #[error("tls error: tls handshake error: {0:?}")]
    Tls(Arc<io::Error>),
    /// There is no certificate to connect with.
    #[error("identity error: {0}")]
    Identity(Arc<str>),
    /// The HTTP/2 handshake failed.
    #[error("http2 handshake failed: {0}")]
    Handshake(Arc<str>),
    /// The tunnel failed later.
    #[error("h2 failed: {0}")]
    H2(Arc<h2::Error>),
    /// The peer answered with a status other than 200.
    #[error("http status: {0}")]
    Status(http::StatusCode),
    /// An end broke, other than by a reset from its peer.
    #[error(transparent)]
    Relay(Arc<relay::RelayError>),
    /// A bound of connections is reached, so there is no place for a tunnel.
    #[error(transparent)]
    Full(#[from] Full),
    /// Policy no longer allows the connection.
    #[error("connection closed due to policy change")]
    Revoked,
}

impl Failure for TransportError {
    fn flag(&self) -> Flag {
        match self {
            Self::Connect(_) | Self::Status(_) | Self::Relay(_) | Self::Full(_) => Flag::Connect,
            Self::Blocked(_) => Flag::NetworkPolicy,
            Self::Tls(_) => Flag::TlsFailure,
            Self::Identity(_) => Flag::IdentityError,
            Self::Handshake(_) | Self::H2(_) => Flag::H2HandshakeFailure,
            Self::Revoked => Flag::Deny,
        }
    }
    fn reason(&self) -> &'static str {
        match self {
            Self::Connect(_) => "connect",
            Self::Blocked(_) => "blocked",
            Self::Tls(_) => "tls",
            Self::Identity(_) => "identity",
            Self::Handshake(_) => "handshake",
            Self::H2(_) => "h2",
            Self::Status(_) => "status",
            Self::Relay(_) => "relay",
            Self::Full(full) => full.reason(),
            Self::Revoked => "revoked",
        }
    }
    fn status(&self) -> http::StatusCode {
        match self {
            Self::Revoked => http::StatusCode::UNAUTHORIZED,
            _ => http::StatusCode::SERVICE_UNAVAILABLE,
        }
    }
}

//! Observability: one access-log line and one count for each connection, the log, metrics and the admin
//! socket.
//!
//! Names, fields and values are ztunnel's, so that tools that read ztunnel's output read ours too.

pub mod admin;
pub mod ask;
pub mod dump;
pub mod kernel;
pub mod labels;
pub mod levels;
pub mod log;
pub mod log_limit;
pub mod metrics;
pub mod record;
pub mod series;
pub mod status;
mod status_gauges;
pub mod writer;

use http::StatusCode;

pub use metrics::Metrics;
pub use record::{AccessRecord, Arrival, Bytes, ConnectionInfo, Observer, Reporter};

/// Why a connection failed, for the log and the metrics.
pub trait Failure: std::fmt::Display {
    /// Returns its flag in `response_flags`.
    fn flag(&self) -> Flag;
    /// Returns its stable name, which is `reason` in the log and in the metrics.
    fn reason(&self) -> &'static str;
    /// Returns the HTTP status for a peer that requested the connection by CONNECT.
    fn status(&self) -> StatusCode {
        StatusCode::SERVICE_UNAVAILABLE
    }
}

/// A kind of failure; `response_flags` of the metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Flag {
    /// Policy refused it.
    Deny,
    /// The next hop could not be reached, or any other failure.
    Connect,
    /// The TLS handshake failed.
    TlsFailure,
    /// HTTP/2 failed.
    H2HandshakeFailure,
    /// A network policy appears to drop packets to port 15008.
    NetworkPolicy,
    /// There is no certificate.
    IdentityError,
}

impl Flag {
    /// All flags, in the order of their discriminants.
    pub const ALL: [Self; 6] = [
        Self::Deny,
        Self::Connect,
        Self::TlsFailure,
        Self::H2HandshakeFailure,
        Self::NetworkPolicy,
        Self::IdentityError,
    ];

    /// Returns its name in `response_flags`.
    pub fn word(self) -> &'static str {
        match self {
            Self::Deny => "DENY",
            Self::Connect => "CONNECT",
            Self::TlsFailure => "TLS_FAILURE",
            Self::H2HandshakeFailure => "H2_HANDSHAKE_FAILURE",
            Self::NetworkPolicy => "NETWORK_POLICY",
            Self::IdentityError => "IDENTITY_ERROR",
        }
    }
}

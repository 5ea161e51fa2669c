//! The corridor's window: one access-log line and one count for each connection, the log, metrics
//! and the admin socket.
//!
//! Names, fields and words are ztunnel's, so that what reads one reads the other.

pub mod admin;
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
pub mod writer;

use http::StatusCode;

pub use metrics::Metrics;
pub use record::{AccessRecord, Arrival, Bytes, ConnectionInfo, Observer, Reporter};

/// Why a connection failed, for the log and the metrics.
pub trait Failure: std::fmt::Display {
    /// The word in `response_flags`.
    fn flag(&self) -> Flag;
    /// The stable word for it, in the log's field and the metric's label of that name.
    fn reason(&self) -> &'static str;
    /// What a peer is answered that asked for the connection by CONNECT.
    fn status(&self) -> StatusCode {
        StatusCode::SERVICE_UNAVAILABLE
    }
}

/// What kind of failure; `response_flags` of the metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Flag {
    /// Policy refused it.
    Deny,
    /// The next hop could not be reached, or any other failure.
    Connect,
    /// TLS could not be set up.
    TlsFailure,
    /// HTTP/2 failed.
    H2HandshakeFailure,
    /// Something drops what is sent to port 15008.
    NetworkPolicy,
    /// There is no certificate.
    IdentityError,
}

impl Flag {
    /// All of them, in their order.
    pub const ALL: [Self; 6] = [
        Self::Deny,
        Self::Connect,
        Self::TlsFailure,
        Self::H2HandshakeFailure,
        Self::NetworkPolicy,
        Self::IdentityError,
    ];

    /// Its word.
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

//! Room 3: finds who each end of a connection is, and where it goes.
//!
//! Door out: a [`Resolved`], made from one [`Accepted`] and one snapshot of the mesh.

pub mod route;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use http::StatusCode;

use crate::mesh::{Identity, Service, Workload};
use crate::observe::{Failure, Flag};
pub use crate::proxy::accept::{Accepted, Clients, Direction, Instance, Io, LocalPod};
pub use route::resolve;

/// A connection with the workloads at its ends and its next hop.
#[derive(Debug)]
pub struct Resolved<I> {
    /// The connection.
    pub accepted: Accepted<I>,
    /// The workload that connects; `None` if it is not in the mesh. For an inbound connection it is found by address
    /// and only for logs: policy uses the peer's certificate.
    pub source: Option<Arc<Workload>>,
    /// The workload that is connected to; `None` if it is not in the mesh.
    pub target: Option<Arc<Workload>>,
    /// The service that was asked for.
    pub service: Option<Arc<Service>>,
    /// The next hop.
    pub hop: Hop,
}

/// The next hop of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Hop {
    /// The pod's own app.
    App(SocketAddr),
    /// A peer, in clear.
    Plain(SocketAddr),
    /// A peer, through a tunnel.
    Hbone {
        /// The tunnel's other end.
        to: SocketAddr,
        /// The address and port that the CONNECT request asks for.
        authority: SocketAddr,
        /// The workload at the other end.
        target: Arc<Workload>,
        /// The identities of which the other end must have one.
        expected: Vec<Identity>,
    },
}

impl Failure for ResolveError {
    fn flag(&self) -> Flag {
        Flag::Connect
    }
    fn reason(&self) -> &'static str {
        match self {
            Self::UnknownLocal(_) => "unknown_local",
            Self::NoHealthyUpstream(_) => "no_healthy_upstream",
            Self::UnknownWaypoint(_) => "unknown_waypoint",
            Self::NotVisible(_) => "not_visible",
            Self::Unsupported(_) => "unsupported",
            Self::NoAddress(_) => "no_address",
            Self::IpMismatch { .. } => "ip_mismatch",
            Self::SelfCall => "self_call",
        }
    }
    fn status(&self) -> StatusCode {
        match self {
            Self::IpMismatch { .. } => StatusCode::BAD_REQUEST,
            _ => StatusCode::SERVICE_UNAVAILABLE,
        }
    }
}

/// Why a connection has no next hop.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ResolveError {
    /// The pod is not in the mesh (yet).
    #[error("failed to fetch information about local workload: {0}")]
    UnknownLocal(Arc<str>),
    /// The service has no endpoint that takes connections.
    #[error("no healthy upstream: {0}")]
    NoHealthyUpstream(SocketAddr),
    /// The destination requires its waypoint, and waypoints are not supported yet.
    #[error("unknown waypoint: {0}")]
    UnknownWaypoint(Arc<str>),
    /// The service is not visible to the client's namespace.
    #[error("no service for target address: {0}")]
    NotVisible(SocketAddr),
    /// The destination requires something that is not supported yet and has no substitute.
    #[error("unsupported feature: {0}")]
    Unsupported(Arc<str>),
    /// The workload has no address at which it can be reached.
    #[error("no valid routing destination for workload: {0}")]
    NoAddress(Arc<str>),
    /// The peer asks for another address than the pod's.
    #[error("ip mismatch: {pod} != {asked}")]
    IpMismatch {
        /// The address that the peer connected to.
        pod: IpAddr,
        /// The address that it asked for.
        asked: IpAddr,
    },
    /// The connection would come back to the agent.
    #[error("attempted recursive call to ourselves")]
    SelfCall,
}

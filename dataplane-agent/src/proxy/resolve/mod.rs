//! Room 3: who is it, where does it go.
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

/// Who each end is, and where the connection goes next.
#[derive(Debug)]
pub struct Resolved<I> {
    /// The connection.
    pub accepted: Accepted<I>,
    /// Who connects; none if it is in no mesh. Of an inbound connection it is told by the address,
    /// for logs: what counts there is the peer's certificate.
    pub source: Option<Arc<Workload>>,
    /// Who is connected to; none if it is in no mesh.
    pub target: Option<Arc<Workload>>,
    /// The service that was asked for.
    pub service: Option<Arc<Service>>,
    /// The next hop.
    pub hop: Hop,
}

/// Where a connection goes next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Hop {
    /// To the pod's own app.
    App(SocketAddr),
    /// In clear.
    Plain(SocketAddr),
    /// Through a tunnel.
    Hbone {
        /// The tunnel's other end.
        to: SocketAddr,
        /// What it is asked to connect to.
        authority: SocketAddr,
        /// The workload there.
        target: Arc<Workload>,
        /// Any of these it has to be.
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

/// Why a connection goes nowhere.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ResolveError {
    /// The pod is not in the mesh (yet).
    #[error("failed to fetch information about local workload: {0}")]
    UnknownLocal(Arc<str>),
    /// A service has nobody to go to.
    #[error("no healthy upstream: {0}")]
    NoHealthyUpstream(SocketAddr),
    /// The destination wants its waypoint passed, and waypoints cannot be reached yet.
    #[error("unknown waypoint: {0}")]
    UnknownWaypoint(Arc<str>),
    /// A service that clients of other namespaces may not use.
    #[error("no service for target address: {0}")]
    NotVisible(SocketAddr),
    /// The destination wants something that cannot be done yet, and nothing else instead.
    #[error("unsupported feature: {0}")]
    Unsupported(Arc<str>),
    /// A workload that cannot be reached by an address.
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
    /// It would come back to the agent.
    #[error("attempted recursive call to ourselves")]
    SelfCall,
}

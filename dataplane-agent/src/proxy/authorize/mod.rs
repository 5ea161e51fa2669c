//! Room 4: decides whether a connection is allowed.
//!
//! Door out: a [`Permit`], which only this room makes. A connection that leaves a pod is permitted: the node of its
//! destination decides. The policies of a pod decide on connections to it, when they come and again whenever the mesh
//! changes.

pub mod check;
pub mod watch;

use std::sync::Arc;

use http::StatusCode;

use crate::mesh::policy::Question;
use crate::observe::{Failure, Flag};
pub use crate::proxy::resolve::{
    Accepted, Clients, Direction, Hop, Instance, Io, LocalPod, Resolved,
};
pub use watch::{Authorizer, Revoked};

/// A connection that policy allows.
#[derive(Debug)]
#[expect(
    clippy::manual_non_exhaustive,
    reason = "the rest of this crate must not make one either"
)]
pub struct Permit<I> {
    /// The connection.
    pub resolved: Resolved<I>,
    /// The rule that allowed it.
    pub rule: Rule,
    /// Completes when policy no longer allows it.
    pub revoked: Revoked,
    _private: (),
}

/// The rule that allowed a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rule {
    /// The connection leaves the pod; its destination's node decides.
    Destination,
    /// There is no ALLOW policy.
    NoPolicy,
    /// An ALLOW policy matches; this is its key.
    Allowed(Arc<str>),
}

/// Why a connection is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// A DENY policy matches.
    #[error("connection closed due to policy rejection: explicitly denied by: {0}")]
    Denied(Arc<str>),
    /// There are ALLOW policies, and none matches.
    #[error("connection closed due to policy rejection: allow policies exist, but none allowed")]
    NotAllowed,
    /// The pod names a policy that does not exist, so its rules are not known.
    #[error("connection closed due to policy rejection: unknown policy: {0}")]
    UnknownPolicy(Arc<str>),
    /// The pod itself is not in the mesh any more.
    #[error("connection closed due to policy rejection: workload not found")]
    NoWorkload,
}

impl Failure for Denied {
    fn flag(&self) -> Flag {
        Flag::Deny
    }
    fn reason(&self) -> &'static str {
        match self {
            Self::Denied(_) => "denied",
            Self::NotAllowed => "not_allowed",
            Self::UnknownPolicy(_) => "unknown_policy",
            Self::NoWorkload => "no_workload",
        }
    }
    fn status(&self) -> StatusCode {
        StatusCode::UNAUTHORIZED
    }
}

/// Returns the properties of a connection on which policies decide.
fn question<I>(accepted: &Accepted<I>) -> Question<'_> {
    Question {
        source: match &accepted.direction {
            Direction::InboundHbone { identity, .. } => Some(identity),
            Direction::InboundPlain | Direction::Outbound => None,
        },
        source_ip: accepted.peer.ip().to_canonical(),
        destination_ip: accepted.destination.ip().to_canonical(),
        destination_port: accepted.destination.port(),
    }
}

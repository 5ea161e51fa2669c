//! The model of the mesh: workloads, services and policies as one immutable value, [`Mesh`].
//!
//! Sources of configuration fill it, and every room may read it. It depends on no other room.

mod claims;
pub mod delta;
pub mod endpoints;
pub mod identity;
pub(crate) mod interner;
pub mod policy;
mod ranges;
pub mod service;
pub mod snapshot;
pub mod store;
pub mod workload;

pub use delta::Delta;
pub use identity::{Identity, NotAnIdentity};
pub use service::Service;
pub use snapshot::{Destination, Mesh};
pub use store::{MeshReader, MeshWriter, store, store_of_node};
pub use workload::Workload;

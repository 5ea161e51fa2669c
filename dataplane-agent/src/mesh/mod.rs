//! The ground floor: what is known of the mesh, as one value.
//!
//! Sources of configuration fill it; all rooms may read it, and it uses none of them.

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
pub use store::{MeshReader, MeshWriter, store};
pub use workload::Workload;

//! The ground floor: what is known of the mesh, as one value.
//!
//! Sources of configuration fill it; all rooms may read it, and it uses none of them.

pub mod identity;
pub mod policy;
pub mod service;
pub mod snapshot;
pub mod workload;

pub use identity::{Identity, NotAnIdentity};
pub use service::Service;
pub use snapshot::{Destination, Mesh, MeshReader, MeshWriter, store};
pub use workload::Workload;

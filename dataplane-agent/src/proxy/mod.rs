//! The proxy half: carries the connections of the pods that it is lent. It knows no cgroup and no kernel
//! program, nor how a pod was found; from the node half it hears through [`crate::seam`] alone.
//!
//! A connection walks through the rooms in one direction, `accept` → `resolve` → `authorize` → `transport`;
//! [`connection`] is the only file that knows the order.

pub mod accept;
pub mod authorize;
pub mod connection;
pub mod hbone;
pub mod identity;
pub mod limits;
pub mod resolve;
pub mod transport;
pub mod workers;

//! The tradesmen's entrance: fills the stores that the rooms read. Nothing calls it.

pub mod local;
pub mod manifests;
pub mod ca;
pub mod enrolled;
pub mod machine;
pub mod pods;

//! The tradesmen's entrance: fills the stores that the rooms read. Nothing calls it.

pub mod local;
pub mod manifests;

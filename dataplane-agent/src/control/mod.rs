//! The tradesmen's entrance: fills the stores that the rooms read. Nothing calls it.

pub mod ca;
pub mod configuration;
mod conflicts;
mod doubts;
pub mod enrolled;
#[cfg(test)]
mod footprint;
mod kept;
pub mod local;
pub mod manifests;
mod owned;
pub mod recorded;
pub mod state;
mod written;

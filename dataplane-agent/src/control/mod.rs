//! The tradesmen's entrance: fills the stores that the rooms read. Nothing calls it.

mod address;
pub mod ca;
pub mod configuration;
mod conflicts;
pub mod enrolled;
#[cfg(test)]
mod footprint;
mod lints;
pub mod local;
pub mod manifests;
mod ownership;
mod record_cache;
pub mod recorded;
mod retained;
pub mod state;

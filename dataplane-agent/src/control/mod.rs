//! Sources of configuration: they fill the stores that both halves read. No room of the proxy half calls them.

pub mod ca;
pub mod configuration;
mod conflicts;
pub mod disk;
pub mod enrolled;
#[cfg(test)]
mod footprint;
mod ip;
mod lints;
pub mod local_xds;
pub mod manifests;
mod ownership;
mod problems;
mod record_cache;
pub mod recorded;
mod retained;
pub mod state;

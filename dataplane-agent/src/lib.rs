//! The node agent: captures the traffic of enrolled pods, gives each its identity, carries
//! connections between nodes in HBONE and enforces L4 policy.
//!
//! A connection walks through the rooms in one direction, `capture` → `accept` → `resolve` →
//! `authorize` → `transport`; [`journey`] is the only file that knows the order, and [`agent`] the
//! only one that builds the rooms. `control` fills the stores that they read; `observe` watches.

#![deny(unsafe_code)]

pub mod accept;
pub mod agent;
pub mod authorize;
pub mod capture;
pub mod cli;
pub mod config;
pub mod control;
pub mod drain;
pub mod exit;
pub mod hbone;
pub mod identity;
pub mod journey;
pub mod limits;
pub mod load;
pub mod mesh;
pub mod observe;
pub mod resolve;
pub mod seam;
pub mod sys;
pub mod transport;
pub mod workers;

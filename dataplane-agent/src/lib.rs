//! The node agent: captures the traffic of enrolled pods, gives each its identity, carries
//! connections between nodes in HBONE and enforces L4 policy.
//!
//! It is two halves, [`node`] and [`proxy`], which meet in [`seam`] alone; [`agent`] builds one or both.
//! `mesh` is what is known of the mesh, which both read; `control` fills it, and `observe` watches.

#![deny(unsafe_code)]

pub mod agent;
pub mod cli;
pub mod config;
pub mod control;
pub mod drain;
pub mod exit;
pub mod load;
pub mod mesh;
pub mod node;
pub mod observe;
pub mod proxy;
pub mod seam;
pub mod sys;

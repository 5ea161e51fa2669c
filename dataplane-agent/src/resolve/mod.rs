//! Room 3: who is it, where does it go.

pub mod service;
pub mod workload;

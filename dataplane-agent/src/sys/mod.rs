//! System calls, and the only unsafe code of the agent.
#![allow(unsafe_code, reason = "this is the one place for it")]

pub mod async_fd;
pub mod bound;
pub mod bpffs;
pub mod caps;
pub mod cgroup;
pub mod dump;
pub mod elements;
pub mod hooks;
pub mod interfaces;
pub mod limits;
pub mod locked;
pub mod machine_id;
pub mod made;
pub mod memory;
pub mod netns;
pub mod peer;
pub mod priority;
pub mod processes;
pub mod regular_file;
pub mod seccomp;
pub mod socket;
pub mod verifier;
pub mod writers;

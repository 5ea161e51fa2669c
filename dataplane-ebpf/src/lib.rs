//! The words that the kernel programs and the agent share, and the decisions that the programs
//! make, as pure functions that are tested on the host.
//!
//! Every type that crosses a map is `repr(C)` without padding, and its size is asserted; keys are
//! socket and namespace cookies, never kernel pointers.

#![no_std]

pub mod address;
pub mod counter;
pub mod decide;
pub mod event;
pub mod mark;
pub mod pod;

/// Raised when a map's layout changes; part of the path under which maps are pinned, so that an
/// agent never reads a map of another layout.
pub const LAYOUT: u32 = 5;

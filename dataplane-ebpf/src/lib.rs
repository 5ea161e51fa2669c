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

/// Raised when a map changes; part of the path under which maps are pinned, so that one sees who pinned
/// them. An agent takes over what another layout holds, up and down, by the maps' names and by what the
/// kernel says of them. So fields are added at the end of a value, where 0 means what was so without
/// them; and a map whose keys or values mean something else has another name.
pub const LAYOUT: u32 = if OTHER { 1005 } else { 5 };

/// Whether this is the layout that only tests have: larger and smaller maps, and another value.
const OTHER: bool = cfg!(feature = "other-layout");

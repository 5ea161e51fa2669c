//! The types that the kernel programs and the agent share, and the decisions of the programs, as pure
//! functions that are tested on the host.
//!
//! Every type that crosses a map is `repr(C)` without padding, and its size is asserted; keys are
//! socket and namespace cookies, never kernel pointers.

#![no_std]

pub mod address;
pub mod counter;
pub mod decide;
pub mod event;
pub mod listener;
pub mod mark;
pub mod pod;

/// The layout of the maps, raised when one changes. It is part of the path of the pins, to show who made
/// them. An agent takes over the maps of an older or newer layout by their names and by what the kernel says
/// of them. So new fields go to the end of a value, where 0 must mean what held without them; and a map whose
/// keys or values get another meaning gets another name.
pub const LAYOUT: u32 = if OTHER { 1005 } else { 5 };

/// `true` for the layout that only tests have: larger and smaller maps, and another value.
const OTHER: bool = cfg!(feature = "other-layout");

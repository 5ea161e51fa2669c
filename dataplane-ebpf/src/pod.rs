//! What the kernel side knows of enrolled pods.
//!
//! The kernel gives an element of a hash map that is removed or replaced to the next update at once,
//! also while a program on another CPU still holds a reference to it, whether elements are allocated
//! ahead or not (`bpf_mem_alloc`, since 6.1). So programs decide about a pod by whether a key is there,
//! which no reuse can change; and an entry of a pod that stays is never written anew. The one value
//! of a hash map that is read is a cgroup's owner, and a wrong one refuses a connect.

use crate::OTHER;
use crate::address::Ip;

/// How many pods a node has enrolled at once; a further one waits.
pub const PODS: u32 = if OTHER { 2048 } else { 1024 };
/// How many cgroups of one pod are known to be its own: each of its containers may have one, where no
/// cgroup holds them all. What is in a further one counts as outside of the pod's cgroups.
pub const CGROUPS: u32 = 16;
/// How many levels below the root cgroups are looked at for a pod's; deeper ones belong to what is above
/// them.
pub const DEPTH: u32 = 12;
/// How many addresses of one pod are known to be its own. What a pod has beyond that is nobody's: it
/// is captured like any other destination, and refused to who connects to it from outside.
pub const ADDRESSES: usize = 64;
/// How many keys all pods have in the map `ADDRESSES`; a pod beyond that waits.
pub const OWNED: u32 = if OTHER { 16_384 } else { 65_536 };

/// What an entry has that says all by being there: 1.
#[cfg(not(feature = "other-layout"))]
pub type There = u32;
/// The same, of the layout that only tests have.
#[cfg(feature = "other-layout")]
pub type There = u64;

/// An address that a pod has: a key of the map `ADDRESSES`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Owned {
    /// The cookie of the pod's network namespace.
    pub netns: u64,
    /// The address; or [`Ip::family`] of one, for each family of which the pod has any; or
    /// [`Ip::interface`] for each interface by which it can be captured.
    pub ip: Ip,
}

/// How many connections of all pods are remembered as [`Begun`] at once; then the oldest is forgotten.
pub const BEGUN: u32 = if OTHER { 4096 } else { 8192 };

/// A connection that a pod is beginning from one of its own addresses to another one: a key of the map
/// `BEGUN`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Begun {
    /// The cookie of the pod's network namespace.
    pub netns: u64,
    /// Where it comes from.
    pub from: Ip,
    /// Where it goes.
    pub to: Ip,
    /// The port that it comes from.
    pub from_port: u32,
    /// The port that it goes to.
    pub to_port: u32,
}

/// What a pod's instance of `steer` knows of it. Written once, before the program is attached.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Steered {
    /// The cookie of the pod's network namespace.
    pub netns: u64,
    /// Its first address, for reports.
    pub first: Ip,
}

/// What holds for all pods of the node. Written by the agent.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Node {
    /// Cookies of the host's network namespaces, the agent's own among them; 0 is none.
    pub hosts: [u64; 2],
    /// Whether the programs log: 0 is off.
    pub log: u32,
    /// Always 0.
    pub reserved: u32,
}

/// Places in a pod's map of listeners.
pub mod listener {
    /// What the pod connects to.
    pub const OUTBOUND: u32 = 0;
    /// What comes in clear.
    pub const INBOUND: u32 = 1;
    /// What comes in HBONE.
    pub const HBONE: u32 = 2;
    /// How many.
    pub const COUNT: u32 = 3;
}

const _: () =
    assert!(size_of::<Owned>() == 24 && size_of::<Steered>() == 24 && size_of::<Node>() == 24);
const _: () = assert!(size_of::<Begun>() == 48);

#[cfg(feature = "user")]
mod user {
    #![allow(
        unsafe_code,
        reason = "aya asks for the promise that a type is plain bytes"
    )]
    // SAFETY: repr(C), integers only, without padding (sizes asserted above).
    unsafe impl aya::Pod for super::Owned {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Steered {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Node {}
    // SAFETY: as above.
    unsafe impl aya::Pod for crate::address::Ip {}
}

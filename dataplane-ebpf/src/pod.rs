//! Enrolled pods, as the kernel side knows them.
//!
//! When an element of a hash map is removed or replaced, the kernel gives it to the next update at once, even
//! while a program on another CPU still holds a reference to it, whether elements are preallocated or not
//! (`bpf_mem_alloc`, since 6.1). So programs decide about a pod by whether a key is there, which no reuse can
//! change; and an entry of a pod that stays is never written again. The one value of a hash map by which
//! a program decides is a cgroup's owner, and a wrong one refuses a connect.

use crate::OTHER;
use crate::address::Ip;

/// Maximum number of enrolled pods of a node; further ones wait.
pub const PODS: u32 = if OTHER { 2048 } else { 1024 };
/// Maximum number of cgroups of one pod: each of its containers may have one, where no cgroup holds them all.
/// A process in a further one counts as outside of the pod's cgroups.
pub const CGROUPS: u32 = 16;
/// Number of levels below the root at which a pod's cgroup is looked for; a deeper cgroup belongs to the one
/// above it.
pub const DEPTH: u32 = 12;
/// Maximum number of one pod's own addresses. Further ones count as nobody's: connections to them are
/// captured like any other, and refused if they come from outside.
pub const ADDRESSES: usize = 64;
/// Maximum number of keys of all pods in the map `ADDRESSES`; a pod that needs more waits.
pub const OWNED: u32 = if OTHER { 16_384 } else { 65_536 };

/// The value, always 1, of entries that only have to be there.
#[cfg(not(feature = "other-layout"))]
pub type There = u32;
/// The same value in the layout that only tests have.
#[cfg(feature = "other-layout")]
pub type There = u64;

/// An own address of a pod: a key of the map `ADDRESSES`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Owned {
    /// The cookie of the pod's network namespace.
    pub netns: u64,
    /// The address; or [`Ip::family`] of one, for each family of which the pod has any; or
    /// [`Ip::interface`] for each interface by which it can be captured.
    pub ip: Ip,
}

/// Maximum number of [`Begun`] connections of all pods; beyond it the oldest is forgotten.
pub const BEGUN: u32 = if OTHER { 4096 } else { 8192 };

/// A connection that a pod is beginning from one of its own addresses to another one: a key of the map
/// `BEGUN`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Begun {
    /// The cookie of the pod's network namespace.
    pub netns: u64,
    /// The source address.
    pub from: Ip,
    /// The destination address.
    pub to: Ip,
    /// The source port.
    pub from_port: u32,
    /// The destination port.
    pub to_port: u32,
}

/// The pod of an instance of `steer`. Written once, before the program is attached.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Steered {
    /// The cookie of the pod's network namespace.
    pub netns: u64,
    /// The pod's first address, for reports.
    pub first: Ip,
}

/// Settings that hold for all pods of the node. Written by the agent.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Node {
    /// Cookies of the host's network namespaces, the agent's own among them; 0 means none.
    pub hosts: [u64; 2],
    /// 0 if the programs do not log, 1 if they do.
    pub log: u32,
    /// Always 0.
    pub reserved: u32,
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

//! What the kernel side knows of an enrolled pod.

use crate::address::Ip;

/// How many addresses a pod may have; a further one refuses the enrolment.
pub const ADDRESSES: usize = 8;

/// A pod's addresses; unused places are [`Ip::NONE`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Addresses {
    /// The places.
    pub all: [Ip; ADDRESSES],
}

impl Addresses {
    /// Whether the address is one of the pod's.
    #[inline(always)]
    pub fn owns(&self, ip: &Ip) -> bool {
        let mut found = false;
        let mut place = 0;
        // A counted loop without an early exit: the verifier unrolls it.
        while place < ADDRESSES {
            found |= self.all[place] == *ip && *ip != Ip::NONE;
            place += 1;
        }
        found
    }

    /// Whether the pod has an address of this family to send from.
    #[inline(always)]
    pub fn has_family(&self, v4: bool) -> bool {
        let mut found = false;
        let mut place = 0;
        while place < ADDRESSES {
            found |= self.all[place] != Ip::NONE && self.all[place].is_v4() == v4;
            place += 1;
        }
        found
    }
}

/// An enrolled pod; the key is the cookie of its network namespace. Written by the agent alone: the
/// last step of enrolment; said to leave in the first of leaving, and removed in the last.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Pod {
    /// Its addresses.
    pub addresses: Addresses,
    /// The id of its cgroup; a process of its namespace in another pod's cgroup is refused.
    pub cgroup: u64,
    /// How deep that cgroup is; the root is 0.
    pub cgroup_level: u32,
    /// Not 0: nothing new of it is captured any more, and what was stays inside.
    pub leaving: u32,
}

/// What holds for all pods of the node. Written by the agent.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Node {
    /// The id of the agent's own cgroup, which is never captured.
    pub agent_cgroup: u64,
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

const _: () = assert!(size_of::<Pod>() == 144 && size_of::<Node>() == 32);

#[cfg(feature = "user")]
mod user {
    #![allow(
        unsafe_code,
        reason = "aya asks for the promise that a type is plain bytes"
    )]
    // SAFETY: repr(C), integers only, without padding (sizes asserted above).
    unsafe impl aya::Pod for super::Pod {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Node {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Addresses {}
}

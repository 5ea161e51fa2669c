//! The reports of the kernel programs on the ring buffer: only of what should not happen.

use crate::address::Ip;

/// One report.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Event {
    /// The cookie of the network namespace; 0 where the program cannot know it.
    pub netns: u64,
    /// The cgroup of the process; 0 where the program cannot know it.
    pub cgroup: u64,
    /// The destination address.
    pub to: Ip,
    /// The first address of the pod, or of the pod in whose cgroup the process is; [`Ip::NONE`] where the
    /// program cannot know it.
    pub pod: Ip,
    /// A [`Reason`].
    pub reason: u32,
    /// The destination port.
    pub port: u32,
}

/// Why something was refused or dropped.
#[repr(u32)]
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Reason {
    /// The mark could not be set.
    MarkFailed = 1,
    /// The socket's storage could not be made.
    StorageFailed = 2,
    /// The pod has no address of that family to send from.
    NoAddress = 3,
    /// The process is in an enrolled pod's cgroup, and neither in its network namespace nor the host's.
    ForeignCgroup = 4,
    /// The agent has no listener for it.
    NoListener = 5,
    /// A captured socket sent by another interface than `lo`.
    KeptInside = 6,
    /// The socket is bound to an interface that has no address of that family.
    NoRoute = 7,
}

impl Reason {
    /// Returns the reason with this number.
    pub const fn from_number(number: u32) -> Option<Self> {
        Some(match number {
            1 => Self::MarkFailed,
            2 => Self::StorageFailed,
            3 => Self::NoAddress,
            4 => Self::ForeignCgroup,
            5 => Self::NoListener,
            6 => Self::KeptInside,
            7 => Self::NoRoute,
            _ => return None,
        })
    }

    /// Returns the reason's word in logs and metrics.
    pub const fn word(self) -> &'static str {
        match self {
            Self::MarkFailed => "mark_failed",
            Self::StorageFailed => "storage_failed",
            Self::NoAddress => "no_address",
            Self::ForeignCgroup => "foreign_cgroup",
            Self::NoListener => "no_listener",
            Self::KeptInside => "kept_inside",
            Self::NoRoute => "no_route",
        }
    }
}

const _: () = assert!(size_of::<Event>() == 56);

#[cfg(feature = "user")]
impl Event {
    /// Reads the bytes of a report; `None` if they are too few.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        #![allow(unsafe_code, reason = "a report is plain bytes")]
        if bytes.len() < size_of::<Self>() {
            return None;
        }
        // SAFETY: there are enough bytes, any of them make integers, and they need not be aligned.
        Some(unsafe { bytes.as_ptr().cast::<Self>().read_unaligned() })
    }
}

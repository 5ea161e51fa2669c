//! The listeners that the agent has in each pod's namespace: one table, of the kernel programs, of what the node
//! lends to a proxy, and of what a proxy accepts from.

use crate::counter::Counter;

/// A kind of listener, by what comes to it.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
#[repr(u32)]
pub enum ListenerKind {
    /// The pod connects.
    Outbound,
    /// A client connects to the pod in clear.
    Inbound,
    /// A peer opens a tunnel to the pod.
    Hbone,
}

impl ListenerKind {
    /// Every kind, each at its [`place`](Self::place).
    pub const ALL: [Self; 3] = [Self::Outbound, Self::Inbound, Self::Hbone];
    /// Number of kinds.
    pub const COUNT: usize = Self::ALL.len();

    /// Returns its place in a pod's map of listeners, and in what is lent.
    #[inline(always)]
    pub const fn place(self) -> u32 {
        self as u32
    }

    /// Returns its port, the same in each pod.
    #[inline(always)]
    pub const fn port(self) -> u16 {
        match self {
            Self::Outbound => 15001,
            Self::Inbound => 15006,
            Self::Hbone => 15008,
        }
    }

    /// Returns what counts the connections that are steered to it.
    #[inline(always)]
    pub const fn counter(self) -> Counter {
        match self {
            Self::Outbound => Counter::SteeredOutbound,
            Self::Inbound => Counter::SteeredInbound,
            Self::Hbone => Counter::SteeredHbone,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::ListenerKind;

    #[test]
    fn each_is_at_its_place() {
        for (place, kind) in (0..).zip(ListenerKind::ALL) {
            assert_eq!(kind.place(), place);
        }
    }
}

//! The per-CPU counters; their words are metric labels.

/// A counter; its number is its slot.
#[repr(u32)]
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Counter {
    /// A pod's connection was marked for capture.
    Captured,
    /// A pod's connection to itself was let pass.
    Local,
    /// A SYN went to the outbound listener.
    SteeredOutbound,
    /// A SYN went to the plaintext listener.
    SteeredInbound,
    /// A SYN went to the HBONE listener.
    SteeredHbone,
    /// A connect was refused.
    Refused,
    /// A SYN was dropped because the agent does not listen.
    NoListener,
    /// A packet of a captured socket would have left the pod.
    KeptInside,
    /// A connection that had begun could not be remembered as one that sends by `lo` only.
    NotKept,
    /// An event found no room in the ring buffer.
    EventLost,
}

impl Counter {
    /// All counters, in the order of their slots.
    pub const ALL: [Self; 10] = [
        Self::Captured,
        Self::Local,
        Self::SteeredOutbound,
        Self::SteeredInbound,
        Self::SteeredHbone,
        Self::Refused,
        Self::NoListener,
        Self::KeptInside,
        Self::NotKept,
        Self::EventLost,
    ];

    /// Number of slots of the map. New counters go to the end: a takeover copies counts by their slots.
    pub const SLOTS: u32 = Self::ALL.len() as u32 + crate::OTHER as u32;

    /// Returns the counter's word in metrics.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Captured => "captured",
            Self::Local => "local",
            Self::SteeredOutbound => "steered_outbound",
            Self::SteeredInbound => "steered_inbound",
            Self::SteeredHbone => "steered_hbone",
            Self::Refused => "refused",
            Self::NoListener => "no_listener",
            Self::KeptInside => "kept_inside",
            Self::NotKept => "not_kept",
            Self::EventLost => "event_lost",
        }
    }
}

//! Socket marks. They steer packets inside a pod's network namespace, and end at its edge; they
//! are not a trust boundary, since CAP_NET_RAW is enough to set one.

/// The bits that are ours, as in Istio; the application keeps the others.
pub const MASK: u32 = 0xfff;
/// A captured connection: a policy route leads to `lo`, where its SYN is steered to the agent.
pub const CAPTURE: u32 = 0x511;
/// The agent's connection to the app, and the app's end of it: a policy route leads back to `lo`.
pub const RETURN: u32 = 0x111;
/// The agent's other sockets in the pod. It only says whose they are.
pub const AGENT: u32 = 0x539;

/// Returns the mark after a connect: our bits are set, or cleared if an earlier connect has set them.
#[inline(always)]
pub const fn after_connect(old: u32, captured: bool) -> u32 {
    if captured {
        (old & !MASK) | CAPTURE
    } else if old & MASK == CAPTURE {
        old & !MASK
    } else {
        old
    }
}

/// Returns `true` if a pod's socket with this mark, as its connection begins, may send by `lo` only.
#[inline(always)]
pub const fn stays_inside(mark: u32) -> bool {
    matches!(mark & MASK, CAPTURE | RETURN)
}

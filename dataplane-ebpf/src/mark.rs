//! Socket marks. They steer packets inside a pod's network namespace, and end at its edge; they
//! are not a trust boundary, since CAP_NET_RAW is enough to set one.

/// The bits that are ours; the application keeps the others. Istio's own mask.
pub const MASK: u32 = 0xfff;
/// A captured connection: policy route to `lo`, where its SYN is steered to the agent.
pub const CAPTURE: u32 = 0x511;
/// The agent's connection to the app, and the app's end of it: policy route back to `lo`.
pub const RETURN: u32 = 0x111;
/// The agent's other sockets in the pod; says whose they are and steers nothing.
pub const AGENT: u32 = 0x539;

/// The mark after a connect: ours set, or cleared where a former connect left it.
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

/// Whether a pod's socket that has this mark as its connection begins may send by `lo` only.
#[inline(always)]
pub const fn stays_inside(mark: u32) -> bool {
    matches!(mark & MASK, CAPTURE | RETURN)
}

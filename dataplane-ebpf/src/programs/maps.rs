//! Maps that all programs of a node share, and what they write to them.

use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, PerCpuArray, RingBuf};
use dataplane_ebpf::counter::Counter;
use dataplane_ebpf::event::Event;
use dataplane_ebpf::pod::Node;

/// What holds for all pods; one entry, written by the agent.
#[map]
static NODE: Array<Node> = Array::with_max_entries(1, 0);

/// Counts, a slot per [`Counter`]; written here, read by the agent.
#[map]
static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(Counter::ALL.len() as u32, 0);

/// Reports, read by the agent. When it is full, reports are lost and that is counted.
#[map]
static EVENTS: RingBuf = RingBuf::with_byte_size(64 * 1024, 0);

/// What holds for all pods.
#[inline(always)]
pub(crate) fn node() -> Node {
    NODE.get(0).copied().unwrap_or_default()
}

/// Counts one.
#[inline(always)]
pub(crate) fn count(counter: Counter) {
    if let Some(slot) = COUNTERS.get_ptr_mut(counter as u32) {
        // SAFETY: the slot is this CPU's own; the verifier has seen the null check.
        unsafe { *slot += 1 };
    }
}

/// Reports, or counts that the report was lost.
#[inline(always)]
pub(crate) fn report(event: Event) {
    if EVENTS.output::<Event>(&event, 0).is_err() {
        count(Counter::EventLost);
    }
}

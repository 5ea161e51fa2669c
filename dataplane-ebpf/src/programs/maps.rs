//! The maps that all programs of a node share, and the functions that use them.

use aya_ebpf::bindings::BPF_F_NO_PREALLOC;
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap, LruHashMap, PerCpuArray, RingBuf};
use dataplane_ebpf::address::Ip;
use dataplane_ebpf::counter::Counter;
use dataplane_ebpf::event::Event;
use dataplane_ebpf::pod::{self, Begun, Node, Owned, There};

/// The settings that hold for all pods; one entry, written by the agent.
#[map]
static NODE: Array<Node> = Array::with_max_entries(1, 0);

/// The pods' addresses. Written by the agent: before the pod is in `PODS`, and as its interfaces
/// change. When it is full, enrolment fails.
#[map]
static ADDRESSES: HashMap<Owned, u32> = HashMap::with_max_entries(pod::OWNED, BPF_F_NO_PREALLOC);

/// Leaving pods, by the cookie of their network namespace: new connections of such a pod are not captured,
/// and captured ones stay inside. Pods that are being enrolled are here too, until all is in place. Written
/// by the agent: first at leaving, and first at enrolment. When it is full, a pod that leaves stays captured,
/// and enrolment fails.
#[map]
static LEAVING: HashMap<u64, There> = HashMap::with_max_entries(pod::PODS, 0);

/// Connections that pods are beginning from one of their own addresses to another. Written by `sock_ops`
/// before the SYN is sent, read by `steer` when it arrives, and removed by `sock_ops` when the other end is
/// established or this one has failed. When it is full, the oldest is forgotten.
#[map]
pub(crate) static BEGUN: LruHashMap<Begun, u32> = LruHashMap::with_max_entries(pod::BEGUN, 0);

/// The counters, a slot per [`Counter`]; written here, read by the agent.
#[map]
static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(Counter::SLOTS, 0);

/// The reports, read by the agent. When it is full, reports are lost and counted.
#[map]
static EVENTS: RingBuf = RingBuf::with_byte_size(64 * 1024, 0);

/// Returns the settings that hold for all pods.
#[inline(always)]
pub(crate) fn node() -> Option<&'static Node> {
    NODE.get(0)
}

/// Returns `true` if the pod of this network namespace has the address, or the key that stands for a family
/// or an interface.
#[inline(always)]
pub(crate) fn owns(netns: u64, ip: Ip) -> bool {
    ADDRESSES.get_ptr(Owned { netns, ip }).is_some()
}

/// Returns `true` if the pod of this network namespace is leaving, or not enrolled yet.
#[inline(always)]
pub(crate) fn leaves(netns: u64) -> bool {
    LEAVING.get_ptr(netns).is_some()
}

/// Counts one. If another program interrupts this one on its CPU, the other's count may be lost: a count may
/// be low, and is never high. (This target has no atomic addition.)
#[inline(always)]
pub(crate) fn count(counter: Counter) {
    if let Some(slot) = COUNTERS.get_ptr_mut(counter as u32) {
        // SAFETY: not null, aligned, and as long-lived as the map; no reference is made, and any value
        // that is read is a number.
        unsafe { *slot += 1 };
    }
}

/// Reports an event, or counts that it was lost.
#[inline(always)]
pub(crate) fn report(event: Event) {
    match EVENTS.reserve::<Event>(0) {
        Some(mut entry) => {
            entry.write(event);
            entry.submit(0);
        }
        None => count(Counter::EventLost),
    }
}

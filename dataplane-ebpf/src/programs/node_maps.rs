//! Maps of the node's programs alone.

use aya_ebpf::btf_maps::SkStorage;
use aya_ebpf::macros::{btf_map, map};
use aya_ebpf::maps::HashMap;
use dataplane_ebpf::address::Ip;
use dataplane_ebpf::pod;

/// Enrolled pods by the cookie of their network namespace, with the first address, for reports.
/// Written by the agent: before `steer` is attached, and until the last step of enrolment the pod is in
/// `LEAVING` too; removed in the last step of leaving. When it is full, enrolment fails.
#[map]
pub(crate) static PODS: HashMap<u64, Ip> = HashMap::with_max_entries(pod::PODS, 0);

/// Cgroups of enrolled pods, with the cookie of the network namespace that they belong to. The value
/// is read, unlike those of others: a program that is interrupted between the look and the read may
/// see the owner of the next cgroup in place of one that has just left, and refuses what it could
/// have let pass a moment later.
#[map]
pub(crate) static CGROUPS: HashMap<u64, u64> =
    HashMap::with_max_entries(pod::PODS * pod::CGROUPS, 0);

/// On sockets that may send by `lo` only: 1. Written and read by the programs; gone with the socket.
/// A mark alone says nothing: it may be somebody else's.
#[btf_map]
pub(crate) static INSIDE: SkStorage<u32> = SkStorage::new();

/// On the agent's own sockets that connect in a pod's namespace: they are not captured. Written by the
/// agent; gone with the socket.
#[btf_map]
pub(crate) static AGENT: SkStorage<u32> = SkStorage::new();

/// The map of [`INSIDE`] for the helper itself: aya lends it to the connect hooks only.
#[inline(always)]
pub(crate) fn inside() -> *mut core::ffi::c_void {
    (&raw const INSIDE).cast_mut().cast()
}

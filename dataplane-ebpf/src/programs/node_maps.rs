//! The maps of the node's programs alone.

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

/// The cgroups of enrolled pods, with the cookie of the network namespace that they belong to. Unlike in
/// other maps the value decides: a program that is interrupted between lookup and read may see the owner of
/// the next cgroup in place of one that has just left, and refuses what it could have let pass a moment
/// later.
#[map]
pub(crate) static CGROUPS: HashMap<u64, u64> =
    HashMap::with_max_entries(pod::PODS * pod::CGROUPS, 0);

/// Storage of sockets that may send by `lo` only: 1. Written and read by the programs; gone with the socket.
/// A mark alone proves nothing: it may be somebody else's.
#[btf_map]
pub(crate) static INSIDE: SkStorage<u32> = SkStorage::new();

/// Storage of the agent's own sockets that connect in a pod's namespace: they are not captured. Written by
/// the agent; gone with the socket.
#[btf_map]
pub(crate) static AGENT: SkStorage<u32> = SkStorage::new();

/// Returns the map [`INSIDE`] for calling the helper directly: aya allows it to the connect hooks only.
#[inline(always)]
pub(crate) fn inside() -> *mut core::ffi::c_void {
    (&raw const INSIDE).cast_mut().cast()
}

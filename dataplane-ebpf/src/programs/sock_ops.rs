//! Hook: a connection of the pods' cgroup begins. The app's end of an agent's connection, and each
//! subflow of a captured MPTCP one, is remembered as one that sends by `lo` only: the connect hook
//! sees neither. Only in a pod's namespace: elsewhere such a mark is somebody else's.

use aya_ebpf::bindings::{
    BPF_SK_STORAGE_GET_F_CREATE, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_TCP_CONNECT_CB,
};
use aya_ebpf::helpers::generated::{bpf_get_netns_cookie, bpf_sk_storage_get};
use aya_ebpf::macros::sock_ops;
use aya_ebpf::programs::SockOpsContext;
use dataplane_ebpf::counter::Counter;
use dataplane_ebpf::mark;

use crate::maps::count;
use crate::node_maps::{PODS, inside};

/// Runs at each event of a TCP socket; cares for the two at which a connection begins.
#[sock_ops]
pub(crate) fn sock_ops(ctx: SockOpsContext) -> u32 {
    if !matches!(
        ctx.op(),
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB | BPF_SOCK_OPS_TCP_CONNECT_CB
    ) {
        return 0;
    }
    // SAFETY: the kernel passes a valid context for the length of the call.
    let sk = unsafe { (*ctx.ops).__bindgen_anon_2.sk };
    if sk.is_null() {
        return 0;
    }
    // SAFETY: not null.
    if !mark::stays_inside(unsafe { (*sk).mark }) {
        return 0;
    }
    // SAFETY: a helper that reads the context.
    let netns = unsafe { bpf_get_netns_cookie(ctx.ops.cast()) };
    if PODS.get_ptr(netns).is_some() {
        let mut yes = 1_u32;
        // SAFETY: not null; the initial value lives on this stack.
        let stored = unsafe {
            bpf_sk_storage_get(
                inside(),
                sk.cast(),
                (&raw mut yes).cast(),
                BPF_SK_STORAGE_GET_F_CREATE.into(),
            )
        };
        if stored.is_null() {
            // It has begun and cannot be refused any more; what it is marked with keeps it inside,
            // as long as the app lets it.
            count(Counter::NotKept);
        }
    }
    0
}

//! Hook: a connection of the pods' cgroup begins. What the connect hook does not see is remembered as
//! one that sends by `lo` only: the app's end of an agent's connection, each subflow of a captured MPTCP
//! one, and both ends of what a pod has with itself. Only in a pod's namespace: elsewhere a mark is
//! somebody else's.

use aya_ebpf::bindings::{
    BPF_SK_STORAGE_GET_F_CREATE, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_TCP_CONNECT_CB,
};
use aya_ebpf::helpers::generated::{bpf_get_netns_cookie, bpf_sk_storage_get};
use aya_ebpf::macros::sock_ops;
use aya_ebpf::programs::SockOpsContext;
use dataplane_ebpf::counter::Counter;
use dataplane_ebpf::mark;
use dataplane_ebpf::pod::Begun;

use crate::context::{self, Connection};
use crate::maps::{BEGUN, count, owns};
use crate::node_maps::{PODS, inside};

/// Runs at each event of a TCP socket; cares for the two at which a connection begins.
#[sock_ops]
pub(crate) fn sock_ops(ctx: SockOpsContext) -> u32 {
    let op = ctx.op();
    if !matches!(
        op,
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB | BPF_SOCK_OPS_TCP_CONNECT_CB
    ) {
        return 0;
    }
    // SAFETY: the kernel passes a valid context for the length of the call.
    let sk = unsafe { (*ctx.ops).__bindgen_anon_2.sk };
    if sk.is_null() {
        return 0;
    }
    // SAFETY: a helper that reads the context.
    let netns = unsafe { bpf_get_netns_cookie(ctx.ops.cast()) };
    if PODS.get_ptr(netns).is_none() {
        return 0;
    }
    let Connection {
        own,
        other,
        own_port,
        other_port,
    } = context::connection(ctx.ops);
    let to_itself = owns(netns, other);
    // SAFETY: not null.
    if !to_itself && !mark::stays_inside(unsafe { (*sk).mark }) {
        return 0;
    }
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
    let stored = stored.cast::<u32>();
    if stored.is_null() {
        // It has begun and cannot be refused any more; what it is marked with keeps it inside,
        // as long as the app lets it.
        count(Counter::NotKept);
    } else {
        // SAFETY: not null, and the kernel runs this hook with the socket locked.
        unsafe { *stored = 1 };
    }
    if op == BPF_SOCK_OPS_TCP_CONNECT_CB && to_itself && own != other {
        let connection = Begun {
            netns,
            from: own,
            to: other,
            from_port: own_port,
            to_port: other_port,
        };
        // Where it finds no room it is taken for somebody else's, and goes to the agent.
        let _ = BEGUN.insert(connection, 1, 0);
    }
    0
}

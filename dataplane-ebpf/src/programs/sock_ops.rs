//! Hook: a connection of the pods' cgroup begins or ends. Sockets that the connect hook does not see are
//! remembered as sending by `lo` only: the app's end of an agent's connection, each subflow of a captured
//! MPTCP connection, and both ends of a connection that a pod has with itself. This holds only in a pod's
//! namespace: elsewhere a mark is somebody else's.
//!
//! A connection that a pod begins with itself is known to be its own until it is accepted or has failed: a
//! later owner of the address may use the same port.

use aya_ebpf::bindings::{
    BPF_SK_STORAGE_GET_F_CREATE, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_STATE_CB,
    BPF_SOCK_OPS_STATE_CB_FLAG, BPF_SOCK_OPS_TCP_CONNECT_CB, BPF_TCP_CLOSE, bpf_sock,
};
use aya_ebpf::helpers::generated::{bpf_get_netns_cookie, bpf_sk_storage_get};
use aya_ebpf::macros::sock_ops;
use aya_ebpf::programs::SockOpsContext;
use dataplane_ebpf::counter::Counter;
use dataplane_ebpf::mark;
use dataplane_ebpf::pod::Begun;

use crate::context::{self, Connection, in_memory};
use crate::maps::{BEGUN, count, owns};
use crate::node_maps::{PODS, inside};

/// Runs at each event of a TCP socket; handles the two at which a connection begins, and the end of one that
/// was begun here.
#[sock_ops]
pub(crate) fn sock_ops(ctx: SockOpsContext) -> u32 {
    let op = ctx.op();
    let begins = op == BPF_SOCK_OPS_TCP_CONNECT_CB;
    let is_accepted = op == BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB;
    let ends = op == BPF_SOCK_OPS_STATE_CB && ctx.arg(1) == BPF_TCP_CLOSE;
    if !begins && !is_accepted && !ends {
        return 0;
    }
    // SAFETY: the kernel passes a valid context for the length of the call.
    let sk = unsafe { (*ctx.ops).__bindgen_anon_2.sk };
    if sk.is_null() {
        return 0;
    }
    // SAFETY: a helper that reads the context.
    let netns = unsafe { bpf_get_netns_cookie(ctx.ops.cast()) };
    let Connection {
        own,
        other,
        own_port,
        other_port,
    } = context::connection(ctx.ops);
    // The connection as its client sees it.
    let (from, to, from_port, to_port) = if is_accepted {
        (other, own, other_port, own_port)
    } else {
        (own, other, own_port, other_port)
    };
    let connection = Begun {
        netns,
        from,
        to,
        from_port,
        to_port,
    };
    let connection = in_memory(&connection);
    let Begun { from, to, .. } = connection;
    if ends {
        // It has failed, or was not accepted by a process of the pods' cgroup.
        let _ = BEGUN.remove(connection);
        return 0;
    }
    if PODS.get_ptr(netns).is_none() {
        return 0;
    }
    let to_itself = owns(netns, if is_accepted { *from } else { *to });
    // SAFETY: not null.
    if !to_itself && !mark::stays_inside(unsafe { (*sk).mark }) {
        return 0;
    }
    keep_inside(sk);
    if !to_itself || from.is(to) {
        return 0;
    }
    if is_accepted {
        // Not when the client's end is established: a handshake with a SYN cookie looks up the listener once
        // more, for the packet after that.
        let _ = BEGUN.remove(connection);
    } else if owns(netns, *from) && tells_its_end(&ctx) {
        // If the map refuses it, the SYN counts as somebody else's, and goes to the agent.
        let _ = BEGUN.insert(connection, 1, 0);
    }
    0
}

/// Makes this hook run when the socket's state changes. Returns `true` if it will.
#[inline(always)]
fn tells_its_end(ctx: &SockOpsContext) -> bool {
    let flags = ctx.cb_flags() | BPF_SOCK_OPS_STATE_CB_FLAG;
    ctx.set_cb_flags(flags as i32).is_ok()
}

/// Remembers on the socket that it may send by `lo` only.
#[inline(always)]
fn keep_inside(sk: *mut bpf_sock) {
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
        // The connection has begun and can no longer be refused; its mark keeps it inside unless the app
        // changes the mark or binds the socket to an interface.
        count(Counter::NotKept);
    } else {
        // SAFETY: not null, and the kernel runs this hook with the socket locked.
        unsafe { *stored = 1 };
    }
}

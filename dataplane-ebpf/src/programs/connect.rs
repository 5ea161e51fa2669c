//! Hook: a process of the pods' cgroup connects. Outbound capture.

use aya_ebpf::helpers::generated::{
    bpf_get_current_ancestor_cgroup_id, bpf_get_current_cgroup_id, bpf_get_netns_cookie,
    bpf_setsockopt,
};
use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use aya_log_ebpf::info;
use dataplane_ebpf::address::Ip;
use dataplane_ebpf::counter::Counter;
use dataplane_ebpf::decide::{self, Connect};
use dataplane_ebpf::event::{Event, Reason};
use dataplane_ebpf::mark;
use dataplane_ebpf::pod::Pod;

use crate::context;
use crate::maps::{count, node, report};
use crate::node_maps::{CGROUPS, INSIDE, PODS};

const ALLOW: i32 = 1;
const DENY: i32 = 0;

/// How deep cgroups are looked at for another pod's; deeper ones belong to what is above them.
const DEPTH: i32 = 12;

/// IPv4 connects.
#[cgroup_sock_addr(connect4)]
pub(crate) fn connect4(ctx: SockAddrContext) -> i32 {
    let (to, port) = context::connect4(&ctx);
    decide_connect(&ctx, &to, port)
}

/// IPv6 connects, and IPv4 ones of IPv6 sockets.
#[cgroup_sock_addr(connect6)]
pub(crate) fn connect6(ctx: SockAddrContext) -> i32 {
    let (to, port) = context::connect6(&ctx);
    decide_connect(&ctx, &to, port)
}

#[inline(always)]
fn decide_connect(ctx: &SockAddrContext, to: &Ip, port: u16) -> i32 {
    if !context::is_tcp(ctx) {
        return ALLOW;
    }
    // SAFETY: helpers that read the context and the current task.
    let (netns, cgroup) = unsafe {
        (
            bpf_get_netns_cookie(ctx.sock_addr.cast()),
            bpf_get_current_cgroup_id(),
        )
    };
    let node = node();
    if cgroup == node.agent_cgroup {
        return ALLOW;
    }
    // SAFETY: the agent replaces entries whole; a reader sees the old one or the new one.
    let Some(pod) = (unsafe { PODS.get(netns) }) else {
        // Not enrolled, or not any more: a mark that an earlier connect left must not steer.
        return if set_mark(ctx, false) { ALLOW } else { DENY };
    };
    let decision = decide::connect(&pod.addresses, to, is_foreign(pod, netns));
    if node.log != 0 {
        info!(
            ctx,
            "connect netns={} port={} captured={}",
            netns,
            port,
            u32::from(decision == Connect::Capture)
        );
    }
    let failed = match decision {
        Connect::Local => {
            count(Counter::Local);
            (!set_mark(ctx, false)).then_some(Reason::MarkFailed)
        }
        Connect::Capture if !keep_inside(ctx) => Some(Reason::StorageFailed),
        Connect::Capture => {
            count(Counter::Captured);
            (!set_mark(ctx, true)).then_some(Reason::MarkFailed)
        }
        Connect::Refuse(reason) => Some(reason),
    };
    let Some(reason) = failed else {
        return ALLOW;
    };
    count(Counter::Refused);
    report(Event {
        netns,
        cgroup,
        to: *to,
        pod: pod.addresses.all[0],
        reason: reason as u32,
        port: u32::from(port),
    });
    DENY
}

/// Whether the process is in the cgroup of another enrolled pod than the one whose namespace it is
/// in. A process that is in no pod's cgroup counts as the namespace's own.
#[inline(always)]
fn is_foreign(pod: &Pod, netns: u64) -> bool {
    // SAFETY: a helper that reads the current task.
    let ancestor = |level: i32| unsafe { bpf_get_current_ancestor_cgroup_id(level) };
    if ancestor(pod.cgroup_level as i32) == pod.cgroup {
        return false;
    }
    for level in 1..=DEPTH {
        // SAFETY: only compared; no reference outlives the call.
        if let Some(owner) = unsafe { CGROUPS.get(ancestor(level)) }
            && *owner != netns
        {
            return true;
        }
    }
    false
}

/// Sets our mark on the socket, or clears it; the application's bits stay.
#[inline(always)]
fn set_mark(ctx: &SockAddrContext, captured: bool) -> bool {
    const SOL_SOCKET: i32 = 1;
    const SO_MARK: i32 = 36;
    let sk = context::socket(ctx);
    if sk.is_null() {
        return false;
    }
    // SAFETY: not null, and the verifier allows this field.
    let old = unsafe { (*sk).mark };
    let mut new = mark::after_connect(old, captured);
    if !captured {
        release(ctx);
    }
    // SAFETY: the value lives on this stack, and its length is given.
    new == old
        || unsafe {
            bpf_setsockopt(
                ctx.sock_addr.cast(),
                SOL_SOCKET,
                SO_MARK,
                (&raw mut new).cast(),
                4,
            ) == 0
        }
}

/// Remembers on the socket that it sends by `lo` only, whatever becomes of its mark.
#[inline(always)]
fn keep_inside(ctx: &SockAddrContext) -> bool {
    let mut inside = 1;
    // SAFETY: the context's socket is locked by the connect.
    let stored = unsafe { INSIDE.get_or_insert_ptr_mut(ctx, Some(&mut inside)) };
    if stored.is_null() {
        return false;
    }
    // SAFETY: not null, and as above.
    unsafe { *stored = 1 };
    true
}

/// A socket that was captured and is connected elsewhere now is free again.
#[inline(always)]
fn release(ctx: &SockAddrContext) {
    // SAFETY: the context's socket is locked by the connect.
    let stored = unsafe { INSIDE.get_ptr_mut(ctx) };
    if !stored.is_null() {
        // SAFETY: not null, and as above.
        unsafe { *stored = 0 };
    }
}

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
    let pod = unsafe { PODS.get(netns) }.filter(|pod| pod.leaving == 0);
    let is_own = node.hosts[0] == netns
        || node.hosts[1] == netns
        || pod.is_some_and(|pod| ancestor(pod.cgroup_level as i32) == pod.cgroup);
    let owner = if is_own { 0 } else { owner() };
    let foreign = owner != 0 && owner != netns;
    let decision = match pod {
        Some(pod) => decide::connect(&pod.addresses, to, foreign),
        None => decide::connect_elsewhere(to, foreign),
    };
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
            if pod.is_some() {
                count(Counter::Local);
            }
            (!let_go(ctx)).then_some(Reason::MarkFailed)
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
    // SAFETY: as above.
    let whose = pod.or_else(|| unsafe { PODS.get(owner) });
    report(Event {
        netns,
        cgroup,
        to: *to,
        pod: whose.map_or(Ip::NONE, |pod| pod.addresses.all[0]),
        reason: reason as u32,
        port: u32::from(port),
    });
    DENY
}

/// The cookie of the namespace of the enrolled pod in whose cgroup the process is; 0 if it is in none,
/// and counts as its namespace's own.
#[inline(never)]
fn owner() -> u64 {
    for level in 1..=DEPTH {
        let cgroup = ancestor(level);
        if cgroup == 0 {
            return 0;
        }
        // SAFETY: only copied; no reference outlives the call.
        if let Some(owner) = unsafe { CGROUPS.get(cgroup) } {
            return *owner;
        }
    }
    0
}

/// The cgroup above the process's own at a level; 0 where it is not so deep.
#[inline(always)]
fn ancestor(level: i32) -> u64 {
    // SAFETY: a helper that reads the current task.
    unsafe { bpf_get_current_ancestor_cgroup_id(level) }
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

/// Frees a socket that was captured and is connected elsewhere now; what another one is marked with is
/// not ours.
#[inline(always)]
fn let_go(ctx: &SockAddrContext) -> bool {
    // SAFETY: the context's socket is locked by the connect.
    let stored = unsafe { INSIDE.get_ptr_mut(ctx) };
    // SAFETY: not null, and as above.
    if stored.is_null() || unsafe { *stored } == 0 {
        return true;
    }
    // SAFETY: as above.
    unsafe { *stored = 0 };
    set_mark(ctx, false)
}

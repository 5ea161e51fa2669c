//! Hook: a process of the pods' cgroup connects. Outbound capture.

use aya_ebpf::helpers::generated::{
    bpf_get_current_ancestor_cgroup_id, bpf_get_current_cgroup_id, bpf_get_netns_cookie,
    bpf_set_retval, bpf_setsockopt,
};
use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use aya_log_ebpf::info;
use dataplane_ebpf::address::Ip;
use dataplane_ebpf::counter::Counter;
use dataplane_ebpf::decide::{self, Asked, Connect};
use dataplane_ebpf::event::{Event, Reason};
use dataplane_ebpf::mark;
use dataplane_ebpf::pod;

use crate::context;
use crate::maps::{count, leaves, node, owns, report};
use crate::node_maps::{AGENT, CGROUPS, INSIDE, PODS};

const ALLOW: i32 = 1;
const DENY: i32 = 0;
const ENETUNREACH: i32 = 101;

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
    // SAFETY: the context's socket is locked by the connect.
    if !unsafe { AGENT.get_ptr_mut(ctx) }.is_null() {
        return ALLOW;
    }
    let Some(node) = node() else {
        return DENY; // an array has its entries from the start
    };
    let is_pod = PODS.get_ptr(netns).is_some() && !leaves(netns);
    let is_hosts = node.hosts[0] == netns || node.hosts[1] == netns;
    let other = if is_hosts { 0 } else { other(netns) };
    let foreign = other != 0;
    let decision = if is_pod {
        let asked = Asked {
            foreign,
            own: owns(netns, *to),
            family: owns(netns, to.family()),
            interface: has_interface(ctx, netns, to),
        };
        decide::connect(asked, to)
    } else {
        decide::connect_elsewhere(to, foreign)
    };
    let captured = decision == Connect::Capture;
    if node.log != 0 {
        log_connect(netns, port.into(), captured.into());
    }
    let failed = match decision {
        Connect::Refuse(reason) => Some(reason),
        Connect::Pass => (!let_go(ctx)).then_some(Reason::MarkFailed),
        // Even a local connection must stay inside: the pod may lose the address.
        Connect::Local | Connect::Capture if !keep_inside(ctx) => Some(Reason::StorageFailed),
        Connect::Local | Connect::Capture => {
            count(match captured {
                true => Counter::Captured,
                false => Counter::Local,
            });
            (!set_mark(ctx, captured)).then_some(Reason::MarkFailed)
        }
    };
    let Some(reason) = failed else {
        return ALLOW;
    };
    count(Counter::Refused);
    report(Event {
        netns,
        cgroup,
        to: *to,
        pod: first(if is_pod { netns } else { other }),
        reason: reason as u32,
        port: u32::from(port),
    });
    if let Reason::NoAddress | Reason::NoRoute = reason {
        // The error that a pod of one family gets without a mesh; all others are `EPERM`.
        // SAFETY: a helper that takes a number.
        unsafe { bpf_set_retval(-ENETUNREACH) };
    }
    DENY
}

/// Logs the decision about a connect.
///
/// An exported function is verified once, for any arguments, and not at each call. Inlined, the eight sizes
/// that aya may reserve for a line would be walked through for each decision. The kernel requires such a
/// function to return a number.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn log_connect(netns: u64, port: u32, captured: u32) -> u32 {
    info!((), target: "kernel", "connect netns={} port={} captured={}", netns, port, captured);
    0
}

/// Returns `true` if the socket is bound to no interface, or to one by which it can be captured to `to`.
#[inline(always)]
fn has_interface(ctx: &SockAddrContext, netns: u64, to: &Ip) -> bool {
    let sk = context::socket(ctx);
    if sk.is_null() {
        return false;
    }
    // SAFETY: not null, and the verifier allows this field.
    let index = unsafe { (*sk).bound_dev_if };
    matches!(index, 0 | context::LO) || owns(netns, Ip::interface(index, to))
}

/// Returns a pod's first address, for a report.
#[inline(always)]
fn first(netns: u64) -> Ip {
    // SAFETY: the value is only copied, and nothing is decided by it: while the element is being reused, the
    // report has a wrong address.
    unsafe { PODS.get(netns) }.copied().unwrap_or(Ip::NONE)
}

/// Returns the namespace cookie of another enrolled pod in whose cgroup the process is; 0 if there is none,
/// or if the process is in one of `netns` too, and so counts as that namespace's own.
#[inline(never)]
fn other(netns: u64) -> u64 {
    let mut other = 0;
    for level in 1..pod::DEPTH as i32 + 1 {
        let cgroup = ancestor(level);
        if cgroup == 0 {
            break;
        }
        // SAFETY: the value is only copied; while the element is being reused it is another pod's namespace,
        // for which the connect is refused.
        if let Some(owner) = unsafe { CGROUPS.get(cgroup) } {
            if *owner == netns {
                return 0;
            }
            other = *owner;
        }
    }
    other
}

/// Returns the process's ancestor cgroup at a level; 0 if its own is not so deep.
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

/// Remembers on the socket that it may send by `lo` only, whatever becomes of its mark.
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

/// Releases a socket that was a pod's and now connects elsewhere. The mark of any other socket is not ours,
/// and stays.
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

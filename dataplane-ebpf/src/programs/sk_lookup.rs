//! Hook: the kernel looks up a listener in a pod's namespace. This captures inbound connections, and hands
//! over outbound ones that the capture route has brought back.

use aya_ebpf::bindings::sk_action::{SK_DROP, SK_PASS};
use aya_ebpf::macros::{map, sk_lookup};
use aya_ebpf::maps::{Array, SockMap};
use aya_ebpf::programs::SkLookupContext;
use aya_log_ebpf::info;
use dataplane_ebpf::counter::Counter;
use dataplane_ebpf::decide::{self, Owns, Steer};
use dataplane_ebpf::event::{Event, Reason};
use dataplane_ebpf::listener::ListenerKind;
use dataplane_ebpf::pod::{Begun, Steered};

use crate::context::{self, Syn, in_memory};
use crate::maps::{BEGUN, count, leaves, node, owns, report};

/// The agent's listeners in this pod. Written by the agent; the kernel removes a listener that is closed.
#[map]
static LISTENERS: SockMap = SockMap::with_max_entries(ListenerKind::COUNT as u32, 0);

/// The pod of this instance; one entry, written by the agent before it attaches the program.
#[map]
static POD: Array<Steered> = Array::with_max_entries(1, 0);

/// Fails closed: without a listener of the agent the SYN is dropped. If it passed, the pod's own wildcard
/// listener would get traffic that no policy has seen.
#[sk_lookup]
pub(crate) fn steer(ctx: SkLookupContext) -> u32 {
    let (Some(pod), Some(node)) = (POD.get(0), node()) else {
        return SK_DROP; // arrays have their entries from the start
    };
    let Some(Syn { connection, by_lo }) = context::syn(&ctx, pod.netns) else {
        return SK_PASS; // not TCP
    };
    let connection = in_memory(&connection);
    let Begun { from, to, .. } = connection;
    let to_port = connection.to_port as u16;
    let owns = Owns {
        from: owns(pod.netns, *from),
        to: owns(pod.netns, *to),
    };
    let begun = || BEGUN.get_ptr(connection).is_some();
    let mut steer = decide::steer(owns, from, to, to_port, by_lo, begun);
    if leaves(pod.netns) {
        steer = steer.of_one_that_leaves();
    }
    if node.log != 0 {
        log_steer(
            to_port.into(),
            match steer {
                Steer::Agent(listener) => listener.place(),
                Steer::App => ListenerKind::COUNT as u32,
            },
        );
    }
    let Steer::Agent(listener) = steer else {
        return SK_PASS;
    };
    if LISTENERS
        .redirect_sk_lookup(&ctx, listener.place(), 0)
        .is_err()
    {
        count(Counter::NoListener);
        report(Event {
            netns: pod.netns,
            cgroup: 0,
            to: *to,
            pod: pod.first,
            reason: Reason::NoListener as u32,
            port: u32::from(to_port),
        });
        return SK_DROP;
    }
    count(listener.counter());
    SK_PASS
}

/// Logs where a SYN goes. The function is exported, so that it is verified once, for any arguments, and not
/// for each way that a SYN may go. The kernel requires such a function to return a number.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn log_steer(port: u32, to: u32) -> u32 {
    info!((), target: "kernel", "steer port={} to={}", port, to);
    0
}

//! Hook: a listener is looked up in a pod's namespace. Inbound capture, and the end of the
//! outbound capture's route.

use aya_ebpf::bindings::sk_action::{SK_DROP, SK_PASS};
use aya_ebpf::macros::{map, sk_lookup};
use aya_ebpf::maps::{Array, SockMap};
use aya_ebpf::programs::SkLookupContext;
use aya_log_ebpf::info;
use dataplane_ebpf::counter::Counter;
use dataplane_ebpf::decide::{self, Owns, Steer};
use dataplane_ebpf::event::{Event, Reason};
use dataplane_ebpf::pod::{Begun, Steered, listener};

use crate::context::{self, Syn};
use crate::maps::{BEGUN, count, leaves, node, owns, report};

/// The agent's listeners in this pod. Written by the agent; a listener that is closed leaves.
#[map]
static LISTENERS: SockMap = SockMap::with_max_entries(listener::COUNT, 0);

/// Whose instance this is; one entry, written by the agent before it attaches the program.
#[map]
static POD: Array<Steered> = Array::with_max_entries(1, 0);

/// Fails closed: without a listener of the agent the SYN is dropped. Passing it would give the
/// pod's own wildcard listener traffic that no policy has seen.
#[sk_lookup]
pub(crate) fn steer(ctx: SkLookupContext) -> u32 {
    let Some(Syn {
        from,
        to,
        from_port,
        to_port,
        by_lo,
    }) = context::syn(&ctx)
    else {
        return SK_PASS; // not TCP
    };
    let Some(pod) = POD.get(0) else {
        return SK_DROP; // an array has its entries from the start
    };
    let owns = Owns {
        from: owns(pod.netns, from),
        to: owns(pod.netns, to),
    };
    let begun = || {
        let connection = Begun {
            netns: pod.netns,
            from,
            to,
            from_port: u32::from(from_port),
            to_port: u32::from(to_port),
        };
        BEGUN.get_ptr(connection).is_some()
    };
    let mut steer = decide::steer(owns, &from, &to, to_port, by_lo, begun);
    if leaves(pod.netns) {
        steer = steer.of_one_that_leaves();
    }
    if node().log != 0 {
        info!(
            &ctx,
            "steer port={} to={}",
            to_port,
            steer.listener().unwrap_or(listener::COUNT)
        );
    }
    let Some(place) = steer.listener() else {
        return SK_PASS;
    };
    if LISTENERS.redirect_sk_lookup(&ctx, place, 0).is_err() {
        count(Counter::NoListener);
        report(Event {
            netns: pod.netns,
            cgroup: 0,
            to,
            pod: pod.first,
            reason: Reason::NoListener as u32,
            port: u32::from(to_port),
        });
        return SK_DROP;
    }
    count(match steer {
        Steer::Outbound => Counter::SteeredOutbound,
        Steer::Hbone => Counter::SteeredHbone,
        Steer::Inbound | Steer::App => Counter::SteeredInbound,
    });
    SK_PASS
}

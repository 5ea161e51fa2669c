//! Hook: a socket of the pods' cgroup sends a packet. Captured connections must stay in the pod.
//!
//! CAP_NET_RAW is enough to change a socket's mark, and binding to an interface needs nothing at
//! all; either would send a captured connection's payload out in clear.

use aya_ebpf::helpers::generated::{bpf_sk_fullsock, bpf_sk_storage_get};
use aya_ebpf::macros::cgroup_skb;
use aya_ebpf::programs::SkBuffContext;
use dataplane_ebpf::counter::Counter;

use crate::context::LO;
use crate::maps::count;
use crate::node_maps::inside;

const ALLOW: i32 = 1;
const DROP: i32 = 0;

/// Drops packets that a captured socket, or the app's end of an agent's connection, sends by another interface.
#[cgroup_skb(egress)]
pub(crate) fn egress(ctx: SkBuffContext) -> i32 {
    let skb = ctx.skb.skb;
    // SAFETY: the kernel passes a valid context for the length of the call.
    let (interface, sk) = unsafe { ((*skb).ifindex, (*skb).__bindgen_anon_2.sk) };
    if interface == LO || sk.is_null() {
        return ALLOW;
    }
    // SAFETY: not null.
    let sk = unsafe { bpf_sk_fullsock(sk) };
    if sk.is_null() {
        return ALLOW;
    }
    // SAFETY: not null; the storage is only read.
    let inside = unsafe {
        let stored =
            bpf_sk_storage_get(inside(), sk.cast(), core::ptr::null_mut(), 0).cast::<u32>();
        !stored.is_null() && *stored != 0
    };
    if inside {
        count(Counter::KeptInside);
        return DROP;
    }
    ALLOW
}

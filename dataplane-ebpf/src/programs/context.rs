//! The only reads of kernel contexts: byte order is settled here.

#![allow(dead_code, reason = "each object uses its own part")]

use aya_ebpf::bindings::{bpf_sock, bpf_sock_addr, bpf_sock_ops};
use aya_ebpf::programs::{SkLookupContext, SockAddrContext};
use dataplane_ebpf::address::Ip;

/// The loopback interface has this number in every network namespace.
pub(crate) const LO: u32 = 1;
/// `IPPROTO_TCP`.
pub(crate) const TCP: u32 = 6;
/// `AF_INET`.
pub(crate) const INET: u32 = 2;

/// Where an IPv4 connect goes.
#[inline(always)]
pub(crate) fn connect4(ctx: &SockAddrContext) -> (Ip, u16) {
    // SAFETY: the kernel passes a valid context for the length of the call.
    let context: &bpf_sock_addr = unsafe { &*ctx.sock_addr };
    (Ip::v4(context.user_ip4), port(context))
}

/// Where an IPv6 connect goes; an IPv4 address may stand in it.
#[inline(always)]
pub(crate) fn connect6(ctx: &SockAddrContext) -> (Ip, u16) {
    // SAFETY: as in `connect4`.
    let context: &bpf_sock_addr = unsafe { &*ctx.sock_addr };
    let words = context.user_ip6;
    (
        Ip::v6([words[0], words[1], words[2], words[3]]),
        port(context),
    )
}

#[inline(always)]
fn port(context: &bpf_sock_addr) -> u16 {
    u16::from_be(context.user_port as u16)
}

/// Whether the socket is a TCP one; MPTCP says so too.
#[inline(always)]
pub(crate) fn is_tcp(ctx: &SockAddrContext) -> bool {
    // SAFETY: as in `connect4`.
    unsafe { (*ctx.sock_addr).protocol == TCP }
}

/// The connecting socket.
#[inline(always)]
pub(crate) fn socket(ctx: &SockAddrContext) -> *mut bpf_sock {
    // SAFETY: as in `connect4`; the field is a pointer in every variant of the union.
    unsafe { (*ctx.sock_addr).__bindgen_anon_1.sk }
}

/// Reads a field. The verifier wants each at a constant offset: volatile, and all of them whatever the
/// family (the other one's read as zero), so that the compiler does not make one read of two.
macro_rules! field {
    ($context:ident, $($path:tt)+) => {
        // SAFETY: the kernel passes a valid context for the length of the call.
        unsafe { core::ptr::read_volatile(&raw const (*$context).$($path)+) }
    };
}
/// Reads the four words of an IPv6 address.
macro_rules! words {
    ($context:ident, $name:ident) => {
        [
            field!($context, $name[0]),
            field!($context, $name[1]),
            field!($context, $name[2]),
            field!($context, $name[3]),
        ]
    };
}

/// A SYN for which a listener is looked up.
pub(crate) struct Syn {
    /// Who sends it.
    pub(crate) from: Ip,
    /// Where it goes.
    pub(crate) to: Ip,
    /// The port that it comes from.
    pub(crate) from_port: u16,
    /// The port that it goes to.
    pub(crate) to_port: u16,
    /// Whether it came by `lo`.
    pub(crate) by_lo: bool,
}

/// Reads the SYN; none if it is not TCP.
#[inline(always)]
pub(crate) fn syn(ctx: &SkLookupContext) -> Option<Syn> {
    let lookup = ctx.lookup;
    if field!(lookup, protocol) != TCP {
        return None;
    }
    let v4 = (
        Ip::v4(field!(lookup, remote_ip4)),
        Ip::v4(field!(lookup, local_ip4)),
    );
    let v6 = (
        Ip::v6(words!(lookup, remote_ip6)),
        Ip::v6(words!(lookup, local_ip6)),
    );
    let (from, to) = if field!(lookup, family) == INET {
        v4
    } else {
        v6
    };
    Some(Syn {
        from,
        to,
        from_port: u16::from_be(field!(lookup, remote_port)),
        to_port: field!(lookup, local_port) as u16,
        by_lo: field!(lookup, ingress_ifindex) == LO,
    })
}

/// A connection of a TCP socket, as it begins.
pub(crate) struct Connection {
    /// The socket's own address.
    pub(crate) own: Ip,
    /// The other end's.
    pub(crate) other: Ip,
    /// The socket's own port.
    pub(crate) own_port: u32,
    /// The other end's.
    pub(crate) other_port: u32,
}

/// Reads it.
#[inline(always)]
pub(crate) fn connection(ops: *mut bpf_sock_ops) -> Connection {
    let v4 = (
        Ip::v4(field!(ops, local_ip4)),
        Ip::v4(field!(ops, remote_ip4)),
    );
    let v6 = (
        Ip::v6(words!(ops, local_ip6)),
        Ip::v6(words!(ops, remote_ip6)),
    );
    let (own, other) = if field!(ops, family) == INET { v4 } else { v6 };
    Connection {
        own,
        other,
        own_port: field!(ops, local_port),
        other_port: u32::from_be(field!(ops, remote_port)),
    }
}

//! The only code that reads kernel contexts; it converts the byte order.

#![allow(dead_code, reason = "each object uses its own part")]

use aya_ebpf::bindings::{bpf_sock, bpf_sock_addr, bpf_sock_ops};
use aya_ebpf::programs::{SkLookupContext, SockAddrContext};
use dataplane_ebpf::address::Ip;
use dataplane_ebpf::pod::Begun;

/// The index of `lo`, in every network namespace.
pub(crate) const LO: u32 = 1;
/// `IPPROTO_TCP`.
pub(crate) const TCP: u32 = 6;
/// `AF_INET`.
pub(crate) const INET: u32 = 2;

/// Returns the destination of an IPv4 connect.
#[inline(always)]
pub(crate) fn connect4(ctx: &SockAddrContext) -> (Ip, u16) {
    // SAFETY: the kernel passes a valid context for the length of the call.
    let context: &bpf_sock_addr = unsafe { &*ctx.sock_addr };
    (Ip::v4(context.user_ip4), port(context))
}

/// Returns the destination of an IPv6 connect, which may be an IPv4 address.
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

/// Returns `true` for a TCP socket, also for an MPTCP one.
#[inline(always)]
pub(crate) fn is_tcp(ctx: &SockAddrContext) -> bool {
    // SAFETY: as in `connect4`.
    unsafe { (*ctx.sock_addr).protocol == TCP }
}

/// Returns the connecting socket.
#[inline(always)]
pub(crate) fn socket(ctx: &SockAddrContext) -> *mut bpf_sock {
    // SAFETY: as in `connect4`; the field is a pointer in every variant of the union.
    unsafe { (*ctx.sock_addr).__bindgen_anon_1.sk }
}

/// Reads a field. The verifier wants a constant offset for each, so all are read, volatile, whatever the
/// family (those of the other one are zero), lest the compiler merge two reads into one.
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

/// Returns the IPv4 address if the family is `AF_INET`, or else the IPv6 one.
macro_rules! address {
    ($context:ident, $v4:ident, $v6:ident) => {
        Ip::v4_if_zero(
            field!($context, family) ^ INET,
            field!($context, $v4),
            words!($context, $v6),
        )
    };
}

/// A SYN for which a listener is looked up.
pub(crate) struct Syn {
    /// The connection that it begins.
    pub(crate) connection: Begun,
    /// `true` if it came by `lo`.
    pub(crate) by_lo: bool,
}

/// Reads the SYN that has come to this namespace; `None` if it is not TCP.
#[inline(always)]
pub(crate) fn syn(ctx: &SkLookupContext, netns: u64) -> Option<Syn> {
    let lookup = ctx.lookup;
    if field!(lookup, protocol) != TCP {
        return None;
    }
    Some(Syn {
        connection: Begun {
            netns,
            from: address!(lookup, remote_ip4, remote_ip6),
            to: address!(lookup, local_ip4, local_ip6),
            from_port: u16::from_be(field!(lookup, remote_port)).into(),
            to_port: field!(lookup, local_port),
        },
        by_lo: field!(lookup, ingress_ifindex) == LO,
    })
}

/// A TCP socket's connection, seen from the socket.
pub(crate) struct Connection {
    /// The socket's own address.
    pub(crate) own: Ip,
    /// The other end's address.
    pub(crate) other: Ip,
    /// The socket's own port.
    pub(crate) own_port: u32,
    /// The other end's port.
    pub(crate) other_port: u32,
}

/// Reads the connection of the socket for which the hook runs.
#[inline(always)]
pub(crate) fn connection(ops: *mut bpf_sock_ops) -> Connection {
    Connection {
        own: address!(ops, local_ip4, local_ip6),
        other: address!(ops, remote_ip4, remote_ip6),
        own_port: field!(ops, local_port),
        other_port: u32::from_be(field!(ops, remote_port)),
    }
}

/// Returns the same connection, but has it read from memory at each use: words in registers would be saved on
/// the stack around each call, in 8 bytes each.
#[inline(always)]
pub(crate) fn in_memory(connection: &Begun) -> &Begun {
    core::hint::black_box(connection)
}

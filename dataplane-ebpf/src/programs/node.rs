//! Kernel programs that are attached once per node, to the cgroup that holds the pods.

#![no_std]
#![no_main]
#![allow(
    clippy::needless_pass_by_value,
    reason = "aya passes the context by value"
)]

mod connect;
mod context;
mod egress;
mod maps;
mod node_maps;
mod sock_ops;

/// The kernel allows some helpers to GPL-compatible programs only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

/// Unreachable: the verifier refuses a program in which this could be reached.
#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

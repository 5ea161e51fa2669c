//! The kernel program that is loaded once per pod: no kernel tells `sk_lookup` its namespace, so each pod has
//! an instance of the program, with maps of its own.

#![no_std]
#![no_main]
#![allow(
    clippy::needless_pass_by_value,
    reason = "aya passes the context by value"
)]

mod context;
mod maps;
mod sk_lookup;

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

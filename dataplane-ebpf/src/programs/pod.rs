//! The kernel program that is loaded once per pod: no kernel lets `sk_lookup` ask for the
//! namespace, so each pod has an instance of the program, with maps of its own.

#![no_std]
#![no_main]
#![allow(
    clippy::needless_pass_by_value,
    reason = "aya passes a program its context so"
)]

mod context;
mod maps;
mod sk_lookup;

/// The kernel lends some helpers to GPL-compatible programs only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

/// Unreachable: a program in which this could be reached is refused by the verifier.
#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

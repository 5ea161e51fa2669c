//! What the kernel programs decide, from any addresses.
#![no_main]

use dataplane_ebpf::address::Ip;
use dataplane_ebpf::decide::{Connect, Steer, connect, steer};
use dataplane_ebpf::pod::{ADDRESSES, Addresses};
use libfuzzer_sys::fuzz_target;

type Case = ([[u32; 4]; ADDRESSES], [u32; 4], [u32; 4], u16, bool);

fuzz_target!(|case: Case| {
    let (own, from, to, port, by_lo) = case;
    let pod = Addresses {
        all: own.map(|words| Ip { words }),
    };
    let (from, to) = (Ip { words: from }, Ip { words: to });
    if connect(&pod, &to, false) == Connect::Capture {
        assert!(!to.is_loopback() && !pod.owns(&to), "what is its own is not captured");
    }
    let steered = steer(&pod, &from, &to, port, by_lo);
    if steered == Steer::App && !to.is_loopback() {
        assert!(pod.owns(&to) && (by_lo || pod.owns(&from)), "nobody else reaches the app");
    }
});

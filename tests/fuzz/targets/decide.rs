#![no_main]
#![allow(missing_docs, reason = "see dataplane_fuzz::decide")]
libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    dataplane_fuzz::decide(input);
});

#![no_main]
#![allow(missing_docs, reason = "see dataplane_fuzz::headers")]
libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    dataplane_fuzz::headers(input);
});

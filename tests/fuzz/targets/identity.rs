#![no_main]
#![allow(missing_docs, reason = "see dataplane_fuzz::identity")]
libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    dataplane_fuzz::identity(input);
});

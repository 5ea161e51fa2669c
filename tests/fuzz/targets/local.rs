//! ztunnel's local file; its YAML goes through the same reader as manifests.
#![no_main]

use std::path::Path;

use dataplane_agent::control::local;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Err(error) = local::parse(Path::new("fuzzed"), text, "node") {
        assert!(error.to_string().starts_with("fuzzed"));
    }
});

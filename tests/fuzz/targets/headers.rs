//! What a peer writes into a CONNECT request.
#![no_main]

use dataplane_agent::hbone::headers;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Some(address) = headers::authority(text) {
        // Only one spelling of an address is taken, up to IPv6's abbreviations.
        assert_eq!(headers::authority(&address.to_string()), Some(address));
    }
    if let Some(host) = headers::forwarded_host(text) {
        assert!(!host.is_empty() && text.contains(host));
    }
});

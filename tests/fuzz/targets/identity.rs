//! What a peer's certificate says it is.
#![no_main]

use dataplane_agent::identity::Identity;
use dataplane_agent::identity::tls::peer_identity;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(identity) = std::str::from_utf8(bytes).unwrap_or_default().parse::<Identity>() {
        assert_eq!(identity.to_string().as_bytes(), bytes);
    }
    let _ = peer_identity(&[bytes.into()]);
});

use std::path::Path;

use super::breaches;

/// Returns the breaches of a file, as `line:room`.
fn used(path: &str, text: &str) -> Vec<String> {
    breaches(Path::new(path), text)
        .into_iter()
        .map(|breach| format!("{}:{}", breach.line, breach.uses))
        .collect()
}

#[test]
fn a_room_may_use_the_one_before_it_and_what_is_lent() {
    let text = "use crate::proxy::accept::Accepted;\nuse crate::{proxy::identity::Certs, sys, config, drain};";
    assert!(used("proxy/resolve/route.rs", text).is_empty());
    assert!(used("proxy/resolve/mod.rs", "use crate::proxy::resolve::route;").is_empty());
    assert!(used("proxy/resolve/mod.rs", "use crate::mesh::Mesh;").is_empty());
    assert!(used("proxy/resolve/mod.rs", "use dataplane_ebpf::decide;").is_empty());
}

#[test]
fn a_use_declaration_is_seen() {
    assert_eq!(
        used("proxy/resolve/mod.rs", "\nuse crate::proxy::transport;"),
        ["2:proxy::transport"]
    );
    assert_eq!(
        used(
            "proxy/resolve/mod.rs",
            "pub use crate :: proxy::transport::carry;"
        ),
        ["1:proxy::transport"]
    );
}

#[test]
fn a_group_is_seen_at_its_heads_only() {
    let text = "use crate::{\n    agent::{Agent, transport},\n    proxy::{\n    accept::{Accepted, transport},\n    \
                transport::{carry, plain},\n}, control};";
    let uses = ["2:agent", "5:proxy::transport", "6:control"];
    assert_eq!(used("proxy/resolve/mod.rs", text), uses);
}

#[test]
fn a_half_is_not_used_as_a_whole() {
    for text in [
        "use crate::proxy;",
        "use super::super::proxy as other;",
        "use crate::{proxy, mesh};",
    ] {
        assert_eq!(used("node/capture/mod.rs", text), ["1:proxy"], "{text}");
    }
    assert_eq!(
        used("node/capture/mod.rs", "use crate::proxy::*;"),
        ["1:proxy::*"]
    );
    let text = "use crate::node::{self, capture};";
    assert_eq!(
        used("seam/mod.rs", text),
        ["1:node::self", "1:node::capture"]
    );
}

#[test]
fn the_halves_meet_in_the_seam_alone() {
    let text = "use crate::{seam, node::capture, proxy::{workers, identity}};";
    assert_eq!(
        used("node/capture/mod.rs", text),
        ["1:proxy::workers", "1:proxy::identity"]
    );
    assert_eq!(used("proxy/workers.rs", text), ["1:node::capture"]);
    assert_eq!(used("seam/mod.rs", text).len(), 3);
}

#[test]
fn an_inline_path_is_seen() {
    let text = "fn f() -> u8 {\n    crate::proxy::transport::carry()\n}";
    assert_eq!(used("proxy/resolve/route.rs", text), ["2:proxy::transport"]);
}

#[test]
fn a_path_that_climbs_to_the_crate_is_seen() {
    assert_eq!(
        used("proxy/resolve/mod.rs", "use super::transport;"),
        ["1:proxy::transport"]
    );
    assert!(used("proxy/resolve/route.rs", "use super::transport;").is_empty());
    assert_eq!(
        used("proxy/resolve/route.rs", "use super::super::transport;"),
        ["1:proxy::transport"]
    );
    let inner =
        "mod a {\n mod b { use super::super::transport; }\n use super::super::transport;\n}";
    assert_eq!(used("proxy/resolve/mod.rs", inner), ["3:proxy::transport"]);
    let far = "use super::super::super::transport;\nuse super::super::super::super::control;";
    let uses = ["1:proxy::transport", "2:control"];
    assert_eq!(used("proxy/resolve/route/tests.rs", far), uses);
}

#[test]
fn tests_are_not_exempt() {
    let text = "#[cfg(test)]\nmod tests {\n    use crate::proxy::transport::carry;\n}";
    assert_eq!(used("proxy/resolve/mod.rs", text), ["3:proxy::transport"]);
}

#[test]
fn comments_and_strings_are_passed_over() {
    let text = r##"
        // crate::proxy::transport
        /* crate::proxy::transport /* crate::control */ crate::proxy::transport */
        //! [`crate::proxy::transport`]
        const A: &str = "crate::proxy::transport \" crate::proxy::transport";
        const B: &str = r#"crate::proxy::transport " crate::proxy::transport"#;
        const C: &[u8] = b"crate::proxy::transport";
        const D: char = '"';
        fn f<'a>(x: &'a str) -> char { '\'' }
        use crate::control;
    "##;
    assert_eq!(used("proxy/resolve/mod.rs", text), ["10:control"]);
}

#[test]
fn nothing_walks_back_and_no_room_is_skipped() {
    assert_eq!(
        used("node/capture/mod.rs", "use crate::proxy::accept::Accepted;"),
        ["1:proxy::accept"]
    );
    assert_eq!(
        used(
            "proxy/transport/mod.rs",
            "use crate::proxy::resolve::Resolved;"
        ),
        ["1:proxy::resolve"]
    );
    assert_eq!(
        used("observe/mod.rs", "use crate::proxy::transport::End;"),
        ["1:proxy::transport"]
    );
    assert_eq!(
        used("proxy/accept/mod.rs", "use crate::control::xds;"),
        ["1:control"]
    );
    assert_eq!(
        used("proxy/transport/mod.rs", "use crate::proxy::connection;"),
        ["1:proxy::connection"]
    );
}

#[test]
fn those_above_the_rooms_use_all() {
    let text =
        "use crate::{node::capture, proxy::{accept, resolve, authorize, transport}, control};";
    for file in [
        "agent.rs",
        "proxy/mod.rs",
        "main.rs",
        "lib.rs",
        "cli/why.rs",
    ] {
        assert!(used(file, text).is_empty(), "{file}");
    }
}

#[test]
fn control_fills_stores_and_calls_nobody() {
    let text = "use crate::{mesh, proxy::resolve, agent};";
    assert_eq!(
        used("control/xds.rs", text),
        ["1:proxy::resolve", "1:agent"]
    );
}

#[test]
fn the_ground_floor_looks_up_at_nobody() {
    let text = "use crate::{mesh, proxy::identity, observe, sys};";
    let uses = ["1:proxy::identity", "1:observe", "1:sys"];
    assert_eq!(used("mesh/workload.rs", text), uses);
}

use std::path::Path;

use super::breaches;

/// What a file uses that it may not, as `line:room`.
fn used(path: &str, text: &str) -> Vec<String> {
    breaches(Path::new(path), text)
        .into_iter()
        .map(|breach| format!("{}:{}", breach.line, breach.uses))
        .collect()
}

#[test]
fn a_room_may_use_the_one_before_it_and_what_is_lent() {
    let text = "use crate::accept::Accepted;\nuse crate::{identity::Identity, sys, config, drain};";
    assert!(used("resolve/route.rs", text).is_empty());
    assert!(used("resolve/mod.rs", "use crate::resolve::route;").is_empty());
    assert!(used("resolve/mod.rs", "use crate::mesh::Mesh;").is_empty());
    assert!(used("resolve/mod.rs", "use dataplane_ebpf::decide;").is_empty());
}

#[test]
fn a_use_declaration_is_seen() {
    assert_eq!(
        used("resolve/mod.rs", "\nuse crate::transport;"),
        ["2:transport"]
    );
    assert_eq!(
        used("resolve/mod.rs", "pub use crate :: transport::carry;"),
        ["1:transport"]
    );
}

#[test]
fn a_group_is_seen_at_its_heads_only() {
    let text =
        "use crate::{\n    accept::{Accepted, transport},\n    transport::{carry, plain},\n};";
    assert_eq!(used("resolve/mod.rs", text), ["3:transport"]);
}

#[test]
fn an_inline_path_is_seen() {
    let text = "fn f() -> u8 {\n    crate::transport::carry()\n}";
    assert_eq!(used("resolve/route.rs", text), ["2:transport"]);
}

#[test]
fn a_path_that_climbs_to_the_crate_is_seen() {
    assert_eq!(
        used("resolve/mod.rs", "use super::transport;"),
        ["1:transport"]
    );
    assert!(used("resolve/route.rs", "use super::transport;").is_empty());
    assert_eq!(
        used("resolve/route.rs", "use super::super::transport;"),
        ["1:transport"]
    );
    let inner =
        "mod a {\n mod b { use super::super::transport; }\n use super::super::transport;\n}";
    assert_eq!(used("resolve/mod.rs", inner), ["3:transport"]);
}

#[test]
fn tests_are_not_exempt() {
    let text = "#[cfg(test)]\nmod tests {\n    use crate::transport::carry;\n}";
    assert_eq!(used("resolve/mod.rs", text), ["3:transport"]);
}

#[test]
fn comments_and_strings_are_passed_over() {
    let text = r##"
        // crate::transport
        /* crate::transport /* crate::control */ crate::transport */
        //! [`crate::transport`]
        const A: &str = "crate::transport \" crate::transport";
        const B: &str = r#"crate::transport " crate::transport"#;
        const C: &[u8] = b"crate::transport";
        const D: char = '"';
        fn f<'a>(x: &'a str) -> char { '\'' }
        use crate::control;
    "##;
    assert_eq!(used("resolve/mod.rs", text), ["10:control"]);
}

#[test]
fn nothing_walks_back_and_no_room_is_skipped() {
    assert_eq!(
        used("capture/mod.rs", "use crate::accept::Accepted;"),
        ["1:accept"]
    );
    assert_eq!(
        used("transport/mod.rs", "use crate::resolve::Resolved;"),
        ["1:resolve"]
    );
    assert_eq!(
        used("observe/mod.rs", "use crate::transport::End;"),
        ["1:transport"]
    );
    assert_eq!(
        used("accept/mod.rs", "use crate::control::xds;"),
        ["1:control"]
    );
    assert_eq!(
        used("transport/mod.rs", "use crate::journey;"),
        ["1:journey"]
    );
}

#[test]
fn those_above_the_rooms_use_all() {
    let text = "use crate::{capture, accept, resolve, authorize, transport, control};";
    for file in ["agent.rs", "journey.rs", "main.rs", "lib.rs", "cli/why.rs"] {
        assert!(used(file, text).is_empty(), "{file}");
    }
}

#[test]
fn control_fills_stores_and_calls_nobody() {
    let text = "use crate::{mesh, capture, resolve, agent};";
    assert_eq!(used("control/xds.rs", text), ["1:resolve", "1:agent"]);
}

#[test]
fn the_ground_floor_looks_up_at_nobody() {
    let text = "use crate::{mesh, identity, observe, sys};";
    let uses = ["1:identity", "1:observe", "1:sys"];
    assert_eq!(used("mesh/workload.rs", text), uses);
}

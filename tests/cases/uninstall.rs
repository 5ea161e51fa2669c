//! `dataplane uninstall` as people run it, also wrongly: nothing is touched that is not an agent's, and all that is
//! left is reported.

#![allow(missing_docs, reason = "tests are named for what they show")]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::ExitStatus;

use dataplane_tests::agent::CAPABILITIES;
use dataplane_tests::command::{dataplane, run, uninstall};
use dataplane_tests::one::tree;
use dataplane_tests::process::place;
use dataplane_tests::world::Mounted;
use dataplane_tests::{SingleNode, World};

const PORT: u16 = 7000;

/// Returns `true` if nothing of a node is known. The exit status depends on other agents on this machine, as
/// other tests run at the same time.
fn is_unknown(status: ExitStatus, said: &str) -> bool {
    let others = said.contains("links of a dataplane agent's programs are on this machine");
    let good = said.contains("no program or rule of an agent is on this machine");
    let as_told = match status.code() {
        Some(0) => good,
        Some(1) => others,
        _ => false,
    };
    as_told && said.contains("nothing of node")
}

#[test]
fn uninstall_touches_nothing_that_is_not_an_agents_whatever_it_is_told() {
    let world = World::new();
    let scratch = tempfile::tempdir().expect("a folder");
    let (run_dir, outside) = (scratch.path().join("run"), scratch.path().join("outside"));
    for folder in [
        &run_dir.join("two/pods"),
        &run_dir.join("notours/pods"),
        &outside,
    ] {
        fs::create_dir_all(folder).expect("a folder");
        fs::write(folder.join("precious"), "precious").expect("a file");
    }
    fs::write(run_dir.join("notours/precious"), "precious").expect("a file");
    fs::write(run_dir.join("notours/lock"), "").expect("a file");
    symlink(&outside, run_dir.join("linked")).expect("a link");
    for pin in ["dataplane/two/v1/pods", "dataplane/notours/v1/pods"] {
        fs::create_dir_all(world.bpffs().join(pin)).expect("a folder");
    }
    let before = (tree(scratch.path()), tree(world.bpffs()));
    let absolute = outside.display().to_string();
    for (name, code) in [
        (Some(absolute.as_str()), 2),
        (Some("../outside"), 2),
        (Some("two/../../outside"), 2),
        (Some("."), 2),
        (Some(".."), 2),
        (Some(""), 2),
        (Some("linked/"), 2),
        (Some("linked"), 1),
        (Some("notours"), 1),
        (Some("nobody"), 0),
        (None, 2),
    ] {
        for by_variable in [true, false] {
            let mut uninstall = dataplane("uninstall");
            uninstall
                .arg("--run-dir")
                .arg(&run_dir)
                .arg("--bpffs")
                .arg(world.bpffs())
                .arg("--state")
                .arg(&world.state);
            match name {
                Some(name) if by_variable => _ = uninstall.env("NODE_NAME", name),
                Some(name) => _ = uninstall.arg("--node").arg(name),
                None => {}
            }
            let (status, said) = run(&mut uninstall);
            let after = (tree(scratch.path()), tree(world.bpffs()));
            assert_eq!(after, before, "{name:?}: {said}");
            let code = if code == 1 && said.contains("is not a dataplane agent's") {
                2
            } else {
                code
            };
            let fits = status.code() == Some(code) || (code == 0 && is_unknown(status, &said));
            assert!(fits, "{name:?}: {status}: {said}");
            assert!(!said.contains("nothing is left"), "{name:?}: {said}");
        }
    }
}

#[test]
fn uninstall_without_a_privilege_says_which_and_changes_nothing() {
    let mut one = SingleNode::new();
    one.agent.kill();
    assert!(one.is_captured());
    let before = one.traces();
    for (name, number) in CAPABILITIES {
        let mut uninstall = uninstall(&one, &[]);
        let mut setup = one.world.setup(&one.node);
        if let Some(keep) = &mut setup.place.capabilities {
            keep.retain(|kept| *kept != number);
        }
        place(&mut uninstall, &setup.place);
        let (status, said) = run(&mut uninstall);
        assert_eq!(status.code(), Some(3), "{name}: {said}");
        assert!(said.contains(&format!("{name} is missing")), "{said}");
        assert_eq!(one.traces(), before, "{name}");
    }
    let (status, said) = run(&mut uninstall(&one, &[]));
    assert!(
        status.success() && said.contains("1 pods let go, nothing is left"),
        "{said}"
    );
    assert_eq!(one.server.netns.show("rule show").lines().count(), 3);
}

#[test]
fn uninstall_with_other_places_than_its_agents_says_so_and_changes_nothing() {
    let mut one = SingleNode::new();
    let scratch = tempfile::tempdir().expect("a folder");
    let other = Mounted::new(scratch.path().join("bpf"));
    let before = one.traces();
    let unchanged = |one: &SingleNode, others: &[(&str, &Path)], code: i32, told: &[&str]| {
        let (status, said) = run(&mut uninstall(one, others));
        assert_eq!(status.code(), Some(code), "{others:?}: {said}");
        for part in told {
            assert!(said.contains(part), "{others:?}: {said}");
        }
        assert_eq!(one.traces(), before, "{others:?}");
        assert!(!said.contains("nothing is left"), "{said}");
    };
    let elsewhere = scratch.path().join("run");
    for running in [true, false] {
        if !running {
            one.agent.kill();
        }
        let own = one.world.bpffs().display().to_string();
        let (bpffs, state) = ([("--bpffs", other.path())], [("--state", scratch.path())]);
        if running {
            unchanged(&one, &bpffs, 4, &["already runs"]);
            unchanged(&one, &state, 4, &["already runs"]);
        } else {
            unchanged(&one, &bpffs, 2, &["was started with --bpffs", &own]);
            unchanged(&one, &state, 2, &["was started with --state"]);
        }
        unchanged(
            &one,
            &[("--run-dir", &elsewhere)],
            1,
            &["nothing of node one is known"],
        );
        // Nothing of the node is in these folders; but it is on this machine.
        let nowhere = [
            ("--run-dir", &*elsewhere),
            ("--bpffs", other.path()),
            ("--state", scratch.path()),
        ];
        let pins = other.path().join("dataplane/one").display().to_string();
        let told = [
            &format!(
                "nothing of node one is known in {}, nor pinned in {pins}",
                elsewhere.display()
            ),
            "links of a dataplane agent's programs are on this machine",
            "network namespaces have its rules",
        ];
        unchanged(&one, &nowhere, 1, &told);
        let typo = [("--node", Path::new("oen"))];
        unchanged(
            &one,
            &typo,
            1,
            &["nothing of node oen is known", "known are: one"],
        );
        if running {
            unchanged(&one, &[], 4, &["already runs"]);
            let _app = one.server.serve(PORT);
            assert!(
                one.outsider.ask(one.server.at(PORT), "x").is_ok(),
                "served on"
            );
        }
    }
    // Its pins cannot be found any more: their programs would go on without its routes.
    let moved = one.folder().join("node.json");
    let mark = fs::read_to_string(&moved).expect("a mark");
    let own = one.world.bpffs().display().to_string();
    let theirs = other.path().display().to_string();
    fs::write(&moved, mark.replace(&own, &theirs)).expect("a file");
    unchanged(&one, &[("--bpffs", other.path())], 4, &["not pinned in"]);
    fs::write(&moved, mark).expect("a file");
    let (status, said) = run(&mut uninstall(&one, &[]));
    assert!(status.success(), "{said}");
}

#[test]
fn what_cannot_be_taken_back_is_told_and_its_record_stays() {
    let mut one = SingleNode::new();
    one.agent.kill();
    let (stranger, broken) = (
        one.folder().join("precious"),
        one.folder().join("pods/7.json"),
    );
    for file in [&stranger, &broken] {
        fs::write(file, "{").expect("a file");
    }
    let (status, said) = run(&mut uninstall(&one, &[]));
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(said.contains("1 pods let go, 2 things are left"), "{said}");
    for file in [&stranger, &broken] {
        assert!(said.contains(&format!("{}", file.display())), "{said}");
        assert!(file.exists(), "{}", file.display());
        fs::remove_file(file).expect("a file");
    }
    assert_eq!(
        one.server.netns.show("rule show").lines().count(),
        3,
        "the pod itself is let go"
    );
    let (status, said) = run(&mut uninstall(&one, &[]));
    assert!(
        status.success() && said.contains("nothing is left"),
        "{said}"
    );
    assert!(!one.folder().exists());
    let (status, said) = run(&mut uninstall(&one, &[]));
    assert!(is_unknown(status, &said), "{status}: {said}");
}

//! The state that nodes share: if it is not available, nothing is dialled in clear because of that, and no CA is
//! created.

#![allow(missing_docs, reason = "tests are named for what they show")]

use std::fs;

use dataplane_tests::agent::Agent;
use dataplane_tests::one::tree;
use dataplane_tests::world::Mounted;
use dataplane_tests::{Pair, SingleNode, Wire, World, eventually};

const PORT: u16 = 7000;

fn problems(agent: &Agent) -> String {
    agent.status().unwrap_or_default()["problems"].to_string()
}

fn is_ready(agent: &Agent) -> bool {
    agent.get("/healthz/ready").contains(" 200 ")
}

/// Restarts an agent that must not start; returns its error.
fn refused(agent: &mut Agent) -> String {
    fs::remove_file(agent.log_file()).expect("a log");
    agent.restart();
    eventually("it ends by itself", 20, || !agent.runs());
    assert_eq!(agent.wait().code(), Some(2), "{}", agent.log());
    agent.log()
}

#[test]
fn c1_while_the_state_is_away_other_nodes_pods_are_dialled_by_hbone_and_no_ca_is_made() {
    let mut pair = Pair::new();
    let _app = pair.server.serve(PORT);
    let (client, at) = (&pair.client, pair.server.at(PORT));
    eventually("it is ready", 10, || is_ready(&pair.one));
    let wire = Wire::watch(pair.nodes.0.netns.file(), "wire", &["by-hbone", "in-clear"]);
    // The folder below a mount that is gone.
    let away = Mounted::empty_over(&pair.world.state);
    fs::create_dir(away.path().join("enrolled")).expect("a folder");
    let there = tree(away.path());
    for agent in [&pair.one, &pair.two] {
        eventually("that is told, and it is not ready", 10, || {
            problems(agent).contains("ca/root.pem: No such file") && !is_ready(agent)
        });
        assert_eq!(agent.tunnelled(), 2);
    }
    assert!(client.ask(at, "by-hbone").is_ok());
    pair.one.kill();
    let said = refused(&mut pair.one);
    assert!(said.contains("ca/root.pem is missing, as if"), "{said}");
    assert_eq!(tree(away.path()), there, "nothing is made in its place");

    drop(away);
    pair.one.restart();
    pair.one.up(&["client"]);
    pair.know_each_other();
    for agent in [&pair.one, &pair.two] {
        eventually("all is well", 10, || {
            problems(agent) == "[]" && is_ready(agent)
        });
    }
    assert!(client.ask(at, "by-hbone").is_ok());
    let (markers, _) = wire.count();
    assert_eq!(markers[0].1, 0, "in clear: {markers:?}");
}

#[test]
fn c1_records_that_are_lost_are_no_word_and_a_start_without_them_is_refused() {
    let mut pair = Pair::new();
    let records = pair.world.state.join("enrolled");
    let away = pair.world.state.join("away");
    fs::rename(&records, &away).expect("a folder");
    fs::create_dir(&records).expect("a folder");
    for agent in [&pair.one, &pair.two] {
        eventually("that is told, and it is not ready", 10, || {
            problems(agent).contains("enrolled/mark: is missing") && !is_ready(agent)
        });
        assert_eq!(agent.tunnelled(), 2);
    }
    pair.one.kill();
    let said = refused(&mut pair.one);
    assert!(said.contains("enrolled/mark is missing, as if"), "{said}");
    assert!(tree(&records).is_empty());
    // What the error says: that no pod is enrolled.
    fs::write(records.join("mark"), "").expect("a file");
    pair.one.restart();
    pair.one.up(&["client"]);
    pair.know_each_other();
}

#[test]
fn another_root_is_told_and_a_start_with_it_is_refused() {
    let mut pair = Pair::new();
    let ca = pair.world.state.join("ca");
    let other = dataplane_tests::World::new();
    let node = other.node("one");
    let mut agent = other.agent(&node);
    eventually("it has a CA", 20, || {
        other.state.join("ca/root.pem").exists()
    });
    agent.kill();
    fs::rename(&ca, pair.world.state.join("away")).expect("a folder");
    fs::rename(other.state.join("ca"), &ca).expect("a folder");
    eventually("that is told", 10, || {
        problems(&pair.one).contains("is another root than at the start") && !is_ready(&pair.one)
    });
    assert_eq!(pair.one.tunnelled(), 2);
    pair.one.kill();
    let said = refused(&mut pair.one);
    assert!(said.contains("ca/root.pem: has the SHA-256"), "{said}");
    fs::rename(&ca, other.state.join("ca")).expect("a folder");
    fs::rename(pair.world.state.join("away"), &ca).expect("a folder");
    pair.one.restart();
    pair.one.up(&["client"]);
}

#[test]
fn c1_a_state_behind_a_link_is_the_same_while_it_is_away() {
    let world = World::new();
    let node = world.node("one");
    let _pod = node.pod(&world, "pod");
    let (link, disk) = (world.folder().join("data"), world.folder().join("disk"));
    fs::create_dir(&disk).expect("a folder");
    std::os::unix::fs::symlink(&disk, &link).expect("a link");
    let mut setup = world.setup(&node);
    setup.state = link.join("mesh/state");
    let mut agent = Agent::start(setup);
    agent.up(&["pod"]);
    agent.kill();
    let away = Mounted::empty_over(&disk);
    let said = refused(&mut agent);
    assert!(said.contains("ca/root.pem is missing, as if"), "{said}");
    assert!(tree(away.path()).is_empty(), "nothing is made in its place");
    drop(away);
}

#[test]
fn uninstall_while_the_state_is_away_says_what_it_left_there_and_can_be_tried_again() {
    let mut one = SingleNode::new();
    one.agent.kill();
    let record = one.world.state.join("enrolled/demo.server.json");
    assert!(record.exists());
    let away = Mounted::empty_over(&one.world.state);
    let (status, _, said) = one.agent.uninstall();
    assert_eq!(status.code(), Some(1), "{said}");
    for part in [
        "ca/root.pem: No such file",
        "may go on dialling pods",
        "uninstall again",
    ] {
        assert!(said.contains(part), "{said}");
    }
    assert!(tree(away.path()).is_empty() && !one.is_captured());
    drop(away);
    assert!(record.exists());
    let (status, said, error) = one.agent.uninstall();
    assert!(status.success(), "{error}");
    assert!(said.contains("nothing is left"), "{said}");
    assert!(!record.exists() && !one.folder().exists());
}

#[test]
fn uninstall_of_a_node_whose_mark_has_no_root_says_that_there_are_records() {
    let mut one = SingleNode::new();
    one.agent.kill();
    let (mark, record) = (
        one.folder().join("node.json"),
        one.world.state.join("enrolled/demo.server.json"),
    );
    // As older agents wrote it.
    let text = fs::read_to_string(&mark).expect("a mark");
    let mut old: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    assert!(old["root"].take().is_string());
    fs::write(&mark, old.to_string()).expect("a file");
    let away = Mounted::empty_over(&one.world.state);
    let told = |one: &SingleNode, told: &str| {
        let (status, _, said) = one.agent.uninstall();
        assert_eq!(status.code(), Some(1), "{said}");
        assert!(
            said.contains(told) && said.contains("uninstall again"),
            "{said}"
        );
    };
    told(&one, "it has no CA, as if it were not mounted");
    drop(away);
    told(&one, "has 1 records of pods of this node");
    assert!(record.exists());
    fs::remove_file(&record).expect("as it says");
    let (status, said, error) = one.agent.uninstall();
    assert!(
        status.success() && said.contains("nothing is left"),
        "{error}"
    );
}

#[test]
fn uninstall_of_a_node_of_which_the_state_alone_has_records_names_them() {
    let mut one = SingleNode::new();
    one.agent.kill();
    let records = one.world.state.join("enrolled");
    let record = records.join("demo.server.json");
    let text = fs::read_to_string(&record).expect("a record");
    assert!(one.agent.uninstall().0.success());
    // As after a boot, which clears /run and the bpffs.
    fs::write(&record, text).expect("a file");
    let (status, _, said) = one.agent.uninstall();
    assert_eq!(status.code(), Some(1), "{said}");
    let told = format!("{} has 1 records of pods of node one", records.display());
    assert!(said.contains(&told), "{said}");
    assert!(record.exists());
    fs::remove_file(&record).expect("a file");
    let (_, out, said) = one.agent.uninstall();
    assert!(
        (out + &said).contains("nothing of node one is known in"),
        "{said}"
    );
}

#[test]
fn c1_records_of_a_node_of_the_same_name_on_another_machine_stay() {
    let mut one = SingleNode::new();
    let [own, others] = ["server", "elsewhere"]
        .map(|name| one.world.state.join(format!("enrolled/demo.{name}.json")));
    let text = fs::read_to_string(&own).expect("a record");
    let mut record: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    (record["name"], record["machine"]) = ("elsewhere".into(), "another".into());
    fs::write(&others, record.to_string()).expect("a file");
    eventually("that is told", 10, || {
        one.problems()
            .contains("demo.elsewhere.json: a node of this name wrote it on another machine")
    });
    one.agent.kill();
    one.agent.restart();
    one.agent.up(&["server"]);
    one.agent.kill();
    let (status, said, error) = one.agent.uninstall();
    assert!(
        status.success() && said.contains("nothing is left"),
        "{said}{error}"
    );
    assert!(error.contains("1 records in "), "{error}");
    assert!(others.exists() && !own.exists());
    let (status, _, error) = one.agent.uninstall();
    assert_eq!(status.code(), Some(1), "{error}");
    fs::remove_file(&others).expect("it stayed");
}

#[test]
fn a_first_start_with_a_full_state_fails_and_leaves_nothing_half_made() {
    let world = World::new();
    let node = world.node("one");
    let _pod = node.pod(&world, "pod");
    let disk = Mounted::small(world.state.clone());
    let filler = disk.path().join("filler");
    fs::write(&filler, vec![0; 1 << 20]).expect_err("the disk is full");
    let before = tree(disk.path());
    let mut agent = world.agent(&node);
    eventually("it ends by itself", 20, || !agent.runs());
    assert_eq!(agent.wait().code(), Some(1), "{}", agent.log());
    let full = "No space left on device";
    assert!(agent.log().contains(full), "{}", agent.log());
    assert_eq!(tree(disk.path()), before);
    assert!(!world.folder().join("run").exists());
    fs::remove_file(&filler).expect("a file");
    agent.restart();
    agent.up(&["pod"]);
}

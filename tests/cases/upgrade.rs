//! Agents of another version, newer or older: the next agent takes over the pins of the former one, and releases no
//! pod meanwhile.

#![allow(missing_docs, reason = "tests are named for what they show")]

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;

use dataplane_tests::agent::OTHER;
use dataplane_tests::lacks::Restriction;
use dataplane_tests::{Pair, Process, SingleNode, Taps, bpf, eventually, program};

const PORT: u16 = 7000;
const REAL: &str = "DATAPLANE_BIN";
/// If set, agents are killed at each step of a takeover, instead of each fifth.
const ALL_STEPS: &str = "DATAPLANE_TEST_ALL_STEPS";

/// Returns the path of the first node's pinned map of this name.
fn map(pair: &Pair, name: &str) -> PathBuf {
    let mut maps = pair.world.pinned("one", "maps").into_iter();
    maps.find(|pin| pin.ends_with(name)).expect("a pinned map")
}

/// Replaces the first node's agent by one of this version.
fn next(pair: &mut Pair, version: &'static str) {
    pair.one.end();
    pair.one.setup().program = version;
    pair.one.restart();
}

/// Connects from the client to the server again and again, whatever the results are.
fn flood(pair: &Pair) -> [Process; 2] {
    [pair.server.at(PORT), pair.server.at6(PORT)].map(|to| {
        let mut flood = pair.client.command(program("DATAPLANE_TEST_APP"));
        Process::start(flood.args(["rate", &to.to_string(), "600", "30"]))
    })
}

#[test]
fn c1_another_layout_is_taken_over_up_and_down_and_nothing_leaves_meanwhile() {
    let mut pair = Pair::new();
    let (_app, _own) = (pair.server.serve(PORT), pair.client.serve(PORT + 1));
    let taps = Taps::of(&pair);
    let floods = flood(&pair);
    // It outlives the agents: it is a connection of the pod with itself.
    let mut live = pair.client.live(pair.client.at(PORT + 1));
    let most = |pair: &Pair| bpf::most(&map(pair, "CGROUPS"));
    let mut before = most(&pair);
    for version in [OTHER, REAL] {
        pair.one.kill();
        // A connection that the programs of one version captured waits for the agent of the next.
        let to = pair.server.at(PORT).to_string();
        let mut begun = pair.client.app(&["talk", &to]);
        pair.one.setup().program = version;
        pair.one.restart();
        pair.one.up(&["client"]);
        assert_eq!(begun.line(), "connected");
        begun.say("x");
        assert_eq!(begun.line(), format!("{} x", pair.client.v4));
        pair.one.counts("kept_inside", version, || {
            begun.say("late-mark=0");
            begun.say("runs away");
        });
        for to in [pair.server.at(PORT), pair.server.at6(PORT)] {
            assert!(pair.client.ask(to, "x").is_ok(), "{version}: {to}");
        }
        live.say("still");
        assert_eq!(live.line(), format!("{} still", pair.client.v4));
        let after = most(&pair);
        assert_ne!(before, after, "{version} has maps of its own");
        before = after;
    }
    drop(floods);
    taps.saw_nothing_of(PORT..PORT + 2);
    assert!(pair.one.log().contains("another one comes in its place"));
}

/// Starts the first node's next agent, which does not find the client.
fn hold(pair: &mut Pair, version: &'static str) {
    let mut object = pair.nodes.0.object(&pair.client);
    let annotation = ("ambient.dataplane/netns".into(), "/run/netns/none".into());
    object.annotations.push(annotation);
    pair.world.manifests.pod(&object);
    next(pair, version);
    eventually("it is told that it stays captured", 20, || {
        pair.one.pod("client").1.contains("stays captured")
    });
}

/// Adds an address to the client, which no agent serves: its connections to itself by that address are not
/// captured, if its program has the maps that the agent writes.
fn is_looked_after(pair: &Pair, last: u8) {
    let own = SocketAddr::from(([10, 100, 0, last], PORT));
    let add = format!("addr add {}/32 dev eth0\n", own.ip());
    pair.client.netns.ip(&add);
    let source = format!("source={}", pair.client.v4);
    eventually(&format!("{own} is its own"), 10, || {
        pair.client.ask_with(own, "x", &[&source]).is_ok()
    });
}

#[test]
fn c1_a_pod_that_the_next_version_does_not_find_stays_captured() {
    let mut pair = Pair::new();
    let outsider = pair.nodes.1.bare(&pair.world, "outside", "outsider");
    let (_theirs, _own) = (outsider.serve(PORT), pair.client.serve(PORT));
    for (version, last) in [(OTHER, 1), (REAL, 2)] {
        hold(&mut pair, version);
        is_looked_after(&pair, last);
        for to in [outsider.at(PORT), outsider.at6(PORT)] {
            assert!(pair.client.ask(to, "x").is_err(), "{version}: {to}");
        }
        for to in [pair.client.at(PORT), pair.client.at6(PORT)] {
            assert!(outsider.ask(to, "x").is_err(), "{version}: {to}");
        }
    }
    pair.world.manifests.pod(&pair.nodes.0.object(&pair.client));
    pair.one.up(&["client"]);
    assert!(pair.client.ask(outsider.at(PORT), "x").is_ok());
}

#[test]
fn c1_a_pods_program_has_the_maps_that_the_agent_writes_whoever_was_killed_on_the_way() {
    let mut pair = Pair::new();
    let _own = pair.client.serve(PORT);
    // The pods' programs are replaced, and the node's not yet; maps get the old ones' names.
    for (step, last) in [(24, 1), (38, 2)] {
        pair.one.kill();
        pair.one.setup().restriction = Some(Restriction::KillAtStep(step));
        pair.one.setup().program = OTHER;
        pair.one.restart();
        eventually("it is killed", 20, || !pair.one.runs());
        pair.one.setup().restriction = None;
        hold(&mut pair, REAL);
        is_looked_after(&pair, last);
    }
}

#[test]
fn an_agent_that_is_killed_at_any_step_of_taking_over_is_followed_by_one_of_either_version() {
    let mut pair = Pair::new();
    let _app = pair.server.serve(PORT);
    let taps = Taps::of(&pair);
    let floods = flood(&pair);
    let versions = [REAL, OTHER];
    let mut pinned = 0;
    // The stride is odd, since the version of the next agent depends on the step's parity.
    let all = std::env::var_os(ALL_STEPS).is_some();
    for step in (0..).step_by(if all { 1 } else { 5 }) {
        pair.one.kill();
        let killed = 1 - pinned;
        let setup = pair.one.setup();
        (setup.program, setup.restriction) =
            (versions[killed], Some(Restriction::KillAtStep(step)));
        pair.one.restart();
        let is_up = || pair.one.pod("client").0 == "up";
        eventually("it is killed, or needs no more steps", 20, || {
            !pair.one.runs() || is_up()
        });
        pair.one.setup().restriction = None;
        if pair.one.runs() {
            assert!(step > 40, "it took {step} steps");
            break;
        }
        pair.one.wait();
        let answer = pair.client.ask(pair.server.at6(PORT), "x");
        assert!(answer.is_err(), "step {step}: {answer:?}");
        pinned = if step % 2 == 0 { killed } else { pinned };
        pair.one.setup().program = versions[pinned];
        pair.one.restart();
        pair.one.up(&["client"]);
        let answer = pair.client.ask(pair.server.at(PORT), "x");
        assert!(answer.is_ok(), "step {step}: {answer:?}");
    }
    drop(floods);
    taps.saw_nothing_of(PORT..PORT + 1);
}

#[test]
fn c7_uninstall_leaves_nothing_of_two_versions() {
    let mut pair = Pair::new();
    let outsider = pair.nodes.1.bare(&pair.world, "outside", "outsider");
    let _theirs = outsider.serve(PORT);
    // The node's programs are being attached, and maps get the names of the old ones.
    for step in [30, 39] {
        pair.one.kill();
        pair.one.setup().program = OTHER;
        pair.one.setup().restriction = Some(Restriction::KillAtStep(step));
        pair.one.restart();
        eventually("it is killed", 20, || !pair.one.runs());
        pair.one.wait();
        let (status, _, error) = pair.one.uninstall();
        assert!(status.success(), "step {step}: {error}");
        let left = (pair.client.traces(), pair.world.traces("one"));
        assert_eq!(left, (vec![], vec![]), "step {step}");
        for to in [outsider.at(PORT), outsider.at6(PORT)] {
            assert!(pair.client.ask(to, "x").is_ok(), "step {step}: {to}");
        }
        pair.one.setup().program = REAL;
        pair.one.setup().restriction = None;
        pair.one.restart();
        pair.one.up(&["client"]);
    }
}

#[test]
fn a_map_that_is_not_as_the_programs_expect_it_is_told_and_taken_over() {
    let mut pair = Pair::new();
    let _app = pair.server.serve(PORT);
    pair.one.kill();
    let names = ["PODS", "ADDRESSES", "BEGUN", "COUNTERS", "EVENTS", "NODE"];
    let before = names.map(|name| bpf::most(&map(&pair, name)));
    for name in names {
        bpf::remake(&map(&pair, name), 2);
    }
    pair.one.restart();
    pair.one.up(&["client"]);
    for (name, most) in names.into_iter().zip(before) {
        pair.one.logs(&["another one comes in its place", name]);
        assert_eq!(bpf::most(&map(&pair, name)), most, "{name}");
    }
    for to in [pair.server.at(PORT), pair.server.at6(PORT)] {
        assert!(pair.client.ask(to, "x").is_ok(), "{to}");
    }
    // In its current state it needs no change.
    let told = || pair.one.log().matches("another one comes").count();
    let before = told();
    pair.one.kill();
    pair.one.restart();
    pair.one.up(&["client"]);
    assert_eq!(pair.one.log().matches("another one comes").count(), before);
}

#[test]
fn c1_what_cannot_be_taken_over_is_refused_by_name_and_left_as_it_was() {
    let mut pair = Pair::new();
    let outsider = pair.nodes.1.bare(&pair.world, "outside", "outsider");
    let _theirs = outsider.serve(PORT);
    pair.one.kill();
    let away = pair.world.bpffs().join("away");
    for (name, why) in [
        ("INSIDE", "cannot be read"),
        ("AGENT", "cannot be read"),
        ("PODS", "has room for"),
    ] {
        let pin = map(&pair, name);
        fs::rename(&pin, &away).expect("a pin");
        match name {
            "INSIDE" | "AGENT" => bpf::hash(&pin, 4),
            _ => {
                bpf::hash(&pin, 2000);
                bpf::fill(&pin);
            }
        }
        let pins = || {
            let pins = pair.world.pins();
            pins.iter()
                .map(|pin| (pin.clone(), bpf::id(pin)))
                .collect::<Vec<_>>()
        };
        let before = pins();
        pair.one.restart();
        pair.one.logs(&["cannot be taken over", name, why]);
        assert_eq!(pair.one.wait().code(), Some(1));
        assert_eq!(pins(), before);
        for to in [outsider.at(PORT), outsider.at6(PORT)] {
            assert!(pair.client.ask(to, "x").is_err(), "{name}: {to}");
        }
        fs::remove_file(&pin).expect("a pin");
        fs::rename(&away, &pin).expect("a pin");
    }
    pair.one.restart();
    pair.one.up(&["client"]);
    assert!(pair.client.ask(outsider.at(PORT), "x").is_ok());
}

#[test]
fn c1_maps_whose_pins_are_lost_while_no_agent_runs_are_found_again() {
    let mut pair = Pair::new();
    let _app = pair.server.serve(PORT);
    let taps = Taps::of(&pair);
    assert!(pair.client.ask(pair.server.at(PORT), "x").is_ok());
    let floods = flood(&pair);
    pair.one.kill();
    for pin in pair.world.pinned("one", "maps") {
        fs::remove_file(pin).expect("a pin");
    }
    // If it cannot find out which maps the programs have, it creates no others.
    pair.one.setup().restriction = Some(Restriction::ListPrograms);
    pair.one.restart();
    pair.one.logs(&["Operation not permitted"]);
    assert_eq!(pair.one.wait().code(), Some(1));
    assert_eq!(pair.world.pinned("one", "maps"), Vec::<PathBuf>::new());
    pair.one.setup().restriction = None;
    // It does not write entries again for a pod that it does not find.
    hold(&mut pair, REAL);
    pair.one.logs(&["is pinned again", "PODS"]);
    drop(floods);
    taps.saw_nothing_of(PORT..PORT + 1);
    pair.world.manifests.pod(&pair.nodes.0.object(&pair.client));
    pair.one.up(&["client"]);
    assert!(pair.client.ask(pair.server.at(PORT), "x").is_ok());
}

#[test]
fn c1_a_record_that_cannot_be_read_keeps_its_pod_captured_and_blocks_no_other() {
    let mut one = SingleNode::new();
    let _app = one.server.serve(PORT);
    let second = one.node.pod(&one.world, "second");
    let _second = second.serve(PORT);
    one.agent.up(&["second"]);
    one.agent.kill();
    let record = one
        .folder()
        .join("pods")
        .join(one.server.netns.cookie() + ".json");
    let kept = fs::read(&record).expect("a record");
    fs::write(&record, "{\"of\": \"another version\"}").expect("a file");
    one.agent.restart();
    one.agent.up(&["second"]);
    one.agent
        .logs(&["cannot be read", &record.display().to_string()]);
    assert!(one.outsider.ask(second.at(PORT), "x").is_ok());
    assert!(one.denies(PORT), "nobody serves it, and it is captured");
    let (state, why) = one.agent.pod("server");
    assert!(
        state == "waiting" && why.contains(".json") && why.contains("stays captured"),
        "{state}: {why}"
    );
    fs::write(&record, kept).expect("a file");
    one.agent.up(&["server"]);
    assert!(one.outsider.ask(one.server.at(PORT), "x").is_ok());
}

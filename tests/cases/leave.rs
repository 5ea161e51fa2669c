//! Pods that leave the mesh and come back while they connect: packets of a pod for other destinations never reach
//! another server, and above all not its own app.

#![allow(missing_docs, reason = "tests are named for what they show")]

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use dataplane_tests::bpf::{self, steering};
use dataplane_tests::netns::Netns;
use dataplane_tests::process::{Process, output};
use dataplane_tests::{Pair, Pod, Taps, eventually, pause, program};

const PORT: u16 = 7000;

/// Starts an app of the client on the server's port, which answers `own` to any client, and prints a line.
fn own(pair: &Pair) -> Process {
    let own = pair
        .client
        .app(&["script-server", &PORT.to_string(), "write=own", "fin"]);
    assert_eq!(own.line(), "ready");
    own
}

/// Puts the client into the mesh, or out of it.
fn in_mesh(pair: &Pair, is: bool) {
    let mut object = pair.nodes.0.object(&pair.client);
    if !is {
        object
            .labels
            .push(("istio.io/dataplane-mode".into(), "none".into()));
    }
    pair.world.manifests.pod(&object);
}

/// Opens connections from the client, some hundred a second.
fn flood(pair: &Pair, to: SocketAddr, seconds: u32) -> Process {
    let mut flood = pair.client.command(program("DATAPLANE_TEST_APP"));
    Process::start(flood.args(["rate", &to.to_string(), &seconds.to_string(), "150"]))
}

/// Returns `true` if captured packets are routed to `lo` in a pod's namespace.
fn is_routed(netns: &Netns) -> bool {
    let shown = |command: &str| netns.show(command);
    shown("rule").contains("0x511") && shown("route show table 15001").contains("dev lo")
}

#[test]
fn c7_a_pod_leaves_an_agent_of_which_no_worker_answers() {
    let pair = Pair::new();
    let _stopped = pair.one.stop_threads("worker-");
    in_mesh(&pair, false);
    pair.one.logs(&["pod leaves the mesh"]);
    // What runs has five seconds to end, and five more to be cut.
    pair.one.logs(&["connections are cut", "not waited for"]);
    pair.one.logs(&["pod left the mesh"]);
    assert!(!is_routed(&pair.client.netns));
}

#[test]
fn c1_what_a_pod_sent_before_it_left_never_reaches_its_own_app() {
    let pair = Pair::new();
    let (_app, own) = (pair.server.serve(PORT), own(&pair));
    // A connection stays open, so that the pod has not left before this is over.
    let _live = pair.client.live(pair.server.at(PORT));
    // Without its routes by `lo` captured packets are dropped, and sent again after a second, and after
    // two more.
    pair.client.netns.ip("link set lo down\n");
    pair.one.is("client", "broken");
    let ask = |to: SocketAddr| {
        let mut command = pair.client.command(program("DATAPLANE_TEST_APP"));
        Process::start(command.args(["ask", &to.to_string(), "x"]))
    };
    let asks = [
        (pair.client.v6, ask(pair.server.at6(PORT))),
        (pair.client.v4, ask(pair.server.at(PORT))),
    ];
    eventually("both wait for an answer", 10, || {
        let mut ss = pair.client.command("ss");
        let (_, asking, _) = output(ss.args(["-Htn", "state", "syn-sent"]));
        asking.lines().count() >= 2
    });
    in_mesh(&pair, false);
    pair.one.logs(&["pod leaves the mesh"]);
    pair.client.netns.ip("link set lo up\n");
    eventually("it has its routes again", 5, || {
        is_routed(&pair.client.netns)
    });
    for (client, ask) in asks {
        let (_, said) = ask.end();
        assert_eq!(said, [format!("{client} x")]);
    }
    assert_eq!(own.line_within(Duration::ZERO), None);
}

#[test]
fn c1_a_pod_that_leaves_and_comes_back_under_load_reaches_who_it_asks_for() {
    let pair = Pair::new();
    let (_app, own) = (pair.server.serve(PORT), own(&pair));
    let floods = [pair.server.at(PORT), pair.server.at6(PORT)].map(|to| flood(&pair, to, 25));
    // While a connection is open it does not leave entirely, and its open connections go on.
    let live = pair.client.live(pair.server.at(PORT));
    for turn in 0..4 {
        let lo = |state: &str| pair.client.netns.ip(&format!("link set lo {state}\n"));
        // Packets that are sent without routes are sent again when it leaves.
        lo("down");
        in_mesh(&pair, false);
        eventually("it leaves", 10, || {
            pair.one.log().matches("pod leaves the mesh").count() > turn
        });
        lo("up");
        pause(Duration::from_millis(1500));
        in_mesh(&pair, true);
        pair.one.up(&["client"]);
    }
    drop(live);
    for _ in 0..4 {
        in_mesh(&pair, false);
        pair.one.is("client", "ignored");
        in_mesh(&pair, true);
        pair.one.up(&["client"]);
    }
    for flood in floods {
        let (_, said) = flood.end();
        assert!(said[0].ends_with(" 0 bad"), "{said:?}");
    }
    assert_eq!(own.line_within(Duration::ZERO), None);
}

#[test]
fn c1_a_pod_that_comes_back_and_lacks_a_part_is_captured_and_not_let_go_again() {
    let pair = Pair::new();
    let _app = pair.server.serve(PORT);
    // While a connection is open the pod does not leave entirely.
    let mut live = pair.client.live(pair.server.at(PORT));
    in_mesh(&pair, false);
    pair.one.logs(&["pod leaves the mesh"]);
    let pins = pair.world.pinned("one", "maps");
    let cgroups = pins.iter().find(|pin| pin.ends_with("CGROUPS"));
    let cgroups = cgroups.expect("a map");
    bpf::fill(cgroups);
    in_mesh(&pair, true);
    pair.one.is("client", "broken");
    assert!(pair.one.pod("client").1.contains("CGROUPS"));
    let taps = Taps::between(&pair.nodes, (&pair.client, &pair.server));
    for _ in 0..20 {
        let _ = pair.client.ask(pair.server.at(PORT), "x");
        pause(Duration::from_millis(100));
    }
    live.say("still");
    assert_eq!(live.line(), format!("{} still", pair.client.v4));
    taps.saw_nothing_of(PORT..PORT + 1);
    assert_eq!(pair.one.log().matches("pod leaves the mesh").count(), 1);
    bpf::clear(cgroups);
    pair.one.up(&["client"]);
    let answer = pair.client.ask(pair.server.at(PORT), "x");
    assert_eq!(answer, Ok(format!("{} x", pair.client.v4)));
}

/// The agent's own kernel still holds bytes when both ends have ended: they need the pod's routes, and its mark.
#[test]
fn a_pod_that_leaves_delivers_what_its_app_has_not_read_yet() {
    let pair = Pair::new();
    let read = pair.world.folder().join("read");
    let until = format!("until={}", read.display());
    let slow = ["write=x", "fin", until.as_str(), "all"];
    let quick = ["read=1", "fill=1000000", "fin"];
    let run = |pod: &Pod, kind: &str, to: &str, steps: &[&str]| {
        let steps = [&[kind, to], steps].concat();
        pod.app(&steps)
    };
    // The pod that leaves is the client of one connection, and the server of the other.
    let far = run(&pair.server, "script-server", "7001", &quick);
    let near = run(&pair.client, "script-server", "7002", &slow);
    assert_eq!((far.line(), near.line()), ("ready".into(), "ready".into()));
    let to = |pod: &Pod, port| pod.at(port).to_string();
    let client = [&["1"], &slow[..]].concat();
    let asks = run(&pair.client, "script", &to(&pair.server, 7001), &client);
    let client = [&["1"], &quick[..]].concat();
    let sends = run(&pair.server, "script", &to(&pair.client, 7002), &client);
    for quick in [&far, &sends] {
        assert_eq!(quick.line(), "x; sent; fin");
    }
    in_mesh(&pair, false);
    pair.one.logs(&["pod leaves the mesh"]);
    pause(Duration::from_millis(2500));
    std::fs::write(&read, "").expect("written");
    for slow in [&asks, &near] {
        let line = slow.line_within(Duration::from_secs(15));
        assert_eq!(line.as_deref(), Some("sent; fin; 1000000 bytes, end"));
    }
    pair.one.is("client", "ignored");
    for port in [7001, 7002] {
        let line = pair.one.logs(&["connection complete", &format!(":{port}")]);
        assert!(
            line.contains("1000000") && !line.contains("error="),
            "{line}"
        );
    }
}

#[test]
fn a_pod_that_goes_together_with_its_policy_drains_by_what_that_said() {
    let pair = Pair::new();
    let _app = pair.server.serve(PORT);
    let (manifests, client) = (&pair.world.manifests, "cluster.local/ns/demo/sa/client");
    manifests.policy("demo", "gate", "ALLOW", "server", client);
    pair.two.logs(&["policy added", "gate"]);
    let mut live = pair.client.live(pair.server.at(PORT));
    manifests.remove_pod("demo", "server");
    manifests.remove("policy-demo-gate.yaml");
    for told in ["policy removed", "pod leaves the mesh"] {
        pair.two.logs(&[told]);
    }
    live.say("still");
    assert_eq!(live.line(), format!("{} still", pair.client.v4));
}

#[test]
fn c1_no_route_leads_to_lo_without_the_program_that_takes_what_comes_by_it() {
    let pair = Pair::new();
    let over = AtomicBool::new(false);
    let (netns, file) = (&pair.client.netns, pair.client.netns.file());
    let looks = || {
        let (mut with, mut without) = (0, 0);
        while !over.load(Ordering::Relaxed) {
            let before = steering(&file);
            if is_routed(netns) {
                with += 1;
                without += u32::from(before + steering(&file) == 0);
            }
        }
        (with, without)
    };
    let (with, without) = std::thread::scope(|scope| {
        let looks = scope.spawn(looks);
        for _ in 0..6 {
            in_mesh(&pair, false);
            pair.one.is("client", "ignored");
            in_mesh(&pair, true);
            pair.one.up(&["client"]);
        }
        over.store(true, Ordering::Relaxed);
        looks.join().expect("it looked")
    });
    assert!(with > 10, "it was seen {with} times");
    assert_eq!(without, 0, "of {with}");
}

#[test]
fn c1_what_was_sent_while_no_agent_ran_never_reaches_the_pods_own_app() {
    let mut pair = Pair::new();
    let (_app, own) = (pair.server.serve(PORT), own(&pair));
    for turn in 0..4 {
        pair.one.kill();
        let to = [pair.server.at(PORT), pair.server.at6(PORT)];
        let floods = to.map(|to| flood(&pair, to, 3));
        in_mesh(&pair, turn % 2 == 1);
        pause(Duration::from_millis(1500));
        pair.one.restart();
        match turn % 2 {
            0 => pair.one.is("client", "ignored"),
            _ => pair.one.up(&["client"]),
        }
        floods.into_iter().for_each(|flood| _ = flood.end());
        assert_eq!(own.line_within(Duration::ZERO), None, "turn {turn}");
    }
    // Nor while everything is removed.
    pair.one.kill();
    let to = [pair.server.at(PORT), pair.server.at6(PORT)];
    let floods = to.map(|to| flood(&pair, to, 3));
    pause(Duration::from_millis(1500));
    let (status, _, error) = pair.one.uninstall();
    assert!(status.success(), "{error}");
    floods.into_iter().for_each(|flood| _ = flood.end());
    assert_eq!(own.line_within(Duration::ZERO), None);
    let answer = pair.client.ask(pair.server.at(PORT), "x");
    assert_eq!(answer, Ok(format!("{} x", pair.client.v4)));
}

/// Opens an agent's pins in a folder, as another process that holds them.
fn held(pair: &Pair, node: &str, folder: &str) -> Vec<OwnedFd> {
    let pins = pair.world.pins();
    let of_node = pair.world.bpffs().join("dataplane").join(node);
    let is_in = |pin: &&PathBuf| {
        pin.starts_with(&of_node) && pin.parent().is_some_and(|at| at.ends_with(folder))
    };
    let held = pins.iter().filter(is_in).map(|pin| bpf::open(pin));
    let held: Vec<OwnedFd> = held.collect::<Result<_, _>>().expect("they are pinned");
    assert!(!held.is_empty());
    held
}

#[test]
fn c7_a_pod_that_left_is_reached_whoever_holds_its_program() {
    let pair = Pair::new();
    let outsider = pair.nodes.1.bare(&pair.world, "outside", "outsider");
    let _app = pair.client.serve(PORT);
    let _held = held(&pair, "one", "pods");
    in_mesh(&pair, false);
    eventually("nothing is left of the pod", 15, || {
        pair.client.traces().is_empty() && pair.world.traces("one").is_empty()
    });
    for to in [pair.client.at(PORT), pair.client.at6(PORT)] {
        assert!(outsider.ask(to, "x").is_ok(), "{to}");
    }
    in_mesh(&pair, true);
    pair.one.up(&["client"]);
}

#[test]
fn c7_uninstall_leaves_nothing_attached_whoever_holds_it() {
    let mut pair = Pair::new();
    let outsider = pair.nodes.1.bare(&pair.world, "outside", "outsider");
    let (_app, _theirs) = (pair.client.serve(PORT), outsider.serve(PORT));
    let _held = ["pods", "links"].map(|folder| held(&pair, "one", folder));
    pair.one.terminate();
    let (status, _, error) = pair.one.uninstall();
    assert!(status.success(), "{error}");
    for to in [pair.client.at(PORT), pair.client.at6(PORT)] {
        assert!(outsider.ask(to, "x").is_ok(), "{to}");
    }
    for to in [outsider.at(PORT), outsider.at6(PORT)] {
        let answer = pair.client.ask_with(to, "x", &["say-mark"]);
        assert!(answer.is_ok_and(|said| said.ends_with("mark=0x0")), "{to}");
    }
    pair.one.restart();
    pair.one.up(&["client"]);
}

//! Capture as seen from outside: the packets that leave a pod and that reach it, and the traces that are left at the
//! end. These are the invariants C1 to C10; each test is named after its own.

#![allow(missing_docs, reason = "tests are named for what they show")]

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use dataplane_tests::cgroup::Cgroup;
use dataplane_tests::netns::Netns;
use dataplane_tests::process::{Process, app, output, said};
use dataplane_tests::wire::Segment;
use dataplane_tests::world::Mounted;
use dataplane_tests::{Pair, Taps, Wire, World, eventually, pause, program, require_root};

const PORT: u16 = 7000;

#[test]
fn c7_not_one_packet_of_a_captured_connection_leaves_however_it_ends() {
    let mut pair = Pair::new();
    let _app = pair.server.serve(PORT);
    let servers: Vec<Process> = ["close", "reset", "half", "unread"]
        .iter()
        .zip(PORT + 1..)
        .map(|(how, port)| {
            let server = pair.server.app(&["end-server", &port.to_string(), how]);
            assert_eq!(server.line(), "ready");
            server
        })
        .collect();
    let taps = Taps::of(&pair);
    let mut endings: Vec<(u16, &str)> = ["now", "sent", "half", "reset", "unread", "vanish"]
        .map(|how| (PORT, how))
        .to_vec();
    // The server's four ways to end, and a port without a listener.
    endings.extend((PORT + 1..=PORT + 5).map(|port| (port, "wait")));
    for _ in 0..6 {
        for (port, how) in &endings {
            for to in [pair.server.at(*port), pair.server.at6(*port)] {
                let mut command = pair.client.command(program("DATAPLANE_TEST_APP"));
                // The client's result does not matter here.
                let _ = output(command.args(["end", &to.to_string(), how]));
            }
        }
    }
    // Policy cuts the connection, and the server goes away during it.
    let live = |pair: &Pair| {
        let (client, server) = (&pair.client, &pair.server);
        (client.live(server.at(PORT)), client.live(server.at6(PORT)))
    };
    let cut = live(&pair);
    pair.world.manifests.policy(
        "demo",
        "nobody",
        "ALLOW",
        "server",
        "cluster.local/ns/x/sa/y",
    );
    assert_eq!(cut.0.line(), "closed: reset");
    assert_eq!(cut.1.line(), "closed: reset");
    pair.world.manifests.remove("policy-demo-nobody.yaml");
    eventually("let in again", 5, || {
        pair.client.ask(pair.server.at(PORT), "x").is_ok()
    });
    // Either agent is killed, and the apps go on for a while.
    let mut left = live(&pair);
    pair.one.kill();
    left.0.say("after the client's agent");
    left.1.say("after the client's agent");
    pause(Duration::from_millis(500));
    pair.one.restart();
    pair.one.up(&["client"]);
    eventually("served again", 10, || {
        pair.client.ask(pair.server.at(PORT), "x").is_ok()
    });
    let mut left = live(&pair);
    pair.two.kill();
    left.0.say("after the server's agent");
    left.1.say("after the server's agent");
    pause(Duration::from_millis(500));
    drop((left, servers));
    pause(Duration::from_millis(300));
    taps.saw_nothing_of(PORT..PORT + 6);
    pair.two.restart();
    pair.two.up(&["server"]);
}

#[test]
fn c1_a_pod_that_left_and_is_wanted_again_is_captured_before_it_is_served() {
    let mut pair = Pair::new();
    let outsider = pair.nodes.1.bare(&pair.world, "outside", "outsider");
    let _apps = (pair.server.serve(PORT), outsider.serve(PORT));
    // Its connections to others must not reach this app either.
    let _own = pair.client.serve(PORT);
    pair.one.kill();
    pair.one.setup().drains_for("60s");
    pair.one.restart();
    pair.one.up(&["client"]);
    // It begins to leave, and its agent is killed before it has left.
    let _live = pair.client.live(pair.server.at(PORT));
    let mut object = pair.nodes.0.object(&pair.client);
    object
        .labels
        .push(("istio.io/dataplane-mode".into(), "none".into()));
    pair.world.manifests.pod(&object);
    pair.one.logs(&["pod leaves the mesh"]);
    pair.one.kill();
    let answer = pair.client.ask(outsider.at(PORT), "x");
    assert!(answer.is_ok(), "it is not captured any more: {answer:?}");
    // The next one does not find it.
    let mut object = pair.nodes.0.object(&pair.client);
    object.addresses = vec!["10.254.254.254".into()];
    pair.world.manifests.pod(&object);
    pair.one.restart();
    eventually("it is told that it is not found", 20, || {
        pair.one.pod("client").1.contains("no network namespace")
    });
    for to in [outsider.at(PORT), outsider.at6(PORT)] {
        let answer = pair.client.ask(to, "x");
        assert!(answer.is_err(), "{to}: {answer:?}");
    }
    let (state, why) = pair.one.pod("client");
    assert!(
        state == "waiting" && why.contains("stays captured"),
        "{state}: {why}"
    );
    pair.world.manifests.pod(&pair.nodes.0.object(&pair.client));
    pair.one.up(&["client"]);
    assert!(pair.client.ask(outsider.at(PORT), "x").is_ok());
}

#[test]
fn c1_without_an_agent_nobody_reaches_a_pod_and_nothing_of_it_leaves() {
    let mut pair = Pair::new();
    let app = pair.server.serve(PORT);
    let _other = pair.client.serve(PORT);
    let outsider = pair.nodes.1.bare(&pair.world, "outside", "outsider");
    let _theirs = outsider.serve(PORT);
    assert!(outsider.ask(pair.server.at(PORT), "with an agent").is_ok());
    pair.two.kill();
    let tap = Wire::tap(pair.nodes.1.netns.file(), &pair.server.veth);
    for to in [pair.server.at(PORT), pair.server.at6(PORT)] {
        assert!(outsider.ask(to, "without").is_err(), "{to}");
        assert!(pair.client.ask(to, "without").is_err(), "{to}");
    }
    for to in [outsider.at(PORT), outsider.at6(PORT), pair.client.at6(PORT)] {
        assert!(pair.server.ask(to, "without").is_err(), "{to}");
    }
    let segments = tap.end();
    for to in [pair.server.at(PORT), pair.server.at6(PORT)] {
        let asked = |segment: &Segment| segment.to == (to.ip(), to.port());
        assert!(segments.iter().any(asked), "{to} was asked: {segments:?}");
    }
    for segment in segments {
        let out = segment.from.0 == pair.server.v4 || segment.from.0 == pair.server.v6;
        assert!(segment.payload.is_empty(), "{segment:?}");
        // It may send a reset, but may not open a connection.
        assert!(!out || segment.flags & 4 != 0, "{segment:?}");
    }
    drop(app);
    pair.two.restart();
    pair.two.up(&["server"]);
    let _app = pair.server.serve(PORT);
    eventually("the next agent serves it", 10, || {
        outsider.ask(pair.server.at(PORT), "x").is_ok()
    });
    assert!(pair.server.ask(outsider.at(PORT), "out").is_ok());
}

#[test]
fn c2_the_apps_own_marks_stay_and_a_socket_that_is_connected_anew_is_decided_anew() {
    let pair = Pair::new();
    let (_app, _own) = (pair.server.serve(PORT), pair.client.serve(PORT));
    let taps = Taps::of(&pair);
    let to = pair.server.at(PORT);
    // Bits above ours are kept; all of ours are replaced.
    let marked = |to, options: &[&str], marked: u32| {
        let options = [options, &["say-mark"]].concat();
        let answer = pair.client.ask_with(to, "x", &options);
        let expected = format!("{} x\nmark={marked:#x}", pair.client.v4);
        assert_eq!(answer, Ok(expected), "{options:?}");
    };
    marked(to, &[], 0x511);
    for (mark, becomes) in [
        ("mark=0x10000", 0x10511),
        ("mark=0xabcde000", 0xabcd_e511),
        ("mark=0x511", 0x511),
        ("mark=0x111", 0x511),
        ("mark=0x539", 0x511),
    ] {
        marked(to, &[mark], becomes);
    }
    let own = pair.client.at(PORT);
    let (first, local) = (format!("twice={to}"), format!("twice={own}"));
    // Captured, then local; and local, then captured.
    marked(own, &[&first], 0);
    marked(own, &["mark=0x10000", &first], 0x10000);
    marked(to, &[&local], 0x511);
    marked(to, &["mark=0x10000", &local], 0x10511);
    taps.saw_nothing_of(PORT..PORT + 1);
}

#[test]
fn c3_what_is_captured_comes_from_the_pods_own_address_in_every_family() {
    let pair = Pair::new();
    let _app = pair.server.serve(PORT);
    let (v4, v6) = (pair.client.v4, pair.client.v6);
    for (to, from, options) in [
        (pair.server.at(PORT), v4, &[][..]),
        (pair.server.at(PORT), v4, &["mapped"]),
        (pair.server.at6(PORT), v6, &[]),
    ] {
        let steered = pair.one.counter("steered_outbound");
        let answer = pair.client.ask_with(to, "x", options);
        assert_eq!(answer, Ok(format!("{from} x")), "{to} {options:?}");
        assert!(pair.one.counter("steered_outbound") > steered, "{to}");
    }
}

#[test]
fn c4_who_comes_from_outside_is_answered_by_the_agents_listeners() {
    let pair = Pair::new();
    let outsider = pair.nodes.0.bare(&pair.world, "outside", "outsider");
    let _app = pair.server.serve(PORT);
    for to in [pair.server.at(PORT), pair.server.at6(PORT)] {
        let steered = pair.two.counter("steered_inbound");
        let answer = outsider.ask(to, "x");
        assert!(answer.is_ok(), "{to}: {answer:?}");
        assert!(pair.two.counter("steered_inbound") > steered, "{to}");
        assert!(pair.client.ask(to, "x").is_ok(), "{to}");
    }
    assert!(pair.two.counter("steered_hbone") > 0);
}

#[test]
fn c5_every_kind_of_tcp_connection_is_captured() {
    let pair = Pair::prepared(|client, _| {
        // Bits 1, 2 and 0x400: for clients, for servers, and for every listener, also the agent's.
        client.netns.set_sysctl("net.ipv4.tcp_fastopen", "1027");
    });
    let _app = pair.server.serve(PORT);
    let taps = Taps::of(&pair);
    let before = pair.one.counter("captured");
    let kinds = [
        (pair.server.at(PORT), &["mapped"][..]),
        (pair.server.at(PORT), &["mptcp"]),
        (pair.server.at6(PORT), &["mptcp"]),
        // The first brings a cookie, and with that the second has its data in the SYN.
        (pair.server.at(PORT), &["fastopen"]),
        (pair.server.at(PORT), &["fastopen", "in-syn"]),
        (pair.server.at6(PORT), &["fastopen"]),
        (pair.server.at6(PORT), &["fastopen", "in-syn"]),
    ];
    for (to, options) in kinds {
        let client = match to.is_ipv4() {
            true => pair.client.v4,
            false => pair.client.v6,
        };
        let answer = pair.client.ask_with(to, "x", options);
        assert_eq!(answer, Ok(format!("{client} x")), "{to} {options:?}");
    }
    assert!(pair.one.counter("captured") >= before + kinds.len() as u64);
    taps.saw_nothing_of(PORT..PORT + 1);
}

#[test]
fn c6_a_process_of_one_pods_cgroup_in_another_pods_namespace_is_refused() {
    let pair = Pair::new();
    let other = pair.nodes.0.pod(&pair.world, "other");
    pair.one.up(&["other"]);
    let _app = pair.server.serve(PORT);
    let ask = ["ask", &pair.server.at(PORT).to_string(), "borrowed"];
    let mut borrowed = app(&pair.client.netns, &other.cgroup.folder, &ask);
    assert_eq!(said(&mut borrowed), Err("denied".into()));
    pair.one.logs(&["foreign_cgroup"]);
    assert!(pair.one.counter("refused") > 0);
}

#[test]
fn c6_a_pods_process_in_a_namespace_of_its_own_reaches_only_that_namespace() {
    let pair = Pair::new();
    let outsider = pair.nodes.1.bare(&pair.world, "outside", "outsider");
    let _app = outsider.serve(PORT);
    // As that of a container inside of a pod: its route out is not the pod's, and is not captured.
    let nested = pair.nodes.0.bare(&pair.world, "outside", "nested");
    let ask = |to: SocketAddr, netns: &Netns, cgroup: &Path| {
        let asked = said(&mut app(netns, cgroup, &["ask", &to.to_string(), "nested"]));
        asked.err().unwrap_or_default()
    };
    let (pods, own) = (&pair.client.cgroup.folder, &nested.cgroup.folder);
    let inner = Cgroup::new(&pods.join("inner"));
    for to in [outsider.at(PORT), outsider.at6(PORT)] {
        assert_eq!(ask(to, &nested.netns, own), "", "{to}");
        assert_eq!(ask(to, &nested.netns, pods), "denied", "{to}");
        assert_eq!(ask(to, &nested.netns, &inner.folder), "denied", "{to}");
        // Processes on the host may be in that cgroup: for example a shell in whose cgroup the pod was started.
        assert_eq!(ask(to, &pair.nodes.0.netns, pods), "", "{to}");
    }
    let local = "127.0.0.1:7000".parse().expect("an address");
    assert_eq!(ask(local, &nested.netns, pods), "refused");
    pair.one.logs(&["foreign_cgroup"]);
}

#[test]
fn c3_an_agent_knows_its_own_sockets_wherever_its_process_is() {
    let mut pair = Pair::new();
    let _app = pair.server.serve(PORT);
    let own = Cgroup::new(&pair.nodes.0.cgroup.folder.join("agent"));
    pair.one.kill();
    pair.one.setup().place.cgroup.clone_from(&own.folder);
    pair.one.restart();
    pair.one.up(&["client"]);
    let inner = Cgroup::new(&own.folder.join("inner"));
    let pid = pair.one.pid().to_string();
    for cgroup in [&inner, &own] {
        std::fs::write(cgroup.folder.join("cgroup.procs"), &pid).expect("a process");
        for to in [pair.server.at(PORT), pair.server.at6(PORT)] {
            let captured = pair.one.counter("captured");
            let answer = pair.client.ask(to, "x");
            assert_eq!(
                pair.one.counter("captured"),
                captured + 1,
                "{to}: {answer:?}"
            );
            assert!(answer.is_ok(), "{to}: {answer:?}");
        }
        // No other process passes for being in its cgroup, or for its mark.
        let ask = ["ask", &pair.server.at(PORT).to_string(), "x", "mark=0x539"];
        let captured = pair.one.counter("captured");
        let answer = said(&mut app(&pair.client.netns, &cgroup.folder, &ask));
        assert_eq!(answer, Ok(format!("{} x", pair.client.v4)));
        assert_eq!(pair.one.counter("captured"), captured + 1);
    }
}

#[test]
fn c7_a_pod_that_leaves_has_nothing_left_of_it() {
    let mut pair = Pair::new();
    let _app = pair.server.serve(PORT);
    assert!(pair.client.ask(pair.server.at(PORT), "x").is_ok());
    let traces = pair.client.traces();
    assert!(traces.len() >= 12, "{traces:?}");
    let kept = pair.world.traces("one");
    for part in [
        "/pods/",
        "PODS",
        "CGROUPS",
        "ADDRESSES",
        "run/one/pods",
        "enrolled/",
    ] {
        let found = kept.iter().any(|trace| trace.contains(part));
        assert!(found, "{part} is where it was looked for: {kept:?}");
    }
    let mut object = pair.nodes.0.object(&pair.client);
    object
        .labels
        .push(("istio.io/dataplane-mode".into(), "none".into()));
    pair.world.manifests.pod(&object);
    pair.one.is("client", "ignored");
    eventually("nothing is left in the pod", 15, || {
        pair.client.traces().is_empty()
    });
    eventually("nothing is left of the pod on its node", 5, || {
        pair.world.traces("one").is_empty()
    });
    let answer = pair.client.ask(pair.server.at(PORT), "in clear now");
    assert_eq!(answer, Ok(format!("{} in clear now", pair.client.v4)));
    // And the other node, all at once.
    pair.two.terminate();
    assert!(!pair.server.traces().is_empty(), "still captured");
    let kept = pair.world.traces("two");
    assert!(kept.len() >= 4, "{kept:?}");
    let (status, out, error) = pair.two.uninstall();
    assert!(status.success(), "{error}");
    assert!(out.contains("1 pods let go"), "{out}");
    assert_eq!(pair.server.traces(), Vec::<String>::new());
    assert_eq!(pair.world.traces("two"), Vec::<String>::new());
    let pins = pair.world.pins();
    let of_two = pair.world.bpffs().join("dataplane/two");
    assert!(!pins.iter().any(|pin| pin.starts_with(&of_two)), "{pins:?}");
    let attached = |cgroup: &Path| {
        let mut check = Command::new(program("DATAPLANE_BIN"));
        let (_, text, _) = output(check.arg("check").arg("--cgroup").arg(cgroup));
        text.lines()
            .filter(|line| line.contains(" programs on "))
            .count()
    };
    assert!(attached(&pair.nodes.0.cgroup.folder) > attached(&pair.nodes.1.cgroup.folder));
    let outsider = pair.nodes.1.bare(&pair.world, "outside", "outsider");
    assert!(
        outsider.ask(pair.server.at(PORT), "x").is_ok(),
        "reached without the agent"
    );
}

#[test]
fn c7_a_connection_that_is_older_than_the_enrolment_goes_on() {
    let world = World::new();
    let (one, two) = world.two_nodes();
    let (client, server) = (
        one.bare(&world, "demo", "client"),
        two.bare(&world, "demo", "server"),
    );
    let _app = server.serve(PORT);
    let mut old = client.live(server.at(PORT));
    world.manifests.pod(&one.object(&client));
    world.manifests.pod(&two.object(&server));
    let agents = (world.agent(&one), world.agent(&two));
    agents.0.up(&["client"]);
    agents.1.up(&["server"]);
    old.say("after");
    assert_eq!(old.line(), format!("{} after", client.v4));
}

#[test]
fn c8_processes_outside_of_the_pods_cgroup_are_counted_and_told() {
    let pair = Pair::new();
    let mut stray = app(&pair.client.netns, pair.world.outside(), &["pause"]);
    let stray = Process::start(&mut stray);
    assert_eq!(stray.line(), "ready");
    pair.one.logs(&[
        "processes in the pod's network namespace are outside of its cgroup",
        "connect in clear and without identity",
    ]);
    eventually("it is in the status", 5, || {
        let pod = &pair.one.status().unwrap_or_default()["pods"][0];
        pod["outside"] == 1 && pod["in_clear"] == 1
    });
}

#[test]
fn c8_a_second_agent_of_a_node_does_not_start() {
    let pair = Pair::new();
    let (status, _, error) = output(&mut pair.one.command());
    assert_eq!(status.code(), Some(4), "{error}");
    assert!(
        error.contains("another dataplane agent already runs for this node"),
        "{error}"
    );
    assert!(
        pair.client.ask(pair.server.at(PORT), "x") == Err("reset".into()),
        "the first one serves on"
    );
}

#[test]
fn c9_what_was_captured_does_not_leave_by_another_way() {
    let pair = Pair::new();
    let _app = pair.server.serve(PORT);
    let taps = Taps::of(&pair);
    for to in [pair.server.at(PORT), pair.server.at6(PORT)] {
        // A socket that is bound to an interface before it connects is captured as any other.
        assert!(
            pair.client.ask_with(to, "bound", &["device=eth0"]).is_ok(),
            "{to}"
        );
        // A socket that is bound after that has a route by each interface as long as it is marked.
        let _ = pair.client.ask_with(to, "runs away", &["late-device=eth0"]);
        // If the app marks it otherwise it hangs, which is the app's own fault.
        for option in ["late-mark=0", "late-mark=1337"] {
            pair.one
                .counts("kept_inside", &format!("{option} to {to}"), || {
                    let ask = ["ask", &to.to_string(), "runs away", option];
                    pair.client.app(&ask)
                });
        }
    }
    taps.saw_nothing_of(PORT..PORT + 1);
}

#[test]
fn c9_an_apps_end_does_not_leave_by_another_way() {
    let pair = Pair::new();
    let taps = Taps::of(&pair);
    let mut apps = Vec::new();
    for (port, option) in (PORT..).zip(["late-mark=0", "late-mark=1337", "late-device=eth0"]) {
        let app = pair.server.app(&["serve", &port.to_string(), option]);
        assert_eq!(app.line(), "ready");
        for to in [pair.server.at(port), pair.server.at6(port)] {
            pair.two
                .counts("kept_inside", &format!("{option} to {to}"), || {
                    let ask = ["ask", &to.to_string(), "the answer runs away"];
                    pair.client.app(&ask)
                });
        }
        apps.push(app);
    }
    taps.saw_nothing_of(PORT..PORT + 3);
}

#[test]
fn c9_a_pod_that_leaves_keeps_inside_what_was_captured() {
    let pair = Pair::new();
    let _app = pair.server.serve(PORT);
    let taps = Taps::of(&pair);
    let servers = [pair.server.at(PORT), pair.server.at6(PORT)];
    let mut talks = servers.map(|to| pair.client.live(to));
    pair.world.manifests.namespace("demo", false);
    // From then on the pod is leaving for the kernel programs.
    pair.one.logs(&["pod leaves the mesh", "client"]);
    for talk in &mut talks {
        pair.one.counts("kept_inside", "it runs away", || {
            talk.say("late-mark=0");
            talk.say("runs away");
        });
    }
    taps.saw_nothing_of(PORT..PORT + 1);
}

#[test]
fn c9_others_may_use_our_marks_for_themselves() {
    let world = World::new();
    let (one, two) = world.two_nodes();
    let outsider = one.bare(&world, "outside", "outsider");
    let server = two.bare(&world, "outside", "server");
    let _app = server.serve(PORT);
    let agent = world.agent(&one);
    agent.logs(&["started"]);
    let host = Cgroup::new(&one.cgroup.folder.join("host"));
    let on_host = |option: &str| {
        let ask = ["ask", &server.at(PORT).to_string(), "x", option];
        said(&mut app(&one.netns, &host.folder, &ask))
    };
    for option in ["mark=273", "late-mark=273", "mark=1297", "late-mark=1297"] {
        let answer = outsider.ask_with(server.at(PORT), "x", &[option]);
        assert!(answer.is_ok(), "a pod's {option}: {answer:?}");
        let answer = on_host(option);
        assert!(answer.is_ok(), "the host's {option}: {answer:?}");
    }
    assert_eq!(agent.counter("kept_inside"), 0);
    // Their own rules still apply to them.
    for mark in ["0x111", "0x511"] {
        one.netns
            .ip(&format!("rule add fwmark {mark}/0xfff prohibit\n"));
    }
    for option in ["mark=273", "mark=1297"] {
        let answer = on_host(option);
        assert_eq!(answer, Err("denied".into()), "{option}");
    }
}

#[test]
fn c1_an_app_that_has_the_agents_port_gets_nothing_of_its_traffic() {
    let world = World::new();
    let (one, two) = world.two_nodes();
    let (client, server) = (
        one.bare(&world, "demo", "client"),
        two.bare(&world, "demo", "server"),
    );
    let _greedy = server.serve(15008);
    let _app = server.serve(PORT);
    world.manifests.pod(&one.object(&client));
    world.manifests.pod(&two.object(&server));
    let agents = (world.agent(&one), world.agent(&two));
    agents.0.up(&["client"]);
    agents.1.up(&["server"]);
    eventually("the server is dialled by HBONE", 10, || {
        agents.0.tunnelled() >= 2
    });
    assert!(
        client.ask(server.at(PORT), "x").is_ok(),
        "the tunnel goes to the agent"
    );
    agents.1.logs(&["direction=\"inbound\"", ":15008"]);
    let outsider = one.bare(&world, "outside", "outsider");
    // The answer is a TLS alert, if there is one.
    let answer = outsider
        .ask(server.at(15008), "for the app")
        .unwrap_or_default();
    assert!(
        !answer.contains("for the app"),
        "nobody reaches the app there: {answer}"
    );
}

#[test]
fn the_programs_log_when_they_are_told_to_and_not_before() {
    let pair = Pair::new();
    let _app = pair.server.serve(PORT);
    // Their log is forwarded in bursts.
    let burst = || pause(Duration::from_millis(300));
    assert!(pair.client.ask(pair.server.at(PORT), "quiet").is_ok());
    burst();
    assert!(!pair.one.log().contains("captured=1"));
    let answer = pair.one.post("/logging?kernel=on");
    assert!(answer.contains("200 OK"), "{answer}");
    assert!(pair.client.ask(pair.server.at(PORT), "told").is_ok());
    let kernel = "\tinfo\tkernel\t";
    pair.one
        .logs(&[kernel, "connect netns=", "port=7000 captured=1"]);
    pair.one.logs(&[kernel, "steer port=7000 to=0"]);
    pair.one.post("/logging?kernel=off");
    burst();
    let before = pair.one.log().matches("captured=1").count();
    assert!(pair.client.ask(pair.server.at(PORT), "quiet again").is_ok());
    burst();
    assert_eq!(pair.one.log().matches("captured=1").count(), before);
}

#[test]
fn a_pod_with_a_sidecar_or_that_says_no_is_left_alone_and_one_without_a_process_waits() {
    let world = World::new();
    let node = world.node("one");
    let (sidecar, says_no) = (
        node.bare(&world, "demo", "sidecar"),
        node.bare(&world, "demo", "says-no"),
    );
    let mut object = node.object(&sidecar);
    object
        .annotations
        .push(("sidecar.istio.io/status".into(), "{}".into()));
    world.manifests.pod(&object);
    let mut object = node.object(&says_no);
    object
        .labels
        .push(("istio.io/dataplane-mode".into(), "none".into()));
    world.manifests.pod(&object);
    let mut object = node.object(&says_no);
    object.name = "nowhere";
    object.addresses = vec!["10.254.254.254".into()];
    world.manifests.pod(&object);
    let agent = world.agent(&node);
    agent.is("sidecar", "ignored");
    assert_eq!(agent.pod("sidecar").1, "it has a sidecar");
    assert_eq!(agent.pod("says-no").0, "ignored");
    assert_eq!(agent.pod("nowhere").0, "waiting");
    assert_eq!(
        agent.pod("nowhere").1,
        "no network namespace of this machine has 10.254.254.254; until then it is not captured, and no policy holds"
    );
    agent.logs(&["\twarn\t", "demo/nowhere", "no policy holds"]);
    assert_eq!(sidecar.traces(), Vec::<String>::new());
    assert_eq!(says_no.traces(), Vec::<String>::new());
}

#[test]
fn c7_a_pod_that_comes_back_under_its_name_is_captured_at_once() {
    let pair = Pair::new();
    let _app = pair.server.serve(PORT);
    let first = pair.nodes.0.pod(&pair.world, "again");
    pair.one.up(&["client", "again"]);
    // Between two scans of the agent, as a restart would be.
    drop(first);
    let second = pair.nodes.0.pod(&pair.world, "again");
    eventually("the new one is captured", 10, || {
        !second.traces().is_empty()
    });
    pair.one.up(&["client", "again"]);
    let answer = second.ask(pair.server.at(PORT), "x");
    assert_eq!(answer, Ok(format!("{} x", second.v4)));
    pair.two
        .logs(&[&format!("src.addr={}:", second.v4), "src.identity="]);
}

#[test]
fn c6_a_pod_of_which_another_identity_is_said_is_served_as_that_one() {
    let pair = Pair::new();
    let _app = pair.server.serve(PORT);
    let mut object = pair.nodes.0.object(&pair.client);
    object.account = "other";
    pair.world.manifests.pod(&object);
    eventually("it has the other identity", 10, || {
        let _ = pair.client.ask(pair.server.at(PORT), "x");
        pair.two.log().contains("ns/demo/sa/other")
    });
    assert!(pair.client.ask(pair.server.at(PORT), "x").is_ok());
}

#[test]
fn the_programs_stay_within_the_verifiers_budget() {
    require_root();
    let folder = tempfile::tempdir().expect("a folder");
    let bpffs = Mounted::new(folder.path().join("bpf"));
    let mut load = Command::new(program("DATAPLANE_BIN"));
    let (status, out, error) = output(load.arg("load").arg("--bpffs").arg(bpffs.path()));
    assert!(status.success(), "{error}");
    // program, kind, instructions, instructions verified, stack, maps
    let mut found: BTreeMap<&str, [u32; 2]> = BTreeMap::new();
    for line in out.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        if let [name, _, _, verified, stack, ..] = words.as_slice()
            && let (Ok(verified), Ok(stack)) = (verified.parse(), stack.parse())
        {
            found.insert(name, [verified, stack]);
        }
    }
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("a release");
    let (budget, is_own) = budget(&release);
    let names = |of: &BTreeMap<&str, _>| of.keys().map(|name| (*name).to_owned()).collect();
    let (programs, budgeted): (Vec<String>, Vec<String>) = (names(&found), names(&budget));
    assert_eq!(programs, budgeted, "tests/golden/verifier.txt");
    // A fifth up or down is noise, and some ten more of each.
    let roughly = |number: u32| number * 6 / 5 + 16;
    for (name, is) in found {
        let was = budget[name];
        for (is, was) in is.into_iter().zip(was) {
            assert!(
                is <= roughly(was) && (!is_own || was <= roughly(is)),
                "{name}: instructions and bytes of stack: {is}, and {was} in tests/golden/verifier.txt"
            );
        }
    }
}

/// Returns the programs' costs on this kernel, and `true`; or, for a kernel that the file does not have, their
/// highest costs on others, and `false`.
fn budget(release: &str) -> (BTreeMap<&'static str, [u32; 2]>, bool) {
    let mut of_kernel = BTreeMap::new();
    let mut most: BTreeMap<&str, [u32; 2]> = BTreeMap::new();
    let file = include_str!("../golden/verifier.txt");
    for line in file.lines().filter(|line| !line.starts_with('#')) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [kernel, name, verified, stack] = words.as_slice() else {
            panic!("tests/golden/verifier.txt: {line}");
        };
        let cost = [verified, stack].map(|number| number.parse::<u32>().expect("a number"));
        if release.starts_with(&format!("{kernel}.")) {
            of_kernel.insert(*name, cost);
        }
        let most = most.entry(name).or_default();
        *most = [most[0].max(cost[0]), most[1].max(cost[1])];
    }
    match of_kernel.is_empty() {
        true => (most, false),
        false => (of_kernel, true),
    }
}

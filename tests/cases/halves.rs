//! The two halves of the agent in processes of their own: the node half, and the proxy half, which carries the
//! connections of the node's pods.

#![allow(missing_docs, reason = "tests are named for what they show")]

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;
use std::{fs, mem};

use dataplane_tests::agent::{CAPABILITIES, PROXY_CAPABILITIES};
use dataplane_tests::halves::PORT;
use dataplane_tests::process::output;
use dataplane_tests::{Agent, Halves, Pod, Process, World, eventually, pause, scaled};
use nix::sys::signal::Signal;

#[test]
fn two_halves_serve_as_one_agent_does() {
    let halves = Halves::new();
    let (_theirs, _own) = (halves.server.serve(PORT), halves.client.serve(PORT));
    let answer = halves.client.ask(halves.server.at(PORT), "out");
    assert_eq!(answer, Ok(format!("{} out", halves.client.v4)));
    let answer = halves.server.ask(halves.client.at(PORT), "in");
    assert_eq!(answer, Ok(format!("{} in", halves.server.v4)));
    let proxy = &halves.proxy;
    for direction in ["outbound", "inbound"] {
        proxy.logs(&["connection complete", &format!("direction=\"{direction}\"")]);
    }
    assert!(!halves.node.log().contains("connection complete"));
    // The proxy has given up what only the node half may do.
    let filters = |agent: &Agent| {
        let status = fs::read_to_string(format!("/proc/{}/status", agent.pid()));
        let status = status.expect("it runs");
        let line = status.lines().find(|line| line.starts_with("Seccomp:"));
        line.map(str::to_owned)
    };
    assert_eq!(filters(proxy), Some("Seccomp:\t2".into()));
    assert_eq!(filters(&halves.node), Some("Seccomp:\t0".into()));
}

#[test]
fn each_half_logs_the_process_of_the_other() {
    let halves = Halves::new();
    let of = |agent: &Agent| format!("pid={}", agent.pid());
    halves.node.logs(&["a proxy serves", &of(&halves.proxy)]);
    for what in [
        "serves the pods of the node",
        "all pods of the node are lent",
    ] {
        halves.proxy.logs(&[what, &of(&halves.node)]);
    }
}

#[test]
fn without_any_one_of_its_privileges_a_half_says_which_and_does_not_start() {
    let world = World::new();
    let node = world.node("one");
    let of_proxy = |(_, number): &&(&str, u8)| PROXY_CAPABILITIES.contains(number);
    let node_half = CAPABILITIES.iter().map(|of| ("node", of));
    let proxy_half = CAPABILITIES.iter().filter(of_proxy).map(|of| ("proxy", of));
    for (which, (name, number)) in node_half.chain(proxy_half) {
        let mut setup = world.half(&node, which, which);
        if let Some(keep) = &mut setup.place.capabilities {
            keep.retain(|kept| kept != number);
        }
        let mut agent = Agent::start(setup);
        eventually("it ends by itself", 10, || !agent.runs());
        assert_eq!(agent.wait().code(), Some(3), "{which}: {}", agent.log());
        let why = format!("{name} is missing: needed to");
        assert!(agent.log().contains(&why), "{which}: {}", agent.log());
    }
}

#[test]
fn c1_what_begins_while_no_proxy_runs_waits_and_is_refused_by_nobody() {
    let mut halves = Halves::new();
    let (_theirs, _own) = (halves.server.serve(PORT), halves.client.serve(PORT));
    let taps = halves.taps();
    halves.proxy.kill();
    eventually("that is told", 10, || {
        halves.node.get("/healthz/ready").contains("proxy")
    });
    let mut out = halves.client.talk(halves.server.at(PORT));
    let mut into = halves.server.talk(halves.client.at(PORT));
    out.say("out");
    into.say("in");
    halves.proxy.restart();
    assert_eq!(out.line(), format!("{} out", halves.client.v4));
    assert_eq!(into.line(), format!("{} in", halves.server.v4));
    taps.saw_nothing_of(PORT..PORT + 1);
}

/// Starts to open connections from the client to the server, one after the other on each of sixteen threads.
fn load(halves: &Halves) -> Process {
    let to = halves.server.at(PORT).to_string();
    halves.client.app(&["load", &to, "16"])
}

/// Returns the number of connections that a proxy has carried to their end.
fn carried(proxy: &Agent) -> usize {
    proxy.log().matches("connection complete").count()
}

#[test]
fn a_proxy_that_is_killed_under_load_refuses_no_connection() {
    let mut halves = Halves::new();
    let _theirs = halves.server.serve(PORT);
    let busy = load(&halves);
    eventually("it carries some", 20, || carried(&halves.proxy) > 100);
    halves.proxy.kill();
    let before = carried(&halves.proxy);
    let to = halves.server.at(PORT).to_string();
    let meanwhile = halves.client.app(&["rate", &to, "1", "300", "300"]);
    // Nobody accepts while these connect.
    eventually("they are connected", 20, || {
        let mut ss = halves.client.command("ss");
        let port = format!(":{PORT}");
        let (_, open, _) = output(ss.args(["-Htn", "state", "established", "dport", "=", &port]));
        open.lines().count() >= 300
    });
    halves.proxy.restart();
    eventually("the next one carries some", 20, || {
        carried(&halves.proxy) > before + 100
    });
    let (status, lines) = meanwhile.end();
    assert!(status.success());
    assert_eq!(lines, ["300 good, 0 bad"]);
    let (status, lines) = busy.end();
    assert!(status.success());
    // What it carried, or had accepted, is cut with it.
    let cut = |line: &String| line.contains(" reset, ") || line.contains(" eof, ");
    assert!(lines[1..].iter().all(cut), "{lines:?}");
}

#[test]
fn a_proxy_that_is_replaced_under_load_breaks_no_connection() {
    let mut halves = Halves::new();
    let _theirs = halves.server.serve(PORT);
    let load = load(&halves);
    let second = halves.another("proxy-2");
    second.logs(&["all pods of the node are lent"]);
    let mut first = mem::replace(&mut halves.proxy, second);
    eventually("the first carries some", 20, || carried(&first) > 0);
    first.ask_to_end();
    assert!(first.wait().success());
    let before = carried(&halves.proxy);
    eventually("the second carries some", 20, || {
        carried(&halves.proxy) > before + 100
    });
    let (status, lines) = load.end();
    assert!(status.success());
    assert!(lines[0].ends_with(" 0 bad"), "{lines:?}");
}

#[test]
fn a_proxy_that_is_replaced_cuts_nothing_that_drains() {
    let mut halves = Halves::new();
    let _theirs = halves.server.serve(PORT);
    // Longer than the test.
    halves.drains_for("300s");
    let mut live = halves.live();
    let second = halves.another("proxy-2");
    second.logs(&["serves the pods of the node"]);
    let mut first = mem::replace(&mut halves.proxy, second);
    first.ask_to_end();
    first.logs(&["draining"]);
    for number in 0..20 {
        let answer = halves.client.ask(halves.server.at(PORT), "new");
        assert_eq!(answer, Ok(format!("{} new", halves.client.v4)), "{number}");
    }
    live.say("after");
    assert_eq!(live.line(), format!("{} after", halves.client.v4));
    drop(live);
    assert!(first.wait().success());
    let second = halves.proxy.log();
    assert!(
        second.matches("connection complete").count() >= 20,
        "{second}"
    );
}

#[test]
fn what_runs_goes_on_while_the_node_half_is_killed_and_comes_back() {
    let mut halves = Halves::new();
    let _theirs = halves.server.serve(PORT);
    let mut live = halves.live();
    halves.node.kill();
    live.say("without");
    assert_eq!(live.line(), format!("{} without", halves.client.v4));
    let answer = halves.client.ask(halves.server.at(PORT), "new");
    assert_eq!(answer, Ok(format!("{} new", halves.client.v4)));
    halves.node.restart();
    halves.node.up(&["client"]);
    halves.serves();
    live.say("again");
    assert_eq!(live.line(), format!("{} again", halves.client.v4));
}

#[test]
fn whichever_half_is_started_first_waits_for_the_other() {
    let world = World::new();
    let node = world.node("one");
    let client = node.pod(&world, "client");
    let _app = client.serve(PORT);
    // The state does not exist yet, and the node half, which has no key, does not create it.
    let mut first = Agent::start(world.half(&node, "node", "node"));
    first.logs(&["waits for the state that nodes share"]);
    let mut proxy = Agent::start(world.half(&node, "proxy", "proxy"));
    first.up(&["client"]);
    proxy.logs(&["serves the pods of the node"]);
    let outsider = node.bare(&world, "outside", "outsider");
    let asks = || outsider.ask(client.at(PORT), "x");
    assert_eq!(asks(), Ok(format!("{} x", outsider.v4)));
    // The other way round, with the leftovers of the former ones.
    assert!(first.terminate().success());
    assert!(proxy.terminate().success());
    proxy.restart();
    proxy.logs(&["the node cannot be reached; it is tried again"]);
    first.restart();
    first.up(&["client"]);
    eventually("it is served", 20, || asks().is_ok());
}

#[test]
fn c7_what_leaves_the_mesh_while_its_proxy_drains_is_cut_when_its_time_is_over() {
    let mut halves = Halves::new();
    let _theirs = halves.server.serve(PORT);
    halves.drains_for("300s");
    let live = halves.live();
    halves.proxy.ask_to_end();
    halves.proxy.logs(&["draining"]);
    assert!(halves.proxy.get("/healthz/ready").contains("pending: end"));
    // The node lets its connections go on for five seconds.
    halves.world.manifests.remove_pod("demo", "client");
    halves.node.logs(&["pod left the mesh"]);
    let end = live.line_within(scaled(Duration::from_secs(10)));
    assert!(end.is_some_and(|end| end.starts_with("closed")));
    halves.proxy.kill();
}

fn is_cut(live: &Process) {
    let end = live.line_within(scaled(Duration::from_secs(10)));
    assert!(
        end.as_ref().is_some_and(|end| end.starts_with("closed")),
        "{end:?}"
    );
}

#[test]
fn what_runs_since_before_the_node_half_came_back_is_cut_as_its_pod_becomes_another() {
    let mut halves = Halves::new();
    let _theirs = halves.server.serve(PORT);
    let mut live = halves.live();
    halves.restart_node();
    halves.carries(&mut live, "again");
    halves.change_account();
    is_cut(&live);
}

#[test]
fn what_runs_is_cut_if_its_pod_became_another_while_the_node_half_was_away() {
    let mut halves = Halves::new();
    let _theirs = halves.server.serve(PORT);
    let live = halves.live();
    halves.node.kill();
    halves.change_account();
    halves.node.restart();
    is_cut(&live);
}

#[test]
fn c7_what_runs_since_before_the_node_half_came_back_has_its_time_to_drain_and_is_cut() {
    let mut halves = Halves::new();
    let _theirs = halves.server.serve(PORT);
    let live = halves.live();
    halves.restart_node();
    halves.world.manifests.remove_pod("demo", "client");
    drains_and_is_cut(&halves, live);
}

/// A connection drains, and is cut, if its pod leaves while the node half is away, and the proxy comes back to it late.
fn drains_after(leaves: impl FnOnce(&Halves)) {
    let mut halves = Halves::new();
    let _theirs = halves.server.serve(PORT);
    let live = halves.live();
    halves.node.kill();
    leaves(&halves);
    // The proxy tries again less and less often, up to once a second.
    pause(Duration::from_secs(2));
    halves.node.restart();
    drains_and_is_cut(&halves, live);
}

#[test]
fn c7_what_runs_drains_and_is_cut_if_its_pod_has_left_while_the_node_half_was_away() {
    drains_after(|halves| halves.world.manifests.remove_pod("demo", "client"));
}

#[test]
fn c7_what_runs_drains_and_is_cut_if_its_pod_left_the_mesh_and_lives_on_while_the_node_half_was_away()
 {
    drains_after(|halves| {
        let mut object = halves.nodes.0.object(&halves.client);
        let none = ("istio.io/dataplane-mode".into(), "none".into());
        object.labels.push(none);
        halves.world.manifests.pod(&object);
    });
}

#[test]
fn a_pod_that_is_not_decided_goes_on_and_keeps_no_proxy_from_being_ready() {
    let mut halves = Halves::new();
    let _theirs = halves.server.serve(PORT);
    let mut live = halves.live();
    let team = halves.world.manifests.folder.join("team");
    halves.node.kill();
    // A folder that may be filled later, with the pod in it.
    fs::create_dir(&team).expect("a folder");
    halves.world.manifests.remove_pod("demo", "client");
    halves.node.restart();
    halves.node.logs(&["demo/client", "stays so for now"]);
    let second = halves.another("proxy-2");
    second.logs(&["all pods of the node are lent"]);
    halves.carries(&mut live, "undecided");
    let ready = halves.node.get("/healthz/ready");
    assert!(ready.contains("not ready, pending: enrolment"), "{ready}");
    fs::remove_dir(&team).expect("it is empty");
    drains_and_is_cut(&halves, live);
}

/// What runs of the client has its time as the pod leaves.
fn drains_and_is_cut(halves: &Halves, mut live: Process) {
    halves.node.logs(&["pod leaves the mesh"]);
    pause(Duration::from_secs(2));
    halves.carries(&mut live, "while it drains");
    halves.node.logs(&["pod left the mesh"]);
    is_cut(&live);
}

#[test]
fn what_drains_and_is_not_leased_goes_on_when_a_manifest_says_its_pod_again() {
    let mut halves = Halves::new();
    let _theirs = halves.server.serve(PORT);
    let mut live = halves.live();
    halves.node.terminate();
    halves.node.setup().drains_for("300s");
    halves.world.manifests.remove_pod("demo", "client");
    halves.node.restart();
    halves.node.logs(&["pod leaves the mesh"]);
    halves
        .proxy
        .logs(&["all pods of the node are lent", "undecided=1"]);
    pause(Duration::from_secs(2));
    // It is not captured any more, and what it was drains.
    halves.carries(&mut live, "while it drains");
    halves
        .world
        .manifests
        .pod(&halves.nodes.0.object(&halves.client));
    halves.node.up(&["client"]);
    halves.serves();
    halves.carries(&mut live, "after");
    let taps = halves.taps();
    let answer = halves.client.ask(halves.server.at(PORT), "new");
    assert_eq!(answer, Ok(format!("{} new", halves.client.v4)));
    taps.saw_nothing_of(PORT..PORT + 1);
}

/// The client's record in the run folder.
fn record(halves: &Halves) -> PathBuf {
    let records = halves.world.folder().join("run/one/pods");
    let mut records = fs::read_dir(records).expect("a folder");
    records.next().expect("one").expect("a record").path()
}

/// Starts the node half again while a folder, which is returned, keeps the client from being enrolled.
fn restart_blocked(halves: &mut Halves, block: PathBuf) -> PathBuf {
    fs::create_dir(&block).expect("a folder");
    halves.node.restart();
    halves.node.logs(&["pod cannot be enrolled", "demo/client"]);
    let pid = format!("pid={}", halves.node.pid());
    halves.proxy.logs(&["all pods of the node are lent", &pid]);
    block
}

#[test]
fn what_runs_goes_on_while_its_pod_cannot_be_enrolled_as_the_node_half_comes_back() {
    let mut halves = Halves::new();
    let _theirs = halves.server.serve(PORT);
    let mut live = halves.live();
    halves.node.kill();
    // Its record cannot be written.
    let record = record(&halves);
    let block = restart_blocked(&mut halves, record.with_extension("new"));
    halves.carries(&mut live, "while it cannot be written");
    fs::remove_dir(&block).expect("a folder");
    halves.node.up(&["client"]);
    halves.carries(&mut live, "after");
    // Its record cannot be read.
    halves.node.kill();
    let aside = record.with_extension("aside");
    fs::rename(&record, &aside).expect("a record");
    let block = restart_blocked(&mut halves, record);
    halves.carries(&mut live, "while it cannot be read");
    fs::remove_dir(&block).expect("a folder");
    fs::rename(&aside, &block).expect("a record");
    halves.node.up(&["client"]);
    halves.carries(&mut live, "at last");
}

#[test]
fn what_runs_is_cut_if_its_pod_is_another_and_cannot_be_enrolled_as_the_node_half_comes_back() {
    let mut halves = Halves::new();
    let _theirs = halves.server.serve(PORT);
    let live = halves.live();
    halves.node.kill();
    halves.change_account();
    let record = record(&halves);
    let block = restart_blocked(&mut halves, record.with_extension("new"));
    is_cut(&live);
    fs::remove_dir(&block).expect("a folder");
    halves.node.up(&["client"]);
}

#[test]
fn a_pod_that_is_idle_refuses_nobody_while_the_node_half_comes_back() {
    let mut halves = Halves::new();
    let idle = halves.nodes.0.pod(&halves.world, "idle");
    halves.node.up(&["idle"]);
    let _own = idle.serve(PORT);
    let outsider = halves.nodes.0.bare(&halves.world, "outside", "outsider");
    let asks = |server: &Pod| {
        for who in [&outsider, server] {
            let answer = who.ask(idle.at(PORT), "x");
            assert_eq!(answer, Ok(format!("{} x", who.v4)));
        }
    };
    let lost = halves.node.counter("no_listener");
    halves.node.kill();
    // Until a manifest says the pod again it is not decided whether the node half leases it.
    halves.world.manifests.remove_pod("demo", "idle");
    halves.node.restart();
    let pid = format!("pid={}", halves.node.pid());
    halves.proxy.logs(&["serves the pods of the node", &pid]);
    for _ in 0..3 {
        asks(&halves.server);
        std::thread::sleep(Duration::from_millis(500));
    }
    let lent = ["all pods of the node are lent", &pid, "undecided=1"];
    halves.proxy.logs(&lent);
    halves.world.manifests.pod(&halves.nodes.0.object(&idle));
    halves.node.up(&["idle"]);
    for _ in 0..3 {
        asks(&halves.server);
        std::thread::sleep(Duration::from_millis(500));
    }
    // What finds no listener is dropped, and sent again a second later.
    assert_eq!(halves.node.counter("no_listener"), lost);
}

#[test]
fn a_proxy_without_room_for_descriptors_refuses_a_pod_alone_until_there_is() {
    let halves = Halves::new();
    let _theirs = halves.server.serve(PORT);
    let mut live = halves.live();
    // What is open stays open.
    let before = halves.proxy.limit_files(3);
    let other = halves.nodes.0.pod(&halves.world, "other");
    let told = ["a proxy cannot serve a pod", "demo/other", "open files"];
    halves.node.logs(&told);
    halves.carries(&mut live, "without");
    assert!(!halves.node.log().contains("a proxy is let go"));
    let ready = |agent: &Agent| agent.get("/healthz/ready");
    assert!(ready(&halves.node).contains("pending: proxy"));
    let problems = halves.node.status().unwrap_or_default()["problems"].to_string();
    assert!(
        problems.contains("Pod demo/other: no proxy can serve it"),
        "{problems}"
    );
    halves.proxy.limit_files(before);
    let _app = other.serve(PORT);
    let asks = || halves.server.ask(other.at(PORT), "x");
    eventually("it is served", 20, || asks().is_ok());
    halves.serves();
    halves.carries(&mut live, "with");
}

#[test]
fn c1_a_pod_that_a_proxy_does_not_know_as_the_node_does_is_served_by_it_once_it_does() {
    let halves = Halves::new();
    let late = halves.nodes.0.bare(&halves.world, "demo", "late");
    let _app = late.serve(PORT);
    let outsider = halves.nodes.0.bare(&halves.world, "outside", "outsider");
    let mut object = halves.nodes.0.object(&late);
    let none = ("istio.io/dataplane-mode".into(), "none".into());
    object.labels.push(none);
    halves.world.manifests.pod(&object);
    halves.serves();
    // The proxy comes to know nothing new for now.
    let stopped = halves.proxy.stop_threads("configuration");
    let gate = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: gate, namespace: demo}\nspec: {action: DENY, rules: [{to: [{operation: {ports: [\"7000\"]}}]}]}\n";
    halves.world.manifests.write("gate.yaml", gate);
    object.labels.pop();
    halves.world.manifests.pod(&object);
    halves.node.logs(&["pod enrolled", "demo/late"]);
    let answer = outsider.ask(late.at(PORT), "x");
    assert!(answer.is_err(), "{answer:?}");
    halves
        .node
        .logs(&["a proxy cannot serve a pod", "demo/late", "configuration"]);
    assert!(halves.proxy.get("/healthz/ready").contains("pending: pods"));
    drop(stopped);
    halves.serves();
    let answer = outsider.ask(late.at(PORT), "x");
    assert!(answer.is_err(), "{answer:?}");
    halves.proxy.logs(&["policy rejection", "demo/gate"]);
    let other = gate.replace("7000", "1");
    halves.world.manifests.write("gate.yaml", &other);
    eventually("it is let in", 20, || {
        outsider.ask(late.at(PORT), "x").is_ok()
    });
}

/// The ports below which somebody listens in a pod.
fn listeners(pod: &Pod) -> BTreeSet<u16> {
    let (_, lines, _) = output(pod.command("ss").args(["-Hltn"]));
    let port = |line: &str| {
        line.split_whitespace()
            .nth(3)?
            .rsplit(':')
            .next()?
            .parse()
            .ok()
    };
    lines.lines().filter_map(port).collect()
}

#[test]
fn no_listener_that_any_node_half_has_lent_is_dialled_as_the_pods_own() {
    let mut halves = Halves::new();
    let (_theirs, _own) = (halves.server.serve(PORT), halves.client.serve(PORT));
    let outsider = halves.nodes.0.bare(&halves.world, "outside", "outsider");
    let mut ports = listeners(&halves.client);
    // What runs keeps the listeners of the first one.
    let mut live = halves.live();
    halves.restart_node();
    ports.extend(listeners(&halves.client));
    ports.remove(&PORT);
    assert_eq!(
        ports.len(),
        6,
        "the second one's are on other ports: {ports:?}"
    );
    for port in ports {
        for pod in [&halves.client, &outsider, &halves.server] {
            // The listener for tunnels answers with a TLS alert.
            let answer = pod
                .ask(halves.client.at(port), "x to the app")
                .unwrap_or_default();
            assert!(!answer.contains("x to the app"), "{port}: {answer}");
        }
        let to = format!("{}:{port} ", halves.client.v4);
        let told = halves.proxy.log().matches(&to).count();
        assert!(
            told <= 9,
            "each is one connection, not one that calls itself: {told}"
        );
    }
    halves.carries(&mut live, "still");
    let answer = outsider.ask(halves.client.at(PORT), "x");
    assert_eq!(answer, Ok(format!("{} x", outsider.v4)));
}

#[test]
fn what_drains_goes_on_while_its_proxy_stands_still_for_a_while() {
    let mut halves = Halves::new();
    halves.node.terminate();
    halves.node.setup().drains_for("300s");
    halves.node.restart();
    halves.node.up(&["client"]);
    halves.serves();
    let _theirs = halves.server.serve(PORT);
    let mut live = halves.live();
    halves.world.manifests.remove_pod("demo", "client");
    halves.node.logs(&["pod leaves the mesh"]);
    pause(Duration::from_secs(2));
    halves.proxy.signal(Signal::SIGSTOP);
    let _other = halves.nodes.0.pod(&halves.world, "other");
    eventually("that is told", 20, || {
        halves.node.get("/healthz/ready").contains("proxy")
    });
    halves.proxy.signal(Signal::SIGCONT);
    eventually("it serves again", 20, || {
        !halves.node.get("/healthz/ready").contains("proxy")
    });
    halves.carries(&mut live, "after");
    assert!(!halves.node.log().contains("pod left the mesh"));
}

#[test]
fn a_proxy_that_stands_still_keeps_no_other_pod_waiting() {
    let halves = Halves::new();
    let other = halves.nodes.0.bare(&halves.world, "demo", "other");
    halves.proxy.signal(Signal::SIGSTOP);
    halves.change_account();
    halves.node.logs(&["pod is another than it was"]);
    let manifests = &halves.world.manifests;
    manifests.pod(&halves.nodes.0.object(&other));
    halves.node.up(&["client", "other"]);
    let log = halves.node.log();
    let enrolled = |name| {
        let lines: Vec<&str> = log.lines().collect();
        let of = |line: &&str| line.contains("pod enrolled") && line.contains(name);
        lines.iter().rposition(of).expect("it is up")
    };
    assert!(enrolled("demo/other") < enrolled("demo/client"), "{log}");
    halves.proxy.signal(Signal::SIGCONT);
    let _app = other.serve(PORT);
    let asks = || halves.server.ask(other.at(PORT), "x");
    eventually("they are served", 20, || asks().is_ok());
}

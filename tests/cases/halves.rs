//! The two halves of the agent in processes of their own: the node half, and the proxy half, which carries the
//! connections of the node's pods.

#![allow(missing_docs, reason = "tests are named for what they show")]

use std::fs;
use std::time::Duration;

use dataplane_tests::agent::{CAPABILITIES, PROXY_CAPABILITIES, Setup};
use dataplane_tests::process::Process;
use dataplane_tests::{Agent, Node, Pod, Taps, World, eventually, program, scaled};

const PORT: u16 = 7000;

/// Two nodes, the first with its agent in two halves.
struct Halves {
    client: Pod,
    server: Pod,
    proxy: Option<Agent>,
    node: Agent,
    _two: Agent,
    nodes: (Node, Node),
    world: World,
}

impl Halves {
    fn new() -> Self {
        let world = World::new();
        let nodes = world.two_nodes();
        let (client, server) = (nodes.0.pod(&world, "client"), nodes.1.pod(&world, "server"));
        let two = world.agent(&nodes.1);
        two.up(&["server"]);
        let node = half(&world, &nodes.0, "node", "node");
        let proxy = half(&world, &nodes.0, "proxy", "proxy-1");
        node.up(&["client"]);
        let halves = Self {
            client,
            server,
            proxy: Some(proxy),
            node,
            _two: two,
            nodes,
            world,
        };
        halves.serves();
        halves
    }

    /// Starts another proxy of the first node.
    fn another(&self, log: &str) -> Agent {
        half(&self.world, &self.nodes.0, "proxy", log)
    }

    /// Waits until the node's pods are served, and dialled by HBONE.
    fn serves(&self) {
        eventually("the node is ready", 20, || {
            self.node.get("/healthz/ready").contains("ready")
        });
        let (app, to) = (self.server.serve(PORT + 90), self.server.at(PORT + 90));
        eventually("it is carried in HBONE", 20, || {
            let answer = self.client.ask(to, "x");
            let log = self.proxy.as_ref().map_or_else(String::new, Agent::log);
            answer.is_ok() && log.contains("dst.hbone_addr")
        });
        drop(app);
    }
}

fn half(world: &World, node: &Node, which: &'static str, log: &str) -> Agent {
    Agent::start(setup(world, node, which, log))
}

fn setup(world: &World, node: &Node, which: &'static str, log: &str) -> Setup {
    let mut setup = world.setup(node);
    setup.halves = which;
    if which == "proxy" {
        setup.place.capabilities = Some(PROXY_CAPABILITIES.to_vec());
    }
    setup.log = setup.log.with_file_name(format!("{log}.log"));
    setup
}

#[test]
fn two_halves_serve_as_one_agent_does() {
    let halves = Halves::new();
    let (_theirs, _own) = (halves.server.serve(PORT), halves.client.serve(PORT));
    let answer = halves.client.ask(halves.server.at(PORT), "out");
    assert_eq!(answer, Ok(format!("{} out", halves.client.v4)));
    let answer = halves.server.ask(halves.client.at(PORT), "in");
    assert_eq!(answer, Ok(format!("{} in", halves.server.v4)));
    let proxy = halves.proxy.as_ref().expect("it runs");
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
fn without_any_one_of_its_privileges_a_half_says_which_and_does_not_start() {
    let world = World::new();
    let node = world.node("one");
    let of_proxy = |(_, number): &&(&str, u8)| PROXY_CAPABILITIES.contains(number);
    let node_half = CAPABILITIES.iter().map(|of| ("node", of));
    let proxy_half = CAPABILITIES.iter().filter(of_proxy).map(|of| ("proxy", of));
    for (which, (name, number)) in node_half.chain(proxy_half) {
        let mut setup = setup(&world, &node, which, which);
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
    let taps = Taps::between(&halves.nodes, (&halves.client, &halves.server));
    halves.proxy.as_mut().expect("it runs").kill();
    eventually("that is told", 10, || {
        halves.node.get("/healthz/ready").contains("proxy")
    });
    let mut out = halves.client.talk(halves.server.at(PORT));
    let mut into = halves.server.talk(halves.client.at(PORT));
    out.say("out");
    into.say("in");
    halves.proxy.as_mut().expect("it was started").restart();
    assert_eq!(out.line(), format!("{} out", halves.client.v4));
    assert_eq!(into.line(), format!("{} in", halves.server.v4));
    taps.saw_nothing_of(PORT..PORT + 1);
}

/// Connections from the node's pod, a thousand a second where the machine is as fast as this one.
fn load(halves: &Halves, seconds: u32) -> Process {
    let each = 1000 / scaled(Duration::from_secs(1)).as_secs();
    let to = halves.server.at(PORT).to_string();
    let mut load = halves.client.command(program("DATAPLANE_TEST_APP"));
    Process::start(load.args(["rate", &to, &seconds.to_string(), &each.to_string()]))
}

#[test]
fn a_proxy_that_is_killed_under_load_refuses_no_connection() {
    let mut halves = Halves::new();
    let _theirs = halves.server.serve(PORT);
    let load = load(&halves, 6);
    let proxy = halves.proxy.as_mut().expect("it runs");
    let carried = |proxy: &Agent| proxy.log().matches("connection complete").count();
    eventually("it carries some", 20, || carried(proxy) > 100);
    proxy.kill();
    let before = carried(proxy);
    // So many begin meanwhile as cannot have been on their way through the one that was killed.
    std::thread::sleep(Duration::from_secs(1));
    proxy.restart();
    eventually("the next one carries some", 20, || {
        carried(proxy) > before + 100
    });
    let (status, lines) = load.end();
    assert!(status.success());
    // What it carried, or had accepted, is cut with it.
    let cut = |line: &String| line.contains(" reset, ") || line.contains(" eof, ");
    assert!(lines[1..].iter().all(cut), "{lines:?}");
    let number = |word: &str| -> Option<usize> { word.split(' ').next()?.parse().ok() };
    let cut: usize = lines[1..].iter().filter_map(|line| number(line)).sum();
    let begun_meanwhile = number(&lines[0]).expect("a number") / 8;
    assert!(cut < begun_meanwhile, "{lines:?}");
}

#[test]
fn a_proxy_that_is_replaced_under_load_breaks_no_connection() {
    let mut halves = Halves::new();
    let _theirs = halves.server.serve(PORT);
    let load = load(&halves, 6);
    let second = halves.another("proxy-2");
    second.logs(&["serves the pods of the node"]);
    let mut first = halves.proxy.replace(second).expect("it runs");
    let carried = first.log().matches("connection complete").count();
    first.ask_to_end();
    assert!(first.wait().success());
    let (status, lines) = load.end();
    assert!(status.success());
    assert!(carried > 0 && lines[0].ends_with(" 0 bad"), "{lines:?}");
}

#[test]
fn a_proxy_that_is_replaced_cuts_nothing_that_drains() {
    let mut halves = Halves::new();
    let _theirs = halves.server.serve(PORT);
    let mut live = halves.client.talk(halves.server.at(PORT));
    live.say("before");
    assert_eq!(live.line(), format!("{} before", halves.client.v4));
    let second = halves.another("proxy-2");
    second.logs(&["serves the pods of the node"]);
    let mut first = halves.proxy.replace(second).expect("it runs");
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
    let second = halves.proxy.as_ref().expect("it runs").log();
    assert!(
        second.matches("connection complete").count() >= 20,
        "{second}"
    );
}

#[test]
fn what_runs_goes_on_while_the_node_half_is_killed_and_comes_back() {
    let mut halves = Halves::new();
    let _theirs = halves.server.serve(PORT);
    let mut live = halves.client.talk(halves.server.at(PORT));
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
    let mut first = half(&world, &node, "node", "node");
    first.logs(&["waits for the state that nodes share"]);
    let mut proxy = half(&world, &node, "proxy", "proxy");
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
    let proxy = halves.proxy.as_mut().expect("it runs");
    proxy.terminate();
    let drain = proxy.setup().arguments.last_mut();
    *drain.expect("a time to drain") = "300s".into();
    proxy.restart();
    halves.serves();
    let mut proxy = halves.proxy.take().expect("it runs");
    let mut live = halves.client.talk(halves.server.at(PORT));
    live.say("before");
    assert_eq!(live.line(), format!("{} before", halves.client.v4));
    proxy.ask_to_end();
    proxy.logs(&["draining"]);
    // The node lets its connections go on for five seconds.
    halves.world.manifests.remove_pod("demo", "client");
    halves.node.logs(&["pod left the mesh"]);
    let end = live.line_within(scaled(Duration::from_secs(10)));
    assert!(end.is_some_and(|end| end.starts_with("closed")));
    proxy.kill();
}

//! Bad input and faults: each is refused with the documented status or close, logged, and never dialled; none breaks
//! anything that works.

#![allow(missing_docs, reason = "tests are named for what they show")]

use std::fs::{self, Permissions};
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

use dataplane_tests::agent::CAPABILITIES;
use dataplane_tests::lacks::Restriction;
use dataplane_tests::peer::Peer;
use dataplane_tests::process::output;
use dataplane_tests::{Agent, Node, SingleNode, Wire, World, eventually, scaled};
use http::Method;

const PORT: u16 = 7000;

/// Returns a peer with a certificate of the mesh's own CA.
fn peer_of(one: &SingleNode, identity: &str) -> Peer {
    let read =
        |file: &str| fs::read_to_string(one.world.state.join("ca").join(file)).expect("the CA");
    Peer::signed(&read("root.pem"), &read("key.pem"), identity)
}

#[test]
fn c9_what_a_pod_accepts_while_it_leaves_stays_inside() {
    let one = SingleNode::new();
    let app = one.server.app(&["serve", "7000", "late-device=eth0"]);
    assert_eq!(app.line(), "ready");
    let peer = peer_of(&one, "spiffe://cluster.local/ns/demo/sa/peer");
    let wire = Wire::tap(one.node.netns.file(), &one.server.veth);
    let own = one.server.at(PORT).to_string();
    // Tunnels accept new streams for one more second then, which a slow machine may miss.
    let mut accepted = false;
    for _ in 0..5 {
        let tunnel = peer.tunnel(&one.outsider, one.server.at(15008));
        let mut tunnel = tunnel.expect("a tunnel");
        let leaves = || one.agent.log().matches("pod leaves the mesh").count();
        let before = leaves();
        one.world.manifests.namespace("demo", false);
        eventually("it leaves", 10, || leaves() > before);
        accepted = tunnel.request(&Method::CONNECT, &own) == Ok(200);
        if accepted {
            one.agent.counts("kept_inside", "the answer", || {
                tunnel.say("hello\n", scaled(Duration::from_millis(200)));
            });
            break;
        }
        one.world.manifests.namespace("demo", true);
        one.agent.up(&["server"]);
    }
    assert!(accepted, "no tunnel took a stream");
    let leaked: Vec<_> = wire
        .end()
        .into_iter()
        .filter(|segment| segment.from.1 == PORT && !segment.payload.is_empty())
        .collect();
    assert!(leaked.is_empty(), "in clear on the veth: {leaked:?}");
}

#[test]
fn a_peer_is_let_in_by_its_certificate_and_to_the_pod_alone() {
    let one = SingleNode::new();
    let _app = one.server.serve(PORT);
    let _theirs = one.outsider.serve(PORT);
    let peer = peer_of(&one, "spiffe://cluster.local/ns/demo/sa/peer");
    let tunnel = one.server.at(15008);
    let connect =
        |authority: &str| peer.request(&one.outsider, tunnel, &Method::CONNECT, authority);
    let (own, own6) = (
        one.server.at(PORT).to_string(),
        one.server.at6(PORT).to_string(),
    );
    assert_eq!(connect(&own), Ok(200));
    let own6_by_6 = peer.request(
        &one.outsider,
        one.server.at6(15008),
        &Method::CONNECT,
        &own6,
    );
    assert_eq!(own6_by_6, Ok(200));
    for (authority, status) in [
        (one.outsider.at(PORT).to_string(), 400),
        // Its own address, but not that of the tunnel: the app would see itself as its client.
        (own6, 400),
        ("127.0.0.1:7000".into(), 400),
        ("[::1]:7000".into(), 400),
        ("0.0.0.0:7000".into(), 400),
        (format!("{}:15008", one.server.v4), 503),
        (format!("{}:15001", one.server.v4), 503),
        (format!("{}:15006", one.server.v4), 503),
        (format!("{}:0", one.server.v4), 400),
        ("server.demo.svc.cluster.local:80".into(), 400),
        (format!("{}:7999", one.server.v4), 503),
    ] {
        assert_eq!(connect(&authority), Ok(status), "{authority}");
    }
    for method in [Method::GET, Method::POST, Method::OPTIONS] {
        let status = peer.request(&one.outsider, tunnel, &method, &own);
        assert_eq!(status, Ok(400), "{method}");
    }
    one.agent
        .logs(&["expected method CONNECT, got GET", "connection failed"]);
    one.agent.logs(&[&format!(
        "ip mismatch: {} != {}",
        one.server.v4, one.outsider.v4
    )]);
    one.agent.logs(&["attempted recursive call to ourselves"]);
    one.agent
        .logs(&["invalid CONNECT address server.demo.svc.cluster.local:80"]);
    assert_eq!(connect(&own), Ok(200), "and what works goes on");
}

#[test]
fn a_peer_of_another_mesh_or_without_a_certificate_is_not_let_in() {
    let one = SingleNode::new();
    let _app = one.server.serve(PORT);
    let own = one.server.at(PORT).to_string();
    let connect =
        |peer: &Peer| peer.request(&one.outsider, one.server.at(15008), &Method::CONNECT, &own);
    for identity in [
        "spiffe://other.mesh/ns/demo/sa/peer",
        "spiffe://cluster.local/ns/demo",
        "https://cluster.local/ns/demo/sa/peer",
    ] {
        let refused = connect(&peer_of(&one, identity));
        assert!(refused.is_err(), "{identity}: {refused:?}");
    }
    assert!(connect(&Peer::stranger()).is_err());
    one.agent.logs(&["connection failed", "tls handshake error", "peer did not present the expected trustdomain (cluster.local), got spiffe://other.mesh/ns/demo/sa/peer"]);
    one.agent.logs(&["tls handshake error", "UnknownIssuer"]);
    let refused = connect(&Peer { shows: None });
    assert!(refused.is_err(), "{refused:?}");
    one.agent
        .logs(&["tls handshake error", "NoCertificatesPresented"]);
    let peer = peer_of(&one, "spiffe://cluster.local/ns/demo/sa/peer");
    assert_eq!(connect(&peer), Ok(200), "and who has one is let in");
    one.agent.logs(&["connection complete"]);
    let dialled = one.agent.log().matches("connection complete").count();
    assert_eq!(dialled, 1, "and nobody else");
}

#[test]
fn bytes_that_are_not_tls_are_closed_and_told() {
    let one = SingleNode::new();
    for line in ["GET / HTTP/1.1", "\u{16}\u{3}\u{1}", "x"] {
        let answer = one
            .outsider
            .ask(one.server.at(15008), line)
            .unwrap_or_default();
        assert!(!answer.contains(line), "{answer}");
    }
    one.agent
        .logs(&["connection failed", "tls error: tls handshake error"]);
    let _app = one.server.serve(PORT);
    assert!(
        one.outsider.ask(one.server.at(PORT), "x").is_ok(),
        "and what works goes on"
    );
}

#[test]
fn what_is_meant_for_the_agents_own_ports_in_clear_is_refused() {
    let one = SingleNode::new();
    for port in [15001, 15006] {
        assert_eq!(
            one.outsider.ask(one.server.at(port), "x"),
            Err("reset".into()),
            "{port}"
        );
    }
    one.agent.logs(&["attempted recursive call to ourselves"]);
}

#[test]
fn a_pod_that_calls_the_agents_own_ports_is_refused_once() {
    let one = SingleNode::new();
    // An address that was added after the enrolment is the pod's own, but not known as such.
    one.server.netns.ip("addr add 10.254.0.1/32 dev lo\n");
    let late = IpAddr::from([10, 254, 0, 1]);
    for address in [[127, 0, 0, 1].into(), one.server.v4, one.server.v6, late] {
        for port in [15001, 15006] {
            let to = SocketAddr::new(address, port);
            let answer = one.server.ask(to, "x");
            assert!(answer.is_err(), "{to}: {answer:?}");
        }
    }
    let own = one.server.serve(PORT);
    let answer = one.server.ask(SocketAddr::new(late, PORT), "x");
    assert_eq!(
        answer,
        Ok(format!("{late} x")),
        "what is its own it reaches"
    );
    drop(own);
    let told = one.agent.log().matches("dst.addr=10.254.0.1").count();
    assert!(
        told <= 2,
        "each call is one connection, not one that calls itself: {told}"
    );
    let _app = one.server.serve(PORT);
    assert!(
        one.outsider.ask(one.server.at(PORT), "x").is_ok(),
        "and what works goes on"
    );
}

#[test]
fn a_listener_that_had_to_take_another_port_is_not_dialled_there() {
    let world = World::new();
    let node = world.node("one");
    let server = node.bare(&world, "demo", "server");
    let outsider = node.bare(&world, "outside", "outsider");
    let _greedy: Vec<_> = [15001, 15006, 15008].map(|port| server.serve(port)).into();
    let _app = server.serve(PORT);
    world.manifests.pod(&node.object(&server));
    let agent = world.agent(&node);
    agent.up(&["server"]);
    let (_, listeners, _) = output(server.command("ss").args(["-Hltn"]));
    let ports: Vec<u16> = listeners
        .lines()
        .filter_map(|line| {
            line.split_whitespace()
                .nth(3)?
                .rsplit(':')
                .next()?
                .parse()
                .ok()
        })
        .filter(|port| ![PORT, 15001, 15006, 15008].contains(port))
        .collect();
    assert_eq!(ports.len(), 3, "{listeners}");
    for port in ports {
        for pod in [&server, &outsider] {
            // The listener for tunnels answers with a TLS alert.
            let answer = pod.ask(server.at(port), "x to the app").unwrap_or_default();
            assert!(!answer.contains("x to the app"), "{port}: {answer}");
        }
        let told = agent
            .log()
            .matches(&format!("{}:{port} ", server.v4))
            .count();
        assert!(
            told <= 4,
            "each call is one connection, not one that calls itself: {told}"
        );
    }
    assert!(
        outsider.ask(server.at(PORT), "x").is_ok(),
        "and what works goes on"
    );
}

fn start(
    world: &World,
    node: &Node,
    change: impl FnOnce(&mut Vec<String>, &mut Vec<(String, String)>),
) -> (Option<i32>, String) {
    let mut setup = world.setup(node);
    change(&mut setup.arguments, &mut setup.variables);
    let mut agent = Agent::start(setup);
    eventually("it ends by itself", 10, || !agent.runs());
    let status = agent.wait();
    (status.code(), agent.log())
}

#[test]
fn a_wrong_setting_stops_the_start_and_is_named() {
    let world = World::new();
    let node = world.node("one");
    for (wrong, name) in [
        (&["--drain", "soon"][..], "--drain"),
        (&["--workers", "none"], "--workers"),
        (&["--no-such-thing"], "--no-such-thing"),
        (&["--log", "loud"], "--log"),
    ] {
        let (code, log) = start(&world, &node, |arguments, _| {
            if wrong[0] == "--drain" {
                let drain = arguments.iter().position(|word| word == "--drain");
                let drain = drain.expect("it is set");
                arguments.drain(drain..drain + 2);
            }
            arguments.extend(wrong.iter().map(|word| (*word).to_owned()));
        });
        assert_eq!(code, Some(2), "{name}: {log}");
        assert!(log.contains(name), "{name}: {log}");
        fs::remove_file(world.folder().join("one.log")).expect("a log");
    }
    let (code, log) = start(&world, &node, |_, variables| {
        variables.push(("DATAPLANE_DRAN".into(), "1s".into()));
    });
    assert_eq!(code, Some(2));
    assert!(log.contains("DATAPLANE_DRAN is no setting"), "{log}");
    let (code, log) = start(&world, &node, |arguments, _| {
        let at = arguments
            .iter()
            .position(|word| word == "--cgroup")
            .expect("it is there");
        arguments[at + 1] = "/no/such/group".into();
    });
    assert_eq!(code, Some(2));
    assert!(log.contains("--cgroup: /no/such/group"), "{log}");
}

#[test]
fn a_bad_file_stops_the_start_and_is_named_with_line_and_field() {
    let world = World::new();
    let node = world.node("one");
    world.manifests.write("bad.yaml", "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata:\n  name: bad\n  namespace: demo\nspec:\n  action: MAYBE\n");
    let (code, log) = start(&world, &node, |_, _| {});
    assert_eq!(code, Some(2), "{log}");
    assert!(log.contains("bad.yaml:7: spec.action"), "{log}");
}

#[test]
fn a_file_that_goes_bad_changes_nothing_and_half_a_policy_removes_none() {
    let one = SingleNode::new();
    let _app = one.server.serve(PORT);
    let to = one.server.at(PORT);
    assert!(one.outsider.ask(to, "x").is_ok());
    one.world.manifests.policy(
        "demo",
        "nobody",
        "ALLOW",
        "server",
        "cluster.local/ns/x/sa/y",
    );
    eventually("denied", 5, || one.outsider.ask(to, "x").is_err());
    let path = one.world.manifests.folder.join("policy-demo-nobody.yaml");
    let whole = fs::read_to_string(&path).expect("a file");
    for bad in [&whole[..whole.len() / 2], "", "kind: [", "\u{0}\u{1}"] {
        let told = || {
            let parts = ["policy-demo-nobody.yaml", "what it said before holds"];
            let log = one.agent.log();
            let lines = log.lines();
            lines
                .filter(|line| parts.iter().all(|part| line.contains(part)))
                .count()
        };
        let before = told();
        // As some editors do: in place, and not by rename.
        fs::write(&path, bad).expect("a file");
        eventually(&format!("it is told of {bad:?}"), 5, || told() > before);
        assert!(one.outsider.ask(to, "x").is_err(), "still denied: {bad:?}");
    }
    let status = one.agent.status().expect("it answers");
    assert!(
        status["problems"]
            .to_string()
            .contains("policy-demo-nobody.yaml"),
        "{status}"
    );
    fs::write(&path, whole.replace("x/sa/y", "x/sa/z")).expect("a file");
    eventually("good again", 5, || {
        let status = one.agent.status().expect("it answers");
        status["problems"].as_array().is_some_and(Vec::is_empty)
    });
    assert!(one.outsider.ask(to, "x").is_err(), "and still denied");
}

#[test]
fn a_policy_counts_however_its_file_comes_and_changes() {
    let one = SingleNode::new();
    let _app = one.server.serve(PORT);
    let manifests = &one.world.manifests;
    let nobody = "cluster.local/ns/x/sa/y";
    manifests.policy("demo", "nobody", "ALLOW", "server", nobody);
    let path = manifests.folder.join("policy-demo-nobody.yaml");
    let of_server = fs::read_to_string(&path).expect("a file");
    // A policy that denies no connection of this test.
    let of_another = of_server.replace("app: server", "app: another");
    fs::remove_file(&path).expect("a file");
    let lets_in = |whether: bool, when: &str| {
        eventually(when, 10, || {
            one.outsider.ask(one.server.at(PORT), "x").is_ok() == whether
        });
    };
    lets_in(true, "there is no policy yet");

    fs::write(&path, &of_server).expect("a file");
    lets_in(false, "written in place");
    fs::write(&path, &of_another).expect("a file");
    lets_in(true, "written over in place");
    fs::remove_file(&path).expect("a file");

    // A link to a file in another folder, whose changes the kernel does not report.
    let elsewhere = one.world.folder().join("elsewhere.yaml");
    fs::write(&elsewhere, &of_server).expect("a file");
    symlink(&elsewhere, &path).expect("a link");
    lets_in(false, "linked");
    fs::write(&elsewhere, &of_another).expect("a file");
    lets_in(true, "written over where the link leads");
    fs::remove_file(&path).expect("a link");

    // As in a mounted ConfigMap: all files change at once, by a link that is replaced.
    let config = manifests.folder.join("config");
    for (version, text) in [("..1", &of_server), ("..2", &of_another)] {
        fs::create_dir_all(config.join(version)).expect("a folder");
        fs::write(config.join(version).join("policy.yaml"), text).expect("a file");
    }
    symlink("..1", config.join("..data")).expect("a link");
    symlink("..data/policy.yaml", config.join("policy.yaml")).expect("a link");
    lets_in(false, "mounted");
    symlink("..2", config.join("..new")).expect("a link");
    fs::rename(config.join("..new"), config.join("..data")).expect("a link");
    lets_in(true, "another version is mounted");

    // The folder itself is missing, which says nothing about its contents; then there is another one.
    let away = one.world.folder().join("away");
    fs::write(&path, &of_server).expect("a file");
    fs::remove_dir_all(&config).expect("a folder");
    lets_in(false, "written in place again");
    fs::rename(&manifests.folder, &away).expect("a folder");
    one.agent
        .logs(&["what it said before holds", "No such file"]);
    lets_in(false, "the folder is away");
    fs::create_dir(&manifests.folder).expect("a folder");
    for entry in fs::read_dir(&away).expect("a folder").flatten() {
        fs::copy(entry.path(), manifests.folder.join(entry.file_name())).expect("a file");
    }
    fs::write(&path, &of_another).expect("a file");
    lets_in(true, "another folder is in its place");
}

#[test]
fn what_nobody_knows_among_the_pins_stops_the_start_and_is_left_as_it_is() {
    let world = World::new();
    let node = world.node("one");
    let pins = world.bpffs().join("dataplane/one");
    for name in ["v0", "v1"] {
        fs::create_dir_all(pins.join(name).join("maps")).expect("a folder");
    }
    let mut agent = world.agent(&node);
    agent.logs(&["is not a dataplane agent's: it is beside"]);
    assert_eq!(agent.wait().code(), Some(2));
    for name in ["v0", "v1"] {
        assert!(pins.join(name).exists(), "{name}");
    }
}

#[test]
fn other_users_of_the_machine_cannot_keep_an_agent_from_its_pins() {
    let world = World::new();
    let node = world.node("one");
    // Mounted without `mode=`, it lets any user create folders in it.
    fs::set_permissions(world.folder(), Permissions::from_mode(0o711)).expect("a folder");
    let (all, pins) = (
        world.bpffs().join("dataplane"),
        world.bpffs().join("dataplane/one"),
    );
    let nobody = |name: &str, arguments: &[&str]| {
        let mut command = Command::new(name);
        command
            .args(arguments)
            .uid(65534)
            .gid(65534)
            .current_dir("/");
        output(&mut command).0.success()
    };
    let shown = all.display().to_string();
    assert!(nobody("mkdir", &[&shown]), "a folder of somebody else's");
    let mut agent = world.agent(&node);
    agent.logs(&[&format!("{shown}: it belongs to user 65534")]);
    assert_eq!(agent.wait().code(), Some(1));
    fs::remove_dir(&all).expect("nothing is in it");
    // A folder of root's that all may write to.
    fs::create_dir(&all).expect("a folder");
    fs::set_permissions(&all, Permissions::from_mode(0o777)).expect("a folder");
    agent.restart();
    agent.logs(&[&format!("{shown}: others than its owner may write to it")]);
    assert_eq!(agent.wait().code(), Some(1));
    // A folder of an older agent, which all may read.
    fs::set_permissions(&all, Permissions::from_mode(0o755)).expect("a folder");
    fs::create_dir(&pins).expect("a folder");
    fs::set_permissions(&pins, Permissions::from_mode(0o755)).expect("a folder");
    let shown = pins.display().to_string();
    let lock = ["-n", &*shown, "true"];
    assert!(
        nobody("flock", &lock),
        "anybody who can read it can lock it"
    );
    agent.restart();
    agent.logs(&["started"]);
    agent.kill();
    assert!(!nobody("flock", &lock), "nobody has it now");
    agent.restart();
    eventually("it runs", 10, || agent.status().is_some());
}

#[test]
fn without_any_one_of_its_privileges_it_says_which_and_does_not_start() {
    let world = World::new();
    let node = world.node("one");
    for (name, number) in CAPABILITIES {
        let mut setup = world.setup(&node);
        if let Some(keep) = &mut setup.place.capabilities {
            keep.retain(|kept| *kept != number);
        }
        let mut agent = Agent::start(setup);
        eventually("it ends by itself", 10, || !agent.runs());
        assert_eq!(agent.wait().code(), Some(3), "{name}: {}", agent.log());
        assert!(
            agent
                .log()
                .contains(&format!("{name} is missing: needed to")),
            "{name}: {}",
            agent.log()
        );
    }
}

#[test]
fn a_killed_agents_successor_takes_over_and_letting_go_is_complete() {
    let mut one = SingleNode::new();
    let _app = one.server.serve(PORT);
    for _ in 0..3 {
        one.agent.kill();
        one.agent.restart();
        one.agent.up(&["server"]);
        eventually("served again", 10, || {
            one.outsider.ask(one.server.at(PORT), "x").is_ok()
        });
    }
    one.agent.kill();
    assert!(!one.server.traces().is_empty() && !one.world.traces("one").is_empty());
    // The pod's object is removed while no agent runs.
    one.world.manifests.remove_pod("demo", "server");
    one.agent.restart();
    eventually("the successor lets it go", 10, || {
        one.server.traces().is_empty() && one.world.traces("one").is_empty()
    });
    assert!(one.outsider.ask(one.server.at(PORT), "x").is_ok());
}

#[test]
fn check_says_what_is_there_and_status_that_nobody_runs() {
    let world = World::new();
    let node = world.node("one");
    let bin = dataplane_tests::program("DATAPLANE_BIN");
    let mut check = Command::new(&bin);
    check
        .arg("check")
        .arg("--bpffs")
        .arg(world.bpffs())
        .arg("--cgroup")
        .arg(&node.cgroup.folder);
    let (status, out, _) = output(&mut check);
    assert!(status.success(), "{out}");
    for what in [
        "kernel",
        "capabilities",
        "cgroup v2",
        "bpffs",
        "sockets",
        "programs",
        "hooks",
    ] {
        assert!(
            out.lines()
                .any(|line| line.starts_with("ok") && line.contains(what)),
            "{what}: {out}"
        );
    }
    let mut check = Command::new(&bin);
    check
        .arg("check")
        .args(["--cgroup", "/no/such/group"])
        .arg("--bpffs")
        .arg(world.bpffs());
    let (status, out, _) = output(&mut check);
    assert_eq!(status.code(), Some(3), "{out}");
    assert!(out.contains("lacks  cgroup v2"), "{out}");
    let mut ask = Command::new(&bin);
    ask.args(["status", "--node", "nobody"])
        .arg("--run-dir")
        .arg(world.folder());
    let (status, _, error) = output(&mut ask);
    assert_eq!(status.code(), Some(5));
    assert!(error.contains("no dataplane agent runs"), "{error}");
}

#[test]
fn a_kernel_without_a_kind_of_programs_is_named_in_a_line_and_nothing_is_begun() {
    let world = World::new();
    let node = world.node("one");
    let client = node.pod(&world, "client");
    // The numbers are those of `enum bpf_prog_type`.
    for (kind, name) in [
        (8, "egress"),
        (13, "sock_ops"),
        (18, "connect4"),
        (30, "steer"),
    ] {
        let mut setup = world.setup(&node);
        setup.restriction = Some(Restriction::Programs(kind));
        let mut agent = Agent::start(setup);
        eventually("it ends by itself", 20, || !agent.runs());
        let status = agent.wait();
        let log = agent.log();
        assert_eq!(status.code(), Some(3), "{name}: {log}");
        let last = log.lines().last().unwrap_or_default();
        let named =
            format!("kernel program `{name}`: this kernel does not have programs of its kind");
        assert!(last.contains(&named), "{last}");
        assert!(!log.contains("pod enrolled"), "{log}");
        let entries = fs::read_dir(world.bpffs()).expect("a folder").flatten();
        // The kernel has two files of its own there, which are not folders.
        let left: Vec<_> = entries.filter(|entry| entry.path().is_dir()).collect();
        assert!(left.is_empty(), "{name}: pins are left: {left:?}");
        drop(agent);
    }
    // The same works without a restriction.
    let agent = world.agent(&node);
    agent.up(&["client"]);
    drop(client);
}

#[test]
fn a_kernel_without_ipv6_captures_ipv4_and_refuses_the_rest() {
    let world = World::new();
    let (one, two) = world.two_nodes();
    let (client, server) = (one.pod(&world, "client"), two.pod(&world, "server"));
    let _app = server.serve(PORT);
    let agents = [&one, &two].map(|node| {
        let mut setup = world.setup(node);
        setup.restriction = Some(Restriction::Ipv6);
        Agent::start(setup)
    });
    agents[0].up(&["client"]);
    agents[1].up(&["server"]);
    agents[0].logs(&["IPv6", "IPv4 alone"]);
    eventually("the server is dialled by HBONE", 10, || {
        agents[0].tunnelled() >= 2
    });
    let wire = Wire::tap(one.netns.file(), "wire");
    assert_eq!(
        client.ask(server.at(PORT), "four"),
        Ok(format!("{} four", client.v4))
    );
    let answer = client.ask(server.at6(PORT), "six");
    assert!(answer.is_err(), "{answer:?}");
    let segments = wire.end();
    assert!(
        !segments.iter().any(|segment| segment.to.1 == PORT),
        "in clear on the wire: {segments:?}"
    );
}

//! The two halves of the agent as neighbours: the places that they share, which of them starts first, and what
//! they leave.

#![allow(missing_docs, reason = "tests are named for what they show")]

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use dataplane_tests::halves::PORT;
use dataplane_tests::one::tree;
use dataplane_tests::world::Mounted;
use dataplane_tests::{Agent, Halves, World, eventually, pause, scaled};
use nix::sys::signal::Signal;

/// Asks an app of the server from the client, which is to be answered.
fn asks(halves: &Halves, word: &str) {
    let answer = halves.client.ask(halves.server.at(PORT), word);
    assert_eq!(answer, Ok(format!("{} {word}", halves.client.v4)));
}

/// How it is refused that an agent is started again.
fn refused(agent: &mut Agent) -> String {
    fs::remove_file(agent.log_file()).expect("a log");
    agent.restart();
    is_refused(agent)
}

fn is_refused(agent: &mut Agent) -> String {
    eventually("it ends by itself", 20, || !agent.runs());
    assert_eq!(agent.wait().code(), Some(2), "{}", agent.log());
    agent.log()
}

fn inode(path: &Path) -> Option<u64> {
    fs::symlink_metadata(path).ok().map(|found| found.ino())
}

#[test]
fn c1_a_node_is_not_uninstalled_while_a_proxy_carries_its_connections() {
    let mut halves = Halves::new();
    let _theirs = halves.server.serve(PORT);
    let mut live = halves.live();
    let taps = halves.taps();
    assert!(halves.node.terminate().success());
    let (status, _, said) = halves.node.uninstall();
    live.say("after");
    let after = live.line_within(Duration::from_secs(5));
    taps.saw_nothing_of(PORT..PORT + 1);
    assert_eq!(after, Some(format!("{} after", halves.client.v4)));
    assert_eq!(status.code(), Some(4), "{said}");
    assert!(said.contains("a proxy of this node runs"), "{said}");
    drop(live);
    assert!(halves.proxy.terminate().success());
    let (status, out, said) = halves.node.uninstall();
    assert!(status.success(), "{said}");
    assert!(out.contains("1 pods let go, nothing is left"), "{out}");
    assert_eq!(halves.left(), Vec::<PathBuf>::new());
}

#[test]
fn c7_nothing_is_left_of_two_halves_that_were_killed() {
    let mut halves = Halves::new();
    halves.node.kill();
    halves.proxy.kill();
    let run = halves.world.folder().join("run");
    for left in ["one/zds.sock", "one/admin.sock", "one.proxy.sock"] {
        assert!(run.join(left).exists(), "{left}");
    }
    let (status, out, said) = halves.node.uninstall();
    assert!(status.success(), "{said}");
    assert!(out.contains("1 pods let go, nothing is left"), "{out}");
    assert_eq!(halves.left(), Vec::<PathBuf>::new());
}

#[test]
fn c1_a_proxy_does_not_start_without_what_its_node_had() {
    let mut halves = Halves::new();
    let _theirs = halves.server.serve(PORT);
    let taps = halves.taps();
    halves.proxy.kill();
    let state = Mounted::empty_over(&halves.world.state);
    for agent in [&mut halves.proxy, &mut halves.node] {
        agent.end();
        let said = refused(agent);
        assert!(said.contains("ca/root.pem is missing, as if"), "{said}");
        assert!(tree(state.path()).is_empty(), "nothing is made there");
    }
    drop(state);
    halves.node.restart();
    halves.node.up(&["client"]);
    let manifests = Mounted::empty_over(&halves.world.manifests.folder);
    let said = refused(&mut halves.proxy);
    assert!(said.contains("--manifests: there are none"), "{said}");
    drop(manifests);
    let own = halves.proxy.setup().state.clone();
    halves.proxy.setup().state = halves.world.folder().join("other");
    let said = refused(&mut halves.proxy);
    assert!(said.contains("node one was started with --state"), "{said}");
    assert!(!halves.world.folder().join("other").exists());
    halves.proxy.setup().state = own;
    let arguments = halves.proxy.setup().arguments.clone();
    let other = ["--cluster-id".into(), "other".into()];
    halves.proxy.setup().arguments.extend(other);
    let said = refused(&mut halves.proxy);
    assert!(
        said.contains("node one was started with --cluster-id Kubernetes"),
        "{said}"
    );
    halves.proxy.setup().arguments = arguments;
    halves.proxy.restart();
    halves.serves();
    asks(&halves, "again");
    taps.saw_nothing_of(PORT..PORT + 1);
}

#[test]
fn c1_a_proxy_takes_no_pod_of_a_node_that_comes_back_in_another_cluster() {
    let mut halves = Halves::new();
    let _theirs = halves.server.serve(PORT);
    let leaves = |halves: &mut Halves| {
        // Where pods are captured a node does not start in another cluster.
        halves.world.manifests.remove_pod("demo", "client");
        halves.node.logs(&["pod left the mesh"]);
        assert!(halves.node.terminate().success());
    };
    let comes = |halves: &mut Halves| {
        halves.node.restart();
        let object = halves.nodes.0.object(&halves.client);
        halves.world.manifests.pod(&object);
        halves.node.up(&["client"]);
    };
    leaves(&mut halves);
    let own = halves.node.setup().arguments.clone();
    let other = ["--cluster-id".into(), "other".into()];
    halves.node.setup().arguments.extend(other);
    comes(&mut halves);
    let why = format!(
        "node one (pid {}) was started with --cluster-id other, and its proxy (pid {}) with \
         --cluster-id Kubernetes",
        halves.node.pid(),
        halves.proxy.pid()
    );
    halves
        .proxy
        .logs(&[&why, &format!("pid={}", halves.node.pid())]);
    halves
        .node
        .logs(&[&why, &format!("pid={}", halves.proxy.pid())]);
    let status = halves.node.status().unwrap_or_default();
    let problems = status["problems"].to_string();
    assert!(problems.contains(&why), "{problems}");
    let ready = halves.proxy.get("/healthz/ready");
    assert!(ready.contains("pending: node"), "{ready}");
    let mut waits = halves.client.talk(halves.server.at(PORT));
    waits.say("x");
    assert_eq!(waits.line_within(Duration::from_secs(2)), None);
    leaves(&mut halves);
    halves.node.setup().arguments = own;
    comes(&mut halves);
    halves.serves();
    asks(&halves, "again");
    assert!(halves.proxy.get("/healthz/ready").contains(" 200 "));
}

#[test]
fn c1_a_proxy_with_other_manifests_than_its_node_takes_none_of_its_pods() {
    let mut halves = Halves::new();
    let folder = halves.world.manifests.folder.clone();
    let other = halves.world.folder().join("others");
    fs::create_dir(&other).expect("a folder");
    for file in fs::read_dir(&folder).expect("the manifests").flatten() {
        fs::copy(file.path(), other.join(file.file_name())).expect("a copy");
    }
    let mut setup = halves.world.half(&halves.nodes.0, "proxy", "other");
    for argument in &mut setup.arguments {
        if *argument == folder.display().to_string() {
            *argument = other.display().to_string();
        }
    }
    let proxy = Agent::start(setup);
    let why = format!(
        "was started with --manifests {}, and its proxy (pid {}) with --manifests {}",
        folder.display(),
        proxy.pid(),
        other.display()
    );
    proxy.logs(&[&why]);
    halves.node.logs(&[&why]);
    halves.proxy.kill();
    let mut waits = halves.client.talk(halves.server.at(PORT));
    waits.say("x");
    assert_eq!(waits.line_within(Duration::from_secs(2)), None);
}

#[test]
fn c1_a_proxy_whose_root_is_not_that_of_its_node_ends() {
    let world = World::new();
    let node = world.node("one");
    let _client = node.pod(&world, "client");
    fs::create_dir(&world.state).expect("a folder");
    // It has found an empty folder, and the state is mounted later.
    let below = Mounted::empty_over(&world.state);
    let first = Agent::start(world.half(&node, "proxy", "proxy-1"));
    first.logs(&["waits for the node"]);
    drop(below);
    let second = Agent::start(world.half(&node, "proxy", "proxy-2"));
    second.logs(&["waits for the node"]);
    // In the order in which they are ended.
    let mut all = [
        first,
        second,
        Agent::start(world.half(&node, "node", "node")),
    ];
    let said = is_refused(&mut all[0]);
    assert!(said.contains("ca/root.pem: has the SHA-256"), "{said}");
    assert!(!said.contains("serves the pods of the node"), "{said}");
    all[2].up(&["client"]);
    all[1].logs(&["all pods of the node are lent"]);
}

#[test]
fn a_proxy_that_starts_first_makes_its_folder_and_is_ready_once_it_is_lent_all_pods() {
    let world = World::new();
    let node = world.node("one");
    let client = node.pod(&world, "client");
    let _app = client.serve(PORT);
    let proxy = Agent::start(world.half(&node, "proxy", "proxy"));
    proxy.logs(&["waits for the node"]);
    let ready = |proxy: &Agent| proxy.get("/healthz/ready");
    let said = ready(&proxy);
    assert!(said.contains("not ready, pending: node"), "{said}");
    // In the order in which they are ended.
    let both = [proxy, Agent::start(world.half(&node, "node", "node"))];
    both[1].up(&["client"]);
    eventually("the proxy is ready", 10, || {
        ready(&both[0]).contains(" 200 ")
    });
    let outsider = node.bare(&world, "outside", "outsider");
    let answer = outsider.ask(client.at(PORT), "x");
    assert_eq!(answer, Ok(format!("{} x", outsider.v4)));
}

#[test]
fn of_two_proxies_the_second_has_the_admin_socket_when_the_first_has_ended() {
    let mut halves = Halves::new();
    let socket = halves.proxy.socket();
    let first = inode(&socket);
    let second = halves.another("proxy-2");
    second.logs(&["all pods of the node are lent"]);
    second.logs(&["another process has the admin socket"]);
    // Each looks after its own every three seconds.
    pause(Duration::from_secs(7));
    assert_eq!(inode(&socket), first);
    for agent in [&halves.proxy, &second] {
        let log = agent.log();
        assert!(!log.contains("is made again"), "{log}");
    }
    halves.proxy.kill();
    second.logs(&["has the admin socket now"]);
    let ready = second.get("/healthz/ready");
    assert!(ready.contains(" 200 "), "{ready}");
}

#[test]
fn the_next_proxy_has_the_admin_socket_at_once_while_the_first_drains() {
    let mut halves = Halves::new();
    let _theirs = halves.server.serve(PORT);
    halves.proxy.terminate();
    let drain = halves.proxy.setup().arguments.last_mut();
    *drain.expect("a time to drain") = "300s".into();
    halves.proxy.restart();
    halves.serves();
    let mut live = halves.live();
    let mut second = halves.another("proxy-2");
    second.logs(&["all pods of the node are lent"]);
    second.logs(&["another process has the admin socket"]);
    let begun = Instant::now();
    halves.proxy.ask_to_end();
    second.logs(&["has the admin socket now"]);
    assert!(begun.elapsed() < scaled(Duration::from_secs(2)));
    let ready = second.get("/healthz/ready");
    assert!(ready.contains(" 200 "), "{ready}");
    assert!(second.tunnelled() >= 2);
    // Where nobody else wants it, the one that drains answers.
    halves
        .proxy
        .logs(&["another process has taken the admin socket over"]);
    second.kill();
    halves.proxy.logs(&["has the admin socket now"]);
    let ready = halves.proxy.get("/healthz/ready");
    assert!(ready.contains("pending: end"), "{ready}");
    halves.carries(&mut live, "after");
    halves.proxy.kill();
}

#[test]
fn a_socket_between_the_halves_that_is_removed_is_made_again() {
    let mut halves = Halves::new();
    let _theirs = halves.server.serve(PORT);
    let seam = halves.world.folder().join("run/one/zds.sock");
    // It would make it again before the next proxy comes.
    halves.node.signal(Signal::SIGSTOP);
    fs::remove_file(&seam).expect("a socket");
    halves.proxy.kill();
    halves.proxy.restart();
    halves.proxy.logs(&["the node cannot be reached"]);
    halves.node.signal(Signal::SIGCONT);
    halves
        .node
        .logs(&["\twarn\t", "the socket for proxies", "made again"]);
    asks(&halves, "again");
}

#[test]
fn a_node_does_not_start_with_a_state_that_others_may_write_to() {
    let mut halves = Halves::new();
    halves.node.kill();
    let mode = |mode| {
        let state = &halves.world.state;
        fs::set_permissions(state, Permissions::from_mode(mode)).expect("a mode");
    };
    mode(0o777);
    let said = refused(&mut halves.node);
    assert!(said.contains("mode 777 (chmod go-w)"), "{said}");
    mode(0o755);
    halves.node.restart();
    halves.node.up(&["client"]);
}

#[test]
fn status_of_a_node_tells_what_only_its_proxy_knows() {
    let mut halves = Halves::new();
    let problems = |node: &Agent| node.status().unwrap_or_default()["problems"].to_string();
    assert_eq!(problems(&halves.node), "[]");
    let service = |name: &str| {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: demo}}\n\
             spec: {{clusterIP: 10.96.7.7, ports: [{{port: 80}}]}}\n"
        )
    };
    let services = format!("{}---\n{}", service("first"), service("second"));
    halves.world.manifests.write("same.yaml", &services);
    eventually("the address that two have is told", 20, || {
        problems(&halves.node).contains("proxy: address 10.96.7.7")
    });
    halves.proxy.kill();
    eventually("a proxy that is gone is told instead", 20, || {
        let problems = problems(&halves.node);
        problems.contains("no proxy serves") && !problems.contains("proxy: ")
    });
}

#[test]
fn c1_an_agent_of_one_process_does_not_start_beside_a_proxy() {
    let mut halves = Halves::new();
    assert!(halves.node.terminate().success());
    halves.node.setup().halves = "run";
    halves.node.restart();
    eventually("it ends by itself", 20, || !halves.node.runs());
    assert_eq!(halves.node.wait().code(), Some(4), "{}", halves.node.log());
    halves.node.logs(&["a proxy of this node runs"]);
    assert!(halves.proxy.terminate().success());
    halves.node.restart();
    halves.node.up(&["client"]);
    // Nor does a proxy start beside it.
    halves.proxy.restart();
    eventually("it ends by itself", 20, || !halves.proxy.runs());
    assert_eq!(
        halves.proxy.wait().code(),
        Some(4),
        "{}",
        halves.proxy.log()
    );
    halves
        .proxy
        .logs(&["serves it alone (`dataplane run`)", "one.proxy.lock"]);
}

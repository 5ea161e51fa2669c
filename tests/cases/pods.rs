//! Detection of pods: how they come, go and come back, what is taken for a pod, and what holds while one leaves.

#![allow(missing_docs, reason = "tests are named for what they show")]

use std::ffi::OsStr;
use std::fs::{self, DirEntry};
use std::net::UdpSocket;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};

use dataplane_tests::bpf::{self, keys};
use dataplane_tests::cgroup::{self, Cgroup};
use dataplane_tests::lacks::Restriction;
use dataplane_tests::netns::Netns;
use dataplane_tests::process::{Process, app, said};
use dataplane_tests::world::{Mounted, Silent};
use dataplane_tests::{Agent, Node, Pair, Pod, World, eventually, pause, repairs, scaled};
use nix::mount::MntFlags;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const PORT: u16 = 7000;
const UID: &str = "0f8fad5b-d9cb-469f-a165-70867728950e";
/// The hash by which the kubelet identifies a static pod: in two annotations, and in its cgroup's name.
const HASH: &str = "c7c6e3a1f4b2d05e8a97b6c5d4e3f201";
/// A cgroup's name as a container engine makes it.
const CONTAINER: &str =
    "docker-5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef.scope";

/// Starts an agent whose drain is longer than the test.
fn patient(world: &World, node: &Node) -> Agent {
    let mut setup = world.setup(node);
    setup.drains_for("120s");
    Agent::start(setup)
}

/// Returns `true` if a pod's namespace has the traces of capture.
fn is_captured(pod: &Pod) -> bool {
    pod.netns.show("rule show").contains("fwmark")
}

fn processes(cgroup: &Cgroup) -> Vec<i32> {
    let text = fs::read_to_string(cgroup.folder.join("cgroup.procs")).expect("a cgroup");
    let pids = text.lines().map(|pid| pid.parse().expect("a pid"));
    pids.collect()
}

/// Moves a pod's processes to a cgroup below its own, as an engine does with each container.
fn into(pod: &Pod, name: &str) -> Cgroup {
    let inner = Cgroup::new(&pod.cgroup.folder.join(name));
    move_to(pod, &inner.folder);
    inner
}

fn move_to(pod: &Pod, folder: &Path) {
    for pid in processes(&pod.cgroup) {
        fs::write(folder.join("cgroup.procs"), pid.to_string()).expect("it is moved");
    }
}

/// Moves a pod's processes to the cgroup that the kubelet makes for a pod of this uid.
fn kubelets(kubepods: &Cgroup, pod: &Pod, uid: &str) {
    let folder = kubepods.folder.join("besteffort").join(format!("pod{uid}"));
    fs::create_dir_all(&folder).expect("a cgroup");
    move_to(pod, &folder);
}

/// Gives a pod the addresses of another, as any pod can that may change its own network.
fn take_addresses(thief: &Pod, of: &Pod) {
    let (v4, v6) = (of.v4, of.v6);
    thief.netns.ip(&format!("addr add {v4}/32 dev eth0\n"));
    thief
        .netns
        .ip6(&format!("addr add {v6}/128 dev eth0 nodad\n"));
}

#[test]
fn what_is_decided_while_the_agent_drains_holds_for_what_runs_and_for_what_comes() {
    let world = World::new();
    let (one, two) = world.two_nodes();
    let client = one.pod(&world, "client");
    let (server, other) = (two.pod(&world, "server"), two.pod(&world, "other"));
    let outsider = two.bare(&world, "outside", "outsider");
    let apps = [server.serve(PORT), other.serve(PORT)];
    let (first, second) = (world.agent(&one), patient(&world, &two));
    first.up(&["client"]);
    second.up(&["server", "other"]);
    eventually("all are dialled by HBONE", 10, || first.tunnelled() >= 3);
    let (live, mut stays) = (client.live(server.at(PORT)), client.live(other.at(PORT)));
    second.ask_to_end();
    second.logs(&["draining; pods stay captured"]);
    let asked = || outsider.ask(server.at(PORT), "in clear");
    assert!(asked().is_ok(), "what comes while it drains is served");
    world.manifests.policy(
        "demo",
        "nobody",
        "ALLOW",
        "server",
        "cluster.local/ns/x/sa/y",
    );
    assert_eq!(live.line(), "closed: reset");
    assert!(asked().is_err(), "what comes is refused");
    world.manifests.remove("policy-demo-nobody.yaml");
    eventually("it is let in again", 5, || asked().is_ok());
    world.manifests.mtls("demo", "STRICT");
    eventually("in clear nobody is let in", 5, || asked().is_err());
    stays.say("still");
    assert_eq!(stays.line(), format!("{} still", client.v4));
    assert!(second.runs(), "it drains");
    drop(apps);
}

#[test]
fn c6_a_pod_of_which_another_identity_is_said_while_it_drains_comes_back_as_that_one() {
    let world = World::new();
    let (one, two) = world.two_nodes();
    let (client, server) = (one.pod(&world, "client"), two.pod(&world, "server"));
    let _app = server.serve(PORT);
    let (first, second) = (patient(&world, &one), world.agent(&two));
    first.up(&["client"]);
    second.up(&["server"]);
    eventually("both dial by HBONE", 10, || first.tunnelled() >= 2);
    let live = client.live(server.at(PORT));
    let mut object = one.object(&client);
    let mode = |mode: &str| ("istio.io/dataplane-mode".to_owned(), mode.to_owned());
    object.labels.push(mode("none"));
    world.manifests.pod(&object);
    first.logs(&["pod leaves the mesh"]);
    first.is("client", "draining");
    object.labels.pop();
    object.account = "other";
    world.manifests.pod(&object);
    first.up(&["client"]);
    eventually("it has the other identity", 10, || {
        let _ = client.ask(server.at(PORT), "x");
        second.log().contains("ns/demo/sa/other")
    });
    assert_eq!(live.line(), "closed: reset", "what it was does not go on");
}

#[test]
fn c1_a_pod_that_is_recreated_is_served_while_its_earlier_instance_stays_captured() {
    let world = World::new();
    let (one, two) = world.two_nodes();
    let (client, server) = (one.pod(&world, "client"), two.pod(&world, "server"));
    let outsider = two.bare(&world, "outside", "outsider");
    let _apps = [server.serve(PORT), client.serve(PORT)];
    let (mut first, second) = (world.agent(&one), world.agent(&two));
    first.up(&["client"]);
    second.up(&["server"]);
    eventually("both dial by HBONE", 10, || first.tunnelled() >= 2);
    world.manifests.mtls("demo", "STRICT");
    let lets_in = |pod: &Pod| outsider.ask(pod.at(PORT), "in clear").is_ok();
    eventually("in clear nobody is let in", 10, || {
        !lets_in(&server) && !lets_in(&client)
    });
    let mut live = client.live(server.at(PORT));
    // The same name and uid, in a namespace of its own, while what ran before still runs.
    let again = one.bare(&world, "demo", "again");
    let mut object = one.object(&again);
    (object.name, object.account) = ("client", "client");
    world.manifests.pod(&object);
    eventually("the new one is captured", 10, || is_captured(&again));
    first.up(&["client"]);
    // Longer than a pod that leaves is captured, and its connections go on.
    pause(scaled(Duration::from_secs(5)) + Duration::from_secs(3));
    live.say("runs");
    assert_eq!(live.line(), format!("{} runs", client.v4));
    for pod in [&client, &again] {
        let answer = pod.ask(server.at(PORT), "x");
        assert_eq!(answer, Ok(format!("{} x", pod.v4)));
    }
    assert!(!lets_in(&client), "no policy holds for it");
    let earlier = "another pod of its name has come; it stays captured";
    assert!(first.ask(&["status"]).1.contains(earlier));
    // The next agent cannot serve it, and keeps it captured.
    first.kill();
    first.restart();
    first.up(&["client"]);
    pause(Duration::from_secs(3));
    assert!(client.ask(server.at(PORT), "x").is_err());
    assert!(!lets_in(&client), "it is let go");
    assert!(first.ask(&["status"]).1.contains(earlier));
    let answer = again.ask(server.at(PORT), "x");
    assert_eq!(answer, Ok(format!("{} x", again.v4)));
    drop(client);
    first.logs(&["pod left the mesh"]);
    assert!(!first.ask(&["status"]).1.contains(earlier));
    first.is("client", "up");
}

#[test]
fn c1_a_pod_is_not_up_while_another_namespace_with_its_addresses_may_be_its_newer_instance() {
    let world = World::new();
    let node = world.node("one");
    let web = node.pod(&world, "web");
    let outsider = node.bare(&world, "outside", "outsider");
    let _app = web.serve(PORT);
    let agent = world.agent(&node);
    agent.up(&["web"]);
    let again = node.bare(&world, "demo", "again");
    take_addresses(&again, &web);
    let waits = || {
        let (state, why) = agent.pod("web");
        let name = &again.netns.name;
        state == "waiting" && why.contains(name) && why.contains("not captured, and no policy")
    };
    eventually("both are told", 10, waits);
    assert!(!agent.get("/healthz/ready").contains(" 200 "));
    assert!(is_captured(&web) && !is_captured(&again));
    assert!(outsider.ask(web.at(PORT), "x").is_ok(), "it is served");
    // Another object of its name does not tell which of them is its own.
    let mut object = node.object(&web);
    object.uid = UID;
    world.manifests.pod(&object);
    pause(Duration::from_secs(3));
    assert!(waits(), "{:?}", agent.pod("web"));
    // By its path it is known.
    let path = format!("/run/netns/{}", again.netns.name);
    object
        .annotations
        .push(("ambient.dataplane/netns".into(), path));
    world.manifests.pod(&object);
    agent.up(&["web"]);
    assert!(is_captured(&web) && is_captured(&again));
}

#[test]
fn c1_a_pod_that_is_recreated_with_its_addresses_is_served_while_its_former_namespace_is_mounted() {
    let world = World::new();
    let node = world.node("one");
    let before = node.bare(&world, "outside", "before");
    let web = node.pod(&world, "web");
    let mut agent = world.agent(&node);
    agent.up(&["web"]);
    // The engine ends it, and leaves its namespace behind. The new one likely has a lower number.
    end(&web);
    cgroup::remove(&web.cgroup.folder);
    drop(before);
    let again = node.bare(&world, "demo", "again");
    take_addresses(&again, &web);
    eventually("the new one is captured", 10, || is_captured(&again));
    agent.up(&["web"]);
    assert!(is_captured(&web), "and the former one still is");
    let earlier = "another pod of its name has come; it stays captured";
    assert!(agent.ask(&["status"]).1.contains(earlier));
    // The next agent finds both captured, and serves the same one.
    let log = agent.log();
    let enrolled = log.lines().rfind(|line| line.contains("pod enrolled"));
    let netns = enrolled.and_then(|line| {
        line.split_whitespace()
            .find(|word| word.starts_with("netns="))
    });
    agent.kill();
    agent.restart();
    agent.logs(&["pod enrolled", netns.expect("it is told")]);
    agent.up(&["web"]);
}

#[test]
fn c1_a_pod_is_served_where_its_path_leads_now() {
    let world = World::new();
    let node = world.node("one");
    let (web, again) = (
        node.pod(&world, "web"),
        node.bare(&world, "outside", "again"),
    );
    let path = world.folder().join("netns");
    let first = Mounted::bind(&Path::new("/run/netns").join(&web.netns.name), path.clone());
    let mut object = node.object(&web);
    object
        .annotations
        .push(("ambient.dataplane/netns".into(), path.display().to_string()));
    world.manifests.pod(&object);
    let agent = world.agent(&node);
    agent.up(&["web"]);
    drop(first);
    let _second = Mounted::bind(&Path::new("/run/netns").join(&again.netns.name), path);
    eventually("it is told that this one lacks its address", 10, || {
        let (state, why) = agent.pod("web");
        state == "waiting" && why.contains("does not have")
    });
    take_addresses(&again, &web);
    eventually("it is captured there", 10, || is_captured(&again));
    agent.up(&["web"]);
    assert!(is_captured(&web), "and the former one still is");
}

#[test]
fn c7_a_pod_that_is_recreated_while_it_drains_goes_on_to_drain() {
    let world = World::new();
    let (one, two) = world.two_nodes();
    let (client, server) = (one.pod(&world, "client"), two.pod(&world, "server"));
    let _app = server.serve(PORT);
    let (first, second) = (patient(&world, &one), world.agent(&two));
    first.up(&["client"]);
    second.up(&["server"]);
    eventually("both dial by HBONE", 10, || first.tunnelled() >= 2);
    let mut live = client.live(server.at(PORT));
    world.manifests.remove_pod("demo", "client");
    first.logs(&["pod leaves the mesh"]);
    // The same name and uid, in a namespace of its own.
    let again = one.bare(&world, "demo", "again");
    let mut object = one.object(&again);
    (object.name, object.account) = ("client", "client");
    world.manifests.pod(&object);
    eventually("the new one is captured", 10, || is_captured(&again));
    first.up(&["client"]);
    let answer = again.ask(server.at(PORT), "new");
    assert_eq!(answer, Ok(format!("{} new", again.v4)));
    second.logs(&[&format!("src.addr={}:", again.v4), "src.identity="]);
    live.say("old");
    assert_eq!(
        live.line(),
        format!("{} old", client.v4),
        "the old one drains"
    );
    assert!(is_captured(&client), "and keeps inside what it says");
    drop(live);
    eventually("the old one is let go", 15, || !is_captured(&client));
    let answer = again.ask(server.at(PORT), "new still");
    assert_eq!(answer, Ok(format!("{} new still", again.v4)));
}

#[test]
fn c7_an_agent_that_cannot_look_lets_no_pod_go() {
    let pair = Pair::new();
    let _app = pair.server.serve(PORT);
    let mut live = pair.client.live(pair.server.at(PORT));
    let before = pair.one.limit_files(3);
    pause(Duration::from_secs(6));
    assert!(is_captured(&pair.client), "it stays captured");
    live.say("what runs goes on");
    assert_eq!(live.line(), format!("{} what runs goes on", pair.client.v4));
    pair.one.limit_files(before);
    pair.one.up(&["client"]);
    let answer = pair.client.ask(pair.server.at(PORT), "again");
    assert_eq!(answer, Ok(format!("{} again", pair.client.v4)));
    assert!(!pair.one.log().contains("pod left the mesh"));
}

#[test]
fn c1_a_pod_stays_captured_until_nobody_of_it_can_be_in_its_namespace() {
    let world = World::new();
    let (one, two) = world.two_nodes();
    let server = two.pod(&world, "server");
    let outsider = two.bare(&world, "outside", "outsider");
    let _app = server.serve(PORT);
    let pods = ["thread", "socket"].map(|how| (one.pod(&world, how), how));
    let (mut first, second) = (world.agent(&one), world.agent(&two));
    first.up(&["thread", "socket"]);
    second.up(&["server"]);
    eventually("all are dialled by HBONE", 10, || first.tunnelled() >= 3);
    world.manifests.mtls("demo", "STRICT");
    eventually("in clear nobody is let in", 10, || {
        outsider.ask(server.at(PORT), "x").is_err()
    });
    let mut hidden = pods.each_ref().map(|(pod, how)| {
        let hidden = pod.app(&["hide", &server.at(PORT).to_string(), how]);
        assert_eq!(hidden.line(), "ready");
        // Nothing else holds the namespace: neither a process nor a name.
        for pid in processes(&pod.cgroup) {
            if pid.cast_unsigned() != hidden.pid() {
                kill(Pid::from_raw(pid), Signal::SIGKILL).expect("the pod's own");
            }
        }
        let delete = ["netns", "del", &pod.netns.name];
        assert!(said(Command::new("ip").args(delete)).is_ok());
        hidden
    });
    // Longer than a namespace may be missed.
    pause(Duration::from_secs(6));
    for ((pod, how), hidden) in pods.iter().zip(&mut hidden) {
        hidden.say("x");
        assert_eq!(hidden.line(), format!("{} x", pod.v4), "{how}");
    }
    assert!(!first.log().contains("pod left the mesh"));
    // The next agent has not seen them there.
    first.kill();
    first.restart();
    pause(Duration::from_secs(6));
    assert!(!first.log().contains("pod left the mesh"));
    drop(hidden);
    for (_, how) in &pods {
        first.logs(&["pod left the mesh", &format!("demo/{how}")]);
    }
}

#[test]
fn a_pod_whose_first_thread_has_ended_is_found() {
    let world = World::new();
    let node = world.node("one");
    let pod = node.bare(&world, "demo", "leaderless");
    let app = pod.app(&["leaderless"]);
    assert_eq!(app.line(), "ready");
    // Nothing else holds the namespace: neither a process nor a name.
    for pid in processes(&pod.cgroup) {
        if pid.cast_unsigned() != app.pid() {
            kill(Pid::from_raw(pid), Signal::SIGKILL).expect("the pod's own");
        }
    }
    let delete = ["netns", "del", &pod.netns.name];
    assert!(said(Command::new("ip").args(delete)).is_ok());
    world.manifests.pod(&node.object(&pod));
    let agent = world.agent(&node);
    agent.up(&["leaderless"]);
}

#[test]
fn c6_a_container_that_comes_later_is_its_pods_from_then_on_and_after_a_restart() {
    let world = World::new();
    let (one, two) = world.two_nodes();
    let (client, server) = (
        one.bare(&world, "demo", "client"),
        two.pod(&world, "server"),
    );
    let outsider = two.bare(&world, "outside", "outsider");
    let nested = one.bare(&world, "outside", "nested");
    let _apps = [server.serve(PORT), outsider.serve(PORT)];
    let first = into(&client, "first");
    world.manifests.pod(&one.object(&client));
    let (mut agent, other) = (world.agent(&one), world.agent(&two));
    agent.up(&["client"]);
    other.up(&["server"]);
    eventually("both dial by HBONE", 10, || agent.tunnelled() >= 2);
    let to = server.at(PORT).to_string();
    let mut live = Process::start(&mut app(&client.netns, &first.folder, &["talk", &to]));
    assert_eq!(live.line(), "connected");
    let second = Cgroup::new(&client.cgroup.folder.join("second"));
    let later = Process::start(&mut app(&client.netns, &second.folder, &["pause"]));
    assert_eq!(later.line(), "ready");
    let is_whole = |agent: &Agent| {
        let status = agent.status().unwrap_or_default();
        let pod = &status["pods"][0];
        pod["outside"] == 0 && pod["cgroup"] == *client.cgroup.folder.display().to_string()
    };
    let ask = |netns: &Netns, to: String| {
        let asked = said(&mut app(netns, &second.folder, &["ask", &to, "x"]));
        asked.err().unwrap_or_default()
    };
    for _ in 0..2 {
        eventually("both containers are the pod's", 10, || is_whole(&agent));
        eventually("a namespace inside of the second one is refused", 5, || {
            ask(&nested.netns, outsider.at(PORT).to_string()) == "denied"
        });
        assert_eq!(ask(&client.netns, to.clone()), "", "the pod itself is not");
        live.say("x");
        assert_eq!(live.line(), format!("{} x", client.v4));
        // Once more, with a successor that finds both.
        agent.kill();
        agent.restart();
        agent.up(&["client"]);
        live = Process::start(&mut app(&client.netns, &first.folder, &["talk", &to]));
        assert_eq!(live.line(), "connected");
    }
}

#[test]
fn c6_a_containers_cgroup_that_is_made_again_is_its_pods_again() {
    let world = World::new();
    let node = world.node("one");
    let client = node.pod(&world, "client");
    let nested = node.bare(&world, "outside", "nested");
    let outsider = node.bare(&world, "outside", "outsider");
    let _app = outsider.serve(PORT);
    let agent = world.agent(&node);
    agent.up(&["client"]);
    let folder = node.cgroup.folder.join(CONTAINER);
    let is_its = || {
        let status = agent.status().unwrap_or_default();
        let groups = status["pods"][0]["cgroup"].to_string();
        groups.contains(CONTAINER)
    };
    for _ in 0..3 {
        let container = Cgroup::new(&folder);
        let inside = Process::start(&mut app(&client.netns, &folder, &["pause"]));
        assert_eq!(inside.line(), "ready");
        eventually("a namespace inside of the container is refused", 10, || {
            let to = outsider.at(PORT).to_string();
            let asked = said(&mut app(&nested.netns, &folder, &["ask", &to, "x"]));
            asked.is_err_and(|why| why == "denied")
        });
        eventually("it is in the status", 5, is_its);
        drop((inside, container));
    }
    eventually("what is gone is nobody's", 5, || !is_its());
    agent.up(&["client"]);
}

#[test]
fn a_pod_has_so_many_cgroups_and_others_when_they_are_gone() {
    const MOST: usize = 16;
    let world = World::new();
    let node = world.node("one");
    let client = node.pod(&world, "client");
    // With the pod's own cgroup these are two more than it may have.
    let mut containers: Vec<(Process, Cgroup)> = (0..=MOST)
        .map(|number| {
            let id = format!("{number:064x}.scope");
            let cgroup = Cgroup::new(&node.cgroup.folder.join(id));
            let inside = Process::start(&mut app(&client.netns, &cgroup.folder, &["pause"]));
            assert_eq!(inside.line(), "ready");
            (inside, cgroup)
        })
        .collect();
    let agent = world.agent(&node);
    agent.up(&["client"]);
    agent.logs(&["too_many_cgroups", "processes=2"]);
    let outside = || agent.status().unwrap_or_default()["pods"][0]["outside"].clone();
    let known = || {
        let layouts = fs::read_dir(world.bpffs().join("dataplane/one")).expect("pins");
        let mut maps = layouts.map(|layout| layout.expect("a folder").path().join("maps/CGROUPS"));
        let pin = maps.find(|pin| pin.exists()).expect("it is pinned");
        keys(&pin).expect("a hash table").len()
    };
    eventually("two have no room", 5, || {
        (outside(), known()) == (2.into(), MOST)
    });
    containers.drain(..2);
    eventually("the others are the pod's too", 10, || outside() == 0);
    eventually("and the kernel knows of them", 5, || known() == MOST);
    containers.drain(..8);
    eventually("those that are gone are forgotten", 10, || {
        known() == MOST - 8
    });
}

#[test]
fn a_process_beside_a_pods_cgroup_is_told_when_it_stays() {
    let world = World::new();
    let node = world.node("one");
    let client = node.pod(&world, "client");
    let agent = world.agent(&node);
    agent.up(&["client"]);
    let beside = |seconds: &str| {
        let mut sleep = Command::new("sleep");
        client
            .netns
            .run(|| sleep.arg(seconds).spawn())
            .expect("it runs")
    };
    let told = || agent.log().matches("outside_of_cgroups").count();
    // Some are there one after the other, each for less than a second. One that was stopped has stayed longer, and
    // may be told of: then they are tried again.
    let untold = (0..10).find_map(|_| {
        let before = told();
        let are_brief = (0..5).all(|_| {
            let began = Instant::now();
            beside("0.4").wait().expect("it ends");
            began.elapsed() < Duration::from_millis(900)
        });
        are_brief.then(|| told() == before)
    });
    assert_eq!(untold, Some(true), "{}", agent.log());
    let mut lasting = beside("60");
    agent.logs(&["outside_of_cgroups", "processes=1"]);
    lasting.kill().expect("it is ended");
    lasting.wait().expect("it ended");
    eventually("it is gone", 10, || {
        agent.status().unwrap_or_default()["pods"][0]["outside"] == 0
    });
}

#[test]
fn c1_a_pod_that_is_being_deleted_stays_captured_whatever_became_of_its_record() {
    let mut pair = Pair::new();
    let _app = pair.server.serve(PORT);
    pair.one.kill();
    let record = pair.world.state.join("enrolled/demo.client.json");
    fs::remove_file(record).expect("a record");
    let manifests = &pair.world.manifests;
    let text = fs::read_to_string(manifests.folder.join("pod-demo-client.yaml")).expect("a pod");
    let ends = "metadata:\n  deletionTimestamp: \"2026-11-26T00:00:00Z\"\n";
    let text = text.replacen("metadata:\n", ends, 1);
    manifests.write("pod-demo-client.yaml", &text);
    pair.one.restart();
    pair.one.up(&["client"]);
    pause(Duration::from_secs(3));
    let captured = pair.one.counter("captured");
    assert!(pair.client.ask(pair.server.at(PORT), "last words").is_ok());
    assert_eq!(pair.one.counter("captured"), captured + 1);
    assert!(!pair.one.log().contains("leaves the mesh"));
    // A further pod is not enrolled any more.
    let late = pair.nodes.0.bare(&pair.world, "demo", "late");
    let text = text.replace("client", "late");
    let text = text.replace(&pair.client.v4.to_string(), &late.v4.to_string());
    let text = text.replace(&pair.client.v6.to_string(), &late.v6.to_string());
    pair.world.manifests.write("pod-demo-late.yaml", &text);
    pair.one.is("late", "ignored");
}

#[test]
fn a_pod_that_could_not_be_enrolled_is_when_it_can_and_its_trials_are_told_once() {
    let world = World::new();
    let node = world.node("one");
    let agent = world.agent(&node);
    let late = node.bare(&world, "demo", "late");
    late.netns.ip("rule add pref 0 from all lookup 77\n");
    world.manifests.pod(&node.object(&late));
    eventually("it is told", 20, || {
        agent.pod("late").1.contains("preference 0")
    });
    late.netns.ip("rule del pref 0 from all lookup 77\n");
    agent.up(&["late"]);
    assert_eq!(agent.log().matches("cannot be enrolled").count(), 1);
}

#[test]
fn a_cgroup_that_is_too_deep_for_the_kernel_programs_is_told() {
    let world = World::new();
    let node = world.node("one");
    let client = node.pod(&world, "client");
    let depth = |folder: &Path| {
        let below = folder.strip_prefix(cgroup::root()).expect("a cgroup");
        below.components().count()
    };
    let mut deep: Vec<Cgroup> = Vec::new();
    let mut folder = client.cgroup.folder.clone();
    while depth(&folder) < 13 {
        folder.push("deeper");
        deep.push(Cgroup::new(&folder));
    }
    move_to(&client, &folder);
    let agent = world.agent(&node);
    agent.up(&["client"]);
    agent.logs(&["outside_of_cgroups", "processes=1"]);
    deep.reverse();
    let pids = processes(&deep[0]);
    for pid in pids {
        let procs = deep[1].folder.join("cgroup.procs");
        fs::write(procs, pid.to_string()).expect("it is moved");
    }
    drop(deep.remove(0));
    eventually("in a higher one it is the pod's", 10, || {
        agent.status().unwrap_or_default()["pods"][0]["outside"] == 0
    });
}

#[test]
fn a_pod_that_is_half_in_when_its_agent_is_to_end_is_served_to_the_end() {
    let world = World::new();
    let (one, two) = world.two_nodes();
    let (client, server) = (one.pod(&world, "client"), two.pod(&world, "server"));
    let outsider = two.bare(&world, "outside", "outsider");
    let _app = server.serve(PORT);
    let others: Vec<Pod> = (0..10)
        .map(|number| one.bare(&world, "demo", &format!("other{number}")))
        .collect();
    let apps: Vec<Process> = others.iter().map(|pod| pod.serve(PORT)).collect();
    let (mut agent, _two) = (patient(&world, &one), world.agent(&two));
    agent.up(&["client"]);
    let _live = client.live(server.at(PORT));
    for pod in &others {
        world.manifests.pod(&one.object(pod));
    }
    agent.logs(&["pod enrolled", "demo/other"]);
    agent.ask_to_end();
    agent.logs(&["draining"]);
    let of = |text: &str| agent.log().matches(text).count();
    eventually("it drains", 5, || of("draining") == 1);
    let steered = |pod: &&Pod| bpf::steering(&pod.netns.file()) > 0;
    let half = || others.iter().filter(steered).count();
    eventually("what was begun is finished", 5, || {
        half() == of("pod enrolled") - 1
    });
    for pod in others.iter().filter(steered) {
        let answer = outsider.ask(pod.at(PORT), "x");
        assert!(answer.is_ok(), "{}: {answer:?}", pod.name);
        let record = format!("enrolled/demo.{}.json", pod.name);
        eventually("other nodes are told of it", 5, || {
            world.state.join(&record).exists()
        });
    }
    drop(apps);
    agent.kill();
}

#[test]
fn what_a_pod_that_comes_back_has_lost_is_put_back_told_and_counted() {
    let world = World::new();
    let node = world.node("one");
    let (client, server) = (
        node.pod(&world, "client"),
        node.bare(&world, "outside", "server"),
    );
    let _app = server.serve(PORT);
    let agent = patient(&world, &node);
    agent.up(&["client"]);
    let mut live = client.live(server.at(PORT));
    let mut object = node.object(&client);
    let none = ("istio.io/dataplane-mode".into(), "none".into());
    object.labels.push(none);
    world.manifests.pod(&object);
    agent.logs(&["pod leaves the mesh"]);
    // It is scanned now, and then not for some seconds.
    client.netns.ip("addr add 10.100.0.1/32 dev eth0\n");
    agent.logs(&["pod has other addresses than it had"]);
    let before = repairs(&agent, "steer");
    let netns = client.netns.file();
    let inode = netns.metadata().expect("it is open").ino();
    assert_eq!(bpf::detach(inode), 1);
    world.manifests.pod(&node.object(&client));
    agent.logs(&["pod enrolled again"]);
    assert_eq!(bpf::steering(&netns), 1);
    agent.logs(&["demo/client", "what keeps a pod captured was gone", "steer"]);
    eventually("it is counted", 5, || {
        repairs(&agent, "steer") == before + 1
    });
    live.say("still");
    assert_eq!(live.line(), format!("{} still", client.v4));
}

#[test]
fn c7_what_cannot_be_undone_of_a_pod_that_was_half_in_is_undone_later() {
    let world = World::new();
    let node = world.node("one");
    let agent = world.agent(&node);
    let client = node.bare(&world, "demo", "client");
    agent.logs(&["started"]);
    // The path of its program's pin is taken by something that can be neither replaced nor removed.
    let cookie = client.netns.cookie();
    let layouts = fs::read_dir(world.bpffs().join("dataplane/one")).expect("pins");
    let layout = layouts.map(|layout| layout.expect("a folder").path());
    let pin = layout.last().expect("a layout").join("pods").join(cookie);
    fs::create_dir(&pin).expect("a folder");
    world.manifests.pod(&node.object(&client));
    agent.logs(&["what was begun cannot be undone"]);
    world.manifests.remove_pod("demo", "client");
    agent.logs(&["pod's namespace is not as it was"]);
    assert!(!world.traces("one").is_empty());
    fs::remove_dir(&pin).expect("it is empty");
    eventually("nothing is left of it", 15, || {
        world.traces("one").is_empty() && client.traces().is_empty()
    });
}

#[test]
fn c7_what_was_changed_is_undone_in_a_namespace_that_has_a_mount_alone() {
    let world = World::new();
    let node = world.node("one");
    let client = node.pod(&world, "client");
    let mut agent = world.agent(&node);
    agent.up(&["client"]);
    agent.kill();
    let name = Path::new("/run/netns").join(&client.netns.name);
    let mount = Mounted::bind(&name, world.folder().join("somewhere else"));
    nix::mount::umount2(&name, MntFlags::MNT_DETACH).expect("it is mounted");
    for pid in processes(&client.cgroup) {
        kill(Pid::from_raw(pid), Signal::SIGKILL).expect("a process");
    }
    world.manifests.remove_pod("demo", "client");
    agent.restart();
    eventually("nothing is left of it on its node", 15, || {
        world.traces("one").is_empty()
    });
    let _named = Mounted::over(mount.path(), name);
    assert_eq!(client.traces(), Vec::<String>::new());
}

#[test]
fn other_nodes_are_told_of_a_pod_before_the_next_one_is_enrolled() {
    let world = World::new();
    let node = world.node("one");
    let pods: Vec<Pod> = (0..12)
        .map(|number| node.pod(&world, &format!("p{number}")))
        .collect();
    let agent = world.agent(&node);
    let names: Vec<&str> = pods.iter().map(|pod| &*pod.name).collect();
    agent.up(&names);
    let written = |folder: PathBuf| -> Vec<SystemTime> {
        let files = fs::read_dir(folder).expect("a folder").flatten();
        let records = files.filter(|file| file.path().extension() == Some(OsStr::new("json")));
        let when = |file: DirEntry| file.metadata().and_then(|of| of.modified());
        records.map(|file| when(file).expect("a file")).collect()
    };
    let told = written(world.state.join("enrolled"));
    // Changes in a pod are recorded before they are made.
    let begun = written(world.folder().join("run/one/pods"));
    assert_eq!((told.len(), begun.len()), (pods.len(), pods.len()));
    assert!(told.iter().min() < begun.iter().max(), "{told:?} {begun:?}");
}

#[test]
fn a_pod_whose_namespace_is_gone_is_dialled_by_hbone_no_more() {
    let world = World::new();
    let node = world.node("one");
    let pod = node.pod(&world, "pod");
    let agent = world.agent(&node);
    agent.up(&["pod"]);
    eventually("it is dialled by HBONE", 10, || agent.tunnelled() == 1);
    // Its object stays, and so does its waiting entry.
    drop(pod);
    agent.logs(&["pod left the mesh"]);
    agent.is("pod", "waiting");
    eventually("it is not any more", 5, || agent.tunnelled() == 0);
}

/// Starts an agent that logs the reason for each scan of the machine, and the time of the next one.
fn watchful(world: &World, node: &Node, restriction: Option<Restriction>) -> Agent {
    let mut setup = world.setup(node);
    let level = "info,dataplane_agent::node::machine=debug";
    setup.variables = vec![("RUST_LOG".into(), level.into())];
    setup.restriction = restriction;
    Agent::start(setup)
}

/// Returns the scans in an agent's log from byte `since` on.
fn looks(agent: &Agent, since: usize) -> Vec<String> {
    let log = agent.log();
    let looks = log[since..].lines();
    let looks = looks.filter(|line| line.contains("the machine was looked at"));
    looks.map(str::to_owned).collect()
}

/// Ends the processes of a pod.
fn end(pod: &Pod) {
    for pid in processes(&pod.cgroup) {
        kill(Pid::from_raw(pid), Signal::SIGKILL).expect("a process");
    }
    eventually("it is empty", 5, || processes(&pod.cgroup).is_empty());
}

#[test]
fn a_pod_that_starts_and_one_that_ends_are_looked_at_as_it_happens() {
    let world = World::new();
    let node = world.node("one");
    let pods = ["first", "late"].map(|name| node.pod(&world, name));
    let [first, late] = &pods;
    end(late);
    let agent = watchful(&world, &node, None);
    agent.up(&["first"]);
    agent.is("late", "waiting");
    let is_told = |since: usize| {
        looks(&agent, since)
            .iter()
            .any(|look| look.contains("cgroups"))
    };
    // The scans of the start are over.
    let since = || agent.log().len();
    eventually("nothing happens", 20, || {
        let since = since();
        pause(Duration::from_secs(2));
        !is_told(since)
    });
    let since_start = since();
    let begun = late.app(&["pause"]);
    assert_eq!(begun.line(), "ready");
    eventually("it is told that the pod starts", 5, || is_told(since_start));
    agent.up(&["first", "late"]);
    let since_end = since();
    end(first);
    eventually("it is told that the pod ends", 5, || is_told(since_end));
    let delete = ["netns", "del", &first.netns.name];
    assert!(said(Command::new("ip").args(delete)).is_ok());
    agent.logs(&["pod left the mesh", "demo/first"]);
    // Also in a cgroup that is created later.
    let container = Cgroup::new(&late.cgroup.folder.join("later"));
    eventually("all is told of it", 20, || {
        let since = since();
        pause(Duration::from_secs(1));
        !is_told(since)
    });
    let since_inside = since();
    let inside = Process::start(&mut app(&late.netns, &container.folder, &["pause"]));
    assert_eq!(inside.line(), "ready");
    eventually("it is told that it fills", 5, || is_told(since_inside));
    drop((begun, inside));
}

#[test]
fn where_nothing_is_told_of_cgroups_the_machine_is_looked_at_each_second() {
    let world = World::new();
    let node = world.node("one");
    let _first = node.pod(&world, "first");
    let agent = watchful(&world, &node, Some(Restriction::Inotify));
    agent.up(&["first"]);
    agent.logs(&[
        "cannot be told of changes of cgroups",
        "looking each second",
    ]);
    let late = node.pod(&world, "late");
    agent.up(&["first", "late"]);
    drop(late);
    agent.logs(&["pod left the mesh", "demo/late"]);
    let since = agent.log().len();
    let mut seen = Vec::new();
    eventually("it is looked again and again", 10, || {
        seen = looks(&agent, since);
        seen.len() >= 2
    });
    assert!(
        seen.iter()
            .all(|look| look.contains("next=1s") || look.contains("ms")),
        "{seen:?}"
    );
    let told = agent
        .log()
        .matches("cannot be told of changes of cgroups")
        .count();
    assert_eq!(told, 1);
}

#[test]
fn c6_who_names_a_cgroup_of_its_own_after_another_pod_gains_nothing() {
    let world = World::new();
    let node = world.node("one");
    let bare = |name| node.bare(&world, "demo", name);
    let (victim, fixed) = (bare("victim"), bare("fixed"));
    let kubepods = Cgroup::new(&node.cgroup.folder.join("kubepods"));
    kubelets(&kubepods, &victim, UID);
    kubelets(&kubepods, &fixed, HASH);
    let thieves = ["plain", "container"].map(|name| node.bare(&world, "outside", name));
    for thief in &thieves {
        take_addresses(thief, &victim);
        take_addresses(thief, &fixed);
    }
    let [plain, container] = &thieves;
    let _inner = into(plain, &format!("pod{UID}"));
    let group = Cgroup::new(&node.cgroup.folder.join(CONTAINER));
    let folder = group.folder.join(format!("pod{UID}"));
    fs::create_dir(&folder).expect("a cgroup");
    move_to(container, &folder);
    let agent = world.agent(&node);
    let mut object = node.object(&victim);
    object.uid = UID;
    world.manifests.pod(&object);
    let mut object = node.object(&fixed);
    object.uid = "9d3f1c5e-2f0b-4a43-9a52-6a1f1d1d7b11";
    // Any user who may annotate a pod can set the one, but only the kubelet the other.
    let says = |word: &str| (format!("kubernetes.io/config.{word}"), HASH.to_owned());
    object.annotations.push(says("hash"));
    world.manifests.pod(&object);
    agent.up(&["victim"]);
    pause(Duration::from_secs(3));
    assert_eq!(agent.pod("fixed").0, "waiting");
    object.annotations.push(says("mirror"));
    world.manifests.pod(&object);
    agent.up(&["victim", "fixed"]);
    assert!(is_captured(&victim) && is_captured(&fixed));
    assert!(!thieves.iter().any(is_captured));
}

#[test]
fn c6_of_two_pods_in_one_cgroup_one_is_served_and_of_the_other_nothing_leaves() {
    let world = World::new();
    let (one, two) = world.two_nodes();
    let (first, second) = (one.pod(&world, "first"), one.bare(&world, "demo", "second"));
    let server = two.bare(&world, "outside", "server");
    let _app = server.serve(PORT);
    let agent = world.agent(&one);
    agent.up(&["first"]);
    let pause = processes(&second.cgroup)[0];
    move_to(&second, &first.cgroup.folder);
    world.manifests.pod(&one.object(&second));
    let shared = "start its processes in one of their own";
    eventually("the other waits, and is told why", 10, || {
        let (state, why) = agent.pod("second");
        state == "waiting" && why.contains("Pod/demo/first") && why.contains(shared)
    });
    for to in [server.at(PORT), server.at6(PORT)] {
        let ask = ["ask", &to.to_string(), "x"];
        let said = said(&mut app(&second.netns, &first.cgroup.folder, &ask));
        assert_eq!(said, Err("denied".into()), "{to}");
        assert!(first.ask(to, "x").is_ok(), "{to}");
    }
    agent.logs(&["foreign_cgroup", &format!("pod={}", first.v4)]);
    // In a cgroup of its own it is served.
    let procs = second.cgroup.folder.join("cgroup.procs");
    fs::write(procs, pause.to_string()).expect("it is moved");
    agent.up(&["first", "second"]);
    assert!(second.ask(server.at(PORT), "x").is_ok());
}

#[test]
fn c6_who_takes_a_new_pods_address_does_not_keep_it_out_of_the_mesh() {
    let world = World::new();
    let node = world.node("one");
    // A pod that the agent knows, outside of the mesh; and one that it does not know.
    let (known, unknown) = (
        node.bare(&world, "outside", "known"),
        node.bare(&world, "outside", "unknown"),
    );
    let (plain, named) = (
        node.bare(&world, "demo", "plain"),
        node.bare(&world, "demo", "named"),
    );
    world.manifests.pod(&node.object(&known));
    take_addresses(&known, &plain);
    take_addresses(&unknown, &named);
    let kubepods = Cgroup::new(&node.cgroup.folder.join("kubepods"));
    kubelets(&kubepods, &named, UID);
    let agent = world.agent(&node);
    world.manifests.pod(&node.object(&plain));
    let mut object = node.object(&named);
    object.uid = UID;
    world.manifests.pod(&object);
    agent.up(&["plain", "named"]);
    assert!(is_captured(&plain) && is_captured(&named));
    assert!(!is_captured(&known) && !is_captured(&unknown));
}

#[test]
fn c6_what_is_odd_in_a_neighbours_namespace_keeps_no_pod_out_of_the_mesh() {
    let world = World::new();
    let node = world.node("one");
    let (outside, pod) = (
        node.bare(&world, "outside", "odd"),
        node.bare(&world, "demo", "pod"),
    );
    for odd in [&outside, &pod] {
        // No port is left to bind, and the cgroup's name is not UTF-8.
        odd.netns
            .set_sysctl("net.ipv4.ip_local_port_range", "40000 40000");
    }
    let taken = [&outside, &pod].map(|odd| odd.netns.run(|| UdpSocket::bind("0.0.0.0:40000")));
    let inner = [&outside, &pod].map(|odd| {
        let inner = Cgroup::new(&odd.cgroup.folder.join(OsStr::from_bytes(b"caf\xe9")));
        move_to(odd, &inner.folder);
        inner
    });
    assert!(taken.iter().all(Result::is_ok), "{taken:?}");
    world.manifests.pod(&node.object(&pod));
    let agent = world.agent(&node);
    agent.up(&["pod"]);
    assert!(is_captured(&pod) && !is_captured(&outside));
    drop((taken, inner));
}

#[test]
fn c6_a_neighbours_threaded_cgroup_keeps_no_pod_out_of_the_mesh() {
    let world = World::new();
    let node = world.node("one");
    let (outside, pod) = (
        node.bare(&world, "outside", "threaded"),
        node.bare(&world, "demo", "pod"),
    );
    let all = Cgroup::new(&node.cgroup.folder.join("all"));
    let [theirs, first, second] =
        ["theirs", "first", "second"].map(|name| Cgroup::new(&all.folder.join(name)));
    let threaded = Cgroup::new(&theirs.folder.join("threaded"));
    fs::write(threaded.folder.join("cgroup.type"), "threaded").expect("it becomes one");
    move_to(&outside, &theirs.folder);
    move_to(&pod, &first.folder);
    let also = Process::start(&mut app(&pod.netns, &second.folder, &["pause"]));
    assert_eq!(also.line(), "ready");
    world.manifests.pod(&node.object(&pod));
    let agent = world.agent(&node);
    agent.up(&["pod"]);
    drop((also, threaded, theirs, first, second));
}

#[test]
fn c6_who_takes_a_served_pods_address_does_not_darken_it_at_a_restart() {
    let world = World::new();
    let node = world.node("one");
    let (victim, thief) = (
        node.pod(&world, "victim"),
        node.bare(&world, "outside", "thief"),
    );
    let outsider = node.bare(&world, "outside", "outsider");
    let _app = victim.serve(PORT);
    let mut agent = world.agent(&node);
    agent.up(&["victim"]);
    take_addresses(&thief, &victim);
    agent.kill();
    agent.restart();
    eventually("it is served", 20, || {
        outsider.ask(victim.at(PORT), "x").is_ok()
    });
    assert!(is_captured(&victim) && !is_captured(&thief));
    // Which of them has come later is not known.
    agent.is("victim", "waiting");
    drop(thief);
    agent.up(&["victim"]);
}

#[test]
fn c6_who_takes_the_address_of_a_pod_that_is_gone_does_not_get_its_identity() {
    let world = World::new();
    let node = world.node("one");
    let thief = node.bare(&world, "outside", "thief");
    let victim = node.pod(&world, "victim");
    let agent = world.agent(&node);
    agent.up(&["victim"]);
    take_addresses(&thief, &victim);
    let (v4, v6) = (victim.v4.to_string(), victim.v6.to_string());
    drop(victim);
    agent.logs(&["pod left the mesh"]);
    pause(Duration::from_secs(3));
    assert!(!is_captured(&thief));
    agent.is("victim", "waiting");
    // The victim itself, in a newer namespace.
    let again = node.bare(&world, "demo", "again");
    again.netns.ip(&format!("addr add {v4}/32 dev eth0\n"));
    again
        .netns
        .ip6(&format!("addr add {v6}/128 dev eth0 nodad\n"));
    agent.up(&["victim"]);
    assert!(is_captured(&again) && !is_captured(&thief));
}

#[test]
fn a_pods_namespace_is_found_by_the_path_that_is_said() {
    let world = World::new();
    let node = world.node("one");
    let pods = ["mount", "process", "link"].map(|name| node.pod(&world, name));
    let [mount, process, link] = &pods;
    let of_process = format!("/proc/{}/ns/net", processes(&process.cgroup)[0]);
    let linked = PathBuf::from(format!("/run/netns/dp-{}-link", world.id));
    let target = format!("/proc/{}/ns/net", processes(&link.cgroup)[0]);
    std::os::unix::fs::symlink(target, &linked).expect("a link");
    let paths = [
        format!("/var/run/netns/{}", mount.netns.name),
        of_process,
        linked.display().to_string(),
    ];
    // Their addresses are those of others too, so that the path alone tells which is which.
    let thief = node.bare(&world, "outside", "thief");
    for (pod, path) in pods.iter().zip(paths) {
        take_addresses(&thief, pod);
        let mut object = node.object(pod);
        object
            .annotations
            .push(("ambient.dataplane/netns".into(), path));
        world.manifests.pod(&object);
    }
    let agent = world.agent(&node);
    agent.up(&["mount", "process", "link"]);
    fs::remove_file(linked).expect("a link");
}

#[test]
fn a_path_on_a_file_system_that_does_not_answer_keeps_no_other_pod_waiting() {
    let world = World::new();
    let node = world.node("one");
    let [_other, odd] = ["other", "odd"].map(|name| node.pod(&world, name));
    let folder = world.folder().join("silent");
    fs::create_dir(&folder).expect("a folder");
    let silent = Silent::over(&folder);
    let mut object = node.object(&odd);
    let path = folder.join("netns").display().to_string();
    let annotation = ("ambient.dataplane/netns".into(), path.clone());
    object.annotations.push(annotation);
    world.manifests.pod(&object);
    let mut agent = world.agent(&node);
    agent.up(&["other"]);
    let (state, why) = agent.pod("odd");
    assert_eq!(state, "waiting");
    assert!(why.contains(&path), "{why}");
    assert_eq!(agent.terminate().code(), Some(0));
    drop(silent);
}

#[test]
fn what_comes_to_the_pods_cgroup_is_told_when_that_is_made_again() {
    let world = World::new();
    let node = world.node("one");
    let agent = watchful(&world, &node, None);
    agent.logs(&["the machine was looked at"]);
    cgroup::remove(&node.cgroup.folder);
    agent.logs(&["cannot be told of changes of cgroups"]);
    fs::create_dir(&node.cgroup.folder).expect("a cgroup");
    agent.logs(&["the kernel tells of changes of cgroups again"]);
    let since = agent.log().len();
    let _pod = node.pod(&world, "pod");
    eventually("it is told that the pod starts", 5, || {
        looks(&agent, since)
            .iter()
            .any(|look| look.contains("cgroups"))
    });
    agent.up(&["pod"]);
}

#[test]
fn a_pod_with_more_interfaces_than_are_read_is_told_of_and_keeps_no_other_one_waiting() {
    let world = World::new();
    let node = world.node("one");
    let client = node.pod(&world, "client");
    // Any new pod may be in its namespace, as far as one can tell.
    let stranger = node.bare(&world, "outside", "stranger");
    let mut agent = world.agent(&node);
    agent.up(&["client"]);
    let pairs = |line: fn(u32) -> String| (0..520).map(line).collect::<String>();
    let make = pairs(|number| format!("link add a{number} type veth peer name b{number}\n"));
    for pod in [&client, &stranger] {
        pod.netns.ip(&make);
    }
    let why = "more than 1024 interfaces";
    eventually("that is told", 20, || {
        let (state, reason) = agent.pod("client");
        state == "broken" && reason.contains(why)
    });
    let late = node.pod(&world, "late");
    agent.up(&["late"]);
    // It is captured and served as it was.
    let _app = late.serve(PORT);
    let captured = agent.counter("captured");
    let answer = client.ask(late.at(PORT), "x");
    assert_eq!(answer, Ok(format!("{} x", client.v4)));
    assert!(agent.counter("captured") > captured);
    agent.kill();
    agent.restart();
    agent.up(&["late"]);
    eventually("it stays captured", 20, || {
        let (state, reason) = agent.pod("client");
        state == "waiting" && reason.contains(why) && reason.contains("stays captured")
    });
    client
        .netns
        .ip(&pairs(|number| format!("link del a{number}\n")));
    agent.up(&["client"]);
    // Nor do they keep anything of ours in the pod when it leaves.
    client.netns.ip(&make);
    assert!(!client.traces().is_empty());
    let mut object = node.object(&client);
    let leaves = ("istio.io/dataplane-mode".into(), "none".into());
    object.labels.push(leaves);
    world.manifests.pod(&object);
    eventually("nothing is left in the pod", 20, || {
        client.traces().is_empty()
    });
}

#[test]
fn a_pod_that_came_again_and_is_not_found_yet_is_not_told_to_be_up() {
    let world = World::new();
    let node = world.node("one");
    let pod = node.pod(&world, "pod");
    let agent = world.agent(&node);
    agent.up(&["pod"]);
    let mut object = node.object(&pod);
    let own = std::mem::replace(&mut object.addresses, vec!["10.254.0.1".into()]);
    world.manifests.pod(&object);
    eventually("it waits", 10, || {
        let (state, reason) = agent.pod("pod");
        state == "waiting"
            && reason.contains("no network namespace of this machine has 10.254.0.1")
            && reason.contains("what was found before stays captured and served")
    });
    // It does not run yet, as far as one can tell.
    assert!(agent.get("/healthz/ready").contains(" 200 "));
    object.addresses = own;
    world.manifests.pod(&object);
    agent.up(&["pod"]);
}

#[test]
fn a_node_is_ready_when_every_pod_that_is_here_is_captured() {
    let world = World::new();
    let node = world.node("one");
    let up = node.pod(&world, "up");
    let late = node.bare(&world, "demo", "late");
    let mut object = node.object(&late);
    let own = std::mem::take(&mut object.addresses);
    world.manifests.pod(&object);
    let agent = world.agent(&node);
    let ready = || agent.get("/healthz/ready").contains(" 200 ");
    let problems = || agent.status().unwrap_or_default()["problems"].to_string();
    agent.up(&["up"]);
    agent.is("late", "waiting");
    eventually("who has no address yet holds nobody up", 5, ready);
    assert_eq!(problems(), "[]");
    // Nor a pod of which nothing is found here; that is reported, since its object may be wrong.
    object.addresses = vec!["10.254.0.1".into()];
    world.manifests.pod(&object);
    eventually("that is a problem", 5, || {
        problems().contains("demo/late: no network namespace of this machine has 10.254.0.1")
    });
    assert!(ready());
    // An address of another pod is not its own.
    object.addresses = vec![up.at(0).ip().to_string()];
    world.manifests.pod(&object);
    let why = format!("has {} but that of pod demo/up", up.at(0).ip());
    eventually("whose it is, is told", 5, || problems().contains(&why));
    // It is here, but ambiguous.
    let thief = node.bare(&world, "outside", "thief");
    take_addresses(&thief, &late);
    object.addresses.clone_from(&own);
    world.manifests.pod(&object);
    eventually("it is not ready", 5, || {
        !ready() && problems().contains("demo/late: more than one network namespace has")
    });
    drop(thief);
    agent.up(&["late"]);
    eventually("ready again", 5, ready);
    assert_eq!(problems(), "[]");
}

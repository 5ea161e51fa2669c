//! Limits: the effects that many, silent or refused connections and an unread log must not have.

#![allow(missing_docs, reason = "tests are named for what they show")]

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use dataplane_tests::process::Process;
use dataplane_tests::{Agent, Pair, SingleNode, World, bpf, eventually, repairs, scaled, within};

const PORT: u16 = 7000;
const HBONE: u16 = 15008;

/// Returns the resident memory of an agent in megabytes.
fn resident(agent: &Agent) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", agent.pid())).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kilobytes = line.and_then(|line| line.split_whitespace().next());
    kilobytes
        .and_then(|number| number.parse::<u64>().ok())
        .expect("a number")
        / 1024
}

/// Returns the processor time of each worker of an agent, in ticks.
fn worked(agent: &Agent) -> Vec<u64> {
    let tasks = fs::read_dir(format!("/proc/{}/task", agent.pid())).expect("it runs");
    let mut workers: Vec<(String, u64)> = tasks
        .flatten()
        .filter_map(|task| {
            let stat = fs::read_to_string(task.path().join("stat")).ok()?;
            let (name, rest) = stat.split_once('(')?.1.rsplit_once(')')?;
            let fields: Vec<&str> = rest.split_whitespace().collect();
            let ticks = |field: usize| fields.get(field)?.parse::<u64>().ok();
            name.starts_with("worker-")
                .then(|| Some((name.to_owned(), ticks(11)? + ticks(12)?)))?
        })
        .collect();
    workers.sort();
    workers.into_iter().map(|(_, ticks)| ticks).collect()
}

/// Returns the sum of a metric's series whose labels contain all of these.
fn metric(agent: &Agent, name: &str, labels: &[&str]) -> u64 {
    let text = agent.get("/metrics");
    let series = text.lines().filter_map(|line| {
        let rest = line.strip_prefix(name)?;
        let (of, value) = rest.rsplit_once(' ')?;
        let fits = (of.is_empty() || of.starts_with('{')) && labels.iter().all(|l| of.contains(l));
        fits.then(|| value.parse::<f64>().expect("a number") as u64)
    });
    series.sum()
}

/// A pipe that is not read, in place of a log file.
struct Unread(fs::File, PathBuf);

impl Unread {
    fn new(log: &Path) -> Self {
        nix::unistd::mkfifo(log, nix::sys::stat::Mode::S_IRWXU).expect("a pipe");
        // Open for both, so that neither side waits for the other.
        let pipe = fs::OpenOptions::new().read(true).write(true).open(log);
        Self(pipe.expect("a pipe"), log.to_owned())
    }
}

impl Drop for Unread {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.1);
    }
}

#[test]
fn memory_that_two_thousand_connections_took_is_given_back_within_a_minute() {
    let pair = Pair::new();
    let _app = pair.server.serve(PORT);
    let to = pair.server.at(PORT).to_string();
    assert!(pair.client.ask(pair.server.at(PORT), "x").is_ok());
    let before = [resident(&pair.one), resident(&pair.two)];
    let mut many = pair.client.app(&["many", &to, "2000"]);
    let open = many.line_within(Duration::from_secs(90));
    assert_eq!(open.as_deref(), Some("2000 open"));
    let during = [resident(&pair.one), resident(&pair.two)];
    many.close();
    drop(many);
    let mut after = [0, 0];
    let given_back = within(60, || {
        std::thread::sleep(Duration::from_millis(500));
        after = [resident(&pair.one), resident(&pair.two)];
        (0..2).all(|agent| after[agent] <= before[agent] + 12)
    });
    eprintln!("MB before {before:?}, with 2000 connections {during:?}, after {after:?}");
    assert!(
        given_back,
        "MB: {before:?}, then {during:?}, then {after:?}"
    );
}

#[test]
fn a_peer_gets_in_while_another_holds_hundreds_of_silent_connections() {
    let pair = Pair::new();
    let _app = pair.server.serve(PORT);
    let outsider = pair.nodes.0.bare(&pair.world, "outside", "outsider");
    let to = pair.server.at(HBONE).to_string();
    let silent = outsider.app(&["many", &to, "600", "silent"]);
    assert_eq!(silent.line(), "600 open");
    let answer = pair.client.ask(pair.server.at(PORT), "x");
    assert_eq!(answer, Ok(format!("{} x", pair.client.v4)));
    let gave_way = ["too_many_handshakes"];
    eventually("those that gave way are counted", 5, || {
        metric(&pair.two, "dataplane_connections_failed_total", &gave_way) > 0
    });
    pair.two.logs(&["too many handshakes at once"]);
    let log = pair.two.log();
    let told = log.matches("too many handshakes at once").count();
    assert!(told < 60, "and told of with how many: {told}");
}

#[test]
fn who_says_nothing_at_the_tunnels_port_is_sent_away_soon() {
    let pair = Pair::new();
    let outsider = pair.nodes.0.bare(&pair.world, "outside", "outsider");
    let to = pair.server.at(HBONE).to_string();
    let silent = outsider.app(&["many", &to, "20", "silent"]);
    assert_eq!(silent.line(), "20 open");
    eventually("they are sent away", 8, || {
        metric(
            &pair.two,
            "dataplane_connections_failed_total",
            &["no_client_hello"],
        ) == 20
    });
}

#[test]
fn over_the_nodes_limit_the_new_one_is_refused_and_a_pod_that_has_none_yet_is_not() {
    let world = World::new();
    let (one, two) = world.two_nodes();
    let (client, server) = (one.pod(&world, "client"), two.pod(&world, "server"));
    let other = one.pod(&world, "other");
    let mut setup = world.setup(&one);
    setup
        .arguments
        .extend(["--connections".into(), "30".into()]);
    let (first, second) = (Agent::start(setup), world.agent(&two));
    first.up(&["client", "other"]);
    second.up(&["server"]);
    eventually("all are in the mesh", 10, || first.tunnelled() >= 3);
    let _app = server.serve(PORT);
    let mut many = client.app(&["many", &server.at(PORT).to_string(), "40"]);
    let open = opened(&many);
    // It is half of the places, of which tunnels take some.
    assert!((10..15).contains(&open), "{open}");
    assert!(client.ask(server.at(PORT), "x").is_err());
    assert!(other.ask(server.at(PORT), "x").is_ok(), "another pod's");
    first.logs(&["direction=\"outbound\"", "too many connections of the node"]);
    let refused = ["too_many_connections_of_node"];
    assert!(metric(&first, "dataplane_connections_failed_total", &refused) >= 25);
    assert_eq!(metric(&first, "dataplane_connections_limit", &[]), 30);
    many.close();
    drop(many);
    eventually("there is room again", 5, || {
        client.ask(server.at(PORT), "x").is_ok()
    });
}

#[test]
fn a_pod_takes_no_more_files_than_the_bound_for_connections_leaves_to_it() {
    let one = SingleNode::new();
    // While it looks at the machine it has one more open for each network namespace.
    let least = || {
        let open = (0..40).map(|_| {
            std::thread::sleep(Duration::from_millis(50));
            let open = fs::read_dir(format!("/proc/{}/fd", one.agent.pid()));
            open.expect("it runs").count()
        });
        open.min().expect("there are some")
    };
    let without = least();
    let _pods = ["a", "b", "c"].map(|name| one.node.pod(&one.world, name));
    one.agent.up(&["a", "b", "c"]);
    let taken = least() - without;
    assert!((45..=60).contains(&taken), "three pods take {taken}");
}

#[test]
fn a_pods_idle_tunnels_give_way_to_its_connections() {
    let world = World::new();
    let (one, two) = world.two_nodes();
    let client = one.pod(&world, "client");
    let servers = ["a", "b", "c", "d", "e"].map(|name| two.pod(&world, name));
    let mut setup = world.setup(&one);
    let limits = ["--connections", "24", "--workers", "2"];
    setup.arguments.extend(limits.map(String::from));
    let (first, second) = (Agent::start(setup), world.agent(&two));
    first.up(&["client"]);
    second.up(&["a", "b", "c", "d", "e"]);
    eventually("all are in the mesh", 10, || first.tunnelled() >= 6);
    let _apps = servers.each_ref().map(|server| server.serve(PORT));
    // It may have twelve of these, of which tunnels take five. In parallel, so that both workers have some.
    let asked = servers.each_ref().map(|server| {
        let to = server.at(PORT).to_string();
        client.app(&["ask", &to, "x"])
    });
    for ask in asked {
        assert!(ask.end().0.success());
    }
    eventually("their places are free again", 5, || {
        metric(&first, "dataplane_connections", &[]) <= 5
    });
    // With a tunnel on each worker.
    let many = client.app(&["many", &servers[0].at(PORT).to_string(), "10"]);
    assert_eq!(opened(&many), 10);
}

/// Returns the number of connections that it has opened.
fn opened(many: &Process) -> usize {
    let line = many.line();
    let count = line.strip_suffix(" open").map(str::parse);
    count.and_then(Result::ok).expect("a number")
}

#[test]
fn a_peer_that_takes_all_it_can_keeps_no_other_out() {
    let world = World::new();
    let (one, two) = world.two_nodes();
    let (client, server) = (one.pod(&world, "client"), two.pod(&world, "server"));
    let other = one.pod(&world, "other");
    let outsiders = ["first", "second"].map(|name| one.bare(&world, "outside", name));
    let mut setup = world.setup(&two);
    setup
        .arguments
        .extend(["--connections".into(), "80".into()]);
    let (first, second) = (world.agent(&one), Agent::start(setup));
    first.up(&["client", "other"]);
    second.up(&["server"]);
    eventually("all are in the mesh", 10, || first.tunnelled() >= 3);
    let _app = server.serve(PORT);
    let to = server.at(PORT);
    let refused = || {
        let labels = ["destination", "too_many_connections_of_peer"];
        metric(&second, "dataplane_connections_failed_total", &labels)
    };
    // By tunnels, and in clear.
    for (greedy, other) in [(&client, &other), (&outsiders[0], &outsiders[1])] {
        let before = refused();
        let many = greedy.app(&["many", &to.to_string(), "60"]);
        let open = opened(&many);
        assert!((15..=35).contains(&open), "{open}");
        eventually("the others are refused", 5, || {
            refused() - before == 60 - open as u64
        });
        assert!(greedy.ask(to, "x").is_err());
        let answer = other.ask(to, "x");
        assert_eq!(answer, Ok(format!("{} x", other.v4)), "another's");
    }
    first.logs(&["http status: 503 Service Unavailable"]);
}

#[test]
fn a_log_that_nobody_reads_stops_no_connection_and_what_is_lost_is_counted() {
    let world = World::new();
    let (one, two) = world.two_nodes();
    let (client, server) = (one.pod(&world, "client"), two.pod(&world, "server"));
    let mut setup = world.setup(&two);
    setup.variables = vec![("RUST_LOG".into(), "info,access=debug,h2=trace".into())];
    let pipe = Unread::new(&setup.log);
    let (first, mut second) = (world.agent(&one), Agent::start(setup));
    // Dropped before the agent, which shows its log if a test fails.
    let mut pipe = pipe;
    first.up(&["client"]);
    second.up(&["server"]);
    eventually("both are in the mesh", 10, || first.tunnelled() >= 2);
    let _app = server.serve(PORT);
    let (_, lines) = client
        .app(&["rate", &server.at(PORT).to_string(), "4", "100"])
        .end();
    assert_eq!(lines, ["400 good, 0 bad"]);
    eventually("lines are lost, as nobody has read them", 5, || {
        metric(&second, "dataplane_log_lines_lost_total", &[]) > 0
    });
    // Once it is read again, it reports what was lost.
    let mut read = vec![0; 1 << 16];
    let mut text = String::new();
    eventually("it says how many", 10, || {
        let length = pipe.0.read(&mut read).expect("a pipe");
        text.push_str(&String::from_utf8_lossy(&read[..length]));
        text.contains("log lines were lost")
    });
    assert!(client.ask(server.at(PORT), "x").is_ok());
    assert!(
        second.terminate().success(),
        "it ends though nobody reads what it still says"
    );
}

#[test]
fn a_pod_for_which_there_is_no_room_loses_no_connection_by_it() {
    for map in ["PODS", "CGROUPS"] {
        let one = SingleNode::new();
        let pins = one.world.pinned("one", "maps");
        let pin = pins.iter().find(|pin| pin.ends_with(map)).expect("a map");
        bpf::fill(pin);
        let app = one.outsider.serve(PORT);
        let mut object = one.node.object(&one.outsider);
        object.namespace = "demo";
        one.world.manifests.pod(&object);
        let waits = || one.agent.pod("outsider");
        let client = one.node.bare(&one.world, "outside", "client");
        // Connections are tried again and again meanwhile.
        let (began, mut asked) = (Instant::now(), 0);
        while began.elapsed() < scaled(Duration::from_secs(4)) {
            for to in [one.outsider.at(PORT), one.outsider.at6(PORT)] {
                let answer = client.ask(to, "x");
                assert!(answer.is_ok(), "{map}: {to}: {answer:?}");
            }
            asked += 1;
        }
        assert!(asked > 5, "{map}: {asked}");
        one.agent.logs(&["cannot be enrolled"]);
        assert_eq!(one.agent.log().matches("cannot be enrolled").count(), 1);
        let (state, why) = waits();
        assert!(state == "waiting" && why.contains(map), "{state}: {why}");
        assert!(why.contains("not captured"), "{why}");
        // The other pod's entries in it are put back.
        let before = repairs(&one.agent, "entry");
        bpf::clear(pin);
        eventually("they are", 10, || repairs(&one.agent, "entry") > before);
        one.agent.up(&["server", "outsider"]);
        drop(app);
    }
}

#[test]
fn what_a_lack_repeats_is_told_once_a_second() {
    let pair = Pair::new();
    let _app = pair.server.serve(PORT);
    assert!(pair.client.ask(pair.server.at(PORT), "x").is_ok());
    let pid = pair.two.pid().to_string();
    let open = fs::read_dir(format!("/proc/{pid}/fd"))
        .expect("it runs")
        .count();
    let limit = |soft: usize| {
        let mut prlimit = Command::new("prlimit");
        prlimit.args(["--pid", &pid, &format!("--nofile={soft}:")]);
        assert!(prlimit.status().expect("util-linux").success());
    };
    let began = Instant::now();
    limit(open);
    let outsider = pair.nodes.0.bare(&pair.world, "outside", "outsider");
    let silent = outsider.app(&["many", &pair.server.at(PORT).to_string(), "10", "silent"]);
    // A connection that was accepted with the last descriptor is reset.
    silent.line();
    pair.two.logs(&["cannot accept"]);
    std::thread::sleep(Duration::from_secs(4));
    limit(open + 1000);
    let log = pair.two.log();
    let told = log
        .lines()
        .filter(|line| line.contains("cannot accept"))
        .count();
    let seconds = began.elapsed().as_secs();
    assert!(told as u64 <= seconds + 2, "{told} lines in {seconds} s");
    drop(silent);
    eventually("it accepts again", 5, || {
        pair.client.ask(pair.server.at(PORT), "x").is_ok()
    });
}

#[test]
fn the_bytes_of_an_open_connection_are_in_the_metrics() {
    let pair = Pair::new();
    let _app = pair.server.serve(PORT);
    let mut talk = pair.client.talk(pair.server.at(PORT));
    talk.say("0123456789");
    assert!(talk.line().ends_with("0123456789"));
    for (agent, reporter) in [(&pair.one, "source"), (&pair.two, "destination")] {
        let labels = [&*format!("reporter=\"{reporter}\""), "response_flags=\"-\""];
        eventually("the client's bytes", 3, || {
            metric(agent, "istio_tcp_received_bytes_total", &labels) >= 11
        });
        eventually("the server's bytes", 3, || {
            metric(agent, "istio_tcp_sent_bytes_total", &labels) >= 11
        });
        assert_eq!(
            metric(agent, "istio_tcp_connections_closed_total", &labels),
            0
        );
    }
}

#[test]
fn two_busy_connections_have_a_worker_each_though_others_are_idle() {
    let world = World::new();
    let (one, two) = world.two_nodes();
    let (client, server) = (one.pod(&world, "client"), two.pod(&world, "server"));
    let agent = |node| {
        let mut setup = world.setup(node);
        setup.arguments.extend(["--workers".into(), "2".into()]);
        Agent::start(setup)
    };
    let (first, second) = (agent(&one), agent(&two));
    first.up(&["client"]);
    second.up(&["server"]);
    eventually("both are in the mesh", 10, || first.tunnelled() >= 2);
    let (_app, sink) = (server.serve(PORT), server.app(&["sink", "7001"]));
    assert_eq!(sink.line(), "ready");
    let idle = client.app(&["many", &server.at(PORT).to_string(), "5"]);
    assert_eq!(idle.line(), "5 open");
    std::thread::sleep(Duration::from_secs(2));
    let to = server.at(7001).to_string();
    // If one process stands still meanwhile the two do not come at once, and others are tried.
    let part = (0..3).any(|_| {
        // Each has more to send than it can while the test runs.
        let _floods = [(), ()].map(|()| client.app(&["flood", &to, "1000000000000"]));
        let before = worked(&first);
        within(20, || {
            let now = worked(&first);
            let mut ticks = now.iter().zip(&before).map(|(now, then)| now - then);
            ticks.all(|ticks| ticks > 50)
        })
    });
    assert_eq!(worked(&first).len(), 2);
    assert!(part, "both are on one worker");
}

//! Connections end through the mesh as without it. Each scenario runs between two pods outside of the mesh first,
//! and both apps must see the same in the mesh.

#![allow(missing_docs, reason = "tests are named for what they show")]

use std::time::Duration;

use dataplane_tests::process::{Process, output};
use dataplane_tests::wire::Segment;
use dataplane_tests::{Agent, Pair, Pod, Wire, eventually, scaled, within};
use nix::sys::signal::Signal;

const PORT: u16 = 7000;

/// The pair, and two pods outside of the mesh beside them.
struct Place {
    pair: Pair,
    bare: (Pod, Pod),
}

impl Place {
    fn new() -> Self {
        let pair = Pair::new();
        let bare = (
            pair.nodes.0.bare(&pair.world, "outside", "bare"),
            pair.nodes.1.bare(&pair.world, "outside", "plain"),
        );
        Self { pair, bare }
    }

    /// Runs a scenario several times; returns what server and client saw.
    fn run(
        (client, server): (&Pod, &Pod),
        port: u16,
        times: usize,
        at_server: &[&str],
        at_client: &[&str],
    ) -> Vec<(String, String)> {
        let port_word = port.to_string();
        let app = server.app(&[&["script-server", &port_word], at_server].concat());
        assert_eq!(app.line(), "ready");
        let to = server.at(port).to_string();
        let times = times.to_string();
        let (status, lines) = client
            .app(&[&["script", &to, &times], at_client].concat())
            .end();
        assert!(status.success(), "{lines:?}");
        let seen = lines.into_iter().map(|line| {
            let server = app.line_within(scaled(Duration::from_secs(20)));
            (server.unwrap_or_else(|| "nothing was seen".into()), line)
        });
        seen.collect()
    }

    /// Runs it outside of the mesh, in it, and from it to a pod outside: all must see the same.
    fn same(&self, port: u16, at_server: &[&str], at_client: &[&str]) -> (String, String) {
        let Self { pair, bare } = self;
        let run = |pods, times| Self::run(pods, port, times, at_server, at_client);
        let without = run((&bare.0, &bare.1), 1).remove(0);
        for seen in run((&pair.client, &pair.server), 5) {
            assert_eq!(seen, without, "from pod to pod, (server, client)");
        }
        for seen in run((&pair.client, &bare.1), 2) {
            assert_eq!(seen, without, "to what is outside, (server, client)");
        }
        for seen in run((&bare.0, &pair.server), 2) {
            assert_eq!(seen, without, "from what is outside, (server, client)");
        }
        without
    }
}

fn descriptors(agent: &Agent) -> usize {
    let folder = format!("/proc/{}/fd", agent.pid());
    std::fs::read_dir(folder).expect("it runs").count()
}

#[test]
fn a_connection_ends_as_it_would_without_the_mesh() {
    let place = Place::new();
    let mut port = PORT;
    let mut same = |server: &[&str], client: &[&str]| {
        port += 1;
        place.same(port, server, client)
    };
    // Each direction by itself.
    let (_, client) = same(
        &["all", "write=answer", "fin"],
        &["write=question", "fin", "all"],
    );
    assert_eq!(client, "sent; fin; 6 bytes, end");
    // The server ends first, and the client goes on.
    let (server, _) = same(
        &["write=hello", "fin", "all"],
        &["all", "wait=300", "write=still", "fin"],
    );
    assert_eq!(server, "sent; fin; 5 bytes, end");
    // A server that answers without having read all: the client gets the answer, and then the reset.
    let (_, client) = same(&["read=1", "fill=30000"], &["fill=100", "wait=300", "all"]);
    assert_eq!(client, "sent; 30000 bytes, ECONNRESET");
    // A client that resets after it has sent everything.
    let (server, _) = same(&["wait=500", "all"], &["fill=30000", "wait=200", "reset"]);
    assert_eq!(server, "30000 bytes, ECONNRESET");
    // The client resets after its FIN.
    let (server, _) = same(
        &["all", "write=x", "hangup"],
        &["write=x", "fin", "read=1", "reset"],
    );
    assert_eq!(server, "1 bytes, end; sent; broken");
    // The client resets while the server reads nothing.
    let (server, client) = same(&["hangup"], &["fill=40000000", "reset"]);
    assert_eq!((&*server, &*client), ("broken", "nothing"));
    // The server has closed; the client, which may not know it, writes.
    let (_, client) = same(
        &["write=bye"],
        &["all", "write=x", "hangup", "write=x", "write=x"],
    );
    assert_eq!(client, "3 bytes, end; sent; broken; EPIPE; EPIPE");
}

#[test]
fn urgent_bytes_stay_in_the_stream_and_hold_up_nothing() {
    let Place { pair, bare } = Place::new();
    let steps = ["write=ab", "urgent=!", "write=cd", "wait=1000"];
    for (port, pods) in [
        (PORT, (&pair.client, &pair.server)),
        (PORT + 1, (&bare.0, &pair.server)),
    ] {
        for (server, _) in Place::run(pods, port, 5, &["read=5"], &steps) {
            assert_eq!(server, "ab!cd");
        }
    }
}

#[test]
fn connections_that_nobody_reads_hold_back_nobody_else() {
    let pair = Pair::new();
    let to = pair.server.at(PORT);
    let _app = pair.server.serve(PORT);
    for (port, server, client) in [
        (
            PORT + 1,
            ["fill=64000000", "wait=30000"],
            ["wait=30000", "wait=1"],
        ),
        (
            PORT + 2,
            ["wait=30000", "wait=1"],
            ["fill=64000000", "wait=30000"],
        ),
    ] {
        let app = pair
            .server
            .app(&[&["script-server", &port.to_string()], &server[..]].concat());
        assert_eq!(app.line(), "ready");
        let mut unread = Vec::new();
        for number in 1..=24 {
            let port = pair.server.at(port).to_string();
            unread.push(
                pair.client
                    .app(&[&["script", &port, "1"], &client[..]].concat()),
            );
            if number % 6 == 0 {
                std::thread::sleep(Duration::from_millis(1500));
                let answer = pair.client.ask(to, "ping");
                assert_eq!(
                    answer,
                    Ok(format!("{} ping", pair.client.v4)),
                    "{number} unread"
                );
            }
        }
    }
}

#[test]
fn what_a_closed_server_leaves_is_given_back_and_what_is_half_closed_goes_on() {
    let pair = Pair::new();
    pair.server
        .netns
        .set_sysctl("net/ipv4/tcp_fin_timeout", "2");
    pair.client
        .netns
        .set_sysctl("net/ipv4/tcp_fin_timeout", "2");
    let closing = pair.server.app(&["script-server", "7001", "write=bye"]);
    // It still reads after its FIN.
    let listening = pair
        .server
        .app(&["script-server", "7002", "fin", "wait=22000", "read=5"]);
    assert_eq!(
        (closing.line(), listening.line()),
        ("ready".into(), "ready".into())
    );
    let at = |port| pair.server.at(port).to_string();
    let half = pair.client.app(&[
        "script",
        &at(7002),
        "1",
        "all",
        "wait=22000",
        "write=still",
        "fin",
    ]);
    // The tunnel is there once the server's end has come by it.
    eventually("the server has ended its half", 10, || {
        let mut ss = pair.client.command("ss");
        let (_, ended, _) = output(ss.args(["-Htn", "state", "close-wait", "dport", "=", ":7002"]));
        !ended.is_empty()
    });
    let before = (descriptors(&pair.one), descriptors(&pair.two));
    let steps = ["1", "all", "wait=25000", "write=x", "hangup", "write=x"];
    let kept: Vec<_> = (0..20)
        .map(|_| {
            pair.client
                .app(&[&["script", &at(7001)], &steps[..]].concat())
        })
        .collect();
    // The first may be over before the last begins.
    let opened = |agent: &Agent| {
        let log = agent.log();
        let lines = log.lines().filter(|line| line.contains(":7001"));
        lines
            .filter(|line| line.contains("connection opened"))
            .count()
    };
    eventually("they are connected", 20, || {
        opened(&pair.one) >= 20 && opened(&pair.two) >= 20
    });
    eventually("both agents let go of them", 20, || {
        descriptors(&pair.one) <= before.0 + 2 && descriptors(&pair.two) <= before.1 + 2
    });
    for kept in kept {
        let (_, lines) = kept.end();
        assert_eq!(lines, ["3 bytes, end; sent; broken; EPIPE"]);
    }
    let (_, lines) = half.end();
    assert_eq!(lines, ["0 bytes, end; sent; fin"]);
    assert_eq!(listening.line(), "fin; still");
}

#[test]
fn a_peer_in_clear_that_is_dead_is_noticed() {
    let Place { pair, bare } = Place::new();
    let _app = bare.1.serve(PORT);
    let live = pair.client.live(bare.1.at(PORT));
    pair.nodes.1.netns.ip("link set wire down\n");
    let line = live.line_within(scaled(Duration::from_secs(42)));
    assert_eq!(line.as_deref(), Some("closed: reset"));
    pair.one
        .logs(&["direction=\"outbound\"", "Connection timed out"]);
}

#[test]
fn a_client_that_gives_up_is_not_dialled_for_any_more() {
    let pair = Pair::new();
    let nobody = "10.255.255.1:80";
    // Nothing answers there: the node drops it.
    pair.nodes
        .0
        .netns
        .ip("route add blackhole 10.255.255.1/32\n");
    let client = pair.client.app(&["script", nobody, "1", "input", "reset"]);
    pair.one.logs(&["connection opened", nobody]);
    let (status, _) = client.end();
    assert!(status.success());
    let gone = || {
        let log = pair.one.log();
        log.lines()
            .any(|line| line.contains("connection complete") && line.contains(nobody))
    };
    assert!(within(4, gone), "its connection is over");
    let line = pair.one.logs(&["connection complete", nobody]);
    assert!(!line.contains("error="), "{line}");
    assert!(line.contains("reason=\"client_gone\""), "{line}");
}

#[test]
fn a_tunnel_that_is_lost_resets_its_connections_and_that_is_told_as_a_failure() {
    let mut pair = Pair::new();
    let _app = pair.server.serve(PORT);
    let talk = pair.client.live(pair.server.at(PORT));
    pair.two.kill();
    assert_eq!(
        talk.line_within(scaled(Duration::from_secs(5))).as_deref(),
        Some("closed: reset")
    );
    let hbone = format!("dst.hbone_addr={}:7000", pair.server.v4);
    let line = pair
        .one
        .logs(&["connection complete", "direction=\"outbound\"", &hbone]);
    assert!(line.contains("error="), "{line}");
}

/// Connections between two pods that are open as an agent ends: idle ones, half closed ones, and ones full of
/// unread bytes, in either direction.
struct Living(Vec<(Process, Process)>);

impl Living {
    /// `agent` carries them, and tells of each.
    fn new((client, server): (&Pod, &Pod), port: u16, agent: &Agent) -> Self {
        const MUCH: &str = "fill=30000000";
        let steps: [(&[&str], &[&str]); 4] = [
            (&["write=hello", "all"], &["read=5", "all"]),
            (&["write=hello", "fin", "all"], &["read=5", "hangup"]),
            (&[MUCH, "all"], &["read=1000", "wait=5000", "all"]),
            (&["read=1000", "wait=5000", "all"], &[MUCH, "all"]),
        ];
        let ends = (port..).zip(steps).map(|(port, (at_server, at_client))| {
            let word = port.to_string();
            let at_server = server.app(&[&["script-server", &word], at_server].concat());
            assert_eq!(at_server.line(), "ready");
            let to = server.at(port).to_string();
            let at_client = client.app(&[&["script", &to, "1"], at_client].concat());
            agent.logs(&["connection opened", &format!(":{word}")]);
            (at_server, at_client)
        });
        Self(ends.collect())
    }

    /// Checks that all of them see a reset at both ends, and no orderly end.
    fn are_reset(self, how: &str) {
        for (server, client) in self.0 {
            for (end, app) in [("server", server), ("client", client)] {
                let line = app.line_within(Duration::from_secs(15));
                let line = line.unwrap_or_else(|| "nothing".into());
                let reset = line.ends_with("ECONNRESET") || line.ends_with("broken");
                assert!(reset, "{how}: the {end} saw: {line}");
            }
        }
    }
}

#[test]
fn whoever_an_agent_leaves_by_dying_sees_a_reset_and_no_end() {
    let Place { mut pair, bare } = Place::new();
    let near = pair.nodes.0.pod(&pair.world, "near");
    pair.one.up(&["near"]);
    pair.knows(&near.v4.to_string());
    let settle = || std::thread::sleep(Duration::from_millis(2500));

    let across = Living::new((&pair.client, &pair.server), PORT, &pair.two);
    let into = Living::new((&bare.0, &pair.server), PORT + 10, &pair.two);
    settle();
    pair.two.kill();
    across.are_reset("the server's agent is killed");
    into.are_reset("the server's agent is killed, client in clear");
    pair.two.restart();
    pair.two.up(&["server"]);

    let across = Living::new((&pair.client, &pair.server), PORT + 20, &pair.two);
    let beside = Living::new((&pair.client, &near), PORT + 30, &pair.one);
    let out = Living::new((&pair.client, &bare.1), PORT + 40, &pair.one);
    settle();
    pair.one.kill();
    across.are_reset("the client's agent is killed");
    beside.are_reset("the agent of both is killed");
    out.are_reset("the client's agent is killed, server in clear");
    pair.one.restart();
    pair.one.up(&["client", "near"]);

    let across = Living::new((&pair.client, &pair.server), PORT + 50, &pair.two);
    settle();
    pair.one.ask_to_end();
    pair.one.logs(&["draining; pods stay captured"]);
    pair.one.ask_to_end();
    assert!(pair.one.wait().success());
    across.are_reset("the client's agent is told twice to end");
}

#[test]
fn a_connection_that_is_being_made_is_reset_when_its_agent_dies() {
    let mut pair = Pair::new();
    // Nothing answers there: the node drops it.
    let nobody = "10.255.255.1:80".parse().expect("an address");
    pair.nodes
        .0
        .netns
        .ip("route add blackhole 10.255.255.1/32\n");
    let dialled_for = pair.client.talk(nobody);
    let opened = format!("dst.addr={nobody}");
    pair.one.logs(&["connection opened", &opened]);
    // From here on only the kernel accepts connections.
    pair.one.signal(Signal::SIGSTOP);
    let queued = pair.client.talk(nobody);
    pair.one.kill();
    for (which, client) in [("dialled for", dialled_for), ("queued", queued)] {
        let line = client.line_within(Duration::from_secs(5));
        assert_eq!(line.as_deref(), Some("closed: reset"), "{which}");
    }
}

#[test]
fn what_is_written_after_an_agent_was_killed_and_uninstalled_does_not_leave_in_clear() {
    let mut pair = Pair::new();
    // Both ends write once the agents are gone, and their capture with them.
    let gone = pair.world.folder().join("gone");
    let until = format!("until={}", gone.display());
    let steps: [(&[&str], &[&str]); 2] = [
        (&["read=5", "all"], &["write=hello", &until, "write=client"]),
        (&["write=hello", &until, "write=server"], &["read=5", "all"]),
    ];
    let ends: Vec<(Process, Process)> = (PORT..)
        .zip(steps)
        .map(|(port, (at_server, at_client))| {
            let word = port.to_string();
            let server = pair
                .server
                .app(&[&["script-server", &word], at_server].concat());
            assert_eq!(server.line(), "ready");
            let to = pair.server.at(port).to_string();
            let client = pair
                .client
                .app(&[&["script", &to, "1"], at_client].concat());
            (server, client)
        })
        .collect();
    eventually("both are carried", 5, || {
        let log = pair.two.log();
        (PORT..PORT + 2).all(|port| log.contains(&format!(":{port}")))
    });
    let taps = [
        Wire::tap(pair.nodes.0.netns.file(), &pair.client.veth),
        Wire::tap(pair.nodes.1.netns.file(), &pair.server.veth),
    ];
    for agent in [&mut pair.one, &mut pair.two] {
        agent.kill();
        let (status, out, error) = agent.uninstall();
        assert!(status.success(), "{out}{error}");
    }
    std::fs::write(gone, "").expect("a file");
    for (server, client) in ends {
        for (end, app) in [("server", server), ("client", client)] {
            let line = app.line_within(Duration::from_secs(15));
            assert!(line.is_some(), "the {end} is at its end");
        }
    }
    for tap in taps {
        let of_app = |segment: &&Segment| {
            let ports = PORT..PORT + 2;
            ports.contains(&segment.from.1) || ports.contains(&segment.to.1)
        };
        let segments = tap.end();
        let said: Vec<_> = segments
            .iter()
            .filter(of_app)
            .filter(|segment| !segment.payload.is_empty())
            .collect();
        assert!(said.is_empty(), "{said:?}");
    }
}

#[test]
fn an_agent_whose_tunnels_are_idle_ends_at_once() {
    let mut pair = Pair::new();
    let _apps = (pair.server.serve(PORT), pair.client.serve(PORT));
    let resetting = pair
        .server
        .app(&["script-server", "7001", "read=1", "reset"]);
    assert_eq!(resetting.line(), "ready");
    pair.one.kill();
    pair.one.setup().drains_for("60s");
    pair.one.restart();
    pair.one.up(&["client"]);
    pair.know_each_other();
    // Tunnels both ways, of connections that ended in every way.
    let to = pair.server.at(7001).to_string();
    let client = pair.client.app(&["script", &to, "3", "fill=100", "all"]);
    assert!(client.end().0.success());
    assert!(pair.server.ask(pair.client.at(PORT), "x").is_ok());
    // It drains because of this connection, and meanwhile others open tunnels.
    let to = pair.server.at(PORT);
    let live = pair.client.live(to);
    pair.one.ask_to_end();
    pair.one.logs(&["draining; pods stay captured"]);
    for _ in 0..3 {
        std::thread::sleep(Duration::from_millis(200));
        assert!(pair.client.ask(to, "x").is_ok(), "none is refused");
    }
    drop(live);
    let started = std::time::Instant::now();
    assert!(pair.one.wait().success());
    let took = started.elapsed();
    assert!(took < scaled(Duration::from_secs(15)), "{took:?}");
}

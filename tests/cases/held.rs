//! Held pods: a predecessor has captured them, but the agent does not find them, or may not serve them. They stay
//! captured, and their capture is repaired as that of a pod that is served.

#![allow(missing_docs, reason = "tests are named for what they show")]

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use dataplane_tests::bpf::{detach, steering};
use dataplane_tests::{Agent, Pair, Pod, Wire, eventually, repairs, scaled, within};

const PORT: u16 = 7000;

/// Returns a pair whose client's agent was restarted and does not find the client, since an annotation names a
/// namespace that does not exist.
fn held(floating: &str) -> Pair {
    let mut pair = Pair::prepared(|client, _| {
        client
            .netns
            .ip(&format!("addr add {floating}/32 dev eth0\n"));
    });
    pair.one.kill();
    let mut object = pair.nodes.0.object(&pair.client);
    let annotation = ("ambient.dataplane/netns".into(), "/run/netns/none".into());
    object.annotations.push(annotation);
    pair.world.manifests.pod(&object);
    pair.one.restart();
    eventually("it is told that it stays captured", 20, || {
        pair.one.pod("client").1.contains("stays captured")
    });
    pair
}

/// Returns `true` if an agent has a link open that attaches a program to a network namespace.
fn has_link(agent: &Agent, netns: &fs::File) -> bool {
    let inode = netns.metadata().expect("it is open").ino();
    let of_netns = format!("netns_ino:\t{inode}\n");
    let links = fs::read_dir(format!("/proc/{}/fdinfo", agent.pid())).expect("it runs");
    let mut links = links.flatten();
    links.any(|link| fs::read_to_string(link.path()).is_ok_and(|text| text.contains(&of_netns)))
}

/// Moves an address from one pod of the first node to another.
fn give(pair: &Pair, address: &str, from: &Pod, to: &Pod) {
    from.netns.ip(&format!("addr del {address}/32 dev eth0\n"));
    to.netns.ip(&format!("addr add {address}/32 dev eth0\n"));
    let route = format!("route replace {address}/32 dev {}\n", to.veth);
    pair.nodes.0.netns.ip(&route);
}

#[test]
fn c1_an_address_that_a_held_pod_has_no_more_is_not_its_own() {
    let pair = held("10.100.0.1");
    let _own = pair.client.serve(PORT);
    let thief = pair.nodes.0.bare(&pair.world, "outside", "thief");
    let _thieves = thief.serve(PORT);
    give(&pair, "10.100.0.1", &pair.client, &thief);
    let moved = SocketAddr::from(([10, 100, 0, 1], PORT));
    eventually("it is captured, as any other", 10, || {
        let captured = pair.one.counter("captured");
        let _ = pair.client.ask(moved, "to whom");
        pair.one.counter("captured") > captured
    });
    let answer = thief.ask_with(pair.client.at(PORT), "let me in", &["source=10.100.0.1"]);
    assert!(answer.is_err(), "{answer:?}");
    // Once it is found again, it is served as it is now.
    pair.world.manifests.pod(&pair.nodes.0.object(&pair.client));
    pair.one.up(&["client"]);
    let _app = pair.server.serve(PORT);
    assert!(pair.client.ask(pair.server.at(PORT), "x").is_ok());
}

#[test]
fn other_nodes_are_told_before_a_held_pod_is_let_go() {
    let pair = held("10.100.0.1");
    let is_told = || {
        let traces = pair.world.traces("one");
        !traces.iter().any(|trace| trace.contains("/enrolled/"))
    };
    assert!(!is_told());
    let mut object = pair.nodes.0.object(&pair.client);
    let none = ("istio.io/dataplane-mode".into(), "none".into());
    object.labels.push(none);
    pair.world.manifests.pod(&object);
    eventually("they are told", 10, is_told);
    let told = Instant::now();
    eventually("it is let go", 20, || {
        !pair.client.netns.show("rule").contains("fwmark")
    });
    assert!(told.elapsed() > Duration::from_millis(700));
}

#[test]
fn c1_what_keeps_a_held_pod_captured_is_put_back() {
    let pair = held("10.100.0.1");
    let _own = pair.client.serve(PORT);
    let outsider = pair.nodes.0.bare(&pair.world, "outside", "outsider");
    let netns = &pair.client.netns;
    let tap = Wire::tap(pair.nodes.0.netns.file(), &pair.client.veth);
    let lose: [(&str, &dyn Fn()); 4] = [
        ("steer", &|| {
            for pin in pair.world.pinned("one", "pods") {
                fs::remove_file(pin).expect("a pin");
            }
        }),
        ("rule", &|| _ = netns.show("rule del fwmark 0x511/0xfff")),
        ("route", &|| _ = netns.show("route flush table 15001")),
        ("setting", &|| {
            netns.set_sysctl("net.ipv4.fwmark_reflect", "0");
        }),
    ];
    for (part, lose) in lose {
        let before = repairs(&pair.one, part);
        lose();
        eventually(&format!("{part} is put back"), 10, || {
            repairs(&pair.one, part) > before
        });
        assert_eq!(steering(&netns.file()), 1, "{part}");
        for to in [pair.client.at(PORT), pair.client.at6(PORT)] {
            let answer = outsider.ask(to, "let me in");
            assert!(answer.is_err(), "{part}: {to}: {answer:?}");
        }
        let answer = pair.client.ask(outsider.at(PORT), "let me out");
        assert!(answer.is_err(), "{part}: {answer:?}");
    }
    pair.one
        .logs(&["demo/client", "what keeps a pod captured was gone"]);
    let segments = tap.end();
    assert!(segments.iter().all(|segment| segment.payload.is_empty()));
    pair.world.manifests.pod(&pair.nodes.0.object(&pair.client));
    pair.one.up(&["client"]);
    let _app = pair.server.serve(PORT);
    assert!(pair.client.ask(pair.server.at(PORT), "x").is_ok());
}

#[test]
fn c1_a_held_pod_that_lost_its_program_while_no_agent_ran_gets_one() {
    let mut pair = held("10.100.0.1");
    pair.one.kill();
    for pin in pair.world.pinned("one", "pods") {
        fs::remove_file(pin).expect("a pin");
    }
    let netns = pair.client.netns.file();
    eventually("it is detached", 5, || steering(&netns) == 0);
    pair.one.restart();
    eventually("it is there again", 20, || steering(&netns) == 1);
    let _own = pair.client.serve(PORT);
    let outsider = pair.nodes.0.bare(&pair.world, "outside", "outsider");
    let answer = outsider.ask(pair.client.at(PORT), "let me in");
    assert!(answer.is_err(), "{answer:?}");
}

#[test]
fn c1_a_held_pod_that_has_lost_its_pin_has_its_program_until_it_is_enrolled() {
    let pair = held("10.100.0.1");
    let netns = pair.client.netns.file();
    let pins = pair.world.pinned("one", "pods");
    assert!(!pins.is_empty());
    eventually("the agent has its program's link", 10, || {
        has_link(&pair.one, &netns)
    });
    // Nothing can be pinned, so it is not enrolled yet.
    let block = format!("{}-new", pins[0].display());
    fs::create_dir(&block).expect("a folder");
    pair.world.manifests.pod(&pair.nodes.0.object(&pair.client));
    pair.one.logs(&["pod cannot be enrolled", "-new"]);
    let over = AtomicBool::new(false);
    let without = std::thread::scope(|scope| {
        let watch = scope.spawn(|| {
            let mut without = 0;
            while !over.load(Ordering::Relaxed) {
                without += u32::from(steering(&netns) == 0);
            }
            without
        });
        for pin in &pins {
            fs::remove_file(pin).expect("a pin");
        }
        // Its program is not taken for another agent's: what is not pinned has to be pinned first.
        let other = within(7, || !pair.one.pod("client").1.contains("-new"));
        let why = pair.one.pod("client").1;
        fs::remove_dir(&block).expect("a folder");
        let up = within(20, || pair.one.pod("client").0 == "up");
        over.store(true, Ordering::Relaxed);
        assert!(!other, "{why}");
        assert!(up, "{}", pair.one.log());
        watch.join().expect("it counts")
    });
    assert_eq!(without, 0);
    eventually("the other one is detached", 5, || steering(&netns) == 1);
}

#[test]
fn c1_a_held_pods_program_that_was_detached_takes_no_others_pin() {
    let pair = held("10.100.0.1");
    let netns = pair.client.netns.file();
    eventually("it is looked after", 10, || steering(&netns) == 1);
    // Each attempt attaches and pins a program, and fails when there is no way by `lo` for its routes.
    pair.client.netns.ip("link set lo down\n");
    pair.world.manifests.pod(&pair.nodes.0.object(&pair.client));
    pair.one.logs(&["pod cannot be enrolled", "set routes"]);
    let inode = netns.metadata().expect("it is open").ino();
    assert!(detach(inode) > 0);
    eventually("another one is attached", 10, || steering(&netns) > 0);
    let until = Instant::now() + scaled(Duration::from_secs(4));
    while Instant::now() < until {
        assert!(steering(&netns) > 0);
    }
    pair.client.netns.ip("link set lo up\n");
    pair.one.up(&["client"]);
}

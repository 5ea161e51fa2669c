//! What keeps a pod captured is lost while the agent runs: it is put back, told and counted, and a pod
//! that does not work is not `up`.

#![allow(missing_docs, reason = "tests are named for what they show")]

use std::fs;
use std::path::PathBuf;

use dataplane_tests::{Agent, Pair, Pod, bpf, eventually, scaled, within};

const PORT: u16 = 7000;

/// How often a part was put back.
fn repairs(agent: &Agent, part: &str) -> u64 {
    let series = format!("dataplane_repairs_total{{part=\"{part}\"}} ");
    let metrics = agent.get("/metrics");
    let line = metrics.lines().find_map(|line| line.strip_prefix(&series));
    line.and_then(|count| count.parse().ok()).unwrap_or(0)
}

/// Does it, and waits until the agent has put the part back, and connections work.
fn put_back(pair: &Pair, agent: &Agent, part: &str, what: &str, lose: impl FnOnce()) {
    let before = repairs(agent, part);
    lose();
    eventually(&format!("{part} is put back: {what}"), 10, || {
        repairs(agent, part) > before
    });
    for to in [pair.server.at(PORT), pair.server.at6(PORT)] {
        let answer = pair.client.ask(to, "x");
        assert!(answer.is_ok(), "{what}: {to}: {answer:?}");
    }
    agent.logs(&["what keeps a pod captured was gone", part]);
}

/// Where the agent's kernel objects are pinned.
fn pinned(pair: &Pair, node: &str, folder: &str) -> Vec<PathBuf> {
    let node = pair.world.bpffs().join("dataplane").join(node);
    let layouts = fs::read_dir(node).expect("pins").flatten();
    let files = layouts.flat_map(|layout| {
        let folder = layout.path().join(folder);
        fs::read_dir(folder).expect("pins").flatten()
    });
    files.map(|file| file.path()).collect()
}

fn remove(files: &[PathBuf]) {
    assert!(!files.is_empty());
    for file in files {
        fs::remove_file(file).expect("a pin");
    }
}

#[test]
fn rules_routes_and_settings_that_are_lost_are_put_back() {
    let pair = Pair::new();
    let _app = pair.server.serve(PORT);
    let sides: [(&Pod, &Agent); 2] = [(&pair.client, &pair.one), (&pair.server, &pair.two)];
    for (pod, agent) in sides {
        for family in ["-4", "-6"] {
            for rule in [
                "fwmark 0x511/0xfff lookup 15001",
                "fwmark 0x111/0xfff lookup 15006",
            ] {
                let what = format!("{} {family} rule {rule}", pod.name);
                put_back(&pair, agent, "rule", &what, || {
                    pod.netns.show(&format!("{family} rule del {rule}"));
                });
            }
            for table in ["15001", "15006"] {
                let what = format!("{} {family} table {table}", pod.name);
                put_back(&pair, agent, "route", &what, || {
                    pod.netns
                        .show(&format!("{family} route flush table {table}"));
                });
            }
        }
        for name in [
            "net.ipv4.tcp_fwmark_accept",
            "net.ipv4.fwmark_reflect",
            "net.ipv6.fwmark_reflect",
        ] {
            put_back(&pair, agent, "setting", name, || {
                pod.netns.set_sysctl(name, "0");
            });
            assert_eq!(pod.netns.sysctl(name), "1");
        }
    }
}

#[test]
fn programs_and_pins_that_are_lost_are_put_back() {
    let mut pair = Pair::new();
    let _app = pair.server.serve(PORT);
    put_back(&pair, &pair.two, "steer", "the server's", || {
        remove(&pinned(&pair, "two", "pods"));
    });
    put_back(&pair, &pair.one, "steer", "the client's", || {
        remove(&pinned(&pair, "one", "pods"));
    });
    put_back(&pair, &pair.one, "program", "the node's", || {
        remove(&pinned(&pair, "one", "links"));
    });
    let captured = pair.one.counter("captured");
    assert!(pair.client.ask(pair.server.at(PORT), "x").is_ok());
    assert!(pair.one.counter("captured") > captured, "attached again");
    put_back(&pair, &pair.one, "pin", "the maps'", || {
        remove(&pinned(&pair, "one", "maps"));
    });
    // What is pinned is what is in use: the next agent takes it over.
    pair.one.kill();
    pair.one.restart();
    pair.one.up(&["client"]);
    assert!(pair.client.ask(pair.server.at(PORT), "x").is_ok());
}

#[test]
fn a_listener_that_is_ended_is_replaced() {
    let pair = Pair::new();
    let _app = pair.server.serve(PORT);
    for (pod, agent) in [(&pair.client, &pair.one), (&pair.server, &pair.two)] {
        let before = repairs(agent, "listener");
        for port in [":15001", ":15006", ":15008"] {
            let mut ss = pod.command("ss");
            ss.args(["-K", "-t", "-l", "sport", "=", port]);
            let (status, _, error) = dataplane_tests::process::output(&mut ss);
            assert!(status.success(), "{error}");
        }
        eventually("listeners are put back", 10, || {
            repairs(agent, "listener") > before
        });
        eventually("connections work", 10, || {
            pair.client.ask(pair.server.at(PORT), "x").is_ok()
        });
    }
}

/// Of what takes the client's connections to its agent, while something else cannot be put back.
fn all_else_is_put_back(pair: &Pair) {
    for part in ["steer", "entry"] {
        let before = repairs(&pair.one, part);
        if part == "steer" {
            remove(&pinned(pair, "one", "pods"));
        } else {
            let maps = pinned(pair, "one", "maps");
            let pods = maps.iter().find(|map| map.ends_with("PODS"));
            assert_eq!(bpf::clear(pods.expect("a map")), 1);
        }
        eventually(&format!("{part} is put back"), 10, || {
            repairs(&pair.one, part) > before
        });
    }
    assert_eq!(pair.one.pod("client").0, "broken");
}

#[test]
fn c1_a_pod_that_cannot_be_mended_is_not_up_and_is_when_it_can() {
    let pair = Pair::new();
    let _app = pair.server.serve(PORT);
    // A route by an interface that is down is one that the kernel does not take.
    pair.client.netns.ip("link set lo down\n");
    pair.one.is("client", "broken");
    let why = pair.one.pod("client").1;
    assert!(why.contains("set routes"), "{why}");
    all_else_is_put_back(&pair);
    pair.client.netns.ip("link set lo up\n");
    pair.one.up(&["client"]);
    assert!(pair.client.ask(pair.server.at(PORT), "x").is_ok());
    // So is one that has not the address that the mesh knows it by.
    let own = format!("{}/32 dev eth0", pair.client.v4);
    pair.client.netns.ip(&format!("addr del {own}\n"));
    pair.one.is("client", "broken");
    let why = pair.one.pod("client").1;
    assert!(why.contains("on none of its interfaces"), "{why}");
    all_else_is_put_back(&pair);
    let ready = pair.one.get("/healthz/ready");
    assert!(
        !ready.contains(" 200 ") && ready.contains("capture"),
        "{ready}"
    );
    // The other family goes on, and other nodes still dial the pod by HBONE.
    assert!(pair.client.ask(pair.server.at6(PORT), "x").is_ok());
    assert!(pair.two.tunnelled() >= 2);
    pair.client.netns.ip(&format!(
        "addr add {own}\n\
         route add 169.254.1.1 dev eth0\n\
         route add default via 169.254.1.1 dev eth0 onlink\n"
    ));
    pair.one.is("client", "up");
    assert!(pair.client.ask(pair.server.at(PORT), "x").is_ok());
}

#[test]
fn a_pod_that_changes_all_the_time_does_not_keep_the_agent_busy() {
    let pair = Pair::new();
    let _app = pair.server.serve(PORT);
    let ticks = || {
        let path = format!("/proc/{}/stat", pair.one.pid());
        let stat = fs::read_to_string(path).expect("it runs");
        let (_, rest) = stat.rsplit_once(") ").expect("a name");
        let numbers: Vec<u64> = rest
            .split(' ')
            .filter_map(|word| word.parse().ok())
            .collect();
        // utime and stime; the state is no number.
        numbers[10] + numbers[11]
    };
    let before = ticks();
    let flap = "addr add 10.100.0.1/32 dev eth0\naddr del 10.100.0.1/32 dev eth0\n".repeat(200);
    let mut flaps = 0;
    let began = std::time::Instant::now();
    while began.elapsed() < scaled(std::time::Duration::from_secs(3)) {
        pair.client.netns.ip(&flap);
        flaps += 400;
    }
    let used = ticks() - before;
    // A look for each of the changes would be many times that: it is bound to some in a second.
    assert!(flaps > 2000 && used < 150, "{flaps} changes, {used} ticks");
    assert!(within(5, || pair
        .client
        .ask(pair.server.at(PORT), "x")
        .is_ok()));
}

//! Parts of a pod's capture that are lost while the agent runs are put back, logged and counted, and a pod that
//! does not work is not `up`.

#![allow(missing_docs, reason = "tests are named for what they show")]

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use dataplane_tests::{Agent, Pair, Pod, bpf, eventually, pause, repairs, scaled, within};
use nix::sys::signal::Signal;

const PORT: u16 = 7000;

/// Calls `lose`, and waits until the agent has put the part back, and connections work.
fn put_back(pair: &Pair, agent: &Agent, part: &str, what: &str, lose: impl FnOnce()) {
    let told = || {
        let parts = ["what keeps a pod captured was gone", part];
        let log = agent.log();
        let lines = log.lines();
        lines
            .filter(|line| parts.iter().all(|part| line.contains(part)))
            .count()
    };
    let before = (repairs(agent, part), told());
    lose();
    eventually(&format!("{part} is put back and told: {what}"), 10, || {
        repairs(agent, part) > before.0 && told() > before.1
    });
    for to in [pair.server.at(PORT), pair.server.at6(PORT)] {
        let answer = pair.client.ask(to, "x");
        assert!(answer.is_ok(), "{what}: {to}: {answer:?}");
    }
}

/// Detaches the programs of the first node and of the client. For the agent that happens at once.
fn detach(pair: &Pair) {
    pair.one.signal(Signal::SIGSTOP);
    let inode = |file: fs::File| file.metadata().expect("it is open").ino();
    let cgroup = fs::File::open(&pair.nodes.0.cgroup.folder).expect("a cgroup");
    assert_eq!(bpf::detach(inode(cgroup)), 4);
    assert_eq!(bpf::detach(inode(pair.client.netns.file())), 1);
    pair.one.signal(Signal::SIGCONT);
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
        remove(&pair.world.pinned("two", "pods"));
    });
    put_back(&pair, &pair.one, "steer", "the client's", || {
        remove(&pair.world.pinned("one", "pods"));
    });
    put_back(&pair, &pair.one, "program", "the node's", || {
        remove(&pair.world.pinned("one", "links"));
    });
    let captured = pair.one.counter("captured");
    assert!(pair.client.ask(pair.server.at(PORT), "x").is_ok());
    assert!(pair.one.counter("captured") > captured, "attached again");
    put_back(&pair, &pair.one, "pin", "the maps'", || {
        remove(&pair.world.pinned("one", "maps"));
    });
    let is_pods = |pin: &&PathBuf| pin.ends_with("PODS");
    let maps = pair.world.pinned("one", "maps");
    let pods = maps.iter().find(is_pods).expect("a map");
    let own = bpf::id(pods);
    put_back(
        &pair,
        &pair.one,
        "pin",
        "another map's in its place",
        || {
            bpf::remake(pods, 1);
        },
    );
    assert_eq!(bpf::id(pods), own);
    // The pins are those of the programs in use: the next agent takes them over.
    pair.one.kill();
    pair.one.restart();
    pair.one.up(&["client"]);
    assert!(pair.client.ask(pair.server.at(PORT), "x").is_ok());
}

#[test]
fn c1_nothing_passes_between_the_loss_of_a_pin_and_its_repair() {
    let pair = Pair::new();
    let outsider = pair.nodes.1.bare(&pair.world, "outside", "outsider");
    let (_theirs, _own) = (outsider.serve(PORT), pair.client.serve(PORT));
    let bpffs = pair.world.bpffs();
    let lose: [(&str, &dyn Fn()); 3] = [
        ("program", &|| remove(&pair.world.pinned("one", "links"))),
        ("steer", &|| remove(&pair.world.pinned("one", "pods"))),
        ("pin", &|| {
            let flags = nix::mount::MntFlags::MNT_DETACH;
            nix::mount::umount2(bpffs, flags).expect("it is mounted");
        }),
    ];
    for (part, lose) in lose {
        let before = repairs(&pair.one, part);
        lose();
        // Some connections come before the next scan, and some after it.
        let mut asked = 0;
        while asked < 20 || repairs(&pair.one, part) == before {
            let captured = pair.one.counter("captured");
            let answer = pair.client.ask(outsider.at(PORT), "x");
            assert!(answer.is_ok(), "{part}: {answer:?}");
            assert!(pair.one.counter("captured") > captured, "{part}: in clear");
            let steered = pair.one.counter("steered_inbound");
            assert!(outsider.ask(pair.client.at(PORT), "x").is_ok(), "{part}");
            assert!(pair.one.counter("steered_inbound") > steered, "{part}");
            asked += 1;
            assert!(asked < 400, "{part} is not put back");
        }
    }
}

#[test]
fn c1_programs_are_put_back_where_nothing_can_be_pinned() {
    let pair = Pair::new();
    let outsider = pair.nodes.1.bare(&pair.world, "outside", "outsider");
    let (_theirs, _own) = (outsider.serve(PORT), pair.client.serve(PORT));
    let (bpffs, is_captured) = (pair.world.bpffs(), || {
        let before = [
            pair.one.counter("captured"),
            pair.one.counter("steered_inbound"),
        ];
        let _ = pair.client.ask(outsider.at(PORT), "x");
        let _ = outsider.ask(pair.client.at(PORT), "x");
        pair.one.counter("captured") > before[0] && pair.one.counter("steered_inbound") > before[1]
    });
    let flags = nix::mount::MntFlags::MNT_DETACH;
    nix::mount::umount2(bpffs, flags).expect("it is mounted");
    // A file that a mount would hide.
    fs::write(bpffs.join("stranger"), "").expect("a file");
    pair.one.is("client", "broken");
    assert!(is_captured(), "what is attached stays so");
    detach(&pair);
    eventually("it is captured again", 10, is_captured);
    // Still after two more scans.
    pause(std::time::Duration::from_secs(7));
    assert!(is_captured());
    assert_eq!(pair.one.pod("client").0, "broken");
    fs::remove_file(bpffs.join("stranger")).expect("a file");
    pair.one.up(&["client"]);
    assert!(pair.client.ask(outsider.at(PORT), "x").is_ok());
}

/// Keeps an agent from pinning further programs; existing pins stay.
fn block(pair: &Pair, folders: &[&str]) -> Vec<PathBuf> {
    let pins = folders.iter().flat_map(|of| pair.world.pinned("one", of));
    let blocks = pins.map(|pin| PathBuf::from(format!("{}-new", pin.display())));
    let blocks: Vec<PathBuf> = blocks.collect();
    for block in &blocks {
        fs::create_dir(block).expect("a folder");
    }
    blocks
}

#[test]
fn c1_a_pin_of_what_was_detached_is_not_one_of_what_is_attached() {
    let mut pair = Pair::new();
    let blocks = block(&pair, &["links", "pods"]);
    assert_eq!(blocks.len(), 5);
    let before = ["program", "steer"].map(|part| repairs(&pair.one, part));
    let netns = pair.client.netns.file();
    detach(&pair);
    pair.one.is("client", "broken");
    eventually("it is attached", 10, || bpf::steering(&netns) == 1);
    eventually("that is counted", 10, || {
        ["program", "steer"].map(|part| repairs(&pair.one, part)) == before.map(|count| count + 1)
    });
    // Still after two more scans.
    pause(Duration::from_secs(7));
    assert_eq!(pair.one.pod("client").0, "broken");
    for block in &blocks {
        fs::remove_dir(block).expect("a folder");
    }
    pair.one.up(&["client"]);
    pair.one.kill();
    pause(Duration::from_secs(1));
    assert_eq!(bpf::steering(&netns), 1);
    let cgroup = fs::metadata(&pair.nodes.0.cgroup.folder).expect("a cgroup");
    assert_eq!(bpf::detach(cgroup.ino()), 4);
}

#[test]
fn c1_all_else_is_put_back_where_a_program_cannot_be_pinned() {
    let pair = Pair::new();
    let _blocks = block(&pair, &["pods"]);
    let netns = &pair.client.netns;
    let before = ["rule", "steer"].map(|part| repairs(&pair.one, part));
    netns.show("rule del fwmark 0x511/0xfff");
    let inode = netns.file().metadata().expect("it is open").ino();
    assert_eq!(bpf::detach(inode), 1);
    eventually("both are put back, and counted", 10, || {
        ["rule", "steer"].map(|part| repairs(&pair.one, part)) == before.map(|count| count + 1)
    });
    assert_eq!(bpf::steering(&netns.file()), 1);
    pair.one.is("client", "broken");
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

/// Checks that the client's program and its map entry are put back while another part cannot be.
fn all_else_is_put_back(pair: &Pair) {
    for part in ["steer", "entry"] {
        let before = repairs(&pair.one, part);
        if part == "steer" {
            remove(&pair.world.pinned("one", "pods"));
        } else {
            let maps = pair.world.pinned("one", "maps");
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
    // The kernel does not accept a route by an interface that is down.
    pair.client.netns.ip("link set lo down\n");
    pair.one.is("client", "broken");
    let why = pair.one.pod("client").1;
    assert!(why.contains("set routes"), "{why}");
    all_else_is_put_back(&pair);
    pair.client.netns.ip("link set lo up\n");
    pair.one.up(&["client"]);
    assert!(pair.client.ask(pair.server.at(PORT), "x").is_ok());
    // So is a pod without the address that the mesh knows it by.
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

/// Returns the processor time that an agent has used, in hundredths of a second.
fn ticks(agent: &Agent) -> u64 {
    let path = format!("/proc/{}/stat", agent.pid());
    let stat = fs::read_to_string(path).expect("it runs");
    let (_, rest) = stat.rsplit_once(") ").expect("a name");
    // `utime` and `stime`, the eleventh and twelfth after the state.
    let times = rest.split(' ').skip(11).take(2);
    times
        .map(|word| word.parse::<u64>().expect("a number"))
        .sum()
}

#[test]
fn a_pod_that_changes_all_the_time_does_not_keep_the_agent_busy() {
    let pair = Pair::new();
    let _app = pair.server.serve(PORT);
    let before = ticks(&pair.one);
    let flap = "addr add 10.100.0.1/32 dev eth0\naddr del 10.100.0.1/32 dev eth0\n".repeat(200);
    let mut flaps = 0;
    let began = Instant::now();
    while began.elapsed() < scaled(Duration::from_secs(3)) {
        pair.client.netns.ip(&flap);
        flaps += 400;
    }
    let used = ticks(&pair.one) - before;
    let half = u64::try_from(began.elapsed().as_millis() / 20).expect("some seconds");
    // A scan for each change would cost many times that: their rate is limited.
    assert!(flaps > 2000 && used < half, "{flaps} changes, {used} ticks");
    assert!(within(5, || pair
        .client
        .ask(pair.server.at(PORT), "x")
        .is_ok()));
}

/// Returns the processor time that the agent uses for two or three scans of the pod.
fn used_for_looks(agent: &Agent) -> u64 {
    let before = ticks(agent);
    std::thread::sleep(Duration::from_secs(7));
    ticks(agent) - before
}

/// Checks that scans cost no more after these `ip` commands in the client.
fn costs_nothing(pair: &Pair, commands: &str) {
    let before = used_for_looks(&pair.one);
    pair.client.netns.ip(commands);
    eventually("the scan after the change is over", 60, || {
        let before = ticks(&pair.one);
        std::thread::sleep(Duration::from_secs(1));
        ticks(&pair.one) < before + 2
    });
    let used = used_for_looks(&pair.one);
    assert!(used < 2 * before + 10, "{used} ticks, {before} before");
}

#[test]
fn a_pods_own_routes_cost_the_agent_nothing() {
    let pair = Pair::new();
    let _app = pair.server.serve(PORT);
    let mut routes = String::new();
    for number in 0..300_000_u32 {
        let [_, a, b, c] = number.to_be_bytes();
        routes += &format!("route add blackhole 11.{a}.{b}.{c}/32 table 77\n");
    }
    costs_nothing(&pair, &routes);
    // A lost part is found among them.
    put_back(&pair, &pair.one, "route", "a route", || {
        // A flush looks again until nothing is left, which the agent may put back as fast.
        let capture = "route del local default dev lo table 15001\n";
        pair.client.netns.ip(capture);
    });
}

#[test]
fn c7_a_pods_own_routes_in_our_tables_hold_up_nobody_and_stay() {
    let pair = Pair::new();
    let _app = pair.server.serve(PORT);
    let mut routes = String::new();
    // The kernel tells local routes alone, of which a pod may have many as well.
    for (kind, first) in [("blackhole", 11), ("local", 12)] {
        for number in 0..100_000_u32 {
            let [_, a, b, c] = number.to_be_bytes();
            let dev = if kind == "local" { "dev lo " } else { "" };
            routes += &format!("route add {kind} {first}.{a}.{b}.{c}/32 {dev}table 15001\n");
        }
    }
    pair.client.netns.ip(&routes);
    put_back(&pair, &pair.one, "rule", "a rule", || {
        let capture = "rule del fwmark 0x511/0xfff lookup 15001";
        pair.client.netns.show(capture);
    });
    // Of IPv6 it tells those to all addresses last.
    let route = |number| format!("route add local 2001:db8::{number:x}/128 dev lo table 15001\n");
    pair.client
        .netns
        .ip6(&(0..2000).map(route).collect::<String>());
    let began = Instant::now();
    pair.world.manifests.remove_pod("demo", "client");
    pair.one.logs(&["pod leaves the mesh"]);
    pair.one.logs(&["pod left the mesh"]);
    assert!(began.elapsed() < scaled(Duration::from_secs(12)));
    let is_ours = |route: &&str| route.contains("default");
    let left = pair.client.netns.show("route show table 15001");
    assert_eq!(left.lines().count(), 200_000);
    let left6 = pair.client.netns.show("-6 route show table 15001");
    assert_eq!(left.lines().chain(left6.lines()).find(is_ours), None);
}

#[test]
fn a_pods_own_rules_cost_the_agent_nothing() {
    let pair = Pair::new();
    let _app = pair.server.serve(PORT);
    let rule = |number| format!("rule add pref {number} fwmark {number} lookup 77\n");
    let rules: String = (100..15_100).map(rule).collect();
    costs_nothing(&pair, &rules);
    put_back(&pair, &pair.one, "rule", "a rule", || {
        let capture = "rule del fwmark 0x511/0xfff lookup 15001";
        pair.client.netns.show(capture);
    });
}

//! Pods with further networks besides the one that the mesh knows, and with rules of their own: connections by
//! another network behave as without a mesh.

#![allow(missing_docs, reason = "tests are named for what they show")]

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use dataplane_tests::bpf::keys;
use dataplane_tests::wire::Segment;
use dataplane_tests::{Pair, Pod, Wire, World, eventually, pause, repairs};

const PORT: u16 = 7000;
/// A port without a listener at first.
const LATE: u16 = 7001;

/// Adds a wire between two pods, besides those to their nodes, with `192.168.<number>.1` and `.2`.
fn network(one: &Pod, two: &Pod, number: u8) -> SocketAddr {
    let name = format!("net{number}");
    one.netns.ip(&format!(
        "link add {name} type veth peer name {name} netns {}\n\
         addr add 192.168.{number}.1/24 dev {name}\n\
         link set {name} up\n",
        two.netns.name
    ));
    two.netns.ip(&format!(
        "addr add 192.168.{number}.2/24 dev {name}\n\
         link set {name} up\n"
    ));
    format!("192.168.{number}.2:{PORT}")
        .parse()
        .expect("an address")
}

/// Returns a pair whose pods are on two networks from the start.
fn pair_with_a_network() -> (Pair, SocketAddr) {
    let mut second = None;
    let pair = Pair::prepared(|client, server| second = Some(network(client, server, 77)));
    (pair, second.expect("it was prepared"))
}

#[test]
fn a_socket_that_is_bound_to_an_interface_goes_by_its_network() {
    let (pair, second) = pair_with_a_network();
    let _app = pair.server.serve(PORT);
    let captured = pair.one.counter("captured");
    for options in [&[][..], &["device=net77"]] {
        let answer = pair.client.ask_with(second, "x", options);
        assert_eq!(answer, Ok("192.168.77.1 x".into()), "{options:?}");
    }
    assert!(pair.one.counter("captured") >= captured + 2);
}

#[test]
fn the_source_that_an_app_has_bound_is_what_the_server_sees() {
    let (pair, second) = pair_with_a_network();
    let _app = pair.server.serve(PORT);
    let server = pair.server.at(PORT);
    // Another address of the client's, to which its node routes as to the first.
    let first = pair.client.v4.to_string();
    let (network, _) = first.rsplit_once('.').expect("four numbers");
    let other = format!("{network}.200");
    pair.client
        .netns
        .ip(&format!("addr add {other}/32 dev eth0\n"));
    pair.nodes
        .0
        .netns
        .ip(&format!("route add {other}/32 dev {}\n", pair.client.veth));
    let seen = |to: SocketAddr, source: &str| {
        pair.client
            .ask_with(to, "x", &[&format!("source={source}")])
            .map(|answer| answer.replace(" x", ""))
    };
    eventually("the server sees the other address", 10, || {
        seen(server, &other) == Ok(other.clone())
    });
    assert_eq!(seen(server, &first), Ok(first.clone()));
    assert_eq!(seen(second, "192.168.77.1"), Ok("192.168.77.1".into()));
    let answer = pair.client.ask(server, "x");
    assert_eq!(answer, Ok(format!("{first} x")), "none is bound");
}

#[test]
fn an_interface_and_addresses_that_come_later_are_taken_over() {
    let pair = Pair::new();
    let _app = pair.server.serve(PORT);
    let mut old = pair.client.live(pair.server.at(PORT));
    let second = network(&pair.client, &pair.server, 79);
    for options in [&[][..], &["device=net79"]] {
        eventually(&format!("by the new interface, {options:?}"), 10, || {
            pair.client.ask_with(second, "x", options) == Ok("192.168.79.1 x".into())
        });
    }
    // A changed address is the source of sockets that are bound to the interface, and the pod's own.
    pair.client.netns.ip("addr del 192.168.79.1/24 dev net79\n\
         addr add 192.168.79.3/24 dev net79\n");
    eventually("by the new address", 10, || {
        pair.client.ask_with(second, "x", &["device=net79"]) == Ok("192.168.79.3 x".into())
    });
    let _own = pair.client.serve(PORT);
    let captured = pair.one.counter("captured");
    let own = SocketAddr::from(([192, 168, 79, 3], PORT));
    assert!(pair.client.ask(own, "to itself").is_ok());
    assert_eq!(pair.one.counter("captured"), captured);
    // An address that it does not have any more is not its own: connections to it are captured, as any others.
    let before = SocketAddr::from(([192, 168, 79, 1], PORT));
    let _ = pair.client.ask(before, "no more");
    assert_eq!(pair.one.counter("captured"), captured + 1);
    old.say("after");
    assert_eq!(old.line(), format!("{} after", pair.client.v4));
    assert_eq!(pair.one.pod("client").0, "up");
}

#[test]
fn c1_an_address_that_a_pod_has_no_more_is_not_its_own() {
    let pair = Pair::prepared(|client, _| client.netns.ip("addr add 10.100.0.1/32 dev eth0\n"));
    let (_theirs, _own) = (pair.server.serve(PORT), pair.client.serve(PORT));
    let node = &pair.nodes.0;
    let thief = node.bare(&pair.world, "outside", "thief");
    let _thieves = thief.serve(PORT);
    pair.world.manifests.policy(
        "demo",
        "nobody",
        "ALLOW",
        "client",
        "cluster.local/ns/x/sa/y",
    );
    pair.knows("nobody");
    // The address that the mesh knows the pod by moves to another pod.
    let moved = pair.client.v4;
    pair.client
        .netns
        .ip(&format!("addr del {moved}/32 dev eth0\n"));
    thief.netns.ip(&format!(
        "addr add {moved}/32 dev eth0\n\
         route replace default via 169.254.1.1 dev eth0 onlink src {moved}\n"
    ));
    node.netns.ip(&format!(
        "route replace {moved}/32 dev {}\n\
         route add 10.100.0.1/32 dev {}\n",
        thief.veth, pair.client.veth
    ));
    eventually("it is captured, as any other", 10, || {
        let captured = pair.one.counter("captured");
        let _ = pair.client.ask(pair.client.at(PORT), "to whom");
        pair.one.counter("captured") > captured
    });
    pair.one.is("client", "broken");
    let why = pair.one.pod("client").1;
    assert!(why.contains(&moved.to_string()), "{why}");
    let tap = Wire::tap(node.netns.file(), &pair.client.veth);
    let _ = pair.client.ask(pair.client.at(PORT), "to whom");
    let segments = tap.end();
    let left = |segment: &Segment| segment.to == (moved, PORT);
    assert!(!segments.iter().any(left), "{segments:?}");
    // And its new owner gets connections as any other pod.
    let at = SocketAddr::from(([10, 100, 0, 1], PORT));
    let answer = thief.ask(at, "let me in");
    assert!(answer.is_err(), "{answer:?}");
    // The pod is served as before once it has its address again.
    pair.client.netns.ip(&format!(
        "addr add {moved}/32 dev eth0\n\
         route replace default via 169.254.1.1 dev eth0 onlink src {moved}\n"
    ));
    node.netns.ip(&format!(
        "route replace {moved}/32 dev {}\n",
        pair.client.veth
    ));
    pair.one.up(&["client"]);
    let answer = pair.client.ask(pair.server.at(PORT), "x");
    assert_eq!(answer, Ok(format!("{moved} x")));
}

#[test]
fn c1_without_an_agent_an_address_that_a_pod_has_no_more_is_not_its_own() {
    let mut pair = Pair::prepared(|client, _| {
        client.netns.ip("addr add 10.100.0.1/32 dev eth0\n");
        client
            .netns
            .ip6("addr add fd00:100::1/128 dev eth0 nodad\n");
    });
    let _own = pair.client.serve(PORT);
    let node = &pair.nodes.0;
    let thief = node.bare(&pair.world, "outside", "thief");
    let _thieves = thief.serve(PORT);
    let to: SocketAddr = "10.100.0.1:7000".parse().expect("an address");
    let to6: SocketAddr = "[fd00:100::1]:7000".parse().expect("an address");
    let ways = [(to, pair.client.at(PORT)), (to6, pair.client.at6(PORT))];
    let from = |to: SocketAddr, port| format!("source={}", SocketAddr::new(to.ip(), port));
    // Source ports that the pod has used itself before.
    for (to, own) in ways {
        let answer = pair.client.ask_with(own, "x", &[&from(to, 4001)]);
        assert_eq!(answer, Ok(format!("{} x", to.ip())));
        let answer = pair.client.ask_with(own, "x", &[&from(to, 4002), "mptcp"]);
        assert_eq!(answer, Ok(format!("{} x", to.ip())));
        let late = SocketAddr::new(own.ip(), LATE);
        let answer = pair.client.ask_with(late, "x", &[&from(to, 4003)]);
        assert_eq!(answer, Err("refused".into()));
    }
    let _late = pair.client.serve(LATE);
    // A connection that it has with itself, and that goes on.
    let mut talks = [to, to6].map(|to| pair.client.live(to));
    pair.one.kill();
    pair.client.netns.ip("addr del 10.100.0.1/32 dev eth0\n");
    thief.netns.ip("addr add 10.100.0.1/32 dev eth0\n");
    node.netns
        .ip(&format!("route add 10.100.0.1/32 dev {}\n", thief.veth));
    pair.client.netns.ip("addr del fd00:100::1/128 dev eth0\n");
    thief.netns.ip("addr add fd00:100::1/128 dev eth0 nodad\n");
    node.netns
        .ip(&format!("route add fd00:100::1/128 dev {}\n", thief.veth));
    let tap = Wire::tap(node.netns.file(), &pair.client.veth);
    for (to, own) in ways {
        for options in [&[][..], &["mptcp"]] {
            let answer = pair.client.ask_with(to, "to whom", options);
            assert!(answer.is_err(), "{to} {options:?}: {answer:?}");
        }
        // In parallel, as each waits in vain.
        let ports = [(0, PORT), (4001, PORT), (4002, PORT), (4003, LATE)];
        let asks = ports.map(|(port, to_port)| {
            let own = SocketAddr::new(own.ip(), to_port).to_string();
            thief.app(&["ask", &own, "let me in", &from(to, port)])
        });
        for (ask, ports) in asks.into_iter().zip(ports) {
            let (status, answer) = ask.end();
            assert!(!status.success(), "{to} {ports:?}: {answer:?}");
        }
    }
    talks.iter_mut().for_each(|talk| talk.say("to whom"));
    pause(Duration::from_millis(300));
    let out =
        |segment: &Segment| segment.from.0 == pair.client.v4 || segment.from.0 == pair.client.v6;
    let leaked: Vec<_> = tap
        .end()
        .into_iter()
        .filter(|segment| !segment.payload.is_empty() || (out(segment) && segment.flags & 4 == 0))
        .collect();
    assert!(leaked.is_empty(), "{leaked:?}");
}

#[test]
fn a_pod_reaches_itself_by_all_of_its_addresses_with_an_agent_and_without() {
    let mut pair = Pair::prepared(|client, _| {
        client.netns.ip("addr add 10.100.0.1/32 dev eth0\n");
        client
            .netns
            .ip6("addr add fd00:100::1/128 dev eth0 nodad\n");
    });
    pair.world.manifests.mtls("demo", "STRICT");
    let _own = pair.client.serve(PORT);
    let at = |ip: &str| SocketAddr::new(ip.parse().expect("an address"), PORT);
    let v4 = [pair.client.at(PORT), at("10.100.0.1"), at("127.0.0.1")];
    let v6 = [pair.client.at6(PORT), at("fd00:100::1"), at("::1")];
    let reaches_itself = |pair: &Pair| {
        for to in v4.iter().chain(&v6) {
            for options in [&[][..], &["mptcp"], &["mapped"], &["device=eth0"]] {
                if to.ip().is_loopback() && options == ["device=eth0"] {
                    continue; // there is no such way
                }
                let answer = pair.client.ask_with(*to, "x", options);
                assert_eq!(answer, Ok(format!("{} x", to.ip())), "{to} {options:?}");
            }
        }
        // Between its own addresses it may connect from each to each.
        for all in [&v4, &v6] {
            for (from, to) in [(0, 1), (1, 0), (0, 2), (1, 2)] {
                let (from, to) = (all[from].ip(), all[to]);
                for option in [&[][..], &["mptcp"]] {
                    let source = format!("source={from}");
                    let options = [&[source.as_str()][..], option].concat();
                    let answer = pair.client.ask_with(to, "x", &options);
                    assert_eq!(answer, Ok(format!("{from} x")), "{from} to {to} {option:?}");
                }
            }
        }
    };
    reaches_itself(&pair);
    assert_eq!(pair.one.counter("not_kept"), 0);
    pair.one.kill();
    reaches_itself(&pair);
    // With cookies a listener is looked up for the last packet of a handshake too.
    let netns = &pair.client.netns;
    netns.set_sysctl("net.ipv4.tcp_syncookies", "2");
    reaches_itself(&pair);
}

#[test]
fn a_pod_reaches_its_own_service_at_an_address_that_is_not_its_first() {
    let pair = Pair::prepared(|client, _| {
        let IpAddr::V4(own) = client.v4 else {
            panic!("{} is of IPv4", client.v4);
        };
        let [a, b, c, d] = own.octets();
        // Of two addresses of one subnet the kernel connects to the second one from the first.
        let first = Ipv4Addr::new(a, b, c, d + 100);
        client.netns.ip(&format!(
            "addr add {first}/24 dev eth0\n\
             addr del {own}/32 dev eth0\n\
             addr add {own}/24 dev eth0\n"
        ));
    });
    for (name, vip) in [("own4", "10.96.2.9"), ("own6", "fd00:96::9")] {
        pair.world.manifests.write(
            &format!("service-{name}.yaml"),
            &format!(
                "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: demo}}\n\
                 spec: {{clusterIP: {vip:?}, selector: {{app: client}}, ports: [{{port: 80, targetPort: {PORT}}}]}}\n"
            ),
        );
        pair.knows(vip);
    }
    let _own = pair.client.serve(PORT);
    pair.world.manifests.mtls("demo", "STRICT");
    let outsider = pair.nodes.0.bare(&pair.world, "outside", "outsider");
    eventually("who is in no mesh is refused", 10, || {
        outsider.ask(pair.client.at(PORT), "x").is_err()
    });
    for (to, own) in [
        ("10.96.2.9:80", pair.client.at(PORT)),
        ("[fd00:96::9]:80", pair.client.at6(PORT)),
    ] {
        let answer = pair.client.ask(to.parse().expect("an address"), "x");
        assert_eq!(answer, Ok(format!("{} x", own.ip())), "{to}");
    }
}

#[test]
fn what_a_pod_begins_with_itself_is_forgotten_as_it_is_there() {
    let pair = Pair::prepared(|client, _| {
        client.netns.ip("addr add 10.100.0.1/32 dev eth0\n");
        client
            .netns
            .ip6("addr add fd00:100::1/128 dev eth0 nodad\n");
    });
    let _own = pair.client.serve(PORT);
    let begun = || {
        let pinned = pair.world.pinned("one", "maps");
        let pin = pinned.iter().find(|pin| pin.ends_with("BEGUN"));
        keys(pin.expect("it is pinned")).expect("a hash table")
    };
    for (from, own) in [
        ("10.100.0.1", pair.client.at(PORT)),
        ("fd00:100::1", pair.client.at6(PORT)),
    ] {
        let source = format!("source={from}");
        for cookies in ["1", "2"] {
            let netns = &pair.client.netns;
            netns.set_sysctl("net.ipv4.tcp_syncookies", cookies);
            for option in [&[][..], &["mptcp"], &["fastopen"]] {
                let options = [&[source.as_str()][..], option].concat();
                let answer = pair.client.ask_with(own, "x", &options);
                assert_eq!(answer, Ok(format!("{from} x")), "{options:?}");
                assert_eq!(begun(), Vec::<Vec<u8>>::new(), "{options:?} {cookies}");
            }
        }
        let late = SocketAddr::new(own.ip(), LATE);
        let answer = pair.client.ask_with(late, "x", &[&source]);
        assert_eq!(answer, Err("refused".into()));
        assert_eq!(begun(), Vec::<Vec<u8>>::new(), "refused");
    }
}

#[test]
fn c1_what_comes_to_loopback_from_outside_does_not_reach_the_app() {
    let mut pair = Pair::new();
    let thief = pair.nodes.0.bare(&pair.world, "outside", "thief");
    network(&pair.client, &thief, 78);
    // The thief has no loopback addresses of its own, but a route to the pod's.
    for netns in [&pair.client.netns, &thief.netns] {
        netns.set_sysctl("net.ipv4.conf.net78.route_localnet", "1");
    }
    thief.netns.ip("link set lo up\n\
         addr del 127.0.0.1/8 dev lo\n\
         route add 127.0.0.0/8 via 192.168.78.1 dev net78 src 192.168.78.2\n");
    let _own = pair.client.serve(PORT);
    let loopback = |last: u8| SocketAddr::from(([127, 0, 0, last], PORT));
    for agent in [true, false] {
        if !agent {
            pair.one.kill();
        }
        for last in [1, 9] {
            let tap = Wire::tap(thief.netns.file(), "net78");
            let answer = thief.ask(loopback(last), "let me in");
            assert!(answer.is_err(), "{answer:?}");
            let came = |segment: &Segment| segment.to == (loopback(last).ip(), PORT);
            assert!(tap.end().iter().any(came), "it was sent by the wire");
            let answer = pair.client.ask(loopback(last), "x");
            assert_eq!(answer, Ok("127.0.0.1 x".into()));
        }
    }
}

#[test]
fn an_interface_without_an_address_refuses_at_once_what_is_bound_to_it() {
    let (pair, _) = pair_with_a_network();
    let _app = pair.server.serve(PORT);
    pair.client
        .netns
        .ip("link add bare type veth peer name other\nlink set bare up\n");
    let answer = pair
        .client
        .ask_with(pair.server.at(PORT), "x", &["device=bare"]);
    let why = answer.expect_err("there is no way");
    assert!(why.contains("unreachable"), "{why}");
    pair.one
        .logs(&["no_route", &pair.server.at(PORT).to_string()]);
}

#[test]
fn c2_rules_of_the_apps_own_do_not_come_before_capture() {
    let pair = Pair::new();
    let _app = pair.server.serve(PORT);
    // With an explicit preference, and with the one that the kernel chooses.
    for rule in ["pref 100 from all lookup 77", "from all lookup 77"] {
        pair.client.netns.ip(&format!(
            "route add default via 169.254.1.1 dev eth0 onlink table 77\n\
             rule add {rule}\n"
        ));
        let answer = pair.client.ask(pair.server.at(PORT), "x");
        assert_eq!(answer, Ok(format!("{} x", pair.client.v4)), "{rule}");
        pair.client
            .netns
            .ip(&format!("rule del {rule}\nroute flush table 77\n"));
    }
}

#[test]
fn c2_a_rule_that_was_first_and_would_come_before_capture_is_told() {
    let pair = Pair::new();
    let _app = pair.server.serve(PORT);
    let netns = &pair.client.netns;
    netns.ip("route add default via 169.254.1.1 dev eth0 onlink table 77\n");
    let works = || pair.client.ask(pair.server.at(PORT), "x").is_ok();
    // Rules that match none of the agent's marks do no harm.
    for rule in ["fwmark 0x200/0x200 lookup 77", "iif eth0 lookup 77"] {
        let before = repairs(&pair.one, "rule");
        netns.ip(&format!("rule add pref 0 {rule}\n"));
        netns.ip("rule del fwmark 0x511/0xfff\nrule del fwmark 0x111/0xfff\n");
        eventually("rules are put back", 10, || {
            let rules = netns.show("rule");
            let marks = ["0x511", "0x111"];
            marks.iter().all(|mark| rules.contains(mark)) && repairs(&pair.one, "rule") > before
        });
        assert!(works(), "{rule}");
        assert_eq!(pair.one.pod("client").0, "up", "{rule}");
        netns.ip(&format!("rule del pref 0 {rule}\n"));
    }
    netns.ip("rule add pref 0 from all lookup 77\n");
    assert!(works(), "it comes after ours");
    netns.ip("rule del fwmark 0x511/0xfff\n");
    pair.one.is("client", "broken");
    let why = pair.one.pod("client").1;
    assert!(
        why.contains("rule") && why.contains("preference 0"),
        "{why}"
    );
    netns.ip("rule del pref 0 from all lookup 77\n");
    pair.one.up(&["client"]);
    assert!(works());
    // Nor is a pod enrolled that has such a rule from the start, until the rule is gone.
    let late = pair.nodes.0.bare(&pair.world, "demo", "late");
    late.netns.ip("rule add pref 0 from all lookup 77\n");
    pair.world.manifests.pod(&pair.nodes.0.object(&late));
    eventually("it is told", 20, || {
        pair.one.pod("late").1.contains("preference 0")
    });
    eventually("what a trial has begun is taken back", 10, || {
        late.traces().is_empty()
    });
    late.netns.ip("rule del pref 0 from all lookup 77\n");
    pair.one.up(&["late"]);
}

#[test]
fn c2_more_rules_that_were_first_than_are_looked_at_are_told() {
    let pair = Pair::new();
    let netns = &pair.client.netns;
    let rule = |number| format!("rule add pref 0 iif eth0 fwmark {number} lookup 77\n");
    let rules: String = (1..=1025).map(rule).collect();
    netns.ip(&rules);
    // The scan that mends this sees them too.
    let before = repairs(&pair.one, "setting");
    netns.set_sysctl("net.ipv4.fwmark_reflect", "0");
    eventually("the pod is looked at", 10, || {
        repairs(&pair.one, "setting") > before
    });
    assert_eq!(pair.one.pod("client").0, "up", "they come after ours");
    netns.ip("rule del fwmark 0x511/0xfff\n");
    pair.one.is("client", "broken");
    let why = pair.one.pod("client").1;
    assert!(why.contains("more than 1024 other rules"), "{why}");
    // The kernel's own is another one too.
    netns.ip("rule del pref 0 iif eth0 fwmark 1 lookup 77\n\
         rule del pref 0 iif eth0 fwmark 2 lookup 77\n");
    pair.one.up(&["client"]);
}

#[test]
fn an_address_on_lo_is_a_pods_own_and_policy_holds_for_it() {
    let pair = Pair::new();
    let (_app, server) = (pair.server.serve(PORT), &pair.server);
    let outsider = pair.nodes.1.bare(&pair.world, "outside", "outsider");
    for (own, first) in [("10.100.0.9", server.v4), ("fd00:100::9", server.v6)] {
        let (length, onlink) = match first.is_ipv4() {
            true => (32, " onlink"),
            false => (128, ""),
        };
        let own = SocketAddr::new(own.parse().expect("an address"), PORT);
        let prefix = format!("{}/{length}", own.ip());
        server.netns.ip(&format!("addr add {prefix} dev lo\n"));
        let node = &pair.nodes.1.netns;
        let route = format!("{prefix} via {first} dev {}", server.veth);
        node.ip(&format!("route add {route}{onlink}\n"));
        eventually("it is reached from outside", 5, || {
            outsider.ask(own, "x").is_ok()
        });
        let steered = pair.two.counter("steered_inbound");
        assert!(outsider.ask(own, "x").is_ok());
        assert_eq!(pair.two.counter("steered_inbound"), steered + 1);
        let answer = server.ask(own, "to itself");
        assert_eq!(answer, Ok(format!("{} to itself", own.ip())));
        // A socket without another source has the address that the mesh knows.
        let to = match first.is_ipv4() {
            true => outsider.at(PORT),
            false => outsider.at6(PORT),
        };
        let _theirs = outsider.serve(PORT);
        assert_eq!(server.ask(to, "x"), Ok(format!("{first} x")));
        pair.world.manifests.mtls("demo", "STRICT");
        eventually("STRICT keeps out who is in no mesh", 5, || {
            outsider.ask(own, "x").is_err()
        });
        pair.world.manifests.mtls("demo", "PERMISSIVE");
        eventually("it is reached again", 5, || outsider.ask(own, "x").is_ok());
        server.netns.ip(&format!("addr del {prefix} dev lo\n"));
        node.ip(&format!("route del {route}\n"));
        // Connections that begin before the agent sees the change go nowhere, and apps wait for them.
        eventually("it is not the pod's any more", 30, || {
            let captured = pair.two.counter("captured");
            let _ = server.ask(own, "to whom");
            pair.two.counter("captured") > captured
        });
    }
}

#[test]
fn a_pod_that_forwards_is_told() {
    let (pair, _) = pair_with_a_network();
    let netns = &pair.client.netns;
    let names = ["net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"];
    let forwards = |is: bool| {
        eventually(&format!("it forwards: {is}"), 10, || {
            pair.one.status().unwrap_or_default()["pods"][0]["forwards"] == is
        });
        let (_, table, _) = pair.one.ask(&["status"]);
        let told = "forwards: what it does for others is not captured, and no policy holds";
        assert_eq!(table.contains(told), is, "{table}");
    };
    for name in names {
        netns.set_sysctl(name, "0");
    }
    for name in names {
        forwards(false);
        netns.set_sysctl(name, "1");
        forwards(true);
        netns.set_sysctl(name, "0");
    }
    pair.one
        .logs(&["\twarn\t", "demo/client", "forwards between its interfaces"]);
    // The pod has no other interface to forward to.
    netns.set_sysctl(names[0], "1");
    forwards(true);
    netns.ip("link del net77\n");
    forwards(false);
    assert_eq!(pair.one.pod("client").0, "up");
}

#[test]
fn a_pod_with_many_addresses_is_captured_and_all_are_its_own() {
    let world = World::new();
    let (one, two) = world.two_nodes();
    let client = one.bare(&world, "demo", "client");
    let server = two.bare(&world, "demo", "server");
    for number in 1..=40 {
        client
            .netns
            .ip(&format!("addr add 10.100.0.{number}/32 dev eth0\n"));
    }
    // A label stands in place of its link's name; a tunnel has no link-layer address.
    client
        .netns
        .ip("addr add 10.100.0.41/32 dev eth0 label eth0:41\n\
         tuntap add dev tunnel mode tun\n\
         addr add 10.100.0.42/32 dev tunnel\n\
         link set tunnel up\n");
    // Answers to the tunnel's address are routed by the nodes.
    two.netns
        .ip(&format!("route add 10.100.0.42/32 via {}\n", one.wire_v4()));
    one.netns
        .ip(&format!("route add 10.100.0.42/32 dev {}\n", client.veth));
    world.manifests.pod(&one.object(&client));
    world.manifests.pod(&two.object(&server));
    let mut agent = world.agent(&one);
    let other = world.agent(&two);
    agent.up(&["client"]);
    other.up(&["server"]);
    let (_app, _own) = (server.serve(PORT), client.serve(PORT));
    eventually("both are in the mesh", 10, || agent.tunnelled() >= 2);
    for _ in 0..2 {
        let captured = agent.counter("captured");
        for number in 40..=42 {
            let own = SocketAddr::from(([10, 100, 0, number], PORT));
            assert!(client.ask(own, "to itself").is_ok(), "{own}");
        }
        assert_eq!(agent.counter("captured"), captured, "its own addresses");
        let by = client.ask_with(server.at(PORT), "x", &["device=tunnel"]);
        assert_eq!(by, Ok("10.100.0.42 x".into()));
        let captured = agent.counter("captured");
        assert!(client.ask(server.at(PORT), "out").is_ok());
        assert_eq!(agent.counter("captured"), captured + 1);
        agent.kill();
        agent.restart();
        agent.up(&["client"]);
    }
}

#[test]
fn c1_beyond_as_many_addresses_as_are_known_a_pod_stays_captured() {
    let world = World::new();
    let (one, two) = world.two_nodes();
    let client = one.bare(&world, "demo", "client");
    let outsider = two.bare(&world, "outside", "outsider");
    for number in 1..=90 {
        client
            .netns
            .ip(&format!("addr add 10.100.0.{number}/32 dev eth0\n"));
    }
    world.manifests.pod(&one.object(&client));
    let agent = world.agent(&one);
    agent.up(&["client"]);
    agent.logs(&["more addresses than are known to be its own"]);
    let (_app, _own) = (outsider.serve(PORT), client.serve(PORT));
    let captured = agent.counter("captured");
    assert!(client.ask(outsider.at(PORT), "out").is_ok());
    assert_eq!(agent.counter("captured"), captured + 1);
    // From outside, connections to a known address are served, and to one too many refused.
    two.netns
        .ip(&format!("route add 10.100.0.0/16 via {}\n", one.wire_v4()));
    one.netns
        .ip(&format!("route add 10.100.0.0/16 dev {}\n", client.veth));
    let at = |number: u8| SocketAddr::from(([10, 100, 0, number], PORT));
    assert!(outsider.ask(at(1), "known").is_ok());
    assert_eq!(outsider.ask(at(90), "one too many"), Err("reset".into()));
}

#[test]
fn a_family_without_an_address_is_unreachable_as_it_is_without_a_mesh() {
    let world = World::new();
    let (one, two) = world.two_nodes();
    let server = two.bare(&world, "outside", "server");
    let client = one.bare(&world, "demo", "client");
    let bare = one.bare(&world, "outside", "bare");
    for pod in [&client, &bare] {
        // As in a pod of one family: neither an address nor a route. An address on `lo` does not count.
        pod.netns.ip(&format!(
            "addr del {}/128 dev eth0\nroute del default via fe80::1 dev eth0\n\
             addr add fd00:100::9/128 dev lo\n",
            pod.v6
        ));
    }
    let mut object = one.object(&client);
    object.addresses.truncate(1);
    world.manifests.pod(&object);
    let agent = world.agent(&one);
    agent.up(&["client"]);
    let without = bare.ask(server.at6(PORT), "x").expect_err("no way");
    let with = client.ask(server.at6(PORT), "x").expect_err("no way");
    assert!(with.contains("unreachable"), "{with}");
    let ways = bare.netns.show("-6 route show");
    assert_eq!(with, without, "without a mesh there is: {ways}");
    assert!(agent.counter("refused") > 0);
}

/// Waits until an address of a pod's `eth0` is in this state.
fn is_address(pod: &Pod, address: &str, state: &str, seconds: u64) {
    eventually(&format!("{address} is {state}"), seconds, || {
        let of = pod.netns.show(&format!("-6 addr show dev eth0 {state}"));
        of.contains(address)
    });
}

#[test]
fn c1_an_address_that_another_on_the_link_has_costs_a_pod_no_other_of_its_addresses() {
    let world = World::new();
    let (one, two) = world.two_nodes();
    let server = two.pod(&world, "server");
    let client = one.pod(&world, "client");
    // A neighbour on the pod's link has the pod's address, and one that the pod gets later.
    let taken = client.v6.to_string();
    one.netns.ip(&format!(
        "addr add {taken}/128 dev {veth} nodad\naddr add fd00:99::1/128 dev {veth} nodad\n",
        veth = client.veth
    ));
    client.netns.ip(&format!(
        "addr del {taken}/128 dev eth0\naddr add {taken}/128 dev eth0\n"
    ));
    is_address(&client, &taken, "dadfailed", 10);
    let (agent, other) = (world.agent(&one), world.agent(&two));
    agent.up(&["client"]);
    other.up(&["server"]);
    eventually("both are in the mesh", 10, || agent.tunnelled() >= 2);
    let _app = server.serve(PORT);
    let works = || {
        let captured = agent.counter("captured");
        let answer = client.ask(server.at(PORT), "x");
        assert_eq!(answer, Ok(format!("{} x", client.v4)));
        assert_eq!(agent.counter("captured"), captured + 1);
    };
    works();
    // It is not the pod's own: connections to it would reach the neighbour, in clear.
    let tap = Wire::tap(one.netns.file(), &client.veth);
    let answer = client.ask(client.at6(PORT), "to whom");
    assert!(answer.is_err(), "{answer:?}");
    let segments = tap.end();
    let left = |segment: &Segment| segment.to == (client.v6, PORT);
    assert!(!segments.iter().any(left), "{segments:?}");
    // Nor does a later address break a pod that is up.
    client.netns.ip("addr add fd00:99::1/128 dev eth0\n");
    is_address(&client, "fd00:99::1", "dadfailed", 10);
    std::thread::sleep(std::time::Duration::from_secs(4));
    assert_eq!(agent.pod("client").0, "up");
    works();
}

#[test]
fn c1_a_pod_is_captured_while_its_addresses_are_looked_for_on_the_link() {
    let world = World::new();
    let (one, two) = world.two_nodes();
    let server = two.pod(&world, "server");
    let _client = one.pod(&world, "client");
    let (agent, other) = (world.agent(&one), world.agent(&two));
    other.up(&["server"]);
    agent.up(&["client"]);
    let late = one.bare(&world, "demo", "late");
    // Fifteen seconds of duplicate address detection: longer than it takes until the pod is up.
    late.netns
        .set_sysctl("net.ipv6.conf.eth0.dad_transmits", "15");
    late.netns.ip(&format!(
        "addr del {own}/128 dev eth0\naddr add {own}/128 dev eth0\n",
        own = late.v6
    ));
    world.manifests.pod(&one.object(&late));
    agent.up(&["late"]);
    is_address(&late, &late.v6.to_string(), "tentative", 0);
    let _app = server.serve(PORT);
    eventually("all are in the mesh", 10, || agent.tunnelled() >= 3);
    let answer = late.ask(server.at(PORT), "x");
    assert_eq!(answer, Ok(format!("{} x", late.v4)));
    is_address(&late, &late.v6.to_string(), "-tentative", 30);
    eventually("captured by IPv6 too", 10, || {
        late.ask(server.at6(PORT), "x") == Ok(format!("{} x", late.v6))
    });
    assert_eq!(agent.pod("late").0, "up");
}

#[test]
fn c10_thousands_of_connections_of_one_client_to_one_port_meet_no_taken_one() {
    let world = World::new();
    let (one, two) = world.two_nodes();
    let server = one.pod(&world, "server");
    let outsider = two.bare(&world, "outside", "outsider");
    let agent = world.agent(&one);
    agent.up(&["server"]);
    let _app = server.serve(PORT);
    let hold = outsider.app(&["hold", &server.at(PORT).to_string(), "4000"]);
    let held = hold.line();
    let refused: Vec<String> = agent
        .log()
        .lines()
        .filter(|line| line.contains("error="))
        .take(3)
        .map(str::to_owned)
        .collect();
    assert_eq!(held, "4000 good, 0 bad", "{refused:#?}");
}

//! Whole paths: from pod to pod, over both nodes' agents.

#![allow(missing_docs, reason = "tests are named for what they show")]

use std::time::Duration;

use dataplane_tests::{Agent, Node, Pair, Pod, Wire, World, eventually};

const PORT: u16 = 7000;

#[test]
fn pods_of_two_nodes_talk_in_hbone_and_the_server_sees_its_client() {
    let pair = Pair::new();
    let _app = pair.server.serve(PORT);
    let marker = "marker-of-an-enrolled-pair";
    let wire = Wire::watch(pair.nodes.0.netns.file(), "wire", &[marker]);
    let veth = Wire::watch(pair.nodes.0.netns.file(), &pair.client.veth, &[marker]);
    for to in [pair.server.at(PORT), pair.server.at6(PORT)] {
        let client = if to.is_ipv4() {
            pair.client.v4
        } else {
            pair.client.v6
        };
        assert_eq!(
            pair.client.ask(to, marker),
            Ok(format!("{client} {marker}"))
        );
    }
    for (wire, name) in [(wire, "wire"), (veth, "veth")] {
        let (markers, packets) = wire.count();
        assert_eq!(markers[0].1, 0, "in clear on the {name}");
        assert!(
            packets > 20,
            "the tunnel's packets cross the {name}: {packets}"
        );
    }
    let line = pair.one.logs(&[
        "connection complete",
        "direction=\"outbound\"",
        &format!("dst.hbone_addr={}:7000", pair.server.v4),
    ]);
    assert!(
        line.contains("src.identity=\"spiffe://cluster.local/ns/demo/sa/client\""),
        "{line}"
    );
    assert!(
        line.contains("dst.identity=\"spiffe://cluster.local/ns/demo/sa/server\""),
        "{line}"
    );
    let tunnel = format!("dst.addr={}:15008", pair.server.v4);
    assert!(line.contains(&tunnel), "{line}");
    pair.two
        .logs(&["connection complete", "direction=\"inbound\"", &tunnel]);
}

#[test]
fn a_pod_outside_of_the_mesh_is_let_in_in_clear_until_strict_refuses_it() {
    let pair = Pair::new();
    let _app = pair.server.serve(PORT);
    let outsider = pair.nodes.0.bare(&pair.world, "outside", "outsider");
    let wire = Wire::watch(pair.nodes.0.netns.file(), "wire", &["marker-in-clear"]);
    let answer = outsider.ask(pair.server.at(PORT), "marker-in-clear");
    assert_eq!(answer, Ok(format!("{} marker-in-clear", outsider.v4)));
    assert!(wire.count().0[0].1 > 0, "the capture sees what is in clear");
    pair.world.manifests.mtls("demo", "STRICT");
    eventually("STRICT refuses it", 5, || {
        outsider.ask(pair.server.at(PORT), "x").is_err()
    });
    assert_eq!(outsider.ask(pair.server.at(PORT), "x"), Err("reset".into()));
    pair.two.logs(&[
        "direction=\"inbound\"",
        "explicitly denied by: istio-system/istio_converted_static_strict",
    ]);
    assert!(
        pair.client.ask(pair.server.at(PORT), "x").is_ok(),
        "a peer with an identity is let in"
    );
}

#[test]
fn an_enrolled_pod_reaches_what_is_outside_of_the_mesh_in_clear() {
    let pair = Pair::new();
    let outsider = pair.nodes.1.bare(&pair.world, "outside", "outsider");
    let _app = outsider.serve(PORT);
    let answer = pair.client.ask(outsider.at(PORT), "hello");
    assert_eq!(answer, Ok(format!("{} hello", pair.client.v4)));
    assert_eq!(
        pair.client.ask(outsider.at(PORT + 1), "hello"),
        Err("reset".into())
    );
}

#[test]
fn policy_decides_by_identity_and_a_change_cuts_the_connection_that_it_denies() {
    let pair = Pair::new();
    let friend = pair.nodes.0.pod(&pair.world, "friend");
    pair.one.up(&["friend"]);
    let _app = pair.server.serve(PORT);
    let to = pair.server.at(PORT);
    eventually("friend is known", 5, || friend.ask(to, "x").is_ok());
    let (cut, mut friends) = (pair.client.live(to), friend.live(to));
    let friend_of = "cluster.local/ns/demo/sa/friend";
    pair.world
        .manifests
        .policy("demo", "only-friend", "ALLOW", "server", friend_of);
    assert_eq!(cut.line(), "closed: reset", "when the policy comes");
    assert_eq!(pair.client.ask(to, "x"), Err("reset".into()));
    friends.say("still");
    assert_eq!(friends.line(), format!("{} still", friend.v4));
    pair.two.logs(&[
        "direction=\"inbound\"",
        "connection closed due to policy change",
    ]);
    pair.two.logs(&["allow policies exist, but none allowed"]);
    pair.one.logs(&[
        "direction=\"outbound\"",
        "http status: 401 Unauthorized",
        "bytes_sent=0",
    ]);
    pair.world.manifests.remove("policy-demo-only-friend.yaml");
    eventually("let in again", 5, || pair.client.ask(to, "x").is_ok());
    pair.world.manifests.policy(
        "demo",
        "not-client",
        "DENY",
        "server",
        "cluster.local/ns/demo/sa/client",
    );
    eventually("denied", 5, || pair.client.ask(to, "x").is_err());
    assert!(friend.ask(to, "x").is_ok());
    pair.two.logs(&["explicitly denied by: demo/not-client"]);
}

#[test]
fn a_service_is_reached_by_its_address_and_spreads_over_its_pods() {
    let pair = Pair::new();
    let second = pair.nodes.0.bare(&pair.world, "demo", "second");
    let mut object = pair.nodes.0.object(&second);
    object.labels = vec![("app".into(), "server".into())];
    pair.world.manifests.pod(&object);
    pair.one.up(&["second"]);
    let app = |pod: &Pod, text: &str| {
        let server = pod.app(&["serve", "7000"]);
        assert_eq!(server.line(), "ready", "{text}");
        server
    };
    let (_first, _second) = (app(&pair.server, "server"), app(&second, "second"));
    pair.world
        .manifests
        .service("demo", "server", "10.96.0.1", 80, PORT);
    let vip = "10.96.0.1:80".parse().expect("an address");
    pair.knows("/10.96.0.1");
    for _ in 0..24 {
        assert!(pair.client.ask(vip, "spread").is_ok());
    }
    let inbound = |agent: &Agent| {
        let log = agent.log();
        log.lines()
            .filter(|line| line.contains("direction=\"inbound\"") && line.contains("complete"))
            .count()
    };
    for (agent, whose) in [(&pair.one, "the client's own"), (&pair.two, "the other")] {
        let part = format!("the pod of {whose} node takes its part");
        eventually(&part, 5, || inbound(agent) > 2);
    }
    pair.one
        .logs(&["dst.service=\"server.demo.svc.cluster.local\""]);
    let wrong = "10.96.0.1:81".parse().expect("an address");
    assert_eq!(pair.client.ask(wrong, "x"), Err("reset".into()));
    pair.one.logs(&["no healthy upstream: 10.96.0.1:81"]);
}

#[test]
fn an_app_that_does_not_listen_resets_its_client() {
    let pair = Pair::new();
    assert_eq!(
        pair.client.ask(pair.server.at(PORT), "x"),
        Err("reset".into())
    );
    pair.one.logs(&["http status: 503 Service Unavailable"]);
    pair.two.logs(&["connection failed: Connection refused"]);
    let outsider = pair.nodes.0.bare(&pair.world, "outside", "outsider");
    assert_eq!(outsider.ask(pair.server.at(PORT), "x"), Err("reset".into()));
}

#[test]
fn much_is_carried_whole_and_each_direction_ends_by_itself() {
    let pair = Pair::new();
    let sink = pair.server.app(&["sink", "7001"]);
    assert_eq!(sink.line(), "ready");
    for bytes in ["0", "1", "16384", "50000001"] {
        let to = pair.server.at(7001).to_string();
        let (status, lines) = pair.client.app(&["flood", &to, bytes]).end();
        assert!(status.success(), "{bytes}: {lines:?}");
        assert_eq!(lines, [format!("{bytes} arrived")]);
    }
    pair.one.logs(&["bytes_sent=50000001"]);
    pair.two.logs(&["bytes_recv=50000001"]);
}

#[test]
fn a_pod_reaches_itself_by_its_address_and_by_its_service() {
    let pair = Pair::new();
    let _app = pair.client.serve(PORT);
    let answer = pair.client.ask(pair.client.at(PORT), "self");
    assert_eq!(answer, Ok(format!("{} self", pair.client.v4)));
    pair.world
        .manifests
        .service("demo", "client", "10.96.0.2", 80, PORT);
    let vip = "10.96.0.2:80".parse().expect("an address");
    pair.knows("/10.96.0.2");
    let answer = pair.client.ask(vip, "service");
    assert_eq!(answer, Ok(format!("{} service", pair.client.v4)));
}

#[test]
fn a_namespace_leaves_and_comes_back_while_clients_connect_and_none_fails() {
    let pair = Pair::new();
    let _app = pair.server.serve(PORT);
    let to = pair.server.at(PORT).to_string();
    let mut live = pair.client.live(pair.server.at(PORT));
    let load = pair.client.app(&["load", &to, "4"]);
    let carries = || {
        let carried = || pair.one.log().matches("connection complete").count();
        let before = carried();
        eventually("it carries more", 20, || carried() > before + 100);
    };
    carries();
    pair.world.manifests.namespace("demo", false);
    pair.one.is("client", "draining");
    pair.two.is("server", "draining");
    live.say("while it leaves");
    assert_eq!(live.line(), format!("{} while it leaves", pair.client.v4));
    std::thread::sleep(Duration::from_secs(2));
    pair.world.manifests.namespace("demo", true);
    pair.one.up(&["client"]);
    pair.two.up(&["server"]);
    carries();
    let (status, lines) = load.end();
    assert!(status.success());
    assert!(lines[0].ends_with(" 0 bad"), "{lines:?}");
    drop(live);
}

#[test]
fn a_terminated_agent_drains_and_leaves_its_pods_captured() {
    let mut pair = Pair::new();
    let _app = pair.server.serve(PORT);
    let mut live = pair.client.live(pair.server.at(PORT));
    pair.one.ask_to_end();
    pair.one.logs(&["draining; pods stay captured"]);
    live.say("while it drains");
    assert_eq!(live.line(), format!("{} while it drains", pair.client.v4));
    drop(live);
    assert!(
        pair.one.wait().success(),
        "ends as it should once nothing runs"
    );
    let wire = Wire::watch(pair.nodes.0.netns.file(), "wire", &["marker-without-agent"]);
    assert!(
        pair.client
            .ask(pair.server.at6(PORT), "marker-without-agent")
            .is_err()
    );
    assert_eq!(wire.count().0[0].1, 0, "nothing passes in clear");
    pair.one.restart();
    pair.one.up(&["client"]);
    eventually("served again", 10, || {
        pair.client.ask(pair.server.at(PORT), "x").is_ok()
    });
}

#[test]
fn ztunnels_local_file_is_a_source_like_any_other() {
    let world = World::new();
    let (one, two) = world.two_nodes();
    let (client, server) = (
        one.bare(&world, "demo", "client"),
        two.bare(&world, "demo", "server"),
    );
    let _app = server.serve(PORT);
    let workload = |pod: &Pod, node: &Node| {
        format!(
            "- uid: cluster1//v1/Pod/demo/{name}\n  name: {name}\n  namespace: demo\n  serviceAccount: {name}\n  workloadIps: [{v4}]\n  protocol: HBONE\n  node: {node}\n  services:\n    demo/svc.demo.svc.cluster.local:\n      80: {PORT}\n",
            name = pod.name,
            v4 = pod.v4,
            node = node.name,
        )
    };
    let file = world.folder().join("local.yaml");
    let text = format!(
        "workloads:\n{}{}services:\n- name: svc\n  namespace: demo\n  hostname: svc.demo.svc.cluster.local\n  vips: [/10.96.0.9]\n  ports:\n    80: {PORT}\n",
        workload(&client, &one).replace("svc.demo.svc", "none.demo.svc"),
        workload(&server, &two),
    );
    std::fs::write(&file, text).expect("a file");
    let agent = |node: &Node| {
        let mut setup = world.setup(node);
        setup.reads_local_xds(&file);
        Agent::start(setup)
    };
    let agents = (agent(&one), agent(&two));
    agents.0.up(&["client"]);
    agents.1.up(&["server"]);
    let wire = Wire::watch(one.netns.file(), "wire", &["marker-local"]);
    for to in [server.at(PORT), "10.96.0.9:80".parse().expect("an address")] {
        assert_eq!(
            client.ask(to, "marker-local"),
            Ok(format!("{} marker-local", client.v4))
        );
    }
    assert_eq!(wire.count().0[0].1, 0);
    agents.1.logs(&[
        "direction=\"inbound\"",
        "src.identity=\"spiffe://cluster.local/ns/demo/sa/client\"",
    ]);
}

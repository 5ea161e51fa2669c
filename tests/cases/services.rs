//! Services on two nodes: the addresses that reach them, and the pods that take load.

#![allow(missing_docs, reason = "tests are named for what they show")]

use std::net::SocketAddr;

use dataplane_tests::{Agent, Node, Pair, Pod, Wire, World, eventually};

const PORT: u16 = 7000;

fn address(text: &str) -> SocketAddr {
    text.parse().expect("an address and port")
}

#[test]
fn a_service_is_reached_by_its_load_balancer_and_external_addresses_and_never_in_clear() {
    let pair = Pair::new();
    let _app = pair.server.serve(PORT);
    pair.world.manifests.write(
        "service.yaml",
        &format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: shop, namespace: demo}}\n\
             spec:\n  type: LoadBalancer\n  clusterIP: 10.96.2.1\n  externalIPs: [203.0.113.11]\n  \
             selector: {{app: server}}\n  ports: [{{port: 80, targetPort: {PORT}}}]\n\
             status: {{loadBalancer: {{ingress: [{{ip: 203.0.113.10}}]}}}}\n"
        ),
    );
    pair.knows("203.0.113.11");
    let wire = Wire::watch(pair.nodes.0.netns.file(), "wire", &["marker-outside"]);
    for strict in [false, true] {
        if strict {
            pair.world.manifests.mtls("demo", "STRICT");
            let outsider = pair.nodes.0.bare(&pair.world, "outside", "outsider");
            eventually("who is in no mesh is refused", 10, || {
                outsider.ask(pair.server.at(PORT), "x").is_err()
            });
        }
        for to in ["10.96.2.1:80", "203.0.113.10:80", "203.0.113.11:80"] {
            let answer = pair.client.ask(address(to), "marker-outside");
            let expected = format!("{} marker-outside", pair.client.v4);
            assert_eq!(answer, Ok(expected), "{to}, strict: {strict}");
        }
    }
    assert_eq!(wire.count().0[0].1, 0, "nothing passes in clear");
    pair.two.logs(&[
        "src.identity=\"spiffe://cluster.local/ns/demo/sa/client\"",
        "dst.service=\"shop.demo.svc.cluster.local\"",
    ]);
}

/// Writes a pod's object, which is being deleted or not.
fn object(world: &World, node: &Node, pod: &Pod, deleting: bool) {
    let deleting = match deleting {
        true => "\n  deletionTimestamp: \"2026-11-26T00:00:00Z\"",
        false => "",
    };
    let addresses = node.object(pod).addresses;
    let addresses = addresses.iter().map(|one| format!("{{ip: {one:?}}}"));
    let addresses = addresses.collect::<Vec<_>>().join(", ");
    world.manifests.write(
        &format!("pod-demo-{}.yaml", pod.name),
        &format!(
            "apiVersion: v1\nkind: Pod\nmetadata:\n  name: {name}\n  namespace: demo\n  \
             labels: {{app: {name}, group: all}}{deleting}\n\
             spec: {{nodeName: {}, serviceAccountName: {name}}}\n\
             status:\n  phase: Running\n  conditions: [{{type: Ready, status: \"True\"}}]\n  podIPs: [{addresses}]\n",
            node.name,
            name = pod.name,
        ),
    );
}

#[test]
fn a_pod_that_terminates_keeps_what_it_has_and_gets_more_only_where_it_is_alone() {
    let world = World::new();
    let (one, two) = world.two_nodes();
    let client = one.pod(&world, "client");
    let (ends, stays) = (
        two.bare(&world, "demo", "ends"),
        two.bare(&world, "demo", "stays"),
    );
    object(&world, &two, &ends, false);
    object(&world, &two, &stays, false);
    for (name, vip, selector) in [
        ("both", "10.96.1.1", "group: all"),
        ("alone", "10.96.1.2", "app: ends"),
    ] {
        world.manifests.write(
            &format!("service-{name}.yaml"),
            &format!(
                "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: demo}}\n\
                 spec: {{clusterIP: {vip}, selector: {{{selector}}}, ports: [{{port: 80, targetPort: {PORT}}}]}}\n"
            ),
        );
    }
    let agents = (world.agent(&one), world.agent(&two));
    agents.0.up(&["client"]);
    agents.1.up(&["ends", "stays"]);
    eventually("all pods are in the mesh of the client's node", 10, || {
        agents.0.tunnelled() >= 3
    });
    let _apps = (ends.serve(PORT), stays.serve(PORT));
    let mut live = client.live(ends.at(PORT));
    let (both, alone) = (address("10.96.1.1:80"), address("10.96.1.2:80"));
    // Lines of the log, not of the connection that is open.
    let taken = |pod: &str| {
        let log = agents.1.log();
        let of = format!("dst.workload=\"{pod}\"");
        log.lines()
            .filter(|line| line.contains("direction=\"inbound\"") && line.contains("complete"))
            .filter(|line| line.contains(&of))
            .count()
    };
    let ask = |to, times| {
        for _ in 0..times {
            assert!(client.ask(to, "x").is_ok(), "{to}");
        }
    };
    ask(both, 24);
    eventually("both take load, and all of it is told", 5, || {
        let (ends, stays) = (taken("ends"), taken("stays"));
        ends > 2 && stays > 2 && ends + stays == 24
    });

    object(&world, &two, &ends, true);
    eventually("it is known to end", 5, || {
        agents.0.get("/config_dump").contains("Unhealthy")
    });
    let (before, stayed) = (taken("ends"), taken("stays"));
    ask(both, 24);
    eventually("the other takes it all", 5, || {
        taken("stays") == stayed + 24
    });
    assert_eq!(taken("ends"), before);
    ask(alone, 6);
    eventually("where it is alone it takes load", 5, || {
        taken("ends") == before + 6
    });
    live.say("still here");
    assert_eq!(live.line(), format!("{} still here", client.v4));
    drop(live);
}

#[test]
fn who_has_the_address_of_another_networks_endpoint_here_is_not_dialled_for_it() {
    let world = World::new();
    let (one, two) = world.two_nodes();
    let client = one.bare(&world, "demo", "client");
    let namesake = two.bare(&world, "outside", "namesake");
    let _app = namesake.serve(PORT);
    let workload = |name: &str, at: &Pod, more: &str| {
        format!(
            "- name: {name}\n  namespace: demo\n  serviceAccount: {name}\n  workloadIps: [{}]\n{more}",
            at.v4
        )
    };
    let file = world.folder().join("local.yaml");
    let text = format!(
        "workloads:\n{}{}services:\n- name: far\n  namespace: demo\n  hostname: far.demo.svc\n  vips: [/10.96.3.1]\n  ports: {{80: {PORT}}}\n",
        workload(
            "client",
            &client,
            "  node: one\n  protocol: HBONE\n  services: {}\n"
        ),
        workload(
            "far",
            &namesake,
            &format!("  network: far\n  services: {{demo/far.demo.svc: {{80: {PORT}}}}}\n")
        ),
    );
    std::fs::write(&file, text).expect("a file");
    let mut setup = world.setup(&one);
    setup.reads_local_xds(&file);
    let agent = Agent::start(setup);
    agent.up(&["client"]);
    let wire = Wire::watch(one.netns.file(), "wire", &["marker-far"]);
    let answer = client.ask(address("10.96.3.1:80"), "marker-far");
    assert_eq!(answer, Err("reset".into()));
    agent.logs(&["no valid routing destination for workload: Kubernetes//Pod/demo/far"]);
    assert_eq!(wire.count().0[0].1, 0);
    // The address alone reaches the pod that has it on this node, as without a mesh.
    assert!(client.ask(namesake.at(PORT), "x").is_ok());
}

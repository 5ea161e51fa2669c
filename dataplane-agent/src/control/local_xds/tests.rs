use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::Path;

use super::super::conflicts;
use super::*;
use crate::mesh::workload::Health;
use crate::sys::memory::counted::most;

const FILE: &str = r#"
policies:
- name: gate
  namespace: shop
  scope: WorkloadSelector
  action: Deny
  dryRun: false
  rules:
  - - - notPrincipals: [!Presence []]
        destinationPorts: [80]
      - principals:
        - !Exact spiffe://cluster.local/ns/a/sa/b
        - !Prefix cluster.local/
        - !Suffix /sa/b
        namespaces: [!Exact 123]
        sourceIps: [10.0.0.0/8, "fd00::/16"]
        serviceAccounts: [{namespace: a, serviceAccount: b}]
workloads:
- uid: cluster1//v1/Pod/shop/till
  name: till
  namespace: shop
  serviceAccount: cashier
  workloadIps: [10.0.0.1]
  protocol: HBONE
  node: here
  network: ""
  authorizationPolicies: [shop/gate]
  services:
    shop/till.shop.svc.cluster.local: {80: 8080}
- name: no
  namespace: shop
  workloadIps: [10.0.0.2]
  node: here
  services: {}
services:
- name: till
  namespace: shop
  hostname: till.shop.svc.cluster.local
  vips: [/10.96.0.1]
  ports: {80: 8080}
  loadBalancer: {routingPreferences: [Region, Zone], mode: Failover, healthPolicy: AllowAll}
"#;

fn parsed(text: &str) -> Translation {
    parse(Path::new("local.yaml"), text, "here").expect("the test's own file")
}

#[test]
fn the_file_is_read() {
    let made = parsed(FILE);
    assert!(made.problems.is_empty(), "{:?}", made.problems);
    let till = &made.workloads[0];
    assert_eq!(
        till.identity().to_string(),
        "spiffe://cluster.local/ns/shop/sa/cashier"
    );
    assert_eq!(
        till.services["shop/till.shop.svc.cluster.local"].ports,
        BTreeMap::from([(80, 8080)]).into()
    );
    assert_eq!(
        (till.protocol, till.capacity, till.health),
        (Protocol::Hbone, 1, Health::Healthy)
    );
    assert_eq!(&*made.workloads[1].uid, "Kubernetes//Pod/shop/no");
    let service = &made.services[0];
    assert_eq!(service.vips[0].to_string(), "/10.96.0.1");
    assert!(service.publish_not_ready && !service.load_balancing.strict);
    assert_eq!(
        service.load_balancing.preferences,
        [Scope::Region, Scope::Zone]
    );
}

#[test]
fn string_matches_are_tags() {
    let made = parsed(FILE);
    let matches = &made.policies[0].rules[0].clauses[0].matches;
    assert_eq!(matches[0].not_principals, [StringMatch::Presence]);
    assert_eq!(matches[0].destination_ports, [80]);
    assert_eq!(
        matches[1].principals,
        [
            StringMatch::Exact("cluster.local/ns/a/sa/b".into()),
            StringMatch::Prefix("cluster.local/".into()),
            StringMatch::Suffix("/sa/b".into()),
        ]
    );
    assert_eq!(matches[1].namespaces, [StringMatch::Exact("123".into())]);
    assert_eq!(matches[1].source_ips.len(), 2);
}

#[test]
fn the_pods_here_are_the_hbone_workloads_of_the_node() {
    let made = parsed(FILE);
    let names: Vec<&str> = made.local.iter().map(|pod| &*pod.name).collect();
    assert_eq!(names, ["till"]);
    assert!(
        parse(Path::new("l"), FILE, "there")
            .expect("good")
            .local
            .is_empty()
    );
}

/// Translates a file with a workload and a service that have these fields.
fn with(workload: &str, service: &str) -> Translation {
    parsed(&format!(
        "workloads:\n- {{uid: w, name: w, namespace: a, workloadIps: [10.0.0.1], services: {{a/s: {{80: 80}}}}{workload}}}\n\
         services:\n- {{name: s, namespace: a, hostname: s, vips: [x/10.96.0.1], ports: {{80: 80}}{service}}}\n"
    ))
}

#[test]
fn a_field_that_is_not_carried_is_told_by_its_name_and_what_has_it_is_refused() {
    let gateway = "{destination: far/10.9.9.9, hboneMtlsPort: 15008}";
    for (workload, service, told) in [
        (
            format!(", networkGateway: {gateway}"),
            "",
            "workload w: networkGateway far/10.9.9.9: ",
        ),
        (
            ", applicationTunnel: {protocol: PROXY}".into(),
            "",
            "workload w: applicationTunnel: ",
        ),
        (
            format!(", waypoint: {gateway}"),
            "",
            "workload w: waypoint: ",
        ),
        (
            String::new(),
            ", loadBalancer: {mode: Passthrough}",
            "service a/s: loadBalancer.mode ",
        ),
        (
            String::new(),
            ", cidrVips: [x/10.97.0.0/16]",
            "service a/s: cidrVips: ",
        ),
        (
            String::new(),
            ", weightedWaypoints: [{destination: a/w, weight: 1}]",
            "service a/s: weightedWaypoints: ",
        ),
        (
            String::new(),
            ", endpoints: {z: {workloadUid: z, port: {}}}",
            "service a/s: endpoints: z is no workload",
        ),
    ] {
        let made = with(&workload, service);
        let [one] = made.problems.as_slice() else {
            panic!("{:?}", made.problems);
        };
        assert!(one.starts_with(told), "{one}");
    }
    let made = with(&format!(", network: far, networkGateway: {gateway}"), "");
    assert_eq!(
        made.workloads[0].network_gateway.as_deref(),
        Some("far/10.9.9.9")
    );
    assert_eq!(&*made.workloads[0].network, "far");
    assert!(
        with(", applicationTunnel: {protocol: PROXY}", "").workloads[0]
            .unsupported
            .is_some()
    );
    let none = with(", applicationTunnel: {protocol: NONE}", "");
    assert!(none.workloads[0].unsupported.is_none() && none.problems.is_empty());
    assert!(
        with("", ", loadBalancer: {mode: Passthrough}").services[0]
            .unsupported
            .is_some()
    );
    let service = &with(
        "",
        ", cidrVips: [x/10.97.0.0/16], ipFamilies: IPv6, visibility: Namespace",
    )
    .services[0];
    assert_eq!(
        service.cidrs,
        [("x".into(), "10.97.0.0/16".parse().expect("a range"))]
    );
    assert_eq!((service.family, service.private), (Some(Family::V6), true));
    assert_eq!(service.vips[0].to_string(), "x/10.96.0.1");
}

#[test]
fn an_endpoint_is_as_healthy_as_the_worse_of_what_is_said_of_it() {
    for (workload, endpoint, expected) in [
        ("Healthy", "Healthy", Health::Healthy),
        ("Unhealthy", "Healthy", Health::Unhealthy),
        ("Healthy", "Unhealthy", Health::Unhealthy),
    ] {
        let made = with(
            &format!(", status: {workload}"),
            &format!(
                ", endpoints: {{w: {{workloadUid: w, port: {{80: 81}}, status: {endpoint}}}}}"
            ),
        );
        let of = &made.workloads[0].services["a/s"];
        assert_eq!(
            (of.health, of.ports[&80]),
            (expected, 80),
            "{workload} {endpoint}"
        );
    }
}

#[test]
fn a_service_that_is_there_twice_and_who_shares_an_address_is_told() {
    let one = |uid: &str, network: &str| {
        format!(
            "- {{uid: {uid}, namespace: a, network: '{network}', workloadIps: [10.0.0.1], services: {{}}}}\n"
        )
    };
    let told = |workloads: &[String]| {
        let made = parsed(&format!("workloads:\n{}", workloads.concat()));
        let mut problems = made.problems;
        conflicts::report(made.workloads.iter(), made.services.iter(), &mut problems);
        problems
    };
    assert_eq!(told(&[one("w", ""), one("v", "x")]), [""; 0]);
    assert_eq!(
        told(&[one("w", ""), one("v", "")]),
        ["address 10.0.0.1: is that of w and v"]
    );
    let service = "- {name: s, namespace: a, hostname: s.a, vips: [], ports: {}}\n";
    assert_eq!(
        parsed(&format!("services:\n{service}{service}")).problems,
        ["service a/s.a: is there twice, the later one holds"]
    );
}

#[test]
fn a_pod_here_of_another_network_is_told() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("local.yaml");
    std::fs::write(&file, FILE).expect("a file");
    let told = |network| {
        read(&file, "here", network, "cluster.local")
            .expect("good")
            .0
            .problems
    };
    assert_eq!(told(""), [""; 0]);
    assert!(told("far")[0].contains("--network"), "{:?}", told("far"));
}

#[test]
fn errors_name_file_line_and_field() {
    for (text, expected) in [
        (
            "workload: []\n",
            "local.yaml:1: workload: unknown field `workload`",
        ),
        (
            "[]\n",
            "local.yaml:1: invalid type: sequence, expected a map",
        ),
        (
            "workloads: 5\n",
            "local.yaml:1: workloads: invalid type: integer `5`, expected a sequence",
        ),
        (
            "policies:\nworkloads: {a: b}\n",
            "local.yaml:2: workloads: invalid type: map, expected a sequence",
        ),
        (
            "services: !x []\n",
            "local.yaml:1: services: unexpected tag !x",
        ),
        (
            "services: []\n---\nservices: []\n",
            "local.yaml:3: one document is enough",
        ),
        (
            "workloads:\n- namespace: a\n  services: {}\n",
            "local.yaml:2: workloads[0]: missing field `workloadIps`",
        ),
        (
            "workloads:\n- namespace: a\n  services: {}\n  workloadIps: [10.0.0.999]\n",
            "local.yaml:4: workloads[0].workloadIps[0]: `10.0.0.999` is not an IP address",
        ),
        (
            "workloads:\n- namespace: a\n  services: {x/y: {http: 80}}\n  workloadIps: []\n",
            "local.yaml:3: workloads[0].services.x/y.http: `http` is not a port",
        ),
        (
            "policies:\n- name: a\n  namespace: b\n  scope: Global\n  action: Allow\n  dryRun: false\n  rules:\n  - - - principals: [{Exact: x}]\n",
            "local.yaml:8: policies[0].rules[0][0][0].principals[0]: expected a word or a !Tag",
        ),
        (
            "policies:\n- name: a\n  namespace: b\n  scope: Global\n  action: Allow\n  dryRun: false\n  rules:\n  - - - principals: [!Glob x]\n",
            "local.yaml:8: policies[0].rules[0][0][0].principals[0]: unknown variant `Glob`",
        ),
        (
            "policies:\n- name: a\n  namespace: b\n  scope: Global\n  action: Allow\n  rules: []\n",
            "local.yaml:2: policies[0]: missing field `dryRun`",
        ),
        (
            "services:\n- name: a\n  namespace: b\n  hostname: c\n  ports: {}\n  vips: [10.0.0.1]\n",
            "local.yaml:6: services[0].vips[0]: `10.0.0.1` is not a network/address",
        ),
    ] {
        let told = parse(Path::new("local.yaml"), text, "here")
            .expect_err(text)
            .to_string();
        assert!(told.starts_with(expected), "{told}\nis not\n{expected}");
    }
}

#[test]
fn a_workload_that_could_be_taken_for_another_is_refused() {
    let workload = |words: &str| format!("- {{workloadIps: [], services: {{}}, {words}}}\n");
    for (words, expected) in [
        (
            ["namespace: a/sa/b", "namespace: a"],
            "local.yaml: workloads[0]: invalid spiffe identity: spiffe://cluster.local/ns/a/sa/b/sa/default",
        ),
        (
            ["namespace: a", "namespace: b, serviceAccount: ../c"],
            "local.yaml: workloads[1]: invalid spiffe identity: spiffe://cluster.local/ns/b/sa/../c",
        ),
        (
            ["namespace: a, trustDomain: x/ns/y", "namespace: a"],
            "local.yaml: workloads[0]: invalid spiffe identity: spiffe://x/ns/y/ns/a/sa/default",
        ),
        (
            ["namespace: a, name: x", "namespace: a, name: x"],
            "local.yaml: workloads[1]: uid Kubernetes//Pod/a/x is that of workloads[0] too",
        ),
    ] {
        let text = format!("workloads:\n{}", words.map(workload).concat());
        let told = parse(Path::new("local.yaml"), &text, "here").expect_err(&text);
        let told = told.to_string();
        assert!(told.starts_with(expected), "{told}\nis not\n{expected}");
    }
}

#[test]
fn a_long_list_is_read_one_by_one() {
    const MANY: usize = 2000;
    let one = |number: usize| {
        let address = Ipv4Addr::from(number as u32);
        format!(
            "- {{name: pod-{number}, namespace: a, serviceAccount: sa, node: n, protocol: HBONE, workloadName: w, \
             workloadIps: [{address}], services: {{a/s: {{80: 8080}}}}, authorizationPolicies: [a/p]}}\n"
        )
    };
    let text = format!("workloads:\n{}", (0..MANY).map(one).collect::<String>());
    let (most, made) = most(|| parsed(&text));
    assert_eq!(made.workloads.len(), MANY);
    // A tree of the whole document would take more than 2 kB for each.
    let each = most / MANY;
    assert!(each < 1000, "{each} bytes for each");
}

#[test]
fn an_empty_file_is_an_empty_mesh() {
    assert_eq!(parsed(""), Translation::default());
}

#[test]
fn of_two_policies_of_one_name_none_is_lost_without_a_word() {
    let policy = |action: &str| {
        format!(
            "- {{name: gate, namespace: shop, scope: Namespace, action: {action}, dryRun: false, rules: []}}\n"
        )
    };
    let text = format!("policies:\n{}{}", policy("Deny"), policy("Allow"));
    let refused = parse(Path::new("local.yaml"), &text, "here").expect_err("one would be lost");
    assert_eq!(
        refused.to_string(),
        "local.yaml: policies[1]: shop/gate is the name of policies[0] too"
    );
}

#[test]
fn an_address_that_stands_for_one_of_ipv4_is_that_one() {
    let text = FILE
        .replace(
            "workloadIps: [10.0.0.1]",
            "workloadIps: ['::ffff:10.0.0.1']",
        )
        .replace(
            "sourceIps: [10.0.0.0/8, ",
            "sourceIps: ['::ffff:10.0.0.0/104', ",
        )
        .replace("vips: [/10.96.0.1]", "vips: ['/::ffff:10.96.0.1']");
    assert_eq!(parsed(&text), parsed(FILE));
}

#[test]
fn a_pod_here_of_another_trust_domain_is_refused_and_one_elsewhere_is_not() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("local.yaml");
    std::fs::write(&file, FILE).expect("a file");
    let read = |node| read(&file, node, "", "mesh.example").map_err(|error| error.to_string());
    let refused = read("here").expect_err("it would have no certificate");
    let told = "workloads[0].trustDomain: that of cluster1//v1/Pod/shop/till is `cluster.local`, and the \
                mesh's is `mesh.example` (--trust-domain)";
    assert!(refused.ends_with(told), "{refused}");
    assert!(read("elsewhere").is_ok());
}

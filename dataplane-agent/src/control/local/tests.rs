use std::path::Path;

use super::*;

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
        till.services["shop/till.shop.svc.cluster.local"],
        BTreeMap::from([(80, 8080)])
    );
    assert_eq!(
        (till.protocol, till.capacity, till.healthy),
        (Protocol::Hbone, 1, true)
    );
    assert_eq!(&*made.workloads[1].uid, "Kubernetes//Pod/shop/no");
    let service = &made.services[0];
    assert_eq!(service.vips, [IpAddr::from([10, 96, 0, 1])]);
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

#[test]
fn errors_name_file_line_and_field() {
    for (text, expected) in [
        (
            "workload: []\n",
            "local.yaml:1: workload: unknown field `workload`",
        ),
        (
            "workloads:\n- namespace: a\n  services: {}\n",
            "local.yaml:2: workloads[0]: missing field `workloadIps`",
        ),
        (
            "workloads:\n- namespace: a\n  services: {}\n  workloadIps: [10.0.0.999]\n",
            "local.yaml:4: workloads[0].workloadIps[0]: invalid IP address syntax",
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
fn an_empty_file_is_an_empty_mesh() {
    assert_eq!(parsed(""), Translation::default());
}

use std::collections::{BTreeMap, BTreeSet};

use super::super::super::enrolled::Enrolled;
use super::super::translate::{MeshConfig, PodKey, Wanted, translate};
use super::{objects, translation};
use crate::mesh::service::Scope;
use crate::mesh::workload::{Health, Protocol};

const SHOP: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: v1
kind: Node
metadata: {name: here, labels: {topology.kubernetes.io/region: r, topology.kubernetes.io/zone: z}}
---
apiVersion: v1
kind: Pod
metadata:
  name: till-5c9f-x2
  generateName: till-5c9f-
  namespace: shop
  uid: "1"
  labels: {app: till, version: v2, pod-template-hash: 5c9f}
  annotations: {ambient.dataplane/netns: /run/netns/till}
  ownerReferences: [{kind: ReplicaSet, name: till-5c9f, controller: true, apiVersion: apps/v1, uid: u}]
spec:
  nodeName: here
  serviceAccountName: cashier
  containers: [{name: c, image: i, ports: [{name: web, containerPort: 8080}]}]
status:
  phase: Running
  podIP: 10.0.0.1
  podIPs: [{ip: 10.0.0.1}, {ip: "fd00::1"}]
  conditions: [{type: Ready, status: "True"}]
---
apiVersion: v1
kind: Service
metadata: {name: till, namespace: shop}
spec:
  clusterIP: 10.96.0.1
  clusterIPs: [10.96.0.1]
  trafficDistribution: PreferClose
  selector: {app: till}
  ports: [{name: web, port: 80, targetPort: web}, {name: raw, port: 81}, {name: lost, port: 82, targetPort: nowhere}, {name: u, port: 53, protocol: UDP}]
---
apiVersion: v1
kind: Service
metadata: {name: bank, namespace: shop}
spec: {clusterIP: 10.96.0.2, ports: [{name: web, port: 443}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: bank-1, namespace: shop, labels: {kubernetes.io/service-name: bank}}
addressType: IPv4
endpoints:
- {addresses: [192.0.2.1], conditions: {ready: false}}
- {addresses: [10.0.0.1], targetRef: {kind: Pod, name: till-5c9f-x2, namespace: shop, uid: "1"}}
- {addresses: [10.0.0.1], targetRef: {kind: Pod, name: till-5c9f-x2, namespace: shop, uid: "0"}}
ports: [{name: web, port: 8443}, {name: other, port: 1}]
"#;

fn till() -> PodKey {
    PodKey {
        namespace: "shop".into(),
        name: "till-5c9f-x2".into(),
        uid: "1".into(),
    }
}

#[test]
fn a_pod_becomes_a_workload() {
    let made = translation(SHOP);
    assert!(made.problems.is_empty(), "{:?}", made.problems);
    let pod = &made.workloads[0];
    assert_eq!(&*pod.uid, "Kubernetes//Pod/shop/till-5c9f-x2");
    assert_eq!(
        pod.identity().to_string(),
        "spiffe://cluster.local/ns/shop/sa/cashier"
    );
    assert_eq!(
        (
            &*pod.workload_name,
            &*pod.canonical_name,
            &*pod.canonical_revision
        ),
        ("till", "till", "v2")
    );
    assert_eq!((&*pod.locality.region, &*pod.locality.zone), ("r", "z"));
    assert_eq!(
        (pod.addresses.len(), pod.health, pod.protocol),
        (2, Health::Healthy, Protocol::Tcp)
    );
    assert_eq!(
        pod.services["shop/till.shop.svc.cluster.local"].ports,
        BTreeMap::from([(80, 8080), (81, 81)]).into()
    );
    assert_eq!(
        pod.services["shop/bank.shop.svc.cluster.local"].ports,
        BTreeMap::from([(443, 443)]).into()
    );
}

#[test]
fn an_enrolled_pod_is_dialled_by_hbone_and_an_earlier_one_of_its_name_is_not() {
    let mesh = MeshConfig::of_node("here");
    let protocol = |key: PodKey| {
        translate(
            &objects(SHOP),
            &Enrolled::from_iter([key]),
            &BTreeSet::new(),
            &mesh,
        )
        .workloads[0]
            .protocol
    };
    assert_eq!(protocol(till()), Protocol::Hbone);
    assert_eq!(
        protocol(PodKey {
            uid: "0".into(),
            ..till()
        }),
        Protocol::Tcp
    );
}

#[test]
fn a_service_is_translated() {
    let made = translation(SHOP);
    let till = made
        .services
        .iter()
        .find(|service| &*service.name == "till")
        .expect("till");
    assert_eq!(till.key(), "shop/till.shop.svc.cluster.local");
    assert_eq!(till.ports, BTreeMap::from([(80, 0), (81, 81), (82, 0)]));
    assert_eq!(
        till.load_balancing.preferences,
        [Scope::Network, Scope::Region, Scope::Zone]
    );
    assert!(!till.load_balancing.strict);
}

#[test]
fn an_endpoint_without_a_pod_is_a_workload_without_identity_of_its_address() {
    let made = translation(SHOP);
    assert_eq!(made.workloads.len(), 2);
    let bare = &made.workloads[1];
    assert_eq!(
        &*bare.uid,
        "Kubernetes/discovery.k8s.io/EndpointSlice/shop/bank-1/192.0.2.1"
    );
    assert!(bare.host_network && bare.policies.is_empty());
    assert_eq!(bare.health, Health::Unhealthy);
    assert_eq!(
        bare.services["shop/bank.shop.svc.cluster.local"].ports,
        BTreeMap::from([(443, 8443)]).into()
    );
}

#[test]
fn an_endpoint_that_is_written_by_hand_for_a_pod_is_that_pod() {
    // Dialled as an address without an identity, it would get traffic in clear.
    let made = translation(&SHOP.replace("192.0.2.1", "10.0.0.1"));
    assert_eq!(made.workloads.len(), 1);
    let till = &made.workloads[0];
    assert!(!till.host_network);
    let bank = "shop/bank.shop.svc.cluster.local";
    assert!(till.services.contains_key(bank), "{:?}", till.services);
}

#[test]
fn the_local_pods_are_those_of_the_node() {
    let made = translation(SHOP);
    let local = &made.local[0];
    assert_eq!(
        local.netns_path.as_deref(),
        Some(std::path::Path::new("/run/netns/till"))
    );
    assert_eq!((local.wanted.clone(), &*local.pod_uid), (Wanted::Yes, "1"));
    let elsewhere = translate(
        &objects(SHOP),
        &Enrolled::default(),
        &BTreeSet::new(),
        &MeshConfig::of_node("there"),
    );
    assert!(elsewhere.local.is_empty());
}

#[test]
fn the_enrolment_rule() {
    let pod = |meta: &str, spec: &str, phase: &str| {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: p, namespace: shop{meta}}}\n\
             spec: {{nodeName: here{spec}}}\nstatus: {{phase: {phase}, podIP: 10.0.0.9}}\n---\n"
        )
    };
    let space = |mode: &str| {
        format!(
            "apiVersion: v1\nkind: Namespace\nmetadata: {{name: shop, labels: {{istio.io/dataplane-mode: {mode}}}}}\n---\n"
        )
    };
    let ambient = ", labels: {istio.io/dataplane-mode: ambient}";
    let key = PodKey {
        namespace: "shop".into(),
        name: "p".into(),
        uid: "".into(),
    };
    for (text, enrolled, wanted) in [
        (pod("", "", "Running"), false, false),
        (space("ambient") + &pod("", "", "Running"), false, true),
        (space("ambient") + &pod("", "", "Pending"), false, true),
        (pod(ambient, "", "Running"), false, true),
        (
            space("ambient") + &pod(", labels: {istio.io/dataplane-mode: none}", "", "Running"),
            false,
            false,
        ),
        (
            space("ambient") + &pod("", ", hostNetwork: true", "Running"),
            false,
            false,
        ),
        (space("ambient") + &pod("", "", "Succeeded"), true, false),
        (space("ambient") + &pod("", "", "Failed"), true, false),
        (
            pod(
                ", annotations: {sidecar.istio.io/status: x}, labels: {istio.io/dataplane-mode: ambient}",
                "",
                "Running",
            ),
            false,
            false,
        ),
        (
            space("ambient") + &pod(", deletionTimestamp: '2026-01-01T00:00:00Z'", "", "Running"),
            false,
            false,
        ),
        (
            space("ambient") + &pod(", deletionTimestamp: '2026-01-01T00:00:00Z'", "", "Running"),
            true,
            true,
        ),
    ] {
        let records = if enrolled {
            Enrolled::from_iter([key.clone()])
        } else {
            Enrolled::default()
        };
        let made = translate(
            &objects(&text),
            &records,
            &BTreeSet::new(),
            &MeshConfig::of_node("here"),
        );
        assert_eq!(made.local[0].wanted == Wanted::Yes, wanted, "{text}");
        assert!(wanted || matches!(&made.local[0].wanted, Wanted::No(why) if !why.is_empty()));
    }
}

#[test]
fn what_is_behind_a_waypoint_says_so_and_is_told() {
    let service = |labels: &str| {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: s, namespace: shop, labels: {labels}}}\nspec: {{clusterIP: None}}\n---\n"
        )
    };
    let space = "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop, labels: {istio.io/use-waypoint: w}}\n---\n";
    let pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: p, namespace: shop}\nspec: {}\nstatus: {podIP: 10.0.0.9}\n";
    let made = translation(
        &(service("{istio.io/use-waypoint: v, istio.io/use-waypoint-namespace: infra}") + pod),
    );
    assert_eq!(
        made.services[0].waypoint.as_deref(),
        Some("infra/v.infra.svc.cluster.local")
    );
    assert!(
        made.problems[0].contains("waypoints are not carried yet"),
        "{:?}",
        made.problems
    );
    let inherited = translation(&(service("{}") + space + pod));
    assert_eq!(
        inherited.services[0].waypoint.as_deref(),
        Some("shop/w.shop.svc.cluster.local")
    );
    assert_eq!(
        inherited.workloads[0].waypoint, None,
        "a waypoint is for services unless it says otherwise"
    );
    let none = translation(&(service("{istio.io/use-waypoint: none}") + space));
    assert_eq!(none.services[0].waypoint, None);
    let gateway = "---\napiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {name: w, namespace: shop, labels: {istio.io/waypoint-for: all}}\nspec: {gatewayClassName: istio-waypoint, listeners: []}\n";
    let all = translation(&(service("{}") + space + pod + gateway));
    assert_eq!(
        all.workloads[0].waypoint.as_deref(),
        Some("shop/w.shop.svc.cluster.local")
    );
}

#[test]
fn two_pods_with_one_address_are_told() {
    let pod = |name: &str| {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}}}\nspec: {{}}\nstatus: {{podIP: 10.0.0.9}}\n---\n"
        )
    };
    let made = translation(&(pod("a") + &pod("b")));
    assert!(made.problems[0].contains("10.0.0.9"), "{:?}", made.problems);
}

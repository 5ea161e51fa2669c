//! Checks how services are reached, and which of their endpoints take connections.

use std::net::SocketAddr;

use super::super::translate::Translation;
use super::{refusal, translation};
use crate::mesh::service::Family;
use crate::mesh::workload::{Health, Workload};
use crate::mesh::{Destination, Mesh};

fn service(name: &str, more: &str, spec: &str, status: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop{more}}}\n\
         spec: {{selector: {{app: till}}, ports: [{{port: 80}}], {spec}}}\n\
         status: {{{status}}}\n---\n"
    )
}

fn pod(name: &str, meta: &str, status: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop{meta}}}\n\
         spec: {{nodeName: here}}\nstatus: {{{status}}}\n---\n"
    )
}

/// Returns who is meant at an address by the pod of this name.
fn meant(made: &Translation, by: &str, to: &str) -> String {
    let mesh = Mesh::of(made.workloads.clone(), made.services.clone(), Vec::new());
    let is = |workload: &&Workload| *workload.name == *by;
    let source = made.workloads.iter().find(is).expect("the pod is there");
    let to: SocketAddr = to.parse().expect("an address");
    match mesh.destination(source, to) {
        Some(Destination::Workload(of)) => format!("pod {}", of.name),
        Some(Destination::Service(of)) => format!("service {}", of.name),
        Some(Destination::External(of)) => format!("outside {}", of.name),
        Some(Destination::Range(of)) => format!("range {}", of.name),
        None => "nobody".into(),
    }
}

#[test]
fn a_service_is_known_by_its_load_balancers_and_external_addresses() {
    let made = translation(
        &(service(
            "s",
            "",
            "type: LoadBalancer, clusterIP: 10.96.0.1, externalIPs: [203.0.113.11]",
            "loadBalancer: {ingress: [{ip: 203.0.113.10, ipMode: VIP}, {hostname: lb.example}]}",
        ) + &pod("p", "", "podIP: 10.0.0.9")),
    );
    assert_eq!(made.problems, [""; 0]);
    for (to, expected) in [
        ("10.96.0.1:80", "service s"),
        ("10.96.0.1:81", "service s"),
        ("203.0.113.10:80", "outside s"),
        ("203.0.113.11:80", "outside s"),
        ("203.0.113.10:81", "nobody"),
        ("203.0.113.12:80", "nobody"),
    ] {
        assert_eq!(meant(&made, "p", to), expected, "{to}");
    }
}

#[test]
fn what_is_said_of_outside_and_cannot_be_done_is_told_and_not_taken() {
    let ingress = "loadBalancer: {ingress: [{ip: 203.0.113.10}]}";
    for (spec, status, field) in [
        (
            "clusterIP: 10.96.0.1",
            "loadBalancer: {ingress: [{ip: 203.0.113.10, ipMode: Proxy}]}",
            "status.loadBalancer.ingress[0].ipMode",
        ),
        (
            "clusterIP: 10.96.0.1, loadBalancerSourceRanges: [192.0.2.0/24]",
            ingress,
            "spec.loadBalancerSourceRanges",
        ),
        (
            "clusterIP: None",
            ingress,
            "spec.externalIPs, status.loadBalancer",
        ),
    ] {
        let made =
            translation(&(service("s", "", spec, status) + &pod("p", "", "podIP: 10.0.0.9")));
        let told = format!("Service shop/s: {field}");
        assert!(made.problems[0].starts_with(&told), "{:?}", made.problems);
        assert_eq!(meant(&made, "p", "203.0.113.10:80"), "nobody", "{field}");
    }
    for (spec, field) in [
        ("sessionAffinity: ClientIP", "spec.sessionAffinity"),
        (
            "trafficDistribution: PreferNear",
            "spec.trafficDistribution: `PreferNear` is not known",
        ),
    ] {
        let made = translation(&service(
            "s",
            "",
            &format!("clusterIP: 10.96.0.1, {spec}"),
            "",
        ));
        assert!(made.problems[0].contains(field), "{:?}", made.problems);
    }
}

#[test]
fn endpoints_that_are_near_are_asked_for_by_the_field_or_by_the_annotation_in_any_letters() {
    let preferences = |annotations: &str, spec: &str| {
        let spec = format!("clusterIP: 10.96.0.1, {spec}");
        let text = service("s", "", &spec, "");
        let text = text.replacen(
            "name: s,",
            &format!("name: s, annotations: {{{annotations}}},"),
            1,
        );
        assert!(text.contains(annotations), "{text}");
        translation(&text).services[0]
            .load_balancing
            .preferences
            .len()
    };
    let annotation = "networking.istio.io/traffic-distribution";
    for (word, count) in [
        ("PreferClose", 3),
        ("PreferSameZone", 3),
        ("PreferSameNode", 5),
    ] {
        let lower = word.to_lowercase();
        assert_eq!(
            preferences("", &format!("trafficDistribution: {word}")),
            count
        );
        assert_eq!(preferences(&format!("{annotation}: {word}"), ""), count);
        assert_eq!(preferences(&format!("{annotation}: {lower}"), ""), count);
    }
    assert_eq!(preferences(&format!("{annotation}: Any"), ""), 0);
}

#[test]
fn an_annotation_of_a_service_that_is_not_known_is_told() {
    let annotated = |word: &str| {
        let text = service("s", "", "clusterIP: 10.96.0.1", "");
        let annotation =
            format!("annotations: {{networking.istio.io/traffic-distribution: {word}}}");
        translation(&text.replacen("name: s,", &format!("name: s, {annotation},"), 1)).problems
    };
    assert_eq!(annotated("preferclose"), [""; 0]);
    let told = "Service shop/s: networking.istio.io/traffic-distribution: `Any` is not known";
    assert!(
        annotated("Any")[0].starts_with(told),
        "{:?}",
        annotated("Any")
    );
}

#[test]
fn a_value_that_a_service_cannot_have_is_refused_with_its_field() {
    for (spec, status, told) in [
        (
            "externalIPs: [127.0.0.1]",
            "",
            "spec.externalIPs[0]: `127.0.0.1` is no address from outside",
        ),
        (
            "externalIPs: [169.254.169.254]",
            "",
            "spec.externalIPs[0]: ",
        ),
        ("externalIPs: ['fe80::1']", "", "spec.externalIPs[0]: "),
        (
            "externalIPs: ['::ffff:127.0.0.1']",
            "",
            "spec.externalIPs[0]: ",
        ),
        ("externalIPs: [203.0.113]", "", "spec.externalIPs[0]: "),
        (
            "",
            "loadBalancer: {ingress: [{ip: 0.0.0.0}]}",
            "status.loadBalancer.ingress[0].ip: ",
        ),
        (
            "trafficDistribution: preferClose",
            "",
            "spec.trafficDistribution: unknown word `preferClose`, did you mean `PreferClose`?",
        ),
        (
            "trafficDistribution: PreferSameNod",
            "",
            "spec.trafficDistribution: unknown word `PreferSameNod`, did you mean `PreferSameNode`?",
        ),
        (
            "internalTrafficPolicy: local",
            "",
            "spec.internalTrafficPolicy: unknown variant `local`",
        ),
        (
            "externalTrafficPolicy: Lokal",
            "",
            "spec.externalTrafficPolicy: unknown variant `Lokal`",
        ),
        (
            "ipFamilies: [IPv5]",
            "",
            "spec.ipFamilies[0]: unknown variant `IPv5`",
        ),
        (
            "clusterIp: 10.96.0.1",
            "",
            "spec.clusterIp: unknown field `clusterIp`, did you mean `clusterIP`?",
        ),
        (
            "externalIP: [203.0.113.1]",
            "",
            "spec.externalIP: unknown field `externalIP`, did you mean `externalIPs`?",
        ),
    ] {
        let said = refusal(&service("s", "", spec, status));
        assert!(said.contains(told), "{said}\nis not\n{told}");
    }
}

#[test]
fn a_service_that_claims_what_is_anothers_does_not_get_it_and_both_are_told() {
    let old = "creationTimestamp: '2026-01-01T00:00:00Z'";
    let claims = |spec: &str| {
        let spec = format!("clusterIP: 10.96.0.66, {spec}");
        service("a-thief", &format!(", {old}"), &spec, "")
    };
    let rest = pod("victim", "", "podIP: 10.0.0.9")
        + &service(
            "own",
            "",
            "clusterIP: 10.96.0.1",
            "loadBalancer: {ingress: [{ip: 203.0.113.10}]}",
        );
    for (spec, to, expected) in [
        ("externalIPs: [10.0.0.9]", "10.0.0.9:80", "pod victim"),
        ("externalIPs: [10.96.0.1]", "10.96.0.1:80", "service own"),
        (
            "externalIPs: [203.0.113.10]",
            "203.0.113.10:80",
            "outside own",
        ),
        (
            "clusterIPs: [10.96.0.66, 10.0.0.9]",
            "10.0.0.9:80",
            "pod victim",
        ),
    ] {
        let made = translation(&(claims(spec) + &rest));
        assert_eq!(meant(&made, "victim", to), expected, "{spec}");
        let [told] = made.problems.as_slice() else {
            panic!("{spec}: {:?}", made.problems);
        };
        let named = expected.split(' ').next_back().expect("a name");
        assert!(
            told.contains("shop/a-thief.shop") && told.contains(named),
            "{told}"
        );
    }
    // If two services have the same address, the older one gets it.
    let young = ", creationTimestamp: '2026-02-01T00:00:00Z'";
    let made = translation(
        &(service("a-young", young, "clusterIP: 10.96.0.9", "")
            + &service("old", &format!(", {old}"), "clusterIP: 10.96.0.9", "")
            + &pod("p", "", "podIP: 10.0.0.9")),
    );
    assert_eq!(meant(&made, "p", "10.96.0.9:80"), "service old");
    let told = made.problems.concat();
    assert!(
        told.contains("shop/old.") && told.contains("shop/a-young."),
        "{told}"
    );
}

#[test]
fn a_pod_that_terminates_and_serves_is_an_endpoint_still() {
    let health = |meta: &str, status: &str| {
        let text = service("s", "", "clusterIP: 10.96.0.1", "")
            + &pod("p", &format!(", labels: {{app: till}}{meta}"), status);
        let made = translation(&text);
        let pod = &made.workloads[0];
        let of = &pod.services["shop/s.shop.svc.cluster.local"];
        assert_eq!(of.health, pod.health);
        of.health
    };
    let ends = ", deletionTimestamp: '2026-01-01T00:00:00Z'";
    let ready =
        |is: &str| format!("podIP: 10.0.0.9, conditions: [{{type: Ready, status: '{is}'}}]");
    assert_eq!(health("", &ready("True")), Health::Healthy);
    assert_eq!(health("", &ready("False")), Health::Unhealthy);
    assert_eq!(health(ends, &ready("True")), Health::Terminating);
    assert_eq!(health(ends, &ready("False")), Health::Unhealthy);
    assert_eq!(health(ends, "podIP: 10.0.0.9"), Health::Terminating);
}

#[test]
fn an_endpoints_conditions_say_whether_it_takes_load() {
    let slice = |endpoint: &str| {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: bank, namespace: shop}}\nspec: {{clusterIP: 10.96.0.2, ports: [{{port: 443}}]}}\n---\n\
             apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: b, namespace: shop, labels: {{kubernetes.io/service-name: bank}}}}\n\
             addressType: IPv4\nendpoints: [{{{endpoint}}}]\nports: [{{port: 8443}}]\n"
        )
    };
    let key = "shop/bank.shop.svc.cluster.local";
    for (conditions, expected) in [
        ("", Health::Healthy),
        ("ready: true", Health::Healthy),
        ("ready: false", Health::Unhealthy),
        ("ready: false, serving: true", Health::Unhealthy),
        (
            "ready: false, serving: true, terminating: true",
            Health::Terminating,
        ),
        (
            "ready: false, serving: false, terminating: true",
            Health::Unhealthy,
        ),
        ("ready: false, terminating: true", Health::Unhealthy),
        ("terminating: true", Health::Terminating),
        // Kubernetes writes this with publishNotReadyAddresses.
        ("ready: true, terminating: true", Health::Healthy),
    ] {
        let bare = format!("addresses: [192.0.2.1], conditions: {{{conditions}}}");
        let made = translation(&slice(&bare));
        assert_eq!(
            made.workloads[0].services[key].health, expected,
            "{conditions}"
        );
        // An endpoint that names a pod, or has its address, is no better than the pod.
        for how in [
            "addresses: [10.0.0.9]",
            "addresses: ['::ffff:10.0.0.9']",
            "addresses: [], targetRef: {kind: Pod, name: p}",
        ] {
            for (is, pods) in [("True", Health::Healthy), ("False", Health::Unhealthy)] {
                let pod = pod(
                    "p",
                    "",
                    &format!("podIP: 10.0.0.9, conditions: [{{type: Ready, status: '{is}'}}]"),
                );
                let endpoint = format!("{how}, conditions: {{{conditions}}}");
                let made = translation(&(pod + &slice(&endpoint)));
                let found = made.workloads[0].services[key].health;
                assert_eq!(found, expected.min(pods), "{how} {conditions}");
            }
        }
    }
}

#[test]
fn the_network_is_the_pods_label_or_its_nodes_or_the_meshs() {
    let node = "apiVersion: v1\nkind: Node\nmetadata: {name: here, labels: {topology.istio.io/network: nodes}}\n---\n";
    let mesh = "apiVersion: v1\nkind: Namespace\nmetadata: {name: istio-system, labels: {topology.istio.io/network: meshs}}\n---\n";
    let own = pod(
        "p",
        ", labels: {topology.istio.io/network: own}",
        "podIP: 10.0.0.9",
    );
    let none = pod("p", "", "podIP: 10.0.0.9");
    let of = |parts: &[&str]| {
        let text = parts.concat() + &service("s", "", "clusterIP: 10.96.0.1", "");
        let made = translation(&text);
        assert_eq!(
            meant(&made, "p", "10.96.0.1:80"),
            "service s",
            "in every network"
        );
        made.workloads[0].network.to_string()
    };
    assert_eq!(of(&[node, mesh, &own]), "own");
    assert_eq!(of(&[node, mesh, &none]), "nodes");
    assert_eq!(of(&[mesh, &none]), "meshs");
    assert_eq!(of(&[&none]), "");
}

#[test]
fn a_service_of_one_family_says_so() {
    let family = |families: &str| {
        let spec = format!("clusterIP: 10.96.0.1, ipFamilies: [{families}]");
        translation(&service("s", "", &spec, "")).services[0].family
    };
    assert_eq!(family("IPv4"), Some(Family::V4));
    assert_eq!(family("IPv6"), Some(Family::V6));
    assert_eq!(family("IPv4, IPv6"), None);
    assert_eq!(family(""), None);
}

#[test]
fn a_slip_of_the_pen_is_refused_and_other_fields_are_passed_over() {
    let pod = |spec: &str| {
        format!("apiVersion: v1\nkind: Pod\nmetadata: {{name: p}}\nspec: {{{spec}}}\n")
    };
    for (text, told) in [
        (pod("serviceaccountName: web"), "spec.serviceaccountName: unknown field `serviceaccountName`, did you mean `serviceAccountName`?"),
        (pod("serviceAcountName: web"), "did you mean `serviceAccountName`?"),
        (pod("hostNetwrok: true"), "did you mean `hostNetwork`?"),
        (pod("nodename: here"), "did you mean `nodeName`?"),
        (pod("containers: [{ports: [{containerPort: 80, protocol: tcp}]}]"), "spec.containers[0].ports[0].protocol: unknown variant `tcp`"),
        (service("s", "", "clusterIP: 10.96.0.1", "").replace("{port: 80}", "{port: 80, protocol: tcp}"), "spec.ports[0].protocol: unknown variant `tcp`, did you mean `TCP`?"),
        ("apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: b}\nports: [{port: 1, protocol: Tcp}]\n".into(), "ports[0].protocol: unknown variant `Tcp`"),
        ("apiVersion: v1\nkind: Pod\nmetadata: {name: p, lables: {a: b}}\nspec: {}\n".into(), "metadata.lables: unknown field `lables`, did you mean `labels`?"),
        ("apiVersion: v1\nKind: Pod\nmetadata: {name: p}\nspec: {}\n".into(), "did you mean `kind`?"),
    ] {
        let said = refusal(&text);
        assert!(said.contains(told), "{said}\nis not\n{told}");
    }
    // These are fields that Kubernetes prints as well.
    let all = "schedulerName: s, hostname: h, hostPID: true, hostIPC: false, hostUsers: true, nodeSelector: {}, restartPolicy: Always, \
               serviceAccount: web, dnsPolicy: ClusterFirst, ephemeralContainers: [], \
               containers: [{name: c, image: i, ports: [{containerPort: 80, hostPort: 80, hostIP: 10.0.0.1}]}]";
    assert_eq!(refusal_of(&pod(all)), None);
    let all = "clusterIP: 10.96.0.1, ipFamilyPolicy: SingleStack, externalName: x, loadBalancerIP: 10.0.0.1, loadBalancerClass: c, \
               sessionAffinityConfig: {}, healthCheckNodePort: 1, allocateLoadBalancerNodePorts: true, externalTrafficPolicy: Local, \
               internalTrafficPolicy: Cluster, sessionAffinity: None, type: LoadBalancer";
    assert_eq!(refusal_of(&service("s", "", all, "")), None);
    let made = translation(&service("s", "", all, ""));
    assert_eq!(made.problems, [""; 0]);
}

fn refusal_of(text: &str) -> Option<String> {
    let parsed = super::object::parse(std::path::Path::new("test.yaml"), text);
    parsed.err().map(|error| error.to_string())
}

#[test]
fn the_older_name_of_the_service_account_counts_and_an_address_given_twice_is_one() {
    let made = translation(
        "apiVersion: v1\nkind: Pod\nmetadata: {name: p}\nspec: {nodeName: here, serviceAccount: web}\n\
         status: {podIPs: [{ip: 10.0.0.9}, {ip: 10.0.0.9}]}\n",
    );
    assert_eq!(&*made.workloads[0].service_account, "web");
    assert_eq!(made.workloads[0].addresses.len(), 1);
    assert_eq!(made.problems, [""; 0]);
}

#[test]
fn a_mode_that_is_not_known_is_told() {
    let made = translation(
        "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop, labels: {istio.io/dataplane-mode: mesh}}\n",
    );
    assert_eq!(
        made.problems,
        [
            "Namespace shop: label istio.io/dataplane-mode: `mesh` is not known; ambient and none are"
        ]
    );
}

//! Look-ups of addresses in networks, compared with a slow and obvious implementation.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::super::policy::{Action, Rule};
use super::super::service::tests::service;
use super::super::service::{Age, NetworkAddress};
use super::super::workload::tests::workload;
use super::super::workload::{Endpoint, Services};
use ipnet::IpNet;

use super::*;

fn ip(last: u8) -> IpAddr {
    IpAddr::from([10, 0, 0, last])
}

fn age(order: u64) -> Age {
    Age::new(time::OffsetDateTime::UNIX_EPOCH, order)
}

fn in_network(network: &str, address: IpAddr) -> NetworkAddress {
    NetworkAddress {
        network: network.into(),
        address,
    }
}

#[test]
fn of_two_with_one_key_the_later_one_holds_in_every_index() {
    let at = |last| Workload {
        addresses: vec![ip(last)],
        ..workload(&[])
    };
    let mesh = Mesh::of(vec![at(1), at(2)], Vec::new(), Vec::new());
    assert_eq!(mesh.workloads().count(), 1);
    assert!(mesh.workload_at("", ip(1)).is_none());
    assert!(mesh.workload_at("", ip(2)).is_some());
}

#[test]
fn an_address_is_found_as_ipv4_and_mapped_and_not_on_the_nodes_network() {
    let mesh = |host_network| {
        let one = Workload {
            host_network,
            ..workload(&[])
        };
        Mesh::of(vec![one], Vec::new(), Vec::new())
    };
    for address in ["10.0.0.1", "::ffff:10.0.0.1"] {
        let address = address.parse().expect("an address");
        assert!(mesh(false).workload_at("", address).is_some());
        assert!(mesh(true).workload_at("", address).is_none());
    }
}

#[test]
fn of_services_at_one_address_a_clients_own_holds_and_then_the_canonical_and_the_oldest() {
    let at = |name: &str, namespace: &str, order| Service {
        namespace: namespace.into(),
        vips: vec![in_network("", ip(9))],
        age: age(order),
        ..service(name)
    };
    let found = |services: Vec<Service>| {
        let mesh = Mesh::of(Vec::new(), services, Vec::new());
        match mesh.destination(&workload(&[]), SocketAddr::new(ip(9), 80)) {
            Some(Destination::Service(service)) => service.name.to_string(),
            other => panic!("{other:?}"),
        }
    };
    let canonical = Service {
        canonical: true,
        ..at("canonical", "other", 2)
    };
    let private = Service {
        private: true,
        canonical: true,
        ..at("private", "other", 0)
    };
    let (old, young) = (at("old", "other", 1), at("a-young", "other", 3));
    assert_eq!(found(vec![young, old.clone()]), "old");
    assert_eq!(found(vec![private.clone(), old.clone()]), "old");
    assert_eq!(found(vec![old.clone(), canonical.clone()]), "canonical");
    let own = at("own", "ns", 4);
    assert_eq!(found(vec![old, canonical, own]), "own");
    assert_eq!(found(vec![private]), "private", "to be refused");
}

#[test]
fn a_load_balancers_address_is_its_services_before_that_of_one_that_claims_it() {
    let balanced = Service {
        balanced: vec![in_network("", ip(9))],
        age: age(2),
        ..service("balanced")
    };
    let claims = |order, ports: &[u16]| Service {
        external: vec![in_network("", ip(9))],
        ports: ports.iter().map(|port| (*port, *port)).collect(),
        age: age(order),
        ..service("claims")
    };
    let mesh = Mesh::of(Vec::new(), vec![claims(1, &[80, 81]), balanced], Vec::new());
    let found = |port| match mesh.destination(&workload(&[]), SocketAddr::new(ip(9), port)) {
        Some(Destination::External(service)) => Some(service.name.to_string()),
        Some(other) => panic!("{other:?}"),
        None => None,
    };
    assert_eq!(found(80).as_deref(), Some("balanced"));
    assert_eq!(found(81).as_deref(), Some("claims"));
    assert_eq!(found(22), None, "the address is not a service's alone");
}

/// A network, one of two, and the last octet of an address.
type Place = (String, u8);

fn place() -> impl Strategy<Value = Place> {
    ("[ab]", 1..5_u8)
}

prop_compose! {
    fn some_service()(
        vips in prop::collection::vec(place(), 0..3),
        balanced in prop::collection::vec(place(), 0..2),
        external in prop::collection::vec(place(), 0..2),
        port in 80..82_u16,
        namespace in "[no]s",
        private: bool,
        order in 0..3_u64,
    ) -> Service {
        let all = |places: Vec<Place>| {
            let one = |(network, last): Place| in_network(&network, ip(last));
            places.into_iter().map(one).collect()
        };
        Service {
            namespace: namespace.into(),
            vips: all(vips),
            balanced: all(balanced),
            external: all(external),
            ports: BTreeMap::from([(port, 8080)]),
            private,
            age: age(order),
            ..service("")
        }
    }
}

proptest! {
    #[test]
    fn an_address_means_what_a_look_at_everything_finds(
        pods in prop::collection::vec((place(), any::<bool>()), 0..4),
        services in prop::collection::vec(some_service(), 0..5),
        (network, last) in place(),
        port in 80..83_u16,
    ) {
        let pods: Vec<Workload> = (0..)
            .zip(pods)
            .map(|(number, ((network, last), host_network))| Workload {
                uid: format!("c//Pod/ns/{number}").into(),
                network: network.into(),
                addresses: vec![ip(last)],
                host_network,
                ..workload(&[])
            })
            .collect();
        let services: Vec<Service> = (0..)
            .zip(services)
            .map(|(number, service)| Service {
                hostname: format!("{number}").into(),
                ..service
            })
            .collect();
        let source = Workload { network: network.as_str().into(), ..workload(&[]) };
        let mesh = Mesh::of(pods.clone(), services.clone(), Vec::new());
        let found = match mesh.destination(&source, SocketAddr::new(ip(last), port)) {
            Some(Destination::Workload(of)) => format!("workload {}", of.uid),
            Some(Destination::Service(of)) => format!("service {}", of.hostname),
            Some(Destination::External(of)) => format!("external {}", of.hostname),
            Some(Destination::Range(_)) => unreachable!("there is none"),
            None => "nobody".into(),
        };

        let here = |at: &NetworkAddress| *at.network == *network && at.address == ip(last);
        let mut sorted = services;
        sorted.sort_by_key(|one| (one.age, one.key()));
        let pod = pods.iter().find(|pod| {
            !pod.host_network && *pod.network == *network && pod.addresses == [ip(last)]
        });
        let own: Vec<&Service> = sorted.iter().filter(|one| one.vips.iter().any(here)).collect();
        let own = own
            .iter()
            .find(|one| *one.namespace == *"ns")
            .or_else(|| own.iter().find(|one| !one.private))
            .or_else(|| own.first());
        let has = |one: &&Service, at: &[NetworkAddress]| {
            at.iter().any(here) && one.ports.contains_key(&port)
        };
        let outside = sorted
            .iter()
            .find(|one| has(one, &one.balanced))
            .or_else(|| sorted.iter().find(|one| has(one, &one.external)));
        let expected = match (pod, own, outside) {
            (Some(pod), ..) => format!("workload {}", pod.uid),
            (None, Some(own), _) => format!("service {}", own.hostname),
            (None, None, Some(outside)) => format!("external {}", outside.hostname),
            (None, None, None) => "nobody".into(),
        };
        prop_assert_eq!(found, expected);
    }
}

#[test]
fn of_ranges_that_have_an_address_the_narrowest_is_meant() {
    let has = |name: &str, ranges: &[&str]| Service {
        cidrs: ranges
            .iter()
            .map(|range| ("".into(), range.parse().expect("a range")))
            .collect(),
        ..service(name)
    };
    let wide = has("wide", &["10.0.0.0/8", "::/0"]);
    let narrow = has("narrow", &["10.1.2.3/16"]);
    let mesh = Mesh::of(Vec::new(), vec![wide, narrow], Vec::new());
    let found = |address: &str| {
        let to = SocketAddr::new(address.parse().expect("an address"), 80);
        match mesh.destination(&workload(&[]), to) {
            Some(Destination::Range(service)) => service.name.to_string(),
            other => format!("{other:?}"),
        }
    };
    assert_eq!(found("10.1.200.1"), "narrow");
    assert_eq!(found("10.2.0.1"), "wide");
    assert_eq!(found("fd00::1"), "wide");
    assert_eq!(found("11.0.0.1"), "None");
}

fn policy(name: &str, namespace: &str, scope: PolicyScope, action: Action) -> Policy {
    Policy {
        name: name.into(),
        namespace: namespace.into(),
        scope,
        action,
        rules: vec![Rule::default()],
        dry_run: false,
    }
}

/// A change of one of a few objects.
fn change() -> impl Strategy<Value = Delta> {
    let networks = || "[ab]";
    let workload = (
        0..4_u8,
        prop::option::of((
            place(),
            any::<bool>(),
            0..2_u8,
            prop::option::of("[ab]"),
            "[no]s",
        )),
    )
        .prop_map(|(number, is)| {
            let uid: Arc<str> = format!("c//Pod/ns/{number}").into();
            let is = is.map(
                |((network, last), hbone, policy, serves, namespace)| Workload {
                    uid: Arc::clone(&uid),
                    network: network.into(),
                    namespace: namespace.into(),
                    addresses: vec![ip(last)],
                    protocol: if hbone {
                        Protocol::Hbone
                    } else {
                        Protocol::Tcp
                    },
                    policies: [format!("ns/{policy}").into()].into(),
                    services: serves
                        .map(|name| (format!("ns/{name}").into(), Endpoint::default()))
                        .into_iter()
                        .collect::<Services>()
                        .into(),
                    ..workload(&[])
                },
            );
            Delta {
                workloads: [(uid, is)].into(),
                ..Delta::default()
            }
        });
    let service = (
        "[ab]",
        prop::option::of((some_service(), networks(), 14..32_u8)),
    )
        .prop_map(|(name, is)| {
            let is = is.map(|(service, network, length)| Service {
                namespace: "ns".into(),
                hostname: name.as_str().into(),
                cidrs: vec![(network.into(), IpNet::new(ip(1), length).expect("a length"))],
                ..service
            });
            Delta {
                services: [(format!("ns/{name}").into(), is)].into(),
                ..Delta::default()
            }
        });
    let scope = prop_oneof![
        Just(PolicyScope::Global),
        Just(PolicyScope::Namespace),
        Just(PolicyScope::WorkloadSelector)
    ];
    let action = prop_oneof![Just(Action::Allow), Just(Action::Deny)];
    let policy = (0..3_u8, "[no]s", prop::option::of((scope, action))).prop_map(
        |(number, namespace, is)| {
            let name = number.to_string();
            let is = is.map(|(scope, action)| policy(&name, &namespace, scope, action));
            Delta {
                policies: [(format!("{namespace}/{name}").into(), is)].into(),
                ..Delta::default()
            }
        },
    );
    prop_oneof![workload, service, policy]
}

/// Returns the results of all look-ups.
fn everything(mesh: &Mesh) -> Vec<String> {
    let mut all = Vec::new();
    for network in ["a", "b"] {
        for last in 1..6 {
            for (port, namespace) in [(80, "ns"), (81, "os"), (82, "ns")] {
                let source = Workload {
                    network: network.into(),
                    namespace: namespace.into(),
                    ..workload(&[])
                };
                let to = SocketAddr::new(ip(last), port);
                all.push(format!("{to} {:?}", mesh.destination(&source, to)));
            }
        }
        all.push(format!(
            "{:?}",
            mesh.destination(&workload(&[]), SocketAddr::new(ip(200), 80))
        ));
    }
    all.extend(
        mesh.workloads()
            .map(|of| format!("{of:?} {:?}", said(mesh, of))),
    );
    for (key, service) in mesh.services() {
        let endpoints = mesh
            .endpoints(service)
            .into_iter()
            .flat_map(Endpoints::iter);
        let uids: Vec<_> = endpoints.map(|of| &of.uid).collect();
        all.push(format!("{key} {service:?} {uids:?}"));
    }
    all.extend(
        mesh.policies()
            .map(|(key, policy)| format!("{key} {policy:?}")),
    );
    all
}

/// Returns the policies of a workload as text.
fn said(mesh: &Mesh, workload: &Workload) -> String {
    let Applicable { policies, unknown } = mesh.policies_of(workload);
    format!("{policies:?} {unknown:?}")
}

proptest! {
    /// A mesh after many changes gives the same answers as one that was made at once. And as long as
    /// `policy_since` of a workload does not change, its policies do not either.
    #[test]
    fn a_changed_mesh_is_the_mesh_that_it_was_changed_to(
        changes in prop::collection::vec(change(), 1..30),
    ) {
        let mut mesh = Mesh::default();
        let mut whole = Delta::default();
        for change in changes {
            let before = mesh.clone();
            let before_it = everything(&before);
            mesh.apply(change.clone());
            whole.workloads.extend(change.workloads);
            whole.services.extend(change.services);
            whole.policies.extend(change.policies);
            let mut at_once = Mesh::default();
            at_once.apply(whole.clone());
            prop_assert_eq!(everything(&mesh), everything(&at_once));
            prop_assert_eq!(everything(&before), before_it, "a snapshot stays what it is");
            for workload in mesh.workloads() {
                let since = mesh.policy_since(&workload.uid);
                if since == before.policy_since(&workload.uid) {
                    let old = before.workload(&workload.uid).map(|old| said(&before, old));
                    prop_assert_eq!(Some(said(&mesh, workload)), old);
                } else {
                    prop_assert_eq!(since, Some(mesh.generation()));
                }
            }
            // Removed objects leave nothing behind, and the change from one mesh to another leads to it.
            let delta = Delta::default().from(&mesh);
            let mut nothing = mesh.clone();
            nothing.apply(delta);
            prop_assert!(nothing.endpoints.is_empty() && nothing.by_namespace.is_empty());
            prop_assert_eq!(everything(&nothing), everything(&Mesh::default()));
            let there = |all: &Delta| Delta {
                workloads: all.workloads.clone().into_iter().filter(|(_, is)| is.is_some()).collect(),
                services: all.services.clone().into_iter().filter(|(_, is)| is.is_some()).collect(),
                policies: all.policies.clone().into_iter().filter(|(_, is)| is.is_some()).collect(),
            };
            let to_before = there(&whole).from(&before);
            let mut again = before.clone();
            again.apply(to_before);
            prop_assert_eq!(everything(&again), everything(&mesh));
            prop_assert!(there(&whole).from(&mesh).is_empty());
        }
    }
}

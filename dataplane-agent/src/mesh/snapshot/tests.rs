//! What an address means, in whose network, against a slow and obvious way to find it.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::super::service::{LoadBalancing, NetworkAddress};
use super::super::workload::tests::workload;
use super::*;

fn ip(last: u8) -> IpAddr {
    IpAddr::from([10, 0, 0, last])
}

fn service(name: &str) -> Service {
    Service {
        name: name.into(),
        namespace: "ns".into(),
        hostname: format!("{name}.ns.svc.cluster.local").into(),
        vips: Vec::new(),
        balanced: Vec::new(),
        external: Vec::new(),
        cidrs: Vec::new(),
        ports: BTreeMap::from([(80, 8080)]),
        subject_alt_names: Vec::new(),
        waypoint: None,
        publish_not_ready: false,
        family: None,
        private: false,
        canonical: false,
        seniority: 0,
        unsupported: None,
        load_balancing: LoadBalancing::default(),
    }
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
    let mesh = Mesh::build(1, vec![at(1), at(2)], Vec::new(), Vec::new());
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
        Mesh::build(1, vec![one], Vec::new(), Vec::new())
    };
    for address in ["10.0.0.1", "::ffff:10.0.0.1"] {
        let address = address.parse().expect("an address");
        assert!(mesh(false).workload_at("", address).is_some());
        assert!(mesh(true).workload_at("", address).is_none());
    }
}

#[test]
fn of_services_at_one_address_a_clients_own_holds_and_then_the_canonical_and_the_oldest() {
    let at = |name: &str, namespace: &str, seniority| Service {
        namespace: namespace.into(),
        vips: vec![in_network("", ip(9))],
        seniority,
        ..service(name)
    };
    let found = |services: Vec<Service>| {
        let mesh = Mesh::build(1, Vec::new(), services, Vec::new());
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
        seniority: 2,
        ..service("balanced")
    };
    let claims = |seniority, ports: &[u16]| Service {
        external: vec![in_network("", ip(9))],
        ports: ports.iter().map(|port| (*port, *port)).collect(),
        seniority,
        ..service("claims")
    };
    let mesh = Mesh::build(
        1,
        Vec::new(),
        vec![claims(1, &[80, 81]), balanced],
        Vec::new(),
    );
    let found = |port| match mesh.destination(&workload(&[]), SocketAddr::new(ip(9), port)) {
        Some(Destination::External(service)) => Some(service.name.to_string()),
        Some(other) => panic!("{other:?}"),
        None => None,
    };
    assert_eq!(found(80).as_deref(), Some("balanced"));
    assert_eq!(found(81).as_deref(), Some("claims"));
    assert_eq!(found(22), None, "the address is not a service's alone");
}

/// What may be at an address in one of two networks.
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
        seniority in 0..3_usize,
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
            seniority,
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
        let mesh = Mesh::build(1, pods.clone(), services.clone(), Vec::new());
        let found = match mesh.destination(&source, SocketAddr::new(ip(last), port)) {
            Some(Destination::Workload(of)) => format!("workload {}", of.uid),
            Some(Destination::Service(of)) => format!("service {}", of.hostname),
            Some(Destination::External(of)) => format!("external {}", of.hostname),
            Some(Destination::Range(_)) => unreachable!("there is none"),
            None => "nobody".into(),
        };

        let here = |at: &NetworkAddress| *at.network == *network && at.address == ip(last);
        let mut sorted = services;
        sorted.sort_by_key(|one| (one.seniority, one.key()));
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

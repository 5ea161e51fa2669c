//! Connections go to the right hop, and never to an endpoint that must not have them.

use std::collections::{BTreeMap, BTreeSet};

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::mesh::service::{self, Family, LoadBalancing, NetworkAddress, Scope};
use crate::mesh::workload::tests::workload;
use crate::mesh::workload::{Endpoint, Health, Services};
use crate::mesh::{Delta, store};
use crate::proxy::accept::LocalPod;

const KEY: &str = "ns/svc.ns.svc.cluster.local";

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

fn at(text: &str) -> SocketAddr {
    text.parse().expect("an address and port")
}

fn endpoint(name: &str, address: &str) -> Workload {
    Workload {
        uid: format!("c//Pod/ns/{name}").into(),
        name: name.into(),
        addresses: vec![ip(address)],
        services: serves(8080, Health::Healthy),
        ..workload(&[])
    }
}

/// Returns the services of an endpoint of the service, at a port.
fn serves(port: u16, health: Health) -> Arc<Services> {
    let ports = BTreeMap::from([(80, port)]).into();
    BTreeMap::from([(KEY.into(), Endpoint { ports, health })]).into()
}

/// Returns addresses in the network without a name.
fn here(addresses: &[&str]) -> Vec<NetworkAddress> {
    let one = |text: &&str| NetworkAddress {
        network: "".into(),
        address: ip(text),
    };
    addresses.iter().map(one).collect()
}

fn service() -> Service {
    Service {
        vips: here(&["10.96.0.1"]),
        ..service::tests::service("svc")
    }
}

fn accepted(direction: Direction, to: &str) -> Accepted<()> {
    let pod = workload(&[]);
    Accepted {
        io: (),
        pod: LocalPod::example(&pod.uid, pod.identity(), pod.addresses.clone()),
        peer: at("10.0.0.9:4000"),
        destination: at(to),
        direction,
    }
}

fn go(
    workloads: Vec<Workload>,
    services: Vec<Service>,
    direction: Direction,
    to: &str,
) -> Result<Hop, ResolveError> {
    let (writer, reader) = store();
    writer.replace(Delta::of(workloads, services, Vec::new()));
    let resolved = resolve(&reader, accepted(direction, to));
    resolved
        .map(|resolved| resolved.hop)
        .map_err(|(_, error)| error)
}

#[test]
fn outbound_goes_to_a_workload_by_the_way_it_speaks() {
    let plain = Workload {
        protocol: Protocol::Tcp,
        ..endpoint("plain", "10.0.0.3")
    };
    let all = || vec![workload(&[]), endpoint("one", "10.0.0.2"), plain.clone()];
    let out = |to| go(all(), vec![service()], Direction::Outbound, to);
    assert_eq!(out("10.0.0.3:99"), Ok(Hop::Plain(at("10.0.0.3:99"))));
    assert_eq!(out("192.0.2.1:443"), Ok(Hop::Plain(at("192.0.2.1:443"))));
    match out("10.0.0.2:99") {
        Ok(Hop::Hbone {
            to,
            authority,
            expected,
            ..
        }) => {
            assert_eq!((to, authority), (at("10.0.0.2:15008"), at("10.0.0.2:99")));
            assert_eq!(expected, [Identity::new("td", "ns", "sa")]);
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_service_without_anybody_or_without_that_port_is_an_error_and_not_a_way_through() {
    let out = |workloads, to| go(workloads, vec![service()], Direction::Outbound, to);
    let none = |to| Err(ResolveError::NoHealthyUpstream(at(to)));
    assert_eq!(
        out(vec![workload(&[])], "10.96.0.1:80"),
        none("10.96.0.1:80")
    );
    let ill = Workload {
        services: serves(8080, Health::Unhealthy),
        ..endpoint("ill", "10.0.0.2")
    };
    assert_eq!(
        out(vec![workload(&[]), ill], "10.96.0.1:80"),
        none("10.96.0.1:80")
    );
    let well = endpoint("well", "10.0.0.2");
    assert_eq!(
        out(vec![workload(&[]), well], "10.96.0.1:81"),
        none("10.96.0.1:81")
    );
}

#[test]
fn what_has_a_waypoint_is_not_reached_past_it() {
    let waypoint: Option<Arc<str>> = Some("ns/waypoint".into());
    let behind = Workload {
        waypoint: waypoint.clone(),
        ..endpoint("one", "10.0.0.2")
    };
    let service = Service {
        waypoint,
        ..service()
    };
    for to in ["10.0.0.2:80", "10.96.0.1:80"] {
        let all = vec![workload(&[]), behind.clone()];
        let error = go(all, vec![service.clone()], Direction::Outbound, to);
        assert_eq!(
            error,
            Err(ResolveError::UnknownWaypoint("ns/waypoint".into())),
            "{to}"
        );
    }
}

#[test]
fn inbound_goes_to_the_pod_itself_and_nowhere_else() {
    let hbone = || Direction::InboundHbone {
        at: [10, 0, 0, 1].into(),
        identity: Identity::new("td", "ns", "other"),
        service: None,
    };
    for direction in [Direction::InboundPlain, hbone()] {
        let to = |to| go(vec![workload(&[])], Vec::new(), direction.clone(), to);
        assert_eq!(to("10.0.0.1:80"), Ok(Hop::App(at("10.0.0.1:80"))));
        for other in [
            "10.0.0.2:80",
            "127.0.0.1:80",
            "[::1]:80",
            "0.0.0.0:80",
            "10.96.0.1:80",
        ] {
            let refused = matches!(to(other), Err(ResolveError::IpMismatch { .. }));
            assert!(refused, "{other}");
        }
        for own in ["10.0.0.1:15001", "10.0.0.1:15006", "10.0.0.1:15008"] {
            assert_eq!(to(own), Err(ResolveError::SelfCall), "{own}");
        }
    }
}

#[test]
fn a_tunnel_reaches_the_address_that_it_came_to_and_no_other_of_the_pods() {
    let pod = Workload {
        addresses: vec![ip("10.0.0.1"), ip("fd00::1")],
        ..workload(&[])
    };
    let (writer, reader) = store();
    writer.replace(Delta::of(vec![pod.clone()], Vec::new(), Vec::new()));
    let go = |direction, to: &str| {
        let accepted = accepted(direction, to);
        accepted.pod.set_addresses(pod.addresses.clone().into());
        let found = resolve(&reader, accepted);
        found.map(|found| found.hop).map_err(|(_, error)| error)
    };
    for (own, other) in [("10.0.0.1", "fd00::1"), ("fd00::1", "10.0.0.1")] {
        let to = SocketAddr::new(ip(own), 80).to_string();
        let came_to = |at| Direction::InboundHbone {
            at: ip(at),
            identity: Identity::new("td", "ns", "other"),
            service: None,
        };
        assert_eq!(go(came_to(own), &to), Ok(Hop::App(at(&to))));
        let (pod, asked) = (ip(other), ip(own));
        let refused = Err(ResolveError::IpMismatch { pod, asked });
        assert_eq!(go(came_to(other), &to), refused);
        // A connection in clear has no other address that could differ.
        assert_eq!(go(Direction::InboundPlain, &to), Ok(Hop::App(at(&to))));
    }
}

#[test]
fn the_agents_ports_in_a_pod_are_not_its_apps_wherever_its_listeners_are() {
    let (writer, reader) = store();
    writer.replace(Delta::of(vec![workload(&[])], Vec::new(), Vec::new()));
    let hbone = Direction::InboundHbone {
        at: ip("10.0.0.1"),
        identity: Identity::new("td", "ns", "other"),
        service: None,
    };
    for direction in [Direction::InboundPlain, hbone] {
        let to = |port| {
            let mut accepted = accepted(direction.clone(), &format!("10.0.0.1:{port}"));
            let pod = Arc::get_mut(&mut accepted.pod).expect("nobody else has it");
            pod.ports = [40001, 40002, 40003];
            let found = resolve(&reader, accepted);
            found.map(|found| found.hop).map_err(|(_, error)| error)
        };
        for port in [15001, 15006, 15008, 40001, 40002, 40003] {
            assert_eq!(to(port), Err(ResolveError::SelfCall), "{port}");
        }
        assert_eq!(to(40004), Ok(Hop::App(at("10.0.0.1:40004"))));
    }
}

#[test]
fn the_service_that_a_peer_asked_for_is_told_if_the_pod_serves_it() {
    let named = |name: &str| Service {
        name: name.into(),
        hostname: format!("{name}.ns.svc.cluster.local").into(),
        vips: Vec::new(),
        ..service()
    };
    // `one` has the target port of the service, `two` has its own.
    let serves = |name: &str, own: &[(u16, u16)]| {
        let ports = Arc::new(own.iter().copied().collect());
        let health = Health::Healthy;
        (Arc::from(named(name).key()), Endpoint { ports, health })
    };
    let pod = Workload {
        services: BTreeMap::from([serves("one", &[]), serves("two", &[(80, 9191)])]).into(),
        ..workload(&[])
    };
    let services = ["one", "two", "other"].map(named);
    let (writer, reader) = store();
    writer.replace(Delta::of(vec![pod], services.to_vec(), Vec::new()));
    let told = |asked: Option<&str>, port| {
        let direction = Direction::InboundHbone {
            at: ip("10.0.0.1"),
            identity: Identity::new("td", "ns", "other"),
            service: asked.map(|name| named(name).hostname),
        };
        let found = resolve(&reader, accepted(direction, &format!("10.0.0.1:{port}")));
        let service = found.expect("it goes to the app").service;
        service.map(|service| service.name.to_string())
    };
    assert_eq!(told(Some("one"), 8080).as_deref(), Some("one"));
    assert_eq!(told(Some("two"), 8080).as_deref(), Some("two"));
    // The name of another pod's service does not count; the port decides.
    assert_eq!(told(Some("other"), 8080).as_deref(), Some("one"));
    assert_eq!(told(None, 8080).as_deref(), Some("one"));
    assert_eq!(told(None, 9191).as_deref(), Some("two"));
    assert_eq!(told(None, 9090), None);
    assert_eq!(told(Some("two"), 9090).as_deref(), Some("two"));
}

#[test]
fn a_pod_that_is_not_in_the_mesh_or_is_somebody_else_there_goes_nowhere() {
    let other = Workload {
        service_account: "other".into(),
        ..workload(&[])
    };
    for mesh in [Vec::new(), vec![other]] {
        let error = go(mesh, Vec::new(), Direction::Outbound, "192.0.2.1:80");
        assert_eq!(error, Err(ResolveError::UnknownLocal("sa.ns (pod)".into())));
    }
}

#[test]
fn what_a_pod_says_to_the_agents_own_listener_goes_nowhere() {
    // The kernel captures neither loopback nor the pod's own address: a connection to either was meant for the
    // listener, and would come back to it for ever. The listener has another port if an app has 15001.
    for protocol in [Protocol::Hbone, Protocol::Tcp] {
        let pod = Workload {
            protocol,
            ..workload(&[])
        };
        for to in [
            "127.0.0.1:15001",
            "127.0.0.2:40000",
            "[::1]:15001",
            "[::ffff:127.0.0.1]:15001",
            "10.0.0.1:15001",
            "10.0.0.1:40000",
        ] {
            let error = go(vec![pod.clone()], Vec::new(), Direction::Outbound, to);
            assert_eq!(error, Err(ResolveError::SelfCall), "{to}");
        }
    }
}

#[test]
fn a_waypoint_reaches_the_workload_behind_it_and_nobody_else_does() {
    let behind = |waypoint: &str| Workload {
        waypoint: Some(waypoint.into()),
        ..endpoint("behind", "10.0.0.2")
    };
    // The pod that connects is 10.0.0.1, an endpoint of a service, whichever address it connects from.
    let pod = || Workload {
        services: serves(8080, Health::Healthy),
        ..workload(&[])
    };
    let out = |waypoint, peer| {
        let (writer, reader) = store();
        let all = vec![pod(), behind(waypoint)];
        writer.replace(Delta::of(all, vec![service()], Vec::new()));
        let accepted = Accepted {
            peer: at(peer),
            ..accepted(Direction::Outbound, "10.0.0.2:80")
        };
        resolve(&reader, accepted).map_err(|(_, error)| error)
    };
    for waypoint in ["/10.0.0.1", KEY, "/10.96.0.1"] {
        assert!(out(waypoint, "10.0.0.1:4000").is_ok(), "{waypoint}");
        let unknown = Err(ResolveError::UnknownWaypoint(waypoint.into()));
        assert_eq!(
            out(waypoint, "10.0.0.9:4000").map(|found| found.hop),
            unknown,
            "{waypoint}: not from its address"
        );
    }
    for waypoint in ["/10.0.0.3", "ns/other", "n/10.0.0.1", "", "10.0.0.1"] {
        let unknown = Err(ResolveError::UnknownWaypoint(waypoint.into()));
        let found = out(waypoint, "10.0.0.1:4000").map(|found| found.hop);
        assert_eq!(found, unknown, "{waypoint}");
    }
}

#[test]
fn a_pod_is_not_the_waypoint_that_has_its_address_on_another_network() {
    let behind = |waypoint: &str| Workload {
        waypoint: Some(waypoint.into()),
        ..endpoint("behind", "10.0.0.2")
    };
    // It has the same service account as the pod that connects, which is no waypoint.
    let waypoint = Workload {
        uid: "c//Pod/ns/waypoint".into(),
        network: "far".into(),
        services: serves(8080, Health::Healthy),
        ..workload(&[])
    };
    let service = Service {
        vips: vec![NetworkAddress {
            network: "far".into(),
            address: ip("10.96.0.1"),
        }],
        ..service()
    };
    for name in ["far/10.0.0.1", "far/10.96.0.1", KEY] {
        let (writer, reader) = store();
        let all = vec![workload(&[]), waypoint.clone(), behind(name)];
        writer.replace(Delta::of(all, vec![service.clone()], Vec::new()));
        let accepted = Accepted {
            peer: at("10.0.0.1:4000"),
            ..accepted(Direction::Outbound, "10.0.0.2:80")
        };
        let (_, error) = resolve(&reader, accepted).expect_err("it is not passed");
        assert_eq!(error, ResolveError::UnknownWaypoint(name.into()));
    }
}

#[test]
fn a_waypoint_is_known_at_its_address_in_either_spelling() {
    let behind = Workload {
        waypoint: Some("/10.0.0.1".into()),
        ..endpoint("behind", "10.0.0.2")
    };
    for own in ["10.0.0.1", "::ffff:10.0.0.1"] {
        let waypoint = Workload {
            addresses: vec![ip(own)],
            ..workload(&[])
        };
        for peer in ["10.0.0.1:4000", "[::ffff:10.0.0.1]:4000"] {
            let (writer, reader) = store();
            let all = vec![waypoint.clone(), behind.clone()];
            writer.replace(Delta::of(all, Vec::new(), Vec::new()));
            let accepted = Accepted {
                peer: at(peer),
                ..accepted(Direction::Outbound, "10.0.0.2:80")
            };
            assert!(resolve(&reader, accepted).is_ok(), "{own} from {peer}");
        }
    }
}

#[test]
fn who_has_a_waypoints_address_and_is_somebody_else_is_not_the_waypoint() {
    let behind = |waypoint: &str| Workload {
        waypoint: Some(waypoint.into()),
        ..endpoint("behind", "10.0.0.2")
    };
    // These workloads had the address before the pod that connects; the second one has the same account.
    let former = ["waypoint", "sa"].map(|account| Workload {
        uid: format!("c//Pod/ns/former-{account}").into(),
        service_account: account.into(),
        services: serves(8080, Health::Healthy),
        ..workload(&[])
    });
    // Another service claims the waypoint's address, and the pod is its endpoint.
    let other: Arc<str> = "ns/other.ns.svc.cluster.local".into();
    let pod = Workload {
        services: BTreeMap::from([(Arc::clone(&other), Endpoint::default())]).into(),
        ..workload(&[])
    };
    let claims = Service {
        name: "other".into(),
        hostname: "other.ns.svc.cluster.local".into(),
        ..service()
    };
    for (waypoint, former) in [KEY, "/10.96.0.1"]
        .into_iter()
        .flat_map(|waypoint| former.clone().map(|former| (waypoint, former)))
    {
        let (writer, reader) = store();
        let all = vec![pod.clone(), former, behind(waypoint)];
        let services = vec![service(), claims.clone()];
        writer.replace(Delta::of(all, services, Vec::new()));
        let accepted = Accepted {
            peer: at("10.0.0.1:4000"),
            ..accepted(Direction::Outbound, "10.0.0.2:80")
        };
        let (_, error) = resolve(&reader, accepted).expect_err("it is not passed");
        assert_eq!(error, ResolveError::UnknownWaypoint(waypoint.into()));
    }
}

#[test]
fn a_connection_to_the_address_that_it_comes_from_goes_nowhere() {
    // The pod got this address a moment ago, so it is not known as its own yet.
    for peer in ["10.0.0.9:4000", "[::ffff:10.0.0.9]:4000"] {
        for to in ["10.0.0.9:80", "[::ffff:10.0.0.9]:80"] {
            let (writer, reader) = store();
            writer.replace(Delta::of(vec![workload(&[])], Vec::new(), Vec::new()));
            let accepted = Accepted {
                peer: at(peer),
                ..accepted(Direction::Outbound, to)
            };
            let (_, error) = resolve(&reader, accepted).expect_err("it would come back");
            assert_eq!(error, ResolveError::SelfCall, "{peer} to {to}");
        }
    }
}

#[test]
fn a_client_is_who_has_its_address_in_the_pods_network() {
    let at_peer = |name: &str, network: &str| Workload {
        network: network.into(),
        ..endpoint(name, "10.0.0.9")
    };
    let pod = Workload {
        network: "far".into(),
        ..workload(&[])
    };
    let (writer, reader) = store();
    let all = vec![pod, at_peer("far", "far"), at_peer("near", "")];
    writer.replace(Delta::of(all, Vec::new(), Vec::new()));
    let found = resolve(&reader, accepted(Direction::InboundPlain, "10.0.0.1:80"));
    let source = found.expect("it goes to the app").source;
    assert_eq!(source.expect("who it is").name.as_ref(), "far");
}

#[test]
fn an_endpoint_has_the_services_port_unless_it_has_its_own_and_may_show_the_services_names() {
    let service = Service {
        subject_alt_names: vec!["spiffe://td/ns/x/sa/y".into(), "y.example".into()],
        ..service()
    };
    for (own, port) in [(0, 8080), (9191, 9191)] {
        let one = Workload {
            services: serves(own, Health::Healthy),
            ..endpoint("one", "10.0.0.2")
        };
        let all = vec![workload(&[]), one];
        match go(
            all,
            vec![service.clone()],
            Direction::Outbound,
            "10.96.0.1:80",
        ) {
            Ok(Hop::Hbone {
                authority,
                expected,
                ..
            }) => {
                assert_eq!(authority, SocketAddr::new(ip("10.0.0.2"), port));
                let names = [("ns", "sa"), ("x", "y")];
                assert_eq!(expected, names.map(|(ns, sa)| Identity::new("td", ns, sa)));
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_workload_is_reached_at_the_one_of_its_addresses_that_was_asked_for() {
    let two = Workload {
        addresses: vec![ip("10.0.0.2"), ip("10.0.0.3")],
        ..endpoint("two", "10.0.0.2")
    };
    for own in ["10.0.0.2", "10.0.0.3"] {
        let all = vec![workload(&[]), two.clone()];
        let asked = SocketAddr::new(ip(own), 80);
        match go(all, Vec::new(), Direction::Outbound, &asked.to_string()) {
            Ok(Hop::Hbone { to, authority, .. }) => {
                assert_eq!((to, authority), (SocketAddr::new(ip(own), 15008), asked));
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn errors_are_told_in_ztunnels_words() {
    let words = |error: ResolveError| error.to_string();
    let error = go(Vec::new(), Vec::new(), Direction::Outbound, "192.0.2.1:80");
    assert_eq!(
        words(error.expect_err("nobody knows the pod")),
        "failed to fetch information about local workload: sa.ns (pod)"
    );
    let to = at("10.96.0.1:80");
    assert_eq!(
        words(ResolveError::NoHealthyUpstream(to)),
        "no healthy upstream: 10.96.0.1:80"
    );
    assert_eq!(
        words(ResolveError::UnknownWaypoint("ns/w".into())),
        "unknown waypoint: ns/w"
    );
    let (pod, asked) = (ip("10.0.0.1"), ip("10.0.0.2"));
    assert_eq!(
        words(ResolveError::IpMismatch { pod, asked }),
        "ip mismatch: 10.0.0.1 != 10.0.0.2"
    );
    assert_eq!(
        words(ResolveError::SelfCall),
        "attempted recursive call to ourselves"
    );
}

#[test]
fn an_endpoint_is_taken_at_an_address_of_the_family_that_was_asked_for() {
    let both = Workload {
        addresses: vec![ip("10.0.0.2"), ip("fd00::2")],
        ..endpoint("both", "10.0.0.2")
    };
    let service = Service {
        vips: here(&["10.96.0.1", "fd00:96::1"]),
        ..service()
    };
    let authority = |all: &[Workload], to| {
        let all = all.iter().cloned().chain([workload(&[])]).collect();
        match go(all, vec![service.clone()], Direction::Outbound, to) {
            Ok(Hop::Hbone { to, authority, .. }) => (to, authority),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(
        authority(std::slice::from_ref(&both), "10.96.0.1:80"),
        (at("10.0.0.2:15008"), at("10.0.0.2:8080"))
    );
    assert_eq!(
        authority(&[both], "[fd00:96::1]:80"),
        (at("[fd00::2]:15008"), at("[fd00::2]:8080"))
    );
    let four = endpoint("four", "10.0.0.2");
    assert_eq!(
        authority(&[four], "[fd00:96::1]:80"),
        (at("10.0.0.2:15008"), at("10.0.0.2:8080")),
        "it has no other"
    );
}

#[test]
fn load_is_spread_by_capacity() {
    let weighs = |name: &str, address, capacity| Workload {
        capacity,
        ..endpoint(name, address)
    };
    let all = vec![
        workload(&[]),
        weighs("none", "10.0.0.2", 0),
        weighs("one", "10.0.0.3", 1),
        weighs("three", "10.0.0.4", 3),
    ];
    let mesh = Mesh::of(all.clone(), vec![service()], Vec::new());
    let mut taken: BTreeMap<Arc<str>, u32> = BTreeMap::new();
    for _ in 0..4000 {
        let drawn = draw(&mesh, &service(), &all[0], 80, false);
        let (target, port) = drawn.expect("an endpoint");
        assert_eq!(port, 8080);
        *taken.entry(target.name.clone()).or_default() += 1;
    }
    assert_eq!(taken.get("none"), None);
    // Nine standard deviations from 3000.
    assert!((2750..3250).contains(&taken["three"]), "{taken:?}");
    let nobody = Mesh::of(
        vec![weighs("none", "10.0.0.2", 0)],
        vec![service()],
        Vec::new(),
    );
    assert!(draw(&nobody, &service(), &all[0], 80, false).is_none());
}

#[test]
fn what_another_network_has_at_an_address_is_not_who_is_meant_by_it_here() {
    let remote = |protocol| Workload {
        network: "far".into(),
        protocol,
        ..endpoint("remote", "10.0.0.2")
    };
    let near = Workload {
        uid: "c//Pod/ns/near".into(),
        ..endpoint("near", "10.0.0.2")
    };
    for protocol in [Protocol::Tcp, Protocol::Hbone] {
        let all = vec![workload(&[]), remote(protocol), near.clone()];
        match go(all, Vec::new(), Direction::Outbound, "10.0.0.2:80") {
            Ok(Hop::Hbone { target, .. }) => assert_eq!(*target.name, *"near"),
            other => panic!("{other:?}"),
        }
        // If nobody in this network has the address, it is as any other address.
        let all = vec![workload(&[]), remote(protocol)];
        let out = go(all, Vec::new(), Direction::Outbound, "10.0.0.2:80");
        assert_eq!(out, Ok(Hop::Plain(at("10.0.0.2:80"))));
    }
    // A service of another network has no address in this one either.
    let service = Service {
        vips: vec![NetworkAddress {
            network: "far".into(),
            address: ip("10.96.0.1"),
        }],
        ..service()
    };
    let all = vec![workload(&[]), near];
    let out = go(all, vec![service], Direction::Outbound, "10.96.0.1:80");
    assert_eq!(out, Ok(Hop::Plain(at("10.96.0.1:80"))));
}

#[test]
fn an_endpoint_on_another_network_is_refused_with_its_word_and_never_dialled() {
    let remote = |protocol, gateway: Option<&str>| Workload {
        network: "far".into(),
        protocol,
        network_gateway: gateway.map(Arc::from),
        ..endpoint("remote", "10.0.0.2")
    };
    let out = |all: Vec<Workload>, to| {
        let all = all.into_iter().chain([workload(&[])]).collect();
        go(all, vec![service()], Direction::Outbound, to)
    };
    for protocol in [Protocol::Tcp, Protocol::Hbone] {
        assert_eq!(
            out(vec![remote(protocol, None)], "10.96.0.1:80"),
            Err(ResolveError::NoAddress("c//Pod/ns/remote".into()))
        );
        let error = out(vec![remote(protocol, Some("far/10.9.9.9"))], "10.96.0.1:80")
            .expect_err("not carried yet");
        assert_eq!(
            error.to_string(),
            "unsupported feature: double HBONE by network gateway far/10.9.9.9"
        );
        // An endpoint in the network gets all connections, and a port that the service lacks has no endpoint.
        let near = endpoint("near", "10.0.0.3");
        for _ in 0..50 {
            match out(vec![remote(protocol, None), near.clone()], "10.96.0.1:80") {
                Ok(Hop::Hbone { target, .. }) => assert_eq!(*target.name, *"near"),
                other => panic!("{other:?}"),
            }
        }
        for gateway in [None, Some("far/10.9.9.9")] {
            assert_eq!(
                out(vec![remote(protocol, gateway)], "10.96.0.1:81"),
                Err(ResolveError::NoHealthyUpstream(at("10.96.0.1:81")))
            );
        }
    }
}

#[test]
fn an_endpoint_that_terminates_takes_load_only_where_no_other_does() {
    let is = |name: &str, address, health| Workload {
        services: serves(8080, health),
        ..endpoint(name, address)
    };
    let ends = || is("ends", "10.0.0.2", Health::Terminating);
    let ill = || is("ill", "10.0.0.3", Health::Unhealthy);
    let names = |all: &[Workload], service: &Service| {
        let mesh = Mesh::of(all.to_vec(), vec![service.clone()], Vec::new());
        let found = drawn(&mesh, service, &workload(&[]), false);
        let names = found.iter().map(|uid| uid.rsplit('/').next());
        names.flatten().map(str::to_owned).collect::<Vec<_>>()
    };
    let service = service();
    let well = endpoint("well", "10.0.0.4");
    assert_eq!(names(&[ends(), ill()], &service), ["ends"]);
    assert_eq!(names(&[ends(), ill(), well.clone()], &service), ["well"]);
    assert_eq!(names(&[ill()], &service), [""; 0]);
    // It can still be reached by its own address.
    let all = vec![workload(&[]), ends()];
    assert!(go(all, Vec::new(), Direction::Outbound, "10.0.0.2:80").is_ok());
    let unready = Service {
        publish_not_ready: true,
        ..service.clone()
    };
    assert_eq!(
        names(&[ends(), ill(), well], &unready),
        ["ends", "ill", "well"]
    );
    // A terminating endpoint on the node comes before any on other nodes if the service is node-local.
    let node_local = Service {
        load_balancing: LoadBalancing {
            preferences: vec![Scope::Node],
            strict: true,
        },
        ..service
    };
    let away = Workload {
        node: "away".into(),
        ..endpoint("away", "10.0.0.5")
    };
    assert_eq!(names(&[ends(), away], &node_local), ["ends"]);
}

#[test]
fn an_address_from_outside_is_the_services_for_its_own_ports() {
    let service = Service {
        balanced: here(&["203.0.113.10"]),
        external: here(&["203.0.113.11"]),
        load_balancing: LoadBalancing {
            preferences: vec![Scope::Node],
            strict: true,
        },
        ..service()
    };
    // The endpoint is on another node. `internalTrafficPolicy: Local` is only for the service's own address.
    let away = || Workload {
        node: "away".into(),
        ..endpoint("away", "10.0.0.2")
    };
    let out = |to| {
        let all = vec![workload(&[]), away()];
        go(all, vec![service.clone()], Direction::Outbound, to)
    };
    for to in ["203.0.113.10:80", "203.0.113.11:80"] {
        match out(to) {
            Ok(Hop::Hbone { authority, .. }) => assert_eq!(authority, at("10.0.0.2:8080"), "{to}"),
            other => panic!("{to}: {other:?}"),
        }
    }
    let none = Err(ResolveError::NoHealthyUpstream(at("10.96.0.1:80")));
    assert_eq!(out("10.96.0.1:80"), none);
    for to in ["203.0.113.10:443", "203.0.113.11:443"] {
        assert_eq!(out(to), Ok(Hop::Plain(at(to))), "{to}");
    }
}

#[test]
fn a_service_that_claims_a_pods_address_does_not_get_its_connections() {
    let service = Service {
        vips: here(&["10.0.0.2"]),
        balanced: here(&["10.0.0.2"]),
        external: here(&["10.0.0.2"]),
        ..service()
    };
    let thief = endpoint("thief", "10.0.0.3");
    let victim = Workload {
        services: Arc::default(),
        ..endpoint("victim", "10.0.0.2")
    };
    let all = vec![workload(&[]), thief, victim];
    match go(all, vec![service], Direction::Outbound, "10.0.0.2:80") {
        Ok(Hop::Hbone { target, .. }) => assert_eq!(*target.name, *"victim"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_asks_for_something_that_cannot_be_done_is_refused_with_its_word() {
    let out = |service: Service, to| {
        let all = vec![workload(&[]), endpoint("one", "10.0.0.2")];
        go(all, vec![service], Direction::Outbound, to).map_err(|error| error.to_string())
    };
    let passthrough = Service {
        unsupported: Some("load balancer mode PASSTHROUGH".into()),
        ..service()
    };
    assert_eq!(
        out(passthrough, "10.96.0.1:80"),
        Err("unsupported feature: load balancer mode PASSTHROUGH".into())
    );
    let range = Service {
        cidrs: vec![("".into(), "10.97.0.0/16".parse().expect("a range"))],
        ..service()
    };
    let unknown = Err(format!("unsupported feature: range of addresses of {KEY}"));
    assert_eq!(out(range.clone(), "10.97.3.4:80"), unknown);
    assert!(out(range, "10.96.0.1:80").is_ok());
    let private = Service {
        namespace: "other".into(),
        private: true,
        ..service()
    };
    assert_eq!(
        out(private, "10.96.0.1:80"),
        Err("no service for target address: 10.96.0.1:80".into())
    );
    // An app that requires the PROXY protocol gets no connection without it.
    let wants = Workload {
        unsupported: Some("applicationTunnel PROXY".into()),
        ..workload(&[])
    };
    let inbound = Direction::InboundHbone {
        at: ip("10.0.0.1"),
        identity: Identity::new("td", "ns", "other"),
        service: None,
    };
    for direction in [Direction::InboundPlain, inbound] {
        let error = go(vec![wants.clone()], Vec::new(), direction, "10.0.0.1:80");
        assert_eq!(
            error,
            Err(ResolveError::Unsupported("applicationTunnel PROXY".into()))
        );
    }
}

#[test]
fn a_service_of_one_family_reaches_its_endpoints_in_no_other() {
    let both = Workload {
        addresses: vec![ip("10.0.0.2"), ip("fd00::2")],
        ..endpoint("both", "10.0.0.2")
    };
    let out = |family, to| {
        let service = Service {
            vips: here(&["10.96.0.1", "fd00:96::1"]),
            family,
            ..service()
        };
        let all = vec![workload(&[]), both.clone(), endpoint("four", "10.0.0.3")];
        go(all, vec![service], Direction::Outbound, to)
    };
    for to in ["10.96.0.1:80", "[fd00:96::1]:80"] {
        match out(Some(Family::V6), to) {
            Ok(Hop::Hbone { authority, .. }) => assert_eq!(authority, at("[fd00::2]:8080")),
            other => panic!("{other:?}"),
        }
        match out(Some(Family::V4), to) {
            Ok(Hop::Hbone { authority, .. }) => assert!(authority.is_ipv4(), "{authority}"),
            other => panic!("{other:?}"),
        }
    }
}

/// Returns the endpoints that may be drawn: so many draws find each of a few with equal weights.
fn drawn(mesh: &Mesh, service: &Service, source: &Workload, external: bool) -> BTreeSet<Arc<str>> {
    let one = |_| draw(mesh, service, source, 80, external);
    let all = (0..300).filter_map(one);
    all.map(|(workload, _)| Arc::clone(&workload.uid)).collect()
}

fn scopes() -> impl Strategy<Value = Vec<Scope>> {
    let scope = prop_oneof![
        Just(Scope::Region),
        Just(Scope::Zone),
        Just(Scope::Node),
        Just(Scope::Network)
    ];
    vec(scope, 0..3)
}

prop_compose! {
    fn place()(region in "[ab]", zone in "[ab]", node in "[ab]", network in "[ab]") -> [String; 4] {
        [region, zone, node, network]
    }
}

fn put(mut workload: Workload, [region, zone, node, network]: &[String; 4]) -> Workload {
    let locality = Arc::make_mut(&mut workload.locality);
    locality.region = region.as_str().into();
    locality.zone = zone.as_str().into();
    workload.node = node.as_str().into();
    workload.network = network.as_str().into();
    workload
}

fn health() -> impl Strategy<Value = Health> {
    prop_oneof![
        Just(Health::Healthy),
        Just(Health::Terminating),
        Just(Health::Unhealthy)
    ]
}

proptest! {
    /// Compares with a slow reference: an endpoint is a candidate only if no other usable one is healthier, or
    /// equally healthy with more in common.
    #[test]
    fn the_preferred_endpoints_are_the_candidates(
        own in place(),
        others in vec((place(), health(), prop_oneof![Just(0_u16), Just(8080)]), 0..6),
        preferences in scopes(),
        strict: bool,
        external: bool,
        publish_not_ready: bool,
    ) {
        let source = put(workload(&[]), &own);
        let mut all = vec![source.clone()];
        for (number, (place, health, port)) in others.iter().enumerate() {
            let mut other = put(endpoint(&format!("e{number}"), &format!("10.0.1.{number}")), place);
            other.services = serves(*port, *health);
            all.push(other);
        }
        let service = Service {
            publish_not_ready,
            load_balancing: LoadBalancing { preferences: preferences.clone(), strict },
            ports: BTreeMap::from([(80, 0)]),
            ..service()
        };
        let mesh = Mesh::of(all.clone(), vec![service.clone()], Vec::new());
        let found = drawn(&mesh, &service, &source, external);
        let shares = |other: &Workload| {
            let mut count = 0;
            for scope in &preferences {
                let same = match scope {
                    Scope::Region => source.locality.region == other.locality.region,
                    Scope::Zone => source.locality.zone == other.locality.zone,
                    Scope::Node => source.node == other.node,
                    _ => source.network == other.network,
                };
                if !same {
                    break;
                }
                count += 1;
            }
            count
        };
        let health = |other: &Workload| match other.services[KEY].health {
            _ if publish_not_ready => 2,
            Health::Healthy => 2,
            Health::Terminating => 1,
            Health::Unhealthy => 0,
        };
        let able: Vec<&Workload> = all[1..]
            .iter()
            .filter(|other| other.network == source.network)
            .filter(|other| other.services[KEY].ports[&80] != 0)
            .filter(|other| health(other) > 0)
            .filter(|other| !strict || external || shares(other) == preferences.len())
            .collect();
        let better = |one: &Workload, other: &Workload| {
            health(one) > health(other)
                || (health(one) == health(other) && shares(one) > shares(other))
        };
        let expected: BTreeSet<Arc<str>> = able
            .iter()
            .filter(|one| !able.iter().any(|other| better(other, one)))
            .map(|one| one.uid.clone())
            .collect();
        prop_assert_eq!(found, expected);
    }
}

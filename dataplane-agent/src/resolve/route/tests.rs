//! Where connections go, and that they never go to an endpoint that must not have them.

use std::collections::BTreeMap;

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::accept::LocalPod;
use crate::resolve::mesh::store;
use crate::resolve::service::LoadBalancing;
use crate::resolve::workload::tests::workload;

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
        services: BTreeMap::from([(KEY.into(), BTreeMap::from([(80, 8080)]))]),
        ..workload(&[])
    }
}

fn service() -> Service {
    Service {
        name: "svc".into(),
        namespace: "ns".into(),
        hostname: "svc.ns.svc.cluster.local".into(),
        vips: vec![ip("10.96.0.1")],
        ports: BTreeMap::from([(80, 8080)]),
        subject_alt_names: Vec::new(),
        waypoint: None,
        publish_not_ready: false,
        load_balancing: LoadBalancing::default(),
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
    writer.publish(Mesh::build(1, workloads, services, Vec::new()));
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
        healthy: false,
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
    // The kernel takes neither loopback nor the pod's own address: what arrives with either as its
    // destination was meant for the listener, and would come back to it for ever. The listener has
    // another port where an app has 15001.
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
    // The pod that connects is 10.0.0.1, the endpoint of a service, from whichever address.
    let pod = || Workload {
        services: BTreeMap::from([(KEY.into(), BTreeMap::from([(80, 8080)]))]),
        ..workload(&[])
    };
    let out = |waypoint, peer| {
        let (writer, reader) = store();
        let all = vec![pod(), behind(waypoint)];
        writer.publish(Mesh::build(1, all, vec![service()], Vec::new()));
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
        vips: vec![ip("10.96.0.1"), ip("fd00:96::1")],
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
    let mesh = Mesh::build(1, all.clone(), vec![service()], Vec::new());
    let mut taken: BTreeMap<Arc<str>, u32> = BTreeMap::new();
    for _ in 0..4000 {
        let (target, port) =
            choose(&mesh, &service(), &all[0], at("10.96.0.1:80")).expect("an endpoint");
        assert_eq!(port, 8080);
        *taken.entry(target.name.clone()).or_default() += 1;
    }
    assert_eq!(taken.get("none"), None);
    // Nine standard deviations from 3000.
    assert!((2750..3250).contains(&taken["three"]), "{taken:?}");
    let nobody = Mesh::build(
        1,
        vec![weighs("none", "10.0.0.2", 0)],
        vec![service()],
        Vec::new(),
    );
    assert!(choose(&nobody, &service(), &all[0], at("10.96.0.1:80")).is_none());
}

#[test]
fn another_network_is_the_last_choice_but_nearness_counts_there_too() {
    let here = put(workload(&[]), &["a", "a", "a", "a"].map(str::to_owned));
    let far = |name: &str, address, place: [&str; 4]| {
        put(endpoint(name, address), &place.map(str::to_owned))
    };
    let service = Service {
        load_balancing: LoadBalancing {
            preferences: vec![Scope::Network, Scope::Region, Scope::Zone],
            strict: false,
        },
        ..service()
    };
    let names = |all: Vec<Workload>| {
        let mesh = Mesh::build(1, all, vec![service.clone()], Vec::new());
        let found = candidates(&mesh, &service, &here, 80);
        found
            .iter()
            .map(|(workload, _)| workload.name.to_string())
            .collect::<Vec<_>>()
    };
    let near = far("near", "10.0.0.2", ["a", "b", "b", "b"]);
    let away = far("away", "10.0.0.3", ["b", "b", "b", "b"]);
    let own = far("own", "10.0.0.4", ["b", "b", "b", "a"]);
    assert_eq!(names(vec![near.clone(), away.clone()]), ["near"]);
    assert_eq!(names(vec![near, away, own.clone()]), ["own"]);
    assert_eq!(names(vec![own]), ["own"]);
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
    workload.locality.region = region.as_str().into();
    workload.locality.zone = zone.as_str().into();
    workload.node = node.as_str().into();
    workload.network = network.as_str().into();
    workload
}

proptest! {
    /// The slow way: an endpoint is taken only if no other one that is able shares more.
    #[test]
    fn the_preferred_endpoints_are_the_candidates(
        here in place(),
        others in vec((place(), any::<bool>(), prop_oneof![Just(0_u16), Just(8080)]), 0..6),
        preferences in scopes(),
        strict: bool,
        publish_not_ready: bool,
    ) {
        let source = put(workload(&[]), &here);
        let mut all = vec![source.clone()];
        for (number, (place, healthy, port)) in others.iter().enumerate() {
            let mut other = put(endpoint(&format!("e{number}"), &format!("10.0.1.{number}")), place);
            other.healthy = *healthy;
            other.services = BTreeMap::from([(KEY.into(), BTreeMap::from([(80, *port)]))]);
            all.push(other);
        }
        let service = Service {
            publish_not_ready,
            load_balancing: LoadBalancing { preferences: preferences.clone(), strict },
            ports: BTreeMap::from([(80, 0)]),
            ..service()
        };
        let mesh = Mesh::build(1, all.clone(), vec![service.clone()], Vec::new());
        let found: Vec<Arc<str>> = candidates(&mesh, &service, &source, 80)
            .iter()
            .map(|(workload, _)| workload.uid.clone())
            .collect();
        let shares = |other: &Workload| {
            let mut count = 0;
            for (place, scope) in preferences.iter().enumerate() {
                let same = match scope {
                    Scope::Region => source.locality.region == other.locality.region,
                    Scope::Zone => source.locality.zone == other.locality.zone,
                    Scope::Node => source.node == other.node,
                    _ => source.network == other.network,
                };
                if same {
                    count += 1;
                } else if place > 0 || *scope != Scope::Network {
                    break;
                }
            }
            count
        };
        let rank = |other: &Workload| {
            let first = preferences.first() == Some(&Scope::Network);
            let bonus = if first && source.network == other.network { 10 } else { 0 };
            shares(other) + bonus
        };
        let able: Vec<&Workload> = all[1..]
            .iter()
            .filter(|other| other.services[KEY][&80] != 0)
            .filter(|other| other.healthy || publish_not_ready)
            .filter(|other| !strict || shares(other) == preferences.len())
            .collect();
        let best = able.iter().map(|other| rank(other)).max();
        let expected: Vec<Arc<str>> = able
            .iter()
            .filter(|other| Some(rank(other)) == best)
            .map(|other| other.uid.clone())
            .collect();
        prop_assert_eq!(found, expected);
    }
}

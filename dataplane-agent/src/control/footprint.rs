//! Memory that a large mesh takes, by what is allocated for it.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use crate::mesh::service::tests::service;
use crate::mesh::workload::tests::workload;
use crate::mesh::workload::{Endpoint, Locality, Workload};
use crate::mesh::{Delta, Destination, store, store_of_node};
use crate::sys::memory::counted::taken;

/// A pod of a deployment with 20 pods and a service. Each text is an allocation of its own, as after reading.
fn deployed(number: u32) -> Workload {
    let deployment = number / 20;
    let namespace = format!("ns-{}", deployment % 100);
    let key = format!("{namespace}/s-{deployment}.{namespace}.svc.cluster.local");
    let serves = Endpoint {
        ports: BTreeMap::from([(80, 8080)]).into(),
        ..Endpoint::default()
    };
    Workload {
        uid: format!("Kubernetes//Pod/{namespace}/pod-{number}").into(),
        name: format!("pod-{number}").into(),
        service_account: format!("account-{}", number % 50).into(),
        node: format!("node-{}", number % 100).into(),
        addresses: vec![address(number)],
        workload_name: format!("deployment-{deployment}").into(),
        canonical_name: format!("deployment-{deployment}").into(),
        policies: [format!("{namespace}/p-{deployment}").into()].into(),
        services: BTreeMap::from([(key.into(), serves)]).into(),
        locality: Arc::new(Locality {
            region: "region".into(),
            zone: format!("zone-{}", number % 3).into(),
            subzone: "".into(),
        }),
        namespace: namespace.into(),
        ..workload(&[])
    }
}

fn address(number: u32) -> IpAddr {
    Ipv4Addr::from(0x0a00_0000 + number).into()
}

fn delta(of: std::ops::Range<u32>) -> Delta {
    Delta::of(of.map(deployed).collect(), Vec::new(), Vec::new())
}

#[test]
fn a_workload_takes_less_than_a_kilobyte() {
    const MANY: u32 = 20_000;
    let (before, _) = taken();
    let (writer, _reader) = store();
    writer.apply(delta(0..MANY));
    let (after, _) = taken();
    let each = (after - before) / MANY as usize;
    assert!(each < 1000, "{each} bytes for each");
}

#[test]
fn the_mesh_of_one_node_has_its_workloads_and_takes_the_memory_of_those() {
    const MANY: u32 = 20_000;
    let writer = store_of_node("node-7");
    let (before, _) = taken();
    writer.apply(delta(0..MANY));
    let (after, _) = taken();
    let own = || {
        writer
            .current()
            .workloads()
            .map(|of| of.name.to_string())
            .collect::<Vec<_>>()
    };
    assert_eq!(own().len(), MANY as usize / 100);
    // The whole mesh takes some 18 MB.
    assert!(after - before < 1 << 20, "{} bytes", after - before);
    // One that is on another node, and comes back.
    let moved = |node: &str| {
        let moved = Workload {
            node: node.into(),
            ..deployed(7)
        };
        writer.apply(Delta::of(vec![moved], vec![service("s")], Vec::new()));
        own().contains(&"pod-7".to_owned())
    };
    assert!(!moved("node-8") && moved("node-7"));
    assert_eq!(writer.current().services().count(), 0);
}

#[test]
fn to_find_a_workload_and_what_applies_to_it_takes_no_memory() {
    let (writer, reader) = store();
    writer.apply(delta(0..1000));
    let mesh = reader.current();
    let client = workload(&[]);
    let (_, before) = taken();
    for number in 0..1000 {
        let to = SocketAddr::new(address(number), 80);
        let found = mesh.destination(&client, to);
        let Some(Destination::Workload(found)) = found else {
            panic!("{found:?}");
        };
        assert!(mesh.policy_since(&found.uid).is_some());
    }
    assert_eq!(taken().1, before);
}

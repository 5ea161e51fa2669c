//! The cost of the mesh by its size: to resolve a destination, to evaluate policy, to apply a change, and to
//! re-check open connections. None of these may grow with the mesh.

use std::collections::BTreeMap;
use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::pin::pin;
use std::sync::Arc;

use criterion::{BatchSize, BenchmarkId, Criterion, criterion_group, criterion_main};
use dataplane_agent::mesh::policy::{
    Action, Clause, Match, Policy, PolicyScope, Rule, StringMatch,
};
use dataplane_agent::mesh::service::{LoadBalancing, NetworkAddress, Scope, Service};
use dataplane_agent::mesh::workload::{
    Endpoint, Health, Locality, Protocol, Workload, WorkloadType,
};
use dataplane_agent::mesh::{Delta, Identity, MeshReader, MeshWriter, store};
use dataplane_agent::proxy::accept::{Accepted, Direction, Instance, LocalPod};
use dataplane_agent::proxy::authorize::{Authorizer, Revoked};
use dataplane_agent::proxy::resolve::{Resolved, resolve};
use dataplane_agent::sys::netns::Netns;
use futures_util::FutureExt;

/// Number of workloads of a mesh; it has as many services and policies, up to [`MOST`].
const SIZES: [u32; 3] = [10, 1_000, 100_000];
const MOST: u32 = 10_000;
/// Number of open connections.
const PERMITS: u32 = 16_000;
const PODS: u32 = 250;

fn namespace(number: u32) -> Arc<str> {
    format!("ns-{}", number % 100).into()
}

fn address(number: u32) -> IpAddr {
    Ipv4Addr::from(0x0a00_0000 + number).into()
}

fn vip(number: u32) -> IpAddr {
    Ipv4Addr::from(0xac10_0000 + number).into()
}

fn service_key(number: u32) -> Arc<str> {
    format!("{}/s-{number}.svc.cluster.local", namespace(number)).into()
}

fn workload(number: u32, of: u32, health: Health) -> Workload {
    let name: Arc<str> = format!("pod-{number}").into();
    let namespace = namespace(number);
    let serves = Endpoint {
        ports: BTreeMap::from([(80, 8080)]).into(),
        health,
    };
    Workload {
        uid: format!("Kubernetes//Pod/{namespace}/{name}").into(),
        name: Arc::clone(&name),
        service_account: "default".into(),
        trust_domain: "cluster.local".into(),
        node: format!("node-{}", number % 1000).into(),
        cluster_id: "Kubernetes".into(),
        network: "".into(),
        network_gateway: None,
        addresses: vec![address(number)],
        protocol: Protocol::Hbone,
        host_network: false,
        health,
        workload_name: Arc::clone(&name),
        workload_type: WorkloadType::Deployment,
        canonical_name: name,
        canonical_revision: "v1".into(),
        waypoint: None,
        policies: [format!("{namespace}/p-{}", number % of.min(MOST)).into()].into(),
        services: BTreeMap::from([(service_key(number % of.min(MOST)), serves)]).into(),
        locality: Arc::new(Locality {
            region: "region".into(),
            zone: format!("zone-{}", number % 3).into(),
            subzone: "".into(),
        }),
        capacity: 1,
        unsupported: None,
        namespace,
    }
}

fn service(number: u32) -> Service {
    Service {
        name: format!("s-{number}").into(),
        namespace: namespace(number),
        hostname: format!("s-{number}.svc.cluster.local").into(),
        vips: vec![NetworkAddress {
            network: "".into(),
            address: vip(number),
        }],
        ports: BTreeMap::from([(80, 8080)]),
        canonical: true,
        load_balancing: LoadBalancing {
            preferences: vec![Scope::Region, Scope::Zone],
            strict: false,
        },
        ..Service::default()
    }
}

/// Returns a policy that admits clients of these namespaces.
fn policy(number: u32, from: &[&str]) -> Policy {
    let namespaces = from.iter().map(|name| StringMatch::Exact((*name).into()));
    let one = Match {
        namespaces: namespaces.collect(),
        ..Match::default()
    };
    Policy {
        name: format!("p-{number}").into(),
        namespace: namespace(number),
        scope: PolicyScope::WorkloadSelector,
        action: Action::Allow,
        rules: vec![Rule {
            clauses: vec![Clause { matches: vec![one] }],
        }],
        dry_run: false,
    }
}

fn mesh(size: u32) -> (MeshWriter, MeshReader) {
    let (writer, reader) = store();
    writer.apply(Delta::of(
        (0..size)
            .map(|of| workload(of, size, Health::Healthy))
            .collect(),
        (0..size.min(MOST)).map(service).collect(),
        (0..size.min(MOST))
            .map(|of| policy(of, &["ns-1", "ns-2"]))
            .collect(),
    ));
    (writer, reader)
}

fn pod(number: u32, size: u32) -> Arc<LocalPod> {
    let of = workload(number, size, Health::Healthy);
    Arc::new(LocalPod {
        instance: Instance::next(),
        identity: of.identity(),
        uid: of.uid,
        namespace: of.namespace,
        name: of.name,
        addresses: std::sync::RwLock::new(of.addresses.into()),
        netns: Netns::own().expect("a network namespace"),
        cookie: number.into(),
        ports: [15001, 15006, 15008],
        handshakes: Default::default(),
        places: Default::default(),
        clients: Default::default(),
        spoofed: Default::default(),
        stamp: Arc::default(),
    })
}

fn outbound(pod: &Arc<LocalPod>, to: IpAddr) -> Accepted<()> {
    let peer = SocketAddr::new(pod.addresses()[0], 40_000);
    Accepted {
        io: (),
        pod: Arc::clone(pod),
        peer,
        destination: SocketAddr::new(to, 80),
        direction: Direction::Outbound,
    }
}

/// Returns an inbound connection from a client of namespace ns-1 to a pod.
fn inbound(reader: &MeshReader, pod: &Arc<LocalPod>) -> Resolved<()> {
    let at = pod.addresses()[0];
    let accepted = Accepted {
        io: (),
        pod: Arc::clone(pod),
        peer: SocketAddr::new(address(1), 40_000),
        destination: SocketAddr::new(at, 8080),
        direction: Direction::InboundHbone {
            at,
            identity: Identity::new("cluster.local", "ns-1", "default"),
            service: None,
        },
    };
    resolve(reader, accepted).expect("it is the pod's own address")
}

/// Returns a generator of scattered numbers below a bound.
fn spread() -> impl FnMut(u32) -> u32 {
    let mut next = 0;
    move |bound| {
        next = (next + 7919) % bound;
        next
    }
}

fn lookup(c: &mut Criterion) {
    let mut group = c.benchmark_group("lookup");
    for size in SIZES {
        let (_writer, reader) = mesh(size);
        let pod = pod(0, size);
        let mut number = spread();
        group.bench_function(BenchmarkId::new("workload", size), |b| {
            b.iter_batched(
                || outbound(&pod, address(1 + number(size - 1))),
                |accepted| resolve(&reader, accepted).expect("a workload"),
                BatchSize::SmallInput,
            );
        });
        let mut number = spread();
        group.bench_function(BenchmarkId::new("service", size), |b| {
            b.iter_batched(
                || outbound(&pod, vip(number(size.min(MOST)))),
                |accepted| resolve(&reader, accepted).expect("an endpoint"),
                BatchSize::SmallInput,
            );
        });
    }
}

fn authorize(c: &mut Criterion) {
    let mut group = c.benchmark_group("authorize");
    for size in SIZES {
        let (_writer, reader) = mesh(size);
        let authorizer = Authorizer::new(reader.clone());
        let pods: Vec<_> = (0..PODS.min(size)).map(|of| pod(of, size)).collect();
        let mut pods = pods.iter().cycle();
        group.bench_function(BenchmarkId::new("inbound", size), |b| {
            b.iter_batched(
                || inbound(&reader, pods.next().expect("a cycle")),
                |resolved| authorizer.authorize(resolved).expect("it may"),
                BatchSize::SmallInput,
            );
        });
    }
}

/// Returns one change of each kind of object, and the change back.
fn changes(size: u32) -> [(&'static str, Vec<Delta>); 3] {
    let last = size - 1;
    let workloads = [Health::Unhealthy, Health::Healthy].map(|health| {
        let of = workload(last, size, health);
        Delta::of(vec![of], Vec::new(), Vec::new())
    });
    let services = [true, false].map(|canonical| {
        let of = Service {
            canonical,
            ..service(last % MOST)
        };
        Delta::of(Vec::new(), vec![of], Vec::new())
    });
    let policies = [&["ns-1"][..], &["ns-1", "ns-2"]].map(|from| {
        let of = policy(last % MOST, from);
        Delta::of(Vec::new(), Vec::new(), vec![of])
    });
    [
        ("workload", workloads.into()),
        ("service", services.into()),
        ("policy", policies.into()),
    ]
}

fn apply(c: &mut Criterion) {
    let mut group = c.benchmark_group("apply");
    for size in SIZES {
        let (writer, _reader) = mesh(size);
        for (kind, deltas) in changes(size) {
            let mut deltas = deltas.iter().cycle();
            group.bench_function(BenchmarkId::new(kind, size), |b| {
                b.iter_batched(
                    || deltas.next().expect("a cycle").clone(),
                    |delta| writer.apply(delta),
                    BatchSize::SmallInput,
                );
            });
        }
    }
}

/// Measures the time from a change to the end of the re-check of all open connections.
fn recheck(c: &mut Criterion) {
    let mut group = c.benchmark_group("recheck");
    for size in SIZES {
        let (writer, reader) = mesh(size);
        let authorizer = Authorizer::new(reader.clone());
        let pods: Vec<_> = (0..PODS.min(size)).map(|of| pod(of, size)).collect();
        let permits = (0..PERMITS).zip(pods.iter().cycle()).map(|(_, pod)| {
            let permit = authorizer.authorize(inbound(&reader, pod));
            permit.expect("it may").revoked
        });
        let _permits: Vec<Revoked> = permits.collect();
        let mut watching = pin!(authorizer.clone().watch());
        let mut change = |delta: Delta| {
            writer.apply(delta);
            black_box(watching.as_mut().now_or_never());
        };
        let [(_, other), _, _] = changes(size);
        let mut other = other.iter().cycle();
        group.bench_function(BenchmarkId::new("nobody's", size), |b| {
            b.iter_batched(
                || other.next().expect("a cycle").clone(),
                &mut change,
                BatchSize::SmallInput,
            );
        });
        let one = [&["ns-1"][..], &["ns-1", "ns-2"]]
            .map(|from| Delta::of(Vec::new(), Vec::new(), vec![policy(0, from)]));
        let mut one = one.iter().cycle();
        group.bench_function(BenchmarkId::new("one pod's", size), |b| {
            b.iter_batched(
                || one.next().expect("a cycle").clone(),
                &mut change,
                BatchSize::SmallInput,
            );
        });
    }
}

criterion_group!(benches, lookup, authorize, apply, recheck);
criterion_main!(benches);

//! Where a connection goes, as a pure function of one snapshot of the mesh.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use rand::Rng;

use super::mesh::{Mesh, MeshReader};
use super::service::{Scope, Service};
use super::workload::{Protocol, Workload};
use super::{Accepted, Direction, Hop, ResolveError, Resolved};
use crate::hbone;
use crate::identity::Identity;

#[cfg(test)]
mod tests;

/// Ports of the agent's own in a pod.
const OWN: [u16; 3] = [hbone::OUTBOUND_PORT, hbone::INBOUND_PORT, hbone::PORT];

/// Finds out who each end of a connection is and where it goes, in the mesh as it is now.
///
/// # Errors
/// It goes nowhere; the connection is given back.
pub fn resolve<I>(
    mesh: &MeshReader,
    accepted: Accepted<I>,
) -> Result<Resolved<I>, (Accepted<I>, ResolveError)> {
    let mesh = mesh.current();
    let found = match &accepted.direction {
        Direction::Outbound => outbound(&mesh, &accepted),
        Direction::InboundPlain | Direction::InboundHbone { .. } => inbound(&mesh, &accepted),
    };
    match found {
        Ok(Found {
            source,
            target,
            service,
            hop,
        }) => Ok(Resolved {
            accepted,
            mesh,
            source,
            target,
            service,
            hop,
        }),
        Err(error) => Err((accepted, error)),
    }
}

struct Found {
    source: Option<Arc<Workload>>,
    target: Option<Arc<Workload>>,
    service: Option<Arc<Service>>,
    hop: Hop,
}

fn inbound<I>(mesh: &Mesh, accepted: &Accepted<I>) -> Result<Found, ResolveError> {
    let to = accepted.destination;
    if !accepted.pod.owns(to.ip()) {
        let pod = accepted.pod.addresses.first().copied().unwrap_or(to.ip());
        return Err(ResolveError::IpMismatch {
            pod,
            asked: to.ip(),
        });
    }
    if OWN.contains(&to.port()) {
        return Err(ResolveError::SelfCall);
    }
    let target = local(mesh, accepted)?;
    let service = match &accepted.direction {
        Direction::InboundHbone {
            service: Some(asked),
            ..
        } => target
            .services
            .keys()
            .filter_map(|key| mesh.service(key))
            .find(|service| *service.hostname == **asked)
            .cloned(),
        _ => None,
    };
    let service = service.or_else(|| service_by_port(mesh, &target, to.port()));
    Ok(Found {
        source: mesh.workload_at(accepted.peer.ip()).cloned(),
        target: Some(target),
        service,
        hop: Hop::App(to),
    })
}

fn outbound<I>(mesh: &Mesh, accepted: &Accepted<I>) -> Result<Found, ResolveError> {
    let to = accepted.destination;
    // The kernel takes neither loopback nor the pod's own addresses. Somebody in the pod connected
    // to the listener itself, on whichever port it is, and would come back to it for ever.
    let ip = to.ip().to_canonical();
    if ip.is_loopback() || accepted.pod.owns(ip) {
        return Err(ResolveError::SelfCall);
    }
    let source = local(mesh, accepted)?;
    if let Some(service) = mesh.service_at(to.ip()) {
        if let Some(waypoint) = &service.waypoint {
            return Err(ResolveError::UnknownWaypoint(waypoint.clone()));
        }
        let (target, port) =
            choose(mesh, service, &source, to).ok_or(ResolveError::NoHealthyUpstream(to))?;
        let hop = next(&target, port, to.ip(), &service.subject_alt_names)?;
        return Ok(Found {
            source: Some(source),
            target: Some(target),
            service: Some(Arc::clone(service)),
            hop,
        });
    }
    let Some(target) = mesh.workload_at(to.ip()).cloned() else {
        return Ok(Found {
            source: Some(source),
            target: None,
            service: None,
            hop: Hop::Plain(to),
        });
    };
    if let Some(waypoint) = &target.waypoint {
        return Err(ResolveError::UnknownWaypoint(waypoint.clone()));
    }
    let hop = next(&target, to.port(), to.ip(), &[])?;
    Ok(Found {
        source: Some(source),
        target: Some(target),
        service: None,
        hop,
    })
}

/// The pod as the mesh knows it. By its uid: an address may have been another pod's before.
fn local<I>(mesh: &Mesh, accepted: &Accepted<I>) -> Result<Arc<Workload>, ResolveError> {
    let pod = &accepted.pod;
    let found = mesh
        .workload(&pod.uid)
        .filter(|found| found.identity() == pod.identity);
    found
        .cloned()
        .ok_or_else(|| ResolveError::UnknownLocal(pod.uid.clone()))
}

/// The hop to a workload's port; at an address of the family that was asked for, if it has one.
fn next(
    target: &Arc<Workload>,
    port: u16,
    asked: IpAddr,
    names: &[Arc<str>],
) -> Result<Hop, ResolveError> {
    let of_family = |address: &&IpAddr| address.is_ipv4() == asked.is_ipv4();
    let address = target
        .addresses
        .iter()
        .find(|address| **address == asked)
        .or_else(|| target.addresses.iter().find(of_family))
        .or_else(|| target.addresses.first());
    let Some(&address) = address else {
        return Err(ResolveError::NoAddress(target.uid.clone()));
    };
    let authority = SocketAddr::new(address, port);
    match target.protocol {
        Protocol::Tcp => Ok(Hop::Plain(authority)),
        Protocol::Hbone => {
            let mut expected = vec![target.identity()];
            // One that is not an identity could not be presented either.
            expected.extend(
                names
                    .iter()
                    .filter_map(|name| name.parse::<Identity>().ok()),
            );
            Ok(Hop::Hbone {
                to: SocketAddr::new(address, hbone::PORT),
                authority,
                target: Arc::clone(target),
                expected,
            })
        }
    }
}

/// One endpoint of a service and its port, at random by weight among those that are preferred.
fn choose(
    mesh: &Mesh,
    service: &Service,
    source: &Workload,
    to: SocketAddr,
) -> Option<(Arc<Workload>, u16)> {
    let candidates = candidates(mesh, service, source, to.port());
    let total: u64 = candidates
        .iter()
        .map(|(workload, _)| u64::from(workload.capacity))
        .sum();
    if total == 0 {
        return None;
    }
    let mut drawn = rand::rng().random_range(0..total);
    for (workload, port) in candidates {
        let weight = u64::from(workload.capacity);
        if drawn < weight {
            return Some((Arc::clone(workload), port));
        }
        drawn -= weight;
    }
    None
}

/// Endpoints that take load, with the port that each has for the service's one.
fn candidates<'a>(
    mesh: &'a Mesh,
    service: &Service,
    source: &Workload,
    port: u16,
) -> Vec<(&'a Arc<Workload>, u16)> {
    let Some(&target) = service.ports.get(&port) else {
        return Vec::new();
    };
    let key = service.key();
    let able = mesh.endpoints(service).iter().filter_map(|workload| {
        let own = workload.services.get(key.as_str())?.get(&port).copied();
        let port = own.filter(|&port| port != 0).unwrap_or(target);
        let healthy = workload.healthy || service.publish_not_ready;
        (healthy && port != 0 && !workload.addresses.is_empty()).then_some((workload, port))
    });
    let preferences = &service.load_balancing.preferences;
    let ranked: Vec<(usize, &Arc<Workload>, u16)> = able
        .map(|(workload, port)| (common(preferences, source, workload), workload, port))
        .filter(|(rank, ..)| !service.load_balancing.strict || *rank == preferences.len())
        .collect();
    let best = ranked.iter().map(|(rank, ..)| *rank).max().unwrap_or(0);
    ranked
        .into_iter()
        .filter(|(rank, ..)| *rank == best)
        .map(|(_, workload, port)| (workload, port))
        .collect()
}

/// How many scopes two workloads share, from the widest on.
fn common(scopes: &[Scope], one: &Workload, other: &Workload) -> usize {
    let shared = |scope: &&Scope| match scope {
        Scope::Region => one.locality.region == other.locality.region,
        Scope::Zone => one.locality.zone == other.locality.zone,
        Scope::Subzone => one.locality.subzone == other.locality.subzone,
        Scope::Node => one.node == other.node,
        Scope::Cluster => one.cluster_id == other.cluster_id,
        Scope::Network => one.network == other.network,
    };
    scopes.iter().take_while(shared).count()
}

/// A service of the workload that has this port as a target; for logs.
fn service_by_port(mesh: &Mesh, workload: &Workload, port: u16) -> Option<Arc<Service>> {
    workload.services.iter().find_map(|(key, ports)| {
        let service = mesh.service(key)?;
        let by_endpoint = ports.values().any(|&target| target == port);
        let by_service = service.ports.values().any(|&target| target == port);
        (by_endpoint || by_service).then(|| Arc::clone(service))
    })
}

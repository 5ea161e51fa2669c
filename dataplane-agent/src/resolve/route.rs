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
    // A tunnel is for the address that it came to: of another family the app would see itself as
    // its client.
    let (pod, meant) = match &accepted.direction {
        Direction::InboundHbone { at, .. } => (*at, *at == to.ip()),
        _ => {
            let own = accepted.pod.addresses();
            (own.first().copied().unwrap_or(to.ip()), true)
        }
    };
    if !meant || !accepted.pod.owns(to.ip()) {
        return Err(ResolveError::IpMismatch {
            pod,
            asked: to.ip(),
        });
    }
    if OWN.contains(&to.port()) || accepted.pod.ports.contains(&to.port()) {
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
    let itself = accepted.peer.ip().to_canonical() == ip;
    if ip.is_loopback() || accepted.pod.owns(ip) || itself {
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
    if let Some(waypoint) = &target.waypoint
        && !is_waypoint(mesh, waypoint, &source, accepted.peer.ip())
    {
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
    found.cloned().ok_or_else(|| {
        let account = pod.identity.service_account();
        let who = format!("{account}.{} ({})", pod.namespace, pod.name);
        ResolveError::UnknownLocal(who.into())
    })
}

/// Whether `source`, which connects from `address`, is that waypoint: what it has let through goes
/// on to the workload. By identity and by address, as others may have the same service account.
fn is_waypoint(mesh: &Mesh, waypoint: &str, source: &Workload, address: IpAddr) -> bool {
    let address = address.to_canonical();
    let is_source = |pod: &Arc<Workload>| {
        let own = pod
            .addresses
            .iter()
            .any(|own| own.to_canonical() == address);
        own && pod.identity() == source.identity()
    };
    let serves = |service: &Arc<Service>| mesh.endpoints(service).iter().any(is_source);
    match waypoint.split_once('/') {
        Some((network, name)) => match name.parse::<IpAddr>() {
            Ok(_) if *network != *source.network => false,
            Ok(at) => match mesh.service_at(at) {
                Some(service) => serves(service),
                None => mesh.workload_at(at).is_some_and(is_source),
            },
            Err(_) => mesh.service(waypoint).is_some_and(serves),
        },
        None => false,
    }
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
        .filter(|(common, ..)| !service.load_balancing.strict || *common == preferences.len())
        .map(|(common, workload, port)| {
            // One on the own network is nearer than any other, whatever else they share.
            let own = preferences.first() == Some(&Scope::Network)
                && Scope::Network.shared(source, workload);
            let rank = if own {
                common + preferences.len() - 1
            } else {
                common
            };
            (rank, workload, port)
        })
        .collect();
    let best = ranked.iter().map(|(rank, ..)| *rank).max().unwrap_or(0);
    ranked
        .into_iter()
        .filter(|(rank, ..)| *rank == best)
        .map(|(_, workload, port)| (workload, port))
        .collect()
}

/// How many scopes two workloads share, from the widest on. Only a network that comes first and is
/// another one does not end the count: of what is far, the nearest is preferred still.
fn common(scopes: &[Scope], one: &Workload, other: &Workload) -> usize {
    let counted = match scopes {
        [Scope::Network, rest @ ..] if !Scope::Network.shared(one, other) => rest,
        all => all,
    };
    let shared = |scope: &&Scope| scope.shared(one, other);
    counted.iter().take_while(shared).count()
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

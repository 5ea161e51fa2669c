//! Routes a connection, as a pure function of one snapshot of the mesh.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use dataplane_ebpf::listener::ListenerKind;

use super::{Accepted, Direction, Hop, ResolveError, Resolved};
use crate::mesh::workload::Protocol;
use crate::mesh::{Destination, Identity, Mesh, MeshReader, Service, Workload};
use crate::proxy::hbone;

#[cfg(test)]
mod tests;

/// Finds who each end of a connection is and where it goes, in the current mesh.
///
/// # Errors
/// The connection has no next hop; it is given back.
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
        Ok(Route {
            source,
            target,
            service,
            hop,
        }) => Ok(Resolved {
            accepted,
            source,
            target,
            service,
            hop,
        }),
        Err(error) => Err((accepted, error)),
    }
}

struct Route {
    source: Option<Arc<Workload>>,
    target: Option<Arc<Workload>>,
    service: Option<Arc<Service>>,
    hop: Hop,
}

fn inbound<I>(mesh: &Mesh, accepted: &Accepted<I>) -> Result<Route, ResolveError> {
    let to = accepted.destination;
    // A tunnel is only for the address that it came to: with another family the app would see itself as its client.
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
    let is_own = |kind: ListenerKind| kind.port() == to.port();
    if ListenerKind::ALL.into_iter().any(is_own) || accepted.pod.ports.contains(&to.port()) {
        return Err(ResolveError::SelfCall);
    }
    let target = local(mesh, accepted)?;
    if let Some(what) = &target.unsupported {
        return Err(ResolveError::Unsupported(what.clone()));
    }
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
    Ok(Route {
        source: mesh
            .workload_at(&target.network, accepted.peer.ip())
            .cloned(),
        target: Some(target),
        service,
        hop: Hop::App(to),
    })
}

fn outbound<I>(mesh: &Mesh, accepted: &Accepted<I>) -> Result<Route, ResolveError> {
    let to = accepted.destination;
    // The kernel captures neither loopback nor the pod's own addresses. So somebody in the pod connected to the
    // listener itself, whatever its port, and the connection would come back to it for ever.
    let ip = to.ip().to_canonical();
    let itself = accepted.peer.ip().to_canonical() == ip;
    if ip.is_loopback() || accepted.pod.owns(ip) || itself {
        return Err(ResolveError::SelfCall);
    }
    let source = local(mesh, accepted)?;
    let (target, service, hop) = match mesh.destination(&source, to) {
        None => (None, None, Hop::Plain(to)),
        Some(Destination::Workload(target)) => {
            if let Some(waypoint) = &target.waypoint
                && !is_waypoint(mesh, waypoint, &source, accepted.peer.ip())
            {
                return Err(ResolveError::UnknownWaypoint(waypoint.clone()));
            }
            let hop = next(target, to.port(), to.ip(), None)?;
            (Some(Arc::clone(target)), None, hop)
        }
        Some(Destination::Service(service)) => by_service(mesh, service, &source, to, false)?,
        Some(Destination::External(service)) => by_service(mesh, service, &source, to, true)?,
        Some(Destination::Range(service)) => {
            let what = format!("range of addresses of {}", service.key());
            return Err(ResolveError::Unsupported(what.into()));
        }
    };
    Ok(Route {
        source: Some(source),
        target,
        service,
        hop,
    })
}

type Next = (Option<Arc<Workload>>, Option<Arc<Service>>, Hop);

/// Routes to one of a service's endpoints. `external`: the client used an address of the service from outside the
/// cluster.
fn by_service(
    mesh: &Mesh,
    service: &Arc<Service>,
    source: &Workload,
    to: SocketAddr,
    external: bool,
) -> Result<Next, ResolveError> {
    if !service.is_visible_to(&source.namespace) {
        return Err(ResolveError::NotVisible(to));
    }
    if let Some(waypoint) = &service.waypoint {
        return Err(ResolveError::UnknownWaypoint(waypoint.clone()));
    }
    if let Some(what) = &service.unsupported {
        return Err(ResolveError::Unsupported(what.clone()));
    }
    let Some((target, port)) = draw(mesh, service, source, to.port(), external) else {
        return Err(nobody(mesh, service, source, to));
    };
    let hop = next(target, port, to.ip(), Some(service))?;
    Ok((Some(Arc::clone(target)), Some(Arc::clone(service)), hop))
}

/// Returns why no endpoint takes a connection to a service.
fn nobody(mesh: &Mesh, service: &Service, source: &Workload, to: SocketAddr) -> ResolveError {
    let found = mesh
        .endpoints(service)
        .and_then(|all| all.elsewhere(&source.network));
    match found.filter(|_| service.ports.contains_key(&to.port())) {
        None => ResolveError::NoHealthyUpstream(to),
        Some(endpoint) => match &endpoint.network_gateway {
            Some(gateway) => ResolveError::Unsupported(
                format!("double HBONE by network gateway {gateway}").into(),
            ),
            None => ResolveError::NoAddress(endpoint.uid.clone()),
        },
    }
}

/// Returns the pod's workload. It is found by uid, since an address may have been another pod's before.
fn local<I>(mesh: &Mesh, accepted: &Accepted<I>) -> Result<Arc<Workload>, ResolveError> {
    let pod = &accepted.pod;
    let found = mesh.workload_as(&pod.uid, &pod.identity);
    found.cloned().ok_or_else(|| {
        let account = pod.identity.service_account();
        let who = format!("{account}.{} ({})", pod.namespace, pod.name);
        ResolveError::UnknownLocal(who.into())
    })
}

/// Returns true if `source`, which connects from `address`, is that waypoint: connections that it has let through go
/// on to the workload. It is asked of the source itself, as others may have the same service account, and may have had
/// the same address; and it takes no time by their number.
fn is_waypoint(mesh: &Mesh, waypoint: &str, source: &Workload, address: IpAddr) -> bool {
    let address = address.to_canonical();
    let mut own = source.addresses.iter().map(IpAddr::to_canonical);
    if !own.any(|own| own == address) {
        return false;
    }
    let serves = |service: &Arc<Service>| source.services.contains_key(service.key().as_str());
    match waypoint.split_once('/') {
        Some((network, name)) => match name.parse::<IpAddr>() {
            Ok(at) => match mesh.workload_at(network, at) {
                Some(workload) => workload.uid == source.uid,
                // If several services have the address, nobody knows which one is meant.
                None => match mesh.services_at(network, at) {
                    [service] => serves(service),
                    _ => false,
                },
            },
            Err(_) => mesh.service(waypoint).is_some_and(serves),
        },
        None => false,
    }
}

/// Returns the hop to a workload's port. It uses an address of the requested family if the workload has one and the
/// service allows it.
fn next(
    target: &Arc<Workload>,
    port: u16,
    asked: IpAddr,
    service: Option<&Service>,
) -> Result<Hop, ResolveError> {
    let allowed = |address: &&IpAddr| service.is_none_or(|service| service.allows(address));
    let addresses = || target.addresses.iter().filter(allowed);
    let address = addresses()
        .find(|address| **address == asked)
        .or_else(|| addresses().find(|address| address.is_ipv4() == asked.is_ipv4()))
        .or_else(|| addresses().next());
    let Some(&address) = address else {
        return Err(ResolveError::NoAddress(target.uid.clone()));
    };
    let authority = SocketAddr::new(address, port);
    match target.protocol {
        Protocol::Tcp => Ok(Hop::Plain(authority)),
        Protocol::Hbone => {
            let mut expected = vec![target.identity()];
            // A name that is not an identity could not be presented either.
            let names = service.map_or(&[][..], |service| &service.subject_alt_names);
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

/// Picks an endpoint that takes load on a port: of the healthiest the nearest, of these one at random by weight.
/// Returns it with its port for the service's port.
fn draw<'a>(
    mesh: &'a Mesh,
    service: &Service,
    source: &Workload,
    port: u16,
    external: bool,
) -> Option<(&'a Arc<Workload>, u16)> {
    let target = *service.ports.get(&port)?;
    let key = service.key();
    let port_of = |workload: &Workload| {
        let own = workload.services.get(key.as_str())?.ports.get(&port);
        let port = own.copied().filter(|&port| port != 0).unwrap_or(target);
        (port != 0).then_some(port)
    };
    // A client of an address from outside is not bound to its node (as with kube-proxy).
    let near = service.load_balancing.strict && !external;
    mesh.endpoints(service)?.draw(source, near, port_of)
}

/// Returns a service of the workload that has this target port; for logs.
fn service_by_port(mesh: &Mesh, workload: &Workload, port: u16) -> Option<Arc<Service>> {
    workload.services.iter().find_map(|(key, endpoint)| {
        let service = mesh.service(key)?;
        let by_endpoint = endpoint.ports.values().any(|&target| target == port);
        let by_service = service.ports.values().any(|&target| target == port);
        (by_endpoint || by_service).then(|| Arc::clone(service))
    })
}

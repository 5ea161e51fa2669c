//! The path of one connection: accept → resolve → authorize → transport, with one record for each connection.
//! This is the only file that knows the order.

use std::net::{self, SocketAddr};
use std::sync::Arc;

use dataplane_ebpf::listener::ListenerKind;
use tokio::net::TcpStream;

use crate::drain::TaskGroup;
use crate::mesh::MeshReader;
use crate::observe::{Arrival, ConnectionInfo, Failure, Observer, Reporter};
use crate::proxy::accept::hbone::{self as tunnels, AcceptError};
use crate::proxy::accept::{Accepted, Direction, Io, LocalPod};
use crate::proxy::authorize::Authorizer;
use crate::proxy::hbone;
use crate::proxy::identity::Certs;
use crate::proxy::limits::{NodePlaces, Place, Turns};
use crate::proxy::resolve::{self, Hop, Resolved};
use crate::proxy::transport::{Carried, Carrier, carry};
use crate::sys::socket::canonical;

/// The inputs of the path, on one worker.
#[derive(Clone, Debug)]
pub struct ProxyInputs {
    /// The mesh, for `resolve`.
    pub mesh: MeshReader,
    /// Policy, for `authorize`.
    pub authorizer: Authorizer,
    /// Connections to next hops, for `transport`.
    pub carrier: Carrier,
    /// The certificates of this node's pods.
    pub certs: Certs,
    /// The observer, which makes metrics and access logs.
    pub observer: Observer,
    /// The node's connection limit.
    pub places: NodePlaces,
}

/// A TCP connection that has a place and of which nothing was read. It is not bound to a worker yet.
#[derive(Debug)]
pub struct Admitted {
    tcp: net::TcpStream,
    arrival: Arrival,
    place: Placed,
}

/// The place of a connection, by its listener.
#[derive(Debug)]
enum Placed {
    Outbound(Place),
    InClear(Place),
    /// Only a handshake's place, until the peer is authenticated.
    Hbone(Turns),
}

/// Takes a place for a connection; an outbound one may close idle tunnels of the pod for it. Refuses and records a
/// connection for which there is no place.
pub async fn admit(
    inputs: &ProxyInputs,
    pod: &LocalPod,
    kind: ListenerKind,
    tcp: net::TcpStream,
) -> Option<Admitted> {
    // A connection that is already gone has no addresses, and needs no record.
    let (peer, local) = (tcp.peer_addr().ok()?, tcp.local_addr().ok()?);
    let (peer, local) = (canonical(peer), canonical(local));
    let reporter = match kind {
        ListenerKind::Outbound => Reporter::Source,
        ListenerKind::Inbound | ListenerKind::Hbone => Reporter::Destination,
    };
    let arrival = inputs.observer.arrived(peer, local, reporter);
    let places = &inputs.places;
    let place = match kind {
        ListenerKind::Outbound => inputs.carrier.pool.place(pod).await.map(Placed::Outbound),
        ListenerKind::Inbound => {
            let peer = pod.places.peer(None, peer.ip());
            places.take_for(&pod.places, &peer).map(Placed::InClear)
        }
        ListenerKind::Hbone => Ok(Placed::Hbone(places.begin(&pod.handshakes, peer.ip()))),
    };
    match place {
        Ok(place) => Some(Admitted {
            tcp,
            arrival,
            place,
        }),
        Err(full) => {
            arrival.refuse(&AcceptError::Full(full));
            None
        }
    }
}

/// Serves one TCP connection until it ends.
pub async fn serve_connection(
    inputs: ProxyInputs,
    group: TaskGroup,
    pod: Arc<LocalPod>,
    admitted: Admitted,
) {
    let Admitted {
        tcp,
        arrival,
        place,
    } = admitted;
    let tcp = match TcpStream::from_std(tcp) {
        Ok(tcp) => tcp,
        Err(error) => return arrival.refuse(&AcceptError::Watch(error)),
    };
    let (peer, local) = (arrival.src, arrival.dst);
    let (_place, direction) = match place {
        Placed::Hbone(turns) => {
            return serve_tunnel(inputs, group, pod, tcp, arrival, turns).await;
        }
        Placed::Outbound(place) => (place, Direction::Outbound),
        Placed::InClear(place) => (place, Direction::InboundPlain),
    };
    let _connected = match direction {
        Direction::InboundPlain => pod.connected(peer),
        _ => None,
    };
    let accepted = Accepted {
        io: Io::Tcp(tcp),
        pod,
        peer,
        destination: local,
        direction,
    };
    process(&inputs, &group, accepted, arrival, local).await;
}

/// Serves a tunnel; each of its requests is a connection.
async fn serve_tunnel(
    inputs: ProxyInputs,
    group: TaskGroup,
    pod: Arc<LocalPod>,
    tcp: TcpStream,
    arrival: Arrival,
    turns: Turns,
) {
    let (peer, local) = (arrival.src, arrival.dst);
    let places = &inputs.places;
    let handshake = tunnels::handshake(tcp, peer.ip(), &pod, &inputs.certs, turns, places);
    let tunnel = match handshake.await {
        Ok(tunnel) => tunnel,
        Err(error) => return arrival.refuse(&error),
    };
    arrival.is_tunnel();
    let (identity, from) = (tunnel.identity.clone(), tunnel.peer.clone());
    let closing = group.draining();
    tunnel
        .serve(closing, hbone::INBOUND_IDLE_TIMEOUT, |request| {
            let observer = &inputs.observer;
            let mut arrival = observer.arrived(peer, local, Reporter::Destination);
            let accepted = tunnels::accept(request, &pod, (peer, local), &identity);
            let placed = accepted.and_then(|accepted| match places.take_for(&pod.places, &from) {
                Ok(place) => Ok((accepted, place)),
                Err(full) => Err((accepted.io, full.into())),
            });
            match placed {
                Ok((accepted, place)) => {
                    arrival.dst = accepted.destination;
                    let (inputs, in_group) = (inputs.clone(), group.clone());
                    group.spawn(async move {
                        let _place = place;
                        process(&inputs, &in_group, accepted, arrival, local).await;
                    });
                }
                Err((io, error)) => {
                    io.refuse(error.status());
                    arrival.refuse(&error);
                }
            }
        })
        .await;
}

/// Resolves, authorizes and carries one connection. `local` is the local address of the accepted TCP connection.
async fn process(
    inputs: &ProxyInputs,
    group: &TaskGroup,
    accepted: Accepted<Io>,
    arrival: Arrival,
    local: SocketAddr,
) {
    let resolved = match resolve::resolve(&inputs.mesh, accepted) {
        Ok(resolved) => resolved,
        Err((accepted, error)) => {
            arrival.refuse(&error);
            return accepted.io.refuse(error.status());
        }
    };
    let info = connection_info(&resolved, arrival.reporter, local);
    let record = arrival.open(info);
    let permit = match inputs.authorizer.authorize(resolved) {
        Ok(permit) => permit,
        Err((resolved, denied)) => {
            resolved.accepted.io.refuse(denied.status());
            return record.close(Err(&denied));
        }
    };
    let bytes = record.bytes();
    match carry(permit, &inputs.carrier, group, &bytes).await {
        Ok(Carried::Whole) => record.close(Ok(())),
        Ok(Carried::ClientGone) => record.give_up(),
        Err(error) => record.close(Err(&error)),
    }
}

fn connection_info(
    resolved: &Resolved<Io>,
    reporter: Reporter,
    local: SocketAddr,
) -> ConnectionInfo {
    let accepted = &resolved.accepted;
    let (dst_addr, hbone_addr, outbound_tls) = match &resolved.hop {
        Hop::Hbone { to, authority, .. } => (*to, Some(*authority), true),
        Hop::Plain(to) => (*to, None, false),
        Hop::App(to) => match accepted.direction {
            Direction::InboundHbone { .. } => (local, Some(*to), true),
            Direction::InboundPlain | Direction::Outbound => (*to, None, false),
        },
    };
    let source_identity = match &accepted.direction {
        Direction::Outbound => Some(accepted.pod.identity.clone()),
        Direction::InboundPlain => None,
        Direction::InboundHbone { identity, .. } => Some(identity.clone()),
    };
    ConnectionInfo {
        reporter,
        src_addr: accepted.peer,
        source: resolved.source.clone(),
        source_identity,
        dst_addr,
        hbone_addr,
        service: resolved.service.clone(),
        target: resolved.target.clone(),
        mutual_tls: outbound_tls,
    }
}

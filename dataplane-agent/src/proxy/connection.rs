//! One connection from room to room: accept → resolve → authorize → transport, and one record for each connection. The
//! only file that knows the order.

use std::net::{self, SocketAddr};
use std::sync::Arc;

use tokio::net::TcpStream;

use crate::drain::TaskGroup;
use crate::mesh::MeshReader;
use crate::observe::{Arrival, Facts, Failure, Observer, Reporter};
use crate::proxy::accept::hbone::{self as tunnels, AcceptError};
use crate::proxy::accept::{Accepted, Direction, Io, LocalPod};
use crate::proxy::authorize::Authorizer;
use crate::proxy::hbone;
use crate::proxy::identity::Certs;
use crate::proxy::limits::{NodePlaces, Place, Turns};
use crate::proxy::resolve::{self, Hop, Resolved};
use crate::proxy::transport::{Carried, Carrier, carry};
use crate::sys::socket::canonical;

/// The rooms, as one worker walks through them.
#[derive(Clone, Debug)]
pub struct ProxyInputs {
    /// Room 3.
    pub mesh: MeshReader,
    /// Room 4.
    pub authorizer: Authorizer,
    /// Room 5.
    pub carrier: Carrier,
    /// Certificates of pods.
    pub certs: Certs,
    /// Who watches.
    pub observer: Observer,
    /// How many connections there may be.
    pub places: NodePlaces,
}

/// By which of a pod's listeners a connection came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ListenerKind {
    /// The pod connects.
    Outbound,
    /// Somebody connects to the pod in clear.
    Inbound,
    /// Somebody opens a tunnel to the pod.
    Hbone,
}

/// A TCP connection that has a place, and of which nothing was read. It is bound to no worker yet.
#[derive(Debug)]
pub struct Admitted {
    tcp: net::TcpStream,
    arrival: Arrival,
    place: Placed,
}

/// The place of a connection, by how it came.
#[derive(Debug)]
enum Placed {
    Outbound(Place),
    InClear(Place),
    /// Anybody's, until it is known who the peer is.
    Hbone(Turns),
}

/// Gives a connection its place, for which idle tunnels may have to give way; one for which there is none is
/// refused, and told of.
pub async fn admit(
    inputs: &ProxyInputs,
    pod: &LocalPod,
    kind: ListenerKind,
    tcp: net::TcpStream,
) -> Option<Admitted> {
    // A connection that is gone already has no addresses; nobody is left to tell.
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

/// Follows one TCP connection to its end.
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

/// Takes a tunnel's requests, each of which is a connection.
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
        .serve(closing, hbone::UNUSED, |request| {
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

/// Room by room. `local` is what was connected to.
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
    let facts = facts(&resolved, arrival.reporter, local);
    let record = arrival.open(facts);
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

fn facts(resolved: &Resolved<Io>, reporter: Reporter, local: SocketAddr) -> Facts {
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
    Facts {
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

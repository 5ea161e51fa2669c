//! The corridor: accept → resolve → authorize → transport, and one record for each connection. The
//! only file that knows the order.

use std::net::SocketAddr;
use std::sync::Arc;

use http::StatusCode;
use tokio::net::TcpStream;

use crate::accept::hbone::{self as tunnels, AcceptError};
use crate::accept::{Accepted, Direction, Io};
use crate::authorize::{Authorizer, Denied};
use crate::capture::LocalPod;
use crate::drain::Scope;
use crate::identity::{Certs, Identity};
use crate::observe::{Facts, Observer, Reporter};
use crate::resolve::{self, Hop, MeshReader, ResolveError, Resolved};
use crate::sys::socket::canonical;
use crate::transport::{Carrier, carry};

/// The rooms, as one worker walks through them.
#[derive(Clone, Debug)]
pub struct Corridor {
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
}

/// By which of a pod's listeners a connection came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entrance {
    /// The pod connects.
    Outbound,
    /// Somebody connects to the pod in clear.
    Inbound,
    /// Somebody opens a tunnel to the pod.
    Hbone,
}

impl Entrance {
    fn reporter(self) -> Reporter {
        match self {
            Self::Outbound => Reporter::Source,
            Self::Inbound | Self::Hbone => Reporter::Destination,
        }
    }
}

/// Follows one TCP connection to its end.
pub async fn walk(
    corridor: Corridor,
    scope: Scope,
    pod: Arc<LocalPod>,
    entrance: Entrance,
    tcp: TcpStream,
) {
    // A connection that is gone already has no addresses; nobody is left to tell.
    let (Ok(peer), Ok(local)) = (tcp.peer_addr(), tcp.local_addr()) else {
        return;
    };
    let (peer, local) = (canonical(peer), canonical(local));
    let place = Arc::clone(&pod);
    let Ok(_place) = place.connections.try_acquire() else {
        Io::Tcp(tcp).refuse(StatusCode::SERVICE_UNAVAILABLE);
        let reporter = entrance.reporter();
        let error = AcceptError::TooMany;
        return corridor.observer.refused(peer, local, reporter, &error);
    };
    let direction = match entrance {
        Entrance::Hbone => return tunnel(corridor, scope, pod, tcp, peer, local).await,
        Entrance::Outbound => Direction::Outbound,
        Entrance::Inbound => Direction::InboundPlain,
    };
    let _connected = match entrance {
        Entrance::Inbound => pod.connected(peer),
        Entrance::Outbound | Entrance::Hbone => None,
    };
    let accepted = Accepted {
        io: Io::Tcp(tcp),
        pod,
        peer,
        destination: local,
        direction,
    };
    pass(&corridor, &scope, accepted, local).await;
}

/// Takes a tunnel's requests, each of which is a connection.
async fn tunnel(
    corridor: Corridor,
    scope: Scope,
    pod: Arc<LocalPod>,
    tcp: TcpStream,
    peer: SocketAddr,
    local: SocketAddr,
) {
    let refused = |error: &AcceptError| {
        corridor
            .observer
            .refused(peer, local, Reporter::Destination, error);
    };
    let Ok(place) = pod.handshakes.try_acquire() else {
        Io::Tcp(tcp).refuse(StatusCode::SERVICE_UNAVAILABLE);
        return refused(&AcceptError::TooMany);
    };
    let shaken = tunnels::handshake(tcp, &pod, &corridor.certs).await;
    drop(place);
    let tunnel = match shaken {
        Ok(tunnel) => tunnel,
        Err(error) => return refused(&error),
    };
    let identity: Identity = tunnel.identity.clone();
    let closing = scope.closing();
    tunnel
        .serve(closing, |request| {
            match tunnels::accept(request, &pod, (peer, local), &identity) {
                Ok(accepted) => {
                    let (corridor, in_scope) = (corridor.clone(), scope.clone());
                    scope.spawn(async move { pass(&corridor, &in_scope, accepted, local).await });
                }
                Err((io, error)) => {
                    io.refuse(StatusCode::BAD_REQUEST);
                    refused(&error);
                }
            }
        })
        .await;
}

/// Room by room. `local` is what was connected to.
async fn pass(corridor: &Corridor, scope: &Scope, accepted: Accepted<Io>, local: SocketAddr) {
    let reporter = match accepted.direction {
        Direction::Outbound => Entrance::Outbound.reporter(),
        Direction::InboundPlain | Direction::InboundHbone { .. } => Entrance::Inbound.reporter(),
    };
    let resolved = match resolve::resolve(&corridor.mesh, accepted) {
        Ok(resolved) => resolved,
        Err((accepted, error)) => {
            corridor
                .observer
                .refused(accepted.peer, accepted.destination, reporter, &error);
            return accepted.io.refuse(status_of(&error));
        }
    };
    let record = corridor.observer.open(facts(&resolved, reporter, local));
    let permit = match corridor.authorizer.authorize(resolved) {
        Ok(permit) => permit,
        Err((resolved, denied)) => {
            resolved.accepted.io.refuse(status_of_denied(&denied));
            return record.close(Err(&denied));
        }
    };
    let bytes = record.bytes();
    match carry(permit, &corridor.carrier, scope, &bytes).await {
        Ok(()) => record.close(Ok(())),
        Err(error) => record.close(Err(&error)),
    }
}

fn status_of(error: &ResolveError) -> StatusCode {
    match error {
        ResolveError::IpMismatch { .. } => StatusCode::BAD_REQUEST,
        _ => StatusCode::SERVICE_UNAVAILABLE,
    }
}

fn status_of_denied(_: &Denied) -> StatusCode {
    StatusCode::UNAUTHORIZED
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

//! Server side of HBONE: TLS with a peer that shows who it is, and the CONNECT requests in it.

use std::future::poll_fn;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use h2::{Reason, server};
use http::{Method, StatusCode, header, request};
use rustls::server::Acceptor;
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_rustls::LazyConfigAcceptor;
use tokio_rustls::server::TlsStream;

use super::{Accepted, Direction, Io, LocalPod};
use crate::mesh::Identity;
use crate::observe::{Failure, Flag};
use crate::proxy::hbone::keepalive::{self, Health};
use crate::proxy::hbone::payload::Payload;
use crate::proxy::hbone::readahead::ReadAhead;
use crate::proxy::hbone::stream::{Shared, Waiting};
use crate::proxy::hbone::window::Windows;
use crate::proxy::hbone::{self, headers};
use crate::proxy::identity::{Certs, IdentityError, certs, tls};
use crate::proxy::limits::memory::Share;
use crate::proxy::limits::{Full, NodePlaces, Peer, Place, Turns};

#[cfg(test)]
mod tests;

/// How long a peer that was told to open no more may not know it yet.
const HEED: Duration = Duration::from_secs(2);

/// Why a tunnel, or a request in it, is refused.
#[derive(Debug, thiserror::Error)]
pub enum AcceptError {
    /// Its worker cannot watch its socket.
    #[error("cannot take a connection: {0}")]
    Watch(io::Error),
    /// The handshake failed: these are no TLS bytes, or not a peer that we take.
    #[error("tls error: tls handshake error: {0:?}")]
    Tls(io::Error),
    /// The peer did not even begin the handshake.
    #[error("tls error: tls handshake error: \"no client hello in time\"")]
    Silent,
    /// The handshake took too long.
    #[error("tls error: tls handshake error: \"not finished in time\"")]
    Slow,
    /// It was the oldest of a source that has many, and others wanted its place.
    #[error("too many handshakes at once")]
    GaveWay,
    /// There are as many connections as may be.
    #[error(transparent)]
    Full(#[from] Full),
    /// We have no certificate to show.
    #[error("identity error: {0}")]
    Identity(#[from] IdentityError),
    /// HTTP/2 failed.
    #[error("http2 handshake failed: {0}")]
    Handshake(h2::Error),
    /// Not a CONNECT.
    #[error("expected method CONNECT, got {0}")]
    Method(Method),
    /// What to connect to is not an address and a port.
    #[error("invalid CONNECT address {0}")]
    Authority(String),
}

impl Failure for AcceptError {
    fn flag(&self) -> Flag {
        match self {
            Self::Tls(_) | Self::Silent | Self::Slow | Self::GaveWay => Flag::TlsFailure,
            Self::Identity(_) => Flag::IdentityError,
            Self::Handshake(_) => Flag::H2HandshakeFailure,
            Self::Watch(_) | Self::Full(_) | Self::Method(_) | Self::Authority(_) => Flag::Connect,
        }
    }
    fn reason(&self) -> &'static str {
        match self {
            Self::Watch(_) => "watch",
            Self::Tls(_) => "tls",
            Self::Silent => "no_client_hello",
            Self::Slow => "slow_handshake",
            Self::GaveWay => "too_many_handshakes",
            Self::Full(full) => full.reason(),
            Self::Identity(_) => "identity",
            Self::Handshake(_) => "handshake",
            Self::Method(_) => "method",
            Self::Authority(_) => "authority",
        }
    }
    fn status(&self) -> StatusCode {
        match self {
            Self::Full(_) => StatusCode::SERVICE_UNAVAILABLE,
            _ => StatusCode::BAD_REQUEST,
        }
    }
}

/// A tunnel whose peer is known.
pub struct AcceptedTunnel {
    connection: server::Connection<TlsStream<ReadAhead>, Payload>,
    /// Who the peer is.
    pub identity: Identity,
    /// Whose share of places its requests take from.
    pub peer: Peer,
    /// When the first of the two ends' certificates ends: from then on neither is who it was.
    until: SystemTime,
    /// What it may have brought that is not delivered.
    share: Share,
    _place: Place,
}

/// A request that is not refused by its form: pass it on as an [`Accepted`].
pub type Request = (request::Parts, Waiting);

impl std::fmt::Debug for AcceptedTunnel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AcceptedTunnel")
            .field("identity", &self.identity)
            .finish_non_exhaustive()
    }
}

/// Shakes hands in the pod's name with the peer at this address. Until the peer has shown who it is it only has its `turns`; then it
/// takes a place as a connection does.
///
/// # Errors
/// Each step has its own, and all have [`hbone::TIMEOUT`] together, the first message less. It had to
/// give way to others; there is no place for one more tunnel.
pub async fn handshake(
    tcp: TcpStream,
    address: IpAddr,
    pod: &LocalPod,
    certs: &Certs,
    mut turns: Turns,
    places: &NodePlaces,
) -> Result<AcceptedTunnel, AcceptError> {
    let deadline = Instant::now() + hbone::TIMEOUT;
    let share = places.undelivered(&pod.places);
    let (tls, identity, until) = tokio::select! {
        biased;
        () = turns.over() => return Err(AcceptError::GaveWay),
        shown = timeout_at(deadline, authenticate(tcp, &share, pod, certs)) => {
            shown.unwrap_or(Err(AcceptError::Slow))?
        }
    };
    let peer = pod.places.peer(Some(&identity), address);
    let place = places.take_for(&pod.places, &peer)?;
    drop(turns);
    let connection = timeout_at(deadline, hbone::server().handshake(tls))
        .await
        .map_err(|_| AcceptError::Slow)?
        .map_err(AcceptError::Handshake)?;
    Ok(AcceptedTunnel {
        connection,
        identity,
        peer,
        until,
        share,
        _place: place,
    })
}

/// Finishes TLS; who the peer is, and until when.
async fn authenticate(
    tcp: TcpStream,
    share: &Share,
    pod: &LocalPod,
    certs: &Certs,
) -> Result<(TlsStream<ReadAhead>, Identity, SystemTime), AcceptError> {
    let hello = LazyConfigAcceptor::new(Acceptor::default(), ReadAhead::new(tcp, share));
    let hello = timeout(hbone::HELLO, hello)
        .await
        .map_err(|_| AcceptError::Silent)?
        .map_err(AcceptError::Tls)?;
    let certificate = certs.current(&pod.identity).await?;
    let accept = hello.into_stream_with(Arc::clone(&certificate.server), |session| {
        session.set_buffer_limit(Some(hbone::TLS_BUFFER));
    });
    let tls = accept.await.map_err(AcceptError::Tls)?;
    let (_, session) = tls.get_ref();
    if session.alpn_protocol() != Some(hbone::ALPN) {
        let error = io::Error::new(io::ErrorKind::InvalidData, "peer did not choose h2");
        return Err(AcceptError::Tls(error));
    }
    let chain = session.peer_certificates().unwrap_or_default();
    let (identity, end) = (tls::peer_identity(chain)?, certs::end_of(chain)?);
    Ok((tls, identity, end.min(certificate.not_after())))
}

impl AcceptedTunnel {
    /// Hands each request to `take` until the peer leaves. When `closing` completes, when a
    /// certificate of either end has ended, or when the tunnel is `unused` for so long, the peer is told to
    /// open no more (GOAWAY), what runs goes on, and the tunnel is closed when it carries nothing. What a
    /// peer opens that should know by then is refused.
    pub async fn serve(
        mut self,
        closing: impl Future<Output = ()>,
        unused: Duration,
        mut take: impl FnMut(Request),
    ) {
        let health = Health::default();
        let lost = keepalive::lost(self.connection.ping_pong(), &health);
        let (look, mut used) = (sleep(unused), false);
        let ended = certs::ended(self.until);
        let heed = sleep(HEED);
        tokio::pin!(lost, closing, look, ended, heed);
        let shared = Shared::new(&self.share);
        let mut windows = Windows::new(&shared.undelivered);
        let (mut told, mut heeds) = (false, false);
        loop {
            let request = tokio::select! {
                biased;
                () = &mut closing, if !told => None,
                () = &mut ended, if !told => {
                    tracing::debug!(peer = %self.identity, "the tunnel's certificates have ended");
                    None
                }
                () = &mut look, if !told => {
                    if std::mem::take(&mut used) || self.connection.has_streams() {
                        look.as_mut().reset(Instant::now() + unused);
                        continue;
                    }
                    tracing::debug!(peer = %self.identity, "tunnel is not used");
                    None
                }
                // The engine goes by the peer's answer to a PING, which may never come.
                () = &mut heed, if told => {
                    if !self.connection.has_streams() {
                        return;
                    }
                    heeds = true;
                    heed.as_mut().reset(Instant::now() + HEED);
                    continue;
                }
                request = poll_fn(|context| {
                    windows.keep(&mut self.connection, context);
                    self.connection.poll_accept(context)
                }) => match request {
                    Some(Ok(request)) => Some(request),
                    Some(Err(error)) => {
                        tracing::debug!(%error, peer = %self.identity, "tunnel ended");
                        return;
                    }
                    None => return,
                },
                () = &mut lost => {
                    tracing::debug!(peer = %self.identity, "HBONE ping timeout/error");
                    return;
                }
            };
            match request {
                None => {
                    told = true;
                    self.connection.graceful_shutdown();
                    heed.as_mut().reset(Instant::now() + HEED);
                }
                // A good peer may open it elsewhere.
                Some((_, mut respond)) if heeds => respond.send_reset(Reason::REFUSED_STREAM),
                Some((request, respond)) => {
                    used = true;
                    let (parts, body) = request.into_parts();
                    take((parts, Waiting::new(respond, body, &shared)));
                }
            }
        }
    }
}

/// Reads a request. One that is refused by its form is given back, to be answered.
///
/// # Errors
/// It is no CONNECT; what it asks for is not an address and a port.
pub fn accept(
    (parts, waiting): Request,
    pod: &Arc<LocalPod>,
    (peer, at): (SocketAddr, SocketAddr),
    identity: &Identity,
) -> Result<Accepted<Io>, (Io, AcceptError)> {
    let io = Io::Stream(waiting);
    if parts.method != Method::CONNECT {
        return Err((io, AcceptError::Method(parts.method)));
    }
    let authority = parts
        .uri
        .authority()
        .map_or("", |authority| authority.as_str());
    let Some(destination) = headers::authority(authority) else {
        return Err((io, AcceptError::Authority(authority.to_owned())));
    };
    let forwarded = parts.headers.get(header::FORWARDED);
    let service = forwarded
        .and_then(|forwarded| headers::forwarded_host(forwarded.to_str().ok()?))
        .map(Arc::from);
    Ok(Accepted {
        io,
        pod: Arc::clone(pod),
        peer,
        destination,
        direction: Direction::InboundHbone {
            at: at.ip(),
            identity: identity.clone(),
            service,
        },
    })
}

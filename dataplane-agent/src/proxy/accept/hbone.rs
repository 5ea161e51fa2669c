//! Server side of HBONE: TLS with authenticated peers, and the CONNECT requests of their tunnels.

use std::future::poll_fn;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::task::Poll;
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
use crate::proxy::hbone::pace::Paced;
use crate::proxy::hbone::payload::Payload;
use crate::proxy::hbone::readahead::{Ending, ReadAhead, Traffic};
use crate::proxy::hbone::stream::{TunnelState, Waiting};
use crate::proxy::hbone::window::Windows;
use crate::proxy::hbone::{self, headers};
use crate::proxy::identity::{Certs, IdentityError, certs, tls};
use crate::proxy::limits::memory::Share;
use crate::proxy::limits::{Full, NodePlaces, Peer, Place, Turns};

#[cfg(test)]
mod tests;

/// Time after which a peer that was told to open no more streams must know it.
const GOAWAY_GRACE: Duration = Duration::from_secs(2);

/// Why a tunnel, or a request in it, is refused.
#[derive(Debug, thiserror::Error)]
pub enum AcceptError {
    /// The worker cannot watch the socket.
    #[error("cannot take a connection: {0}")]
    Watch(io::Error),
    /// The handshake failed: the bytes are not TLS, or the peer is not accepted.
    #[error("tls error: tls handshake error: {0:?}")]
    Tls(io::Error),
    /// The peer did not begin the handshake in time.
    #[error("tls error: tls handshake error: \"no client hello in time\"")]
    Silent,
    /// The handshake took too long.
    #[error("tls error: tls handshake error: \"not finished in time\"")]
    Slow,
    /// It was the oldest handshake of a source that has many, and gave way to another.
    #[error("too many handshakes at once")]
    GaveWay,
    /// A bound of connections is reached.
    #[error(transparent)]
    Full(#[from] Full),
    /// We have no certificate to show.
    #[error("identity error: {0}")]
    Identity(#[from] IdentityError),
    /// HTTP/2 failed.
    #[error("http2 handshake failed: {0}")]
    Handshake(h2::Error),
    /// The request is not a CONNECT.
    #[error("expected method CONNECT, got {0}")]
    Method(Method),
    /// The authority is not an address and a port.
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

/// A tunnel whose peer is authenticated.
pub struct AcceptedTunnel {
    connection: server::Connection<Paced<TlsStream<ReadAhead>>, Payload>,
    /// The peer's identity.
    pub identity: Identity,
    /// The peer in whose share its requests take places.
    pub peer: Peer,
    /// The time at which the first of the two ends' certificates expires. From then on neither end is authenticated.
    until: SystemTime,
    /// What its streams share.
    shared: TunnelState,
    ending: Ending,
    traffic: Traffic,
    _place: Place,
}

/// How far the end of a tunnel has come.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    /// It takes requests.
    Open,
    /// The peer is told to open no more.
    Told,
    /// The peer must know it.
    Known,
    /// Nothing runs in it, and the peer is to take what was sent.
    Closing,
}

/// What a peer does for which its tunnel takes no more.
enum Abuse {
    /// It gives up too many streams.
    Flood,
    /// It brings more than the pod has memory for.
    Excess,
}

/// A request of a tunnel; [`accept`] reads it.
pub type Request = (request::Parts, Waiting);

impl std::fmt::Debug for AcceptedTunnel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AcceptedTunnel")
            .field("identity", &self.identity)
            .finish_non_exhaustive()
    }
}

/// Does the handshake in the pod's name with the peer at this address. An unauthenticated peer only has its `turns`;
/// then it takes a place as a connection does.
///
/// # Errors
/// Each step has its own error. All have [`hbone::CONNECT_TIMEOUT`] together, the first message less. The handshake may also
/// have to give way to others, or there is no place for one more tunnel.
pub async fn handshake(
    tcp: TcpStream,
    address: IpAddr,
    pod: &LocalPod,
    certs: &Certs,
    mut turns: Turns,
    places: &NodePlaces,
) -> Result<AcceptedTunnel, AcceptError> {
    let deadline = Instant::now() + hbone::CONNECT_TIMEOUT;
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
    let socket = tls.get_ref().0;
    let (ending, traffic) = (socket.ending(), socket.traffic());
    let shared = TunnelState::new(&share);
    let connection = timeout_at(deadline, hbone::server(tls, &shared))
        .await
        .map_err(|_| AcceptError::Slow)?
        .map_err(AcceptError::Handshake)?;
    Ok(AcceptedTunnel {
        connection,
        identity,
        peer,
        until,
        shared,
        ending,
        traffic,
        _place: place,
    })
}

/// Finishes TLS. Returns the peer's identity, and when the first of the two certificates expires.
async fn authenticate(
    tcp: TcpStream,
    share: &Share,
    pod: &LocalPod,
    certs: &Certs,
) -> Result<(TlsStream<ReadAhead>, Identity, SystemTime), AcceptError> {
    let hello = LazyConfigAcceptor::new(Acceptor::default(), ReadAhead::new(tcp, share));
    let hello = timeout(hbone::CLIENT_HELLO_TIMEOUT, hello)
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
    /// Passes each request to `take` until the peer leaves. When `closing` completes, when a certificate of either
    /// end has expired, or when the tunnel was `unused` for that time, the peer is told to open no more streams
    /// (GOAWAY), open ones go on, and the tunnel is closed when it carries nothing and the peer has taken what was
    /// sent. Streams of a peer that should know of it by then are refused.
    pub async fn serve(
        mut self,
        closing: impl Future<Output = ()>,
        unused: Duration,
        mut take: impl FnMut(Request),
    ) {
        let health = Health::default();
        let traffic = self.traffic.clone();
        let lost = keepalive::lost(self.connection.ping_pong(), &health, || traffic.moved());
        let (look, mut used) = (sleep(unused), false);
        let ended = certs::ended(self.until);
        let heed = sleep(GOAWAY_GRACE);
        tokio::pin!(lost, closing, look, ended, heed);
        let mut windows = Windows::new(&self.shared.undelivered);
        let mut phase = Phase::Open;
        loop {
            let request = tokio::select! {
                biased;
                () = &mut closing, if phase == Phase::Open => None,
                () = &mut ended, if phase == Phase::Open => {
                    tracing::debug!(peer = %self.identity, "the tunnel's certificates have ended");
                    None
                }
                () = &mut look, if phase == Phase::Open => {
                    if std::mem::take(&mut used) || self.connection.has_streams() {
                        look.as_mut().reset(Instant::now() + unused);
                        continue;
                    }
                    tracing::debug!(peer = %self.identity, "tunnel is not used");
                    None
                }
                () = &mut heed, if phase == Phase::Told || phase == Phase::Known => {
                    if self.connection.has_streams() {
                        phase = Phase::Known;
                        heed.as_mut().reset(Instant::now() + GOAWAY_GRACE);
                    } else {
                        // The engine waits for the peer's answer to a PING, which may never come.
                        phase = Phase::Closing;
                        self.close(Reason::NO_ERROR);
                    }
                    continue;
                }
                request = poll_fn(|context| {
                    if phase < Phase::Closing && self.shared.is_excess() {
                        return Poll::Ready(Err(Abuse::Excess));
                    }
                    if phase == Phase::Open && self.shared.is_flood() {
                        return Poll::Ready(Err(Abuse::Flood));
                    }
                    windows.keep(&mut self.connection, context);
                    self.connection.poll_accept(context).map(Ok)
                }) => match request {
                    Ok(Some(Ok(request))) => Some(request),
                    Ok(Some(Err(error))) => {
                        tracing::debug!(%error, peer = %self.identity, "tunnel ended");
                        return;
                    }
                    Ok(None) => return,
                    Err(Abuse::Flood) => {
                        tracing::warn!(peer = %self.identity, "tunnel takes no more streams: its peer gives up too many");
                        None
                    }
                    Err(Abuse::Excess) => {
                        tracing::warn!(peer = %self.identity, "tunnel ended: it brings more than the pod has memory for");
                        phase = Phase::Closing;
                        self.close(Reason::ENHANCE_YOUR_CALM);
                        continue;
                    }
                },
                () = &mut lost, if phase < Phase::Closing => {
                    tracing::debug!(peer = %self.identity, "HBONE ping timeout/error");
                    if self.connection.has_streams() {
                        return;
                    }
                    phase = Phase::Closing;
                    self.close(Reason::NO_ERROR);
                    continue;
                }
            };
            match request {
                None => {
                    phase = Phase::Told;
                    self.connection.graceful_shutdown();
                    heed.as_mut().reset(Instant::now() + GOAWAY_GRACE);
                }
                // A correct peer may open it elsewhere.
                Some((_, mut respond)) if phase > Phase::Told => {
                    respond.send_reset(Reason::REFUSED_STREAM);
                }
                Some((request, respond)) => {
                    used = true;
                    let (parts, body) = request.into_parts();
                    take((parts, Waiting::new(respond, body, &self.shared)));
                }
            }
        }
    }

    /// Closes the tunnel, which carries nothing or is to carry nothing any more: the engine writes what it still has, and
    /// waits until the peer has taken it. The engine has then no more PINGs, which in any case wait behind what the peer
    /// has not taken.
    fn close(&mut self, reason: Reason) {
        self.connection.abrupt_shutdown(reason);
        self.ending.set();
    }
}

/// Reads a request. An invalid one is given back, to be answered.
///
/// # Errors
/// It is no CONNECT, or its authority is not an address and a port.
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

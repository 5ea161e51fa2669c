//! Client side of HBONE: opens tunnels, and CONNECT streams in them.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::SystemTime;

use h2::client::{ResponseFuture, SendRequest};
use h2::{RecvStream, SendStream};
use http::{HeaderValue, Method, Request, Response, StatusCode, Uri, header};
use rustls_pki_types::{IpAddr, Ipv4Addr, ServerName};
use tokio::time::{Instant, sleep, timeout};

use super::pool::TunnelKey;
use super::{Connector, TransportError};
use crate::drain::TaskGroup;
use crate::proxy::authorize::LocalPod;
use crate::proxy::hbone::keepalive::{self, Health};
use crate::proxy::hbone::payload::Payload;
use crate::proxy::hbone::readahead::ReadAhead;
use crate::proxy::hbone::stream::{Stream, TunnelState};
use crate::proxy::hbone::window::Windows;
use crate::proxy::hbone::{self, headers};
use crate::proxy::identity::certs;
use crate::proxy::limits::{Idle, IdleTunnels, Place};

/// The content of a CONNECT request.
#[derive(Clone, Debug)]
pub struct ConnectRequest {
    /// The address and port of the destination pod, or those that the waypoint is to resolve.
    pub authority: SocketAddr,
    /// The client.
    pub client: SocketAddr,
    /// The service that the client asked for.
    pub host: Option<Arc<str>>,
    /// The client's workload, in the words of [`headers::baggage`].
    pub baggage: Option<String>,
}

/// A tunnel to one peer.
#[derive(Debug)]
pub struct ClientTunnel {
    /// `None` once the tunnel is closed: the connection ends when nobody holds this.
    send: RefCell<Option<SendRequest<Payload>>>,
    shared: TunnelState,
    health: Rc<Health>,
    streams: Cell<usize>,
    /// True if it is no longer used for new streams.
    pub(super) closed: Cell<bool>,
    /// The time at which the first of the two ends' certificates expires. From then on neither end is authenticated,
    /// and new streams go elsewhere.
    until: SystemTime,
    /// True if it is to be closed when it carries nothing.
    leaving: Cell<bool>,
    /// The time at which the last stream ended.
    pub(super) idle_since: Cell<Instant>,
    /// Its place among the pod's connections. It is a field before `idle`, so that it is given back before the tunnel
    /// stops being counted as idle.
    _place: Place,
    idle: RefCell<Option<Idle>>,
    idle_tunnels: IdleTunnels,
}

/// Why a stream was not opened.
#[derive(Debug)]
pub enum OpenError {
    /// The tunnel is unusable, and no byte of the connection was sent: try another tunnel.
    Tunnel(TransportError),
    /// Anything else.
    Final(TransportError),
}

/// Connects, shakes hands, and leaves a task in `group` that drives the tunnel.
///
/// # Errors
/// Each step has its own errors and its own time limit.
pub async fn dial(
    connector: &dyn Connector,
    pod: &LocalPod,
    key: &TunnelKey,
    place: Place,
    group: &TaskGroup,
) -> Result<Rc<ClientTunnel>, TransportError> {
    let TunnelKey { to, expected, .. } = key;
    let (to, tls) = (*to, connector.client_tls(pod, expected));
    let (tls, own_end) = tls
        .await
        .map_err(|error| TransportError::Identity(error.into()))?;
    let tcp = super::plain::to_peer(connector, pod, key.from, to)
        .await
        .map_err(|error| match error {
            TransportError::Connect(error) if error.kind() == io::ErrorKind::TimedOut => {
                TransportError::Blocked(error)
            }
            error => error,
        })?;
    // The name is not used: SNI is off, and peers are known by their identity.
    let nobody = ServerName::IpAddress(IpAddr::V4(Ipv4Addr::from([0, 0, 0, 0])));
    let share = connector.undelivered(pod);
    let shared = TunnelState::new(&share);
    let handshake = async {
        let io = ReadAhead::new(tcp, &share);
        let tls = tokio_rustls::TlsConnector::from(tls)
            .connect_with(nobody, io, |session| {
                session.set_buffer_limit(Some(hbone::TLS_BUFFER));
            })
            .await
            .map_err(|error| TransportError::Tls(error.into()))?;
        if tls.get_ref().1.alpn_protocol() != Some(hbone::ALPN) {
            let error = io::Error::new(io::ErrorKind::InvalidData, "peer did not choose h2");
            return Err(TransportError::Tls(error.into()));
        }
        let chain = tls.get_ref().1.peer_certificates().unwrap_or_default();
        let peers_end = certs::end_of(chain)
            .map_err(|error| TransportError::Identity(error.to_string().into()))?;
        let socket = tls.get_ref().0;
        let (ending, traffic) = (socket.ending(), socket.traffic());
        let handshake = hbone::client::<_, Payload>(tls, &shared).await;
        handshake
            .map(|made| (made, peers_end, ending, traffic))
            .map_err(|error| TransportError::Handshake(error.to_string().into()))
    };
    let ((send, mut connection), peers_end, ending, traffic) =
        timeout(hbone::CONNECT_TIMEOUT, handshake)
            .await
            .map_err(|_| {
                TransportError::Handshake("the peer did not finish the handshake in time".into())
            })??;
    let tunnel = Rc::new(ClientTunnel {
        send: RefCell::new(Some(send)),
        shared: shared.clone(),
        health: Rc::default(),
        streams: Cell::new(0),
        closed: Cell::new(false),
        until: own_end.min(peers_end),
        leaving: Cell::new(false),
        idle_since: Cell::new(Instant::now()),
        _place: place,
        idle: RefCell::new(Some(pod.places.idle.rest())),
        idle_tunnels: pod.places.idle.clone(),
    });
    // The reference is weak: the connection also ends when nobody holds the tunnel.
    let driven = Rc::downgrade(&tunnel);
    let mut windows = Windows::new(&shared.undelivered);
    let health = Rc::clone(&tunnel.health);
    let peer = expected.iter().map(ToString::to_string);
    let peer = peer.collect::<Vec<_>>().join(" or ");
    let closing = group.draining();
    let leaves = Rc::downgrade(&tunnel);
    let until = tunnel.until;
    let leaving = async move {
        let drains = async {
            closing.await;
            // A connection that waited for this tunnel takes it first: a pod that drains may go on to connect.
            sleep(hbone::DRAIN_IDLE_TIMEOUT).await;
        };
        tokio::select! {
            () = drains => {}
            () = certs::ended(until) => tracing::debug!(%to, "the tunnel's certificates have ended"),
        }
        if let Some(tunnel) = leaves.upgrade() {
            tunnel.leave();
        }
        std::future::pending::<()>().await;
    };
    group.spawn(async move {
        let lost = keepalive::lost(connection.ping_pong(), &health, || traffic.moved());
        let mut end = pin!(poll_fn(|context| {
            if shared.is_excess() {
                tracing::warn!(%to, peer, "tunnel ended: it brings more than the pod has memory for");
                return Poll::Ready(Ok(()));
            }
            windows.keep(&mut connection, context);
            Pin::new(&mut connection).poll(context)
        }));
        tokio::select! {
            end = &mut end => if let Err(error) = end {
                tracing::debug!(%to, peer, %error, "tunnel ended");
            },
            () = leaving => {}
            () = lost => {
                tracing::warn!(%to, peer, "HBONE ping timeout/error");
                // One that carries nothing may have something that the peer has not taken: PINGs wait behind it, and
                // are not sent at all any more when the engine closes the tunnel.
                if driven.upgrade().is_none_or(|tunnel| tunnel.leave()) {
                    ending.set();
                    let _ = end.await;
                }
            }
        }
        if let Some(tunnel) = driven.upgrade() {
            tunnel.closed.set(true);
        }
    });
    Ok(tunnel)
}

impl ClientTunnel {
    /// Returns the number of streams that it carries now.
    pub fn streams(&self) -> usize {
        self.streams.get()
    }

    /// Returns true if one more stream should be opened here: its number is allowed, the peer answers, and the
    /// tunnel's window is not used up by streams that the peer does not read.
    pub fn has_room(&self) -> bool {
        let stalled = self.shared.stalls.count() >= hbone::MAX_STALLED;
        self.may_carry() && !self.health.is_late() && !stalled
    }

    /// Returns true if it takes no more streams, even when those that it has end.
    pub fn is_over(&self) -> bool {
        self.closed.get() || self.until <= SystemTime::now()
    }

    /// Returns true if the limits allow one more stream.
    pub fn may_carry(&self) -> bool {
        let send = self.send.borrow();
        let peer = send
            .as_ref()
            .map_or(0, SendRequest::current_max_send_streams);
        !self.is_over() && self.streams.get() < hbone::CLIENT_STREAMS.min(peer.max(1))
    }

    /// Closes it as soon as it carries nothing. Returns true if that is so now.
    fn leave(&self) -> bool {
        self.leaving.set(true);
        self.close_if_idle()
    }

    fn close_if_idle(&self) -> bool {
        let idle = self.leaving.get() && self.streams.get() == 0;
        if idle {
            self.closed.set(true);
            self.send.take();
        }
        idle
    }

    /// Takes a place for one stream; call it only if there [is room](Self::has_room).
    pub fn reserve(self: Rc<Self>) -> StreamSlot {
        self.streams.set(self.streams.get() + 1);
        self.idle.take();
        StreamSlot(self)
    }
}

/// A stream's place in a tunnel, given back when this is dropped.
#[derive(Debug)]
pub struct StreamSlot(Rc<ClientTunnel>);

impl Drop for StreamSlot {
    fn drop(&mut self) {
        self.0.streams.set(self.0.streams.get() - 1);
        if self.0.streams() == 0 {
            self.0.idle_since.set(Instant::now());
            self.0.idle.replace(Some(self.0.idle_tunnels.rest()));
        }
        self.0.close_if_idle();
    }
}

impl StreamSlot {
    /// Asks the peer to connect, and waits for its answer. If this is dropped before, a task in `group` waits for the
    /// answer.
    ///
    /// # Errors
    /// The peer refuses, the tunnel fails, or there is no answer in time.
    pub async fn connect(
        &self,
        connect: &ConnectRequest,
        group: &TaskGroup,
    ) -> Result<Stream, OpenError> {
        let request = request(connect).map_err(OpenError::Final)?;
        let send = self.0.send.borrow().clone();
        let answer = async {
            let never_sent = |error: h2::Error| {
                self.0.closed.set(true);
                OpenError::Tunnel(TransportError::H2(error.into()))
            };
            let gone = || never_sent(h2::Reason::CANCEL.into());
            let mut ready = send.ok_or_else(gone)?.ready().await.map_err(never_sent)?;
            let asked = ready.send_request(request, false).map_err(never_sent)?;
            let asked = PendingConnect {
                slot: self,
                group,
                asked: Some(asked),
            };
            asked.answer().await.map_err(|error| self.failed(error))
        };
        let late = async {
            sleep(hbone::PING_AFTER).await;
            self.0.health.late().await;
        };
        let none = || {
            let error = io::Error::new(io::ErrorKind::TimedOut, "no answer to CONNECT");
            TransportError::Connect(error.into())
        };
        let (response, send) = tokio::select! {
            biased;
            answer = timeout(hbone::CONNECT_ANSWER_TIMEOUT, answer) => {
                answer.map_err(|_| OpenError::Final(none()))??
            }
            () = late => return Err(OpenError::Tunnel(none())),
        };
        if response.status() != StatusCode::OK {
            return Err(OpenError::Final(TransportError::Status(response.status())));
        }
        Ok(Stream::new(send, response.into_body(), &self.0.shared))
    }

    fn failed(&self, error: h2::Error) -> OpenError {
        let refused = error.is_reset() && error.reason() == Some(h2::Reason::REFUSED_STREAM);
        let tunnel = !error.is_reset();
        if tunnel {
            self.0.closed.set(true);
        }
        let failure = TransportError::H2(error.into());
        if refused || tunnel {
            OpenError::Tunnel(failure)
        } else {
            OpenError::Final(failure)
        }
    }
}

/// A CONNECT that is not answered yet. When nobody waits for it any more it keeps its place in the tunnel, as it does
/// in the peer's, and is reset when it is answered: see [`hbone::ABANDONED_TIMEOUT`].
struct PendingConnect<'a> {
    slot: &'a StreamSlot,
    group: &'a TaskGroup,
    asked: Option<(ResponseFuture, SendStream<Payload>)>,
}

impl PendingConnect<'_> {
    async fn answer(mut self) -> Result<(Response<RecvStream>, SendStream<Payload>), h2::Error> {
        let gone = || h2::Error::from(h2::Reason::CANCEL);
        let (response, _) = self.asked.as_mut().ok_or_else(gone)?;
        let response = response.await;
        let (_, send) = self.asked.take().ok_or_else(gone)?;
        Ok((response?, send))
    }
}

impl Drop for PendingConnect<'_> {
    fn drop(&mut self) {
        if let Some((response, mut send)) = self.asked.take() {
            let slot = Rc::clone(&self.slot.0).reserve();
            self.group.spawn(async move {
                let answered = timeout(hbone::ABANDONED_TIMEOUT, response).await;
                send.send_reset(h2::Reason::CANCEL);
                drop((answered, slot));
            });
        }
    }
}

fn request(connect: &ConnectRequest) -> Result<Request<()>, TransportError> {
    let words = || -> Result<Request<()>, http::Error> {
        let host = connect.host.as_deref();
        let mut request = Request::builder()
            .method(Method::CONNECT)
            .uri(
                Uri::builder()
                    .authority(connect.authority.to_string())
                    .build()?,
            )
            .header(header::FORWARDED, headers::forwarded(connect.client, host))
            .header("traceparent", headers::traceparent());
        // The mesh may describe a workload in text that is not fit for a header; then it is left out.
        if let Some(baggage) = &connect.baggage
            && let Ok(baggage) = HeaderValue::from_str(baggage)
        {
            request = request.header("baggage", baggage);
        }
        request.body(())
    };
    words().map_err(|error| TransportError::Handshake(error.to_string().into()))
}

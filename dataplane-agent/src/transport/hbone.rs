//! Client side of HBONE: one tunnel, and one CONNECT in it.

use std::cell::Cell;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use h2::client::SendRequest;
use h2::{RecvStream, SendStream};
use http::{HeaderValue, Method, Request, StatusCode, Uri, header};
use rustls_pki_types::{IpAddr, Ipv4Addr, ServerName};
use tokio::time::{Instant, timeout};

use super::{Means, TransportError};
use crate::authorize::LocalPod;
use crate::drain::Scope;
use crate::hbone::readahead::ReadAhead;
use crate::hbone::{self, headers, keepalive};
use crate::identity::Identity;
use crate::limits::Place;

/// What a CONNECT says.
#[derive(Clone, Debug)]
pub struct Connect {
    /// The pod's own address and port, or what the waypoint shall resolve.
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
pub struct Tunnel {
    send: SendRequest<Bytes>,
    streams: Cell<usize>,
    /// No longer used for new streams.
    pub(super) closed: Cell<bool>,
    /// When the last stream ended.
    pub(super) idle_since: Cell<Instant>,
    /// Its place among the pod's connections.
    _place: Place,
}

/// Why a stream was not opened.
#[derive(Debug)]
pub enum Failed {
    /// The tunnel was closing and the peer has not looked at the request: try another tunnel.
    Unprocessed(TransportError),
    /// Anything else.
    Final(TransportError),
}

/// Connects, shakes hands, and leaves a task in `scope` that drives the tunnel.
///
/// # Errors
/// Each step has its own, and its own time.
pub async fn dial(
    means: &dyn Means,
    pod: &LocalPod,
    to: SocketAddr,
    expected: &[Identity],
    place: Place,
    scope: &Scope,
) -> Result<std::rc::Rc<Tunnel>, TransportError> {
    let tls = means.client(pod, expected);
    let tls = tls
        .await
        .map_err(|error| TransportError::Identity(error.into()))?;
    let tcp = super::plain::to_peer(means, pod, to)
        .await
        .map_err(|error| match error {
            TransportError::Connect(error) if error.kind() == io::ErrorKind::TimedOut => {
                TransportError::Blocked(error)
            }
            error => error,
        })?;
    // Nobody looks at it: SNI is off, and peers are known by their identity.
    let nobody = ServerName::IpAddress(IpAddr::V4(Ipv4Addr::from([0, 0, 0, 0])));
    let handshake = async {
        let io = ReadAhead::new(tcp);
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
        let handshake = hbone::client().handshake::<_, Bytes>(tls);
        handshake
            .await
            .map_err(|error| TransportError::Handshake(error.to_string().into()))
    };
    let (send, mut connection) = timeout(hbone::TIMEOUT, handshake).await.map_err(|_| {
        TransportError::Handshake("the peer did not finish the handshake in time".into())
    })??;
    let tunnel = std::rc::Rc::new(Tunnel {
        send,
        streams: Cell::new(0),
        closed: Cell::new(false),
        idle_since: Cell::new(Instant::now()),
        _place: place,
    });
    let driven = std::rc::Rc::downgrade(&tunnel);
    scope.spawn(async move {
        let pings = connection.ping_pong();
        tokio::select! {
            end = connection => if let Err(error) = end {
                tracing::debug!(%error, "tunnel ended");
            },
            () = keepalive::lost(pings) => tracing::warn!("HBONE ping timeout/error"),
        }
        if let Some(tunnel) = driven.upgrade() {
            tunnel.closed.set(true);
        }
    });
    Ok(tunnel)
}

impl Tunnel {
    /// Streams that it carries now.
    pub fn streams(&self) -> usize {
        self.streams.get()
    }

    /// Whether one more stream may be opened.
    pub fn has_room(&self) -> bool {
        let peer = self.send.current_max_send_streams().max(1);
        !self.closed.get() && self.streams.get() < hbone::CLIENT_STREAMS.min(peer)
    }

    /// Takes a place for one stream; call it only if there [is room](Self::has_room).
    pub fn lease(self: std::rc::Rc<Self>) -> Lease {
        self.streams.set(self.streams.get() + 1);
        Lease(self)
    }
}

/// A stream's place in a tunnel; given back when dropped.
#[derive(Debug)]
pub struct Lease(std::rc::Rc<Tunnel>);

impl Drop for Lease {
    fn drop(&mut self) {
        self.0.streams.set(self.0.streams.get() - 1);
        self.0.idle_since.set(Instant::now());
    }
}

impl Lease {
    /// Asks the peer to connect, and waits for its answer.
    ///
    /// # Errors
    /// The peer refuses, the tunnel fails, or there is no answer in time.
    pub async fn connect(
        &self,
        connect: &Connect,
    ) -> Result<(SendStream<Bytes>, RecvStream), Failed> {
        let request = request(connect).map_err(Failed::Final)?;
        let answer = async {
            let never_sent = |error: h2::Error| {
                self.0.closed.set(true);
                Failed::Unprocessed(TransportError::H2(error.into()))
            };
            let mut ready = self.0.send.clone().ready().await.map_err(never_sent)?;
            let (response, send) = ready.send_request(request, false).map_err(never_sent)?;
            let response = response.await.map_err(|error| self.failed(error))?;
            Ok((response, send))
        };
        let (response, send) = timeout(hbone::ANSWER, answer).await.map_err(|_| {
            let error = io::Error::new(io::ErrorKind::TimedOut, "no answer to CONNECT");
            Failed::Final(TransportError::Connect(error.into()))
        })??;
        if response.status() != StatusCode::OK {
            return Err(Failed::Final(TransportError::Status(response.status())));
        }
        Ok((send, response.into_body()))
    }

    fn failed(&self, error: h2::Error) -> Failed {
        let refused = error.is_reset() && error.reason() == Some(h2::Reason::REFUSED_STREAM);
        // Only streams above the last one that the peer has taken end by its GOAWAY.
        let left =
            error.is_go_away() && error.is_remote() && error.reason() == Some(h2::Reason::NO_ERROR);
        if left || !error.is_reset() {
            self.0.closed.set(true);
        }
        let failure = TransportError::H2(error.into());
        if refused || left {
            Failed::Unprocessed(failure)
        } else {
            Failed::Final(failure)
        }
    }
}

fn request(connect: &Connect) -> Result<Request<()>, TransportError> {
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
        // What the mesh says of a workload need not be fit for a header; then it is not told.
        if let Some(baggage) = &connect.baggage
            && let Ok(baggage) = HeaderValue::from_str(baggage)
        {
            request = request.header("baggage", baggage);
        }
        request.body(())
    };
    words().map_err(|error| TransportError::Handshake(error.to_string().into()))
}

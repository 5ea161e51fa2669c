//! A pod and its tunnels to a peer with a real certificate, over loopback.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::SystemTime;

use futures_util::future::LocalBoxFuture;
use tokio_rustls::server::TlsStream;

use super::super::hbone::{ConnectRequest, StreamSlot};
use super::super::pool::{Pool, TunnelKey};
use super::super::{Connector, TransportError};
use super::*;
use crate::drain::TaskGroup;
use crate::mesh::Identity;
use crate::proxy::authorize::LocalPod;
use crate::proxy::hbone::readahead::ReadAhead;
use crate::proxy::identity::Certs;
use crate::proxy::identity::test_ca::Ca;
use crate::proxy::limits::{Full, NodePlaces, Place};

const IDLE: Duration = Duration::from_secs(60);

/// A pod with its own tunnels.
pub(super) struct Client {
    pub(super) pool: Rc<Pool>,
    pub(super) pod: Arc<LocalPod>,
    pub(super) group: TaskGroup,
    connector: Rc<Loopback>,
}

impl Client {
    /// Returns a pod on a node with this number of places, and the peer that it connects to.
    pub(super) async fn new(places: usize) -> (Self, Peer) {
        Self::with_certificates_of(Ca::new(), places).await
    }

    pub(super) async fn with_certificates_of(ca: Ca, places: usize) -> (Self, Peer) {
        let certs = Certs::new(Arc::new(ca));
        certs.retain(&who("client"));
        certs.retain(&who("server"));
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a listener");
        let connector = Rc::new(Loopback {
            certs: certs.clone(),
            peer: listener.local_addr().expect("an address"),
            dials: Cell::new(0),
            places: NodePlaces::new(places),
        });
        let client = Self {
            pool: Pool::new(connector.clone(), IDLE),
            pod: pod(),
            group: TaskGroup::new(None),
            connector,
        };
        (client, Peer::new(listener, certs))
    }

    /// Returns the pool of another worker of its node.
    pub(super) fn another_worker(&self) -> Rc<Pool> {
        Pool::new(self.connector.clone(), IDLE)
    }

    /// Connects to the server.
    pub(super) async fn connect(&self) -> Result<(Stream, StreamSlot), TransportError> {
        self.connect_by(&self.pod, &key(&self.pod)).await
    }

    pub(super) async fn connect_by(
        &self,
        pod: &Arc<LocalPod>,
        key: &TunnelKey,
    ) -> Result<(Stream, StreamSlot), TransportError> {
        self.connect_in(&self.pool, pod, key).await
    }

    /// Connects by the pool of a worker.
    pub(super) async fn connect_in(
        &self,
        pool: &Rc<Pool>,
        pod: &Arc<LocalPod>,
        key: &TunnelKey,
    ) -> Result<(Stream, StreamSlot), TransportError> {
        let connect = ConnectRequest {
            authority: "192.0.2.1:80".parse().expect("an address"),
            client: "192.0.2.9:4000".parse().expect("an address"),
            host: None,
            baggage: None,
        };
        pool.connect(key, pod, &self.group, &connect).await
    }

    /// Makes `count` connections at once.
    pub(super) async fn connect_all(
        &self,
        count: usize,
    ) -> Vec<Result<(Stream, StreamSlot), TransportError>> {
        join_all((0..count).map(|_| self.connect())).await
    }

    /// Returns the number of tunnels that it has dialled.
    pub(super) fn dials(&self) -> usize {
        self.connector.dials.get()
    }
}

pub(super) fn pod() -> Arc<LocalPod> {
    LocalPod::example("c//Pod/ns/client", who("client"), Vec::new())
}

/// Returns the key of a tunnel from this pod to the server.
pub(super) fn key(pod: &LocalPod) -> TunnelKey {
    TunnelKey {
        source: pod.instance,
        from: None,
        target: "c//Pod/ns/server".into(),
        to: "192.0.2.1:15008".parse().expect("an address"),
        expected: vec![who("server")],
    }
}

pub(super) fn who(account: &str) -> Identity {
    Identity::new("td", "ns", account)
}

/// A connector that connects by loopback, whatever the address.
struct Loopback {
    certs: Certs,
    peer: SocketAddr,
    dials: Cell<usize>,
    places: NodePlaces,
}

impl Connector for Loopback {
    fn connect<'a>(
        &'a self,
        _: &'a LocalPod,
        _: Option<IpAddr>,
        _: SocketAddr,
    ) -> LocalBoxFuture<'a, std::io::Result<TcpStream>> {
        self.dials.set(self.dials.get() + 1);
        Box::pin(TcpStream::connect(self.peer))
    }
    fn connect_as<'a>(
        &'a self,
        pod: &'a LocalPod,
        _: IpAddr,
        to: SocketAddr,
    ) -> LocalBoxFuture<'a, std::io::Result<TcpStream>> {
        self.connect(pod, None, to)
    }
    fn client_tls<'a>(
        &'a self,
        pod: &'a LocalPod,
        expected: &'a [Identity],
    ) -> LocalBoxFuture<'a, Result<(Arc<rustls::ClientConfig>, SystemTime), String>> {
        Box::pin(async move {
            let client = self.certs.client(&pod.identity, expected).await;
            client.map_err(|error| error.to_string())
        })
    }
    fn place(&self, pod: &LocalPod) -> Result<Place, Full> {
        self.places.take(&pod.places)
    }
    fn unsent(&self, pod: &LocalPod) -> Share {
        self.places.unsent(&pod.places)
    }
    fn undelivered(&self, pod: &LocalPod) -> Share {
        self.places.undelivered(&pod.places)
    }
}

/// The server, which accepts the tunnels.
pub(super) struct Peer {
    listener: TcpListener,
    certs: Certs,
    tasks: TaskGroup,
}

impl Peer {
    fn new(listener: TcpListener, certs: Certs) -> Self {
        let tasks = TaskGroup::new(None);
        tasks.spawn(certs.clone().rotate());
        Self {
            listener,
            certs,
            tasks,
        }
    }

    /// Accepts the next connection. Returns its handshake, which may fail.
    pub(super) async fn accept(
        &self,
    ) -> impl Future<Output = std::io::Result<TlsStream<ReadAhead>>> + 'static {
        let (tcp, _) = self.listener.accept().await.expect("a connection");
        let own = self.certs.current(&who("server")).await;
        let server = own.expect("a certificate").server.clone();
        tokio_rustls::TlsAcceptor::from(server).accept(ReadAhead::new(tcp, &Share::default()))
    }

    /// Ends its direction with its last message of each handshake. Does not return.
    pub(super) async fn close_at_once(self) {
        let own = self.certs.current(&who("server")).await;
        let server = own.expect("a certificate").server.clone();
        let acceptor = tokio_rustls::TlsAcceptor::from(server);
        let mut open = Vec::new();
        loop {
            let (tcp, _) = self.listener.accept().await.expect("a connection");
            tcp.peek(&mut [0]).await.expect("its first message");
            let writes = socket2::SockRef::from(&tcp)
                .try_clone()
                .expect("the socket");
            let mut accept = Box::pin(acceptor.accept(ReadAhead::new(tcp, &Share::default())));
            std::future::poll_fn(|context| {
                assert!(
                    accept.as_mut().poll(context).is_pending(),
                    "the client is to answer"
                );
                std::task::Poll::Ready(())
            })
            .await;
            writes
                .shutdown(std::net::Shutdown::Write)
                .expect("connected");
            open.push(accept);
        }
    }

    /// Answers all CONNECTs. Does not return.
    pub(super) async fn serve(self, answers: Answers) {
        let mut dead = answers.dead_at_first;
        loop {
            let tls = self.accept().await;
            let dies = std::mem::take(&mut dead);
            self.tasks.spawn(async move {
                let Ok(tls) = tls.await else {
                    return;
                };
                let shared = TunnelState::new(&Share::default());
                let handshake = crate::proxy::hbone::server::<_, Payload>(tls, &shared);
                let Ok(mut connection) = handshake.await else {
                    return;
                };
                if dies {
                    std::future::pending::<()>().await;
                }
                let mut streams = Vec::new();
                while let Some(Ok((request, mut respond))) = connection.accept().await {
                    let mut answer = http::Response::new(());
                    *answer.status_mut() = answers.status;
                    let end = answers.status != http::StatusCode::OK;
                    streams.push((respond.send_response(answer, end), request));
                    if streams.len() == answers.each {
                        connection.graceful_shutdown();
                    }
                }
            });
        }
    }
}

/// The way in which a peer answers CONNECTs.
#[derive(Clone, Copy)]
pub(super) struct Answers {
    pub(super) status: http::StatusCode,
    /// Number of CONNECTs after which a tunnel sends GOAWAY.
    pub(super) each: usize,
    /// True if its first tunnel answers none.
    pub(super) dead_at_first: bool,
    /// Number of places of the node that connects to it.
    pub(super) places: usize,
}

impl Default for Answers {
    fn default() -> Self {
        Self {
            status: http::StatusCode::OK,
            each: usize::MAX,
            dead_at_first: false,
            places: 100,
        }
    }
}

/// Runs a test of a client whose peer answers in this way.
pub(super) fn with_peer(answers: Answers, test: impl AsyncFnOnce(&Client)) {
    run(async {
        let (client, peer) = Client::new(answers.places).await;
        beside(peer.serve(answers), test(&client)).await;
    });
}

//! Bytes between sockets and streams, over loopback; and tunnels between peers with real certificates.

use std::cell::Cell;
use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::{BoxFuture, LocalBoxFuture};
use proptest::prelude::*;
use rcgen::{CertificateParams, KeyPair, SanType};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::LocalSet;

use super::hbone::Connect;
use super::pool::{Key, Pool};
use super::relay::{End, Meter, relay, reset};
use super::{Means, TransportError};
use crate::authorize::LocalPod;
use crate::drain::Scope;
use crate::hbone::readahead::ReadAhead;
use crate::identity::{Certs, Identity, IdentityError, Issued, Issuer};
use crate::limits::{Full, Kind, NodePlaces, Place};

#[derive(Default)]
struct Counted {
    up: Cell<u64>,
    down: Cell<u64>,
}

impl Meter for Counted {
    fn upward(&self, bytes: u64) {
        self.up.set(self.up.get() + bytes);
    }
    fn downward(&self, bytes: u64) {
        self.down.set(self.down.get() + bytes);
    }
}

fn run<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let in_time = async {
        let limit = tokio::time::timeout(Duration::from_secs(60), test);
        limit.await.expect("not in time")
    };
    LocalSet::new().block_on(&runtime.expect("a runtime"), in_time)
}

/// Two ends of one TCP connection.
async fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a listener");
    let address = listener.local_addr().expect("an address");
    let (near, far) = tokio::join!(TcpStream::connect(address), listener.accept());
    (near.expect("connected"), far.expect("accepted").0)
}

/// Writes pieces and ends; what comes back until the other side ends.
async fn exchange(mut tcp: TcpStream, pieces: Vec<Vec<u8>>) -> Vec<u8> {
    let (mut read, mut write) = tcp.split();
    let writing = async {
        for piece in &pieces {
            write.write_all(piece).await.expect("written");
        }
        write.shutdown().await.expect("ended");
    };
    let mut all = Vec::new();
    let (_, read) = tokio::join!(writing, read.read_to_end(&mut all));
    read.expect("an orderly end");
    all
}

/// An h2 stream's two ends, and what drives them.
async fn stream() -> (End, End, impl Future<Output = ()>) {
    let (near, far) = tokio::io::duplex(1 << 20);
    let client = crate::hbone::client().handshake::<_, Bytes>(near);
    let server = crate::hbone::server().handshake::<_, Bytes>(far);
    let (client, server) = tokio::join!(client, server);
    let ((mut send, driven), mut server) = (client.expect("client"), server.expect("server"));
    let request = http::Request::connect("192.0.2.1:80")
        .body(())
        .expect("a request");
    let (response, to_server) = send.send_request(request, false).expect("sent");
    let mut driven = Box::pin(driven);
    let accepted = tokio::select! {
        accepted = server.accept() => accepted.expect("a request").expect("a request"),
        _ = &mut driven => panic!("the client ended"),
    };
    let (request, mut respond) = accepted;
    let to_client = respond
        .send_response(http::Response::new(()), false)
        .expect("answered");
    let mut server_driven = Box::pin(async move { while server.accept().await.is_some() {} });
    let response = tokio::select! {
        response = response => response.expect("an answer"),
        _ = &mut driven => panic!("the client ended"),
        () = &mut server_driven => panic!("the server ended"),
    };
    let near = End::Stream(to_server, response.into_body());
    let far = End::Stream(to_client, request.into_body());
    let drive = async move {
        let _held = send;
        tokio::join!(driven, server_driven).0.ok();
    };
    (near, far, drive)
}

fn pieces() -> impl Strategy<Value = Vec<Vec<u8>>> {
    let piece = (any::<u8>(), prop_oneof![0..40_usize, 1000..90_000_usize])
        .prop_map(|(byte, length)| (0..length).map(|at| byte.wrapping_add(at as u8)).collect());
    proptest::collection::vec(piece, 0..6)
}

/// A peer that refuses an upload answers to the end, and resets what it does not read (RFC 9113,
/// 8.1). Its answer reaches the client all the same.
#[test]
fn an_answer_is_passed_on_though_its_peer_reads_no_more() {
    run(async {
        let (mut client, one) = pair().await;
        let (near, far, drive) = stream().await;
        let counted = Counted::default();
        let refuse = async {
            let End::Stream(mut send, mut receive) = far else {
                panic!("a stream");
            };
            let some = receive.data().await.expect("a beginning").expect("bytes");
            assert!(!some.is_empty());
            send.send_data(Bytes::from_static(b"413"), true)
                .expect("sent");
        };
        let upload = async {
            client.write_all(&[7; 100_000]).await.expect("written");
            let mut answer = [0; 3];
            client.read_exact(&mut answer).await.expect("the answer");
            assert_eq!(&answer, b"413");
        };
        let all = async { tokio::join!(upload, refuse, relay(End::Tcp(one), near, &counted)) };
        tokio::select! {
            _ = all => {}
            () = drive => panic!("the tunnel ended"),
        }
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// client ═ relay ═ (stream) ═ relay ═ server: whole, in order, and each way ends by itself.
    #[test]
    fn what_goes_in_comes_out_and_each_direction_ends_by_itself(up in pieces(), down in pieces()) {
        run(async {
            let (client, one) = pair().await;
            let (two, server) = pair().await;
            let (near, far, drive) = stream().await;
            let (first, second) = (Counted::default(), Counted::default());
            let carried = async {
                let ends = tokio::join!(
                    relay(End::Tcp(one), near, &first),
                    relay(far, End::Tcp(two), &second),
                );
                ends.0.expect("an orderly end");
                ends.1.expect("an orderly end");
            };
            let talk = async { tokio::join!(exchange(client, up.clone()), exchange(server, down.clone())) };
            let (to_client, to_server) = tokio::select! {
                (talked, ()) = async { tokio::join!(talk, carried) } => talked,
                () = drive => panic!("the tunnel ended"),
            };
            assert!(to_server == up.concat(), "upwards");
            assert!(to_client == down.concat(), "downwards");
            for counted in [first, second] {
                assert_eq!(counted.up.get(), up.concat().len() as u64);
                assert_eq!(counted.down.get(), down.concat().len() as u64);
            }
        });
    }
}

async fn is_reset(tcp: &mut TcpStream) -> bool {
    let mut byte = [0];
    let read = tcp.read(&mut byte).await;
    read.is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionReset)
}

#[test]
fn a_reset_of_one_end_resets_the_other_through_a_tunnel() {
    run(async {
        let (client, one) = pair().await;
        let (two, mut server) = pair().await;
        let (near, far, drive) = stream().await;
        let meter = Counted::default();
        let carried = async {
            let ends = tokio::join!(
                relay(End::Tcp(one), near, &meter),
                relay(far, End::Tcp(two), &meter)
            );
            assert!(
                ends.0.is_ok() && ends.1.is_ok(),
                "a peer's reset is no failure: {ends:?}"
            );
        };
        reset(client);
        tokio::select! {
            ((), reset) = async { tokio::join!(carried, is_reset(&mut server)) } => assert!(reset),
            () = drive => panic!("the tunnel ended"),
        }
    });
}

#[test]
fn a_relay_that_is_cut_resets_both_ends() {
    run(async {
        let (mut client, one) = pair().await;
        let (two, mut server) = pair().await;
        client.write_all(b"hello").await.expect("written");
        let meter = Counted::default();
        let mut got = [0; 5];
        tokio::select! {
            _ = relay(End::Tcp(one), End::Tcp(two), &meter) => panic!("it goes on"),
            read = server.read_exact(&mut got) => {
                read.expect("it is carried");
            }
        }
        assert!(is_reset(&mut client).await && is_reset(&mut server).await);
    });
}

/// Issues certificates under a root of its own.
struct Ca {
    signer: rcgen::Issuer<'static, KeyPair>,
    root: rustls_pki_types::CertificateDer<'static>,
}

impl Ca {
    fn new() -> Self {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::default();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let root = params.self_signed(&key).expect("a root").der().clone();
        let signer = rcgen::Issuer::from_ca_cert_der(&root, key).expect("a CA");
        Self { signer, root }
    }
}

impl Issuer for Ca {
    fn issue<'a>(&'a self, identity: &'a Identity) -> BoxFuture<'a, Result<Issued, IdentityError>> {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::default();
        let uri = identity.to_string().try_into().expect("a URI");
        params.subject_alt_names = vec![SanType::URI(uri)];
        let leaf = params.signed_by(&key, &self.signer).expect("a certificate");
        let issued = Issued {
            chain: vec![leaf.der().clone()],
            key: key.serialize_der().into(),
            roots: vec![self.root.clone()],
        };
        Box::pin(std::future::ready(Ok(issued)))
    }
}

/// Connects by loopback, whatever address is asked for.
struct Loopback {
    certs: Certs,
    peer: SocketAddr,
    dials: Cell<usize>,
    places: NodePlaces,
}

impl Means for Loopback {
    fn connect<'a>(
        &'a self,
        _: &'a LocalPod,
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
        self.connect(pod, to)
    }
    fn client<'a>(
        &'a self,
        pod: &'a LocalPod,
        expected: &'a [Identity],
    ) -> LocalBoxFuture<'a, Result<Arc<rustls::ClientConfig>, String>> {
        Box::pin(async move {
            let certificate = self.certs.current(&pod.identity).await;
            certificate
                .and_then(|own| own.client(expected))
                .map_err(|error| error.to_string())
        })
    }
    fn place(&self, pod: &LocalPod) -> Result<Place, Full> {
        self.places.take(&pod.places, Kind::Outbound)
    }
}

fn who(account: &str) -> Identity {
    Identity::new("td", "ns", account)
}

fn pod() -> Arc<LocalPod> {
    LocalPod::example("c//Pod/ns/client", who("client"), Vec::new())
}

fn key(pod: &LocalPod, expected: &str) -> Key {
    Key {
        source: pod.instance,
        target: "c//Pod/ns/server".into(),
        to: "192.0.2.1:15008".parse().expect("an address"),
        expected: vec![who(expected)],
    }
}

fn connect() -> Connect {
    Connect {
        authority: "192.0.2.1:80".parse().expect("an address"),
        client: "192.0.2.9:4000".parse().expect("an address"),
        host: None,
        baggage: None,
    }
}

/// A peer that answers CONNECTs with `status`, as many per tunnel as `each`, then says GOAWAY.
async fn peer(listener: TcpListener, certs: Certs, status: u16, each: usize) {
    let scope = Scope::new(None);
    scope.spawn(certs.clone().rotate());
    loop {
        let Ok((tcp, _)) = listener.accept().await else {
            return;
        };
        let server = certs
            .current(&who("server"))
            .await
            .expect("a certificate")
            .server
            .clone();
        scope.spawn(async move {
            let acceptor = tokio_rustls::TlsAcceptor::from(server);
            let Ok(tls) = acceptor.accept(ReadAhead::new(tcp)).await else {
                return;
            };
            let Ok(mut connection) = crate::hbone::server().handshake::<_, Bytes>(tls).await else {
                return;
            };
            let mut streams = Vec::new();
            while let Some(Ok((request, mut respond))) = connection.accept().await {
                let mut answer = http::Response::new(());
                *answer.status_mut() = http::StatusCode::from_u16(status).expect("a status");
                let end = status != 200;
                streams.push((respond.send_response(answer, end), request));
                if streams.len() == each {
                    connection.graceful_shutdown();
                }
            }
        });
    }
}

async fn pool(
    status: u16,
    each: usize,
) -> (Rc<Pool>, Rc<Loopback>, Scope, impl Future<Output = ()>) {
    let certs = Certs::new(Arc::new(Ca::new()));
    certs.hold(&who("client"));
    certs.hold(&who("server"));
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a listener");
    let means = Rc::new(Loopback {
        certs: certs.clone(),
        peer: listener.local_addr().expect("an address"),
        dials: Cell::new(0),
        places: NodePlaces::new(100),
    });
    let pool = Pool::new(means.clone(), Duration::from_secs(60));
    (
        pool,
        means,
        Scope::new(None),
        peer(listener, certs, status, each),
    )
}

#[test]
fn connections_that_go_the_same_way_at_once_share_a_tunnel() {
    run(async {
        let (pool, means, scope, peer) = pool(200, usize::MAX).await;
        let (pod, connect) = (pod(), connect());
        let key = key(&pod, "server");
        let all = (0..50).map(|_| pool.connect(&key, &pod, &scope, &connect));
        tokio::select! {
            all = futures_util::future::join_all(all) => {
                assert!(all.iter().all(Result::is_ok));
                assert_eq!((means.dials.get(), pool.tunnels()), (1, 1));
            }
            () = peer => panic!("the peer ended"),
        }
    });
}

#[test]
fn more_streams_than_a_tunnel_has_room_for_get_another_one() {
    run(async {
        let (pool, means, scope, peer) = pool(200, usize::MAX).await;
        let (pod, connect) = (pod(), connect());
        let key = key(&pod, "server");
        let all = (0..crate::hbone::CLIENT_STREAMS + 10)
            .map(|_| pool.connect(&key, &pod, &scope, &connect));
        tokio::select! {
            all = futures_util::future::join_all(all) => {
                assert!(all.iter().all(Result::is_ok));
                assert_eq!(means.dials.get(), 2);
            }
            () = peer => panic!("the peer ended"),
        }
    });
}

#[test]
fn an_idle_tunnel_gives_its_place_to_a_new_one_and_a_busy_one_does_not() {
    run(async {
        let (_, usual, scope, peer) = pool(200, usize::MAX).await;
        let means = Rc::new(Loopback {
            certs: usual.certs.clone(),
            peer: usual.peer,
            dials: Cell::new(0),
            // Of four a pod has two: as many as are left.
            places: NodePlaces::new(4),
        });
        let pool = Pool::new(means.clone(), Duration::from_secs(60));
        let (pod, connect) = (pod(), connect());
        let to = |port: u16| Key {
            to: SocketAddr::new([192, 0, 2, 1].into(), port),
            ..key(&pod, "server")
        };
        let asked = async {
            let busy = pool.connect(&to(1), &pod, &scope, &connect).await;
            let idle = pool.connect(&to(2), &pod, &scope, &connect).await;
            drop(idle.expect("connected"));
            let third = pool.connect(&to(3), &pod, &scope, &connect).await;
            assert!(busy.is_ok() && third.is_ok());
            assert_eq!((means.dials.get(), pool.tunnels()), (3, 2));
            let full = pool.connect(&to(4), &pod, &scope, &connect).await;
            let full = full.expect_err("none is idle");
            assert!(matches!(full, TransportError::Full(Full::Node)), "{full}");
        };
        tokio::select! {
            () = asked => {}
            () = peer => panic!("the peer ended"),
        }
    });
}

#[test]
fn a_tunnel_that_its_peer_closes_is_left_and_nobody_notices() {
    run(async {
        let (pool, means, scope, peer) = pool(200, 3).await;
        let (pod, connect) = (pod(), connect());
        let key = key(&pod, "server");
        let one_after_the_other = async {
            for _ in 0..12 {
                let stream = pool.connect(&key, &pod, &scope, &connect).await;
                drop(stream.expect("connected"));
            }
        };
        tokio::select! {
            () = one_after_the_other => assert!(means.dials.get() >= 4, "{}", means.dials.get()),
            () = peer => panic!("the peer ended"),
        }
    });
}

#[test]
fn a_refusal_is_told_by_its_status_and_a_stranger_by_its_name() {
    run(async {
        let (pool, _means, scope, peer) = pool(401, usize::MAX).await;
        let (pod, connect) = (pod(), connect());
        let asked = async {
            let refused = pool
                .connect(&key(&pod, "server"), &pod, &scope, &connect)
                .await;
            let refused = refused.expect_err("401");
            assert_eq!(refused.to_string(), "http status: 401 Unauthorized");
            let stranger = pool
                .connect(&key(&pod, "another"), &pod, &scope, &connect)
                .await;
            let stranger = stranger.expect_err("somebody else");
            assert!(matches!(stranger, TransportError::Tls(_)), "{stranger}");
            let words = "peer did not present the expected SAN (spiffe://td/ns/ns/sa/another), got spiffe://td/ns/ns/sa/server";
            assert!(stranger.to_string().contains(words), "{stranger}");
        };
        tokio::select! {
            () = asked => {}
            () = peer => panic!("the peer ended"),
        }
    });
}

#[test]
fn a_scope_that_is_cut_takes_its_tunnels_with_it() {
    run(async {
        let (pool, _means, scope, peer) = pool(200, usize::MAX).await;
        let (pod, connect) = (pod(), connect());
        let key = key(&pod, "server");
        let asked = async {
            let stream = pool
                .connect(&key, &pod, &scope, &connect)
                .await
                .expect("connected");
            pool.forget(pod.instance);
            assert_eq!(pool.tunnels(), 0);
            scope.cut().await;
            let (_send, mut receive, _lease) = stream;
            let end = receive.data().await;
            assert!(
                end.is_none_or(|end| end.is_err()),
                "the stream ends with its tunnel"
            );
        };
        tokio::select! {
            () = asked => {}
            () = peer => panic!("the peer ended"),
        }
    });
}

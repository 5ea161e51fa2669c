//! Bytes between sockets and streams, over loopback; and tunnels between peers with real certificates.

use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::{BoxFuture, LocalBoxFuture};
use h2::Reason;
use proptest::prelude::*;
use rcgen::{CertificateParams, KeyPair, SanType};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::LocalSet;

use super::hbone::Connect;
use super::pool::{Key, Pool};
use super::relay::{self, End, Meter, RelayError, reset};
use super::{Means, TransportError};
use crate::authorize::{Io, LocalPod};
use crate::drain::Scope;
use crate::hbone::payload::Payload;
use crate::hbone::readahead::ReadAhead;
use crate::hbone::stream::{Shared, Stream};
use crate::hbone::window::Windows;
use crate::identity::{Certs, Identity, IdentityError, Issued, Issuer};
use crate::limits::memory::{Memory, PodMemory, Share};
use crate::limits::{Full, Kind, NodePlaces, Place};
use crate::sys::socket::unacknowledged;

#[derive(Default)]
struct Counted {
    up: Cell<u64>,
    down: Cell<u64>,
}

impl Meter for Rc<Counted> {
    fn upward(&self, bytes: u64) {
        self.up.set(self.up.get() + bytes);
    }
    fn downward(&self, bytes: u64) {
        self.down.set(self.down.get() + bytes);
    }
}

/// Of a pod that has plenty of memory.
async fn relay(
    client: End,
    upstream: End,
    meter: &(impl Meter + Clone + 'static),
) -> Result<(), RelayError> {
    relay::relay(client, upstream, &Share::default(), meter).await
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
async fn stream() -> (Stream, Stream, impl Future<Output = ()>) {
    let (near, far) = tokio::io::duplex(1 << 20);
    let client = crate::hbone::client().handshake::<_, Payload>(near);
    let server = crate::hbone::server().handshake::<_, Payload>(far);
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
    let shared = Shared::default();
    let near = Stream::new(to_server, response.into_body(), &shared);
    let shared = Shared::default();
    let far = Stream::new(to_client, request.into_body(), &shared);
    let drive = async move {
        let _held = send;
        tokio::join!(driven, server_driven).0.ok();
    };
    (near, far, drive)
}

/// What comes next by a stream.
async fn next(stream: &mut Stream) -> Option<Result<Bytes, h2::Error>> {
    poll_fn(|context| stream.incoming.poll_read(context)).await
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
        let counted = Rc::<Counted>::default();
        let refuse = async {
            let mut far = far;
            let some = next(&mut far).await.expect("a beginning").expect("bytes");
            assert!(!some.is_empty());
            far.outgoing.send(Bytes::from_static(b"413")).expect("sent");
            far.outgoing.finish().expect("ended");
        };
        let upload = async {
            client.write_all(&[7; 100_000]).await.expect("written");
            let mut answer = [0; 3];
            client.read_exact(&mut answer).await.expect("the answer");
            assert_eq!(&answer, b"413");
        };
        let all = async {
            tokio::join!(
                upload,
                refuse,
                relay(End::Tcp(one), End::Stream(near), &counted)
            )
        };
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
            let (first, second) = (Rc::<Counted>::default(), Rc::<Counted>::default());
            let carried = async {
                let ends = tokio::join!(
                    relay(End::Tcp(one), End::Stream(near), &first),
                    relay(End::Stream(far), End::Tcp(two), &second),
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

/// What is read until the other side ends, and how it does.
async fn rest(tcp: &mut TcpStream) -> (Vec<u8>, Option<std::io::ErrorKind>) {
    let mut all = Vec::new();
    let end = tcp.read_to_end(&mut all).await;
    (all, end.err().map(|error| error.kind()))
}

async fn flushed(stream: &Stream) {
    poll_fn(|context| stream.outgoing.poll_flushed(context)).await;
}

/// Envoy ends streams with this reason, also such as are not at their end.
#[test]
fn a_stream_that_is_reset_before_its_end_is_reset_whatever_the_reason() {
    for reason in [Reason::NO_ERROR, Reason::CANCEL, Reason::CONNECT_ERROR] {
        run(async {
            let (mut client, one) = pair().await;
            let (near, mut far, drive) = stream().await;
            let counted = Rc::<Counted>::default();
            let cut = async {
                far.outgoing
                    .send(Bytes::from_static(b"part"))
                    .expect("sent");
                flushed(&far).await;
                far.outgoing.reset(reason);
                let (part, end) = rest(&mut client).await;
                assert_eq!(part, b"part");
                assert_eq!(end, Some(std::io::ErrorKind::ConnectionReset), "{reason:?}");
            };
            let carried = relay(End::Tcp(one), End::Stream(near), &counted);
            let all = async { tokio::join!(cut, carried) };
            tokio::select! {
                ((), carried) = all => carried.expect("a peer's reset is no failure"),
                () = drive => panic!("the tunnel ended"),
            }
            assert_eq!(counted.down.get(), 4);
        });
    }
}

/// RFC 9113, 8.1. The client is told when it writes, as by the kernel of a server that has closed.
#[test]
fn a_peer_that_has_said_its_end_may_stop_reading() {
    run(async {
        let (mut client, one) = pair().await;
        let (near, mut far, drive) = stream().await;
        let counted = Rc::<Counted>::default();
        let answered = async {
            far.outgoing
                .send(Bytes::from_static(b"whole"))
                .expect("sent");
            far.outgoing.finish().expect("ended");
            flushed(&far).await;
            tokio::time::sleep(Duration::from_millis(20)).await;
            far.outgoing.reset(Reason::NO_ERROR);
        };
        let carried = relay(End::Tcp(one), End::Stream(near), &counted);
        let all = async { tokio::join!(answered, carried) };
        tokio::select! {
            ((), carried) = all => carried.expect("it has ended"),
            () = drive => panic!("the tunnel ended"),
        }
        assert_eq!(rest(&mut client).await, (b"whole".to_vec(), None));
        client.write_all(b"late").await.expect("not known yet");
        tokio::time::sleep(Duration::from_millis(20)).await;
        client.write_all(b"later").await.expect_err("known now");
    });
}

#[test]
fn what_an_end_sent_before_it_broke_is_delivered_and_counted_before_the_reset() {
    run(async {
        let (mut client, one) = pair().await;
        let (two, mut server) = pair().await;
        let (near, far, drive) = stream().await;
        let (first, second) = (Rc::<Counted>::default(), Rc::<Counted>::default());
        let talk = async {
            client.write_all(&[1; 100]).await.expect("written");
            server.read_u8().await.expect("a byte");
            server.write_all(&[2; 300_000]).await.expect("written");
            // Its kernel would discard what is not on its way.
            while unacknowledged(&server).expect("it is connected") > 0 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            // With something unread.
            drop(server);
            rest(&mut client).await
        };
        let carried = async {
            tokio::join!(
                relay(End::Tcp(one), End::Stream(near), &first),
                relay(End::Stream(far), End::Tcp(two), &second),
            )
        };
        let (answer, ends) = tokio::select! {
            all = async { tokio::join!(talk, carried) } => all,
            () = drive => panic!("the tunnel ended"),
        };
        assert_eq!(answer.0.len(), 300_000);
        assert_eq!(answer.1, Some(std::io::ErrorKind::ConnectionReset));
        assert!(ends.0.is_ok() && ends.1.is_ok(), "{ends:?}");
        assert_eq!((first.down.get(), second.down.get()), (300_000, 300_000));
    });
}

#[test]
fn a_client_that_breaks_is_noticed_while_nobody_reads_what_it_sends_and_after_its_end() {
    for half_closed in [false, true] {
        run(async {
            let (mut client, one) = pair().await;
            let (near, mut far, drive) = stream().await;
            let counted = Rc::<Counted>::default();
            let breaks = async {
                if half_closed {
                    client.shutdown().await.expect("ended");
                    tokio::time::sleep(Duration::from_millis(20)).await;
                } else {
                    let flood = async {
                        loop {
                            client.write_all(&[0; 1 << 16]).await.expect("written");
                        }
                    };
                    let full = tokio::time::timeout(Duration::from_millis(300), flood).await;
                    full.expect_err("it is blocked");
                }
                reset(client);
            };
            let noticed = poll_fn(|context| far.outgoing.poll_broken(context));
            let all = async {
                tokio::join!(
                    breaks,
                    noticed,
                    relay(End::Tcp(one), End::Stream(near), &counted)
                )
            };
            tokio::select! {
                _ = all => {}
                () = drive => panic!("the tunnel ended"),
            }
        });
    }
}

/// Streams of one tunnel from a peer that gives credit for the tunnel as bytes are delivered, as
/// ztunnel does, and our ends of them; and what drives both.
async fn streams(count: usize) -> (Vec<(Stream, Stream)>, impl Future<Output = ()>) {
    let (near, far) = tokio::io::duplex(1 << 20);
    let client = crate::hbone::client().handshake::<_, Payload>(near);
    let server = crate::hbone::server().handshake::<_, Payload>(far);
    let (client, server) = tokio::join!(client, server);
    let ((mut send, mut driven), mut server) = (client.expect("client"), server.expect("server"));
    let (ours, theirs) = (Shared::default(), Shared::default());
    let mut windows = Windows::new(&ours.undelivered, &Share::default());
    let mut driven = Box::pin(poll_fn(move |context| {
        windows.keep(&mut driven, context);
        Pin::new(&mut driven).poll(context).map(|_| ())
    }));
    let mut all = Vec::new();
    for _ in 0..count {
        let request = http::Request::connect("192.0.2.1:80").body(());
        let sent = send.send_request(request.expect("a request"), false);
        let (response, to_server) = sent.expect("sent");
        let accepted = tokio::select! {
            accepted = server.accept() => accepted.expect("a request").expect("a request"),
            () = &mut driven => panic!("the client ended"),
        };
        let (request, mut respond) = accepted;
        let to_client = respond.send_response(http::Response::new(()), false);
        let response = tokio::select! {
            response = response => response.expect("an answer"),
            () = &mut driven => panic!("the client ended"),
            _ = server.accept() => panic!("the server ended"),
        };
        all.push((
            Stream::new(to_server, response.into_body(), &ours),
            Stream::new(to_client.expect("answered"), request.into_body(), &theirs),
        ));
    }
    let drive = async move {
        let _held = send;
        let server = async { while let Some(Ok(_)) = server.accept().await {} };
        tokio::join!(driven, server);
    };
    (all, drive)
}

/// A relay to a client that reads nothing and has little room; runs for ever.
async fn unread(near: Stream) {
    let (client, one) = pair().await;
    socket2::SockRef::from(&client)
        .set_recv_buffer_size(4096)
        .expect("set");
    socket2::SockRef::from(&one)
        .set_send_buffer_size(4096)
        .expect("set");
    let counted = Rc::<Counted>::default();
    let _ = relay(End::Tcp(one), End::Stream(near), &counted).await;
    drop(client);
}

/// Sends, and waits for room only.
async fn send(far: &mut Stream, bytes: usize) {
    let mut left = bytes;
    while left > 0 {
        poll_fn(|context| far.outgoing.poll_room(context)).await;
        let piece = left.min(1 << 16);
        far.outgoing
            .send(Bytes::from(vec![0; piece]))
            .expect("sent");
        left -= piece;
    }
}

#[test]
fn streams_that_nobody_reads_hold_back_no_other_of_their_tunnel() {
    run(async {
        let (mut all, drive) = streams(61).await;
        let (mut near, mut far) = all.pop().expect("a stream");
        let stalled = all.into_iter().map(|(near, mut far)| async move {
            tokio::join!(unread(near), send(&mut far, 8 << 20));
        });
        let talk = async {
            // Until they are full.
            tokio::time::sleep(Duration::from_secs(3)).await;
            let mut got = 0;
            let read = async {
                while got < 20 << 20 {
                    let bytes = next(&mut near).await.expect("more").expect("bytes");
                    near.incoming.delivered(bytes.len());
                    got += bytes.len();
                }
            };
            tokio::join!(read, send(&mut far, 20 << 20));
        };
        tokio::select! {
            () = talk => {}
            _ = futures_util::future::join_all(stalled) => panic!("they are stalled"),
            () = drive => panic!("the tunnel ended"),
        }
    });
}

#[test]
fn what_connections_that_nobody_reads_hold_is_bounded_and_others_go_on() {
    run(async {
        let most = 4 << 20;
        let (memory, pods) = (Memory::new(most), [(); 2].map(|()| PodMemory::default()));
        let (all, drive) = streams(60).await;
        // By another tunnel: they use up the window of theirs.
        let (near, mut far, drive_other) = stream().await;
        let (greedy, other) = (memory.share(&pods[0]), memory.share(&pods[1]));
        let counted = Rc::<Counted>::default();
        // To streams that get no credit, and to sockets.
        let into_streams = all.into_iter().map(|(near, far)| async {
            let (client, one) = pair().await;
            let carried = relay::relay(End::Tcp(one), End::Stream(near), &greedy, &counted);
            tokio::join!(endless(client), carried).1.ok();
            drop(far);
        });
        let into_sockets = (0..60).map(|_| async {
            let ((client, one), (two, server)) = (pair().await, pair().await);
            let carried = relay::relay(End::Tcp(one), End::Tcp(two), &greedy, &counted);
            tokio::join!(endless(client), carried).1.ok();
            drop(server);
        });
        let talk = async {
            // Until they are full.
            tokio::time::sleep(Duration::from_secs(2)).await;
            let held = memory.held();
            assert!(held > most as usize / 4, "they hold {held}");
            let (mut client, one) = pair().await;
            let carried = async {
                let end = End::Stream(near);
                relay::relay(End::Tcp(one), end, &other, &counted)
                    .await
                    .ok();
            };
            let sent = vec![7; 20 << 20];
            let read = async {
                let mut got = 0;
                while got < sent.len() {
                    let bytes = next(&mut far).await.expect("more").expect("bytes");
                    far.incoming.delivered(bytes.len());
                    got += bytes.len();
                    let held = memory.held();
                    // One read more, of the one that looked last.
                    assert!(held <= most as usize + (256 << 10), "they hold {held}");
                }
            };
            tokio::select! {
                _ = async { tokio::join!(client.write_all(&sent), read) } => {}
                () = carried => panic!("it ended"),
            }
        };
        tokio::select! {
            () = talk => {}
            _ = futures_util::future::join_all(into_streams) => panic!("nobody reads them"),
            _ = futures_util::future::join_all(into_sockets) => panic!("nobody reads them"),
            () = drive => panic!("the tunnel ended"),
            () = drive_other => panic!("the tunnel ended"),
        }
        assert_eq!(memory.held(), 0, "what has ended holds nothing");
    });
}

/// Writes for ever.
async fn endless(mut tcp: TcpStream) {
    while tcp.write_all(&[7; 64 << 10]).await.is_ok() {}
}

#[test]
fn what_is_sent_byte_by_byte_fills_the_send_buffer_by_what_it_costs() {
    run(async {
        // Nobody drives the tunnel: nothing leaves.
        let (mut near, _far, _drive) = stream().await;
        let mut pieces = 0;
        let room = |stream: &Stream| {
            let none = std::task::Context::from_waker(std::task::Waker::noop());
            stream.outgoing.poll_room(&none).is_ready()
        };
        while room(&near) {
            near.outgoing.send(Bytes::from_static(b".")).expect("sent");
            pieces += 1;
            assert!(pieces <= 1024, "each takes some hundred bytes");
        }
        assert!(pieces > 0);
    });
}

#[test]
fn small_frames_that_nobody_reads_do_not_end_their_tunnel() {
    run(async {
        let (mut all, drive) = streams(2).await;
        let (mut near, mut far) = all.pop().expect("a stream");
        let (stalled, mut many) = all.pop().expect("a stream");
        let frames = async {
            send(&mut many, 1 << 20).await;
            for _ in 0..300_000 {
                poll_fn(|context| many.outgoing.poll_room(context)).await;
                many.outgoing.send(Bytes::from_static(b".")).expect("sent");
            }
            flushed(&many).await;
            far.outgoing
                .send(Bytes::from_static(b"alive"))
                .expect("sent");
            let bytes = next(&mut near).await.expect("something").expect("bytes");
            assert_eq!(&*bytes, b"alive");
        };
        tokio::select! {
            () = frames => {}
            () = unread(stalled) => panic!("it is stalled"),
            () = drive => panic!("the tunnel ended"),
        }
    });
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
        let meter = Rc::<Counted>::default();
        let carried = async {
            let ends = tokio::join!(
                relay(End::Tcp(one), End::Stream(near), &meter),
                relay(End::Stream(far), End::Tcp(two), &meter)
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
        let meter = Rc::<Counted>::default();
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

#[test]
fn what_a_client_sent_before_it_broke_is_delivered_though_nothing_was_connected_yet() {
    run(async {
        let (mut client, one) = pair().await;
        let (two, mut server) = pair().await;
        client.write_all(b"a line").await.expect("written");
        reset(client);
        let mut io = Io::Tcp(one);
        let gone = tokio::time::timeout(Duration::from_millis(200), io.gone());
        gone.await.expect_err("it has left something to deliver");
        let Io::Tcp(one) = io else {
            panic!("it is a TCP connection")
        };
        let meter = Rc::<Counted>::default();
        let relayed = relay(End::Tcp(one), End::Tcp(two), &meter);
        let (end, got) = tokio::join!(relayed, rest(&mut server));
        end.expect("a reset is no failure");
        let reset = std::io::ErrorKind::ConnectionReset;
        assert_eq!(got, (b"a line".to_vec(), Some(reset)));
    });
}

#[test]
fn a_client_that_broke_and_left_nothing_is_gone() {
    run(async {
        let (client, one) = pair().await;
        reset(client);
        Io::Tcp(one).gone().await;
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
    fn unsent(&self, pod: &LocalPod) -> Share {
        self.places.unsent(&pod.places)
    }
    fn undelivered(&self, pod: &LocalPod) -> Share {
        self.places.undelivered(&pod.places)
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
        from: None,
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

/// A peer that answers CONNECTs with `status`, as many per tunnel as `each`, then says GOAWAY; or with
/// status 0 is dead in its first tunnel.
async fn peer(listener: TcpListener, certs: Certs, status: u16, each: usize) {
    let scope = Scope::new(None);
    let mut dead = status == 0;
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
        let dies = std::mem::take(&mut dead);
        let status = if status == 0 { 200 } else { status };
        scope.spawn(async move {
            let acceptor = tokio_rustls::TlsAcceptor::from(server);
            let Ok(tls) = acceptor.accept(ReadAhead::new(tcp)).await else {
                return;
            };
            let Ok(mut connection) = crate::hbone::server().handshake::<_, Payload>(tls).await
            else {
                return;
            };
            if dies {
                std::future::pending::<()>().await;
            }
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
            // Of six a pod has two where another one has two: as many as are left.
            places: NodePlaces::new(6),
        });
        let pool = Pool::new(means.clone(), Duration::from_secs(60));
        let (pod, other, connect) = (pod(), pod(), connect());
        let to = |port: u16| Key {
            to: SocketAddr::new([192, 0, 2, 1].into(), port),
            ..key(&pod, "server")
        };
        let asked = async {
            for port in [1, 2] {
                let key = Key {
                    source: other.instance,
                    ..to(port)
                };
                let idle = pool.connect(&key, &other, &scope, &connect).await;
                drop(idle.expect("connected"));
            }
            means.dials.set(0);
            let busy = pool.connect(&to(1), &pod, &scope, &connect).await;
            let idle = pool.connect(&to(2), &pod, &scope, &connect).await;
            drop(idle.expect("connected"));
            let third = pool.connect(&to(3), &pod, &scope, &connect).await;
            assert!(busy.is_ok() && third.is_ok());
            assert_eq!(
                (means.dials.get(), pool.tunnels()),
                (3, 4),
                "the other pod's stay"
            );
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
            let (mut stream, _lease) = stream;
            let end = next(&mut stream).await;
            assert!(
                matches!(end, Some(Err(_))),
                "the stream ends with its tunnel, and not as if its peer had said so"
            );
        };
        tokio::select! {
            () = asked => {}
            () = peer => panic!("the peer ended"),
        }
    });
}

#[test]
fn a_tunnel_whose_peer_is_dead_is_left_by_what_is_not_connected_yet() {
    run(async {
        let (pool, means, scope, peer) = pool(0, usize::MAX).await;
        let (pod, connect) = (pod(), connect());
        let key = key(&pod, "server");
        let all = (0..20).map(|_| pool.connect(&key, &pod, &scope, &connect));
        tokio::select! {
            all = futures_util::future::join_all(all) => {
                assert!(all.iter().all(Result::is_ok), "{all:?}");
                assert_eq!(means.dials.get(), 2);
            }
            () = peer => panic!("the peer ended"),
        }
    });
}

#[test]
fn a_tunnel_whose_window_is_used_up_by_what_its_peer_does_not_read_gets_no_new_streams() {
    run(async {
        let (pool, means, scope, peer) = pool(200, usize::MAX).await;
        let (pod, connect) = (pod(), connect());
        let key = key(&pod, "server");
        let talk = async {
            let mut stalled = Vec::new();
            for _ in 0..3 {
                let stream = pool.connect(&key, &pod, &scope, &connect).await;
                let (mut stream, lease) = stream.expect("connected");
                let full = send(&mut stream, 16 << 20);
                tokio::time::timeout(Duration::from_secs(1), full)
                    .await
                    .expect_err("nobody reads it");
                stalled.push((stream, lease));
            }
            assert_eq!(means.dials.get(), 1);
            let other = pool.connect(&key, &pod, &scope, &connect).await;
            other.expect("connected");
            assert_eq!(means.dials.get(), 2);
        };
        tokio::select! {
            () = talk => {}
            () = peer => panic!("the peer ended"),
        }
    });
}

#[test]
fn a_pod_that_drains_keeps_no_tunnel_that_carries_nothing() {
    run(async {
        let (pool, _means, scope, peer) = pool(200, usize::MAX).await;
        let (pod, connect) = (pod(), connect());
        let key = key(&pod, "server");
        let drained = async {
            let stream = pool.connect(&key, &pod, &scope, &connect).await;
            let busy = stream.expect("connected");
            scope.close(true);
            pool.forget(key.source);
            let idle = tokio::time::timeout(Duration::from_millis(200), scope.idle());
            idle.await.expect_err("it carries something");
            drop(busy);
            scope.idle().await;
        };
        tokio::select! {
            () = drained => {}
            () = peer => panic!("the peer ended"),
        }
    });
}

/// A pod that drains goes on to connect, and each time a tunnel may be made for it.
#[test]
fn what_connects_while_its_pod_drains_leaves_no_tunnel_behind() {
    run(async {
        let (pool, _means, scope, peer) = pool(200, usize::MAX).await;
        let (pod, connect) = (pod(), connect());
        let key = key(&pod, "server");
        let drained = async {
            scope.close(true);
            pool.forget(key.source);
            for _ in 0..2 {
                let stream = pool.connect(&key, &pod, &scope, &connect).await;
                drop(stream.expect("connected"));
            }
            let idle = tokio::time::timeout(Duration::from_secs(10), scope.idle());
            idle.await.expect("nothing is left");
        };
        tokio::select! {
            () = drained => {}
            () = peer => panic!("the peer ended"),
        }
    });
}

/// Opens a connection by the pool and then `count` at once, and gives them up while the peer, which has
/// h2's own settings, is busy. What the peer saw of those, and what the first one got afterwards.
async fn give_up(count: usize) -> (usize, Option<Result<Bytes, h2::Error>>) {
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
    let pool = Pool::new(means, Duration::from_secs(60));
    let scope = Scope::new(None);
    scope.spawn(certs.clone().rotate());
    let (pod, connect) = (pod(), connect());
    let key = key(&pod, "server");
    let busy = tokio::sync::Notify::new();
    let stock = async {
        let (tcp, _) = listener.accept().await.expect("a connection");
        let server = certs.current(&who("server")).await.expect("a certificate");
        let tls = tokio_rustls::TlsAcceptor::from(server.server.clone());
        let tls = tls.accept(ReadAhead::new(tcp)).await.expect("a handshake");
        let mut connection = h2::server::handshake(tls).await.expect("a handshake");
        let (_, mut respond) = (connection.accept().await)
            .expect("a request")
            .expect("a request");
        let answer = respond.send_response(http::Response::new(()), false);
        let mut live = answer.expect("answered");
        let _ = tokio::time::timeout(Duration::from_millis(100), connection.accept()).await;
        busy.notified().await;
        let mut seen = 0;
        while let Ok(Some(Ok((_, mut respond)))) =
            tokio::time::timeout(Duration::from_secs(1), connection.accept()).await
        {
            seen += 1;
            // It may be reset already.
            let _ = respond.send_response(http::Response::new(()), true);
        }
        let _ = live.send_data(Bytes::from_static(b"still"), false);
        let _ = tokio::time::timeout(Duration::from_secs(1), connection.accept()).await;
        seen
    };
    let client = async {
        let first = pool.connect(&key, &pod, &scope, &connect).await;
        let (mut first, _lease) = first.expect("connected");
        tokio::time::sleep(Duration::from_millis(200)).await;
        let all = (0..count).map(|_| pool.connect(&key, &pod, &scope, &connect));
        let all = futures_util::future::join_all(all);
        let given_up = tokio::time::timeout(Duration::from_millis(200), all).await;
        given_up.expect_err("the peer is busy");
        tokio::time::sleep(Duration::from_millis(100)).await;
        busy.notify_one();
        next(&mut first).await
    };
    tokio::join!(stock, client)
}

#[test]
fn connections_that_are_given_up_at_once_do_not_end_their_tunnel() {
    run(async {
        let (seen, first) = give_up(60).await;
        let first = first.expect("no end").expect("the tunnel goes on");
        assert_eq!((seen, &*first), (60, &b"still"[..]));
    });
}

/// An h2 client that reads nothing by itself: each call is a frame.
struct Frames(tokio::io::DuplexStream);

impl Frames {
    async fn write(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
        let mut frame = (payload.len() as u32).to_be_bytes()[1..].to_vec();
        frame.extend([kind, flags]);
        frame.extend(stream.to_be_bytes());
        frame.extend(payload);
        self.0.write_all(&frame).await.expect("written");
    }

    /// Asks for a connection, by the stream of this number.
    async fn connect(&mut self, stream: u32) {
        // Literals of the names 2 and 1 of HPACK's table.
        let request = [b"\x02\x07CONNECT\x01\x0c", &b"192.0.2.1:80"[..]].concat();
        self.write(1, 4, stream, &request).await;
    }

    /// The kinds of what comes, up to the answer to a PING.
    async fn until_pong(&mut self) -> Vec<u8> {
        self.write(6, 0, 0, b"12345678").await;
        let mut kinds = Vec::new();
        loop {
            let mut head = [0; 9];
            self.0.read_exact(&mut head).await.expect("a frame");
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
            let mut payload = vec![0; length as usize];
            self.0.read_exact(&mut payload).await.expect("a frame");
            kinds.push(head[3]);
            // GOAWAY, or a PING's answer.
            if head[3] == 7 || (head[3], head[4]) == (6, 1) {
                return kinds;
            }
        }
    }
}

/// A tunnel's server end with our settings, and a client of frames.
async fn framed() -> (
    h2::server::Connection<tokio::io::DuplexStream, Payload>,
    Frames,
) {
    let (near, far) = tokio::io::duplex(1 << 20);
    let mut frames = Frames(near);
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    frames.0.write_all(preface).await.expect("written");
    frames.write(4, 0, 0, &[]).await;
    let server = crate::hbone::server().handshake::<_, Payload>(far).await;
    (server.expect("a handshake"), frames)
}

#[test]
fn a_peer_may_give_up_all_that_it_asked_for_while_we_are_busy() {
    run(async {
        let (mut server, mut frames) = framed().await;
        for number in 0..400 {
            frames.connect(2 * number + 1).await;
            frames
                .write(3, 0, 2 * number + 1, &8_u32.to_be_bytes())
                .await;
        }
        let served = async { while let Some(Ok(_)) = server.accept().await {} };
        tokio::select! {
            kinds = frames.until_pong() => assert!(!kinds.contains(&7), "{kinds:?}"),
            () = served => panic!("the tunnel ended"),
        }
    });
}

#[test]
fn what_a_peer_sends_before_it_hears_of_a_reset_does_not_end_its_tunnel() {
    run(async {
        let (mut server, mut frames) = framed().await;
        for number in 0..400 {
            frames.connect(2 * number + 1).await;
            let asked = server.accept().await;
            let (_, mut respond) = asked.expect("a request").expect("a request");
            respond.send_reset(Reason::CANCEL);
        }
        let served = async { while let Some(Ok(_)) = server.accept().await {} };
        let sent = async {
            tokio::time::sleep(Duration::from_millis(1500)).await;
            frames.until_pong().await;
            for number in 0..400 {
                frames.write(0, 0, 2 * number + 1, b"late").await;
            }
            frames.until_pong().await
        };
        tokio::select! {
            kinds = sent => assert!(!kinds.contains(&7), "{kinds:?}"),
            () = served => panic!("the tunnel ended"),
        }
    });
}

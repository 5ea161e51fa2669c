//! Tunnels with a real peer, over loopback.

use bytes::Bytes;
use h2::client::SendRequest;
use rustls_pki_types::{IpAddr as Name, Ipv4Addr, ServerName};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream};
use tokio::net::{TcpListener, TcpSocket};
use tokio::task::LocalSet;

use super::*;
use crate::drain::TaskGroup;
use crate::proxy::identity::test_ca::Ca;

const INBOUND_IDLE_TIMEOUT: Duration = Duration::from_millis(300);
/// Number of bytes that the server sends when a stream's client has ended its direction.
const ANSWER: usize = 4_000_000;
/// Port of the server to which no stream is answered.
const UNANSWERED: u16 = 81;
/// Memory, in bytes, for what the server's streams have not taken; they take nothing.
const MEMORY: u64 = 1 << 20;

fn who(account: &str) -> Identity {
    Identity::new("td", "ns", account)
}

#[test]
fn a_tunnel_that_carries_nothing_is_closed_and_no_other() {
    let lasted = run(tunnel(Ca::new(), INBOUND_IDLE_TIMEOUT, async |send| {
        let stream = open(send).await.expect("a stream");
        // The stream ends a little after the tunnel's use was checked.
        sleep(INBOUND_IDLE_TIMEOUT * 4 + INBOUND_IDLE_TIMEOUT / 8).await;
        end(stream).await.expect("it is there still");
    }));
    assert!(lasted >= INBOUND_IDLE_TIMEOUT / 2, "{lasted:?}");
}

#[test]
fn a_tunnel_takes_nothing_new_when_its_peers_certificate_has_ended_and_what_runs_goes_on() {
    let ca = Ca::for_seconds(3);
    let lasted = run(tunnel(ca, Duration::from_secs(60), async |send| {
        let stream = open(send).await.expect("a stream");
        sleep(Duration::from_secs(4)).await;
        open(send).await.expect_err("nothing new");
        end(stream).await.expect("it is there still");
    }));
    assert!(lasted < Duration::from_secs(5), "{lasted:?}");
}

#[test]
fn a_tunnel_takes_nothing_new_when_our_own_certificate_has_ended() {
    let ca = Ca::new().for_seconds_of(who("server"), 3);
    run(tunnel(ca, Duration::from_secs(60), async |send| {
        sleep(Duration::from_secs(4)).await;
        open(send).await.expect_err("nothing new");
    }));
}

#[test]
fn a_peer_that_does_not_heed_the_end_opens_nothing_once_a_good_one_would_have() {
    let ca = Ca::new().for_seconds_of(who("server"), 3);
    run(tunnel_by(ca, Duration::from_secs(60), deaf, async |send| {
        let running = open(send).await.expect("a stream");
        sleep(Duration::from_secs(3)).await;
        let late = open(send).await.expect("it may not know yet");
        sleep(GOAWAY_GRACE).await;
        let error = open(send).await.expect_err("it was told");
        assert_eq!(error.reason(), Some(h2::Reason::REFUSED_STREAM), "{error}");
        for stream in [running, late] {
            end(stream).await.expect("what runs goes on");
        }
    }));
}

/// Its answer to GOAWAY waits behind the bytes that it has not read, as on a slow network.
#[test]
fn a_tunnel_that_ends_delivers_what_it_has_sent_to_a_peer_that_reads_slowly() {
    run(tunnel_by(
        Ca::for_seconds(3),
        Duration::from_secs(60),
        slow,
        async |send| {
            let stream = open(send).await.expect("a stream");
            sleep(Duration::from_millis(2500)).await;
            end(stream).await.expect("it is delivered");
        },
    ));
}

/// Each is looked at before the next ones come, so they never wait for us.
#[test]
fn a_peer_that_gives_up_all_that_it_asks_for_is_told_to_open_no_more_and_what_runs_goes_on() {
    run(async {
        let flood = async |send: &mut SendRequest<Bytes>| {
            let running = open(send).await.expect("a stream");
            let mut looked_at = Vec::new();
            let mut told = false;
            for _ in 0..=2 * hbone::GIVEN_UP / 50 {
                let mut asked = Vec::new();
                for _ in 0..50 {
                    let Ok(ready) = send.clone().ready().await else {
                        break;
                    };
                    *send = ready;
                    let request = http::Request::connect(format!("192.0.2.1:{UNANSWERED}"));
                    let request = request.body(()).expect("a request");
                    let Ok(sent) = send.send_request(request, false) else {
                        break;
                    };
                    asked.push(sent);
                }
                match open(send).await {
                    Ok(stream) => looked_at.push(stream),
                    Err(_) => {
                        told = true;
                        break;
                    }
                }
                for (_, mut stream) in asked {
                    stream.send_reset(Reason::CANCEL);
                }
            }
            assert!(told, "it goes on");
            drop(looked_at);
            end(running).await.expect("what runs goes on");
        };
        let unused = Duration::from_secs(60);
        let (end, _) = ended_by(Ca::new(), unused, |tls, _| tls, flood).await;
        end.expect("it ends when nothing runs in it any more");
    });
}

#[test]
fn a_tunnel_that_brings_more_than_its_pod_has_memory_for_is_ended() {
    run(async {
        let fill = async |send: &mut SendRequest<Bytes>| {
            let (mut stream, _body) = open(send).await.expect("a stream");
            loop {
                stream.reserve_capacity(1 << 16);
                let Some(Ok(room)) = poll_fn(|context| stream.poll_capacity(context)).await else {
                    return;
                };
                let sent = stream.send_data(Bytes::from(vec![7; room]), false);
                if sent.is_err() {
                    return;
                }
            }
        };
        let unused = Duration::from_secs(60);
        let (end, _) = ended_by(Ca::new(), unused, |tls, _| tls, fill).await;
        let reason = end.expect_err("it is ended").reason();
        assert_eq!(reason, Some(Reason::ENHANCE_YOUR_CALM));
    });
}

fn run<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let test = async { timeout(Duration::from_secs(30), test).await };
    let done = LocalSet::new().block_on(&runtime.expect("a runtime"), test);
    done.expect("it is closed in time")
}

type Both = (h2::SendStream<Bytes>, h2::RecvStream);

async fn open(send: &mut SendRequest<Bytes>) -> Result<Both, h2::Error> {
    let request = http::Request::connect("192.0.2.1:80").body(());
    let (response, stream) = send.send_request(request.expect("a request"), false)?;
    Ok((stream, response.await?.into_body()))
}

/// Ends our direction, and reads the answer.
async fn end((mut stream, mut body): Both) -> Result<(), h2::Error> {
    stream.send_data(Bytes::new(), true)?;
    let mut read = 0;
    while let Some(bytes) = body.data().await {
        let bytes = bytes?.len();
        body.flow_control().release_capacity(bytes)?;
        read += bytes;
    }
    assert_eq!(read, ANSWER);
    Ok(())
}

/// Returns a tunnel's bytes for a client that reads some 300 KB of them in a second.
fn slow(tls: Tls, tasks: &TaskGroup) -> DuplexStream {
    let (near, far) = tokio::io::duplex(1 << 14);
    let ((mut from, mut to), (mut far_from, mut far_to)) =
        (tokio::io::split(tls), tokio::io::split(far));
    tasks.spawn(async move {
        _ = tokio::io::copy(&mut far_from, &mut to).await;
        _ = to.shutdown().await;
    });
    tasks.spawn(async move {
        let mut piece = vec![0; 16 << 10];
        while let Ok(read @ 1..) = from.read(&mut piece).await {
            far_to.write_all(&piece[..read]).await.expect("it reads");
            sleep(Duration::from_millis(50)).await;
        }
        _ = far_to.shutdown().await;
    });
    near
}

/// Returns a tunnel's bytes for a client that never sees GOAWAY or PING.
fn deaf(tls: Tls, tasks: &TaskGroup) -> DuplexStream {
    let (near, far) = tokio::io::duplex(1 << 16);
    let ((mut from, mut to), (mut far_from, mut far_to)) =
        (tokio::io::split(tls), tokio::io::split(far));
    tasks.spawn(async move {
        _ = tokio::io::copy(&mut far_from, &mut to).await;
        _ = to.shutdown().await;
    });
    tasks.spawn(async move {
        let mut head = [0; 9];
        while from.read_exact(&mut head).await.is_ok() {
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
            let mut payload = vec![0; length as usize];
            from.read_exact(&mut payload).await.expect("a frame");
            if ![6, 7].contains(&head[3]) {
                far_to.write_all(&head).await.expect("it reads");
                far_to.write_all(&payload).await.expect("it reads");
            }
        }
        _ = far_to.shutdown().await;
    });
    near
}

type Tls = tokio_rustls::client::TlsStream<TcpStream>;

/// Returns for how long a tunnel of a peer with a certificate of this CA lasts after its use.
async fn tunnel(
    ca: Ca,
    unused: Duration,
    use_it: impl AsyncFnOnce(&mut SendRequest<Bytes>),
) -> Duration {
    tunnel_by(ca, unused, |tls, _| tls, use_it).await
}

/// Does what [`tunnel`] does, with a peer that speaks HTTP/2 over the stream that `over` makes of TLS.
async fn tunnel_by<T: AsyncRead + AsyncWrite + Unpin>(
    ca: Ca,
    unused: Duration,
    over: impl FnOnce(Tls, &TaskGroup) -> T,
    use_it: impl AsyncFnOnce(&mut SendRequest<Bytes>),
) -> Duration {
    let (end, lasted) = ended_by(ca, unused, over, use_it).await;
    end.expect("an end in order");
    lasted
}

/// Does what [`tunnel_by`] does, and returns how the tunnel ended besides.
async fn ended_by<T: AsyncRead + AsyncWrite + Unpin>(
    ca: Ca,
    unused: Duration,
    over: impl FnOnce(Tls, &TaskGroup) -> T,
    use_it: impl AsyncFnOnce(&mut SendRequest<Bytes>),
) -> (Result<(), h2::Error>, Duration) {
    let (certs, tasks) = (Certs::new(Arc::new(ca)), TaskGroup::new(None));
    certs.retain(&who("client"));
    certs.retain(&who("server"));
    tasks.spawn(certs.clone().rotate());
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a listener");
    let to = listener.local_addr().expect("an address");

    let (pod, places) = (
        LocalPod::example("uid", who("server"), Vec::new()),
        NodePlaces::new(10).with_memory(64 << 20, MEMORY),
    );
    let serve = async {
        let (tcp, peer) = listener.accept().await.expect("a connection");
        let turns = places.begin(&pod.handshakes, peer.ip());
        let tunnel = handshake(tcp, peer.ip(), &pod, &certs, turns, &places).await;
        let tunnel = tunnel.expect("a tunnel");
        let take = |(parts, mut waiting): Request| {
            tasks.spawn(async move {
                if parts.uri.port_u16() == Some(UNANSWERED) {
                    return waiting.gone().await;
                }
                let mut stream = waiting.connected(None).expect("it waits");
                while let Some(Ok(_)) = poll_fn(|context| stream.incoming.poll_read(context)).await
                {
                }
                let out = &mut stream.outgoing;
                let answer = Bytes::from_static(&[7; ANSWER]);
                for at in (0..ANSWER).step_by(1 << 17) {
                    poll_fn(|context| out.poll_room(context)).await;
                    let piece = answer.slice(at..ANSWER.min(at + (1 << 17)));
                    if out.send(piece).is_err() {
                        return;
                    }
                }
                out.finish().expect("it is there");
                poll_fn(|context| out.poll_flushed(context)).await;
                out.done();
            });
        };
        tunnel.serve(std::future::pending(), unused, take).await;
    };
    let connect = async {
        let own = certs.current(&who("client")).await.expect("a certificate");
        let tls = own.client(&[who("server")]).expect("settings");
        let tcp = TcpSocket::new_v4().expect("a socket");
        // What it has not read must wait at the server.
        tcp.set_recv_buffer_size(64 << 10).expect("set");
        let tcp = tcp.connect(to).await.expect("connected");
        let nobody = ServerName::IpAddress(Name::V4(Ipv4Addr::from([0, 0, 0, 0])));
        let tls = tokio_rustls::TlsConnector::from(tls)
            .connect(nobody, tcp)
            .await;
        let shared = TunnelState::new(&Share::default());
        let h2 = hbone::client::<_, Bytes>(over(tls.expect("TLS"), &tasks), &shared).await;
        let (mut send, connection) = h2.expect("HTTP/2");
        let use_it = async {
            use_it(&mut send).await;
            // The peer does not leave by itself while the sender exists, since that may send more.
            (send, Instant::now())
        };
        let (ended, (_send, used)) = tokio::join!(connection, use_it);
        (ended, used.elapsed())
    };
    let ((), end) = tokio::join!(serve, connect);
    assert_eq!(places.taken(), 0);
    end
}

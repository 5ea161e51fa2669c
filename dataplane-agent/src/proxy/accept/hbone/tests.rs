//! Tunnels with a real peer, over loopback.

use bytes::Bytes;
use h2::client::SendRequest;
use rustls_pki_types::{IpAddr as Name, Ipv4Addr, ServerName};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream};
use tokio::net::TcpListener;
use tokio::task::LocalSet;

use super::*;
use crate::drain::TaskGroup;
use crate::proxy::identity::test_ca::Ca;

const INBOUND_IDLE_TIMEOUT: Duration = Duration::from_millis(300);

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

/// Ends our direction, and waits until the peer has ended its own.
async fn end((mut stream, mut body): Both) -> Result<(), h2::Error> {
    stream.send_data(Bytes::new(), true)?;
    while let Some(Ok(_)) = body.data().await {}
    Ok(())
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
    let (certs, tasks) = (Certs::new(Arc::new(ca)), TaskGroup::new(None));
    certs.retain(&who("client"));
    certs.retain(&who("server"));
    tasks.spawn(certs.clone().rotate());
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a listener");
    let to = listener.local_addr().expect("an address");

    let (pod, places) = (
        LocalPod::example("uid", who("server"), Vec::new()),
        NodePlaces::new(10),
    );
    let serve = async {
        let (tcp, peer) = listener.accept().await.expect("a connection");
        let turns = places.begin(&pod.handshakes, peer.ip());
        let tunnel = handshake(tcp, peer.ip(), &pod, &certs, turns, &places).await;
        let tunnel = tunnel.expect("a tunnel");
        let take = |(_, waiting): Request| {
            tasks.spawn(async move {
                let mut stream = waiting.connected(None).expect("it waits");
                while let Some(Ok(_)) = poll_fn(|context| stream.incoming.poll_read(context)).await
                {
                }
                stream.outgoing.finish().expect("it is there");
            });
        };
        tunnel.serve(std::future::pending(), unused, take).await;
    };
    let connect = async {
        let own = certs.current(&who("client")).await.expect("a certificate");
        let tls = own.client(&[who("server")]).expect("settings");
        let tcp = TcpStream::connect(to).await.expect("connected");
        let nobody = ServerName::IpAddress(Name::V4(Ipv4Addr::from([0, 0, 0, 0])));
        let tls = tokio_rustls::TlsConnector::from(tls)
            .connect(nobody, tcp)
            .await;
        let h2 = hbone::client::<_, Bytes>(over(tls.expect("TLS"), &tasks)).await;
        let (mut send, connection) = h2.expect("HTTP/2");
        let use_it = async {
            use_it(&mut send).await;
            // The peer does not leave by itself while the sender exists, since that may send more.
            (send, Instant::now())
        };
        let (ended, (_send, used)) = tokio::join!(connection, use_it);
        ended.expect("an end in order");
        used.elapsed()
    };
    let ((), lasted) = tokio::join!(serve, connect);
    assert_eq!(places.taken(), 0);
    lasted
}

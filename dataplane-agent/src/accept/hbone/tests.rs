//! Tunnels of a real peer, over loopback.

use bytes::Bytes;
use rustls_pki_types::{IpAddr as Name, Ipv4Addr, ServerName};
use tokio::net::TcpListener;
use tokio::task::LocalSet;

use super::*;
use crate::drain::Scope;
use crate::identity::test_ca::Ca;

const UNUSED: Duration = Duration::from_millis(300);

fn who(account: &str) -> Identity {
    Identity::new("td", "ns", account)
}

#[test]
fn a_tunnel_that_carries_nothing_is_closed_and_no_other() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let test = async { timeout(Duration::from_secs(30), unused()).await };
    let done = LocalSet::new().block_on(&runtime.expect("a runtime"), test);
    done.expect("it is closed in time");
}

async fn unused() {
    let (certs, tasks) = (Certs::new(Arc::new(Ca::new())), Scope::new(None));
    certs.hold(&who("client"));
    certs.hold(&who("server"));
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
        tunnel.serve(std::future::pending(), UNUSED, take).await;
    };
    let connect = async {
        let own = certs.current(&who("client")).await.expect("a certificate");
        let tls = own.client(&[who("server")]).expect("settings");
        let tcp = TcpStream::connect(to).await.expect("connected");
        let nobody = ServerName::IpAddress(Name::V4(Ipv4Addr::from([0, 0, 0, 0])));
        let tls = tokio_rustls::TlsConnector::from(tls)
            .connect(nobody, tcp)
            .await;
        let h2 = hbone::client()
            .handshake::<_, Bytes>(tls.expect("TLS"))
            .await;
        let (mut send, connection) = h2.expect("HTTP/2");
        let use_it = async {
            let request = http::Request::connect("192.0.2.1:80").body(());
            let sent = send.send_request(request.expect("a request"), false);
            let (response, mut stream) = sent.expect("sent");
            response.await.expect("an answer");
            sleep(UNUSED * 4).await;
            stream
                .send_data(Bytes::new(), true)
                .expect("it is there still");
            Instant::now()
        };
        let (ended, used) = tokio::join!(connection, use_it);
        ended.expect("an end in order");
        used.elapsed()
    };
    let ((), lasted) = tokio::join!(serve, connect);
    assert!(lasted >= UNUSED / 2, "{lasted:?}");
    assert_eq!(places.taken(), 0);
}

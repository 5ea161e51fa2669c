//! Tunnels that are shared, given up, closed by their peer or lost.

use super::peer::*;
use super::*;

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

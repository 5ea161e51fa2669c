//! Tunnels that are shared, given up, closed by their peer or lost.

use std::net::SocketAddr;
use std::sync::Arc;

use super::super::TransportError;
use super::super::pool::TunnelKey;
use super::peer::{Answers, Client, key, pod, who, with_peer};
use super::*;
use crate::drain::TaskGroup;
use crate::proxy::identity::test_ca::Ca;
use crate::proxy::limits::Full;

#[test]
fn connections_that_go_the_same_way_at_once_share_a_tunnel() {
    with_peer(Answers::default(), async |client| {
        let all = client.connect_all(50).await;
        assert!(all.iter().all(Result::is_ok));
        assert_eq!((client.dials(), client.pool.tunnels()), (1, 1));
    });
}

#[test]
fn more_streams_than_a_tunnel_has_room_for_get_another_one() {
    with_peer(Answers::default(), async |client| {
        let all = client
            .connect_all(crate::proxy::hbone::CLIENT_STREAMS + 10)
            .await;
        assert!(all.iter().all(Result::is_ok));
        assert_eq!(client.dials(), 2);
    });
}

#[test]
fn an_idle_tunnel_gives_its_place_to_a_new_one_and_a_busy_one_does_not() {
    // The pod gets two of the six places, since the other pod has two and two must be left.
    let answers = Answers {
        places: 6,
        ..Answers::default()
    };
    with_peer(answers, async |client| {
        let other = pod();
        let worker = TaskGroup::new(None);
        worker.spawn(Rc::clone(&client.pool).close_idle_when_wanted(Arc::clone(&client.pod)));
        let to = |pod, port: u16| TunnelKey {
            to: SocketAddr::new([192, 0, 2, 1].into(), port),
            ..key(pod)
        };
        for port in [1, 2] {
            let idle = client.connect_by(&other, &to(&other, port)).await;
            drop(idle.expect("connected"));
        }
        let own = async |port| client.connect_by(&client.pod, &to(&client.pod, port)).await;
        let busy = own(1).await;
        let idle = own(2).await;
        drop(idle.expect("connected"));
        let third = own(3).await;
        assert!(busy.is_ok() && third.is_ok());
        assert_eq!(
            (client.dials(), client.pool.tunnels()),
            (5, 4),
            "the other pod's stay"
        );
        let full = own(4).await.expect_err("none is idle");
        assert!(matches!(full, TransportError::Full(Full::Node)), "{full}");
    });
}

/// The two workers run on one thread, with a pool each for one pod.
#[test]
fn an_idle_tunnel_of_another_worker_gives_its_place_as_well() {
    let answers = Answers {
        places: 4,
        ..Answers::default()
    };
    with_peer(answers, async |client| {
        let (pod, elsewhere) = (&client.pod, client.another_worker());
        let to = |port: u16| TunnelKey {
            to: SocketAddr::new([192, 0, 2, 1].into(), port),
            ..key(pod)
        };
        let workers = TaskGroup::new(None);
        for pool in [&client.pool, &elsewhere] {
            workers.spawn(Rc::clone(pool).close_idle_when_wanted(Arc::clone(pod)));
        }
        // The pod gets two of the four places.
        let busy = client.connect_by(pod, &to(1)).await.expect("connected");
        let idle = client.connect_in(&elsewhere, pod, &to(2)).await;
        drop(idle.expect("connected"));
        let second = client.connect_by(pod, &to(3)).await;
        let second = second.expect("the idle one gives way");
        assert_eq!(elsewhere.tunnels(), 0);
        // One of them may take longer where the machine stands still.
        let mut took = Duration::MAX;
        for _ in 0..3 {
            let begun = tokio::time::Instant::now();
            let full = client.connect_in(&elsewhere, pod, &to(2)).await;
            let full = full.expect_err("none is idle");
            assert!(matches!(full, TransportError::Full(Full::Node)), "{full}");
            took = took.min(begun.elapsed());
        }
        assert!(took < Duration::from_millis(500), "at once: {took:?}");
        drop((busy, second));
    });
}

#[test]
fn a_tunnel_that_its_peer_closes_is_left_and_nobody_notices() {
    let answers = Answers {
        each: 3,
        ..Answers::default()
    };
    with_peer(answers, async |client| {
        for _ in 0..12 {
            drop(client.connect().await.expect("connected"));
        }
        assert!(client.dials() >= 4, "{}", client.dials());
    });
}

#[test]
fn a_peer_that_closes_its_tunnels_at_once_is_not_dialled_without_end() {
    run(async {
        let (client, peer) = Client::new(100).await;
        let (client, (told, connected)) = (Rc::new(client), tokio::sync::oneshot::channel());
        let connects = Rc::clone(&client);
        // It is a task of its own, as a connection is: its tunnel is driven before it learns of it.
        client.group.spawn(async move {
            let _ = told.send(connects.connect().await.map(drop));
        });
        let connected = tokio::time::timeout(Duration::from_secs(5), connected);
        let connected = beside(peer.close_at_once(), connected).await;
        assert!(connected.is_ok(), "{} dials", client.dials());
        let ended = connected.expect("in time").expect("told");
        let error = ended.expect_err("there is no tunnel");
        assert!(matches!(error, TransportError::Handshake(_)), "{error}");
        assert_eq!(client.dials(), 3);
    });
}

#[test]
fn a_refusal_is_told_by_its_status_and_a_stranger_by_its_name() {
    let answers = Answers {
        status: http::StatusCode::UNAUTHORIZED,
        ..Answers::default()
    };
    with_peer(answers, async |client| {
        let refused = client.connect().await.expect_err("401");
        assert_eq!(refused.to_string(), "http status: 401 Unauthorized");
        let another = TunnelKey {
            expected: vec![who("another")],
            ..key(&client.pod)
        };
        let stranger = client.connect_by(&client.pod, &another).await;
        let stranger = stranger.expect_err("somebody else");
        assert!(matches!(stranger, TransportError::Tls(_)), "{stranger}");
        let words = "peer did not present the expected SAN (spiffe://td/ns/ns/sa/another), got spiffe://td/ns/ns/sa/server";
        assert!(stranger.to_string().contains(words), "{stranger}");
    });
}

#[test]
fn a_scope_that_is_cut_takes_its_tunnels_with_it() {
    with_peer(Answers::default(), async |client| {
        let (mut stream, _lease) = client.connect().await.expect("connected");
        client.pool.forget(client.pod.instance);
        assert_eq!(client.pool.tunnels(), 0);
        client.group.abort_and_wait().await;
        let end = next(&mut stream).await;
        assert!(
            matches!(end, Some(Err(_))),
            "the stream ends with its tunnel, and not as if its peer had said so"
        );
    });
}

#[test]
fn a_tunnel_whose_peer_is_dead_is_left_by_what_is_not_connected_yet() {
    let answers = Answers {
        dead_at_first: true,
        ..Answers::default()
    };
    with_peer(answers, async |client| {
        let all = client.connect_all(20).await;
        assert!(all.iter().all(Result::is_ok), "{all:?}");
        assert_eq!(client.dials(), 2);
    });
}

/// It does not matter whether streams end in the middle of a piece, nor whether anybody waits to send more.
#[test]
fn a_tunnel_whose_window_is_used_up_by_what_its_peer_does_not_read_gets_no_new_streams() {
    let window = crate::proxy::hbone::STREAM_WINDOW as usize;
    for (bytes, piece) in [
        (4 * window, 1 << 16),
        (4 * window, 60_000),
        (window + 1, 60_000),
    ] {
        with_peer(Answers::default(), async |client| {
            for _ in 0..3 {
                let (mut stream, slot) = client.connect().await.expect("connected");
                // It is a task of its own, as a relay is: it is polled when it is woken.
                client.group.spawn(async move {
                    send_in(&mut stream, bytes, piece).await;
                    std::future::pending::<()>().await;
                    drop((stream, slot));
                });
            }
            assert_eq!(client.dials(), 1);
            // The window is used up after some time, and found so after some more.
            for _ in 0..100 {
                tokio::time::sleep(Duration::from_millis(200)).await;
                client.connect().await.expect("connected");
                if client.dials() > 1 {
                    break;
                }
            }
            assert_eq!(client.dials(), 2, "{bytes} bytes in pieces of {piece}");
        });
    }
}

#[test]
fn a_pod_that_drains_keeps_no_tunnel_that_carries_nothing() {
    with_peer(Answers::default(), async |client| {
        let busy = client.connect().await.expect("connected");
        client.group.start_drain();
        client.pool.forget(client.pod.instance);
        let idle = tokio::time::timeout(Duration::from_millis(200), client.group.idle());
        idle.await.expect_err("it carries something");
        drop(busy);
        client.group.idle().await;
    });
}

/// A pod that drains still connects, and a tunnel may be made for each connection.
#[test]
fn what_connects_while_its_pod_drains_leaves_no_tunnel_behind() {
    with_peer(Answers::default(), async |client| {
        client.group.start_drain();
        client.pool.forget(client.pod.instance);
        for _ in 0..2 {
            drop(client.connect().await.expect("connected"));
        }
        let idle = tokio::time::timeout(Duration::from_secs(10), client.group.idle());
        idle.await.expect("nothing is left");
    });
}

/// Opens a connection by the pool and then `count` at once, and gives these up while the peer, which has h2's own
/// settings, is busy. Returns how many of these the peer saw, and what the first one read afterwards.
async fn give_up(count: usize) -> (usize, Option<Result<Bytes, h2::Error>>) {
    let (client, peer) = Client::new(100).await;
    let busy = tokio::sync::Notify::new();
    let stock = async {
        let tls = peer.accept().await.await.expect("a handshake");
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
            // The stream may be reset already.
            let _ = respond.send_response(http::Response::new(()), true);
        }
        let _ = live.send_data(Bytes::from_static(b"still"), false);
        let _ = tokio::time::timeout(Duration::from_secs(1), connection.accept()).await;
        seen
    };
    let client = async {
        let (mut first, _lease) = client.connect().await.expect("connected");
        tokio::time::sleep(Duration::from_millis(200)).await;
        let given_up = tokio::time::timeout(Duration::from_millis(200), client.connect_all(count));
        given_up.await.expect_err("the peer is busy");
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

#[test]
fn a_tunnel_whose_certificates_have_ended_is_closed_when_it_carries_nothing() {
    run(async {
        let ca = Ca::for_seconds(3);
        let (client, peer) = Client::with_certificates_of(ca, 100).await;
        let test = async {
            let busy = client.connect().await.expect("connected");
            let elsewhere = TunnelKey {
                target: "c//Pod/ns/another".into(),
                ..key(&client.pod)
            };
            let idle = client.connect_by(&client.pod, &elsewhere).await;
            drop(idle.expect("connected"));
            tokio::time::sleep(Duration::from_secs(4)).await;
            let ended = tokio::time::timeout(Duration::from_millis(100), client.group.idle()).await;
            ended.expect_err("one carries something");
            drop(busy);
            let ended = tokio::time::timeout(Duration::from_secs(5), client.group.idle()).await;
            ended.expect("both are closed");
        };
        beside(peer.serve(Answers::default()), test).await;
    });
}

#[test]
fn what_is_new_takes_no_tunnel_whose_certificates_have_ended() {
    run(async {
        let ca = Ca::for_seconds(3);
        let (client, peer) = Client::with_certificates_of(ca, 100).await;
        let test = async {
            let (mut first, _lease) = client.connect().await.expect("connected");
            tokio::time::sleep(Duration::from_secs(4)).await;
            client.connect().await.expect("connected");
            assert_eq!(client.dials(), 2);
            let end = tokio::time::timeout(Duration::from_millis(100), next(&mut first)).await;
            assert!(end.is_err(), "what runs goes on: {end:?}");
        };
        beside(peer.serve(Answers::default()), test).await;
    });
}

//! Connections that nobody reads: the memory that they hold is bounded, and others go on.

use super::*;
use crate::proxy::hbone::stream::Waiting;
use crate::proxy::limits::memory::{Memory, PodMemory};

/// Relays to a client that reads nothing and has small buffers; runs for ever.
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

/// Writes for ever.
async fn endless(mut tcp: TcpStream) {
    while tcp.write_all(&[7; 64 << 10]).await.is_ok() {}
}

/// Writes until no more bytes are taken.
async fn fill(tcp: &mut TcpStream) {
    let endless = async { while tcp.write_all(&[7; 64 << 10]).await.is_ok() {} };
    let full = tokio::time::timeout(Duration::from_millis(300), endless).await;
    full.expect_err("nobody reads it");
}

#[test]
fn a_relay_moves_a_bounded_amount_in_a_turn_and_both_ways() {
    run(async {
        let ((mut client, one), (two, mut server)) = (pair().await, pair().await);
        tokio::join!(fill(&mut client), fill(&mut server));
        let counted = Rc::<Counted>::default();
        let mut relayed = Box::pin(relay(End::Tcp(one), End::Tcp(two), &counted));
        poll_fn(|context| {
            assert!(relayed.as_mut().poll(context).is_pending());
            std::task::Poll::Ready(())
        })
        .await;
        for moved in [counted.up.get(), counted.down.get()] {
            assert!((1..=1 << 20).contains(&moved), "{counted:?}");
        }
        let all = async {
            let mut piece = vec![0; 64 << 10];
            while counted.up.get() < 2 << 20 {
                let _ = server.read(&mut piece).await.expect("bytes");
            }
        };
        tokio::select! {
            () = all => {}
            _ = relayed => panic!("it ended"),
        }
    });
}

/// Reads `bytes` bytes, and calls `look` after each piece.
async fn read(stream: &mut Stream, bytes: usize, look: impl Fn()) {
    let mut got = 0;
    while got < bytes {
        let piece = next(stream).await.expect("more").expect("bytes");
        stream.incoming.delivered(piece.len());
        got += piece.len();
        look();
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
            // Wait until they are full.
            tokio::time::sleep(Duration::from_secs(3)).await;
            tokio::join!(read(&mut near, 20 << 20, || {}), send(&mut far, 20 << 20));
        };
        tokio::select! {
            () = beside(drive, talk) => {}
            _ = join_all(stalled) => panic!("they are stalled"),
        }
    });
}

#[test]
fn streams_whose_clients_broke_hold_back_no_other_of_their_tunnel() {
    run(async {
        let (mut all, drive) = streams(6).await;
        let (mut near, mut far) = all.pop().expect("a stream");
        let counted = Rc::<Counted>::default();
        // The bytes that they had sent wait for a server that does not read but still sends.
        let broken = all.into_iter().map(|(near, mut far)| {
            let counted = Rc::clone(&counted);
            async move {
                let (mut client, one) = pair().await;
                let breaks = async {
                    let endless = async { while client.write_all(&[0; 1 << 16]).await.is_ok() {} };
                    let full = tokio::time::timeout(Duration::from_millis(500), endless).await;
                    full.expect_err("it is blocked");
                    close_by_reset(&client).expect("a socket");
                    drop(client);
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    send(&mut far, 4 << 20).await;
                };
                let _ = tokio::join!(relay(End::Tcp(one), End::Stream(near), &counted), breaks);
            }
        });
        let talk = async {
            tokio::time::sleep(Duration::from_millis(1200)).await;
            far.outgoing
                .send(Bytes::from_static(b"alive"))
                .expect("sent");
            let read = tokio::time::timeout(Duration::from_millis(700), next(&mut near)).await;
            let bytes = read.expect("in time").expect("something").expect("bytes");
            assert_eq!(&*bytes, b"alive");
        };
        tokio::select! {
            () = talk => {}
            _ = futures_util::future::join_all(broken) => panic!("they wait for their server"),
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
        // The other connection has its own tunnel, since they use up the window of theirs.
        let (near, mut far, drive_other) = stream().await;
        let (greedy, other) = (memory.share(&pods[0]), memory.share(&pods[1]));
        let counted = Rc::<Counted>::default();
        // Half of them go to streams that get no credit, half to sockets.
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
            // Wait until they are full.
            tokio::time::sleep(Duration::from_secs(2)).await;
            let held = memory.held();
            assert!(held > most as usize / 4, "they hold {held}");
            let (mut client, one) = pair().await;
            let carried = relay::relay(End::Tcp(one), End::Stream(near), &other, &counted);
            let sent = vec![7; 20 << 20];
            let bounded = || {
                let held = memory.held();
                // The connection that checked last may have made one read more.
                assert!(held <= most as usize + (256 << 10), "they hold {held}");
            };
            let read = read(&mut far, sent.len(), bounded);
            tokio::select! {
                _ = async { tokio::join!(client.write_all(&sent), read) } => {}
                _ = carried => panic!("it ended"),
            }
        };
        tokio::select! {
            () = beside(drive, beside(drive_other, talk)) => {}
            _ = join_all(into_streams) => panic!("nobody reads them"),
            _ = join_all(into_sockets) => panic!("nobody reads them"),
        }
        assert_eq!(memory.held(), 0, "what has ended holds nothing");
    });
}

#[test]
fn what_is_sent_byte_by_byte_fills_the_send_buffer_by_what_it_costs() {
    run(async {
        // Nobody drives the tunnel, so nothing leaves.
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
            () = beside(drive, frames) => {}
            () = unread(stalled) => panic!("it is stalled"),
        }
    });
}

#[test]
fn what_comes_for_a_connection_that_is_not_made_yet_is_counted_and_delivered() {
    const SENT: usize = 300_000;
    run(async {
        let memory = Memory::new(64 << 20);
        let shared = TunnelState::new(&memory.share(&PodMemory::default()));
        let (near, far) = tokio::io::duplex(1 << 20);
        let client = crate::proxy::hbone::client::<_, Bytes>(near, &shared);
        let server = crate::proxy::hbone::server::<_, Payload>(far, &shared);
        let (client, server) = tokio::join!(client, server);
        let ((mut client, driven), mut server) = (client.expect("client"), server.expect("server"));
        let request = http::Request::connect("192.0.2.1:80").body(());
        let asked = client.send_request(request.expect("a request"), false);
        let (_response, mut send) = asked.expect("sent");
        send.send_data(Bytes::from(vec![7; SENT]), false)
            .expect("sent");
        let mut driven = Box::pin(async move { drop(driven.await) });
        let accepted = beside(&mut driven, server.accept()).await;
        let (request, respond) = accepted.expect("a request").expect("a request");
        let mut waiting = Waiting::new(respond, request.into_body(), &shared);
        let server = async { while let Some(Ok(_)) = server.accept().await {} };
        let waits = async {
            let gone = tokio::time::timeout(Duration::from_millis(200), waiting.gone());
            gone.await.expect_err("its peer waits");
            let always = 64 << 10;
            assert_eq!(memory.held(), SENT - always);
            let mut stream = waiting.connected(None).expect("its peer waits");
            read(&mut stream, SENT, || {}).await;
            assert_eq!(memory.held(), 0);
        };
        beside(driven, beside(server, waits)).await;
    });
}

//! Connections deliver bytes unchanged and in order, and each direction ends by itself.

use proptest::prelude::*;

use super::*;
use crate::proxy::hbone::readahead::ReadAhead;

/// Writes pieces and ends its direction. Returns what comes until the other side ends.
async fn exchange(mut tcp: TcpStream, pieces: &[Vec<u8>]) -> Vec<u8> {
    let (mut read, mut write) = tcp.split();
    let writing = async {
        for piece in pieces {
            write.write_all(piece).await.expect("written");
        }
        write.shutdown().await.expect("ended");
    };
    let mut all = Vec::new();
    let (_, read) = tokio::join!(writing, read.read_to_end(&mut all));
    read.expect("an orderly end");
    all
}

fn pieces() -> impl Strategy<Value = Vec<Vec<u8>>> {
    let piece = (any::<u8>(), prop_oneof![0..40_usize, 1000..90_000_usize])
        .prop_map(|(byte, length)| (0..length).map(|at| byte.wrapping_add(at as u8)).collect());
    proptest::collection::vec(piece, 0..6)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn what_goes_in_comes_out_and_each_direction_ends_by_itself(up in pieces(), down in pieces()) {
        let talk = async |client, server| tokio::join!(exchange(client, &up), exchange(server, &down));
        let ((to_client, to_server), both) = run(through_stream(talk));
        assert!(to_server == up.concat(), "upwards");
        assert!(to_client == down.concat(), "downwards");
        for Relayed { counted, end } in both {
            end.expect("an orderly end");
            assert_eq!(counted.up.get(), up.concat().len() as u64);
            assert_eq!(counted.down.get(), down.concat().len() as u64);
        }
    }
}

/// A peer that refuses an upload answers to the end, and resets what it does not read (RFC 9113, 8.1). The client
/// must get the answer all the same.
#[test]
fn an_answer_is_passed_on_though_its_peer_reads_no_more() {
    run(into_stream(async |mut client, mut far| {
        let refuse = async {
            let some = next(&mut far).await.expect("a beginning").expect("bytes");
            assert!(!some.is_empty());
            far.outgoing.send(Bytes::from_static(b"413")).expect("sent");
            far.outgoing.finish().expect("ended");
            flushed(&far).await;
            far.outgoing.reset(h2::Reason::NO_ERROR);
        };
        let upload = async {
            client.write_all(&[7; 100_000]).await.expect("written");
            let mut answer = [0; 3];
            client.read_exact(&mut answer).await.expect("the answer");
            assert_eq!(&answer, b"413");
        };
        tokio::join!(upload, refuse);
    }));
}

/// RFC 9113, 8.1. The client learns of it when it writes, as from the kernel of a server that has closed.
#[test]
fn a_peer_that_has_said_its_end_may_stop_reading() {
    run(async {
        let answered = async |client, mut far: Stream| {
            far.outgoing
                .send(Bytes::from_static(b"whole"))
                .expect("sent");
            far.outgoing.finish().expect("ended");
            flushed(&far).await;
            tokio::time::sleep(Duration::from_millis(20)).await;
            far.outgoing.reset(h2::Reason::NO_ERROR);
            client
        };
        let (mut client, relayed) = into_stream(answered).await;
        relayed.end.expect("it has ended");
        assert_eq!(rest(&mut client).await, (b"whole".to_vec(), None));
        client.write_all(b"late").await.expect("not known yet");
        tokio::time::sleep(Duration::from_millis(20)).await;
        client.write_all(b"later").await.expect_err("known now");
    });
}

/// A peer that has not read everything still sends, if only a PING. If the socket were closed at once, the kernel
/// would answer it by a reset, and discard what is left.
#[test]
fn what_a_tunnel_sent_before_it_ended_is_delivered() {
    const SENT: usize = 1 << 20;
    run(async {
        let (near, far) = pair().await;
        let small = socket2::SockRef::from(&far).set_recv_buffer_size(16 << 10);
        small.expect("set");
        let shared = TunnelState::new(&Share::default());
        let near = ReadAhead::new(near, &Share::default());
        let server = crate::proxy::hbone::server::<_, Bytes>(near, &shared);
        let client = crate::proxy::hbone::client::<_, Bytes>(far, &shared);
        let (client, server) = tokio::join!(client, server);
        let ((mut client, mut driven), mut server) =
            (client.expect("client"), server.expect("server"));
        let mut pings = driven.ping_pong().expect("nobody has them");
        let request = http::Request::connect("192.0.2.1:80").body(());
        let (response, _) = client
            .send_request(request.expect("a request"), true)
            .expect("sent");
        let mut driven = Box::pin(async move { drop(driven.await) });
        let accepted = beside(&mut driven, server.accept()).await;
        let (_, mut respond) = accepted.expect("a request").expect("a request");
        server.graceful_shutdown();
        let answered = respond.send_response(http::Response::new(()), false);
        let mut answered = answered.expect("answered");
        let server = async move { while let Some(Ok(_)) = server.accept().await {} };
        let mut server = Box::pin(server);
        let response = beside(&mut driven, beside(&mut server, response)).await;
        let heard = tokio::time::sleep(Duration::from_millis(100));
        beside(&mut driven, beside(&mut server, heard)).await;

        answered
            .send_data(Bytes::from(vec![7; SENT]), true)
            .expect("sent");
        // All bytes are written, and nobody reads them yet.
        let early = tokio::time::timeout(Duration::from_millis(300), &mut server).await;
        let closed = early.is_ok();
        drop(early);
        let server = async move { if closed { drop(server) } else { server.await } };
        pings.send_ping(h2::Ping::opaque()).expect("sent");
        let read = async {
            let mut body = response.expect("an answer").into_body();
            let mut read = 0;
            while let Some(bytes) = body.data().await {
                let bytes = bytes.expect("an orderly end");
                read += bytes.len();
                let credit = body.flow_control().release_capacity(bytes.len());
                credit.expect("it was read");
            }
            read
        };
        let (read, ..) = tokio::join!(read, driven, server);
        assert_eq!(read, SENT);
    });
}

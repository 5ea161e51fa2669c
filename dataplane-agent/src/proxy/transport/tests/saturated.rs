//! Tunnels that are full in both directions.

use std::pin::pin;

use h2::{Ping, PingPong, RecvStream, SendStream};

use super::*;
use crate::proxy::hbone::readahead::{AHEAD, ReadAhead};
use crate::proxy::limits::memory::{Memory, PodMemory};

/// Bytes that are to go through: several times what both sockets hold.
const ENOUGH: usize = 300 << 20;

async fn send(mut stream: SendStream<Bytes>) {
    loop {
        stream.reserve_capacity(1 << 16);
        let room = poll_fn(|context| stream.poll_capacity(context)).await;
        let room = room.expect("it is open").expect("room");
        stream
            .send_data(Bytes::from(vec![7; room]), false)
            .expect("sent");
    }
}

async fn receive(mut stream: RecvStream, received: &Cell<usize>) {
    while let Some(bytes) = stream.data().await {
        let bytes = bytes.expect("no reset");
        received.set(received.get() + bytes.len());
        let mut credit = stream.flow_control().clone();
        credit.release_capacity(bytes.len()).expect("received");
    }
}

async fn ping(mut pings: PingPong) {
    loop {
        pings.ping(Ping::opaque()).await.expect("answered");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Each end owes the other one answers, which it cannot write before the other one reads.
#[test]
fn two_ends_that_send_all_they_can_do_not_stop_each_other() {
    run(async {
        let (near, far) = pair().await;
        for tcp in [&near, &far] {
            let socket = socket2::SockRef::from(tcp);
            socket.set_send_buffer_size(2 << 20).expect("set");
            socket.set_recv_buffer_size(64 << 10).expect("set");
        }
        let share = Share::default();
        let shared = TunnelState::new(&share);
        let [near, far] = [near, far].map(|tcp| ReadAhead::new(tcp, &share));
        let server = crate::proxy::hbone::server::<_, Bytes>(near, &shared);
        let client = crate::proxy::hbone::client::<_, Bytes>(far, &shared);
        let (client, server) = tokio::join!(client, server);
        let (mut client, mut driven) = client.expect("a client");
        let mut server = server.expect("a server");
        let pings = [
            driven.ping_pong().expect("the first"),
            server.ping_pong().expect("the first"),
        ];
        let mut driven = pin!(async move { drop(driven.await) });
        let received = Cell::new(0);
        let mut streams = Vec::new();
        for _ in 0..16 {
            let request = http::Request::connect("192.0.2.1:80").body(());
            let request = request.expect("a request");
            let (response, up) = client.send_request(request, false).expect("sent");
            let accepted = beside(&mut driven, server.accept()).await;
            let (request, mut respond) = accepted.expect("a request").expect("a request");
            let down = respond
                .send_response(http::Response::new(()), false)
                .expect("answered");
            let serve = async { drop(server.accept().await) };
            let response = beside(&mut driven, beside(serve, response)).await;
            let (to_client, to_server) = (
                response.expect("an answer").into_body(),
                request.into_body(),
            );
            let received = &received;
            streams.push(async move {
                tokio::join!(
                    send(up),
                    send(down),
                    receive(to_client, received),
                    receive(to_server, received)
                );
            });
        }
        let served = pin!(async move { while let Some(Ok(_)) = server.accept().await {} });
        let [one, two] = pings;
        let enough = async {
            while received.get() < ENOUGH {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::select! {
            () = enough => {}
            () = driven => panic!("the client ended"),
            () = served => panic!("the server ended"),
            _ = join_all(streams) => panic!("they send without end"),
            _ = async { tokio::join!(ping(one), ping(two)) } => panic!("they ping without end"),
        }
    });
}

/// Bytes read from a peer that reads nothing are bounded, count as undelivered, and are not lost.
#[test]
fn what_is_read_while_nothing_can_be_written_is_bounded_and_counted() {
    const SENT: usize = 32 << 20;
    run(async {
        let (near, mut far) = pair().await;
        let memory = Memory::new(1 << 30);
        let mut near = ReadAhead::new(near, &memory.share(&PodMemory::default()));
        let all: Vec<u8> = (0..SENT).map(|at| (at / 251) as u8).collect();
        let stuck = async { while near.write(&[0; 1 << 16]).await.is_ok() {} };
        let held = async {
            while memory.held() < AHEAD {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
            assert!(memory.held() < 2 * AHEAD, "{}", memory.held());
        };
        let flood = async {
            far.write_all(&all).await.expect("written");
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = held => {}
            () = stuck => panic!("the peer does not read"),
            () = flood => {}
        }
        // The part of the flood that was written is read, and then the end.
        far.shutdown().await.expect("ended");
        let mut read = Vec::new();
        let end = near.read_to_end(&mut read).await;
        end.expect("an orderly end");
        assert!(
            read.len() > AHEAD && all.starts_with(&read),
            "{}",
            read.len()
        );
        assert_eq!(memory.held(), 0);
    });
}

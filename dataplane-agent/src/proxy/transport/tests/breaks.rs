//! Ends that break: the bytes that they had sent are delivered, and the other end is reset.

use h2::Reason;

use super::*;
use crate::proxy::authorize::Io;
use crate::proxy::hbone::STREAM_WINDOW;
use crate::sys::socket::unacknowledged;

const RESET: Option<ErrorKind> = Some(ErrorKind::ConnectionReset);

fn reset(tcp: TcpStream) {
    close_by_reset(&tcp).expect("a socket");
    drop(tcp);
}

/// Envoy resets streams with this reason, also such as are not at their end.
#[test]
fn a_stream_that_is_reset_before_its_end_is_reset_whatever_the_reason() {
    for reason in [Reason::NO_ERROR, Reason::CANCEL, Reason::CONNECT_ERROR] {
        let cut = async |mut client, mut far: Stream| {
            far.outgoing
                .send(Bytes::from_static(b"part"))
                .expect("sent");
            flushed(&far).await;
            far.outgoing.reset(reason);
            rest(&mut client).await
        };
        let (got, relayed) = run(into_stream(cut));
        assert_eq!(got, (b"part".to_vec(), RESET), "{reason:?}");
        relayed.end.expect("a peer's reset is no failure");
        assert_eq!(relayed.counted.down.get(), 4);
    }
}

#[test]
fn what_an_end_sent_before_it_broke_is_delivered_and_counted_before_the_reset() {
    let talk = async |mut client: TcpStream, mut server: TcpStream| {
        client.write_all(&[1; 100]).await.expect("written");
        server.read_u8().await.expect("a byte");
        server.write_all(&[2; 300_000]).await.expect("written");
        // The server's kernel would discard bytes that are not acknowledged.
        while unacknowledged(&server).expect("it is connected") > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        // Bytes are unread, so this is a reset.
        drop(server);
        rest(&mut client).await
    };
    let ((answer, end), both) = run(through_stream(talk));
    assert_eq!((answer.len(), end), (300_000, RESET));
    for relayed in both {
        relayed.end.expect("a reset is no failure");
        assert_eq!(relayed.counted.down.get(), 300_000);
    }
}

#[test]
fn a_client_that_breaks_is_noticed_while_nobody_reads_what_it_sends_and_after_its_end() {
    for half_closed in [false, true] {
        run(into_stream(async |mut client, mut far| {
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
            tokio::join!(breaks, noticed);
        }));
    }
}

#[test]
fn a_reset_of_one_end_resets_the_other_through_a_tunnel() {
    let talk = async |client, mut server| {
        reset(client);
        rest(&mut server).await
    };
    let (got, both) = run(through_stream(talk));
    assert_eq!(got, (Vec::new(), RESET));
    for relayed in both {
        relayed.end.expect("a peer's reset is no failure");
    }
}

/// Both directions have been said to end, so the engine says nothing of the tunnel's loss.
#[test]
fn a_stream_of_which_a_lost_tunnel_discards_the_last_bytes_is_not_complete() {
    run(async {
        let (mut client, one) = pair().await;
        let (near, mut far, drive) = stream().await;
        far.outgoing.finish().expect("ended");
        let counted = Rc::<Counted>::default();
        let mut relayed = Box::pin(relay(End::Tcp(one), End::Stream(near), &counted));
        // The peer reads nothing, so what is beyond its window waits.
        let window = STREAM_WINDOW as usize;
        let talk = async {
            let all = vec![7; window + 1000];
            client.write_all(&all).await.expect("written");
            client.shutdown().await.expect("ended");
            assert_eq!(rest(&mut client).await, (Vec::new(), None), "the far end");
            while counted.up.get() < window as u64 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            // The relay has read all by then, or breaks in any case.
            tokio::time::sleep(Duration::from_millis(50)).await;
            client
        };
        let relaying = async {
            let end = (&mut relayed).await;
            unreachable!("it goes on: {end:?}")
        };
        let _client = beside(drive, beside(relaying, talk)).await;
        let error = relayed.await.expect_err("the last bytes are lost");
        let told = "receive: io error: the tunnel has ended before all was sent";
        assert_eq!(error.to_string(), told);
        assert_eq!(counted.up.get(), window as u64);
    });
}

/// A server that answers early and closes does this: the rest of the request meets a closed socket. It is repeated
/// since it depends on which side is polled first.
#[test]
fn an_end_is_passed_on_though_the_connection_breaks_at_once() {
    for _ in 0..50 {
        let (end, relayed) = run(into_stream(async |client: TcpStream, mut far| {
            let socket = socket2::SockRef::from(&client);
            socket.shutdown(std::net::Shutdown::Write).expect("ended");
            reset(client);
            ends(&mut far).await
        }));
        assert_eq!(end.map_err(|error| error.reason()), Ok(()));
        relayed.end.expect("a reset is no failure");
    }
}

#[test]
fn a_reset_that_is_met_by_a_write_is_told_as_the_reset_that_it_is() {
    run(async {
        let (mut client, one) = pair().await;
        let (near, mut far, drive) = stream().await;
        client.write_all(b"late").await.expect("written");
        far.outgoing.reset(Reason::CONNECT_ERROR);
        let broken = async {
            // Wait until both have arrived, so that the relay's first write meets the reset.
            tokio::time::sleep(Duration::from_millis(50)).await;
            Relayed::between(End::Tcp(one), End::Stream(near)).await
        };
        let relayed = beside(drive, broken).await;
        relayed.end.expect("a peer's reset is no failure");
        assert_eq!(rest(&mut client).await, (Vec::new(), RESET));
    });
}

/// It is checked on both sides of a tunnel, since the engine has a different reason for each.
#[test]
fn a_relay_that_is_cut_after_one_direction_has_ended_resets_its_stream_as_cut() {
    for swapped in [false, true] {
        run(async {
            let (mut client, one) = pair().await;
            let (near, far, drive) = stream().await;
            let (near, mut far) = if swapped { (far, near) } else { (near, far) };
            client.shutdown().await.expect("ended");
            let cut = async {
                let meter = Rc::<Counted>::default();
                tokio::select! {
                    _ = relay(End::Tcp(one), End::Stream(near), &meter) => panic!("it goes on"),
                    end = ends(&mut far) => end.expect("it has ended"),
                }
                poll_fn(|context| far.outgoing.poll_broken(context)).await
            };
            let broken = beside(drive, cut).await;
            assert_eq!(broken.reason(), Some(Reason::CANCEL));
        });
    }
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
        for mut end in [client, server] {
            assert_eq!(rest(&mut end).await, (Vec::new(), RESET));
        }
    });
}

#[test]
fn a_relay_lasts_until_its_app_has_taken_all_and_resets_it_if_it_is_cut_before() {
    for cut in [false, true] {
        run(async {
            let (mut client, one) = pair().await;
            let (two, mut server) = pair().await;
            client.shutdown().await.expect("ended");
            let answer = async {
                server.write_all(&vec![7; 1 << 20]).await.expect("written");
                server.shutdown().await.expect("ended");
            };
            let mut relayed = Box::pin(Relayed::between(End::Tcp(one), End::Tcp(two)));
            let unread = tokio::time::timeout(Duration::from_millis(300), &mut relayed);
            let (unread, ()) = tokio::join!(unread, answer);
            assert!(unread.is_err(), "the client has read nothing");
            if cut {
                drop(relayed);
                assert_eq!(rest(&mut client).await.1, RESET);
            } else {
                let ((got, end), relayed) = tokio::join!(rest(&mut client), relayed);
                assert_eq!((got.len(), end), (1 << 20, None));
                relayed.end.expect("an orderly end");
            }
        });
    }
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
        let relayed = Relayed::between(End::Tcp(one), End::Tcp(two));
        let (relayed, got) = tokio::join!(relayed, rest(&mut server));
        relayed.end.expect("a reset is no failure");
        assert_eq!(got, (b"a line".to_vec(), RESET));
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

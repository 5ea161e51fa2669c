//! Ends that break: what they had sent is delivered, and the other end is told.

use super::*;

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

fn reset(tcp: TcpStream) {
    close_by_reset(&tcp).expect("a socket");
    drop(tcp);
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

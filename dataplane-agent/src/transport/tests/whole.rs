//! What connections carry and how they end: bytes unchanged, in order, each direction by itself.

use super::*;

/// Writes pieces and ends; what comes back until the other side ends.
async fn exchange(mut tcp: TcpStream, pieces: Vec<Vec<u8>>) -> Vec<u8> {
    let (mut read, mut write) = tcp.split();
    let writing = async {
        for piece in &pieces {
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

/// A peer that refuses an upload answers to the end, and resets what it does not read (RFC 9113,
/// 8.1). Its answer reaches the client all the same.
#[test]
fn an_answer_is_passed_on_though_its_peer_reads_no_more() {
    run(async {
        let (mut client, one) = pair().await;
        let (near, far, drive) = stream().await;
        let counted = Rc::<Counted>::default();
        let refuse = async {
            let mut far = far;
            let some = next(&mut far).await.expect("a beginning").expect("bytes");
            assert!(!some.is_empty());
            far.outgoing.send(Bytes::from_static(b"413")).expect("sent");
            far.outgoing.finish().expect("ended");
        };
        let upload = async {
            client.write_all(&[7; 100_000]).await.expect("written");
            let mut answer = [0; 3];
            client.read_exact(&mut answer).await.expect("the answer");
            assert_eq!(&answer, b"413");
        };
        let all = async {
            tokio::join!(
                upload,
                refuse,
                relay(End::Tcp(one), End::Stream(near), &counted)
            )
        };
        tokio::select! {
            _ = all => {}
            () = drive => panic!("the tunnel ended"),
        }
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// client ═ relay ═ (stream) ═ relay ═ server: whole, in order, and each way ends by itself.
    #[test]
    fn what_goes_in_comes_out_and_each_direction_ends_by_itself(up in pieces(), down in pieces()) {
        run(async {
            let (client, one) = pair().await;
            let (two, server) = pair().await;
            let (near, far, drive) = stream().await;
            let (first, second) = (Rc::<Counted>::default(), Rc::<Counted>::default());
            let carried = async {
                let ends = tokio::join!(
                    relay(End::Tcp(one), End::Stream(near), &first),
                    relay(End::Stream(far), End::Tcp(two), &second),
                );
                ends.0.expect("an orderly end");
                ends.1.expect("an orderly end");
            };
            let talk = async { tokio::join!(exchange(client, up.clone()), exchange(server, down.clone())) };
            let (to_client, to_server) = tokio::select! {
                (talked, ()) = async { tokio::join!(talk, carried) } => talked,
                () = drive => panic!("the tunnel ended"),
            };
            assert!(to_server == up.concat(), "upwards");
            assert!(to_client == down.concat(), "downwards");
            for counted in [first, second] {
                assert_eq!(counted.up.get(), up.concat().len() as u64);
                assert_eq!(counted.down.get(), down.concat().len() as u64);
            }
        });
    }
}

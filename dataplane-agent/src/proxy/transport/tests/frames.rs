//! Frames that a peer may send to our end of a tunnel.

use futures_util::FutureExt;
use h2::Reason;
use tokio::task::coop::unconstrained;

use super::*;
use crate::proxy::hbone::pace::{IN_A_TURN, Paced};

/// An HTTP/2 client that reads nothing by itself: each call is a frame.
struct Frames(tokio::io::DuplexStream);

impl Frames {
    async fn write(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
        let mut frame = (payload.len() as u32).to_be_bytes()[1..].to_vec();
        frame.extend([kind, flags]);
        frame.extend(stream.to_be_bytes());
        frame.extend(payload);
        self.0.write_all(&frame).await.expect("written");
    }

    /// Sends CONNECT in the stream with this number.
    async fn connect(&mut self, stream: u32) {
        // The values are literals for the names 2 and 1 of HPACK's table.
        let request = [b"\x02\x07CONNECT\x01\x0c", &b"192.0.2.1:80"[..]].concat();
        self.write(1, 4, stream, &request).await;
    }

    /// Returns the type and the flags of the frame that comes next.
    async fn next(&mut self) -> (u8, u8) {
        let mut head = [0; 9];
        self.0.read_exact(&mut head).await.expect("a frame");
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
        let mut payload = vec![0; length as usize];
        self.0.read_exact(&mut payload).await.expect("a frame");
        (head[3], head[4])
    }

    /// Returns the types of the frames that come, up to the answer to a PING.
    async fn until_pong(&mut self) -> Vec<u8> {
        self.write(6, 0, 0, b"12345678").await;
        let mut kinds = Vec::new();
        loop {
            let (kind, flags) = self.next().await;
            kinds.push(kind);
            // This is GOAWAY, or a PING's answer.
            if kind == 7 || (kind, flags) == (6, 1) {
                return kinds;
            }
        }
    }
}

/// Returns a tunnel's server end with our settings, and the client that sends frames to it.
async fn framed() -> (
    h2::server::Connection<Paced<tokio::io::DuplexStream>, Payload>,
    Frames,
) {
    let (near, far) = tokio::io::duplex(1 << 20);
    let mut frames = Frames(near);
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    frames.0.write_all(preface).await.expect("written");
    frames.write(4, 0, 0, &[]).await;
    let shared = TunnelState::new(&Share::default());
    let server = crate::proxy::hbone::server::<_, Payload>(far, &shared).await;
    (server.expect("a handshake"), frames)
}

/// The engine waits for all of a frame, in memory that no share counts.
#[test]
fn a_frame_that_is_too_long_for_a_tunnels_place_is_not_waited_for() {
    const UNKNOWN: u8 = 0xfa;
    for (kind, length) in [(0, 200 << 10), (UNKNOWN, 200 << 10), (UNKNOWN, 40 << 10)] {
        run(async {
            let (mut server, mut frames) = framed().await;
            frames.connect(1).await;
            let _stream = server.accept().await.expect("a request");
            let served = async { while let Some(Ok(_)) = server.accept().await {} };
            let sent = async {
                frames.write(kind, 0, 1, &vec![0; length]).await;
                frames.until_pong().await
            };
            tokio::select! {
                () = served => {}
                kinds = sent => assert!(kinds.contains(&7), "{kind} of {length}: {kinds:?}"),
            }
        });
    }
}

#[test]
fn a_peer_may_give_up_all_that_it_asked_for_while_we_are_busy() {
    run(async {
        let (mut server, mut frames) = framed().await;
        for number in 0..400 {
            frames.connect(2 * number + 1).await;
            frames
                .write(3, 0, 2 * number + 1, &8_u32.to_be_bytes())
                .await;
        }
        let served = async { while let Some(Ok(_)) = server.accept().await {} };
        let kinds = beside(served, frames.until_pong()).await;
        assert!(!kinds.contains(&7), "{kinds:?}");
    });
}

#[test]
fn what_a_peer_sends_before_it_hears_of_a_reset_does_not_end_its_tunnel() {
    run(async {
        let (mut server, mut frames) = framed().await;
        for number in 0..400 {
            frames.connect(2 * number + 1).await;
            let asked = server.accept().await;
            let (_, mut respond) = asked.expect("a request").expect("a request");
            respond.send_reset(Reason::CANCEL);
        }
        let served = async { while let Some(Ok(_)) = server.accept().await {} };
        let sent = async {
            tokio::time::sleep(Duration::from_millis(1500)).await;
            frames.until_pong().await;
            for number in 0..400 {
                frames.write(0, 0, 2 * number + 1, b"late").await;
            }
            frames.until_pong().await
        };
        let kinds = beside(served, sent).await;
        assert!(!kinds.contains(&7), "{kinds:?}");
    });
}

/// Each of these frames makes the engine visit all streams that it knows.
#[test]
fn frames_that_concern_all_streams_leave_the_worker_to_others_after_a_few() {
    const SENT: usize = 1000;
    for kind in [4, 7] {
        run(async {
            let (mut server, mut frames) = framed().await;
            frames.connect(1).await;
            let _stream = server.accept().await.expect("a request");
            for number in 0..SENT {
                let window = (number as u32 + 65536).to_be_bytes();
                let payload = match kind {
                    4 => [&[0, 4], &window[..]].concat(),
                    _ => vec![0; 8],
                };
                frames.write(kind, 0, 0, &payload).await;
                frames.write(6, 0, 0, b"12345678").await;
            }
            let mut all = 0;
            for _ in 0..SENT {
                // The runtime's own budget must not end the turn.
                let turn = unconstrained(server.accept()).now_or_never();
                assert!(turn.is_none(), "it goes on");
                let mut pongs = 0;
                while let Some(next) = unconstrained(frames.next()).now_or_never() {
                    pongs += usize::from(next == (6, 1));
                }
                assert!(pongs <= IN_A_TURN, "{pongs} in one turn");
                all += pongs;
            }
            assert_eq!(all, SENT);
        });
    }
}

/// Each such stream takes memory until the peer has read of its reset.
#[test]
fn a_peer_may_make_some_errors_and_then_its_tunnel_ends() {
    for (errors, ends) in [(1000, false), (1100, true)] {
        run(async {
            let (mut server, mut frames) = framed().await;
            for number in 0..errors {
                // The method comes after a header.
                let malformed = b"\x00\x01a\x01b\x82";
                frames.write(1, 4, 2 * number + 1, malformed).await;
            }
            let served = async {
                while let Some(Ok(_)) = server.accept().await {}
                std::future::pending::<()>().await;
            };
            let kinds = beside(served, frames.until_pong()).await;
            assert_eq!(kinds.contains(&7), ends, "after {errors}");
        });
    }
}

#[test]
fn a_tunnel_remembers_few_of_the_streams_that_it_reset() {
    const REFUSED: u32 = 1000;
    run(async {
        let (mut server, mut frames) = framed().await;
        for number in 0..REFUSED {
            frames.connect(2 * number + 1).await;
            let asked = server.accept().await;
            // It has not sent its end, so its stream is reset as this is dropped.
            let (_, mut respond) = asked.expect("a request").expect("a request");
            let mut refused = http::Response::new(());
            *refused.status_mut() = http::StatusCode::BAD_REQUEST;
            respond.send_response(refused, true).expect("sent");
        }
        let served = async { while let Some(Ok(_)) = server.accept().await {} };
        let sent = async {
            frames.until_pong().await;
            for number in 0..REFUSED {
                frames.write(0, 0, 2 * number + 1, b"late").await;
            }
            // Answers to PINGs come before what waits already.
            [frames.until_pong().await, frames.until_pong().await].concat()
        };
        let kinds = beside(served, sent).await;
        // Of one that is forgotten the peer is told once more.
        let forgotten = kinds.iter().filter(|kind| **kind == 3).count();
        assert!(forgotten >= 500, "{forgotten} are forgotten");
        assert!(!kinds.contains(&7), "{kinds:?}");
    });
}

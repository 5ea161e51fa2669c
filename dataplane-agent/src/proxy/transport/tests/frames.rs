//! Frames that a peer may send to our end of a tunnel.

use h2::Reason;

use super::*;

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

    /// Returns the types of the frames that come, up to the answer to a PING.
    async fn until_pong(&mut self) -> Vec<u8> {
        self.write(6, 0, 0, b"12345678").await;
        let mut kinds = Vec::new();
        loop {
            let mut head = [0; 9];
            self.0.read_exact(&mut head).await.expect("a frame");
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
            let mut payload = vec![0; length as usize];
            self.0.read_exact(&mut payload).await.expect("a frame");
            kinds.push(head[3]);
            // This is GOAWAY, or a PING's answer.
            if head[3] == 7 || (head[3], head[4]) == (6, 1) {
                return kinds;
            }
        }
    }
}

/// Returns a tunnel's server end with our settings, and the client that sends frames to it.
async fn framed() -> (
    h2::server::Connection<tokio::io::DuplexStream, Payload>,
    Frames,
) {
    let (near, far) = tokio::io::duplex(1 << 20);
    let mut frames = Frames(near);
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    frames.0.write_all(preface).await.expect("written");
    frames.write(4, 0, 0, &[]).await;
    let server = crate::proxy::hbone::server()
        .handshake::<_, Payload>(far)
        .await;
    (server.expect("a handshake"), frames)
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

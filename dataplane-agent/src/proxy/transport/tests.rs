//! Relays between sockets and streams, over loopback, and tunnels between peers with real certificates.

mod breaks;
mod frames;
mod peer;
mod pool;
mod saturated;
mod unread;
mod whole;

use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::io::ErrorKind;
use std::pin::Pin;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::LocalSet;

use super::relay::{self, End, Meter, RelayError};
use crate::proxy::hbone::payload::Payload;
use crate::proxy::hbone::stream::{Stream, TunnelState};
use crate::proxy::hbone::window::Windows;
use crate::proxy::limits::memory::Share;
use crate::sys::socket::close_by_reset;

#[derive(Debug, Default)]
struct Counted {
    up: Cell<u64>,
    down: Cell<u64>,
}

impl Meter for Rc<Counted> {
    fn upward(&self, bytes: u64) {
        self.up.set(self.up.get() + bytes);
    }
    fn downward(&self, bytes: u64) {
        self.down.set(self.down.get() + bytes);
    }
}

fn run<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let in_time = async {
        let limit = tokio::time::timeout(Duration::from_secs(60), test);
        limit.await.expect("not in time")
    };
    LocalSet::new().block_on(&runtime.expect("a runtime"), in_time)
}

/// Runs a test beside its tunnel or its peer, which must not end before, and returns its result.
async fn beside<T>(tunnel: impl Future<Output = ()>, test: impl Future<Output = T>) -> T {
    tokio::select! {
        outcome = test => outcome,
        () = tunnel => panic!("the tunnel ended"),
    }
}

/// Returns both ends of a TCP connection.
async fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a listener");
    let address = listener.local_addr().expect("an address");
    let (near, far) = tokio::join!(TcpStream::connect(address), listener.accept());
    (near.expect("connected"), far.expect("accepted").0)
}

/// Opens streams of one tunnel to a peer that gives credit for the tunnel as bytes are delivered, as ztunnel does.
/// Returns our ends with the peer's, and the future that drives both.
async fn streams(count: usize) -> (Vec<(Stream, Stream)>, impl Future<Output = ()>) {
    let (near, far) = tokio::io::duplex(1 << 20);
    let [ours, theirs] = [(); 2].map(|()| TunnelState::new(&Share::default()));
    let client = crate::proxy::hbone::client::<_, Payload>(near, &ours);
    let server = crate::proxy::hbone::server::<_, Payload>(far, &theirs);
    let (client, server) = tokio::join!(client, server);
    let ((mut send, mut driven), mut server) = (client.expect("client"), server.expect("server"));
    let mut windows = Windows::new(&ours.undelivered);
    let mut driven = Box::pin(poll_fn(move |context| {
        windows.keep(&mut driven, context);
        Pin::new(&mut driven).poll(context).map(|_| ())
    }));
    let mut all = Vec::new();
    for _ in 0..count {
        let request = http::Request::connect("192.0.2.1:80").body(());
        let sent = send.send_request(request.expect("a request"), false);
        let (response, to_server) = sent.expect("sent");
        let accepted = beside(&mut driven, server.accept()).await;
        let (request, mut respond) = accepted.expect("a request").expect("a request");
        let to_client = respond.send_response(http::Response::new(()), false);
        let server = async { drop(server.accept().await) };
        let response = beside(&mut driven, beside(server, response)).await;
        all.push((
            Stream::new(to_server, response.expect("an answer").into_body(), &ours),
            Stream::new(to_client.expect("answered"), request.into_body(), &theirs),
        ));
    }
    let drive = async move {
        let _held = send;
        let server = async { while let Some(Ok(_)) = server.accept().await {} };
        tokio::join!(driven, server);
    };
    (all, drive)
}

/// Opens the only stream of a tunnel, as [`streams`] does.
async fn stream() -> (Stream, Stream, impl Future<Output = ()>) {
    let (mut all, drive) = streams(1).await;
    let (near, far) = all.pop().expect("a stream");
    (near, far, drive)
}

/// Relays with sockets made as the agent's are, which a drop resets, and with a pod that has plenty of memory.
async fn relay(
    client: End,
    upstream: End,
    meter: &(impl Meter + Clone + 'static),
) -> Result<(), RelayError> {
    for end in [&client, &upstream] {
        if let End::Tcp(tcp) = end {
            close_by_reset(tcp).expect("a socket");
        }
    }
    let rest = relay::relay(client, upstream, &Share::default(), meter).await?;
    rest.acknowledged().await;
    Ok(())
}

/// The bytes that one relay counted, and its result.
struct Relayed {
    counted: Rc<Counted>,
    end: Result<(), RelayError>,
}

impl Relayed {
    async fn between(client: End, upstream: End) -> Self {
        let counted = Rc::default();
        let end = relay(client, upstream, &counted).await;
        Self { counted, end }
    }
}

/// Runs client ═ relay ═ stream. `talk` gets the outer ends.
async fn into_stream<T>(talk: impl AsyncFnOnce(TcpStream, Stream) -> T) -> (T, Relayed) {
    let (client, one) = pair().await;
    let (near, far, drive) = stream().await;
    let relayed = Relayed::between(End::Tcp(one), End::Stream(near));
    beside(drive, async { tokio::join!(talk(client, far), relayed) }).await
}

/// Runs client ═ relay ═ stream ═ relay ═ server. `talk` gets the outer ends.
async fn through_stream<T>(talk: impl AsyncFnOnce(TcpStream, TcpStream) -> T) -> (T, [Relayed; 2]) {
    let (client, one) = pair().await;
    let (two, server) = pair().await;
    let (near, far, drive) = stream().await;
    let first = Relayed::between(End::Tcp(one), End::Stream(near));
    let second = Relayed::between(End::Stream(far), End::Tcp(two));
    let all = async { tokio::join!(talk(client, server), first, second) };
    let (talked, first, second) = beside(drive, all).await;
    (talked, [first, second])
}

/// Returns what a stream reads next.
async fn next(stream: &mut Stream) -> Option<Result<Bytes, h2::Error>> {
    poll_fn(|context| stream.incoming.poll_read(context)).await
}

/// Completes when the peer has ended its direction, or is broken. No bytes may come before.
async fn ends(stream: &mut Stream) -> Result<(), h2::Error> {
    loop {
        match next(stream).await {
            None => return Ok(()),
            Some(bytes) => assert!(bytes?.is_empty()),
        }
    }
}

/// Sends bytes; waits for room, but not until they are written.
async fn send(far: &mut Stream, bytes: usize) {
    send_in(far, bytes, 1 << 16).await;
}

async fn send_in(far: &mut Stream, bytes: usize, most: usize) {
    let mut left = bytes;
    while left > 0 {
        poll_fn(|context| far.outgoing.poll_room(context)).await;
        let piece = left.min(most);
        far.outgoing
            .send(Bytes::from(vec![0; piece]))
            .expect("sent");
        left -= piece;
    }
}

async fn flushed(stream: &Stream) {
    poll_fn(|context| stream.outgoing.poll_flushed(context)).await;
}

/// Returns the bytes that come until the other side ends, and the error if it breaks.
async fn rest(tcp: &mut TcpStream) -> (Vec<u8>, Option<ErrorKind>) {
    let mut all = Vec::new();
    let end = tcp.read_to_end(&mut all).await;
    (all, end.err().map(|error| error.kind()))
}

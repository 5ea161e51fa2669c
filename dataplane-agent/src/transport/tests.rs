//! Bytes between sockets and streams, over loopback; and tunnels between peers with real certificates.

mod breaks;
mod frames;
mod peer;
mod pool;
mod unread;
mod whole;

use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::{BoxFuture, LocalBoxFuture};
use h2::Reason;
use proptest::prelude::*;
use rcgen::{CertificateParams, KeyPair, SanType};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::LocalSet;

use super::hbone::Connect;
use super::pool::{Key, Pool};
use super::relay::{self, End, Meter, RelayError};
use super::{Means, TransportError};
use crate::authorize::{Io, LocalPod};
use crate::drain::Scope;
use crate::hbone::payload::Payload;
use crate::hbone::readahead::ReadAhead;
use crate::hbone::stream::{Shared, Stream};
use crate::hbone::window::Windows;
use crate::identity::{Certs, Identity, IdentityError, Issued, Issuer};
use crate::limits::memory::{Memory, PodMemory, Share};
use crate::limits::{Full, Kind, NodePlaces, Place};
use crate::sys::socket::{close_by_reset, unacknowledged};

#[derive(Default)]
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

/// Of sockets as they come to a relay, and of a pod that has plenty of memory.
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
    relay::relay(client, upstream, &Share::default(), meter).await
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

/// Two ends of one TCP connection.
async fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a listener");
    let address = listener.local_addr().expect("an address");
    let (near, far) = tokio::join!(TcpStream::connect(address), listener.accept());
    (near.expect("connected"), far.expect("accepted").0)
}

/// An h2 stream's two ends, and what drives them.
async fn stream() -> (Stream, Stream, impl Future<Output = ()>) {
    let (near, far) = tokio::io::duplex(1 << 20);
    let client = crate::hbone::client().handshake::<_, Payload>(near);
    let server = crate::hbone::server().handshake::<_, Payload>(far);
    let (client, server) = tokio::join!(client, server);
    let ((mut send, driven), mut server) = (client.expect("client"), server.expect("server"));
    let request = http::Request::connect("192.0.2.1:80")
        .body(())
        .expect("a request");
    let (response, to_server) = send.send_request(request, false).expect("sent");
    let mut driven = Box::pin(driven);
    let accepted = tokio::select! {
        accepted = server.accept() => accepted.expect("a request").expect("a request"),
        _ = &mut driven => panic!("the client ended"),
    };
    let (request, mut respond) = accepted;
    let to_client = respond
        .send_response(http::Response::new(()), false)
        .expect("answered");
    let mut server_driven = Box::pin(async move { while server.accept().await.is_some() {} });
    let response = tokio::select! {
        response = response => response.expect("an answer"),
        _ = &mut driven => panic!("the client ended"),
        () = &mut server_driven => panic!("the server ended"),
    };
    let shared = Shared::default();
    let near = Stream::new(to_server, response.into_body(), &shared);
    let shared = Shared::default();
    let far = Stream::new(to_client, request.into_body(), &shared);
    let drive = async move {
        let _held = send;
        tokio::join!(driven, server_driven).0.ok();
    };
    (near, far, drive)
}

/// What comes next by a stream.
async fn next(stream: &mut Stream) -> Option<Result<Bytes, h2::Error>> {
    poll_fn(|context| stream.incoming.poll_read(context)).await
}

/// What is read until the other side ends, and how it does.
async fn rest(tcp: &mut TcpStream) -> (Vec<u8>, Option<std::io::ErrorKind>) {
    let mut all = Vec::new();
    let end = tcp.read_to_end(&mut all).await;
    (all, end.err().map(|error| error.kind()))
}

async fn flushed(stream: &Stream) {
    poll_fn(|context| stream.outgoing.poll_flushed(context)).await;
}

/// Streams of one tunnel from a peer that gives credit for the tunnel as bytes are delivered, as
/// ztunnel does, and our ends of them; and what drives both.
async fn streams(count: usize) -> (Vec<(Stream, Stream)>, impl Future<Output = ()>) {
    let (near, far) = tokio::io::duplex(1 << 20);
    let client = crate::hbone::client().handshake::<_, Payload>(near);
    let server = crate::hbone::server().handshake::<_, Payload>(far);
    let (client, server) = tokio::join!(client, server);
    let ((mut send, mut driven), mut server) = (client.expect("client"), server.expect("server"));
    let (ours, theirs) = (Shared::default(), Shared::default());
    let mut windows = Windows::new(&ours.undelivered, &Share::default());
    let mut driven = Box::pin(poll_fn(move |context| {
        windows.keep(&mut driven, context);
        Pin::new(&mut driven).poll(context).map(|_| ())
    }));
    let mut all = Vec::new();
    for _ in 0..count {
        let request = http::Request::connect("192.0.2.1:80").body(());
        let sent = send.send_request(request.expect("a request"), false);
        let (response, to_server) = sent.expect("sent");
        let accepted = tokio::select! {
            accepted = server.accept() => accepted.expect("a request").expect("a request"),
            () = &mut driven => panic!("the client ended"),
        };
        let (request, mut respond) = accepted;
        let to_client = respond.send_response(http::Response::new(()), false);
        let response = tokio::select! {
            response = response => response.expect("an answer"),
            () = &mut driven => panic!("the client ended"),
            _ = server.accept() => panic!("the server ended"),
        };
        all.push((
            Stream::new(to_server, response.into_body(), &ours),
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

/// Sends, and waits for room only.
async fn send(far: &mut Stream, bytes: usize) {
    let mut left = bytes;
    while left > 0 {
        poll_fn(|context| far.outgoing.poll_room(context)).await;
        let piece = left.min(1 << 16);
        far.outgoing
            .send(Bytes::from(vec![0; piece]))
            .expect("sent");
        left -= piece;
    }
}

//! Streams of a tunnel, as both ends use them. The engine's types are wrapped here once a stream is open.

use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use h2::server::SendResponse;
use h2::{Reason, RecvStream, SendStream};
use http::{Response, StatusCode};

use super::batch::Batch;
use super::given_up::GivenUp;
use super::payload::{Payload, Stalls, Told, Unsent};
use super::window::Undelivered;
use crate::proxy::limits::memory::Share;

/// State that the streams of one tunnel share.
#[derive(Clone, Debug)]
pub struct TunnelState {
    /// Bytes that were received and are not delivered.
    pub undelivered: Rc<Undelivered>,
    /// Streams that cannot send.
    pub stalls: Rc<Stalls>,
    /// Streams that the peer gave up before they were answered.
    pub given_up: Rc<GivenUp>,
}

impl TunnelState {
    /// Creates the state for a tunnel of a pod with this share of memory for undelivered bytes.
    pub fn new(share: &Share) -> Self {
        Self {
            undelivered: Rc::new(Undelivered::new(share)),
            stalls: Rc::default(),
            given_up: Rc::default(),
        }
    }

    /// Returns true if the tunnel must be ended now: its peer brings more than the pod has memory for. The task that
    /// drives the connection asks this before each poll.
    pub fn is_excess(&self) -> bool {
        self.undelivered.is_excess()
    }

    /// Returns true if the tunnel must take no new stream: its peer gives up too many.
    pub fn is_flood(&self) -> bool {
        self.given_up.is_flood()
    }
}

/// A connected stream.
#[derive(Debug)]
pub struct Stream {
    /// The direction to the peer.
    pub outgoing: Outgoing,
    /// The direction from the peer.
    pub incoming: Incoming,
}

impl Stream {
    /// Combines the engine's halves.
    pub fn new(send: SendStream<Payload>, receive: RecvStream, shared: &TunnelState) -> Self {
        Self {
            outgoing: Outgoing::new(send, &shared.stalls),
            incoming: Incoming::new(receive, &shared.undelivered),
        }
    }
}

/// The direction to the peer. If this is dropped before it is [done](Self::done) the stream is reset: a cut stream
/// must not look like one that came to its end.
#[derive(Debug)]
pub struct Outgoing {
    send: SendStream<Payload>,
    unsent: Rc<Unsent>,
    done: bool,
}

impl Outgoing {
    fn new(send: SendStream<Payload>, stalls: &Rc<Stalls>) -> Self {
        Self {
            send,
            unsent: Unsent::new(stalls),
            done: false,
        }
    }

    /// Counts the bytes that wait to be written in a pod's share of memory, and keeps to it; only the first call
    /// counts.
    pub fn share(&self, share: &Share) {
        self.unsent.share(share);
    }

    /// Completes when more may be sent.
    pub fn poll_room(&self, context: &Context<'_>) -> Poll<()> {
        self.unsent.poll_room(context)
    }

    /// Sends bytes. They wait here until the peer's window takes them; ask [`Self::poll_room`] first.
    ///
    /// # Errors
    /// The stream was reset, or its tunnel has ended.
    pub fn send(&mut self, bytes: Bytes) -> Result<(), h2::Error> {
        let payload = Payload::new(bytes, &self.unsent);
        let sent = self.send.send_data(payload, false);
        sent.map_err(|error| self.why(error))
    }

    /// Ends this direction, after all that was sent.
    ///
    /// # Errors
    /// It fails as [`Self::send`] does.
    pub fn finish(&mut self) -> Result<(), h2::Error> {
        let end = Payload::new(Bytes::new(), &self.unsent);
        let sent = self.send.send_data(end, true);
        sent.map_err(|error| self.why(error))
    }

    /// Returns why the stream is closed, if that is known: the engine's `error` does not say it.
    fn why(&mut self, error: h2::Error) -> h2::Error {
        match self.poll_broken(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(why) => why,
            Poll::Pending => error,
        }
    }

    /// Completes when nothing waits to be written to the tunnel any more, including the end: a reset would discard
    /// it. Ask [`Self::was_discarded`] whether it was written.
    pub fn poll_flushed(&self, context: &Context<'_>) -> Poll<()> {
        self.unsent.poll_flushed(context)
    }

    /// Returns true if some of what was sent was discarded and not written: the stream was reset, or its tunnel has
    /// ended. The engine does not say the latter of a stream of which both directions have ended.
    pub fn was_discarded(&self) -> bool {
        self.unsent.was_discarded()
    }

    /// Returns true if nothing waits to be written to the tunnel.
    pub fn is_flushed(&self) -> bool {
        self.unsent.is_empty()
    }

    /// Sets the callback that gets the number of bytes each time that some are written to the tunnel; only the first
    /// call counts.
    pub fn tell(&self, told: Told) {
        self.unsent.tell(told);
    }

    /// Completes when the peer has reset the stream, or its tunnel has ended.
    pub fn poll_broken(&mut self, context: &mut Context<'_>) -> Poll<h2::Error> {
        let reset = self.send.poll_reset(context);
        reset.map(|reset| reset.map_or_else(|error| error, h2::Error::from))
    }

    /// Resets the stream: ends both directions at once, and discards what is not written.
    pub fn reset(&mut self, reason: Reason) {
        self.done = true;
        self.send.send_reset(reason);
    }

    /// Marks both directions as ended: dropping this does not reset the stream.
    pub fn done(&mut self) {
        self.done = true;
    }
}

impl Drop for Outgoing {
    fn drop(&mut self) {
        if !self.done {
            self.send.send_reset(Reason::CANCEL);
        }
    }
}

/// The direction from the peer.
#[derive(Debug)]
pub struct Incoming {
    receive: RecvStream,
    undelivered: Rc<Undelivered>,
    held: usize,
    /// Bytes that were read before the stream was connected.
    early: Batch,
}

impl Incoming {
    fn new(receive: RecvStream, undelivered: &Rc<Undelivered>) -> Self {
        undelivered.opened();
        Self {
            receive,
            undelivered: Rc::clone(undelivered),
            held: 0,
            early: Batch::default(),
        }
    }

    /// Reads what has come, while nobody can take it: the engine would hold it uncounted.
    fn hold(&mut self, context: &mut Context<'_>) {
        while let Poll::Ready(Some(Ok(bytes))) = self.receive(context) {
            if !bytes.is_empty() {
                self.early.push(bytes);
            }
        }
        self.early.keep();
    }

    /// Returns the next bytes, or `None` at the end, if the peer has sent it. Bytes that the peer sent before it
    /// reset the stream come before the error.
    pub fn poll_read(
        &mut self,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Bytes, h2::Error>>> {
        match self.early.pop() {
            Some(bytes) => Poll::Ready(Some(Ok(bytes))),
            None => self.receive(context),
        }
    }

    fn receive(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Bytes, h2::Error>>> {
        let read = self.receive.poll_data(context);
        match &read {
            Poll::Ready(Some(Ok(bytes))) => {
                self.held += bytes.len();
                self.undelivered.more(bytes.len());
            }
            // Nobody wants trailers, and the engine would keep them as long as the other direction goes on.
            Poll::Ready(None) => drop(self.receive.poll_trailers(context)),
            Poll::Ready(Some(Err(_))) | Poll::Pending => {}
        }
        read
    }

    /// Counts bytes as delivered: the peer may send as many again.
    pub fn delivered(&mut self, bytes: usize) {
        self.held -= bytes;
        self.undelivered.less(bytes);
        // This fails only for more bytes than were read.
        let _ = self.receive.flow_control().release_capacity(bytes);
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        self.undelivered.less(self.held);
        self.undelivered.closed();
    }
}

/// A stream whose peer waits to be connected.
#[derive(Debug)]
pub struct Waiting {
    respond: SendResponse<Payload>,
    incoming: Incoming,
    stalls: Rc<Stalls>,
    given_up: Rc<GivenUp>,
}

impl Waiting {
    /// Combines the engine's halves.
    pub fn new(respond: SendResponse<Payload>, receive: RecvStream, shared: &TunnelState) -> Self {
        Self {
            respond,
            incoming: Incoming::new(receive, &shared.undelivered),
            stalls: Rc::clone(&shared.stalls),
            given_up: Rc::clone(&shared.given_up),
        }
    }

    /// Completes when the peer does not wait any more. Meanwhile the bytes that it sends are counted.
    pub async fn gone(&mut self) {
        // The result does not matter: the stream was reset, or the tunnel has ended.
        let _ = std::future::poll_fn(|context| {
            self.incoming.hold(context);
            self.respond.poll_reset(context)
        })
        .await;
        self.given_up.one_more();
    }

    /// Tells the peer that it is connected.
    ///
    /// # Errors
    /// The peer is gone.
    pub fn connected(mut self, baggage: Option<&str>) -> Result<Stream, h2::Error> {
        let mut response = Response::new(());
        // The mesh may describe a workload in text that is not fit for a header; then it is left out.
        if let Some(baggage) = baggage.and_then(|baggage| baggage.parse().ok()) {
            response.headers_mut().insert("baggage", baggage);
        }
        let send = self.respond.send_response(response, false);
        let send = send.inspect_err(|_| self.given_up.one_more())?;
        Ok(Stream {
            outgoing: Outgoing::new(send, &self.stalls),
            incoming: self.incoming,
        })
    }

    /// Tells the peer why it is not connected.
    pub fn refuse(mut self, status: StatusCode) {
        let mut response = Response::new(());
        *response.status_mut() = status;
        // The peer may have gone.
        if self.respond.send_response(response, true).is_err() {
            self.given_up.one_more();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use futures_util::FutureExt;
    use http::HeaderMap;

    use super::*;
    use crate::proxy::hbone::{client, server};

    #[tokio::test]
    async fn what_comes_after_the_end_is_not_kept() {
        let (near, far) = tokio::io::duplex(1 << 16);
        let shared = TunnelState::new(&Share::default());
        let client = client::<_, Bytes>(near, &shared);
        let (client, server) = tokio::join!(client, server::<_, Payload>(far, &shared));
        let ((mut send, driven), mut server) = (client.expect("client"), server.expect("server"));
        let talk = async {
            let request = http::Request::connect("192.0.2.1:80").body(());
            let (_, mut to_server) = send
                .send_request(request.expect("a request"), false)
                .expect("sent");
            let bytes = to_server.send_data(Bytes::from_static(b"bytes"), false);
            bytes.expect("sent");
            let mut trailers = HeaderMap::new();
            trailers.insert("kept", "for nobody".parse().expect("a value"));
            to_server.send_trailers(trailers).expect("sent");
            let asked = server.accept().await.expect("a request");
            let (request, _respond) = asked.expect("a request");
            let mut incoming = Incoming::new(request.into_body(), &shared.undelivered);
            let read = async {
                let mut next = async || poll_fn(|context| incoming.poll_read(context)).await;
                assert!(matches!(next().await, Some(Ok(bytes)) if bytes == "bytes"));
                assert!(next().await.is_none(), "it has ended");
            };
            tokio::select! {
                () = read => {}
                _ = server.accept() => panic!("nothing else comes"),
            }
            let kept = poll_fn(|context| incoming.receive.poll_trailers(context));
            assert!(matches!(kept.now_or_never(), Some(Ok(None))));
        };
        tokio::select! {
            () = talk => {}
            _ = driven => panic!("the tunnel ended"),
        }
    }
}

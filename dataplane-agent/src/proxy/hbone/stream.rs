//! One stream of a tunnel, as both ends of it use it: nothing else of the house knows the engine's own
//! types for it.

use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use h2::server::SendResponse;
use h2::{Reason, RecvStream, SendStream};
use http::{Response, StatusCode};

use super::batch::Batch;
use super::payload::{Payload, Stalls, Told, Unsent};
use super::window::Undelivered;
use crate::proxy::limits::memory::Share;

/// What the streams of one tunnel share.
#[derive(Clone, Debug)]
pub struct Shared {
    /// What has come and is not delivered.
    pub undelivered: Rc<Undelivered>,
    /// Who cannot send.
    pub stalls: Rc<Stalls>,
}

impl Shared {
    /// Of a tunnel of a pod that has this share for what is not delivered.
    pub fn new(share: &Share) -> Self {
        Self {
            undelivered: Rc::new(Undelivered::new(share)),
            stalls: Rc::default(),
        }
    }
}

/// A stream that is connected.
#[derive(Debug)]
pub struct Stream {
    /// To the peer.
    pub outgoing: Outgoing,
    /// From the peer.
    pub incoming: Incoming,
}

impl Stream {
    /// Of the engine's halves.
    pub fn new(send: SendStream<Payload>, receive: RecvStream, shared: &Shared) -> Self {
        Self {
            outgoing: Outgoing::new(send, &shared.stalls),
            incoming: Incoming::new(receive, &shared.undelivered),
        }
    }
}

/// What goes to the peer. The stream is reset when this is dropped before it is [done](Self::done): a cut
/// stream must not look like one that came to its end.
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

    /// Counts what waits to be written in a pod's share of memory, and keeps to it; once.
    pub fn share(&self, share: &Share) {
        self.unsent.share(share);
    }

    /// Completes when more may be sent.
    pub fn poll_room(&self, context: &Context<'_>) -> Poll<()> {
        self.unsent.poll_room(context)
    }

    /// Sends after what was sent before. What the peer's window does not take yet waits here; ask
    /// [`Self::poll_room`] first.
    ///
    /// # Errors
    /// The stream was reset, or its tunnel has ended.
    pub fn send(&mut self, bytes: Bytes) -> Result<(), h2::Error> {
        let payload = Payload::new(bytes, &self.unsent);
        let sent = self.send.send_data(payload, false);
        sent.map_err(|error| self.why(error))
    }

    /// Says the end, after what was sent before.
    ///
    /// # Errors
    /// As [`Self::send`].
    pub fn finish(&mut self) -> Result<(), h2::Error> {
        let end = Payload::new(Bytes::new(), &self.unsent);
        let sent = self.send.send_data(end, true);
        sent.map_err(|error| self.why(error))
    }

    /// The engine's error of a stream that is closed does not say why it is.
    fn why(&mut self, error: h2::Error) -> h2::Error {
        match self.poll_broken(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(why) => why,
            Poll::Pending => error,
        }
    }

    /// Completes when nothing waits to be written to the tunnel any more, also not the end: a reset
    /// would discard it.
    pub fn poll_flushed(&self, context: &Context<'_>) -> Poll<()> {
        self.unsent.poll_flushed(context)
    }

    /// Whether nothing waits to be written to the tunnel.
    pub fn is_flushed(&self) -> bool {
        self.unsent.is_empty()
    }

    /// Has somebody told how much is written to the tunnel, each time; once.
    pub fn tell(&self, told: Told) {
        self.unsent.tell(told);
    }

    /// Completes when the peer has reset the stream, or its tunnel has ended.
    pub fn poll_broken(&mut self, context: &mut Context<'_>) -> Poll<h2::Error> {
        let reset = self.send.poll_reset(context);
        reset.map(|reset| reset.map_or_else(|error| error, h2::Error::from))
    }

    /// Ends both directions at once; what is not written is discarded.
    pub fn reset(&mut self, reason: Reason) {
        self.done = true;
        self.send.send_reset(reason);
    }

    /// Both directions have ended: dropping it is no cut.
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

/// What comes from the peer.
#[derive(Debug)]
pub struct Incoming {
    receive: RecvStream,
    undelivered: Rc<Undelivered>,
    held: usize,
    /// What was read before anybody could take it.
    early: Batch,
}

impl Incoming {
    fn new(receive: RecvStream, undelivered: &Rc<Undelivered>) -> Self {
        Self {
            receive,
            undelivered: Rc::clone(undelivered),
            held: 0,
            early: Batch::default(),
        }
    }

    /// Takes over what has come, as long as nobody can take it: the engine would hold it uncounted.
    fn hold(&mut self, context: &mut Context<'_>) {
        while let Poll::Ready(Some(Ok(bytes))) = self.receive(context) {
            if !bytes.is_empty() {
                self.early.push(bytes);
            }
        }
        self.early.keep();
    }

    /// The next bytes; `None` at the end, and only if the peer has said it. What the peer sent before
    /// it reset the stream comes before the error.
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
        if let Poll::Ready(Some(Ok(bytes))) = &read {
            self.held += bytes.len();
            self.undelivered.more(bytes.len());
        }
        read
    }

    /// So much was delivered: the peer may send as much again.
    pub fn delivered(&mut self, bytes: usize) {
        self.held -= bytes;
        self.undelivered.less(bytes);
        // Fails only for more than was read.
        let _ = self.receive.flow_control().release_capacity(bytes);
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        self.undelivered.less(self.held);
    }
}

/// A stream whose peer waits to be connected.
#[derive(Debug)]
pub struct Waiting {
    respond: SendResponse<Payload>,
    incoming: Incoming,
    stalls: Rc<Stalls>,
}

impl Waiting {
    /// Of the engine's halves.
    pub fn new(respond: SendResponse<Payload>, receive: RecvStream, shared: &Shared) -> Self {
        Self {
            respond,
            incoming: Incoming::new(receive, &shared.undelivered),
            stalls: Rc::clone(&shared.stalls),
        }
    }

    /// Completes when the peer does not wait any more. Meanwhile what it sends is counted.
    pub async fn gone(&mut self) {
        // Either way: it was reset, or the tunnel has ended.
        let _ = std::future::poll_fn(|context| {
            self.incoming.hold(context);
            self.respond.poll_reset(context)
        })
        .await;
    }

    /// Tells the peer that it is connected.
    ///
    /// # Errors
    /// It is gone.
    pub fn connected(mut self, baggage: Option<&str>) -> Result<Stream, h2::Error> {
        let mut response = Response::new(());
        // What the mesh says of a workload need not be fit for a header; then it is not told.
        if let Some(baggage) = baggage.and_then(|baggage| baggage.parse().ok()) {
            response.headers_mut().insert("baggage", baggage);
        }
        let send = self.respond.send_response(response, false)?;
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
        let _ = self.respond.send_response(response, true);
    }
}

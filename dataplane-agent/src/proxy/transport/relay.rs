//! Two-way copy between two ends, each a TCP connection or a stream of a tunnel.
//!
//! A connection through the mesh ends as it would end without the mesh. Each direction ends by itself (half close).
//! An end that breaks is noticed whatever the relay waits for; bytes that it had sent before are delivered, and then
//! the other end is reset. If an end said its end and goes later, as a server that has closed, the other end learns
//! of it only when it writes: it is closed, and the kernel answers what it sends. A relay that is dropped, because it
//! was revoked or its worker stops, resets both ends: a cut connection must never look like one that came to its end.
//!
//! One direction holds in memory one read (at most 256 KiB), or as much as a stream's window lets its peer send,
//! besides the bytes that wait in a stream's send buffer (512 KiB). Reads and send buffers shrink, down to 16 KiB, as
//! the pod's memory runs out. An idle relay holds no buffer.

use std::future::poll_fn;
use std::io;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use h2::Reason;
use tokio::net::TcpStream;
use tokio::task::yield_now;
use tokio::time::{Instant, timeout_at};

use super::ends::{Sink, Socket, Source, halves};
use crate::proxy::hbone::batch::Batch;
use crate::proxy::hbone::payload::Told;
use crate::proxy::hbone::stream::Stream;
use crate::proxy::limits::memory::Share;

/// Time limit for delivering the bytes that an end had sent before it broke; then the other end is reset.
pub const FLUSH: Duration = Duration::from_secs(2);
/// Number of times that a direction reads and writes before the other one, and all else on the worker, has its turn.
/// Between sockets that is a MiB at most.
const TURN: usize = 4;

/// One end of a relay.
#[derive(Debug)]
pub enum End {
    /// A TCP connection.
    Tcp(TcpStream),
    /// A stream of a tunnel.
    Stream(Stream),
}

/// Counts bytes as they are delivered.
pub trait Meter {
    /// Counts bytes that went from the client to the upstream.
    fn upward(&self, bytes: u64);
    /// Counts bytes that went from the upstream to the client.
    fn downward(&self, bytes: u64);
}

/// Why a relay failed. A reset by a peer is not a failure.
#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    /// The client broke.
    #[error("send: {0}")]
    Send(Broken),
    /// The upstream broke.
    #[error("receive: {0}")]
    Receive(Broken),
}

/// The error of an end that broke.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    /// A socket broke.
    #[error("io error: {0}")]
    Io(#[from] io::Error),
    /// A tunnel or its stream broke.
    #[error("h2 failed: {0}")]
    H2(#[from] h2::Error),
}

impl Broken {
    /// Returns true if the peer has reset its connection or stream, which is an ordinary end. The loss of a tunnel is
    /// none, nor is a peer that does not answer.
    fn is_reset(&self) -> bool {
        use io::ErrorKind::{BrokenPipe, ConnectionReset, NotConnected};
        match self {
            Self::Io(error) => {
                matches!(error.kind(), BrokenPipe | ConnectionReset | NotConnected)
            }
            Self::H2(error) if error.is_go_away() || error.is_io() => false,
            Self::H2(error) => matches!(
                error.reason(),
                Some(
                    Reason::NO_ERROR
                        | Reason::CANCEL
                        | Reason::STREAM_CLOSED
                        | Reason::CONNECT_ERROR
                )
            ),
        }
    }

    /// Returns the error, unless it is an ordinary end.
    fn failure(self) -> Option<Self> {
        (!self.is_reset()).then_some(self)
    }

    /// Returns true if the peer may have said its end, and its kernel may have forgotten the connection since. Then
    /// the other end need not learn of it before it writes.
    fn may_be_forgotten(&self) -> bool {
        match self {
            Self::Io(_) => self.is_reset(),
            Self::H2(error) => self.is_reset() && error.reason() == Some(Reason::NO_ERROR),
        }
    }
}

/// What the kernel still has to deliver of a relay that has ended. It goes on with that though this process may die.
/// Where this is dropped before, the connection is cut: its sockets are reset.
#[derive(Debug, Default)]
#[must_use]
pub struct Unacknowledged([Option<Rc<Socket>>; 2]);

impl Unacknowledged {
    /// Closes each socket when its peer has acknowledged all that was written, and the end: until then the packets
    /// need the pod's routes. Nothing limits the time: a peer may read as slowly as it likes.
    pub async fn acknowledged(mut self) {
        let [one, other] = self.0.each_mut().map(|socket| async move {
            if let Some(open) = socket {
                open.acknowledged().await;
            }
            *socket = None;
        });
        tokio::join!(one, other);
    }
}

impl Drop for Unacknowledged {
    fn drop(&mut self) {
        for socket in self.0.iter().flatten() {
            socket.cut();
        }
    }
}

/// Copies both ways until both directions have ended, or one end breaks. Bytes that wait to be sent keep to the pod's
/// `share` of memory. Returns what is left to the kernel, for which no memory is held here.
///
/// # Errors
/// An end broke, other than by a reset from its peer.
pub async fn relay(
    client: End,
    upstream: End,
    share: &Share,
    meter: &(impl Meter + Clone + 'static),
) -> Result<Unacknowledged, RelayError> {
    let (from_client, to_client) = halves(client, share);
    let (from_upstream, to_upstream) = halves(upstream, share);
    let client = pin!(error(to_client.socket()));
    let upstream = pin!(error(to_upstream.socket()));
    let (upward, downward) = (meter.clone(), meter.clone());
    let upward = Box::new(move |bytes| upward.upward(bytes));
    let downward = Box::new(move |bytes| downward.downward(bytes));
    let mut up = OneWay::new(from_client, to_upstream, upward);
    let mut down = OneWay::new(from_upstream, to_client, downward);
    match both(&mut up, &mut down, client, upstream).await {
        None => Ok(Unacknowledged([up.sink.done(), down.sink.done()])),
        Some(At::Client(broken)) => {
            let end = wind_up(broken, &mut up, &mut down).await;
            end.map_err(RelayError::Send)
        }
        Some(At::Upstream(broken)) => {
            let end = wind_up(broken, &mut down, &mut up).await;
            end.map_err(RelayError::Receive)
        }
    }
}

/// The end that broke, with its error if that is known yet.
enum At {
    Client(Option<Broken>),
    Upstream(Option<Broken>),
}

/// Moves bytes both ways. Returns `None` when both have ended. `client` and `upstream` complete when these sockets
/// break.
async fn both(
    up: &mut OneWay,
    down: &mut OneWay,
    mut client: Pin<&mut impl Future<Output = ()>>,
    mut upstream: Pin<&mut impl Future<Output = ()>>,
) -> Option<At> {
    poll_fn(|context| {
        match up.poll(down.read_all, context) {
            Poll::Ready(Err(Cut::Source(broken))) => {
                return Poll::Ready(Some(At::Client(Some(broken))));
            }
            Poll::Ready(Err(Cut::Sink(broken))) => {
                return Poll::Ready(Some(At::Upstream(Some(broken))));
            }
            Poll::Ready(Ok(())) | Poll::Pending => {}
        }
        match down.poll(up.read_all, context) {
            Poll::Ready(Err(Cut::Source(broken))) => {
                return Poll::Ready(Some(At::Upstream(Some(broken))));
            }
            Poll::Ready(Err(Cut::Sink(broken))) => {
                return Poll::Ready(Some(At::Client(Some(broken))));
            }
            Poll::Ready(Ok(())) | Poll::Pending => {}
        }
        if up.over && down.over {
            return Poll::Ready(None);
        }
        if !up.listens()
            && let Poll::Ready(broken) = down.sink.poll_broken(client.as_mut(), context)
        {
            return Poll::Ready(Some(At::Client(broken)));
        }
        if !down.listens()
            && let Poll::Ready(broken) = up.sink.poll_broken(upstream.as_mut(), context)
        {
            return Poll::Ready(Some(At::Upstream(broken)));
        }
        Poll::Pending
    })
    .await
}

async fn error(socket: Option<Rc<Socket>>) {
    match socket {
        Some(socket) => socket.broken().await,
        None => std::future::pending().await,
    }
}

/// Delivers the bytes that a broken end had sent, by `last`, and then closes or resets the other end; `back` went to
/// the broken one. Returns the error of the broken end, unless that is an ordinary end.
async fn wind_up(
    broken: Option<Broken>,
    last: &mut OneWay,
    back: &mut OneWay,
) -> Result<Unacknowledged, Broken> {
    let deadline = Instant::now() + FLUSH;
    let mut met = None;
    // Bytes that take longer are discarded.
    let _ = timeout_at(deadline, last.rest(back, &mut met)).await;
    let broken = broken.or(met).unwrap_or_else(|| last.source.error());
    if last.over && broken.may_be_forgotten() && !back.moved_late() {
        return Ok(Unacknowledged([last.sink.close(), None]));
    }
    if let Some(socket) = last.sink.socket() {
        // Bytes that take longer are discarded.
        let _ = timeout_at(deadline, socket.acknowledged()).await;
    }
    last.sink.reset(Reason::CONNECT_ERROR);
    broken
        .failure()
        .map_or_else(|| Ok(Unacknowledged::default()), Err)
}

/// The end of a direction that broke.
enum Cut {
    /// The end that it reads from.
    Source(Broken),
    /// The end that it writes to.
    Sink(Broken),
}

/// One direction of a relay.
struct OneWay {
    source: Source,
    sink: Sink,
    batch: Batch,
    /// True if no more comes: the source has said its end, or is broken.
    read_all: bool,
    /// True if the source has said its end.
    ended: bool,
    /// True if that end was passed on.
    finished: bool,
    /// True if all bytes before the end have been delivered as well.
    over: bool,
    /// True if something was written after the sink had said the end of the other direction.
    late: bool,
    /// Callback for written bytes, unless the sink calls it.
    told: Option<Told>,
}

impl OneWay {
    fn new(source: Source, sink: Sink, told: Told) -> Self {
        let told = sink.tell(told);
        Self {
            source,
            sink,
            batch: Batch::default(),
            read_all: false,
            ended: false,
            finished: false,
            over: false,
            late: false,
            told,
        }
    }

    /// Moves the bytes that can be moved in a [`TURN`]; completes at the end. After an error of the source, further
    /// calls move the bytes that were read before it, and complete as well. `late`: the other direction has been read
    /// to its end.
    fn poll(&mut self, late: bool, context: &mut Context<'_>) -> Poll<Result<(), Cut>> {
        for _ in 0..TURN {
            let mut moved = false;
            if !self.read_all {
                match self.source.poll_read(&mut self.batch, context) {
                    Poll::Ready(Ok(more)) => {
                        moved = true;
                        self.ended = !more;
                        self.read_all = !more;
                    }
                    Poll::Ready(Err(broken)) => {
                        self.read_all = true;
                        return Poll::Ready(Err(Cut::Source(broken)));
                    }
                    Poll::Pending => {}
                }
            }
            if !self.batch.is_empty() {
                match self.sink.poll_write(&mut self.batch, context) {
                    Poll::Ready(Ok(written)) => {
                        moved = true;
                        self.late |= late;
                        self.source.delivered(written);
                        if let Some(told) = &self.told {
                            told(written as u64);
                        }
                    }
                    Poll::Ready(Err(broken)) => return Poll::Ready(Err(Cut::Sink(broken))),
                    Poll::Pending => {}
                }
            }
            if self.read_all && self.batch.is_empty() {
                if self.ended && !self.finished {
                    self.finished = true;
                    if let Err(broken) = self.sink.finish() {
                        return Poll::Ready(Err(Cut::Sink(broken)));
                    }
                }
                return self.sink.poll_flushed(context).map(|flushed| {
                    flushed.map_err(Cut::Sink)?;
                    self.over = self.finished;
                    Ok(())
                });
            }
            if !moved {
                return Poll::Pending;
            }
        }
        // The task is woken when all else has had its turn and the kernel was asked for new events.
        let _: Poll<()> = pin!(yield_now()).poll(context);
        Poll::Pending
    }

    /// Moves the remaining bytes, though the source is broken, and stores its error. Bytes that come `back` meanwhile
    /// have nowhere to go.
    async fn rest(&mut self, back: &mut Self, broken: &mut Option<Broken>) {
        let mut step = |context: &mut Context<'_>| {
            back.source.hold(&mut back.batch, context);
            self.poll(false, context)
        };
        loop {
            match poll_fn(&mut step).await {
                Err(Cut::Source(met)) => *broken = Some(met),
                Ok(()) | Err(Cut::Sink(_)) => return,
            }
        }
    }

    /// Returns true if it waits for its source, and so notices if that breaks.
    fn listens(&self) -> bool {
        !self.read_all && self.batch.is_empty()
    }

    /// Returns true if something was, or would have been, written after the sink had said the end of the other
    /// direction.
    fn moved_late(&self) -> bool {
        self.late || !self.batch.is_empty() || !self.sink.is_flushed()
    }
}

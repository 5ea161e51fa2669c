//! Two-way copy between two ends, each a TCP connection or a stream of a tunnel.
//!
//! Each direction ends by itself (half close). A reset of one end resets the other; a relay that is
//! dropped, because it was revoked or its worker stops, resets both: a cut connection must never
//! look like one that came to its end.
//!
//! What is in memory for one direction is one read (at most `LARGE`), besides what the stream's
//! send buffer and window bound. An idle relay holds no buffer.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::net::Shutdown;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use futures_util::future::{Either, select};
use h2::{Reason, RecvStream, SendStream};
use socket2::SockRef;
use tokio::net::TcpStream;

use crate::sys::socket::read;

/// The size of a read while little comes.
const SMALL: usize = 16 << 10;
/// The size of a read while each comes back full.
const LARGE: usize = 256 << 10;
/// DATA frames that are written to a socket at once.
const SLICES: usize = 32;

/// One end of a relay.
#[derive(Debug)]
pub enum End {
    /// A TCP connection.
    Tcp(TcpStream),
    /// A stream of a tunnel.
    Stream(SendStream<Bytes>, RecvStream),
}

/// Is told of bytes as they are delivered.
pub trait Meter {
    /// Bytes of the client have gone to the upstream.
    fn upward(&self, bytes: u64);
    /// Bytes of the upstream have gone to the client.
    fn downward(&self, bytes: u64);
}

/// How a relay failed; a reset by a peer is not a failure.
#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    /// From client to upstream.
    #[error("send: {0}")]
    Send(Broken),
    /// From upstream to client.
    #[error("receive: {0}")]
    Receive(Broken),
}

/// What broke.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    /// A socket.
    #[error("io error: {0}")]
    Io(#[from] io::Error),
    /// A tunnel or its stream.
    #[error("h2 failed: {0}")]
    H2(#[from] h2::Error),
}

impl Broken {
    /// Whether it is the ordinary end of a peer that did not say goodbye.
    fn is_reset(&self) -> bool {
        use io::ErrorKind::{BrokenPipe, ConnectionReset, NotConnected, UnexpectedEof};
        let kind = match self {
            Self::Io(error) => error.kind(),
            Self::H2(error) => match (error.get_io(), error.reason()) {
                (Some(io), _) => io.kind(),
                (None, Some(Reason::NO_ERROR | Reason::CANCEL | Reason::STREAM_CLOSED)) => {
                    return true;
                }
                (None, _) => return false,
            },
        };
        matches!(
            kind,
            NotConnected | UnexpectedEof | ConnectionReset | BrokenPipe
        )
    }
}

/// Copies both ways until both directions have ended, or one breaks.
///
/// # Errors
/// A direction broke, other than by a peer's reset.
pub async fn relay(client: End, upstream: End, meter: &impl Meter) -> Result<(), RelayError> {
    let (client, upstream) = (Half::of(client), Half::of(upstream));
    let ((from_client, mut to_client), (from_upstream, mut to_upstream)) = (client, upstream);
    let end = {
        let up = async {
            let end = copy(from_client, &mut to_upstream, |bytes| meter.upward(bytes)).await;
            end.map_err(|cut| cut.map(RelayError::Send))
        };
        let down = async {
            let end = copy(from_upstream, &mut to_client, |bytes| meter.downward(bytes)).await;
            end.map_err(|cut| cut.map(RelayError::Receive))
        };
        tokio::pin!(up, down);
        match select(up, down).await {
            Either::Left((first, other)) => both(first, other).await,
            Either::Right((first, other)) => both(first, other).await,
        }
    };
    match end {
        Ok(()) => {
            to_client.done();
            to_upstream.done();
            Ok(())
        }
        // Dropping what is not done resets it.
        Err(RelayError::Send(broken) | RelayError::Receive(broken)) if broken.is_reset() => Ok(()),
        Err(error) => Err(error),
    }
}

/// Resets a connection of which nothing is to be relayed.
pub fn reset(tcp: TcpStream) {
    drop(Socket {
        tcp,
        done: false.into(),
    });
}

/// A direction that was cut, at one of its ends.
enum Cut<E> {
    /// Where it reads.
    Source(E),
    /// Where it writes.
    Sink(E),
}

impl<E> Cut<E> {
    fn map<T>(self, to: impl FnOnce(E) -> T) -> Cut<T> {
        match self {
            Self::Source(error) => Cut::Source(to(error)),
            Self::Sink(error) => Cut::Sink(to(error)),
        }
    }
    fn error(self) -> E {
        match self {
            Self::Source(error) | Self::Sink(error) => error,
        }
    }
}

/// The end of both directions, of which one has ended first. Who takes no more may have answered
/// before that, as a server that refuses an upload does: what it has sent is still passed on.
async fn both<E>(
    first: Result<(), Cut<E>>,
    other: impl Future<Output = Result<(), Cut<E>>>,
) -> Result<(), E> {
    match first {
        Err(Cut::Source(error)) => Err(error),
        Err(Cut::Sink(error)) => {
            let _ = other.await;
            Err(error)
        }
        Ok(()) => other.await.map_err(Cut::error),
    }
}

async fn copy(mut from: Source, to: &mut Sink, count: impl Fn(u64)) -> Result<(), Cut<Broken>> {
    let mut batch = Batch::default();
    loop {
        tokio::select! {
            biased;
            // Otherwise a stream that was reset would be noticed only at the next write to it.
            broken = to.broken() => return Err(Cut::Sink(broken)),
            more = from.read(&mut batch) => if !more.map_err(Cut::Source)? {
                return to.finish().map_err(Cut::Sink);
            },
        }
        let bytes = batch.bytes;
        to.write(&mut batch).await.map_err(Cut::Sink)?;
        from.delivered(bytes).map_err(Cut::Source)?;
        count(bytes as u64);
        // A fast pair would keep the worker to itself: its reads and writes seldom have to wait.
        tokio::task::coop::consume_budget().await;
    }
}

/// What was read at once. Reused, so that a chunk costs no list.
#[derive(Default)]
struct Batch {
    slices: VecDeque<Bytes>,
    bytes: usize,
}

impl Batch {
    fn push(&mut self, slice: Bytes) {
        self.bytes += slice.len();
        self.slices.push_back(slice);
    }
    fn advance(&mut self, mut written: usize) {
        self.bytes -= written;
        while let Some(first) = self.slices.front_mut() {
            if written < first.len() {
                first.advance(written);
                return;
            }
            written -= first.len();
            self.slices.pop_front();
        }
    }
}

/// A socket that is reset when it is dropped before it is done.
struct Socket {
    tcp: TcpStream,
    done: std::cell::Cell<bool>,
}

impl Drop for Socket {
    fn drop(&mut self) {
        if !self.done.get() {
            // Fails only where the socket is broken already.
            let _ = SockRef::from(&self.tcp).set_linger(Some(Duration::ZERO));
        }
    }
}

struct Half;

impl Half {
    fn of(end: End) -> (Source, Sink) {
        match end {
            End::Tcp(tcp) => {
                let socket = Rc::new(Socket {
                    tcp,
                    done: false.into(),
                });
                let buffer = BytesMut::new();
                let source = Source::Tcp {
                    socket: Rc::clone(&socket),
                    buffer,
                    size: SMALL,
                };
                (source, Sink::Tcp(socket))
            }
            End::Stream(send, receive) => (Source::Stream(receive), Sink::Stream(send, false)),
        }
    }
}

enum Source {
    Tcp {
        socket: Rc<Socket>,
        buffer: BytesMut,
        size: usize,
    },
    Stream(RecvStream),
}

impl Source {
    /// Fills the empty batch; `false` at the end. Loses nothing when it is dropped while waiting.
    async fn read(&mut self, batch: &mut Batch) -> Result<bool, Broken> {
        match self {
            Self::Tcp {
                socket,
                buffer,
                size,
            } => loop {
                socket.tcp.readable().await?;
                match read(&socket.tcp, buffer, *size) {
                    Ok(0) => return Ok(false),
                    Ok(length) => {
                        batch.push(buffer.split().freeze());
                        if length == *size {
                            *size = LARGE.min(*size * 4);
                        } else {
                            *size = SMALL.max(*size / 2);
                            if length < SMALL {
                                *buffer = BytesMut::new();
                            }
                        }
                        return Ok(true);
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        *buffer = BytesMut::new();
                    }
                    Err(error) => return Err(error.into()),
                }
            },
            Self::Stream(receive) => {
                poll_fn(|context| {
                    while batch.slices.len() < SLICES && batch.bytes < LARGE {
                        match receive.poll_data(context) {
                            Poll::Ready(Some(Ok(slice))) if slice.is_empty() => {}
                            Poll::Ready(Some(Ok(slice))) => batch.push(slice),
                            // An end or error that follows data is met again by the next call.
                            _ if batch.bytes > 0 => break,
                            // The end was said, and then that no more is read (RFC 9113, 8.1).
                            Poll::Ready(Some(Err(error)))
                                if error.is_remote()
                                    && error.reason() == Some(Reason::NO_ERROR) =>
                            {
                                return Poll::Ready(Ok(false));
                            }
                            Poll::Ready(Some(Err(error))) => {
                                return Poll::Ready(Err(error.into()));
                            }
                            Poll::Ready(None) => return Poll::Ready(Ok(false)),
                            Poll::Pending => return Poll::Pending,
                        }
                    }
                    Poll::Ready(Ok(true))
                })
                .await
            }
        }
    }

    /// The other end has taken what was read: the sender may send as much again.
    fn delivered(&mut self, bytes: usize) -> Result<(), Broken> {
        if let Self::Stream(receive) = self {
            receive.flow_control().release_capacity(bytes)?;
        }
        Ok(())
    }
}

enum Sink {
    Tcp(Rc<Socket>),
    /// And whether its end has been said.
    Stream(SendStream<Bytes>, bool),
}

impl Sink {
    /// Completes when the peer resets what we write to.
    async fn broken(&mut self) -> Broken {
        match self {
            Self::Tcp(_) => std::future::pending().await,
            Self::Stream(send, _) => match poll_fn(|context| send.poll_reset(context)).await {
                Ok(reason) => h2::Error::from(reason).into(),
                Err(error) => error.into(),
            },
        }
    }

    /// Empties the batch.
    async fn write(&mut self, batch: &mut Batch) -> Result<(), Broken> {
        match self {
            Self::Tcp(socket) => {
                while batch.bytes > 0 {
                    let mut slices = [IoSlice::new(&[]); SLICES];
                    let mut count = 0;
                    for (slot, slice) in slices.iter_mut().zip(&batch.slices) {
                        *slot = IoSlice::new(slice);
                        count += 1;
                    }
                    match socket.tcp.try_write_vectored(&slices[..count]) {
                        Ok(written) => batch.advance(written),
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                            socket.tcp.writable().await?;
                        }
                        Err(error) => return Err(error.into()),
                    }
                }
            }
            Self::Stream(send, _) => {
                while let Some(mut slice) = batch.slices.pop_front() {
                    batch.bytes -= slice.len();
                    while !slice.is_empty() {
                        send.reserve_capacity(slice.len());
                        let capacity = match send.capacity() {
                            0 => match poll_fn(|context| send.poll_capacity(context)).await {
                                Some(capacity) => capacity?,
                                None => return Err(h2::Error::from(Reason::STREAM_CLOSED).into()),
                            },
                            capacity => capacity,
                        };
                        let piece = slice.split_to(capacity.min(slice.len()));
                        if !piece.is_empty() {
                            send.send_data(piece, false)?;
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// Says the end of this direction.
    fn finish(&mut self) -> Result<(), Broken> {
        match self {
            Self::Tcp(socket) => Ok(SockRef::from(&socket.tcp).shutdown(Shutdown::Write)?),
            Self::Stream(send, finished) => {
                *finished = true;
                Ok(send.send_data(Bytes::new(), true)?)
            }
        }
    }

    /// Both directions have ended: dropping it is no cut.
    fn done(&self) {
        if let Self::Tcp(socket) = self {
            socket.done.set(true);
        }
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        if let Self::Stream(send, false) = self {
            send.send_reset(Reason::CANCEL);
        }
    }
}

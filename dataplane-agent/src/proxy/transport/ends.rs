//! The two kinds of ends that a relay has, as it reads from one and writes to the other.

use std::cell::Cell;
use std::io::{self, IoSlice};
use std::net::Shutdown;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};
use h2::Reason;
use socket2::SockRef;
use tokio::io::Interest;
use tokio::net::TcpStream;

use super::relay::{Broken, End};
use crate::proxy::hbone::batch::{Batch, SLICES};
use crate::proxy::hbone::payload::Told;
use crate::proxy::hbone::stream::{Incoming, Outgoing};
use crate::proxy::limits::memory::{Hold, Level, Share};
use crate::sys::socket::{close_by_end, read, unacknowledged};

/// The size of a read while little comes.
const SMALL: usize = 16 << 10;
/// The size of a read while each comes back full.
const LARGE: usize = 256 << 10;
/// The same, while the pod has little memory left; then it is `SMALL`.
const MEDIUM: usize = 64 << 10;
/// A socket that is reset when it is dropped before it is [done](Sink::done), as it was made.
pub(super) struct Socket {
    tcp: TcpStream,
    /// A write was told how the connection broke, and the kernel tells it once: a read will see an end
    /// of file that is none.
    told: Cell<bool>,
}

impl Socket {
    fn new(tcp: TcpStream) -> Self {
        Self {
            tcp,
            told: false.into(),
        }
    }

    /// Completes when the peer has reset the connection, or does not answer any more, whatever may be
    /// waiting to be read or written.
    pub(super) async fn broken(&self) {
        // An error means that there is no runtime any more.
        let _ = self.tcp.ready(Interest::ERROR).await;
    }

    /// What was written and is not acknowledged.
    pub(super) fn unacknowledged(&self) -> usize {
        // Fails only where the socket is broken: nothing will go out any more.
        unacknowledged(&self.tcp).unwrap_or(0)
    }
}

/// Both directions of an end.
pub(super) fn halves(end: End, share: &Share) -> (Source, Sink) {
    match end {
        End::Tcp(tcp) => {
            let socket = Rc::new(Socket::new(tcp));
            let source = Source::Tcp {
                socket: Rc::clone(&socket),
                size: SMALL,
                unwritten: 0,
                // One small read is what each may always hold.
                held: Hold::new(share, SMALL),
            };
            (source, Sink::Tcp(socket))
        }
        End::Stream(stream) => {
            stream.outgoing.share(share);
            (
                Source::Stream(stream.incoming),
                Sink::Stream(stream.outgoing),
            )
        }
    }
}

pub(super) enum Source {
    Tcp {
        socket: Rc<Socket>,
        size: usize,
        /// What was read and is not delivered.
        unwritten: usize,
        held: Hold,
    },
    Stream(Incoming),
}

impl Source {
    /// Adds to the batch; `false` at the end. Of a socket it reads only as the batch is empty, as the
    /// kernel holds what waits; of a stream always, as the peer's window bounds it.
    pub(super) fn poll_read(
        &mut self,
        batch: &mut Batch,
        context: &mut Context<'_>,
    ) -> Poll<Result<bool, Broken>> {
        match self {
            Self::Tcp { .. } if !batch.is_empty() => Poll::Pending,
            Self::Tcp {
                socket,
                size,
                unwritten,
                held,
            } => loop {
                ready!(socket.tcp.poll_read_ready(context))?;
                *size = may_read(*size, held);
                let mut buffer = BytesMut::new();
                match read(&socket.tcp, &mut buffer, *size) {
                    Ok(0) if socket.told.get() => {
                        let gone = io::Error::from(io::ErrorKind::ConnectionReset);
                        return Poll::Ready(Err(gone.into()));
                    }
                    Ok(0) => return Poll::Ready(Ok(false)),
                    Ok(length) => {
                        *unwritten = length;
                        held.set(length);
                        batch.put(piece(buffer));
                        if length == *size {
                            *size = LARGE.min(*size * 4);
                        } else {
                            *size = SMALL.max(*size / 2);
                        }
                        return Poll::Ready(Ok(true));
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => return Poll::Ready(Err(error.into())),
                }
            },
            Self::Stream(incoming) => {
                let mut some = false;
                loop {
                    match incoming.poll_read(context) {
                        Poll::Ready(Some(Ok(slice))) => {
                            some |= !slice.is_empty();
                            if !slice.is_empty() {
                                batch.push(slice);
                            }
                        }
                        // An end or error that follows data is met again by the next call.
                        _ if some => return Poll::Ready(Ok(true)),
                        Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(error.into())),
                        Poll::Ready(None) => return Poll::Ready(Ok(false)),
                        Poll::Pending => return Poll::Pending,
                    }
                }
            }
        }
    }

    /// Takes over what waits to be read of a stream, which nobody is going to take: counted as not
    /// delivered it holds up no other stream of its tunnel. What a socket has waits in the kernel.
    pub(super) fn hold(&mut self, batch: &mut Batch, context: &mut Context<'_>) {
        if let Self::Stream(_) = self {
            while let Poll::Ready(Ok(true)) = self.poll_read(batch, context) {}
            batch.keep();
        }
    }

    /// How it broke, of one whose reads were not told.
    pub(super) fn error(&self) -> Broken {
        let kind = io::ErrorKind::ConnectionReset;
        let error = match self {
            Self::Tcp { socket, .. } => socket.tcp.take_error().ok().flatten(),
            Self::Stream(_) => None,
        };
        error.unwrap_or_else(|| kind.into()).into()
    }

    /// The other end has taken so much of what was read.
    pub(super) fn delivered(&mut self, bytes: usize) {
        match self {
            Self::Tcp {
                unwritten, held, ..
            } => {
                *unwritten -= bytes;
                // It is one piece: a part of it frees nothing.
                if *unwritten == 0 {
                    held.set(0);
                }
            }
            Self::Stream(incoming) => incoming.delivered(bytes),
        }
    }
}

/// How much of a wanted size may be read, by what the pod has left.
fn may_read(wanted: usize, held: &Hold) -> usize {
    if wanted <= SMALL {
        return wanted;
    }
    wanted.min(match held.level() {
        Level::Plenty => LARGE,
        Level::Little => MEDIUM,
        Level::Nothing => SMALL,
    })
}

/// What was read, as what may wait for long: it takes no more than twice its bytes. A client that sends
/// byte by byte would have us keep a whole buffer for each.
fn piece(read: BytesMut) -> Bytes {
    if read.len() < read.capacity() / 2 {
        Bytes::copy_from_slice(&read)
    } else {
        read.freeze()
    }
}

pub(super) enum Sink {
    Tcp(Rc<Socket>),
    Stream(Outgoing),
}

impl Sink {
    /// Writes some of the batch, which is not empty, and takes it off it; completes with how much.
    pub(super) fn poll_write(
        &mut self,
        batch: &mut Batch,
        context: &mut Context<'_>,
    ) -> Poll<Result<usize, Broken>> {
        match self {
            Self::Tcp(socket) => {
                let mut slices = [IoSlice::new(&[]); SLICES];
                let count = batch.show(&mut slices);
                loop {
                    match socket.tcp.try_write_vectored(&slices[..count]) {
                        Ok(written) => {
                            batch.advance(written);
                            return Poll::Ready(Ok(written));
                        }
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                            if socket.tcp.poll_write_ready(context)?.is_pending() {
                                batch.keep();
                                return Poll::Pending;
                            }
                        }
                        Err(error) => {
                            // EPIPE: the peer had said its end before it broke, and that one is true.
                            let ended = error.kind() == io::ErrorKind::BrokenPipe;
                            socket.told.set(!ended);
                            return Poll::Ready(Err(error.into()));
                        }
                    }
                }
            }
            Self::Stream(outgoing) => {
                let mut sent = 0;
                while !batch.is_empty() {
                    match outgoing.poll_room(context) {
                        Poll::Pending if sent == 0 => {
                            batch.keep();
                            return Poll::Pending;
                        }
                        Poll::Pending => break,
                        Poll::Ready(()) => {
                            let Some(slice) = batch.pop() else { break };
                            sent += slice.len();
                            outgoing.send(slice)?;
                        }
                    }
                }
                Poll::Ready(Ok(sent))
            }
        }
    }

    /// The socket, if it is one.
    pub(super) fn socket(&self) -> Option<Rc<Socket>> {
        match self {
            Self::Tcp(socket) => Some(Rc::clone(socket)),
            Self::Stream(_) => None,
        }
    }

    /// Completes when the end is broken, with how if that is known; `socket` does when its socket is.
    pub(super) fn poll_broken(
        &mut self,
        socket: Pin<&mut impl Future<Output = ()>>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Broken>> {
        match self {
            Self::Tcp(_) => socket.poll(context).map(|()| None),
            Self::Stream(outgoing) => outgoing
                .poll_broken(context)
                .map(|error| Some(error.into())),
        }
    }

    /// Completes when what was written is on its way and cannot be discarded any more, other than by
    /// a reset of a socket: see [`Socket::unacknowledged`].
    pub(super) fn poll_flushed(&self, context: &Context<'_>) -> Poll<()> {
        match self {
            Self::Tcp(_) => Poll::Ready(()),
            Self::Stream(outgoing) => outgoing.poll_flushed(context),
        }
    }

    /// Whether [`Self::poll_flushed`] would complete.
    pub(super) fn is_flushed(&self) -> bool {
        match self {
            Self::Tcp(_) => true,
            Self::Stream(outgoing) => outgoing.is_flushed(),
        }
    }

    /// Has somebody told of bytes as they are delivered; who writes tells him of a socket's.
    pub(super) fn tell(&self, told: Told) -> Option<Told> {
        match self {
            Self::Tcp(_) => Some(told),
            Self::Stream(outgoing) => {
                outgoing.tell(told);
                None
            }
        }
    }

    /// Says the end of this direction.
    pub(super) fn finish(&mut self) -> Result<(), Broken> {
        match self {
            Self::Tcp(socket) => Ok(SockRef::from(&socket.tcp).shutdown(Shutdown::Write)?),
            Self::Stream(outgoing) => Ok(outgoing.finish()?),
        }
    }

    /// Resets the end in both directions, with the reason if it is a stream.
    pub(super) fn reset(&mut self, reason: Reason) {
        match self {
            // Dropping what is not done resets it.
            Self::Tcp(_) => {}
            Self::Stream(outgoing) => outgoing.reset(reason),
        }
    }

    /// Lets go of the end, which has been told that no more comes: it is not reset, unless it has sent
    /// what was not read.
    pub(super) fn close(&mut self) {
        match self {
            Self::Tcp(_) => self.done(),
            // What it may still send is of no use, and it has done nothing wrong (RFC 9113, 8.1).
            Self::Stream(outgoing) => outgoing.reset(Reason::NO_ERROR),
        }
    }

    /// Both directions have ended: dropping it is no cut.
    pub(super) fn done(&mut self) {
        match self {
            // Fails for no socket.
            Self::Tcp(socket) => drop(close_by_end(&socket.tcp)),
            Self::Stream(outgoing) => outgoing.done(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_waits_takes_no_more_than_twice_its_bytes() {
        for length in [1, SMALL / 2 - 1, SMALL / 2, SMALL] {
            let mut read = BytesMut::with_capacity(SMALL);
            read.resize(length, 7);
            let piece = piece(read).try_into_mut().expect("nobody else has it");
            assert!(piece.len() == length && piece.capacity() <= 2 * length);
        }
    }
}

//! The two kinds of ends of a relay: the side that it reads from, and the side that it writes to.

use std::cell::Cell;
use std::io::{self, IoSlice};
use std::net::Shutdown;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use h2::Reason;
use socket2::SockRef;
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep};

use super::relay::{Broken, End};
use crate::proxy::hbone::batch::{Batch, SLICES};
use crate::proxy::hbone::payload::Told;
use crate::proxy::hbone::stream::{Incoming, Outgoing};
use crate::proxy::limits::memory::{Hold, Level, Share};
use crate::sys::socket::{close_by_end, close_by_reset, read, unacknowledged};

/// Size of a read while little comes, in bytes.
const SMALL: usize = 16 << 10;
/// Size of a read while each comes back full, in bytes.
const LARGE: usize = 256 << 10;
/// Largest read while the pod has little memory left, in bytes; with none left it is `SMALL`.
const MEDIUM: usize = 64 << 10;
/// Shortest and longest pause between two checks whether a socket's peer has acknowledged all.
const LOOK: (Duration, Duration) = (Duration::from_millis(1), Duration::from_secs(1));

/// A socket that is reset if it is dropped before it is [done](Sink::done): its linger time is zero until then.
#[derive(Debug)]
pub(super) struct Socket {
    tcp: TcpStream,
    /// True if a write has met the error of the connection. The kernel reports it once, so a later read sees an end
    /// of file that the peer has not sent.
    told: Cell<bool>,
}

impl Socket {
    fn new(tcp: TcpStream) -> Self {
        Self {
            tcp,
            told: false.into(),
        }
    }

    /// Completes when the peer has reset the connection, or does not answer any more, even if bytes wait to be read
    /// or written.
    pub(super) async fn broken(&self) {
        // An error means that there is no runtime any more.
        let _ = self.tcp.ready(Interest::ERROR).await;
    }

    /// Completes when the peer has acknowledged all that was written, and our end, or when the socket is broken. A peer
    /// that does not read may take any time: then this checks once a second.
    pub(super) async fn acknowledged(&self) {
        let mut broken = pin!(self.broken());
        let began = Instant::now();
        // Asking fails only if the socket is broken: nothing will go out any more.
        while unacknowledged(&self.tcp).unwrap_or(0) > 0 {
            let pause = (began.elapsed() / 8).clamp(LOOK.0, LOOK.1);
            tokio::select! {
                () = &mut broken => return,
                () = sleep(pause) => {}
            }
        }
    }

    /// Makes the drop of this a reset again.
    pub(super) fn cut(&self) {
        // This cannot fail for a socket.
        let _ = close_by_reset(&self.tcp);
    }
}

/// Splits an end into its two directions.
pub(super) fn halves(end: End, share: &Share) -> (Source, Sink) {
    match end {
        End::Tcp(tcp) => {
            let socket = Rc::new(Socket::new(tcp));
            let source = Source::Tcp {
                socket: Rc::clone(&socket),
                size: SMALL,
                unwritten: 0,
                // Each may always hold one small read.
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
        /// Number of bytes that were read and are not delivered.
        unwritten: usize,
        held: Hold,
    },
    Stream(Incoming),
}

impl Source {
    /// Reads into the batch; `false` at the end. A socket is read only when the batch is empty, as the kernel holds
    /// what waits; a stream always, as the peer's window bounds it.
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

    /// Reads the waiting bytes of a stream, though nobody takes them: counted as undelivered they hold up no other
    /// stream of its tunnel. The bytes of a socket wait in the kernel.
    pub(super) fn hold(&mut self, batch: &mut Batch, context: &mut Context<'_>) {
        if let Self::Stream(_) = self {
            while let Poll::Ready(Ok(true)) = self.poll_read(batch, context) {}
            batch.keep();
        }
    }

    /// Returns the error of a broken end if no read has returned it.
    pub(super) fn error(&self) -> Broken {
        let kind = io::ErrorKind::ConnectionReset;
        let error = match self {
            Self::Tcp { socket, .. } => socket.tcp.take_error().ok().flatten(),
            Self::Stream(_) => None,
        };
        error.unwrap_or_else(|| kind.into()).into()
    }

    /// Counts bytes as taken by the other end.
    pub(super) fn delivered(&mut self, bytes: usize) {
        match self {
            Self::Tcp {
                unwritten, held, ..
            } => {
                *unwritten -= bytes;
                // The read is one piece, so a part of it frees nothing.
                if *unwritten == 0 {
                    held.set(0);
                }
            }
            Self::Stream(incoming) => incoming.delivered(bytes),
        }
    }
}

/// Limits a wanted size by the memory that the pod has left.
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

/// Makes a piece that may wait for long: it takes no more than twice its bytes. Otherwise a client that sends byte by
/// byte would make us keep a whole buffer for each.
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
    /// Writes some of the batch, which is not empty, and removes it from there; completes with the number of bytes.
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
                            // EPIPE: the peer had said its end before the connection broke, and that end is real.
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

    /// Returns the socket, unless this is a stream.
    pub(super) fn socket(&self) -> Option<Rc<Socket>> {
        match self {
            Self::Tcp(socket) => Some(Rc::clone(socket)),
            Self::Stream(_) => None,
        }
    }

    /// Completes when the end is broken, with the error if that is known. `socket` completes when its socket is
    /// broken.
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

    /// Completes when the written bytes are on their way and only a reset of a socket can still discard them: see
    /// [`Socket::acknowledged`].
    ///
    /// # Errors
    /// Some of them were discarded.
    pub(super) fn poll_flushed(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        let Self::Stream(outgoing) = self else {
            return Poll::Ready(Ok(()));
        };
        ready!(outgoing.poll_flushed(context));
        if !outgoing.was_discarded() {
            return Poll::Ready(Ok(()));
        }
        Poll::Ready(Err(match outgoing.poll_broken(context) {
            Poll::Ready(why) => why.into(),
            Poll::Pending => {
                let why = "the tunnel has ended before all was sent";
                io::Error::new(io::ErrorKind::ConnectionAborted, why).into()
            }
        }))
    }

    /// Returns true if [`Self::poll_flushed`] would complete.
    pub(super) fn is_flushed(&self) -> bool {
        match self {
            Self::Tcp(_) => true,
            Self::Stream(outgoing) => outgoing.is_flushed(),
        }
    }

    /// Sets the callback for delivered bytes. A socket returns it: then the writer has to call it.
    pub(super) fn tell(&self, told: Told) -> Option<Told> {
        match self {
            Self::Tcp(_) => Some(told),
            Self::Stream(outgoing) => {
                outgoing.tell(told);
                None
            }
        }
    }

    /// Ends this direction.
    pub(super) fn finish(&mut self) -> Result<(), Broken> {
        match self {
            Self::Tcp(socket) => Ok(SockRef::from(&socket.tcp).shutdown(Shutdown::Write)?),
            Self::Stream(outgoing) => Ok(outgoing.finish()?),
        }
    }

    /// Resets the end in both directions, with the reason if it is a stream.
    pub(super) fn reset(&mut self, reason: Reason) {
        match self {
            // Dropping a socket that is not done resets it.
            Self::Tcp(_) => {}
            Self::Stream(outgoing) => outgoing.reset(reason),
        }
    }

    /// Closes the end, which has been told that no more comes. It is not reset, unless it has sent bytes that were
    /// not read. Returns its socket, by which the kernel may still have something to deliver.
    pub(super) fn close(&mut self) -> Option<Rc<Socket>> {
        match self {
            Self::Tcp(_) => self.done(),
            // Bytes that it may still send are of no use, and it has done nothing wrong (RFC 9113, 8.1).
            Self::Stream(outgoing) => {
                outgoing.reset(Reason::NO_ERROR);
                None
            }
        }
    }

    /// Marks both directions as ended: dropping this does not reset the end. Returns its socket as [`Self::close`]
    /// does.
    pub(super) fn done(&mut self) -> Option<Rc<Socket>> {
        match self {
            Self::Tcp(socket) => {
                // This cannot fail for a socket.
                let _ = close_by_end(&socket.tcp);
                Some(Rc::clone(socket))
            }
            Self::Stream(outgoing) => {
                outgoing.done();
                None
            }
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

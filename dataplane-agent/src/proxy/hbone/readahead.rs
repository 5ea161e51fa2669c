//! A tunnel's socket. It is read in large pieces: rustls asks for one record at a time, at most, which would be a
//! system call for each 4 to 16 KiB. Reading continues while writing is blocked: `h2` reads nothing before it has
//! written what it owes its peer (a PING's answer, SETTINGS), and two ends that both wait for that would wait for
//! each other. The socket is closed when its peer has taken what was written, and it tells what arrives: see
//! [`Traffic`].

use std::cell::Cell;
use std::io;
use std::net::Shutdown;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use bytes::{Buf, BytesMut};
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep};

use super::CLOSE_TIMEOUT;
use crate::proxy::limits::memory::{Hold, Level, Share};
use crate::sys::socket::{Moved, close_by_end, moved, read, unacknowledged};

/// Size of a read while little comes, in bytes.
const SMALL: usize = 16 << 10;
/// Size of a read while each comes back full, in bytes.
const LARGE: usize = 256 << 10;

/// Bytes after which the tunnel's task pauses once, even if there is more: what was read is passed on before the rest
/// is read, however many frames that is.
const TURN: usize = 1 << 20;

/// Bytes that are read while nothing can be written. Linux reports a socket as writable when a third of its send
/// buffer is free, 1.4 MiB of the 4 MiB that `tcp_wmem` allows by default; at least that much must be read from a
/// peer that reads nothing meanwhile.
pub(crate) const AHEAD: usize = 4 << 20;

/// A socket with bytes that have been read from it and not yet taken. An idle one holds no buffer.
#[derive(Debug)]
pub struct ReadAhead {
    tcp: Rc<TcpStream>,
    buffer: BytesMut,
    /// Counts the bytes that were read while nothing could be written.
    ahead: Hold,
    /// Error met while reading ahead: the next read returns it.
    failed: Option<io::Error>,
    /// Number of bytes of `buffer` that are taken.
    taken: usize,
    /// Number of bytes that the next read asks for.
    size: usize,
    /// Number of bytes that have been read in this turn.
    turn: usize,
    /// Number of bytes that were written.
    written: u64,
    /// True if we have ended our direction.
    ended: bool,
    /// Set when we have ended our direction, or a write has to wait while the tunnel is [ending](Ending).
    linger: Option<Linger>,
    ending: Ending,
}

/// A mark on a tunnel's socket, set by who has ended the tunnel and does not ask its peer by PINGs any more whether it
/// is there: from then on a write fails, too, when the peer has taken nothing for [`CLOSE_TIMEOUT`].
#[derive(Clone, Debug, Default)]
pub struct Ending(Rc<Cell<bool>>);

impl Ending {
    /// Sets it. The next write that has to wait begins to count.
    pub fn set(&self) {
        self.0.set(true);
    }
}

/// The traffic of a tunnel's socket, in either direction.
#[derive(Clone, Debug)]
pub struct Traffic(Rc<TcpStream>);

impl Traffic {
    /// Returns how many bytes it has moved so far; the same as ever if it is broken.
    pub fn moved(&self) -> Moved {
        moved(&*self.0).unwrap_or_default()
    }
}

/// The wait for the peer's end, after ours. If the socket were closed before that, the kernel would answer what the
/// peer still sends, if only credit, by a reset, and discard what the peer has not taken.
#[derive(Debug)]
struct Linger {
    look: Pin<Box<Sleep>>,
    /// Number of bytes that the peer had acknowledged at the last look.
    acknowledged: u64,
}

impl ReadAhead {
    /// Wraps a socket of a pod with this share of the memory for undelivered bytes. Closing the socket ends the
    /// tunnel without a reset, which would discard what was written and is not sent: TLS shows the peer that the
    /// tunnel was cut, as it has not said its end.
    pub fn new(tcp: TcpStream, share: &Share) -> Self {
        // This cannot fail for a socket.
        let _ = close_by_end(&tcp);
        Self {
            tcp: Rc::new(tcp),
            buffer: BytesMut::new(),
            ahead: Hold::new(share, 0),
            failed: None,
            taken: 0,
            size: SMALL,
            turn: 0,
            written: 0,
            ended: false,
            linger: None,
            ending: Ending::default(),
        }
    }

    /// Returns the socket's traffic. The socket is open until that is dropped, too.
    pub fn traffic(&self) -> Traffic {
        Traffic(Rc::clone(&self.tcp))
    }

    /// Returns the mark to set when the tunnel has been ended.
    pub fn ending(&self) -> Ending {
        self.ending.clone()
    }

    /// Fills the empty buffer; `false` at the end of file.
    fn fill(&mut self, context: &mut Context<'_>) -> Poll<io::Result<bool>> {
        self.ahead.set(0);
        if let Some(error) = self.failed.take() {
            return Poll::Ready(Err(error));
        }
        if self.turn >= TURN {
            self.turn = 0;
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        loop {
            if self.tcp.poll_read_ready(context)?.is_pending() {
                self.turn = 0;
                return Poll::Pending;
            }
            self.taken = 0;
            if self.buffer.capacity() > 2 * LARGE {
                self.buffer = BytesMut::new();
            } else {
                self.buffer.clear();
            }
            match read(&self.tcp, &mut self.buffer, self.size) {
                Ok(0) => return Poll::Ready(Ok(false)),
                Ok(length) => {
                    self.turn += length;
                    self.size = if length == self.size {
                        LARGE.min(self.size * 4)
                    } else {
                        SMALL.max(self.size / 2)
                    };
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                Err(error) => return Poll::Ready(Err(error)),
            }
            return Poll::Ready(Ok(true));
        }
    }
}

impl ReadAhead {
    /// Writes, and counts what is written. If the write has to wait, reads ahead.
    fn poll_write_by(
        &mut self,
        context: &mut Context<'_>,
        write: impl Fn(&TcpStream) -> io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        let written = loop {
            match self.tcp.poll_write_ready(context)? {
                Poll::Pending => break Poll::Pending,
                Poll::Ready(()) => match write(&self.tcp) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    written => break Poll::Ready(written),
                },
            }
        };
        if let Poll::Ready(Ok(bytes)) = written {
            self.written += bytes as u64;
        }
        if written.is_pending() && self.read_on(context) {
            // The reading task finds these bytes; the socket will not wake it for them any more.
            context.waker().wake_by_ref();
        }
        if written.is_pending() && self.ending.0.get() && self.poll_linger(context).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        written
    }

    /// Completes when the peer has taken nothing for a while, or has taken all and we have ended our direction.
    fn poll_linger(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let acknowledged = || {
            // This fails only if the socket is broken.
            let left = unacknowledged(&*self.tcp).unwrap_or(0) as u64;
            (self.written.saturating_sub(left), left)
        };
        let linger = self.linger.get_or_insert_with(|| Linger {
            look: Box::pin(sleep(CLOSE_TIMEOUT)),
            acknowledged: acknowledged().0,
        });
        while linger.look.as_mut().poll(context).is_ready() {
            let (now, left) = acknowledged();
            if now <= linger.acknowledged || (self.ended && left == 0) {
                return Poll::Ready(());
            }
            linger.acknowledged = now;
            linger.look.as_mut().reset(Instant::now() + CLOSE_TIMEOUT);
        }
        Poll::Pending
    }

    /// Reads what there is, up to a bound. Returns true if there was anything.
    fn read_on(&mut self, context: &mut Context<'_>) -> bool {
        let before = (self.buffer.len() - self.taken, self.failed.is_some());
        self.buffer.advance(std::mem::take(&mut self.taken));
        while self.failed.is_none()
            && self.buffer.len() < AHEAD
            && self.ahead.level() != Level::Nothing
            && let Poll::Ready(ready) = self.tcp.poll_read_ready(context)
        {
            match ready.and_then(|()| read(&self.tcp, &mut self.buffer, LARGE)) {
                // The next read finds the end once more.
                Ok(0) => break,
                Ok(_) => self.ahead.set(self.buffer.len()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => self.failed = Some(error),
            }
        }
        (self.buffer.len(), self.failed.is_some()) != before
    }
}

impl AsyncRead for ReadAhead {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.taken == this.buffer.len() {
            match this.fill(context) {
                Poll::Ready(Ok(true)) => {}
                Poll::Ready(end) => return Poll::Ready(end.map(|_| ())),
                Poll::Pending => {
                    this.buffer = BytesMut::new();
                    this.taken = 0;
                    return Poll::Pending;
                }
            }
        }
        let rest = &this.buffer[this.taken..];
        let piece = &rest[..rest.len().min(out.remaining())];
        out.put_slice(piece);
        this.taken += piece.len();
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for ReadAhead {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_by(context, |tcp| tcp.try_write(bytes))
    }
    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_by(context, |tcp| tcp.try_write_vectored(slices))
    }
    fn is_write_vectored(&self) -> bool {
        true
    }
    /// There is nothing to flush: what was written is the kernel's.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
    /// Completes when the peer has ended too, or takes no more of what was written.
    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if !this.ended {
            SockRef::from(&*this.tcp).shutdown(Shutdown::Write)?;
            this.ended = true;
        }
        loop {
            match this.fill(context) {
                // Nobody reads these bytes any more.
                Poll::Ready(Ok(true)) => {}
                Poll::Ready(Ok(false) | Err(_)) => return Poll::Ready(Ok(())),
                Poll::Pending => break,
            }
        }
        this.buffer = BytesMut::new();
        this.taken = 0;
        this.poll_linger(context).map(Ok)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;
    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn a_peer_may_take_its_time_until_the_tunnel_is_ending_and_then_must_take_something() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a listener");
        let to = listener.local_addr().expect("an address");
        let (far, near) = tokio::join!(TcpStream::connect(to), listener.accept());
        let (mut far, near) = (far.expect("connected"), near.expect("accepted").0);
        let mut near = ReadAhead::new(near, &Share::default());
        let ending = near.ending();
        let mut write = async || {
            loop {
                if let Err(error) = near.write(&vec![7; 1 << 16]).await {
                    return error.kind();
                }
            }
        };
        let waits = timeout(CLOSE_TIMEOUT * 2, write()).await;
        waits.expect_err("nobody reads, and it goes on");

        ending.set();
        let began = Instant::now();
        let takes = async {
            for _ in 0..4 {
                sleep(Duration::from_secs(1)).await;
                far.read_exact(&mut vec![0; 1 << 19]).await.expect("bytes");
            }
        };
        let (error, ()) = tokio::join!(write(), takes);
        assert_eq!(error, io::ErrorKind::TimedOut);
        let took = began.elapsed();
        assert!(took > Duration::from_secs(5), "it took some: {took:?}");
    }
}

//! Reads a tunnel's socket in large pieces. rustls asks for one record at a time, at most, which
//! would be a system call for each 4 to 16 KiB.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use crate::sys::socket::{close_by_end, read};

/// The size of a read while little comes.
const SMALL: usize = 16 << 10;
/// The size of a read while each comes back full.
const LARGE: usize = 256 << 10;

/// After so much the tunnel's task pauses once, even if there is more: what was read is passed on before
/// the rest comes, however many frames that is.
const TURN: usize = 1 << 20;

/// A socket with what has been read from it and not yet been taken. An idle one holds no buffer.
#[derive(Debug)]
pub struct ReadAhead {
    tcp: TcpStream,
    buffer: BytesMut,
    /// What of `buffer` is taken.
    taken: usize,
    /// How much the next read asks for.
    size: usize,
    /// How much has been read in this turn.
    turn: usize,
}

impl ReadAhead {
    /// Around a socket. Closing it ends the tunnel without a reset, which would discard what was written
    /// and is not sent: that a tunnel was cut is told by the TLS in it, which has not said its end.
    pub fn new(tcp: TcpStream) -> Self {
        // Fails for no socket.
        let _ = close_by_end(&tcp);
        Self {
            tcp,
            buffer: BytesMut::new(),
            taken: 0,
            size: SMALL,
            turn: 0,
        }
    }

    /// Fills the empty buffer; `false` at the end of file.
    fn fill(&mut self, context: &mut Context<'_>) -> Poll<io::Result<bool>> {
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
            self.buffer.clear();
            self.taken = 0;
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
        Pin::new(&mut self.tcp).poll_write(context, bytes)
    }
    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tcp).poll_write_vectored(context, slices)
    }
    fn is_write_vectored(&self) -> bool {
        self.tcp.is_write_vectored()
    }
    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_flush(context)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_shutdown(context)
    }
}

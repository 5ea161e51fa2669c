//! The frames of a tunnel, before the engine sees them. One that is too long is refused as soon as its head has come,
//! since the engine would wait for all of it.
//!
//! There are frames for which `h2` visits all streams of a tunnel, also those that it only remembers: SETTINGS, which may change
//! the window of each, and GOAWAY. A peer writes thousands of them in one read, so few are passed on before the other
//! tasks of the worker have their turn.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::OTHER_FRAME;

/// Number of such frames after which the tunnel's task pauses. A peer in order sends one or two.
pub(crate) const IN_A_TURN: usize = 16;

/// Length of a frame's head (RFC 9113, 4.1), in bytes.
const HEAD: usize = 9;
const DATA: u8 = 0;
const SETTINGS: u8 = 4;
const GOAWAY: u8 = 7;

/// The bytes of a tunnel, as `h2` reads and writes them.
#[derive(Debug)]
pub struct Paced<T> {
    io: T,
    /// Bytes that were read and are for a later turn.
    rest: BytesMut,
    /// The head of the next frame, as far as it has come.
    head: [u8; HEAD],
    /// Number of bytes of `head` that have come.
    came: usize,
    /// Number of bytes of the current frame that are still to come.
    payload: usize,
    /// Number of such frames that were passed on in this turn.
    passed: usize,
    /// True if a frame was too long; nothing more is passed on.
    refused: bool,
}

impl<T> Paced<T> {
    /// Wraps a tunnel in which `preface` bytes come before the first frame.
    pub fn new(io: T, preface: usize) -> Self {
        Self {
            io,
            rest: BytesMut::new(),
            head: [0; HEAD],
            came: 0,
            payload: preface,
            passed: 0,
            refused: false,
        }
    }

    /// Returns how many of the next bytes belong to this turn; at least one, if there are any.
    fn pass(&mut self, bytes: &[u8]) -> usize {
        let mut at = 0;
        while at < bytes.len() {
            let left = bytes.len() - at;
            if self.payload > 0 {
                let part = self.payload.min(left);
                self.payload -= part;
                at += part;
                continue;
            }
            let part = (HEAD - self.came).min(left);
            self.head[self.came..self.came + part].copy_from_slice(&bytes[at..at + part]);
            self.came += part;
            at += part;
            if self.came == HEAD {
                self.came = 0;
                let [high, middle, low, kind, ..] = self.head;
                self.payload = u32::from_be_bytes([0, high, middle, low]) as usize;
                if kind != DATA && self.payload > OTHER_FRAME {
                    self.refused = true;
                    break;
                }
                self.passed += usize::from([SETTINGS, GOAWAY].contains(&kind));
                // What the frame says comes in the next turn.
                if self.passed == IN_A_TURN {
                    break;
                }
            }
        }
        at
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Paced<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.refused {
            let error = io::Error::new(io::ErrorKind::InvalidData, "a frame is too long");
            return Poll::Ready(Err(error));
        }
        if this.passed == IN_A_TURN {
            this.passed = 0;
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        if !this.rest.is_empty() {
            let mut rest = std::mem::take(&mut this.rest);
            let part = this.pass(&rest[..rest.len().min(out.remaining())]);
            out.put_slice(&rest[..part]);
            rest.advance(part);
            this.rest = rest;
            return Poll::Ready(Ok(()));
        }
        let from = out.filled().len();
        let read = Pin::new(&mut this.io).poll_read(context, out);
        if read.is_pending() {
            this.passed = 0;
        }
        let end = from + this.pass(&out.filled()[from..]);
        this.rest = BytesMut::from(&out.filled()[end..]);
        out.set_filled(end);
        read
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Paced<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(context, bytes)
    }
    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(context, slices)
    }
    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(context)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn nothing_is_lost_and_no_turn_has_many_of_them(
            frames in proptest::collection::vec((0..10_u8, 0..40_usize), 0..200),
            preface in 0..30_usize,
            size in 1..600_usize,
        ) {
            let mut sent = vec![SETTINGS; preface];
            let mut costly = Vec::new();
            for (kind, length) in frames {
                if [SETTINGS, GOAWAY].contains(&kind) {
                    costly.push(sent.len() + HEAD);
                }
                sent.extend([0, 0, length as u8, kind, 0, 0, 0, 0, 0]);
                sent.extend(vec![SETTINGS; length]);
            }
            let mut paced = Paced::new(sent.as_slice(), preface);
            let (mut got, mut turn) = (Vec::new(), 0);
            let mut context = Context::from_waker(Waker::noop());
            while got.len() < sent.len() {
                let mut space = vec![0; size];
                let mut out = ReadBuf::new(&mut space);
                match Pin::new(&mut paced).poll_read(&mut context, &mut out) {
                    Poll::Ready(read) => {
                        read.expect("bytes");
                        prop_assert!(!out.filled().is_empty());
                        got.extend_from_slice(out.filled());
                    }
                    Poll::Pending => turn = got.len(),
                }
                let of_turn = costly.iter().filter(|end| (turn + 1..=got.len()).contains(end));
                prop_assert!(of_turn.count() <= IN_A_TURN);
            }
            prop_assert_eq!(got, sent);
        }
    }
}

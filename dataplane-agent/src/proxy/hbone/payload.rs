//! Bytes that a stream sends. `h2` does not report when it has written something, but the buffers that it is given
//! notice it.

use std::cell::{Cell, OnceCell, RefCell};
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use bytes::{Buf, Bytes};
use tokio::time::Instant;

use super::{SEND_BUFFER, SEND_LEAST, SEND_LESS};
use crate::proxy::limits::memory::{Hold, Level, Share};

/// Bytes that a piece costs besides its content. A peer that makes many small ones pays for them.
const PIECE: usize = 512;
/// Bytes that each stream may always have waiting: what [`SEND_LEAST`] lets begin, one piece as large, and the end.
const FREE: usize = 2 * (SEND_LEAST + PIECE) + PIECE;

/// Bytes of one stream, which count themselves as they are written to the tunnel.
#[derive(Debug)]
pub struct Payload {
    bytes: Bytes,
    /// Memory that it takes, in bytes, until its last byte is written: writing a part frees nothing.
    cost: usize,
    unsent: Rc<Unsent>,
}

impl Payload {
    /// Creates a piece. One without bytes is the end of the stream; it waits as any other, and the engine drops it
    /// when it has written it.
    pub(super) fn new(bytes: Bytes, unsent: &Rc<Unsent>) -> Self {
        let cost = bytes.len() + PIECE;
        unsent.more(cost);
        Self {
            bytes,
            cost,
            unsent: Rc::clone(unsent),
        }
    }
}

impl Buf for Payload {
    fn remaining(&self) -> usize {
        self.bytes.len()
    }
    fn chunk(&self) -> &[u8] {
        &self.bytes
    }
    fn advance(&mut self, count: usize) {
        self.bytes.advance(count);
        if let Some(told) = self.unsent.told.get() {
            told(count as u64);
        }
        let freed = if self.bytes.is_empty() {
            std::mem::take(&mut self.cost)
        } else {
            0
        };
        self.unsent.less(freed);
    }
}

impl Drop for Payload {
    /// Bytes that are left were discarded, as the stream was reset or its tunnel has ended; or this was the end of
    /// the stream.
    fn drop(&mut self) {
        if !self.bytes.is_empty() {
            self.unsent.discarded.set(true);
        }
        if self.cost > 0 {
            self.unsent.less(self.cost);
        }
    }
}

/// Callback that gets the number of bytes each time that some were written to the tunnel.
pub type Told = Box<dyn Fn(u64)>;

/// Bytes of one stream that wait to be written to the tunnel.
pub(super) struct Unsent {
    /// Number of bytes, with the cost of each piece.
    bytes: Cell<usize>,
    /// True if some were discarded.
    discarded: Cell<bool>,
    /// Counts `bytes` in the pod's share of memory.
    held: OnceCell<Hold>,
    told: OnceCell<Told>,
    waiting: RefCell<Option<Waker>>,
    /// Number of bytes at which the waiting task is woken.
    enough: Cell<usize>,
    /// Time since which nothing of it was written; it is among the `stalls`.
    since: Cell<Option<Instant>>,
    stalls: Rc<Stalls>,
}

impl Unsent {
    pub(super) fn new(stalls: &Rc<Stalls>) -> Rc<Self> {
        Rc::new(Self {
            bytes: Cell::new(0),
            discarded: Cell::new(false),
            held: OnceCell::new(),
            told: OnceCell::new(),
            waiting: RefCell::default(),
            enough: Cell::new(0),
            since: Cell::new(None),
            stalls: Rc::clone(stalls),
        })
    }

    pub(super) fn is_empty(&self) -> bool {
        self.bytes.get() == 0
    }

    pub(super) fn was_discarded(&self) -> bool {
        self.discarded.get()
    }

    /// Sets the callback; only the first call counts.
    pub(super) fn tell(&self, told: Told) {
        // Only the first callback counts.
        let _ = self.told.set(told);
    }

    /// Counts the waiting bytes in a pod's share and keeps to it; only the first call counts.
    pub(super) fn share(&self, share: &Share) {
        // Only the first share counts.
        let held = self.held.get_or_init(|| Hold::new(share, FREE));
        held.set(self.bytes.get());
    }

    /// Completes when one more piece may wait. When its pod has no memory left a stream can still send, as its own
    /// bytes leave.
    pub(super) fn poll_room(&self, context: &Context<'_>) -> Poll<()> {
        let bytes = self.bytes.get();
        if bytes < SEND_LEAST {
            return Poll::Ready(());
        }
        let most = match self.held.get().map(Hold::level) {
            None | Some(Level::Plenty) => SEND_BUFFER,
            Some(Level::Little) => SEND_LESS,
            Some(Level::Nothing) => SEND_LEAST,
        };
        if bytes < most {
            return Poll::Ready(());
        }
        self.wait(most / 4 * 3, context)
    }

    /// Completes when nothing waits.
    pub(super) fn poll_flushed(&self, context: &Context<'_>) -> Poll<()> {
        if self.is_empty() {
            return Poll::Ready(());
        }
        self.wait(0, context)
    }

    fn wait(&self, enough: usize, context: &Context<'_>) -> Poll<()> {
        self.enough.set(enough);
        let mut waiting = self.waiting.borrow_mut();
        match &mut *waiting {
            Some(waker) => waker.clone_from(context.waker()),
            none => *none = Some(context.waker().clone()),
        }
        Poll::Pending
    }

    fn more(&self, cost: usize) {
        self.hold(self.bytes.get() + cost);
        if self.since.get().is_none() {
            self.since.set(Some(self.stalls.begin()));
        }
    }

    /// Some bytes were written or discarded, which frees `cost` bytes.
    fn less(&self, cost: usize) {
        self.hold(self.bytes.get() - cost);
        if let Some(since) = self.since.take() {
            self.stalls.end(since);
        }
        if !self.is_empty() {
            self.since.set(Some(self.stalls.begin()));
        }
        if self.bytes.get() <= self.enough.get()
            && let Some(waker) = self.waiting.take()
        {
            waker.wake();
        }
    }

    fn hold(&self, bytes: usize) {
        self.bytes.set(bytes);
        if let Some(held) = self.held.get() {
            held.set(bytes);
        }
    }
}

impl std::fmt::Debug for Unsent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Unsent")
            .field("bytes", &self.bytes)
            .finish_non_exhaustive()
    }
}

/// The streams of one tunnel that have something to send: the time since which each could send nothing. The peer's
/// window causes a stall, so it does not matter whether anybody waits to send more.
#[derive(Debug, Default)]
pub struct Stalls {
    since: RefCell<Vec<Instant>>,
}

impl Stalls {
    /// Returns how many streams have waited for longer than [`super::STALLED_AFTER`].
    pub fn count(&self) -> usize {
        let since = self.since.borrow();
        let long = since
            .iter()
            .filter(|since| since.elapsed() > super::STALLED_AFTER);
        long.count()
    }

    fn begin(&self) -> Instant {
        let now = Instant::now();
        self.since.borrow_mut().push(now);
        now
    }

    fn end(&self, since: Instant) {
        let mut all = self.since.borrow_mut();
        if let Some(at) = all.iter().position(|other| *other == since) {
            all.swap_remove(at);
        }
    }
}

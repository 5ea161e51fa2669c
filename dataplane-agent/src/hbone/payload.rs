//! What a stream sends. `h2` does not say when it has written something; the buffer that it is
//! given does.

use std::cell::{Cell, OnceCell, RefCell};
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use bytes::{Buf, Bytes};
use tokio::time::Instant;

use super::SEND_BUFFER;

/// Bytes of one stream, which tell as they are written to the tunnel.
#[derive(Debug)]
pub struct Payload {
    bytes: Bytes,
    /// The end of a stream has no bytes, and nothing to tell.
    unsent: Option<Rc<Unsent>>,
}

impl Payload {
    pub(super) fn new(bytes: Bytes, unsent: &Rc<Unsent>) -> Self {
        unsent.bytes.set(unsent.bytes.get() + bytes.len());
        Self {
            bytes,
            unsent: Some(Rc::clone(unsent)),
        }
    }

    /// No bytes.
    pub(super) fn empty() -> Self {
        Self {
            bytes: Bytes::new(),
            unsent: None,
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
        if let Some(unsent) = &self.unsent {
            if let Some(told) = unsent.told.get() {
                told(count as u64);
            }
            unsent.less(count);
        }
    }
}

impl Drop for Payload {
    /// What is left was discarded: the stream was reset, or its tunnel has ended.
    fn drop(&mut self) {
        if let Some(unsent) = &self.unsent
            && !self.bytes.is_empty()
        {
            unsent.less(self.bytes.len());
        }
    }
}

/// Is told how much was written to the tunnel, each time.
pub type Told = Box<dyn Fn(u64)>;

/// What of one stream waits to be written to the tunnel.
pub(super) struct Unsent {
    bytes: Cell<usize>,
    told: OnceCell<Told>,
    waiting: RefCell<Option<Waker>>,
    /// Since when nothing of a full buffer was written.
    stalled: Cell<Option<Instant>>,
    stalls: Rc<Stalls>,
}

impl Unsent {
    pub(super) fn new(stalls: &Rc<Stalls>) -> Rc<Self> {
        Rc::new(Self {
            bytes: Cell::new(0),
            told: OnceCell::new(),
            waiting: RefCell::default(),
            stalled: Cell::new(None),
            stalls: Rc::clone(stalls),
        })
    }

    pub(super) fn is_empty(&self) -> bool {
        self.bytes.get() == 0
    }

    /// Has somebody told; once.
    pub(super) fn tell(&self, told: Told) {
        // Who was first stays.
        let _ = self.told.set(told);
    }

    /// Completes when at most `most` bytes wait.
    pub(super) fn poll_at_most(&self, most: usize, context: &Context<'_>) -> Poll<()> {
        if self.bytes.get() <= most {
            return Poll::Ready(());
        }
        if self.stalled.get().is_none() {
            let now = Instant::now();
            self.stalled.set(Some(now));
            self.stalls.since.borrow_mut().push(now);
        }
        let mut waiting = self.waiting.borrow_mut();
        match &mut *waiting {
            Some(waker) => waker.clone_from(context.waker()),
            none => *none = Some(context.waker().clone()),
        }
        Poll::Pending
    }

    fn less(&self, count: usize) {
        self.bytes.set(self.bytes.get() - count);
        self.moving();
        if self.bytes.get() <= SEND_BUFFER / 2
            && let Some(waker) = self.waiting.take()
        {
            waker.wake();
        }
    }

    fn moving(&self) {
        if let Some(since) = self.stalled.take() {
            let mut all = self.stalls.since.borrow_mut();
            if let Some(at) = all.iter().position(|other| *other == since) {
                all.swap_remove(at);
            }
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

impl Drop for Unsent {
    fn drop(&mut self) {
        self.moving();
    }
}

/// The streams of one tunnel that cannot send: since when each waits.
#[derive(Debug, Default)]
pub struct Stalls {
    since: RefCell<Vec<Instant>>,
}

impl Stalls {
    /// How many wait for longer than [`super::STALLED`].
    pub fn count(&self) -> usize {
        let since = self.since.borrow();
        let long = since
            .iter()
            .filter(|since| since.elapsed() > super::STALLED);
        long.count()
    }
}

//! How much a peer may send. A stream that nobody reads must hold back itself alone, though `h2` gives
//! credit for stream and tunnel together, as bytes are delivered. So the tunnel's window grows with
//! what is not delivered, and as that becomes much the windows of its streams become small: what all
//! of them can still send never exceeds what the tunnel may hold, and none waits for another.
//!
//! | not delivered, of one tunnel | window of each of its streams |
//! |---|---|
//! | less than 16 MiB | 4 MiB |
//! | less than 32 MiB | 1 MiB |
//! | more | 64 KiB |
//!
//! What was under way before the peer heard of the smaller window is at most the tunnel's window. So a
//! tunnel holds at most 32 MiB, 16 MiB that were under way, and 64 KiB of each of 200 streams: 61 MiB.
//!
//! All tunnels of the process together have a bound as well. From half of it on, every stream's window is
//! 64 KiB; over it no tunnel's window grows any more, so that streams of one tunnel may wait for each
//! other, but the daemon is not killed for its memory.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Waker};

use super::{CONNECTION_WINDOW, STREAM_WINDOW};

/// By how much what is not delivered must change before the tunnel's window follows.
const STEP: usize = 1 << 20;
/// From how many bytes that are not delivered a stream's window is how large.
const WINDOWS: [(usize, u32); 3] = [
    (0, STREAM_WINDOW),
    (16 << 20, 1 << 20),
    (32 << 20, SMALLEST),
];
const SMALLEST: u32 = 64 << 10;

/// What the tunnels of this process hold, in steps, and what they may. It is about the process's memory,
/// which all workers share.
static HELD: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(256 << 20);

/// All tunnels of this process are to hold no more than this, at least 64 MiB.
pub fn hold_at_most(bytes: u64) {
    let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
    MOST.store(bytes.max(64 << 20), Ordering::Relaxed);
}

/// What all tunnels of this process hold and have not delivered, to some MiB.
pub fn held() -> usize {
    HELD.load(Ordering::Relaxed)
}

/// What has come by a tunnel, of all its streams, and is not delivered.
#[derive(Debug, Default)]
pub struct Undelivered {
    bytes: Cell<usize>,
    /// What it was as the windows were last set, and is in [`HELD`].
    told: Cell<usize>,
    driver: RefCell<Option<Waker>>,
}

impl Undelivered {
    pub(super) fn more(&self, bytes: usize) {
        self.set(self.bytes.get() + bytes);
    }

    pub(super) fn less(&self, bytes: usize) {
        self.set(self.bytes.get() - bytes);
    }

    fn set(&self, bytes: usize) {
        self.bytes.set(bytes);
        if bytes.abs_diff(self.told.get()) >= STEP
            && let Some(driver) = self.driver.take()
        {
            driver.wake();
        }
    }
}

/// A connection of either side, whose windows can be changed.
pub trait Connection {
    /// What all streams together may send.
    fn set_tunnel(&mut self, size: u32);
    /// What each stream may send, those included that are open.
    ///
    /// # Errors
    /// The peer has not yet heard of the last change.
    fn set_streams(&mut self, size: u32) -> Result<(), h2::Error>;
}

impl<T, B> Connection for h2::client::Connection<T, B>
where
    T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
    B: bytes::Buf,
{
    fn set_tunnel(&mut self, size: u32) {
        self.set_target_window_size(size);
    }
    fn set_streams(&mut self, size: u32) -> Result<(), h2::Error> {
        self.set_initial_window_size(size)
    }
}

impl<T, B> Connection for h2::server::Connection<T, B>
where
    T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
    B: bytes::Buf,
{
    fn set_tunnel(&mut self, size: u32) {
        self.set_target_window_size(size);
    }
    fn set_streams(&mut self, size: u32) -> Result<(), h2::Error> {
        self.set_initial_window_size(size)
    }
}

/// Keeps the windows of one tunnel; who drives the connection calls it each time before.
#[derive(Debug)]
pub struct Windows {
    undelivered: Rc<Undelivered>,
    streams: u32,
}

impl Drop for Windows {
    fn drop(&mut self) {
        self.count(0);
    }
}

impl Windows {
    /// Of a connection with the settings of [`super::client`] or [`super::server`].
    pub fn new(undelivered: &Rc<Undelivered>) -> Self {
        Self {
            undelivered: Rc::clone(undelivered),
            streams: STREAM_WINDOW,
        }
    }

    fn count(&self, bytes: usize) {
        HELD.fetch_add(bytes, Ordering::Relaxed);
        HELD.fetch_sub(self.undelivered.told.replace(bytes), Ordering::Relaxed);
    }

    /// Sets what must be changed, and has the driver woken when more must.
    pub fn keep(&mut self, connection: &mut impl Connection, context: &Context<'_>) {
        let all = &self.undelivered;
        let bytes = all.bytes.get();
        let (held, most) = (held(), MOST.load(Ordering::Relaxed));
        if bytes.abs_diff(all.told.get()) >= STEP {
            let grows = bytes > all.told.get();
            self.count(bytes);
            if !grows || held <= most {
                // 61 MiB at most, besides: far from where it would not fit.
                let bytes = u32::try_from(bytes).unwrap_or(u32::MAX >> 2);
                connection.set_tunnel(CONNECTION_WINDOW + bytes.min(u32::MAX >> 2));
            }
        }
        let wanted = stream_window(bytes, held > most / 2, self.streams);
        if wanted != self.streams && connection.set_streams(wanted).is_ok() {
            self.streams = wanted;
        }
        let mut driver = all.driver.borrow_mut();
        match &mut *driver {
            Some(waker) => waker.clone_from(context.waker()),
            none => *none = Some(context.waker().clone()),
        }
    }
}

/// The window of a stream when so much is not delivered, and of the process's tunnels together `much`. It
/// grows again only when half of what made it small is gone: each change is a message to the peer.
fn stream_window(undelivered: usize, much: bool, now: u32) -> u32 {
    if much {
        return SMALLEST;
    }
    let of = |bytes: usize| {
        let reached = WINDOWS.iter().rev().find(|(from, _)| bytes >= *from);
        reached.map_or(STREAM_WINDOW, |(_, window)| *window)
    };
    let smaller = of(undelivered);
    let larger = of(undelivered.saturating_mul(2));
    if smaller < now {
        smaller
    } else {
        larger.max(now)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_stream_may_send_less_the_more_is_not_delivered_and_more_again_when_half_is_gone() {
        let mib = 1 << 20;
        assert_eq!(stream_window(0, false, STREAM_WINDOW), STREAM_WINDOW);
        assert_eq!(stream_window(16 * mib, false, STREAM_WINDOW), 1 << 20);
        assert_eq!(stream_window(40 * mib, false, STREAM_WINDOW), 64 << 10);
        assert_eq!(stream_window(17 * mib, false, 64 << 10), 64 << 10);
        assert_eq!(stream_window(15 * mib, false, 64 << 10), 1 << 20);
        assert_eq!(stream_window(9 * mib, false, 1 << 20), 1 << 20);
        assert_eq!(stream_window(7 * mib, false, 1 << 20), STREAM_WINDOW);
        assert_eq!(stream_window(0, true, STREAM_WINDOW), SMALLEST);
        assert_eq!(stream_window(0, false, SMALLEST), STREAM_WINDOW);
    }

    /// A peer that sends what it may, on as many streams as it may, of which none is ever read.
    #[derive(Default)]
    struct Peer {
        tunnel: u32,
        streams: u32,
    }

    impl Connection for Peer {
        fn set_tunnel(&mut self, size: u32) {
            self.tunnel = size;
        }
        fn set_streams(&mut self, size: u32) -> Result<(), h2::Error> {
            self.streams = size;
            Ok(())
        }
    }

    proptest! {
        #[test]
        fn no_stream_waits_for_another_and_what_a_tunnel_holds_is_bounded(
            turns in proptest::collection::vec((0..200_usize, 1..1_000_000_usize), 1..2000),
            late in 0..16_usize,
        ) {
            let undelivered = Rc::new(Undelivered::default());
            let mut windows = Windows::new(&undelivered);
            let mut peer = Peer { tunnel: CONNECTION_WINDOW, streams: STREAM_WINDOW };
            // What the peer has heard of, some turns later.
            let mut heard = std::collections::VecDeque::from(vec![STREAM_WINDOW; late]);
            let mut sent = vec![0; 200];
            for (stream, bytes) in turns {
                heard.push_back(peer.streams);
                let window = heard.pop_front().unwrap_or(peer.streams) as usize;
                let all: usize = sent.iter().sum();
                let may = window.saturating_sub(sent[stream]).min(bytes);
                prop_assert!(all + may <= peer.tunnel as usize, "a stream waits for the tunnel");
                sent[stream] += may;
                undelivered.more(may);
                windows.keep(&mut peer, &Context::from_waker(Waker::noop()));
                prop_assert!(undelivered.bytes.get() <= 61 << 20);
            }
        }
    }
}

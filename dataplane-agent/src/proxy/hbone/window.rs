//! The receive windows of a tunnel and its streams. A stream that nobody reads must hold back itself alone, though
//! `h2` gives credit for stream and tunnel together, as bytes are delivered. So the tunnel's window grows with the
//! undelivered bytes, and as these become many the windows of its streams shrink: the bytes that all of them can
//! still send never exceed the tunnel's window, and no stream waits for another.
//!
//! | undelivered, of one tunnel | window of each of its streams |
//! |---|---|
//! | less than 16 MiB | 4 MiB |
//! | less than 32 MiB | 1 MiB |
//! | more | 64 KiB |
//!
//! Bytes that the peer sent before it learned of the smaller window are at most the tunnel's window. So a tunnel
//! holds at most 32 MiB, 16 MiB that were under way, and 64 KiB of each of 200 streams: 61 MiB. The tunnel's window
//! never lets it hold more, since `h2` holds a peer to the smaller windows only once it has acknowledged them. The
//! connections of one that does not wait for each other.
//!
//! All tunnels of a pod together have a bound as well: its share of the node's memory for undelivered bytes, besides
//! 64 KiB of each stream. From half of it on, every stream's window is 64 KiB, from the first if the tunnel is new. At
//! the bound no tunnel's window grows any more, so streams of one tunnel may wait for each other. A window that could
//! not grow is tried again until it can, or need not any more. Windows that peers have been given cannot be taken back
//! from those that do not heed the smaller ones: at an eighth of the memory beyond the bound each tunnel that brings
//! more, and holds more than its streams always may, is ended (`Undelivered::is_excess`). So the daemon is not killed
//! for its memory.

use std::cell::{Cell, RefCell};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Waker};
use std::time::Duration;

use tokio::time::{Sleep, sleep};

use super::{CONNECTION_WINDOW, STREAM_WINDOW};
use crate::proxy::limits::memory::{Hold, Level, Share};

/// Change of the undelivered bytes after which the tunnel's window follows.
const STEP: usize = 1 << 20;
/// Interval at which a window that could not grow is tried again. Memory is freed on other threads, and polling is
/// cheaper than a message from them.
const AGAIN: Duration = Duration::from_millis(100);
/// Window of a stream from each number of undelivered bytes on.
const WINDOWS: [(usize, u32); 3] = [
    (0, STREAM_WINDOW),
    (16 << 20, 1 << 20),
    (32 << 20, SMALLEST),
];
const SMALLEST: u32 = 64 << 10;
/// Most undelivered bytes of a tunnel.
const MOST: u32 = 61 << 20;
/// Most bytes by which a tunnel's window exceeds its first size.
const MOST_GRANTED: usize = (MOST - CONNECTION_WINDOW) as usize;

/// Bytes of all streams of a tunnel that were received and are not delivered.
#[derive(Debug)]
pub struct Undelivered {
    bytes: Cell<usize>,
    /// Number of streams, each of which may always hold [`SMALLEST`].
    streams: Cell<usize>,
    /// Counts what `bytes` has beyond that in the pod's share of memory.
    held: Hold,
    /// First window of each stream.
    first: u32,
    /// Value of `bytes` at the last look.
    seen: Cell<usize>,
    /// Whether something came since [`Self::is_excess`] was asked last.
    came: Cell<bool>,
    driver: RefCell<Option<Waker>>,
}

impl Undelivered {
    /// Creates the count for a tunnel of a pod with this share of memory.
    pub fn new(share: &Share) -> Self {
        let held = Hold::new(share, 0);
        let much = held.level() != Level::Plenty;
        Self {
            bytes: Cell::new(0),
            streams: Cell::new(0),
            held,
            first: stream_window(0, much, STREAM_WINDOW),
            seen: Cell::new(0),
            came: Cell::new(false),
            driver: RefCell::default(),
        }
    }

    /// Returns the window with which each stream begins, in bytes.
    pub fn first_window(&self) -> u32 {
        self.first
    }

    /// Returns true if the tunnel must be ended: it has brought something since it was asked last, and holds more than
    /// its streams always may, and the pod much more than its share.
    pub(super) fn is_excess(&self) -> bool {
        self.came.take() && self.held.is_excess()
    }

    pub(super) fn opened(&self) {
        self.streams.set(self.streams.get() + 1);
        self.set(self.bytes.get());
    }

    pub(super) fn closed(&self) {
        self.streams.set(self.streams.get() - 1);
        self.set(self.bytes.get());
    }

    pub(super) fn more(&self, bytes: usize) {
        self.came.set(true);
        self.set(self.bytes.get() + bytes);
    }

    pub(super) fn less(&self, bytes: usize) {
        self.set(self.bytes.get() - bytes);
    }

    fn set(&self, bytes: usize) {
        self.bytes.set(bytes);
        let always = self.streams.get() * SMALLEST as usize;
        self.held.set(bytes.saturating_sub(always));
        if bytes.abs_diff(self.seen.get()) >= STEP
            && let Some(driver) = self.driver.take()
        {
            driver.wake();
        }
    }
}

/// A connection of either side, whose windows can be changed.
pub trait Connection {
    /// Sets the receive window of all streams together, in bytes.
    fn set_tunnel(&mut self, size: u32);
    /// Sets the receive window of each stream, in bytes, also of open ones.
    ///
    /// # Errors
    /// The peer has not yet acknowledged the last change.
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

/// The windows of one tunnel. The task that drives the connection calls [`Self::keep`] before each poll.
#[derive(Debug)]
pub struct Windows {
    undelivered: Rc<Undelivered>,
    /// Bytes by which the tunnel's window exceeds its first size.
    granted: usize,
    /// Timer of the next attempt; set while the pod has too little memory left for the window.
    again: Option<Pin<Box<Sleep>>>,
    streams: u32,
}

impl Windows {
    /// Creates the windows of a connection with the settings of [`super::client`] or [`super::server`].
    pub fn new(undelivered: &Rc<Undelivered>) -> Self {
        Self {
            undelivered: Rc::clone(undelivered),
            granted: 0,
            again: None,
            streams: undelivered.first,
        }
    }

    /// Adapts the windows, and has the driver woken when they must be adapted again.
    pub fn keep(&mut self, connection: &mut impl Connection, context: &mut Context<'_>) {
        let all = Rc::clone(&self.undelivered);
        let bytes = all.bytes.get();
        if bytes.abs_diff(all.seen.get()) >= STEP {
            all.seen.set(bytes);
        }
        // The window follows in steps.
        let wanted = all.seen.get().min(MOST_GRANTED);
        let level = all.held.level();
        let denied = wanted > self.granted && level == Level::Nothing;
        if wanted != self.granted && !denied {
            self.granted = wanted;
            // It is below `MOST`, which is of this type.
            let wanted = u32::try_from(wanted).unwrap_or(0);
            connection.set_tunnel(CONNECTION_WINDOW + wanted);
        }
        self.look_again(denied, context);
        let wanted = stream_window(bytes, level != Level::Plenty, self.streams);
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

impl Windows {
    /// Has the driver woken for another attempt, as long as the window is `denied` to grow.
    fn look_again(&mut self, denied: bool, context: &mut Context<'_>) {
        if !denied {
            self.again = None;
            return;
        }
        let again = self.again.get_or_insert_with(|| Box::pin(sleep(AGAIN)));
        while again.as_mut().poll(context).is_ready() {
            again.set(sleep(AGAIN));
        }
    }
}

/// Returns the window of a stream for a number of undelivered bytes. `much`: the pod has little memory left. The
/// window grows again only when half of what made it small is gone, since each change is a message to the peer.
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
    use std::task::Poll;

    use proptest::prelude::*;

    use super::*;
    use crate::proxy::limits::memory::{Memory, PodMemory};

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

    /// A peer that sends as much as it may, on as many streams as it may, none of which is ever read; it models how
    /// the engine gives credit.
    #[derive(Default)]
    struct Peer {
        tunnel: u32,
        streams: u32,
        /// Bytes that it has sent.
        sent: usize,
        /// Bytes that it may still send by the tunnel, as far as it has learned.
        credit: usize,
    }

    impl Peer {
        fn new() -> Self {
            Self {
                tunnel: CONNECTION_WINDOW,
                streams: STREAM_WINDOW,
                sent: 0,
                credit: CONNECTION_WINDOW as usize,
            }
        }

        fn send(&mut self, bytes: usize) {
            self.sent += bytes;
            self.credit -= bytes;
        }

        /// The engine sends new credit when it is at least half of what the peer has.
        fn hear(&mut self) {
            let may = (self.tunnel as usize).saturating_sub(self.sent);
            if may.saturating_sub(self.credit) >= self.credit / 2 {
                self.credit = self.credit.max(may);
            }
        }
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

    #[test]
    fn a_tunnel_ends_for_what_it_brings_and_not_for_what_it_has() {
        let mib = 1 << 20;
        let memory = Memory::new(64 << 20);
        let share = memory.share(&PodMemory::default());
        let [first, second] = [0, 1].map(|_| Undelivered::new(&share));
        first.opened();
        second.opened();
        first.more(20 * mib);
        assert!(!first.is_excess(), "the pod has what it holds");
        second.more(20 * mib);
        assert!(second.is_excess());
        assert!(!first.is_excess(), "it has brought nothing more");
        first.less(mib);
        assert!(!first.is_excess(), "it holds less");
        first.more(1);
        assert!(first.is_excess());
    }

    #[tokio::test]
    async fn what_a_pod_has_no_memory_for_is_granted_when_there_is_some_and_others_get_theirs() {
        let mib = 1 << 20;
        let memory = Memory::new(64 << 20);
        let pods: [PodMemory; 2] = Default::default();
        let tunnel = |pod| {
            let undelivered = Rc::new(Undelivered::new(&memory.share(pod)));
            let windows = Windows::new(&undelivered);
            (undelivered, windows, Peer::new())
        };
        let mut none = Context::from_waker(Waker::noop());
        let (greedy, mut windows, mut peer) = tunnel(&pods[0]);
        greedy.more(40 * mib);
        windows.keep(&mut peer, &mut none);
        assert_eq!((peer.tunnel, peer.streams), (CONNECTION_WINDOW, SMALLEST));

        let (late, mut late_windows, mut late_peer) = tunnel(&pods[0]);
        late.more(5 * mib);
        late_windows.keep(&mut late_peer, &mut none);
        assert_eq!(late_peer.tunnel, CONNECTION_WINDOW, "nothing is left");
        let first = [&greedy, &late].map(|tunnel| tunnel.first_window());
        assert_eq!(first, [STREAM_WINDOW, SMALLEST]);
        late.less(mib);
        late_windows.keep(&mut late_peer, &mut none);
        assert_eq!(late_peer.tunnel, CONNECTION_WINDOW, "less is no grant");

        let (other, mut other_windows, mut other_peer) = tunnel(&pods[1]);
        other.more(5 * mib);
        other_windows.keep(&mut other_peer, &mut none);
        let grown = CONNECTION_WINDOW + (5 << 20);
        assert_eq!(
            (other_peer.tunnel, other_peer.streams),
            (grown, STREAM_WINDOW)
        );

        greedy.less(40 * mib);
        windows.keep(&mut peer, &mut none);
        assert_eq!(memory.held(), 9 * mib);
        // Nothing happens in that tunnel; its driver must be woken all the same.
        let granted = std::future::poll_fn(|context| {
            late_windows.keep(&mut late_peer, context);
            let grown = CONNECTION_WINDOW + (4 << 20);
            match late_peer.tunnel == grown && late_peer.streams == STREAM_WINDOW {
                true => Poll::Ready(()),
                false => Poll::Pending,
            }
        });
        granted.await;
        assert!(late_windows.again.is_none(), "it has what it wants");
        drop((windows, late_windows, other_windows));
        drop((greedy, late, other));
        assert_eq!(memory.held(), 0);
    }

    #[tokio::test]
    async fn who_was_denied_is_woken_when_others_let_go() {
        let memory = Memory::new(64 << 20);
        let share = memory.share(&PodMemory::default());
        let (greedy, denied) = (Hold::new(&share, 0), Rc::new(Undelivered::new(&share)));
        greedy.set(40 << 20);
        denied.more(5 << 20);
        let (mut windows, mut peer) = (Windows::new(&denied), Peer::new());
        let granted = std::future::poll_fn(|context| {
            windows.keep(&mut peer, context);
            match peer.tunnel > CONNECTION_WINDOW {
                true => Poll::Ready(()),
                false => Poll::Pending,
            }
        });
        // This acts as another worker, of which this one knows nothing.
        let released = std::thread::spawn(move || {
            std::thread::sleep(AGAIN * 3);
            drop(greedy);
        });
        tokio::select! {
            biased;
            () = sleep(AGAIN * 100) => panic!("nobody has woken it"),
            () = granted => {}
        }
        released.join().expect("released");
    }

    proptest! {
        #[test]
        fn no_stream_waits_for_another_and_what_a_tunnel_holds_is_bounded(
            turns in proptest::collection::vec((0..200_usize, 1..1_000_000_usize), 1..2000),
            // `None`: it never learns, or does not want to.
            late in proptest::option::of(0..16_usize),
        ) {
            let undelivered = Rc::new(Undelivered::new(&Share::default()));
            let mut windows = Windows::new(&undelivered);
            let mut peer = Peer::new();
            // Windows that the peer learns of some turns later.
            let mut heard = std::collections::VecDeque::from(vec![STREAM_WINDOW; late.unwrap_or(0)]);
            let mut sent = vec![0; 200];
            for (stream, bytes) in turns {
                heard.push_back(peer.streams);
                let learned = heard.pop_front().unwrap_or(peer.streams);
                let window = late.map_or(STREAM_WINDOW, |_| learned) as usize;
                let mut may = window.saturating_sub(sent[stream]).min(bytes);
                match late {
                    Some(_) => prop_assert!(may <= peer.credit, "a stream waits for the tunnel"),
                    None => may = may.min(peer.credit),
                }
                sent[stream] += may;
                peer.send(may);
                undelivered.more(may);
                windows.keep(&mut peer, &mut Context::from_waker(Waker::noop()));
                peer.hear();
                prop_assert!(undelivered.bytes.get() <= MOST as usize);
            }
        }

        /// Their peers heed no window but that of the tunnel, and come again when they are sent away.
        #[test]
        fn what_all_tunnels_hold_is_bounded_whatever_their_peers_heed(
            turns in proptest::collection::vec((0..40_usize, 1..2_000_000_usize), 1..600),
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
            let runtime = runtime.expect("a runtime");
            let _timers = runtime.enter();
            let most = 64 << 20;
            let memory = Memory::new(most);
            let pods: [PodMemory; 8] = Default::default();
            let begin = |number: usize| {
                let undelivered = Rc::new(Undelivered::new(&memory.share(&pods[number % 8])));
                undelivered.opened();
                let windows = Windows::new(&undelivered);
                (undelivered, windows, Peer::new())
            };
            let mut tunnels: Vec<_> = (0..40).map(begin).collect();
            for (number, bytes) in turns {
                let tunnel = &mut tunnels[number];
                if tunnel.0.is_excess() {
                    *tunnel = begin(number);
                    continue;
                }
                let (undelivered, windows, peer) = tunnel;
                let may = bytes.min(peer.credit);
                peer.send(may);
                undelivered.more(may);
                windows.keep(peer, &mut Context::from_waker(Waker::noop()));
                peer.hear();
                // The last turn may bring it above its bound.
                prop_assert!(memory.held() <= most as usize * 9 / 8 + 2_000_000);
            }
        }
    }
}

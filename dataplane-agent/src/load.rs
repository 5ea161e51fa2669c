//! The load of a worker, by which connections are handed to less loaded ones.
//!
//! A worker's load is how much of the last interval it was busy, in thousandths, and [`BUSY`] for each
//! connection that it has begun since and that has not ended: of these it is not known yet. So two that
//! come at once are two workers', one that ends at once weighs nothing afterwards, and however many
//! idle ones there are, they weigh nothing.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::runtime::RuntimeMetrics;

/// The load of a worker that is never idle.
pub const BUSY: u32 = 1000;

/// The shortest interval. How busy a worker was in less time is chance.
const INTERVAL: Duration = Duration::from_millis(100);
/// The longest interval that is prolonged because something has begun in it too lately to be measured.
const LONGEST: Duration = Duration::from_secs(1);

/// The load of one worker. Clones share it. Reading it never blocks.
#[derive(Clone, Debug)]
pub struct Load(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    worker: RuntimeMetrics,
    made: Instant,
    interval: Interval,
}

/// The current interval.
#[derive(Debug, Default)]
struct Interval {
    /// Who has this locked ends the interval before.
    start: Mutex<Start>,
    /// The time at which something was last begun, in microseconds.
    last: AtomicU64,
    /// The worker's load in the interval before, in thousandths.
    busy: AtomicU32,
    /// The interval's number in the upper half; the number of things that were begun in it and have not ended in the
    /// lower.
    begun: AtomicU64,
}

/// The start of an interval.
#[derive(Debug, Default)]
struct Start {
    at: Duration,
    /// The worker's total busy time until then.
    busy: Duration,
}

/// A task, such as a connection or a tunnel, that a worker has begun; it has ended when this is dropped.
#[derive(Debug)]
pub struct Begun {
    load: Load,
    interval: u32,
}

impl Load {
    /// Returns the load of the worker with this runtime.
    pub fn of(worker: RuntimeMetrics) -> Self {
        Self(Arc::new(Inner {
            worker,
            made: Instant::now(),
            interval: Interval::default(),
        }))
    }

    /// Returns the load, in thousandths.
    pub fn now(&self) -> u32 {
        let interval = &self.0.interval;
        interval.next(self.0.made.elapsed(), || self.busy());
        interval.load()
    }

    /// Returns the worker's total busy time.
    pub fn busy(&self) -> Duration {
        self.0.worker.worker_total_busy_duration(0)
    }

    /// Counts something that begins. It weighs [`BUSY`] until the interval or it ends.
    pub fn begin(&self) -> Begun {
        Begun {
            load: self.clone(),
            interval: self.0.interval.begin(self.0.made.elapsed()),
        }
    }
}

impl Interval {
    /// Ends the interval if it has lasted long enough. Of threads that call this at once, one does so.
    fn next(&self, now: Duration, busy: impl FnOnce() -> Duration) {
        let Ok(mut start) = self.start.try_lock() else {
            return;
        };
        let length = now.saturating_sub(start.at);
        let last = Duration::from_micros(self.last.load(Ordering::Relaxed));
        let is_known = now.saturating_sub(last) >= INTERVAL || length >= LONGEST;
        if length < INTERVAL || !is_known {
            return;
        }
        let busy = busy();
        let part = micros(busy.saturating_sub(start.busy));
        let part = part.saturating_mul(u64::from(BUSY)) / micros(length);
        let part = u32::try_from(part).map_or(BUSY, |part| part.min(BUSY));
        *start = Start { at: now, busy };
        self.busy.store(part, Ordering::Relaxed);
        self.change(|number, _| Some((number.wrapping_add(1), 0)));
    }

    fn load(&self) -> u32 {
        let (_, begun) = parts(self.begun.load(Ordering::Relaxed));
        let busy = self.busy.load(Ordering::Relaxed);
        busy.saturating_add(begun.saturating_mul(BUSY))
    }

    /// Counts one more, and returns the number of the interval.
    fn begin(&self, now: Duration) -> u32 {
        self.last.store(micros(now), Ordering::Relaxed);
        parts(self.begun.fetch_add(1, Ordering::Relaxed)).0
    }

    /// Counts one less, if `interval` is still the current one.
    fn end(&self, interval: u32) {
        self.change(|number, begun| (number == interval).then(|| (number, begun - 1)));
    }

    fn change(&self, to: impl Fn(u32, u32) -> Option<(u32, u32)>) {
        let change = |both| {
            let (number, begun) = parts(both);
            to(number, begun).map(|(number, begun)| u64::from(number) << 32 | u64::from(begun))
        };
        // An error says that there is nothing to change.
        let _ = (self.begun).fetch_update(Ordering::Relaxed, Ordering::Relaxed, change);
    }
}

#[expect(clippy::cast_possible_truncation, reason = "it is what is meant")]
fn parts(both: u64) -> (u32, u32) {
    ((both >> 32) as u32, both as u32)
}

/// Enough for half a million years.
fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

impl Drop for Begun {
    fn drop(&mut self) {
        self.load.0.interval.end(self.interval);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    #[test]
    fn a_worker_weighs_by_what_it_did_and_not_by_what_it_holds() {
        let of = Interval::default();
        for _ in 0..500 {
            of.begin(after(0));
        }
        assert_eq!(of.load(), 500 * BUSY, "it is not known yet what they are");
        of.next(after(1000), || after(5));
        assert_eq!(of.load(), 5, "they are idle");
        of.next(after(3000), || after(1005));
        assert_eq!(of.load(), BUSY / 2);
        of.next(after(4000), || after(9000));
        assert_eq!(of.load(), BUSY);
    }

    #[test]
    fn a_moment_is_no_interval() {
        let of = Interval::default();
        of.begin(after(0));
        of.next(after(99), || panic!("not asked"));
        assert_eq!(of.load(), BUSY);
    }

    #[test]
    fn what_has_just_begun_is_not_forgotten_as_an_interval_ends() {
        let of = Interval::default();
        of.begin(after(97));
        of.next(after(101), || after(4));
        assert_eq!(of.load(), BUSY, "it is not known yet what it is");
        of.next(after(197), || after(100));
        assert_eq!(of.load(), 100 * BUSY / 197);
        // However much is begun, what is idle weighs nothing in the end.
        for time in 198..1197 {
            of.begin(after(time));
            of.next(after(time), || panic!("not asked"));
        }
        of.next(after(1197), || after(100));
        assert_eq!(of.load(), 0);
    }

    #[test]
    fn what_ends_weighs_no_more_and_is_not_taken_off_twice() {
        let of = Interval::default();
        let (first, second) = (of.begin(after(0)), of.begin(after(0)));
        of.end(first);
        assert_eq!(of.load(), BUSY);
        of.next(INTERVAL, || Duration::ZERO);
        of.end(second);
        assert_eq!(of.load(), 0);
    }

    #[test]
    fn what_many_begin_and_end_at_once_is_counted_right() {
        let of = Interval::default();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for number in 0..20_000 {
                        let begun = of.begin(after(number));
                        of.next(after(number), || after(number) / 2);
                        of.end(begun);
                    }
                });
            }
        });
        assert!(of.load() <= BUSY / 2 + 1, "{of:?}");
        assert_eq!(parts(of.begun.into_inner()).1, 0);
    }
}

//! How much a worker has to do, for those that hand connections on.
//!
//! A worker's load is how much of the last interval it was busy, in thousandths, and [`BUSY`] for each
//! connection that it has begun since and that has not ended: of these it is not known yet. So two that
//! come at once are two workers', one that ends at once weighs nothing afterwards, and however many
//! idle ones there are, they weigh nothing.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::runtime::RuntimeMetrics;

/// The load of a worker that is never idle.
pub const BUSY: u32 = 1000;

/// A shorter time than this is no interval: chance decides how busy it was.
const INTERVAL: Duration = Duration::from_millis(100);

/// The load of one worker. Clones are the same one.
#[derive(Clone, Debug)]
pub struct Load(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    worker: RuntimeMetrics,
    interval: Mutex<Interval>,
}

#[derive(Debug)]
struct Interval {
    /// When it began, and how long the worker had been busy by then.
    began: (Instant, Duration),
    /// Counts intervals.
    number: u64,
    /// How busy the worker was in the one before.
    busy: u32,
    /// What was begun in this one and has not ended.
    begun: u32,
}

/// What a worker has begun: a connection, or a tunnel.
#[derive(Debug)]
pub struct Begun {
    load: Load,
    interval: u64,
}

impl Load {
    /// Of the worker whose runtime it is.
    pub fn of(worker: RuntimeMetrics) -> Self {
        let began = (Instant::now(), Duration::ZERO);
        Self(Arc::new(Inner {
            worker,
            interval: Mutex::new(Interval {
                began,
                number: 0,
                busy: 0,
                begun: 0,
            }),
        }))
    }

    /// The load.
    pub fn now(&self) -> u32 {
        let mut interval = self.lock();
        interval.next(Instant::now(), || self.busy());
        interval.load()
    }

    /// How long the worker has been busy, in all.
    pub fn busy(&self) -> Duration {
        self.0.worker.worker_total_busy_duration(0)
    }

    /// Something is begun; it weighs until the next look, or its end.
    pub fn begin(&self) -> Begun {
        let mut interval = self.lock();
        interval.begun += 1;
        Begun {
            load: self.clone(),
            interval: interval.number,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Interval> {
        let interval = self.0.interval.lock();
        interval.unwrap_or_else(PoisonError::into_inner)
    }
}

impl Interval {
    fn next(&mut self, now: Instant, busy: impl FnOnce() -> Duration) {
        let (began, before) = self.began;
        let length = now.saturating_duration_since(began);
        if length < INTERVAL {
            return;
        }
        let busy = busy();
        let part = busy.saturating_sub(before).as_micros() * u128::from(BUSY) / length.as_micros();
        *self = Self {
            began: (now, busy),
            number: self.number + 1,
            busy: u32::try_from(part).map_or(BUSY, |part| part.min(BUSY)),
            begun: 0,
        };
    }

    fn load(&self) -> u32 {
        self.busy.saturating_add(self.begun.saturating_mul(BUSY))
    }
}

impl Drop for Begun {
    fn drop(&mut self) {
        let mut interval = self.load.lock();
        if interval.number == self.interval {
            interval.begun -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interval(start: Instant) -> Interval {
        Interval {
            began: (start, Duration::ZERO),
            number: 0,
            busy: 0,
            begun: 0,
        }
    }

    #[test]
    fn a_worker_weighs_by_what_it_did_and_not_by_what_it_holds() {
        let start = Instant::now();
        let mut of = interval(start);
        of.begun = 500;
        assert_eq!(of.load(), 500 * BUSY, "it is not known yet what they are");
        of.next(start + Duration::from_secs(1), || Duration::from_millis(5));
        assert_eq!(of.load(), 5, "they are idle");
        of.next(start + Duration::from_secs(3), || {
            Duration::from_millis(1005)
        });
        assert_eq!(of.load(), BUSY / 2);
        of.next(start + Duration::from_secs(4), || Duration::from_secs(9));
        assert_eq!(of.load(), BUSY);
    }

    #[test]
    fn a_moment_is_no_interval() {
        let start = Instant::now();
        let mut of = interval(start);
        of.begun = 1;
        of.next(start + Duration::from_millis(99), || panic!("not asked"));
        assert_eq!(of.load(), BUSY);
    }

    #[test]
    fn what_ends_weighs_no_more_and_is_not_taken_off_twice() {
        let runtime = tokio::runtime::Builder::new_current_thread().build();
        let load = Load::of(runtime.expect("a runtime").metrics());
        let (first, second) = (load.begin(), load.begin());
        drop(first);
        assert_eq!(load.lock().begun, 1);
        load.lock()
            .next(Instant::now() + INTERVAL, || Duration::ZERO);
        drop(second);
        assert_eq!(load.lock().begun, 0);
    }
}

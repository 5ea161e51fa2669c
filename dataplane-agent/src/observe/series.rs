//! Metric series: the counts of connections with the same labels.
//!
//! A connection holds its series until it ends, and counts its bytes there as they move. A series that nobody
//! holds and that was not used for [`UNUSED_TTL`] is removed, so that series of workloads that are gone do not
//! stay for ever. There are at most [`MAX_SERIES`]; further connections are counted in a series whose labels
//! are [`OVERFLOW`].

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::Flag;
use super::labels::Labels;

/// Most series at once, besides those of the overflow.
pub const MAX_SERIES: usize = 8192;
/// How long an unused series is kept: a reader that scrapes once a minute has seen its last counts by then.
pub const UNUSED_TTL: Duration = Duration::from_secs(300);
/// The value of the labels of an overflow series.
pub const OVERFLOW: &str = "overflow";

/// The counts of connections with the same labels.
#[derive(Debug)]
pub struct Series {
    labels: Labels,
    opened: AtomicU64,
    /// Connections that ended: those without a failure, then one element per flag.
    ended: [AtomicU64; 1 + Flag::ALL.len()],
    up: AtomicU64,
    down: AtomicU64,
}

/// The counts of a series at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Connections opened.
    pub opened: u64,
    /// Connections that ended: those without a failure, then one element per flag.
    pub ended: [u64; 1 + Flag::ALL.len()],
    /// Bytes from clients to servers.
    pub up: u64,
    /// Bytes from servers to clients.
    pub down: u64,
}

impl Series {
    fn new(labels: Labels) -> Self {
        Self {
            labels,
            opened: AtomicU64::default(),
            ended: Default::default(),
            up: AtomicU64::default(),
            down: AtomicU64::default(),
        }
    }

    /// Counts a connection that is opened.
    pub fn open(&self) {
        self.opened.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts bytes from the client to the server.
    pub fn add_up(&self, bytes: u64) {
        self.up.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Counts bytes from the server to the client.
    pub fn add_down(&self, bytes: u64) {
        self.down.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Counts a connection that ended; `flag` says how it failed.
    pub fn end(&self, flag: Option<Flag>) {
        self.ended[flag.map_or(0, |flag| 1 + flag as usize)].fetch_add(1, Ordering::Relaxed);
    }

    /// Returns the labels of the connections that are counted here.
    pub fn labels(&self) -> &Labels {
        &self.labels
    }

    /// Returns its counts so far.
    pub fn counts(&self) -> Counts {
        let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Counts {
            opened: of(&self.opened),
            ended: std::array::from_fn(|how| of(&self.ended[how])),
            up: of(&self.up),
            down: of(&self.down),
        }
    }
}

/// All series.
#[derive(Debug)]
pub struct AllSeries {
    most: usize,
    by_labels: Mutex<HashMap<Labels, Entry>>,
}

#[derive(Debug)]
struct Entry {
    series: Arc<Series>,
    used: Instant,
}

impl AllSeries {
    /// Returns an empty set that holds at most `most` series, besides those of the overflow.
    pub fn new(most: usize) -> Self {
        Self {
            most,
            by_labels: Mutex::default(),
        }
    }

    /// Returns the series with these labels, or that of the overflow if there are too many.
    pub fn of(&self, labels: Labels) -> Arc<Series> {
        let now = Instant::now();
        let mut all = self.lock();
        if let Some(entry) = all.get_mut(&labels) {
            entry.used = now;
            return Arc::clone(&entry.series);
        }
        let labels = match all.len() < self.most {
            true => labels,
            false => labels.overflow(),
        };
        let entry = all.entry(labels.clone()).or_insert_with(|| Entry {
            series: Arc::new(Series::new(labels)),
            used: now,
        });
        entry.used = now;
        Arc::clone(&entry.series)
    }

    /// Removes and returns the series that were not used for [`UNUSED_TTL`].
    pub fn expire(&self, now: Instant) -> Vec<Arc<Series>> {
        let mut gone = Vec::new();
        self.lock().retain(|_, entry| {
            // A series that nobody holds can only be taken up again under this lock.
            if Arc::strong_count(&entry.series) > 1 {
                entry.used = now;
            }
            let stays = now.saturating_duration_since(entry.used) < UNUSED_TTL;
            if !stays {
                gone.push(Arc::clone(&entry.series));
            }
            stays
        });
        gone
    }

    /// Returns all series.
    pub fn list(&self) -> Vec<Arc<Series>> {
        let all = self.lock();
        all.values()
            .map(|entry| Arc::clone(&entry.series))
            .collect()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Labels, Entry>> {
        self.by_labels
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::ConnectionInfo;
    use super::super::record::tests::connection_info;
    use super::*;

    fn labels(number: usize) -> Labels {
        let workload = crate::mesh::workload::Workload {
            workload_name: format!("w{number}").into(),
            ..crate::mesh::workload::tests::workload(&[])
        };
        Labels::of(&ConnectionInfo {
            source: Some(Arc::new(workload)),
            ..connection_info()
        })
    }

    fn sum(series: impl IntoIterator<Item = Arc<Series>>) -> Counts {
        series
            .into_iter()
            .fold(Counts::default(), |mut sum, series| {
                let counts = series.counts();
                sum.opened += counts.opened;
                (0..sum.ended.len()).for_each(|how| sum.ended[how] += counts.ended[how]);
                sum.up += counts.up;
                sum.down += counts.down;
                sum
            })
    }

    #[test]
    fn a_series_is_kept_while_a_connection_is_open_and_for_some_minutes_after() {
        let all = AllSeries::new(MAX_SERIES);
        let held = all.of(labels(1));
        drop(all.of(labels(2)));
        let start = Instant::now();
        assert!(all.expire(start + UNUSED_TTL / 2).is_empty());
        assert_eq!(
            all.expire(start + 2 * UNUSED_TTL).len(),
            1,
            "the one that nobody holds"
        );
        drop(held);
        assert!(
            all.expire(start + 2 * UNUSED_TTL + UNUSED_TTL / 2)
                .is_empty()
        );
        assert_eq!(all.expire(start + 3 * UNUSED_TTL).len(), 1);
        assert!(all.list().is_empty());
    }

    #[test]
    fn there_are_not_more_than_may_be_and_the_others_are_counted_together() {
        let all = AllSeries::new(10);
        for number in 0..1000 {
            all.of(labels(number)).open();
        }
        let list = all.list();
        assert_eq!(list.len(), 11);
        let overflow = list.iter().find(|series| series.counts().opened == 990);
        let text = format!("{:?}", overflow.expect("one of all others").labels());
        assert!(text.contains(OVERFLOW) && !text.contains("ns"), "{text}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]
        /// No count is lost when connections of several workers open, move bytes and end while series
        /// are removed.
        #[test]
        fn sums_are_conserved(
            plans in proptest::collection::vec(
                proptest::collection::vec((0_usize..6, 0_u64..1000, 0_u64..1000, 0_usize..7), 1..200),
                2..4,
            )
        ) {
            let all = AllSeries::new(4);
            let gone = std::thread::scope(|scope| {
                let workers: Vec<_> = plans.iter().map(|plan| { let all = &all; scope.spawn(move || {
                    for (number, up, down, how) in plan {
                        let series = all.of(labels(*number));
                        series.open();
                        series.add_up(*up);
                        std::thread::yield_now();
                        series.add_down(*down);
                        series.end(how.checked_sub(1).map(|flag| Flag::ALL[flag]));
                    }
                })}).collect();
                let mut gone = Vec::new();
                while !workers.iter().all(|worker| worker.is_finished()) {
                    gone.extend(all.expire(Instant::now() + 2 * UNUSED_TTL));
                }
                gone
            });
            let steps: Vec<_> = plans.iter().flatten().collect();
            let mut expected = Counts { opened: steps.len() as u64, ..Counts::default() };
            for (_, up, down, how) in steps {
                expected.up += up;
                expected.down += down;
                expected.ended[*how] += 1;
            }
            prop_assert_eq!(sum(gone.into_iter().chain(all.list())), expected);
        }
    }
}

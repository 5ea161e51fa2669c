//! Decides when to look at the machine next. Pure.
//!
//! An event is followed by a look soon, and by more at growing distances, since a process is in its cgroup some
//! time before it is in its network namespace: what follows an event after some time is found within the same
//! time again. Without events, a look now and then finds what was not reported.

use std::time::{Duration, Instant};

/// Time from an event until the look at it. Events within this time count as one.
const DEBOUNCE: Duration = Duration::from_millis(50);
/// Time between looks if events are not available, or if something must be seen again; also the shortest
/// average time between looks, however many events there are.
pub(super) const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// The longest time between looks while a pod that may be here is waited for.
pub(super) const WAITING_INTERVAL: Duration = Duration::from_secs(2);
/// The longest time between looks.
pub(super) const IDLE_INTERVAL: Duration = Duration::from_secs(5);
/// Number of looks that may follow each other sooner than that, saved up in quiet times.
const MAX_SAVED_SCANS: u32 = 16;

/// The schedule of looks.
#[derive(Debug)]
pub(super) struct ScanSchedule {
    next: Instant,
    /// Time of the last event.
    event: Instant,
    last: Instant,
    /// Time saved up at the last look; each look costs [`POLL_INTERVAL`].
    saved: Duration,
}

impl ScanSchedule {
    /// Creates a schedule whose first look is due at once.
    pub(super) fn new(now: Instant) -> Self {
        Self {
            next: now,
            event: now,
            last: now,
            saved: MAX_SAVED_SCANS * POLL_INTERVAL,
        }
    }

    pub(super) fn next(&self) -> Instant {
        self.next
    }

    /// Records an event.
    pub(super) fn happened(&mut self, now: Instant) {
        self.event = now;
        self.next = self.next.min(self.affordable(now + DEBOUNCE));
    }

    /// Records a look. `longest`: the longest time until the next one.
    pub(super) fn scanned(&mut self, now: Instant, longest: Duration) {
        self.saved = (self.saved + (now - self.last)).min(MAX_SAVED_SCANS * POLL_INTERVAL);
        self.saved = self.saved.saturating_sub(POLL_INTERVAL);
        self.last = now;
        // Wait as long again as since the event, however many looks there were.
        let gap = (now - self.event).max(DEBOUNCE).min(longest);
        self.next = self.affordable(now + gap);
    }

    /// Returns `at`, or the later time at which a look is saved up; that is never later than [`POLL_INTERVAL`]
    /// after the last look.
    fn affordable(&self, at: Instant) -> Instant {
        at.max(self.last + POLL_INTERVAL.saturating_sub(self.saved))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    /// Returns the times of looks, in milliseconds, if events happen at these times. `asked`: looks for other
    /// reasons, such as a change of the configuration.
    fn looks(happens: &[u64], asked: &[u64], longest: Duration, until: u64) -> Vec<u64> {
        let begin = Instant::now();
        let (mut due, mut looks) = (ScanSchedule::new(begin), Vec::new());
        let happens: BTreeSet<u64> = happens.iter().copied().collect();
        let asked: BTreeSet<u64> = asked.iter().copied().collect();
        let mut at = 0;
        while at < until {
            let now = begin + Duration::from_millis(at);
            if happens.contains(&at) {
                due.happened(now);
            }
            if due.next() <= now || asked.contains(&at) {
                due.scanned(now, longest);
                looks.push(at);
            }
            let next = [&happens, &asked].map(|of| of.range(at + 1..).next().copied());
            let next = next.into_iter().flatten().min();
            at = millis(due.next() - begin).min(next.unwrap_or(until));
        }
        looks
    }

    fn millis(of: Duration) -> u64 {
        u64::try_from(of.as_millis()).expect("a short time")
    }

    #[test]
    fn what_happens_is_looked_at_soon_and_then_less_and_less_often() {
        let looks = looks(&[20_000], &[20_060, 20_070, 20_080], IDLE_INTERVAL, 40_000);
        let after: Vec<u64> = looks.iter().filter(|at| **at >= 20_000).copied().collect();
        let asked = [20_060, 20_070, 20_080];
        let by_itself = [
            20_050, 20_160, 20_320, 20_640, 21_280, 22_560, 25_120, 30_120, 35_120,
        ];
        assert_eq!(
            BTreeSet::from_iter(after),
            asked.into_iter().chain(by_itself).collect()
        );
    }

    #[test]
    fn what_is_to_be_seen_again_is_looked_at_each_second() {
        let looks = looks(&[], &[], POLL_INTERVAL, 60_000);
        assert!(looks.len() >= 60, "{looks:?}");
    }

    fn times(most: usize) -> impl Strategy<Value = Vec<u64>> {
        proptest::collection::vec(0..30_000u64, 0..most)
    }

    proptest! {
        #[test]
        fn no_event_waits_for_longer_than_a_regular_look_would_let_it(
            happens in times(300), asked in times(100), longest in 0..3usize
        ) {
            let longest = [POLL_INTERVAL, WAITING_INTERVAL, IDLE_INTERVAL][longest];
            let looks = looks(&happens, &asked, longest, 40_000);
            for at in happens {
                let next = looks.iter().find(|scan| **scan >= at).expect("a look");
                prop_assert!(next - at <= millis(POLL_INTERVAL), "{at}: {looks:?}");
            }
            for pair in looks.windows(2) {
                prop_assert!(pair[1] - pair[0] <= millis(longest), "{pair:?}");
            }
        }

        #[test]
        fn an_event_after_quiet_times_is_looked_at_soon(happens in 20_000..30_000u64) {
            let looks = looks(&[happens], &[], IDLE_INTERVAL, 40_000);
            let next = looks.iter().find(|scan| **scan >= happens).expect("a look");
            prop_assert!(next - happens <= millis(DEBOUNCE));
        }

        #[test]
        fn what_follows_an_event_is_found_within_as_much_time_again(
            happens in 20_000..25_000u64, later in 0..15_000u64, asked in times(6)
        ) {
            let looks = looks(&[happens], &asked, IDLE_INTERVAL, 60_000);
            let next = looks.iter().find(|scan| **scan >= happens + later).expect("a look");
            let late = next - happens - later;
            prop_assert!(late <= later.max(millis(DEBOUNCE)).min(millis(IDLE_INTERVAL)), "{late}");
        }

        #[test]
        fn however_much_happens_there_is_a_look_a_second_in_the_long_run(
            happens in times(2_000), longest in 0..3usize, from in 0..30_000u64, span in 0..30_000u64
        ) {
            let longest = [POLL_INTERVAL, WAITING_INTERVAL, IDLE_INTERVAL][longest];
            let looks = looks(&happens, &[], longest, 60_000);
            let within = looks.iter().filter(|at| (from..from + span).contains(at)).count();
            let most = u64::from(MAX_SAVED_SCANS) + span / millis(POLL_INTERVAL) + 1;
            prop_assert!(within as u64 <= most, "{within}, of {most}");
        }
    }
}

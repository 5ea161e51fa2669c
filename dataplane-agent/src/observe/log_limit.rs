//! A rate limit for log lines: a few events of a kind are logged each second, and the others counted. So a
//! peer, or a lasting shortage, that repeats an event cannot fill the log.

use std::collections::HashMap;
use std::hash::Hash;
use std::mem;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The interval that limits apply to.
const INTERVAL: Duration = Duration::from_secs(1);
/// Most kinds that are remembered.
const MAX_KINDS: usize = 4096;

/// Limits the log lines of each kind `K` of event, and of each group `G` of kinds. A peer that makes up kinds
/// uses up the limit of its own group only.
#[derive(Debug)]
pub struct LogLimiter<G, K> {
    /// The most lines of a kind, and of a group, in an interval.
    limits: (u32, u32),
    all: Mutex<Tallies<G, K>>,
}

#[derive(Debug)]
struct Tallies<G, K> {
    groups: HashMap<G, Tally>,
    kinds: HashMap<(G, K), Tally>,
}

#[derive(Debug)]
struct Tally {
    since: Instant,
    logged: u32,
    suppressed: u64,
}

impl Tally {
    /// Begins a new interval if the last one is over; returns `true` if one more may be logged in it.
    fn may_log(&mut self, now: Instant, limit: u32) -> bool {
        if now >= self.since + INTERVAL {
            (self.since, self.logged) = (now, 0);
        }
        self.logged < limit
    }
}

impl<G: Clone + Eq + Hash, K: Eq + Hash> LogLimiter<G, K> {
    /// Returns a limiter that admits this many events of each kind, and of each group, per second.
    pub fn new(of_kind: u32, of_group: u32) -> Self {
        Self {
            limits: (of_kind, of_group),
            all: Mutex::new(Tallies {
                groups: HashMap::new(),
                kinds: HashMap::new(),
            }),
        }
    }

    /// Counts an event. If it is to be logged, returns the number of events that the line stands for: those of
    /// its kind since its last line, and those of forgotten kinds of its group.
    pub fn admit(&self, group: G, kind: K) -> Option<u64> {
        self.admit_at(group, kind, Instant::now())
    }

    fn admit_at(&self, group: G, kind: K, now: Instant) -> Option<u64> {
        let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        let Tallies { groups, kinds } = &mut *all;
        let none = || Tally {
            since: now,
            logged: 0,
            suppressed: 0,
        };
        let kind = (group.clone(), kind);
        if !kinds.contains_key(&kind) && kinds.len() >= MAX_KINDS {
            forget(groups, kinds, now);
        }
        let group = groups.entry(group).or_insert_with(none);
        let kind = kinds.entry(kind).or_insert_with(none);
        kind.suppressed += 1;
        if !kind.may_log(now, self.limits.0) || !group.may_log(now, self.limits.1) {
            return None;
        }
        kind.logged += 1;
        group.logged += 1;
        Some(mem::take(&mut kind.suppressed) + mem::take(&mut group.suppressed))
    }
}

/// Makes room for another kind. Suppressed events of a forgotten kind are added to its group; if there are
/// many groups, those without suppressed events are forgotten too.
fn forget<G: Clone + Eq + Hash, K: Eq + Hash>(
    groups: &mut HashMap<G, Tally>,
    kinds: &mut HashMap<(G, K), Tally>,
    now: Instant,
) {
    let over = |told: &Tally| now >= told.since + INTERVAL;
    let all = !kinds.values().any(over);
    for ((group, _), told) in kinds.extract_if(|_, told| all || over(told)) {
        let group = groups.entry(group).or_insert(Tally {
            logged: 0,
            suppressed: 0,
            ..told
        });
        group.suppressed += told.suppressed;
    }
    if groups.len() >= MAX_KINDS {
        groups.retain(|_, told| told.suppressed > 0 || !over(told));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_of_a_kind_a_second_is_told_with_how_many() {
        let (limiter, start) = (LogLimiter::new(1, u32::MAX), Instant::now());
        let at = |kind, milliseconds| {
            limiter.admit_at((), kind, start + Duration::from_millis(milliseconds))
        };
        assert_eq!(at("one", 0), Some(1));
        assert_eq!(at("one", 1), None);
        assert_eq!(at("other", 1), Some(1));
        assert_eq!(at("one", 999), None);
        assert_eq!(at("one", 1000), Some(3));
        assert_eq!(at("one", 1001), None);
    }

    #[test]
    fn some_of_a_kind_are_told_where_they_may_differ() {
        let (limiter, start) = (LogLimiter::new(3, u32::MAX), Instant::now());
        let told = |seconds| {
            let at = start + Duration::from_secs(seconds);
            let all = (0..10).map(|_| limiter.admit_at((), "one", at));
            all.flatten().collect::<Vec<_>>()
        };
        assert_eq!(told(0), [1, 1, 1]);
        assert_eq!(told(1), [8, 1, 1]);
    }

    #[test]
    fn who_makes_up_kinds_is_told_of_no_more_often_and_takes_nothing_from_others() {
        let (limiter, now) = (LogLimiter::new(10, 100), Instant::now());
        let told = (0..3 * MAX_KINDS).filter_map(|kind| limiter.admit_at("flooded", kind, now));
        assert_eq!(told.count(), 100);
        assert_eq!(limiter.admit_at("another", 0, now), Some(1));
    }

    #[test]
    fn however_many_kinds_there_are_each_event_is_told_of_or_counted() {
        let (limiter, start) = (LogLimiter::new(2, 100), Instant::now());
        let (mut all, mut told) = (0, 0);
        for second in 0..4 {
            for kind in (0..3 * MAX_KINDS).flat_map(|kind| [kind; 3]) {
                all += 1;
                let at = start + Duration::from_secs(second);
                told += limiter.admit_at("flooded", kind, at).unwrap_or_default();
            }
        }
        let inside = limiter.all.lock().expect("not poisoned");
        let waiting = inside.kinds.values().chain(inside.groups.values());
        assert_eq!(told + waiting.map(|told| told.suppressed).sum::<u64>(), all);
        assert!(told > all / 2, "{told} of {all}");
    }

    #[test]
    fn the_kinds_that_are_remembered_are_bounded() {
        let (limiter, now) = (LogLimiter::new(1, u32::MAX), Instant::now());
        for kind in 0..3 * MAX_KINDS {
            assert_eq!(
                limiter.admit_at(kind, kind, now + INTERVAL * kind as u32),
                Some(1)
            );
        }
        let inside = limiter.all.lock().expect("not poisoned");
        assert!(inside.kinds.len() <= MAX_KINDS && inside.groups.len() <= MAX_KINDS);
    }
}

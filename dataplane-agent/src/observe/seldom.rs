//! Lets through a few events of a kind each second and counts the others: what a peer, or a lack that
//! lasts, can repeat must not fill the log.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// For how long those of a kind are counted together.
const WHILE: Duration = Duration::from_secs(1);
/// How many kinds are remembered.
const KINDS: usize = 4096;

/// What was told of each kind, and how many have come since that were not.
#[derive(Debug)]
pub struct Seldom<K> {
    each: u32,
    kinds: Mutex<HashMap<K, Told>>,
}

#[derive(Debug)]
struct Told {
    since: Instant,
    told: u32,
    untold: u64,
}

impl<K: Eq + Hash> Seldom<K> {
    /// Lets through so many of each kind, each second.
    pub fn new(each: u32) -> Self {
        Self {
            each,
            kinds: Mutex::default(),
        }
    }

    /// Notes one. If it is to be told of: how many there were of its kind since that was done last.
    pub fn times(&self, kind: K) -> Option<u64> {
        self.times_at(kind, Instant::now())
    }

    fn times_at(&self, kind: K, now: Instant) -> Option<u64> {
        let mut kinds = self.kinds.lock().unwrap_or_else(PoisonError::into_inner);
        if !kinds.contains_key(&kind) && kinds.len() >= KINDS {
            kinds.retain(|_, told| now < told.since + WHILE);
            if kinds.len() >= KINDS {
                kinds.clear();
            }
        }
        let told = kinds.entry(kind).or_insert(Told {
            since: now,
            told: 0,
            untold: 0,
        });
        told.untold += 1;
        if now >= told.since + WHILE {
            (told.since, told.told) = (now, 0);
        }
        if told.told == self.each {
            return None;
        }
        told.told += 1;
        Some(std::mem::take(&mut told.untold))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_of_a_kind_a_second_is_told_with_how_many() {
        let (seldom, start) = (Seldom::new(1), Instant::now());
        let at =
            |kind, milliseconds| seldom.times_at(kind, start + Duration::from_millis(milliseconds));
        assert_eq!(at("one", 0), Some(1));
        assert_eq!(at("one", 1), None);
        assert_eq!(at("other", 1), Some(1));
        assert_eq!(at("one", 999), None);
        assert_eq!(at("one", 1000), Some(3));
        assert_eq!(at("one", 1001), None);
    }

    #[test]
    fn some_of_a_kind_are_told_where_they_may_differ() {
        let (seldom, start) = (Seldom::new(3), Instant::now());
        let told = |seconds| {
            let at = start + Duration::from_secs(seconds);
            let all = (0..10).map(|_| seldom.times_at("one", at));
            all.flatten().collect::<Vec<_>>()
        };
        assert_eq!(told(0), [1, 1, 1]);
        assert_eq!(told(1), [8, 1, 1]);
    }

    #[test]
    fn the_kinds_that_are_remembered_are_bounded() {
        let (seldom, now) = (Seldom::new(1), Instant::now());
        for kind in 0..3 * KINDS {
            assert_eq!(seldom.times_at(kind, now), Some(1));
        }
        assert!(seldom.kinds.lock().expect("not poisoned").len() <= KINDS);
    }
}

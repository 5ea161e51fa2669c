//! Lets through one event of a kind each second and counts the others: what a peer, or a lack that
//! lasts, can repeat must not fill the log.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How often one kind is told of.
const OFTEN: Duration = Duration::from_secs(1);
/// How many kinds are remembered.
const KINDS: usize = 4096;

/// When each kind was told of last, and how many of it have come since.
#[derive(Debug)]
pub struct Seldom<K>(Mutex<HashMap<K, (Instant, u64)>>);

impl<K> Default for Seldom<K> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: Eq + Hash> Seldom<K> {
    /// Notes one. If it is time to tell of its kind: how many there were since that was done last.
    pub fn times(&self, kind: K) -> Option<u64> {
        self.times_at(kind, Instant::now())
    }

    fn times_at(&self, kind: K, now: Instant) -> Option<u64> {
        let mut kinds = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((last, since)) = kinds.get_mut(&kind) {
            *since += 1;
            if now < *last + OFTEN {
                return None;
            }
            *last = now;
            return Some(std::mem::take(since));
        }
        if kinds.len() >= KINDS {
            kinds.retain(|_, (last, _)| now < *last + OFTEN);
        }
        if kinds.len() >= KINDS {
            kinds.clear();
        }
        kinds.insert(kind, (now, 0));
        Some(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_of_a_kind_a_second_is_told_with_how_many() {
        let (seldom, start) = (Seldom::default(), Instant::now());
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
    fn the_kinds_that_are_remembered_are_bounded() {
        let (seldom, now) = (Seldom::default(), Instant::now());
        for kind in 0..3 * KINDS {
            assert_eq!(seldom.times_at(kind, now), Some(1));
        }
        assert!(seldom.0.lock().expect("not poisoned").len() <= KINDS);
    }
}

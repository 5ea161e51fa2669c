//! The streams of a tunnel that its peer gave up before they were answered. Each costs us what a connection costs, if
//! not more, and the peer nothing, so they have a bound in time.

use std::cell::Cell;
use std::time::Duration;

use tokio::time::Instant;

use super::GIVEN_UP;

/// Time in which [`GIVEN_UP`] of them are allowed.
const TIME: Duration = Duration::from_secs(10);

/// Counts them.
#[derive(Debug)]
pub struct GivenUp {
    count: Cell<usize>,
    since: Cell<Instant>,
}

impl Default for GivenUp {
    fn default() -> Self {
        Self {
            count: Cell::new(0),
            since: Cell::new(Instant::now()),
        }
    }
}

impl GivenUp {
    pub(super) fn one_more(&self) {
        self.one_more_at(Instant::now());
    }

    fn one_more_at(&self, now: Instant) {
        if now.duration_since(self.since.get()) >= TIME {
            self.since.set(now);
            self.count.set(0);
        }
        self.count.set(self.count.get() + 1);
    }

    /// Returns true if there were too many.
    pub(super) fn is_flood(&self) -> bool {
        self.count.get() > GIVEN_UP
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_as_all_streams_each_second_are_no_flood() {
        let given_up = GivenUp::default();
        let mut now = Instant::now();
        for _ in 0..60 {
            for _ in 0..crate::proxy::hbone::SERVER_STREAMS {
                given_up.one_more_at(now);
                assert!(!given_up.is_flood());
            }
            now += Duration::from_secs(1);
        }
        for _ in 0..2 * GIVEN_UP {
            given_up.one_more_at(now);
        }
        assert!(given_up.is_flood());
    }
}

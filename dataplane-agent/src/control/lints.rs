//! Likely mistakes in the configuration. The search reads all of the configuration, so it takes at most about
//! a fiftieth of the time.

use std::time::Duration;

use tokio::time::Instant;

/// The findings of the last search.
#[derive(Debug, Default)]
pub(super) struct Lints {
    found: Vec<String>,
    /// True if they are about the current configuration.
    fresh: bool,
    /// When the last search ended, and how long it took.
    last: Option<(Instant, Duration)>,
}

impl Lints {
    /// The findings of the last search.
    pub(super) fn found(&self) -> &[String] {
        &self.found
    }

    /// Marks the findings as outdated, since the configuration has changed.
    pub(super) fn expire(&mut self) {
        self.fresh = false;
    }

    /// Searches again with `find` if the findings are outdated and enough time has passed. Passes the old
    /// findings, which it is to replace, and the new ones to `tell`.
    pub(super) fn refresh(
        &mut self,
        find: impl FnOnce() -> Vec<String>,
        tell: impl FnOnce(&mut Vec<String>, Vec<String>),
    ) {
        let early = |(ended, took): (Instant, Duration)| ended.elapsed() < took * 50;
        if self.fresh || self.last.is_some_and(early) {
            return;
        }
        let begun = Instant::now();
        tell(&mut self.found, find());
        self.fresh = true;
        self.last = Some((Instant::now(), begun.elapsed()));
    }
}

//! What is likely a slip in what is configured. It takes a look at all of it, so of the time between two
//! looks one takes a tenth at most.

use std::time::Duration;

use tokio::time::Instant;

/// What was found, and when.
#[derive(Debug, Default)]
pub(super) struct Lints {
    found: Vec<String>,
    /// Whether that is of what is configured now.
    fresh: bool,
    /// When the last look ended, and how long it took.
    last: Option<(Instant, Duration)>,
}

impl Lints {
    /// What was found last.
    pub(super) fn found(&self) -> &[String] {
        &self.found
    }

    /// Something else is configured.
    pub(super) fn expire(&mut self) {
        self.fresh = false;
    }

    /// Looks again by `find`, if something else is configured and it is time, and hands what was found before
    /// and what is found now to `tell`.
    pub(super) fn refresh(
        &mut self,
        find: impl FnOnce() -> Vec<String>,
        tell: impl FnOnce(&mut Vec<String>, Vec<String>),
    ) {
        let early = |(ended, took): (Instant, Duration)| ended.elapsed() < took * 10;
        if self.fresh || self.last.is_some_and(early) {
            return;
        }
        let begun = Instant::now();
        tell(&mut self.found, find());
        self.fresh = true;
        self.last = Some((Instant::now(), begun.elapsed()));
    }
}

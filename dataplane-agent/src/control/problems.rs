//! Problems that last: each is logged once when it begins, and once when it is over.

use std::collections::HashSet;

/// Replaces the problems that were `known` by those of `now`. Logs those that are over, and calls `log` for those that
/// are new.
pub(super) fn replace(known: &mut Vec<String>, now: Vec<String>, log: impl Fn(&str)) {
    for over in missing_in(&now, known) {
        tracing::info!("over: {over}");
    }
    missing_in(known, &now).for_each(log);
    *known = now;
}

/// Returns the elements of `all` that are not in `others`.
fn missing_in<'a>(others: &[String], all: &'a [String]) -> impl Iterator<Item = &'a str> {
    let others: HashSet<&String> = others.iter().collect();
    let missing: Vec<&String> = all.iter().filter(|one| !others.contains(one)).collect();
    missing.into_iter().map(String::as_str)
}

/// Logs a problem as a warning.
pub(super) fn warn(problem: &str) {
    tracing::warn!("{problem}");
}

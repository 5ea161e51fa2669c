//! What became of policies as the folder was read again: each that was added, changed or removed is told,
//! since a connection that is let in by then would look the same as ever.

use std::collections::BTreeMap;
use std::fmt;

use super::object::{Key, Objects, Resource};

/// A policy that is other than before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyChange {
    /// AuthorizationPolicy or PeerAuthentication.
    pub kind: &'static str,
    /// Which one.
    pub key: Key,
    /// What became of it.
    pub what: What,
}

/// What became of a policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// It is new.
    Added,
    /// It says something else.
    Changed,
    /// It is gone.
    Removed,
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Added => "added",
            Self::Changed => "changed",
            Self::Removed => "removed",
        })
    }
}

impl PolicyChange {
    /// Writes its line.
    pub(crate) fn log(&self) {
        let Self { kind, key, what } = self;
        let Key { namespace, name } = key;
        tracing::info!(%namespace, %name, %kind, "policy {what}");
    }
}

/// The policies that are others in `after`.
pub(super) fn changes(before: &Objects, after: &Objects) -> Vec<PolicyChange> {
    let mut changes = Vec::new();
    compare(
        "AuthorizationPolicy",
        &before.authorization_policies,
        &after.authorization_policies,
        |was, is| was.body == is.body,
        &mut changes,
    );
    compare(
        "PeerAuthentication",
        &before.peer_authentications,
        &after.peer_authentications,
        // Of two for the same pods the oldest holds.
        |was, is| (&was.body, was.meta.created) == (&is.body, is.meta.created),
        &mut changes,
    );
    changes
}

fn compare<T>(
    kind: &'static str,
    before: &BTreeMap<Key, Resource<T>>,
    after: &BTreeMap<Key, Resource<T>>,
    is_same: impl Fn(&Resource<T>, &Resource<T>) -> bool,
    changes: &mut Vec<PolicyChange>,
) {
    let change = |key: &Key, what| PolicyChange {
        kind,
        key: key.clone(),
        what,
    };
    let gone = before.keys().filter(|key| !after.contains_key(*key));
    changes.extend(gone.map(|key| change(key, What::Removed)));
    for (key, now) in after {
        match before.get(key) {
            None => changes.push(change(key, What::Added)),
            Some(was) if !is_same(was, now) => changes.push(change(key, What::Changed)),
            Some(_) => {}
        }
    }
}

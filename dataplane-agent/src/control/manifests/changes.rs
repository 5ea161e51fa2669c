//! What became of policies as the folder was read again: each that was added, changed or removed is told,
//! since a connection that is let in by then would look the same as ever.

use std::fmt;

use super::object::{Body, Item, Key};

/// A policy that is other than before.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PolicyChange {
    /// AuthorizationPolicy or PeerAuthentication.
    pub kind: &'static str,
    /// What became of it.
    pub what: PolicyChangeKind,
    /// Which one.
    pub key: Key,
}

/// What became of a policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum PolicyChangeKind {
    /// It is gone.
    Removed,
    /// It is new.
    Added,
    /// It says something else.
    Changed,
}

impl fmt::Display for PolicyChangeKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Added => "added",
            Self::Changed => "changed",
            Self::Removed => "removed",
        })
    }
}

impl PolicyChange {
    /// What became of an object, if it is a policy and another one than before.
    pub(super) fn of(before: Option<&Item>, now: Option<&Item>) -> Option<Self> {
        let item = now.or(before)?;
        let is = matches!(
            item.body,
            Body::AuthorizationPolicy(_) | Body::PeerAuthentication(_)
        );
        let what = match (before, now) {
            (None, _) => PolicyChangeKind::Added,
            (_, None) => PolicyChangeKind::Removed,
            (Some(before), Some(now)) => {
                // Of two PeerAuthentications for the same pods the oldest holds.
                let ages = matches!(item.body, Body::PeerAuthentication(_));
                let aged = ages && before.meta.created != now.meta.created;
                (aged || before.body != now.body).then_some(PolicyChangeKind::Changed)?
            }
        };
        let (kind, key) = item.identity();
        is.then_some(Self { kind, key, what })
    }

    /// Writes its line.
    pub(crate) fn log(&self) {
        let Self { kind, key, what } = self;
        let Key { namespace, name } = key;
        tracing::info!(%namespace, %name, %kind, "policy {what}");
    }
}

//! Changes of policies found by a reload. Each policy that was added, changed or removed is logged, since a
//! connection that it lets in looks the same as any other.

use std::fmt;

use super::object::{Body, Item, Key};

/// A change of a policy.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PolicyChange {
    /// AuthorizationPolicy or PeerAuthentication.
    pub kind: &'static str,
    /// The kind of change.
    pub what: PolicyChangeKind,
    /// The policy's namespace and name.
    pub key: Key,
}

/// The kind of a policy's change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum PolicyChangeKind {
    /// It was removed.
    Removed,
    /// It was added.
    Added,
    /// Its content changed.
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
    /// Returns the change between two versions of an object, if it is a policy and they differ.
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
                // The timestamp decides which of two PeerAuthentications for the same pods holds.
                let ages = matches!(item.body, Body::PeerAuthentication(_));
                let aged = ages && before.meta.created != now.meta.created;
                (aged || before.body != now.body).then_some(PolicyChangeKind::Changed)?
            }
        };
        let (kind, key) = item.identity();
        is.then_some(Self { kind, key, what })
    }

    /// Writes its log line.
    pub(crate) fn log(&self) {
        let Self { kind, key, what } = self;
        let Key { namespace, name } = key;
        tracing::info!(%namespace, %name, %kind, "policy {what}");
    }
}

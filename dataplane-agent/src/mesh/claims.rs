//! An index in which several objects may claim the same key, such as an address; one claim takes precedence.

use std::sync::Arc;

use imbl::OrdMap;

/// Claims, by network, since the same address may mean something else in another. A clone shares its contents.
#[derive(Debug)]
pub(super) struct Claims<P: Ord, T>(OrdMap<Arc<str>, OrdMap<P, Claimants<T>>>);

/// The claimants of one place, in the order of precedence.
#[derive(Debug)]
enum Claimants<T> {
    One(Arc<T>),
    Several(Arc<[Arc<T>]>),
}

impl<T> Claimants<T> {
    fn all(&self) -> &[Arc<T>] {
        match self {
            Self::One(one) => std::slice::from_ref(one),
            Self::Several(all) => all,
        }
    }
}

impl<T> Clone for Claimants<T> {
    fn clone(&self) -> Self {
        match self {
            Self::One(one) => Self::One(Arc::clone(one)),
            Self::Several(all) => Self::Several(Arc::clone(all)),
        }
    }
}

impl<T> FromIterator<Arc<T>> for Claimants<T> {
    fn from_iter<I: IntoIterator<Item = Arc<T>>>(all: I) -> Self {
        let all: Arc<[_]> = all.into_iter().collect();
        match &*all {
            [one] => Self::One(Arc::clone(one)),
            _ => Self::Several(all),
        }
    }
}

impl<P: Ord, T> Clone for Claims<P, T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<P: Ord, T> Default for Claims<P, T> {
    fn default() -> Self {
        Self(OrdMap::default())
    }
}

impl<P: Ord + Clone, T> Claims<P, T> {
    /// Returns the claimants of a place, in the order of precedence.
    pub(super) fn of(&self, network: &str, place: &P) -> &[Arc<T>] {
        let all = self.0.get(network).and_then(|of| of.get(place));
        all.map_or(&[], Claimants::all)
    }

    /// Adds a claim after those that `holds_before` puts before it.
    pub(super) fn insert(
        &mut self,
        network: &Arc<str>,
        place: P,
        claim: &Arc<T>,
        holds_before: impl Fn(&T, &T) -> bool,
    ) {
        let of = self.0.entry(Arc::clone(network)).or_default();
        let all = of.get(&place).map_or(&[][..], Claimants::all);
        if all.iter().any(|other| Arc::ptr_eq(other, claim)) {
            return;
        }
        let at = all.partition_point(|other| holds_before(other, claim));
        let (before, after) = all.split_at(at);
        let all = before.iter().chain([claim]).chain(after).cloned().collect();
        of.insert(place, all);
    }

    /// Removes the claim of this very object; an equal one of another object stays.
    pub(super) fn remove(&mut self, network: &Arc<str>, place: &P, claim: &Arc<T>) {
        let Some(of) = self.0.get_mut(network) else {
            return;
        };
        let all = of.get(place).map_or(&[][..], Claimants::all);
        let others = all.iter().filter(|other| !Arc::ptr_eq(other, claim));
        let others: Claimants<T> = others.cloned().collect();
        if others.all().is_empty() {
            of.remove(place);
            if of.is_empty() {
                self.0.remove(network);
            }
        } else {
            of.insert(place.clone(), others);
        }
    }
}

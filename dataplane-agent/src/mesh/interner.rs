//! Interning: equal values share one copy. Most workloads have their namespace, their services and much else
//! in common with others, but each is parsed by itself.

use std::collections::{BTreeMap, HashSet};
use std::hash::Hash;
use std::sync::Arc;

use super::delta::Delta;
use super::workload::{Locality, Ports, Services, Workload};

/// One copy of each value that is in use.
#[derive(Debug, Default)]
pub(crate) struct Interner {
    texts: Copies<str>,
    lists: Copies<[Arc<str>]>,
    ports: Copies<Ports>,
    services: Copies<Services>,
    localities: Copies<Locality>,
}

impl Interner {
    /// Replaces the values of a change by shared copies.
    pub(super) fn delta(&mut self, delta: &mut Delta) {
        // Keys come first, so that keys that a look-up compares are near each other in memory.
        delta.services = self.keys(std::mem::take(&mut delta.services));
        delta.policies = self.keys(std::mem::take(&mut delta.policies));
        for workload in delta.workloads.values_mut().flatten() {
            self.workload(workload);
        }
        for service in delta.services.values_mut().flatten() {
            self.texts.share(&mut service.namespace);
            for at in &mut service.vips {
                self.texts.share(&mut at.network);
            }
        }
        for policy in delta.policies.values_mut().flatten() {
            self.texts.share(&mut policy.namespace);
        }
    }

    /// Replaces the values of a workload by shared copies, but for its uid, its name and its addresses.
    pub(crate) fn workload(&mut self, of: &mut Workload) {
        // A pod without an owner has its own name here.
        for text in [&mut of.workload_name, &mut of.canonical_name] {
            match *text == of.name {
                true => *text = Arc::clone(&of.name),
                false => self.texts.share(text),
            }
        }
        for text in [
            &mut of.namespace,
            &mut of.service_account,
            &mut of.trust_domain,
            &mut of.node,
            &mut of.cluster_id,
            &mut of.network,
            &mut of.canonical_revision,
        ] {
            self.texts.share(text);
        }
        let rare = [
            &mut of.network_gateway,
            &mut of.waypoint,
            &mut of.unsupported,
        ];
        for text in rare.into_iter().flatten() {
            self.texts.share(text);
        }
        let Self { texts, ports, .. } = self;
        self.lists.share_made_of(&mut of.policies, |keys| {
            keys.iter().map(|key| texts.shared(key)).collect()
        });
        self.services.share_made_of(&mut of.services, |services| {
            let own = services.iter().map(|(key, endpoint)| {
                let mut endpoint = endpoint.clone();
                ports.share(&mut endpoint.ports);
                (texts.shared(key), endpoint)
            });
            Arc::new(own.collect())
        });
        self.localities.share_made_of(&mut of.locality, |locality| {
            Arc::new(Locality {
                region: texts.shared(&locality.region),
                zone: texts.shared(&locality.zone),
                subzone: texts.shared(&locality.subzone),
            })
        });
    }

    fn keys<T>(&mut self, all: BTreeMap<Arc<str>, T>) -> BTreeMap<Arc<str>, T> {
        let all = all.into_iter();
        all.map(|(key, of)| (self.texts.shared(&key), of)).collect()
    }
}

/// Values of one kind, one copy of each.
#[derive(Debug)]
pub(crate) struct Copies<T: ?Sized> {
    all: HashSet<Arc<T>>,
    /// With so many those go that nobody uses: there are at most about as many of these as of others.
    most: usize,
}

impl<T: ?Sized> Default for Copies<T> {
    fn default() -> Self {
        Self {
            all: HashSet::new(),
            most: Self::LEAST,
        }
    }
}

impl<T: ?Sized> Copies<T> {
    /// A sweep is not worth its cost below this number of copies.
    const LEAST: usize = 1024;
}

impl<T: ?Sized + Eq + Hash> Copies<T> {
    /// Returns the copy that equals `value`, or `value` itself, which becomes the copy.
    fn shared(&mut self, value: &Arc<T>) -> Arc<T> {
        let mut value = Arc::clone(value);
        self.share(&mut value);
        value
    }

    /// Replaces `value` by the copy that equals it.
    pub(crate) fn share(&mut self, value: &mut Arc<T>) {
        self.share_made_of(value, Arc::clone);
    }

    /// As [`Copies::share`]; if there is no copy yet, `own` makes it of shared parts.
    fn share_made_of(&mut self, value: &mut Arc<T>, own: impl FnOnce(&Arc<T>) -> Arc<T>) {
        if let Some(copy) = self.all.get(&**value) {
            *value = Arc::clone(copy);
            return;
        }
        if self.all.len() >= self.most {
            self.all.retain(|copy| Arc::strong_count(copy) > 1);
            self.most = Self::LEAST.max(2 * self.all.len());
            self.all.shrink_to(self.most);
        }
        *value = own(value);
        self.all.insert(Arc::clone(value));
    }
}

#[cfg(test)]
mod tests {
    use super::super::workload::tests::workload;
    use super::*;

    #[test]
    fn what_is_equal_is_there_once() {
        let mut interner = Interner::default();
        let [mut one, mut other] = [1, 2].map(|number| Workload {
            uid: format!("c//Pod/ns/{number}").into(),
            services: Arc::new([("ns/s".into(), Default::default())].into()),
            ..workload(&["ns/p"])
        });
        let before = (one.clone(), other.clone());
        interner.workload(&mut one);
        interner.workload(&mut other);
        assert_eq!((&one, &other), (&before.0, &before.1));
        assert!(Arc::ptr_eq(&one.namespace, &other.namespace));
        assert!(Arc::ptr_eq(&one.policies, &other.policies));
        assert!(Arc::ptr_eq(&one.services, &other.services));
        assert!(Arc::ptr_eq(&one.locality, &other.locality));
        assert!(Arc::ptr_eq(&one.canonical_name, &one.name));
    }

    #[test]
    fn what_nobody_uses_any_more_goes() {
        let mut copies = Copies::<str>::default();
        let used: Vec<_> = (0..Copies::<str>::LEAST)
            .map(|number| copies.shared(&format!("used {number}").into()))
            .collect();
        for number in 0..100 * used.len() {
            copies.shared(&format!("passing {number}").into());
            assert!(copies.all.len() <= 2 * used.len());
        }
        for text in &used {
            let again = copies.shared(&Arc::from(&**text));
            assert!(Arc::ptr_eq(text, &again));
        }
    }
}

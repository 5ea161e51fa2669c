//! Which pods are leased, for who reads what is configured: a pod whose object is gone is known for as long as
//! it is served.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::Arc;

use super::{Instance, PodEvent};

/// The pods that are leased, by their enrolments: the uids of their workloads, and whether they drain.
#[derive(Debug, Default)]
pub struct Leases(RefCell<BTreeMap<Instance, (Arc<str>, bool)>>);

impl Leases {
    /// Takes in what the node says of a pod.
    pub fn apply(&self, event: &PodEvent) {
        let mut leases = self.0.borrow_mut();
        let mut drains = |instance, drains| {
            if let Some(lease) = leases.get_mut(instance) {
                lease.1 = drains;
            }
        };
        match event {
            PodEvent::Up(lease) => {
                leases.insert(lease.instance, (Arc::clone(&lease.uid), false));
            }
            PodEvent::Drain(instance, _) => drains(instance, true),
            PodEvent::Revive(instance) => drains(instance, false),
            PodEvent::Down(instance, _) => {
                leases.remove(instance);
            }
            PodEvent::Addresses(..)
            | PodEvent::DrainUnleased(..)
            | PodEvent::Clear(..)
            | PodEvent::Snapshot(_) => {}
        }
    }

    /// The uids of those that are leased, and of those among them that do not drain.
    pub fn uids<T: FromIterator<Arc<str>>>(&self) -> (T, T) {
        let leases = self.0.borrow();
        let all = leases.values().map(|(uid, _)| Arc::clone(uid));
        let serving = leases.values().filter(|(_, drains)| !drains);
        (
            all.collect(),
            serving.map(|(uid, _)| Arc::clone(uid)).collect(),
        )
    }
}

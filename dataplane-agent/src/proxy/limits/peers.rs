//! The peers of each pod and their numbers of connections: a peer that takes all it can must leave something for the
//! others.
//!
//! A peer of the mesh is known by its identity and address, so two pods of one identity are two peers; anybody else
//! is known by the address alone.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::source;
use crate::mesh::Identity;

type Name = (Option<Identity>, IpAddr);

/// The peers of one pod that have a connection to it. Clones share them.
#[derive(Clone, Debug, Default)]
pub(super) struct Peers(Arc<Mutex<HashMap<Name, Weak<Taken>>>>);

/// A peer of one pod. It is forgotten when nobody holds it any more.
#[derive(Clone, Debug)]
pub struct Peer(Arc<Taken>);

#[derive(Debug)]
struct Taken {
    name: Name,
    count: AtomicUsize,
    of: Peers,
}

impl Peers {
    pub(super) fn of(&self, identity: Option<&Identity>, address: IpAddr) -> Peer {
        let name = (identity.cloned(), source(address));
        let mut peers = self.lock();
        if let Some(peer) = peers.get(&name).and_then(Weak::upgrade) {
            return Peer(peer);
        }
        let peer = Arc::new(Taken {
            name: name.clone(),
            count: AtomicUsize::new(0),
            of: self.clone(),
        });
        peers.insert(name, Arc::downgrade(&peer));
        Peer(peer)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Name, Weak<Taken>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Peer {
    /// Returns true if it is authenticated.
    pub(super) fn is_known(&self) -> bool {
        self.0.name.0.is_some()
    }

    /// The number of its connections.
    pub(super) fn count(&self) -> &AtomicUsize {
        &self.0.count
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        let mut peers = self.of.lock();
        // Another peer may have come under its name meanwhile.
        if peers
            .get(&self.name)
            .is_some_and(|peer| peer.strong_count() == 0)
        {
            peers.remove(&self.name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_is_known_by_identity_and_address_as_long_as_it_is_there() {
        let peers = Peers::default();
        let who = Identity::new("td", "ns", "peer");
        let at = |last: u8| IpAddr::from([192, 0, 2, last]);
        let all = [(Some(&who), 1), (Some(&who), 2), (None, 1)]
            .map(|(identity, last)| peers.of(identity, at(last)));
        let again = peers.of(Some(&who), at(1));
        assert!(Arc::ptr_eq(&all[0].0, &again.0));
        assert_eq!(peers.lock().len(), 3);
        drop(all);
        assert_eq!(peers.lock().len(), 1);
        drop(again);
        assert!(peers.lock().is_empty());
    }
}

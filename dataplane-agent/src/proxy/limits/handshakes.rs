//! Places for handshakes of tunnels with peers that are not authenticated yet: of each pod, so that an attack on one
//! takes nothing from another, and of the node, for its memory.
//!
//! Anybody can connect and be silent, so a new handshake is never refused for want of a place: the oldest one of the
//! source that has the most gives way. A source that holds many loses its own; a peer, which has a few for as long as
//! a round trip, keeps them.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use super::source;

/// Number of handshakes at once with one pod.
pub const OF_POD: usize = 256;
/// Number of handshakes at once with all pods.
pub const OF_NODE: usize = 2048;

/// The handshakes of one pod, or of all pods, on all workers. Clones share them.
#[derive(Clone, Debug)]
pub struct Handshakes {
    most: usize,
    going: Arc<Mutex<Going>>,
}

#[derive(Debug, Default)]
struct Going {
    next: u64,
    count: usize,
    /// Handshakes by source, the oldest first. Dropping the sender tells a handshake to give way.
    of: HashMap<IpAddr, BTreeMap<u64, oneshot::Sender<()>>>,
}

/// A handshake's place, free again when this is dropped.
#[derive(Debug)]
pub struct Turn {
    going: Arc<Mutex<Going>>,
    source: IpAddr,
    number: u64,
    over: oneshot::Receiver<()>,
}

impl Handshakes {
    /// Creates `most` places.
    pub fn new(most: usize) -> Self {
        Self {
            most,
            going: Arc::default(),
        }
    }

    /// Begins a handshake, in place of another if there are too many.
    pub fn begin(&self, peer: IpAddr) -> Turn {
        let source = source(peer);
        let mut going = lock(&self.going);
        if going.count >= self.most {
            going.make_room();
        }
        let (give_way, over) = oneshot::channel();
        let number = going.next;
        going.next += 1;
        going.count += 1;
        going.of.entry(source).or_default().insert(number, give_way);
        Turn {
            going: Arc::clone(&self.going),
            source,
            number,
            over,
        }
    }
}

impl Default for Handshakes {
    fn default() -> Self {
        Self::new(OF_POD)
    }
}

impl Going {
    /// Ends the oldest handshake of the source that has the most; of two such sources, the one whose oldest is older
    /// loses it.
    fn make_room(&mut self) {
        let oldest = |of: &BTreeMap<u64, _>| of.keys().next().copied().unwrap_or(u64::MAX);
        let greediest = self
            .of
            .iter()
            .max_by_key(|(_, of)| (of.len(), std::cmp::Reverse(oldest(of))));
        if let Some((source, of)) = greediest {
            let (source, number) = (*source, oldest(of));
            self.end(source, number);
        }
    }

    fn end(&mut self, source: IpAddr, number: u64) {
        let Some(of) = self.of.get_mut(&source) else {
            return;
        };
        if of.remove(&number).is_some() {
            self.count -= 1;
        }
        if of.is_empty() {
            self.of.remove(&source);
        }
    }
}

/// The place of a handshake among those of its pod and those of the node.
#[derive(Debug)]
pub struct Turns {
    pub(super) of_pod: Turn,
    pub(super) of_node: Turn,
}

impl Turns {
    /// Completes when the handshake has to give way to another one.
    pub async fn over(&mut self) {
        tokio::select! {
            () = self.of_pod.over() => {}
            () = self.of_node.over() => {}
        }
    }
}

impl Turn {
    /// Completes when the handshake has to give way to another one.
    pub async fn over(&mut self) {
        // Nothing is sent: the sender is dropped.
        let _ = (&mut self.over).await;
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        lock(&self.going).end(self.source, self.number);
    }
}

fn lock(going: &Mutex<Going>) -> MutexGuard<'_, Going> {
    going.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;
    use proptest::prelude::*;

    use super::*;

    fn address(last: u8) -> IpAddr {
        IpAddr::from([192, 0, 2, last])
    }

    fn is_over(turn: &mut Turn) -> bool {
        turn.over().now_or_never().is_some()
    }

    #[test]
    fn who_holds_the_most_gives_way_with_its_oldest() {
        let all = Handshakes::new(4);
        let mut peer = all.begin(address(1));
        let mut greedy: Vec<Turn> = (0..3).map(|_| all.begin(address(2))).collect();
        let mut late = all.begin(address(3));
        assert!(is_over(&mut greedy[0]));
        assert!(!is_over(&mut greedy[1]) && !is_over(&mut peer) && !is_over(&mut late));
        // The greedy source pays for its next one itself.
        greedy.push(all.begin(address(2)));
        assert!(is_over(&mut greedy[1]) && !is_over(&mut peer));
        drop((greedy, peer, late));
        assert_eq!(lock(&all.going).count, 0);
        assert!(lock(&all.going).of.is_empty());
    }

    proptest! {
        /// There are never more than the bound, and a source that holds fewer than any other loses nothing to it.
        #[test]
        fn the_bound_holds_and_only_the_greediest_loses(
            steps in proptest::collection::vec((1_u8..5, any::<bool>()), 1..200)
        ) {
            let all = Handshakes::new(6);
            let mut turns: Vec<(u8, Turn)> = Vec::new();
            for (who, begins) in steps {
                if begins {
                    let held = |turns: &[(u8, Turn)], who: u8| turns.iter().filter(|(of, _)| *of == who).count();
                    let most = (1..5).map(|who| held(&turns, who)).max();
                    let full = turns.len() == 6;
                    turns.push((who, all.begin(address(who))));
                    let over: Vec<usize> = (0..turns.len()).filter(|at| is_over(&mut turns[*at].1)).collect();
                    prop_assert_eq!(over.len(), usize::from(full));
                    for at in over {
                        let (loser, _) = turns[at];
                        prop_assert!(Some(held(&turns[..turns.len() - 1], loser)) == most);
                        drop(turns.remove(at));
                    }
                } else if let Some(at) = turns.iter().position(|(of, _)| *of == who) {
                    drop(turns.remove(at));
                }
                prop_assert_eq!(lock(&all.going).count, turns.len());
                prop_assert!(turns.len() <= 6);
            }
        }
    }
}

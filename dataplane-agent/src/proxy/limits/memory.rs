//! Memory for bytes that wait to be delivered, of the node and of each pod. As with places nobody can
//! take all of it: what the connections of a pod hold is never more than what is left for all others.
//!
//! A connection may always hold a little, which is reckoned with its place and not counted here. So
//! each makes progress by itself, whatever others hold, and none waits for another.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The bytes that connections of the node may hold together. Clones share them.
#[derive(Clone, Debug)]
pub struct Memory {
    most: usize,
    held: Arc<AtomicUsize>,
}

/// The bytes that the connections of one pod hold. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct PodMemory(Arc<AtomicUsize>);

/// A pod's share of the node's memory.
#[derive(Clone, Debug, Default)]
pub struct Share {
    node: Memory,
    pod: PodMemory,
}

/// The part of its share that a pod has left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// More than half.
    Plenty,
    /// Half or less: its connections hold less each.
    Little,
    /// Nothing: each connection has only what it may always hold.
    Nothing,
}

impl Memory {
    /// Returns a bound of `most` bytes.
    pub fn new(most: u64) -> Self {
        Self {
            most: usize::try_from(most).unwrap_or(usize::MAX),
            held: Arc::default(),
        }
    }

    /// Returns the bytes that are held.
    pub fn held(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }

    /// Returns the share of a pod.
    pub fn share(&self, pod: &PodMemory) -> Share {
        Share {
            node: self.clone(),
            pod: pod.clone(),
        }
    }
}

impl Default for Memory {
    /// Enough for a few connections.
    fn default() -> Self {
        Self::new(256 << 20)
    }
}

impl Share {
    /// Returns the part of the share that is left.
    pub fn level(&self) -> Level {
        let pod = self.pod.0.load(Ordering::Relaxed);
        let left = self.node.most.saturating_sub(self.node.held());
        if pod >= left {
            Level::Nothing
        } else if pod >= left / 2 {
            Level::Little
        } else {
            Level::Plenty
        }
    }
}

impl Share {
    /// Returns true if the pod holds more than its share by an eighth of the node's memory. All pods together then
    /// hold no more than nine eighths of it, if whoever adds to that gives up what it holds.
    fn is_exceeded(&self) -> bool {
        let most = self.node.most.saturating_add(self.node.most / 8);
        self.pod.0.load(Ordering::Relaxed) >= most.saturating_sub(self.node.held())
    }
}

/// The bytes that one connection or tunnel holds; they are given back when this is dropped.
#[derive(Debug)]
pub struct Hold {
    share: Share,
    free: usize,
    counted: Cell<usize>,
}

impl Hold {
    /// Returns a hold of nothing. The first `free` bytes that it will hold are not counted.
    pub fn new(share: &Share, free: usize) -> Self {
        Self {
            share: share.clone(),
            free,
            counted: Cell::new(0),
        }
    }

    /// Sets the bytes that it holds. The caller checks the [`Level`] before; nothing is refused here.
    pub fn set(&self, bytes: usize) {
        let bytes = bytes.saturating_sub(self.free);
        let before = self.counted.replace(bytes);
        let Share { node, pod } = &self.share;
        for all in [&node.held, &pod.0] {
            if bytes > before {
                all.fetch_add(bytes - before, Ordering::Relaxed);
            } else if bytes < before {
                all.fetch_sub(before - bytes, Ordering::Relaxed);
            }
        }
    }

    /// Returns the part of its share that the pod has left.
    pub fn level(&self) -> Level {
        self.share.level()
    }

    /// Returns true if it must be given up: it holds more than it may always hold, and the pod more than its share
    /// by an eighth of the node's memory.
    pub fn is_excess(&self) -> bool {
        self.counted.get() > 0 && self.share.is_exceeded()
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.set(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_holds_no_more_than_is_left_for_others_and_they_have_plenty() {
        let memory = Memory::new(1200);
        let pods: [PodMemory; 2] = Default::default();
        let (greedy, other) = (memory.share(&pods[0]), memory.share(&pods[1]));
        let hold = Hold::new(&greedy, 10);
        let levels = [
            (10, Level::Plenty),
            (409, Level::Plenty),
            (411, Level::Little),
        ];
        for (bytes, level) in levels {
            hold.set(bytes);
            assert_eq!(greedy.level(), level, "{bytes}");
        }
        hold.set(610);
        assert_eq!((greedy.level(), memory.held()), (Level::Nothing, 600));
        assert_eq!(other.level(), Level::Plenty);
        assert!(!hold.is_excess());
        hold.set(690);
        let small = Hold::new(&greedy, 10);
        small.set(10);
        assert!(hold.is_excess() && !small.is_excess());
        hold.set(610);
        let late = Hold::new(&other, 0);
        late.set(250);
        assert_eq!(other.level(), Level::Little);
        drop(hold);
        assert_eq!((greedy.level(), memory.held()), (Level::Plenty, 250));
    }
}

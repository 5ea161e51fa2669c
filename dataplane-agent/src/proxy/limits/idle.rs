//! The idle tunnels of a pod, on all workers. They hold places that its connections may need.

use std::sync::Arc;

use tokio::sync::{Notify, watch};

/// The idle tunnels of one pod. Clones share the count.
#[derive(Clone, Debug, Default)]
pub struct IdleTunnels(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    count: watch::Sender<usize>,
    wanted: Notify,
}

/// Counts a tunnel as idle until it is dropped. Let go of the tunnel's place first: whoever waits for one
/// tries again when the count changes.
#[derive(Debug)]
pub struct Idle(IdleTunnels);

impl IdleTunnels {
    /// Counts one more idle tunnel.
    pub fn rest(&self) -> Idle {
        self.0.count.send_modify(|count| *count += 1);
        Idle(self.clone())
    }

    /// Returns a receiver of the number of idle tunnels.
    pub fn count(&self) -> watch::Receiver<usize> {
        self.0.count.subscribe()
    }

    /// Asks all workers to close those that they have.
    pub fn want(&self) {
        self.0.wanted.notify_waiters();
    }

    /// Completes when somebody [wants](Self::want) their places.
    pub async fn wanted(&self) {
        self.0.wanted.notified().await;
    }
}

impl Drop for Idle {
    fn drop(&mut self) {
        self.0.0.count.send_modify(|count| *count -= 1);
    }
}

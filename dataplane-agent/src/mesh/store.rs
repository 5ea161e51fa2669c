//! The two ends of the mesh as it is now: who fills it, and who reads it.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::watch;

use super::delta::Delta;
use super::interner::Interner;
use super::snapshot::Mesh;

/// The writer's end, for control.
#[derive(Debug)]
pub struct MeshWriter {
    now: watch::Sender<Arc<Mesh>>,
    interner: Mutex<Interner>,
}

/// A reader's end, for rooms.
#[derive(Clone, Debug)]
pub struct MeshReader(watch::Receiver<Arc<Mesh>>);

/// A mesh with nothing in it, and its two ends.
pub fn store() -> (MeshWriter, MeshReader) {
    let (now, reader) = watch::channel(Arc::default());
    let interner = Mutex::default();
    (MeshWriter { now, interner }, MeshReader(reader))
}

impl MeshWriter {
    /// Changes the mesh. Costs what is changed, whatever else is in it.
    pub fn apply(&self, mut delta: Delta) {
        let interner = self.interner.lock();
        let mut interner = interner.unwrap_or_else(PoisonError::into_inner);
        interner.delta(&mut delta);
        let mut next = Mesh::clone(&self.now.borrow());
        next.apply(delta);
        self.now.send_replace(Arc::new(next));
    }

    /// Makes the mesh this and nothing else.
    #[cfg(test)]
    pub(crate) fn replace(&self, all: Delta) {
        let delta = all.from(&self.now.borrow());
        if !delta.is_empty() {
            self.apply(delta);
        }
    }

    /// The mesh as it is now.
    pub fn current(&self) -> Arc<Mesh> {
        Arc::clone(&self.now.borrow())
    }
}

impl MeshReader {
    /// The mesh as it is now.
    pub fn current(&self) -> Arc<Mesh> {
        Arc::clone(&self.0.borrow())
    }

    /// Waits for a mesh that this reader has not waited for yet. For ever, if there will be none.
    pub async fn changed(&mut self) -> Arc<Mesh> {
        if self.0.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
        Arc::clone(&self.0.borrow_and_update())
    }
}

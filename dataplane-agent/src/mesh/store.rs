//! The current mesh: control writes it by [`MeshWriter`], rooms read it by [`MeshReader`].

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::watch;

use super::delta::Delta;
use super::interner::Interner;
use super::snapshot::Mesh;

/// Writes the mesh; for control.
#[derive(Debug)]
pub struct MeshWriter {
    now: watch::Sender<Arc<Mesh>>,
    interner: Mutex<Interner>,
    /// The node whose workloads alone are kept. `None` if all of the mesh is kept.
    node: Option<Box<str>>,
}

/// Reads the mesh; for rooms.
#[derive(Clone, Debug)]
pub struct MeshReader(watch::Receiver<Arc<Mesh>>);

/// Returns the writer and a reader of a new, empty mesh.
pub fn store() -> (MeshWriter, MeshReader) {
    let (now, reader) = watch::channel(Arc::default());
    let writer = MeshWriter {
        now,
        interner: Mutex::default(),
        node: None,
    };
    (writer, MeshReader(reader))
}

/// Returns the writer of a mesh that keeps only the workloads of one node, and no service or policy.
pub fn store_of_node(node: &str) -> MeshWriter {
    let (writer, _) = store();
    MeshWriter {
        node: Some(node.into()),
        ..writer
    }
}

impl MeshWriter {
    /// Changes the mesh. The cost depends on the size of the change, not on that of the mesh.
    pub fn apply(&self, mut delta: Delta) {
        if let Some(node) = &self.node {
            delta.retain_node(node);
        }
        let interner = self.interner.lock();
        let mut interner = interner.unwrap_or_else(PoisonError::into_inner);
        interner.delta(&mut delta);
        let mut next = Mesh::clone(&self.now.borrow());
        next.apply(delta);
        self.now.send_replace(Arc::new(next));
    }

    /// Replaces the contents of the mesh.
    #[cfg(test)]
    pub(crate) fn replace(&self, all: Delta) {
        let delta = all.from(&self.now.borrow());
        if !delta.is_empty() {
            self.apply(delta);
        }
    }

    /// Returns the current mesh.
    pub fn current(&self) -> Arc<Mesh> {
        Arc::clone(&self.now.borrow())
    }
}

impl MeshReader {
    /// Returns the current mesh.
    pub fn current(&self) -> Arc<Mesh> {
        Arc::clone(&self.0.borrow())
    }

    /// Waits for a mesh that this method has not returned to this reader yet; for ever if the writer is gone.
    pub async fn changed(&mut self) -> Arc<Mesh> {
        if self.0.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
        Arc::clone(&self.0.borrow_and_update())
    }
}

//! The two ends of the mesh as it is now: who fills it, and who reads it.

use std::sync::Arc;

use tokio::sync::watch;

use super::delta::Delta;
use super::snapshot::Mesh;

/// The writer's end, for control.
#[derive(Debug)]
pub struct MeshWriter(watch::Sender<Arc<Mesh>>);

/// A reader's end, for rooms.
#[derive(Clone, Debug)]
pub struct MeshReader(watch::Receiver<Arc<Mesh>>);

/// A mesh with nothing in it, and its two ends.
pub fn store() -> (MeshWriter, MeshReader) {
    let (writer, reader) = watch::channel(Arc::default());
    (MeshWriter(writer), MeshReader(reader))
}

impl MeshWriter {
    /// Changes the mesh. Costs what is changed, whatever else is in it.
    pub fn apply(&self, delta: Delta) {
        let mut next = Mesh::clone(&self.0.borrow());
        next.apply(delta);
        self.0.send_replace(Arc::new(next));
    }

    /// Makes the mesh this and nothing else.
    #[cfg(test)]
    pub(crate) fn replace(&self, all: Delta) {
        let delta = all.from(&self.0.borrow());
        if !delta.is_empty() {
            self.apply(delta);
        }
    }

    /// The mesh as it is now.
    pub fn current(&self) -> Arc<Mesh> {
        Arc::clone(&self.0.borrow())
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

//! The node process, as a proxy process finds it in the run folder.

use super::AgentError;
use crate::config::RunOptions;
use crate::node::capture::CaptureError;
use crate::seam::ServingLock;
use crate::sys::made::CreatedPaths;

/// A node that a proxy serves. It cannot be uninstalled while this lives.
pub(super) struct PeerNode {
    _lock: ServingLock,
    made: CreatedPaths,
}

impl PeerNode {
    /// Refuses where the node is being uninstalled. The folder that is made here is removed when this is dropped,
    /// unless [`PeerNode::keep`] is called.
    pub(super) fn new(options: &RunOptions) -> Result<Self, AgentError> {
        let (places, node) = (&options.places, &options.node);
        places.socket_fits(node).map_err(AgentError::Settings)?;
        let path = places.proxy_lock(node);
        let locked = ServingLock::share(&path).map_err(CaptureError::file(&path))?;
        let (lock, made) =
            locked.ok_or_else(|| anyhow::anyhow!("node {node} is being uninstalled"))?;
        Ok(Self { _lock: lock, made })
    }

    /// Keeps the folder that was made.
    pub(super) fn keep(&mut self) {
        self.made.keep();
    }
}

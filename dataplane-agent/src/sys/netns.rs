//! Network namespaces: held by descriptor, entered by a thread.

use std::fs::File;
use std::sync::Arc;

/// A network namespace, held open.
#[derive(Clone, Debug)]
pub struct Netns {
    /// The namespace's descriptor.
    pub file: Arc<File>,
    /// Its inode number, which names it on this machine.
    pub inode: u64,
}

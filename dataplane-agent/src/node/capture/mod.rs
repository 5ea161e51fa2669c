//! Room 1: attaches the kernel programs and keeps their maps up to date.
//!
//! Control says which pods are wanted. [`Reconciler`] brings the machine there step by step
//! ([`reconcile::diff`] decides the next steps), and publishes how far each pod is. Door out: a
//! [`crate::seam::Lease`] of each pod; what its listeners accept has its original destination as its local
//! address.
//!
//! Every change on the machine is written down before it is made, and all that keeps traffic captured is
//! pinned: an agent that dies leaves its pods captured, and the next one takes over.

pub mod attached;
pub mod definition;
pub mod enrol;
mod link;
pub mod maps;
pub mod node_folder;
pub mod pins;
pub mod programs;
pub mod reconcile;
pub mod reconciler;
pub mod repair;
pub mod routes;
pub mod routing;
pub mod takeover;
pub mod undo;
pub mod uninstall;
pub mod wanted;

use std::io;
use std::net::IpAddr;
use std::path::PathBuf;

use crate::config::NodeName;

pub use reconciler::Reconciler;
pub use wanted::{Desired, PodState, PodStatus, Status, Wanted};

/// Why traffic cannot be captured or released.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// The agent was built without kernel programs.
    #[error(
        "this build has no kernel programs in it; build it with `cargo xtask build` (object `{0}` is empty)"
    )]
    NoObject(&'static str),
    /// The kernel refuses a program or a map.
    #[error("kernel program `{program}`: {why}")]
    Program {
        /// The program's name.
        program: &'static str,
        /// The kernel's error.
        why: String,
    },
    /// A map cannot be read or written.
    #[error("kernel map `{map}`: {why}")]
    Map {
        /// The map's name.
        map: &'static str,
        /// The kernel's error.
        why: String,
    },
    /// A map that another version of this agent has pinned cannot be taken over.
    #[error(
        "kernel map `{map}`, pinned in {pins}, cannot be taken over: {why}; nothing is changed: start the \
         agent that pinned it, or run `dataplane uninstall` first, which lets go of all pods"
    )]
    OtherLayout {
        /// The map's name.
        map: &'static str,
        /// The folder in which it is pinned.
        pins: PathBuf,
        /// The difference.
        why: String,
    },
    /// Another agent serves this node.
    #[error("another dataplane agent already runs for this node: it holds {0}")]
    Held(PathBuf),
    /// A proxy of this node runs. Without capture its connections would leave in clear.
    #[error(
        "a proxy of this node runs (`dataplane proxy`), and its connections need capture: it holds {0}"
    )]
    Serves(PathBuf),
    /// Another agent's programs are attached where this one's would be.
    #[error(
        "{count} programs of another dataplane agent are attached to {to}, and not pinned in {pins}: end \
         and uninstall it first, with the --node, --run-dir and --bpffs that it was started with"
    )]
    Attached {
        /// The cgroup or namespace to which they are attached.
        to: String,
        /// Number of programs.
        count: usize,
        /// The folder in which this agent's programs are pinned.
        pins: PathBuf,
    },
    /// Attached programs cannot be detached.
    #[error("the programs of {pins} cannot be detached: {why}")]
    Detach {
        /// The folder in which they are pinned.
        pins: PathBuf,
        /// The kernel's error.
        why: String,
    },
    /// A folder that has the name of an agent's and is not one.
    #[error("{path} is not a dataplane agent's: {what}; nothing is changed")]
    NotOurs {
        /// The folder.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// The node's agent was started with other places.
    #[error("{0}; nothing is changed")]
    OtherPlace(String),
    /// Nothing is known of the node.
    #[error(
        "nothing of node {node} is known in {run_dir}{}; nothing is changed",
        listed(known)
    )]
    UnknownNode {
        /// The node's name.
        node: NodeName,
        /// The run folder.
        run_dir: PathBuf,
        /// The nodes that are known there.
        known: Vec<NodeName>,
    },
    /// Nothing is known of the node, but an agent has left something elsewhere on the machine.
    #[error(
        "nothing of node {node} is known in {run_dir}, nor pinned in {pins}; but {links} links of a dataplane \
         agent's programs are on this machine, and {namespaces} network namespaces have its rules: say the \
         --node, --run-dir and --bpffs that it was started with; nothing is changed"
    )]
    Elsewhere {
        /// The node's name.
        node: NodeName,
        /// The run folder.
        run_dir: PathBuf,
        /// The folder in which its programs would be pinned.
        pins: PathBuf,
        /// Number of links of an agent's programs.
        links: usize,
        /// Number of network namespaces that have its rules.
        namespaces: usize,
    },
    /// An error of a file or folder.
    #[error("{path}: {error}")]
    File {
        /// The file or folder.
        path: PathBuf,
        /// The error.
        error: io::Error,
    },
    /// An error in a pod's network namespace.
    #[error("cannot {what} in the pod's network namespace: {why}")]
    Namespace {
        /// What was attempted.
        what: &'static str,
        /// The kernel's error.
        why: String,
    },
    /// The process may not open as many files as a pod needs.
    #[error(
        "fewer than {needed} of the {limit} files that this process may open are left for it; raise the limit \
         (LimitNOFILE=, ulimit -n), or lower --connections"
    )]
    Files {
        /// How many it needs.
        needed: u64,
        /// How many the process may have open.
        limit: u64,
    },
    /// The mesh knows the pod by an address that it does not have.
    #[error("{0}, which the mesh knows the pod by, is on none of its interfaces")]
    NoAddress(IpAddr),
    /// The receiver of pod events is gone.
    #[error("the agent is stopping")]
    Stopping,
}

impl CaptureError {
    /// Returns the stable word for the error.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NoObject(_) => "no_object",
            Self::Program { .. } => "program",
            Self::Map { .. } => "map",
            Self::OtherLayout { .. } => "other_layout",
            Self::Held(_) => "held",
            Self::Serves(_) => "serves",
            Self::Attached { .. } => "attached",
            Self::Detach { .. } => "detach",
            Self::NotOurs { .. } => "not_ours",
            Self::OtherPlace(_) => "other_place",
            Self::UnknownNode { .. } => "unknown_node",
            Self::Elsewhere { .. } => "elsewhere",
            Self::File { .. } => "file",
            Self::Namespace { .. } => "namespace",
            Self::Files { .. } => "open_files",
            Self::NoAddress(_) => "no_address",
            Self::Stopping => "stopping",
        }
    }

    pub(crate) fn file(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |error| Self::File { path, error }
    }
}

fn listed(nodes: &[NodeName]) -> String {
    let names: Vec<&str> = nodes.iter().map(NodeName::as_str).collect();
    match names.as_slice() {
        [] => " (no node is)".into(),
        names => format!(" (known are: {})", names.join(", ")),
    }
}

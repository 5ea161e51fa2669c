//! Room 1: puts the kernel programs in place and keeps their maps true.
//!
//! Told by control which pods are wanted, it brings the machine there step by step
//! ([`reconcile::diff`] says which step is next), and tells how far each pod is. Door out: a
//! [`crate::seam::Lease`] of each; what its listeners accept has the original destination as its local
//! address.
//!
//! Whatever is changed on the machine is written down before it is changed, and whatever keeps
//! traffic captured is pinned: an agent that dies leaves its pods captured, and the next one takes
//! over.

pub mod attached;
pub mod definition;
pub mod dump;
pub mod enrol;
mod link;
pub mod maps;
pub mod node_folder;
pub mod pins;
pub mod programs;
pub mod reconcile;
pub mod repair;
pub mod room;
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

pub use room::Reconciler;
pub use wanted::{Desired, PodState, PodStatus, Status, Wanted};

/// Why traffic cannot be captured, or let go.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// The agent was built without kernel programs.
    #[error(
        "this build has no kernel programs in it; build it with `cargo xtask build` (object `{0}` is empty)"
    )]
    NoObject(&'static str),
    /// The kernel does not take a program or a map.
    #[error("kernel program `{program}`: {why}")]
    Program {
        /// Which.
        program: &'static str,
        /// What the kernel says.
        why: String,
    },
    /// A map cannot be read or written.
    #[error("kernel map `{map}`: {why}")]
    Map {
        /// Which.
        map: &'static str,
        /// What the kernel says.
        why: String,
    },
    /// A map that another version of this agent has pinned cannot be taken over.
    #[error(
        "kernel map `{map}`, pinned in {pins}, cannot be taken over: {why}; nothing is changed: start the \
         agent that pinned it, or run `dataplane uninstall` first, which lets go of all pods"
    )]
    OtherLayout {
        /// Which.
        map: &'static str,
        /// Where.
        pins: PathBuf,
        /// In what it differs.
        why: String,
    },
    /// Another agent serves this node.
    #[error("another dataplane agent already runs for this node: it holds {0}")]
    Held(PathBuf),
    /// Another agent's programs are attached where this one's would be.
    #[error(
        "{count} programs of another dataplane agent are attached to {to}, and not pinned in {pins}: end \
         and uninstall it first, with the --node, --run-dir and --bpffs that it was started with"
    )]
    Attached {
        /// To what.
        to: String,
        /// How many.
        count: usize,
        /// Where they would be pinned if they were this one's.
        pins: PathBuf,
    },
    /// What is attached cannot be detached.
    #[error("the programs of {pins} cannot be detached: {why}")]
    Detach {
        /// Where they are pinned.
        pins: PathBuf,
        /// What the kernel says.
        why: String,
    },
    /// A folder that has an agent's name and is not an agent's.
    #[error("{path} is not a dataplane agent's: {what}; nothing is changed")]
    NotOurs {
        /// Which.
        path: PathBuf,
        /// What it is.
        what: String,
    },
    /// A node's agent was started with other places.
    #[error("{0}; nothing is changed")]
    OtherPlace(String),
    /// Nothing is known of a node.
    #[error(
        "nothing of node {node} is known in {run_dir}{}; nothing is changed",
        listed(known)
    )]
    UnknownNode {
        /// Which.
        node: NodeName,
        /// Where it would be.
        run_dir: PathBuf,
        /// Those that are known.
        known: Vec<NodeName>,
    },
    /// Nothing is known of a node, and there are things of an agent elsewhere on the machine.
    #[error(
        "nothing of node {node} is known in {run_dir}, nor pinned in {pins}; but {links} links of a dataplane \
         agent's programs are on this machine, and {namespaces} network namespaces have its rules: say the \
         --node, --run-dir and --bpffs that it was started with; nothing is changed"
    )]
    Elsewhere {
        /// Which.
        node: NodeName,
        /// Where it would be.
        run_dir: PathBuf,
        /// Where its programs would be pinned.
        pins: PathBuf,
        /// How many links of an agent's programs there are.
        links: usize,
        /// In how many network namespaces its rules are.
        namespaces: usize,
    },
    /// A file or folder of the agent's own.
    #[error("{path}: {error}")]
    File {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        error: io::Error,
    },
    /// Something in a pod's network namespace.
    #[error("cannot {what} in the pod's network namespace: {why}")]
    Namespace {
        /// What was to be done.
        what: &'static str,
        /// What the kernel says.
        why: String,
    },
    /// The mesh knows a pod by an address that it does not have.
    #[error("{0}, which the mesh knows the pod by, is on none of its interfaces")]
    NoAddress(IpAddr),
    /// The rooms behind this one are gone.
    #[error("the agent is stopping")]
    Stopping,
}

impl CaptureError {
    /// The stable word for it.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NoObject(_) => "no_object",
            Self::Program { .. } => "program",
            Self::Map { .. } => "map",
            Self::OtherLayout { .. } => "other_layout",
            Self::Held(_) => "held",
            Self::Attached { .. } => "attached",
            Self::Detach { .. } => "detach",
            Self::NotOurs { .. } => "not_ours",
            Self::OtherPlace(_) => "other_place",
            Self::UnknownNode { .. } => "unknown_node",
            Self::Elsewhere { .. } => "elsewhere",
            Self::File { .. } => "file",
            Self::Namespace { .. } => "namespace",
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

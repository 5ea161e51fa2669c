//! What `dataplane status` shows, as it is on the admin socket.

use serde::{Deserialize, Serialize};

/// The state of a node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatusReport {
    /// The node's name.
    pub node: String,
    /// The daemon's version.
    pub version: String,
    /// Its pods.
    pub pods: Vec<PodStatus>,
    /// How many policies there are: AuthorizationPolicies and PeerAuthentications.
    pub policies: usize,
    /// What is wrong with the configuration, and what holds instead.
    pub problems: Vec<String>,
    /// What the kernel programs counted.
    pub counters: Vec<(String, u64)>,
}

/// A pod of the node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodStatus {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// The workload's uid.
    pub uid: String,
    /// `up`, `broken`, `waiting`, `draining` or `ignored`.
    pub state: String,
    /// Why it is not up.
    pub reason: Option<String>,
    /// Its addresses.
    pub addresses: Vec<String>,
    /// The cookie of its network namespace.
    pub netns: Option<u64>,
    /// Its cgroup.
    pub cgroup: Option<String>,
    /// Processes of its network namespace that are outside of its cgroup.
    pub outside: usize,
    /// Those of them whose connections are not captured, since they are outside of the pods' cgroup too.
    pub in_clear: usize,
    /// Whether it forwards between its interfaces: what it does for others is not captured.
    pub forwards: bool,
}

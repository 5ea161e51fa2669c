//! The data of `dataplane status`, as the admin socket serves it.

use serde::{Deserialize, Serialize};

/// The states of a pod.
pub const POD_STATES: [&str; 5] = ["up", "broken", "waiting", "draining", "ignored"];

/// The state of a node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatusReport {
    /// The node's name.
    pub node: String,
    /// The daemon's version.
    pub version: String,
    /// Its pods.
    pub pods: Vec<PodStatus>,
    /// Number of policies that are enforced: AuthorizationPolicies and PeerAuthentications.
    pub policies: usize,
    /// Number of policies that are not enforced; `problems` says why.
    #[serde(default)]
    pub policies_not_enforced: usize,
    /// Number of manifests whose content is not accepted; `problems` says why.
    #[serde(default)]
    pub manifests_refused: usize,
    /// Problems of the configuration, each with what applies instead.
    pub problems: Vec<String>,
    /// Counters of the kernel programs.
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
    /// One of [`POD_STATES`].
    pub state: String,
    /// The reason why it is not up.
    pub reason: Option<String>,
    /// Its addresses.
    pub addresses: Vec<String>,
    /// The cookie of its network namespace.
    pub netns: Option<u64>,
    /// Its cgroup.
    pub cgroup: Option<String>,
    /// Number of processes in its network namespace that are outside of its cgroup.
    pub outside: usize,
    /// Number of these that are outside of the pods' cgroup too, so that their connections are not captured.
    pub in_clear: usize,
    /// `true` if it forwards between its interfaces: traffic that it forwards for others is not captured.
    pub forwards: bool,
}

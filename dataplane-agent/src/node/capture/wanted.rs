//! The pods that control wants captured, and the status that capture publishes.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use crate::mesh::Identity;
use crate::sys::cgroup::CgroupId;
use crate::sys::netns::Netns;

/// A pod that is to be captured.
#[derive(Clone, Debug)]
pub struct Desired {
    /// The workload's uid.
    pub uid: Arc<str>,
    /// The pod's Kubernetes namespace.
    pub namespace: Arc<str>,
    /// The pod's name.
    pub name: Arc<str>,
    /// The pod's SPIFFE identity.
    pub identity: Identity,
    /// The addresses by which the mesh knows the pod.
    pub addresses: Vec<IpAddr>,
    /// The pod's network namespace.
    pub netns: Netns,
    /// The cookie of that network namespace.
    pub cookie: u64,
    /// The pod's own cgroups: at least one, and more may come.
    pub groups: Vec<CgroupId>,
}

impl Desired {
    /// Returns `true` if a pod that is served as `self` need not be enrolled anew to be served as `other`.
    pub fn same_identity_and_addresses(&self, other: &Self) -> bool {
        self.uid == other.uid
            && self.identity == other.identity
            && self.addresses == other.addresses
    }

    /// Returns the pod's identity as its record has it.
    pub fn identity_text(&self) -> Arc<str> {
        self.identity.to_string().into()
    }
}

/// All that control wants of capture.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// The wanted pods that were found.
    pub pods: Vec<Desired>,
    /// The uids of wanted pods that were not found.
    pub unlocated: BTreeSet<Arc<str>>,
    /// Cookies of network namespaces that are gone.
    pub gone: BTreeSet<u64>,
}

/// The status of one pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodStatus {
    /// The workload's uid.
    pub uid: Arc<str>,
    /// The inode number of the pod's network namespace.
    pub inode: u64,
    /// The id of the pod's first cgroup; 0 if unknown.
    pub cgroup: u64,
    /// When it was first enrolled in this namespace, in hundredths of a second since the boot; 0 if unknown.
    pub enrolled: u64,
    /// How far the pod is.
    pub state: PodState,
    /// `true` if the pod forwards between its interfaces, as of the last look. Forwarded traffic is not captured.
    pub forwards: bool,
}

/// How far one pod is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PodState {
    /// Left by a predecessor, or no longer served by this agent, and not enrolled again yet.
    Unserved {
        /// `true` if the kernel captures the pod.
        captured: bool,
    },
    /// Captured and served.
    Up,
    /// Served, but a part of its capture is lost and cannot be restored. That is tried again.
    Broken {
        /// The error of the last look.
        why: String,
    },
    /// No longer captured; its connections go on.
    Draining,
    /// The pod cannot be captured or served; that is tried again. A captured pod stays captured.
    Failed {
        /// The last error.
        why: String,
        /// `true` if the kernel captures the pod all the same.
        captured: bool,
    },
}

/// The status of each pod by the cookie of its network namespace: two pods of one name may exist at once.
pub type Status = BTreeMap<u64, PodStatus>;

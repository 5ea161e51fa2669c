//! What control wants of capture, and what capture tells it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use crate::mesh::Identity;
use crate::sys::cgroup::CgroupId;
use crate::sys::netns::Netns;

/// A pod that shall be captured.
#[derive(Clone, Debug)]
pub struct Desired {
    /// The workload's uid.
    pub uid: Arc<str>,
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
    /// Who it is.
    pub identity: Identity,
    /// The addresses that the mesh knows it by.
    pub addresses: Vec<IpAddr>,
    /// Its network namespace.
    pub netns: Netns,
    /// That namespace's cookie.
    pub cookie: u64,
    /// The cgroups that are its alone: one at the least, and more may come.
    pub groups: Vec<CgroupId>,
}

impl Desired {
    /// Whether the other says the same of the pod as it is served.
    pub fn same_identity_and_addresses(&self, other: &Self) -> bool {
        self.uid == other.uid
            && self.identity == other.identity
            && self.addresses == other.addresses
    }
}

/// What control wants.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// Pods that were found.
    pub pods: Vec<Desired>,
    /// The uids of those that are wanted and were not found.
    pub unlocated: BTreeSet<Arc<str>>,
    /// Cookies of network namespaces that are gone.
    pub gone: BTreeSet<u64>,
}

/// How far one pod is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodStatus {
    /// The workload's uid.
    pub uid: Arc<str>,
    /// The inode number of its network namespace.
    pub inode: u64,
    /// Its cgroup's id.
    pub cgroup: u64,
    /// How far it is.
    pub state: PodState,
    /// Whether it forwards between its interfaces, as far as it was looked at: that is not captured.
    pub forwards: bool,
}

/// How far one pod is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PodState {
    /// Taken over from a predecessor, or from what it was before; not served by anybody yet.
    Unserved {
        /// Whether it is captured.
        captured: bool,
    },
    /// Captured and served.
    Up,
    /// Served, and something that keeps it captured is gone and cannot be put back. It is tried again.
    Broken {
        /// What the kernel says.
        why: String,
    },
    /// No longer captured; what runs goes on.
    Draining,
    /// It cannot be captured or served, and why; it is tried again. One that was captured stays so.
    Failed {
        /// What went wrong.
        why: String,
        /// Whether it is captured all the same.
        captured: bool,
    },
}

/// How far each pod is, by the cookie of its network namespace: two of one name may be there at once.
pub type Status = BTreeMap<u64, PodStatus>;

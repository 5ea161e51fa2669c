//! A service: virtual addresses, ports, and how load is spread over its endpoints.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use super::workload::Workload;

/// What the mesh knows of one service. Field meanings are those of `istio.workload.Service`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// The object's name.
    pub name: Arc<str>,
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its host name, `<name>.<namespace>.svc.<cluster domain>`.
    pub hostname: Arc<str>,
    /// Its virtual addresses; none for a headless service.
    pub vips: Vec<IpAddr>,
    /// Service port to target port; 0 where the target is named, and each endpoint knows its own.
    pub ports: BTreeMap<u16, u16>,
    /// Further identities (SPIFFE URIs) that an endpoint may present.
    pub subject_alt_names: Vec<Arc<str>>,
    /// The waypoint that traffic to it must pass, `namespace/hostname` or `network/ip`.
    pub waypoint: Option<Arc<str>>,
    /// Whether endpoints that are not healthy take load too.
    pub publish_not_ready: bool,
    /// Where endpoints are looked for first.
    pub load_balancing: LoadBalancing,
}

/// How endpoints are preferred by where they are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LoadBalancing {
    /// Scopes, the widest first.
    pub preferences: Vec<Scope>,
    /// Endpoints that match not all of them take no load at all.
    pub strict: bool,
}

/// What two workloads may have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// The same region.
    Region,
    /// The same zone.
    Zone,
    /// The same subzone.
    Subzone,
    /// The same node.
    Node,
    /// The same cluster.
    Cluster,
    /// The same network.
    Network,
}

impl Scope {
    /// Whether two workloads have this in common.
    pub fn shared(self, one: &Workload, other: &Workload) -> bool {
        match self {
            Self::Region => one.locality.region == other.locality.region,
            Self::Zone => one.locality.zone == other.locality.zone,
            Self::Subzone => one.locality.subzone == other.locality.subzone,
            Self::Node => one.node == other.node,
            Self::Cluster => one.cluster_id == other.cluster_id,
            Self::Network => one.network == other.network,
        }
    }
}

impl Service {
    /// Its key, `namespace/hostname`.
    pub fn key(&self) -> String {
        format!("{}/{}", self.namespace, self.hostname)
    }
}

//! A service: virtual addresses, ports, and how load is spread over its endpoints.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use time::OffsetDateTime;

use super::workload::Workload;

/// What the mesh knows of one service. Field meanings are those of `istio.workload.Service`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Service {
    /// The object's name.
    pub name: Arc<str>,
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its host name, `<name>.<namespace>.svc.<cluster domain>`.
    pub hostname: Arc<str>,
    /// Its virtual addresses; none for a headless service.
    pub vips: Vec<NetworkAddress>,
    /// Addresses of load balancers that lead to it. Not its alone: its own ports at them are.
    pub balanced: Vec<NetworkAddress>,
    /// Other addresses from outside that it claims; the same holds of them.
    pub external: Vec<NetworkAddress>,
    /// Whole ranges of virtual addresses, by their network. They cannot be carried: refused.
    pub cidrs: Vec<(Arc<str>, IpNet)>,
    /// Service port to target port; 0 where the target is named, and each endpoint knows its own.
    pub ports: BTreeMap<u16, u16>,
    /// Further identities (SPIFFE URIs) that an endpoint may present.
    pub subject_alt_names: Vec<Arc<str>>,
    /// The waypoint that traffic to it must pass, `namespace/hostname` or `network/ip`.
    pub waypoint: Option<Arc<str>>,
    /// Whether endpoints that are not healthy take load too.
    pub publish_not_ready: bool,
    /// The family of addresses at which endpoints are reached; both if none is named.
    pub family: Option<Family>,
    /// Whether clients of its own namespace alone may use it.
    pub private: bool,
    /// Whether it is preferred to others at one address.
    pub canonical: bool,
    /// Of several that claim one address the oldest holds.
    pub age: Age,
    /// What it asks for and cannot get: traffic to it is refused.
    pub unsupported: Option<Arc<str>>,
    /// Where endpoints are looked for first.
    pub load_balancing: LoadBalancing,
}

/// Creation, or when it was first seen where nothing says it; the lesser is the older.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Age {
    at: OffsetDateTime,
    order: u64,
}

impl Default for Age {
    fn default() -> Self {
        Self::new(OffsetDateTime::UNIX_EPOCH, 0)
    }
}

impl Age {
    /// `order` parts those of one time.
    pub fn new(at: OffsetDateTime, order: u64) -> Self {
        Self { at, order }
    }
}

/// An address, which means nothing without its network.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NetworkAddress {
    /// The network; empty for the only one.
    pub network: Arc<str>,
    /// The address in it.
    pub address: IpAddr,
}

impl fmt::Display for NetworkAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.address)
    }
}

/// A family of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Whether an address is of the family.
    pub fn has(self, address: &IpAddr) -> bool {
        address.is_ipv4() == (self == Self::V4)
    }
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
    /// What a workload has of it.
    pub fn of(self, workload: &Workload) -> &Arc<str> {
        match self {
            Self::Region => &workload.locality.region,
            Self::Zone => &workload.locality.zone,
            Self::Subzone => &workload.locality.subzone,
            Self::Node => &workload.node,
            Self::Cluster => &workload.cluster_id,
            Self::Network => &workload.network,
        }
    }
}

impl Service {
    /// Its key, `namespace/hostname`.
    pub fn key(&self) -> String {
        format!("{}/{}", self.namespace, self.hostname)
    }
    /// Whether clients of a namespace may use it.
    pub fn is_visible_to(&self, namespace: &str) -> bool {
        !self.private || *self.namespace == *namespace
    }
    /// Whether its endpoints may be reached at an address.
    pub fn allows(&self, address: &IpAddr) -> bool {
        self.family.is_none_or(|family| family.has(address))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// One of namespace `ns` without addresses, with port 80 for 8080.
    pub(crate) fn service(name: &str) -> Service {
        Service {
            name: name.into(),
            namespace: "ns".into(),
            hostname: format!("{name}.ns.svc.cluster.local").into(),
            ports: BTreeMap::from([(80, 8080)]),
            ..Service::default()
        }
    }
}

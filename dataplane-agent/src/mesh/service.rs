//! A service: virtual addresses, ports, and how load is spread over its endpoints.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use time::OffsetDateTime;

use super::workload::Workload;

/// A service. Fields mean what they mean in `istio.workload.Service`.
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
    /// Addresses of load balancers that lead to it. Services share them: each owns only its ports there.
    pub balanced: Vec<NetworkAddress>,
    /// Other external addresses that it claims; it owns only its ports there too.
    pub external: Vec<NetworkAddress>,
    /// Ranges of virtual addresses, each with its network. Connections to them are refused.
    pub cidrs: Vec<(Arc<str>, IpNet)>,
    /// Service port to target port; 0 if the target port is a name, which each endpoint resolves itself.
    pub ports: BTreeMap<u16, u16>,
    /// Additional identities (SPIFFE URIs) that an endpoint may present.
    pub subject_alt_names: Vec<Arc<str>>,
    /// The waypoint that traffic to it must pass, `namespace/hostname` or `network/ip`.
    pub waypoint: Option<Arc<str>>,
    /// `true` if unhealthy endpoints take load too.
    pub publish_not_ready: bool,
    /// The address family by which endpoints are reached; `None` for both.
    pub family: Option<Family>,
    /// `true` if only clients of its own namespace may use it.
    pub private: bool,
    /// `true` if it is preferred among services with the same address.
    pub canonical: bool,
    /// Its age: the oldest service that claims an address owns it.
    pub age: Age,
    /// A feature that it asks for and that is not supported; traffic to it is refused then.
    pub unsupported: Option<Arc<str>>,
    /// How its endpoints are preferred by locality.
    pub load_balancing: LoadBalancing,
}

/// The time of creation, or of the first sight if that is unknown; the lesser is the older.
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
    /// `order` decides between objects of the same time.
    pub fn new(at: OffsetDateTime, order: u64) -> Self {
        Self { at, order }
    }
}

/// An address in a network; the same address may mean something else in another network.
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

/// An address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Returns `true` if an address is of this family.
    pub fn has(self, address: &IpAddr) -> bool {
        address.is_ipv4() == (self == Self::V4)
    }
}

/// How endpoints are preferred by locality.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LoadBalancing {
    /// The scopes that are compared, the widest first.
    pub preferences: Vec<Scope>,
    /// `true` if only endpoints that match all preferences take load.
    pub strict: bool,
}

/// A property by which the locality of two workloads is compared.
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
    /// Returns a workload's value of this property.
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
    /// Returns its key, `namespace/hostname`.
    pub fn key(&self) -> String {
        format!("{}/{}", self.namespace, self.hostname)
    }
    /// Returns `true` if clients of a namespace may use it.
    pub fn is_visible_to(&self, namespace: &str) -> bool {
        !self.private || *self.namespace == *namespace
    }
    /// Returns `true` if its endpoints may be reached at an address of this family.
    pub fn allows(&self, address: &IpAddr) -> bool {
        self.family.is_none_or(|family| family.has(address))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Returns a service of namespace `ns` without addresses, with port 80 for 8080.
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

//! A workload: one pod, or one address that an EndpointSlice names without a pod.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use crate::mesh::Identity;

/// A workload. Fields mean what they mean in `istio.workload.Workload`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Unique in the mesh: `<cluster>//Pod/<namespace>/<name>`.
    pub uid: Arc<str>,
    /// The pod's name.
    pub name: Arc<str>,
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its service account.
    pub service_account: Arc<str>,
    /// Its trust domain, `cluster.local` unless set.
    pub trust_domain: Arc<str>,
    /// The node that it runs on; empty if unknown.
    pub node: Arc<str>,
    /// The cluster that it belongs to.
    pub cluster_id: Arc<str>,
    /// The network that its addresses belong to; empty for the only one.
    pub network: Arc<str>,
    /// The gateway through which other networks reach it, `namespace/hostname` or `network/ip`.
    pub network_gateway: Option<Arc<str>>,
    /// Its addresses, IPv4 and IPv6, in the order of `status.podIPs`.
    pub addresses: Vec<IpAddr>,
    /// The protocol that it is reached by.
    pub protocol: Protocol,
    /// `true` if it shares its node's network namespace; its addresses do not identify it then.
    pub host_network: bool,
    /// Its own health. For a service the health of its [`Endpoint`] counts instead.
    pub health: Health,
    /// The name of the object that owns it, or its own.
    pub workload_name: Arc<str>,
    /// The kind of object that owns it.
    pub workload_type: WorkloadType,
    /// `service.name` in telemetry.
    pub canonical_name: Arc<str>,
    /// `service.version` in telemetry.
    pub canonical_revision: Arc<str>,
    /// The waypoint that traffic to its address must pass, `namespace/hostname` or `network/ip`.
    pub waypoint: Option<Arc<str>>,
    /// Keys (`namespace/name`) of the policies that select it.
    pub policies: Arc<[Arc<str>]>,
    /// The services that it is an endpoint of.
    pub services: Arc<Services>,
    /// The region, zone and subzone that it runs in.
    pub locality: Arc<Locality>,
    /// Its weight among endpoints; 0 takes no load.
    pub capacity: u32,
    /// A feature that its app asks for and that is not supported; no connection is made to it then.
    pub unsupported: Option<Arc<str>>,
}

/// Services by their keys, `namespace/hostname`.
pub type Services = BTreeMap<Arc<str>, Endpoint>;

/// Service port to target port.
pub type Ports = BTreeMap<u16, u16>;

/// A workload's part in one service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Endpoint {
    /// The target port of each port of the service.
    pub ports: Arc<Ports>,
    /// Its health as an endpoint of this service.
    pub health: Health,
}

/// The health of an endpoint, ordered from worst to best.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Health {
    /// It takes no load.
    Unhealthy,
    /// It is shutting down but still serves: it takes load if no healthy endpoint does (KEP-1669).
    Terminating,
    /// It takes load.
    #[default]
    Healthy,
}

/// The protocol that a workload is reached by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub enum Protocol {
    /// Plaintext TCP, on the requested port.
    #[default]
    #[serde(rename = "TCP")]
    Tcp,
    /// HBONE, on port 15008.
    #[serde(rename = "HBONE")]
    Hbone,
}

/// The kind of object that owns a workload; written in lower case in `baggage`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WorkloadType {
    /// A Deployment.
    Deployment,
    /// A CronJob.
    CronJob,
    /// A bare pod, or anything else.
    #[default]
    Pod,
    /// A Job.
    Job,
}

/// Region, zone and subzone; empty where unknown.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Locality {
    /// `topology.kubernetes.io/region` of the node.
    pub region: Arc<str>,
    /// `topology.kubernetes.io/zone` of the node.
    pub zone: Arc<str>,
    /// `topology.istio.io/subzone` of the node.
    pub subzone: Arc<str>,
}

impl Workload {
    /// Returns the identity that its certificate carries.
    pub fn identity(&self) -> Identity {
        Identity::new(&self.trust_domain, &self.namespace, &self.service_account)
    }

    /// Returns true if that is its identity.
    pub fn is(&self, identity: &Identity) -> bool {
        *self.trust_domain == *identity.trust_domain()
            && *self.namespace == *identity.namespace()
            && *self.service_account == *identity.service_account()
    }
}

/// Returns the `<namespace>/<name>` in a pod's uid, for logs; any other uid as it is.
pub fn named(uid: &str) -> &str {
    uid.split_once("//Pod/").map_or(uid, |(_, name)| name)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Returns a pod of namespace `ns` at 10.0.0.1, selected by `policies`.
    pub(crate) fn workload(policies: &[&str]) -> Workload {
        Workload {
            uid: "c//Pod/ns/pod".into(),
            name: "pod".into(),
            namespace: "ns".into(),
            service_account: "sa".into(),
            trust_domain: "td".into(),
            node: "node".into(),
            cluster_id: "c".into(),
            network: "".into(),
            network_gateway: None,
            addresses: vec![IpAddr::from([10, 0, 0, 1])],
            protocol: Protocol::Hbone,
            host_network: false,
            health: Health::Healthy,
            workload_name: "pod".into(),
            workload_type: WorkloadType::Pod,
            canonical_name: "pod".into(),
            canonical_revision: "latest".into(),
            waypoint: None,
            policies: policies.iter().map(|key| Arc::from(*key)).collect(),
            services: Arc::default(),
            locality: Arc::default(),
            capacity: 1,
            unsupported: None,
        }
    }
}

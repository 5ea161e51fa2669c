//! EndpointSlices: the endpoints of services without a selector, and those that are not pods.

use std::net::IpAddr;
use std::num::NonZeroU16;

use serde::Deserialize;

use super::object::wrong;
use super::service::Protocol;
use super::yaml::{Node, NodeError};
use crate::control::ip::Address;
use crate::mesh::workload::Health;

/// The label with the name of the slice's service.
pub const SERVICE_LABEL: &str = "kubernetes.io/service-name";

/// The fields of an EndpointSlice that are read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointSlice {
    /// The endpoints; none if they are host names.
    pub endpoints: Vec<Endpoint>,
    /// TCP ports: name, and number at the endpoint.
    pub ports: Vec<(String, u16)>,
}

/// An endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Its readiness.
    pub health: Health,
    /// The pod that it refers to.
    pub pod: Option<PodRef>,
    /// `true` if it refers to an object other than a pod.
    pub other_object: bool,
    /// Its node.
    pub node: Option<String>,
}

/// A reference to a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodRef {
    /// Its namespace; empty for the slice's.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its uid; empty if any will do.
    pub uid: String,
}

impl EndpointSlice {
    pub(crate) fn read(node: &Node) -> Result<Self, NodeError> {
        let raw: Raw = node.read()?;
        let by_name = raw.address_type.as_deref() == Some("FQDN");
        let mut endpoints = Vec::new();
        for (at, endpoint) in raw.endpoints.into_iter().enumerate() {
            if by_name {
                continue;
            }
            let mut addresses = Vec::new();
            for (nth, address) in endpoint.addresses.iter().enumerate() {
                let path = format!("endpoints[{at}].addresses[{nth}]");
                let Address(read) = address
                    .parse()
                    .map_err(|what| wrong(node, &path, format_args!("`{address}` {what}")))?;
                addresses.push(read);
            }
            let target = endpoint.target_ref;
            let is_pod = target
                .as_ref()
                .is_some_and(|target| target.kind.as_deref() == Some("Pod"));
            endpoints.push(Endpoint {
                addresses,
                health: endpoint.conditions.unwrap_or_default().health(),
                other_object: target.is_some() && !is_pod,
                pod: target.filter(|_| is_pod).map(|target| PodRef {
                    namespace: target.namespace.unwrap_or_default(),
                    name: target.name.unwrap_or_default(),
                    uid: target.uid.unwrap_or_default(),
                }),
                node: endpoint.node_name,
            });
        }
        let ports = raw
            .ports
            .into_iter()
            .filter(|port| port.protocol == Protocol::Tcp)
            .filter_map(|port| Some((port.name.unwrap_or_default(), port.port?.get())))
            .collect();
        Ok(Self { endpoints, ports })
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Raw {
    address_type: Option<String>,
    #[serde(default)]
    endpoints: Vec<RawEndpoint>,
    #[serde(default)]
    ports: Vec<RawPort>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawEndpoint {
    addresses: Vec<String>,
    conditions: Option<Conditions>,
    target_ref: Option<TargetRef>,
    node_name: Option<String>,
}

#[derive(Default, Deserialize)]
struct Conditions {
    ready: Option<bool>,
    serving: Option<bool>,
    terminating: Option<bool>,
}

impl EndpointSlice {
    /// Returns `true` if it has endpoints that do not refer to pods of its namespace: they may be pods of any
    /// namespace, by their addresses.
    pub(crate) fn is_by_hand(&self, namespace: &str) -> bool {
        let is = |endpoint: &Endpoint| match &endpoint.pod {
            Some(pod) => !pod.namespace.is_empty() && pod.namespace != namespace,
            None => !endpoint.other_object,
        };
        self.endpoints.iter().any(is)
    }
}

impl Conditions {
    /// Derives the health. `ready` counts as true if it is missing, except for a terminating endpoint; `serving`
    /// counts as `ready` then.
    fn health(&self) -> Health {
        let terminating = self.terminating == Some(true);
        let ready = self.ready.unwrap_or(!terminating);
        let serving = self.serving.unwrap_or(self.ready != Some(false));
        match (ready, terminating && serving) {
            (true, _) => Health::Healthy,
            (false, true) => Health::Terminating,
            (false, false) => Health::Unhealthy,
        }
    }
}

#[derive(Deserialize)]
struct TargetRef {
    kind: Option<String>,
    namespace: Option<String>,
    name: Option<String>,
    uid: Option<String>,
}

#[derive(Deserialize)]
struct RawPort {
    name: Option<String>,
    port: Option<NonZeroU16>,
    #[serde(default)]
    protocol: Protocol,
}

//! Kubernetes Services: the fields that are read, and parts of the store type.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::num::NonZeroU16;

use serde::{Deserialize, Deserializer, de};

use super::object::{Objects, Resource, wrong};
use super::pod::Pod;
use super::spelling::{DISTRIBUTION, is_distribution};
use super::yaml::{Node, NodeError};
use crate::control::ip::Address;
use crate::mesh::service::{Family, LoadBalancing, Scope};

/// The fields of a Service that are read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// `true` for a Service of type ExternalName, a mere alias: it is not supported.
    pub external: bool,
    /// Its addresses; none if it is headless.
    pub vips: Vec<IpAddr>,
    /// `true` if its `clusterIP` is `None`.
    pub headless: bool,
    /// Labels of its pods; empty if its EndpointSlices name its endpoints.
    pub selector: BTreeMap<String, String>,
    /// Its TCP ports.
    pub ports: Vec<ServicePort>,
    /// `true` if endpoints that are not ready get connections too.
    pub publish_not_ready: bool,
    /// `internalTrafficPolicy: Local`.
    pub node_local: bool,
    /// `trafficDistribution`.
    pub distribution: Option<String>,
    /// Addresses of its load balancers.
    pub ingress: Vec<IpAddr>,
    /// `externalIPs`.
    pub external_ips: Vec<IpAddr>,
    /// The address family of its endpoints; `None` if it may have both.
    pub family: Option<Family>,
    /// Settings that are not honoured, and what happens instead.
    pub notes: Vec<String>,
}

/// The protocol of a port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Protocol {
    /// TCP, the only one that is supported.
    #[default]
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

/// A port of a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// Its name; empty if it is the only one.
    pub name: String,
    /// The port that clients connect to.
    pub port: u16,
    /// The port that the pod listens on.
    pub target: Target,
}

/// A port of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// A port number.
    Number(u16),
    /// A port's name in the pod's containers.
    Name(String),
}

impl Service {
    pub(crate) fn read(node: &Node) -> Result<Self, NodeError> {
        let Raw { spec, status } = node.read()?;
        let outside = Outside::read(node, &spec, &status.unwrap_or_default())?;
        let external = spec.kind.as_deref() == Some("ExternalName");
        let mut addresses = spec.cluster_ips;
        if let (true, Some(address)) = (addresses.is_empty(), spec.cluster_ip) {
            addresses.push(address);
        }
        let mut ports: Vec<ServicePort> = Vec::new();
        for (at, port) in spec.ports.into_iter().enumerate() {
            if port.protocol != Protocol::Tcp {
                continue;
            }
            let number = port.port.get();
            if ports.iter().any(|known| known.port == number) {
                let what = format_args!("port {number} is there twice");
                return Err(wrong(node, &format!("spec.ports[{at}].port"), what));
            }
            ports.push(ServicePort {
                name: port.name.unwrap_or_default(),
                port: number,
                target: port.target_port.unwrap_or(Target::Number(number)),
            });
        }
        Ok(Self {
            external,
            headless: addresses.contains(&ClusterIp::None),
            vips: addresses
                .into_iter()
                .filter_map(ClusterIp::address)
                .collect(),
            selector: spec.selector,
            ports,
            publish_not_ready: spec.publish_not_ready_addresses,
            node_local: spec.internal_traffic_policy == Some(TrafficPolicy::Local),
            distribution: spec.traffic_distribution,
            ingress: outside.ingress,
            external_ips: outside.external_ips,
            family: match spec.ip_families.as_slice() {
                [IpFamily::IPv4] => Some(Family::V4),
                [IpFamily::IPv6] => Some(Family::V6),
                _ => None,
            },
            notes: outside.notes,
        })
    }

    /// Returns the pod's port for each of its ports, without those whose target name the pod does not have.
    pub fn ports_in(&self, pod: &Pod) -> BTreeMap<u16, u16> {
        let target = |port: &ServicePort| match &port.target {
            Target::Number(number) => Some(*number),
            Target::Name(name) => pod.named_port(name),
        };
        self.ports
            .iter()
            .filter_map(|port| Some((port.port, target(port)?)))
            .collect()
    }

    /// Returns its ports as the store has them: the target port of each port, or 0 for a name.
    pub fn port_map(&self) -> BTreeMap<u16, u16> {
        let target = |port: &ServicePort| match port.target {
            Target::Number(number) => number,
            Target::Name(_) => 0,
        };
        self.ports
            .iter()
            .map(|port| (port.port, target(port)))
            .collect()
    }
}

/// Addresses at which a service is reached from outside the cluster.
struct Outside {
    ingress: Vec<IpAddr>,
    external_ips: Vec<IpAddr>,
    notes: Vec<String>,
}

impl Outside {
    fn read(node: &Node, spec: &Spec, status: &Status) -> Result<Self, NodeError> {
        let mut notes = Vec::new();
        let mut ingress = Vec::new();
        for (at, found) in status.load_balancer.ingress.iter().enumerate() {
            let path = format!("status.loadBalancer.ingress[{at}]");
            let Some(Address(address)) = found.ip else {
                continue;
            };
            special(node, &format!("{path}.ip"), &address)?;
            if found.ip_mode == Some(IpMode::Proxy) {
                notes.push(format!("{path}.ipMode Proxy: {address} is not taken for it, and goes to its load balancer in clear"));
            } else if !spec.load_balancer_source_ranges.is_empty() {
                notes.push(format!("spec.loadBalancerSourceRanges: {address} is not taken for it, and goes to its load balancer in clear"));
            } else {
                ingress.push(address);
            }
        }
        for (at, Address(address)) in spec.external_ips.iter().enumerate() {
            special(node, &format!("spec.externalIPs[{at}]"), address)?;
        }
        let mut external_ips: Vec<IpAddr> = spec.external_ips.iter().map(|ip| ip.0).collect();
        let headless = spec
            .cluster_ip
            .as_ref()
            .into_iter()
            .chain(&spec.cluster_ips);
        if headless.into_iter().any(|ip| *ip == ClusterIp::None)
            && !(external_ips.is_empty() && ingress.is_empty())
        {
            notes
                .push("spec.externalIPs, status.loadBalancer: lead nowhere, it is headless".into());
            external_ips.clear();
            ingress.clear();
        }
        if spec.session_affinity == Some(Affinity::ClientIp) {
            notes.push(
                "spec.sessionAffinity ClientIP: is not kept, each connection goes to any endpoint"
                    .into(),
            );
        }
        let annotations = node
            .field("metadata")
            .and_then(|meta| meta.field("annotations"));
        let annotation = annotations.and_then(|all| all.field(DISTRIBUTION)?.text());
        let said = match &spec.traffic_distribution {
            Some(word) => Some(("spec.trafficDistribution", word.as_str())),
            None => annotation.map(|word| (DISTRIBUTION, word)),
        };
        if let Some((at, other)) = said.filter(|(_, word)| !is_distribution(word)) {
            notes.push(format!(
                "{at}: `{other}` is not known, endpoints are taken from everywhere"
            ));
        }
        Ok(Self {
            ingress,
            external_ips,
            notes,
        })
    }
}

/// Refuses an unspecified, loopback, multicast or link-local address, as the API server does.
fn special(node: &Node, path: &str, address: &IpAddr) -> Result<(), NodeError> {
    let link_local = match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    if address.is_unspecified() || address.is_loopback() || address.is_multicast() || link_local {
        let what = format_args!("`{address}` is no address from outside");
        return Err(wrong(node, path, what));
    }
    Ok(())
}

/// Returns the scopes in which a service's endpoints are preferred.
pub(crate) fn load_balancing(service: &Resource<Service>, objects: &Objects) -> LoadBalancing {
    if service.body.node_local {
        return LoadBalancing {
            preferences: vec![Scope::Node],
            strict: true,
        };
    }
    let namespace = super::object::Key {
        namespace: "".into(),
        name: service.meta.key.namespace.clone(),
    };
    let of_namespace = || {
        objects
            .namespaces
            .get(&namespace)?
            .meta
            .annotation(DISTRIBUTION)
    };
    let distribution = service
        .body
        .distribution
        .as_deref()
        .or_else(|| service.meta.annotation(DISTRIBUTION))
        .or_else(of_namespace);
    // A word in other letter case than Kubernetes' own is valid in the annotation: see `spelling`.
    let mut preferences = Vec::new();
    if distribution.is_some_and(is_distribution) {
        preferences.extend([Scope::Network, Scope::Region, Scope::Zone]);
    }
    if distribution.is_some_and(|word| word.eq_ignore_ascii_case("PreferSameNode")) {
        preferences.extend([Scope::Subzone, Scope::Node]);
    }
    LoadBalancing {
        preferences,
        strict: false,
    }
}

#[derive(Deserialize)]
struct Raw {
    spec: Spec,
    status: Option<Status>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Spec {
    #[serde(rename = "type")]
    kind: Option<String>,
    #[serde(rename = "clusterIP")]
    cluster_ip: Option<ClusterIp>,
    #[serde(rename = "clusterIPs", default)]
    cluster_ips: Vec<ClusterIp>,
    #[serde(default)]
    selector: BTreeMap<String, String>,
    #[serde(default)]
    ports: Vec<RawPort>,
    #[serde(default)]
    publish_not_ready_addresses: bool,
    internal_traffic_policy: Option<TrafficPolicy>,
    /// Only concerns traffic from outside. Traffic from inside goes to all endpoints, at whichever address, as
    /// with kube-proxy.
    #[serde(rename = "externalTrafficPolicy")]
    _external_traffic_policy: Option<TrafficPolicy>,
    traffic_distribution: Option<String>,
    session_affinity: Option<Affinity>,
    #[serde(rename = "externalIPs", default)]
    external_ips: Vec<Address>,
    #[serde(default)]
    load_balancer_source_ranges: Vec<String>,
    #[serde(default)]
    ip_families: Vec<IpFamily>,
}

#[derive(Deserialize, PartialEq)]
enum TrafficPolicy {
    Cluster,
    Local,
}

#[derive(Deserialize, PartialEq)]
enum Affinity {
    None,
    #[serde(rename = "ClientIP")]
    ClientIp,
}

#[derive(Deserialize)]
enum IpFamily {
    IPv4,
    IPv6,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Status {
    #[serde(default)]
    load_balancer: LoadBalancer,
}

#[derive(Default, Deserialize)]
struct LoadBalancer {
    #[serde(default)]
    ingress: Vec<Ingress>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Ingress {
    ip: Option<Address>,
    ip_mode: Option<IpMode>,
}

#[derive(Deserialize, PartialEq)]
enum IpMode {
    #[serde(rename = "VIP")]
    Vip,
    Proxy,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawPort {
    name: Option<String>,
    port: NonZeroU16,
    #[serde(default)]
    protocol: Protocol,
    target_port: Option<Target>,
}

#[derive(PartialEq)]
enum ClusterIp {
    None,
    Unset,
    Address(IpAddr),
}

impl ClusterIp {
    fn address(self) -> Option<IpAddr> {
        match self {
            ClusterIp::Address(address) => Some(address),
            ClusterIp::None | ClusterIp::Unset => None,
        }
    }
}

impl<'de> Deserialize<'de> for ClusterIp {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match String::deserialize(deserializer)?.as_str() {
            "None" => Ok(ClusterIp::None),
            "" => Ok(ClusterIp::Unset),
            text => match text.parse() {
                Ok(Address(address)) => Ok(ClusterIp::Address(address)),
                Err(what) => Err(de::Error::custom(format_args!("`{text}` {what}"))),
            },
        }
    }
}

impl<'de> Deserialize<'de> for Target {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PortOrName;
        impl de::Visitor<'_> for PortOrName {
            type Value = Target;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a port, or the name of one")
            }
            fn visit_u64<E: de::Error>(self, number: u64) -> Result<Target, E> {
                match u16::try_from(number) {
                    Ok(port) if port > 0 => Ok(Target::Number(port)),
                    _ => Err(E::custom(format_args!("`{number}` is not a port"))),
                }
            }
            fn visit_i64<E: de::Error>(self, number: i64) -> Result<Target, E> {
                self.visit_u64(u64::try_from(number).unwrap_or(0))
            }
            fn visit_str<E: de::Error>(self, name: &str) -> Result<Target, E> {
                if name.bytes().all(|byte| byte.is_ascii_digit()) {
                    return Err(E::custom(format_args!(
                        "`{name}` is neither a port nor a name"
                    )));
                }
                Ok(Target::Name(name.to_owned()))
            }
        }
        deserializer.deserialize_any(PortOrName)
    }
}

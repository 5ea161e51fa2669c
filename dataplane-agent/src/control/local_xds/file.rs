//! The content of ztunnel's file as it is written: names and forms are ztunnel's, and unknown fields are refused.

use std::collections::BTreeMap;
use std::sync::Arc;

use ipnet::IpNet;
use serde::Deserialize;
use serde::de::{IgnoredAny, MapAccess};

use super::Workloads;
use crate::control::ip::{Address, Cidr};
use crate::control::manifests::yaml::each::{Each, Lists};
use crate::mesh::policy::{Action, PolicyScope};
use crate::mesh::service::NetworkAddress;
use crate::mesh::workload::Health;

#[derive(Default)]
pub(super) struct Config {
    pub(super) workloads: Each<Workloads>,
    pub(super) policies: Each<Vec<RawPolicy>>,
    pub(super) services: Each<Vec<RawService>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Names {
    #[serde(rename = "workloads")]
    _workloads: Option<IgnoredAny>,
    #[serde(rename = "policies")]
    _policies: Option<IgnoredAny>,
    #[serde(rename = "services")]
    _services: Option<IgnoredAny>,
}

impl Lists for Config {
    type Names = Names;

    fn take<'de, A: MapAccess<'de>>(&mut self, name: &str, map: &mut A) -> Result<bool, A::Error> {
        match name {
            "workloads" => self.workloads = map.next_value()?,
            "policies" => self.policies = map.next_value()?,
            "services" => self.services = map.next_value()?,
            _ => return Ok(false),
        }
        Ok(true)
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct RawWorkload {
    pub(super) workload_ips: Vec<Address>,
    pub(super) namespace: String,
    pub(super) services: BTreeMap<String, BTreeMap<u16, u16>>,
    #[serde(default)]
    pub(super) uid: String,
    #[serde(default)]
    pub(super) name: String,
    #[serde(default)]
    pub(super) trust_domain: String,
    #[serde(default)]
    pub(super) service_account: String,
    #[serde(default)]
    pub(super) network: String,
    #[serde(default)]
    pub(super) node: String,
    #[serde(default)]
    pub(super) protocol: RawProtocol,
    #[serde(default)]
    pub(super) network_mode: NetworkMode,
    #[serde(default)]
    pub(super) workload_name: String,
    #[serde(default)]
    pub(super) workload_type: RawType,
    #[serde(default)]
    pub(super) canonical_name: String,
    #[serde(default)]
    pub(super) canonical_revision: String,
    #[serde(default)]
    pub(super) hostname: String,
    #[serde(default)]
    pub(super) native_tunnel: bool,
    pub(super) application_tunnel: Option<ApplicationTunnel>,
    #[serde(default)]
    pub(super) authorization_policies: Vec<String>,
    #[serde(default)]
    pub(super) status: Status,
    #[serde(default)]
    pub(super) cluster_id: String,
    #[serde(default)]
    pub(super) locality: RawLocality,
    pub(super) waypoint: Option<GatewayAddress>,
    pub(super) network_gateway: Option<GatewayAddress>,
    pub(super) capacity: Option<u32>,
}

#[derive(Clone, Copy, Default, Deserialize)]
pub(super) enum RawProtocol {
    #[default]
    #[serde(rename = "TCP")]
    Tcp,
    #[serde(rename = "HBONE")]
    Hbone,
}

#[derive(Default, Deserialize, PartialEq)]
pub(super) enum NetworkMode {
    #[default]
    Standard,
    HostNetwork,
}

#[derive(Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum RawType {
    #[serde(alias = "Deployment")]
    Deployment,
    #[serde(alias = "CronJob")]
    CronJob,
    #[default]
    #[serde(alias = "Pod")]
    Pod,
    #[serde(alias = "Job")]
    Job,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ApplicationTunnel {
    pub(super) protocol: TunnelProtocol,
    #[serde(rename = "port")]
    pub(super) _port: Option<u16>,
}

#[derive(Deserialize, PartialEq)]
#[serde(rename_all = "UPPERCASE")]
pub(super) enum TunnelProtocol {
    None,
    Proxy,
}

#[derive(Clone, Copy, Default, Deserialize)]
pub(super) enum Status {
    #[default]
    Healthy,
    Unhealthy,
}

impl Status {
    pub(super) fn health(self) -> Health {
        match self {
            Self::Healthy => Health::Healthy,
            Self::Unhealthy => Health::Unhealthy,
        }
    }
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawLocality {
    #[serde(default)]
    pub(super) region: String,
    #[serde(default)]
    pub(super) zone: String,
    #[serde(default)]
    pub(super) subzone: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct GatewayAddress {
    pub(super) destination: String,
    #[serde(rename = "hboneMtlsPort")]
    pub(super) _hbone_mtls_port: u16,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct RawPolicy {
    pub(super) name: String,
    pub(super) namespace: String,
    pub(super) scope: PolicyScope,
    pub(super) action: Action,
    pub(super) rules: Vec<Vec<Vec<RawMatch>>>,
    pub(super) dry_run: bool,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[derive(Default)]
pub(super) struct RawMatch {
    pub(super) namespaces: Vec<Text>,
    pub(super) not_namespaces: Vec<Text>,
    pub(super) service_accounts: Vec<RawAccount>,
    pub(super) not_service_accounts: Vec<RawAccount>,
    pub(super) principals: Vec<Text>,
    pub(super) not_principals: Vec<Text>,
    pub(super) source_ips: Vec<Cidr>,
    pub(super) not_source_ips: Vec<Cidr>,
    pub(super) destination_ips: Vec<Cidr>,
    pub(super) not_destination_ips: Vec<Cidr>,
    pub(super) destination_ports: Vec<u16>,
    pub(super) not_destination_ports: Vec<u16>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct RawAccount {
    pub(super) namespace: String,
    pub(super) service_account: String,
}

/// A text match: `!Exact x`, `!Prefix x`, `!Suffix x` or `!Presence []`.
#[derive(Deserialize)]
pub(super) enum Text {
    Exact(String),
    Prefix(String),
    Suffix(String),
    Presence(),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct RawService {
    pub(super) name: String,
    pub(super) namespace: String,
    pub(super) hostname: String,
    #[serde(deserialize_with = "network_addresses")]
    pub(super) vips: Vec<NetworkAddress>,
    pub(super) ports: BTreeMap<u16, u16>,
    #[serde(default)]
    pub(super) cidr_vips: Vec<NetworkRange>,
    #[serde(default)]
    pub(super) endpoints: BTreeMap<String, RawEndpoint>,
    #[serde(default)]
    pub(super) subject_alt_names: Vec<String>,
    pub(super) waypoint: Option<GatewayAddress>,
    #[serde(default)]
    pub(super) weighted_waypoints: Vec<WeightedWaypoint>,
    pub(super) load_balancer: Option<LoadBalancer>,
    pub(super) ip_families: Option<IpFamilies>,
    #[serde(default)]
    pub(super) canonical: bool,
    #[serde(default)]
    pub(super) visibility: Visibility,
}

/// Reads a list of `network/ip`.
fn network_addresses<'de, D: serde::Deserializer<'de>>(
    deserializer: D,
) -> Result<Vec<NetworkAddress>, D::Error> {
    struct One(NetworkAddress);
    impl<'de> Deserialize<'de> for One {
        fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            let (network, Address(address)) = in_network(deserializer, "address")?;
            Ok(Self(NetworkAddress { network, address }))
        }
    }
    let all = Vec::<One>::deserialize(deserializer)?;
    Ok(all.into_iter().map(|One(address)| address).collect())
}

/// A block in the form `network/ip/length`.
pub(super) struct NetworkRange(pub(super) Arc<str>, pub(super) IpNet);

impl<'de> Deserialize<'de> for NetworkRange {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let (network, Cidr(range)) = in_network(deserializer, "range")?;
        Ok(Self(network, range))
    }
}

fn in_network<'de, T: std::str::FromStr, D: serde::Deserializer<'de>>(
    deserializer: D,
    what: &str,
) -> Result<(Arc<str>, T), D::Error> {
    let text = String::deserialize(deserializer)?;
    let parsed = text
        .split_once('/')
        .and_then(|(network, rest)| Some((network.into(), rest.parse().ok()?)));
    parsed.ok_or_else(|| serde::de::Error::custom(format_args!("`{text}` is not a network/{what}")))
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct RawEndpoint {
    pub(super) workload_uid: String,
    pub(super) port: BTreeMap<u16, u16>,
    #[serde(default)]
    pub(super) status: Status,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WeightedWaypoint {
    #[serde(rename = "destination")]
    pub(super) _destination: serde::de::IgnoredAny,
    #[serde(rename = "weight")]
    pub(super) _weight: u32,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct LoadBalancer {
    #[serde(default)]
    pub(super) routing_preferences: Vec<RawScope>,
    #[serde(default)]
    pub(super) mode: Mode,
    #[serde(default)]
    pub(super) health_policy: HealthPolicy,
}

#[derive(Deserialize)]
pub(super) enum RawScope {
    Region,
    Zone,
    Subzone,
    Node,
    Cluster,
    Network,
}

#[derive(Default, Deserialize, PartialEq)]
pub(super) enum Mode {
    #[default]
    Standard,
    Strict,
    Failover,
    Passthrough,
}

#[derive(Default, Deserialize, PartialEq)]
pub(super) enum HealthPolicy {
    #[default]
    OnlyHealthy,
    AllowAll,
}

#[derive(Deserialize)]
pub(super) enum IpFamilies {
    Dual,
    IPv4,
    IPv6,
}

#[derive(Default, Deserialize, PartialEq)]
pub(super) enum Visibility {
    #[default]
    Public,
    Namespace,
}

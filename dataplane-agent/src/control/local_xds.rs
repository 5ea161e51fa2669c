//! Translates ztunnel's LOCAL_XDS file into the same store types, so that both can run on one configuration.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;

use super::ip::Cidr;
use super::manifests::yaml::each::{Collect, Document, Each};
use super::manifests::yaml::{self, NodeError};
use super::manifests::{LocalPodSpec, ManifestError, Translation, Wanted};
use crate::mesh::Identity;
use crate::mesh::interner::Interner;
use crate::mesh::policy::{Clause, Match, Policy, Rule, ServiceAccountMatch, StringMatch};
use crate::mesh::service::{Age, Family, LoadBalancing, Scope, Service};
use crate::mesh::workload::{Endpoint, Locality, Protocol, Workload, WorkloadType};

mod file;
mod stable;
#[cfg(test)]
mod tests;

use file::{
    Config, HealthPolicy, IpFamilies, LoadBalancer, Mode, NetworkMode, NetworkRange, RawAccount,
    RawMatch, RawPolicy, RawProtocol, RawScope, RawService, RawType, RawWorkload, Text,
    TunnelProtocol, Visibility,
};
pub use stable::Unchanged;

/// Reads the file, when nobody writes it. `node` is this node's name: its HBONE workloads are the pods here. `network` is this node's:
/// pods here of another network are reported.
///
/// # Errors
/// The file cannot be read, is open for writing, does not stop to change, or is not valid for ztunnel; a pod here is not of the mesh's `trust_domain`, so that
/// it would have no certificate.
pub fn read(
    file: &Path,
    node: &str,
    network: &str,
    trust_domain: &str,
) -> Result<(Translation, Unchanged), ManifestError> {
    let (text, unchanged) = stable::read(file)?;
    let mut read = parse(file, &text, node)?;
    let here = |workload: &&Workload| read.local.iter().any(|pod| pod.uid == workload.uid);
    let stranger = |workload: &Workload| *workload.trust_domain != *trust_domain;
    if let Some(at) = (read.workloads.iter()).position(|of| stranger(of) && here(&of)) {
        let Workload {
            uid,
            trust_domain: own,
            ..
        } = &read.workloads[at];
        return Err(ManifestError {
            field: format!("workloads[{at}].trustDomain"),
            ..ManifestError::of_file(
                file,
                format_args!(
                    "that of {uid} is `{own}`, and the mesh's is `{trust_domain}` (--trust-domain)"
                ),
            )
        });
    }
    let strange: Vec<String> = read
        .workloads
        .iter()
        .filter(|workload| *workload.network != *network)
        .filter(here)
        .map(|Workload { uid, network: own, .. }| {
            format!("workload {uid}: network: `{own}` is not this node's, `{network}` (--network); it reaches its own alone")
        })
        .collect();
    read.problems.extend(strange);
    Ok((read, unchanged))
}

/// Like [`read`], for the file's text.
///
/// # Errors
/// See [`read`].
pub fn parse(file: &Path, text: &str, node: &str) -> Result<Translation, ManifestError> {
    let fault = |error: NodeError| ManifestError::at(file, error);
    let mut documents: Vec<Document<Config>> = yaml::documents_1_2(text).map_err(fault)?;
    if let Some(second) = documents.get(1) {
        return Err(ManifestError {
            line: Some(second.line()),
            ..ManifestError::of_file(file, "one document is enough")
        });
    }
    let config = documents
        .pop()
        .map_or(Ok(Config::default()), Document::lists);
    let made = config.and_then(|config| config.translate(node));
    let made = made.map_err(fault)?;
    let fault = |field: &str, (at, what): (usize, String)| ManifestError {
        field: format!("{field}[{at}]"),
        ..ManifestError::of_file(file, what)
    };
    told_apart(&made.workloads).map_err(|twice| fault("workloads", twice))?;
    // One of the two policies would be lost, and with it the peers that it denies.
    let mut first = HashMap::new();
    for (at, policy) in made.policies.iter().enumerate() {
        if let Some(other) = first.insert(policy.key(), at) {
            let what = format!("{} is the name of policies[{other}] too", policy.key());
            return Err(fault("policies", (at, what)));
        }
    }
    Ok(made)
}

/// Refuses a workload that could be taken for another: records about a workload go by its uid, and a name with a
/// slash in it would change its identity.
fn told_apart(workloads: &[Workload]) -> Result<(), (usize, String)> {
    let mut first = HashMap::new();
    for (at, workload) in workloads.iter().enumerate() {
        if let Err(error) = workload.identity().to_string().parse::<Identity>() {
            return Err((at, error.to_string()));
        }
        if let Some(other) = first.insert(&workload.uid, at) {
            let uid = &workload.uid;
            return Err((at, format!("uid {uid} is that of workloads[{other}] too")));
        }
    }
    Ok(())
}

impl Config {
    fn translate(self, node: &str) -> Result<Translation, NodeError> {
        let Workloads {
            mut workloads,
            mut problems,
            ..
        } = in_field("workloads", self.workloads)?;
        let policies = in_field("policies", self.policies)?;
        let raw_services = in_field("services", self.services)?;
        let mut by_uid: HashMap<Arc<str>, usize> = HashMap::new();
        for (at, workload) in workloads.iter().enumerate() {
            by_uid.insert(workload.uid.clone(), at);
        }
        let mut services = Vec::new();
        for raw in raw_services {
            services.push(raw.translate(&mut workloads, &by_uid, &mut problems));
        }
        let keys: Vec<String> = services.iter().map(Service::key).collect();
        let mut seen = HashSet::new();
        for key in keys.iter().filter(|key| !seen.insert(*key)) {
            problems.push(format!(
                "service {key}: is there twice, the later one holds"
            ));
        }
        let local = workloads
            .iter()
            .filter(|workload| *workload.node == *node && !node.is_empty())
            .filter(|workload| workload.protocol == Protocol::Hbone && !workload.host_network)
            .map(local)
            .collect();
        let policies = policies.into_iter().map(RawPolicy::translate).collect();
        Ok(Translation {
            workloads,
            services,
            policies,
            local,
            problems,
        })
    }
}

fn in_field<C>(name: &str, Each(list): Each<C>) -> Result<C, NodeError> {
    list.map_err(|error| error.below(name))
}

/// Workloads as they are read, and the problems found.
#[derive(Default)]
struct Workloads {
    workloads: Vec<Workload>,
    problems: Vec<String>,
    interner: Interner,
}

impl Collect for Workloads {
    type Element = RawWorkload;

    fn add(&mut self, raw: RawWorkload) {
        let mut workload = raw.translate(&mut self.problems);
        self.interner.workload(&mut workload);
        self.workloads.push(workload);
    }
}

fn local(workload: &Workload) -> LocalPodSpec {
    LocalPodSpec {
        uid: workload.uid.clone(),
        pod_uid: "".into(),
        config_hash: None,
        namespace: workload.namespace.clone(),
        name: workload.name.clone(),
        service_account: workload.service_account.clone(),
        trust_domain: workload.trust_domain.clone(),
        addresses: workload.addresses.clone(),
        netns_path: None,
        wanted: Wanted::Yes,
    }
}

impl RawWorkload {
    fn translate(self, problems: &mut Vec<String>) -> Workload {
        let or = |text: String, default: &str| match text.is_empty() {
            true => Arc::from(default),
            false => Arc::from(text),
        };
        let cluster_id = or(self.cluster_id, "Kubernetes");
        let made = format!("{cluster_id}//Pod/{}/{}", self.namespace, self.name);
        let uid = or(self.uid, &made);
        let mut report = |what: &str| problems.push(format!("workload {uid}: {what}"));
        if !self.hostname.is_empty() && self.workload_ips.is_empty() {
            report("hostname: is not looked up, no traffic goes to it");
        }
        if self.native_tunnel {
            report("nativeTunnel: is not carried; it is treated as any HBONE workload");
        }
        let wants_proxy = self
            .application_tunnel
            .is_some_and(|tunnel| tunnel.protocol == TunnelProtocol::Proxy);
        if wants_proxy {
            report("applicationTunnel: is not carried yet, no connection is handed to its app");
        }
        if let Some(gateway) = &self.network_gateway {
            let gateway = &gateway.destination;
            report(&format!(
                "networkGateway {gateway}: is not carried yet, traffic to it from other networks is refused"
            ));
        }
        if self.waypoint.is_some() {
            report("waypoint: is not carried yet, traffic to it is refused");
        }
        let health = self.status.health();
        let services = self.services.into_iter().map(|(key, ports)| {
            let ports = ports.into();
            (key.into(), Endpoint { ports, health })
        });
        Workload {
            name: self.name.into(),
            namespace: self.namespace.into(),
            service_account: or(self.service_account, "default"),
            trust_domain: or(self.trust_domain, "cluster.local"),
            node: self.node.into(),
            cluster_id,
            network: self.network.into(),
            network_gateway: self.network_gateway.map(|to| to.destination.into()),
            addresses: self.workload_ips.into_iter().map(|ip| ip.0).collect(),
            protocol: match self.protocol {
                RawProtocol::Tcp => Protocol::Tcp,
                RawProtocol::Hbone => Protocol::Hbone,
            },
            host_network: self.network_mode == NetworkMode::HostNetwork,
            health,
            workload_name: self.workload_name.into(),
            workload_type: match self.workload_type {
                RawType::Deployment => WorkloadType::Deployment,
                RawType::CronJob => WorkloadType::CronJob,
                RawType::Pod => WorkloadType::Pod,
                RawType::Job => WorkloadType::Job,
            },
            canonical_name: self.canonical_name.into(),
            canonical_revision: self.canonical_revision.into(),
            waypoint: self.waypoint.map(|waypoint| waypoint.destination.into()),
            policies: self
                .authorization_policies
                .into_iter()
                .map(Arc::from)
                .collect(),
            services: Arc::new(services.collect()),
            locality: Arc::new(Locality {
                region: self.locality.region.into(),
                zone: self.locality.zone.into(),
                subzone: self.locality.subzone.into(),
            }),
            capacity: self.capacity.unwrap_or(1),
            unsupported: wants_proxy.then(|| "applicationTunnel PROXY".into()),
            uid,
        }
    }
}

impl RawService {
    fn translate(
        self,
        workloads: &mut [Workload],
        by_uid: &HashMap<Arc<str>, usize>,
        problems: &mut Vec<String>,
    ) -> Service {
        let key: Arc<str> = format!("{}/{}", self.namespace, self.hostname).into();
        let mut report = |what: &str| problems.push(format!("service {key}: {what}"));
        if !self.cidr_vips.is_empty() {
            report("cidrVips: are not carried yet, traffic to these addresses is refused");
        }
        if self.waypoint.is_some() {
            report("waypoint: is not carried yet, traffic to it is refused");
        }
        if !self.weighted_waypoints.is_empty() {
            report("weightedWaypoints: are not carried yet, traffic to it is refused");
        }
        for endpoint in self.endpoints.into_values() {
            let uid = endpoint.workload_uid;
            let Some(workload) = by_uid.get(&*uid).map(|&at| &mut workloads[at]) else {
                report(&format!("endpoints: {uid} is no workload"));
                continue;
            };
            let health = endpoint.status.health().min(workload.health);
            let services = Arc::make_mut(&mut workload.services);
            // The workload's own ports take precedence.
            let of = services.entry(key.clone()).or_insert_with(|| Endpoint {
                ports: endpoint.port.into(),
                health,
            });
            of.health = health;
        }
        let balancer = self.load_balancer;
        let passthrough = balancer
            .as_ref()
            .is_some_and(|b| b.mode == Mode::Passthrough);
        if passthrough {
            report("loadBalancer.mode Passthrough: is not carried yet, traffic to it is refused");
        }
        // Any name will do, since traffic to a service with a waypoint is refused.
        let weighted = (!self.weighted_waypoints.is_empty()).then_some("weighted");
        Service {
            name: self.name.into(),
            namespace: self.namespace.into(),
            hostname: self.hostname.into(),
            vips: self.vips,
            balanced: Vec::new(),
            external: Vec::new(),
            cidrs: self
                .cidr_vips
                .into_iter()
                .map(|NetworkRange(network, range)| (network, range))
                .collect(),
            ports: self.ports,
            subject_alt_names: self.subject_alt_names.into_iter().map(Arc::from).collect(),
            waypoint: self
                .waypoint
                .map(|waypoint| waypoint.destination.into())
                .or(weighted.map(Arc::from)),
            publish_not_ready: balancer
                .as_ref()
                .is_some_and(|balancer| balancer.health_policy == HealthPolicy::AllowAll),
            family: match self.ip_families {
                Some(IpFamilies::IPv4) => Some(Family::V4),
                Some(IpFamilies::IPv6) => Some(Family::V6),
                Some(IpFamilies::Dual) | None => None,
            },
            private: self.visibility == Visibility::Namespace,
            canonical: self.canonical,
            age: Age::default(),
            unsupported: passthrough.then(|| "load balancer mode PASSTHROUGH".into()),
            load_balancing: balancer.map(LoadBalancer::translate).unwrap_or_default(),
        }
    }
}

impl LoadBalancer {
    fn translate(self) -> LoadBalancing {
        let scope = |raw| match raw {
            RawScope::Region => Scope::Region,
            RawScope::Zone => Scope::Zone,
            RawScope::Subzone => Scope::Subzone,
            RawScope::Node => Scope::Node,
            RawScope::Cluster => Scope::Cluster,
            RawScope::Network => Scope::Network,
        };
        match self.mode {
            Mode::Standard | Mode::Passthrough => LoadBalancing::default(),
            mode @ (Mode::Strict | Mode::Failover) => LoadBalancing {
                preferences: self.routing_preferences.into_iter().map(scope).collect(),
                strict: mode == Mode::Strict,
            },
        }
    }
}

impl RawPolicy {
    fn translate(self) -> Policy {
        let clause = |matches: Vec<RawMatch>| Clause {
            matches: matches.into_iter().map(RawMatch::translate).collect(),
        };
        let rule = |clauses: Vec<Vec<RawMatch>>| Rule {
            clauses: clauses.into_iter().map(clause).collect(),
        };
        Policy {
            name: self.name.into(),
            namespace: self.namespace.into(),
            scope: self.scope,
            action: self.action,
            rules: self.rules.into_iter().map(rule).collect(),
            dry_run: self.dry_run,
        }
    }
}

impl RawMatch {
    fn translate(self) -> Match {
        let blocks = |raw: Vec<Cidr>| raw.into_iter().map(|Cidr(block)| block).collect();
        let texts = |raw: Vec<Text>| raw.into_iter().map(Text::translate).collect();
        // ztunnel compares principals without their scheme.
        let principals = |raw: Vec<Text>| raw.into_iter().map(Text::translate_principal).collect();
        let accounts = |raw: Vec<RawAccount>| {
            let account = |raw: RawAccount| ServiceAccountMatch {
                namespace: raw.namespace.into(),
                service_account: raw.service_account.into(),
            };
            raw.into_iter().map(account).collect()
        };
        Match {
            namespaces: texts(self.namespaces),
            not_namespaces: texts(self.not_namespaces),
            principals: principals(self.principals),
            not_principals: principals(self.not_principals),
            service_accounts: accounts(self.service_accounts),
            not_service_accounts: accounts(self.not_service_accounts),
            source_ips: blocks(self.source_ips),
            not_source_ips: blocks(self.not_source_ips),
            destination_ips: blocks(self.destination_ips),
            not_destination_ips: blocks(self.not_destination_ips),
            destination_ports: self.destination_ports,
            not_destination_ports: self.not_destination_ports,
        }
    }
}

impl Text {
    fn translate(self) -> StringMatch {
        match self {
            Text::Exact(text) => StringMatch::Exact(text.into()),
            Text::Prefix(text) => StringMatch::Prefix(text.into()),
            Text::Suffix(text) => StringMatch::Suffix(text.into()),
            Text::Presence() => StringMatch::Presence,
        }
    }

    fn translate_principal(self) -> StringMatch {
        let bare = |text: String| match text.strip_prefix("spiffe://") {
            Some(rest) => rest.to_owned(),
            None => text,
        };
        match self {
            Text::Exact(text) => Text::Exact(bare(text)),
            Text::Prefix(text) => Text::Prefix(bare(text)),
            other => other,
        }
        .translate()
    }
}

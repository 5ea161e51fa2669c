//! Pods: what is read of them, whether they join the mesh, and the workloads they become.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::num::NonZeroU16;
use std::path::PathBuf;
use std::sync::Arc;

use serde::Deserialize;

use super::node::{Node, NodeError};
use super::object::{Meta, Objects, Resource, is_name, wrong};
use super::service::Protocol;
use super::translate::Wanted;
use crate::control::address::Address;
use crate::mesh::workload::Health;

/// The annotation that names a pod's network namespace by path.
pub const NETNS_ANNOTATION: &str = "ambient.dataplane/netns";
/// The kubelet's own uid of a pod that it has from a file; in the API the object has another one.
const HASH_ANNOTATION: &str = "kubernetes.io/config.hash";
/// Says the same of the object that the kubelet makes for such a pod. The API server lets nobody add it to
/// a pod, or change it; the hash alone is anybody's who may annotate the pod.
const MIRROR_ANNOTATION: &str = "kubernetes.io/config.mirror";
pub(super) const MODE_LABEL: &str = "istio.io/dataplane-mode";
const SIDECAR_ANNOTATION: &str = "sidecar.istio.io/status";

/// What is read of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// The node it runs on; empty if none yet.
    pub node: Arc<str>,
    /// Its service account.
    pub service_account: Arc<str>,
    /// Whether it shares its node's network namespace.
    pub host_network: bool,
    /// Ports that its containers name: name and TCP port.
    pub named_ports: Vec<(String, u16)>,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Whether its containers have ended for good.
    pub ended: bool,
    /// Whether it takes load; unless its status says otherwise it does.
    pub ready: bool,
}

impl Pod {
    pub(crate) fn read(node: &Node) -> Result<Self, NodeError> {
        let Raw { spec, status } = node.read()?;
        let status = status.unwrap_or_default();
        // The second is an older name of the field, which the API server still takes.
        let accounts = [&spec.service_account_name, &spec.service_account];
        let account = accounts
            .into_iter()
            .filter_map(|name| name.as_deref())
            .find(|name| !name.is_empty());
        let account = account.unwrap_or("default");
        if !is_name(account) {
            let what = format_args!("`{account}` is not a name");
            return Err(wrong(node, "spec.serviceAccountName", what));
        }
        let mut addresses: Vec<IpAddr> = status.pod_ips.iter().map(|pod_ip| pod_ip.ip.0).collect();
        if let (true, Some(Address(address))) = (addresses.is_empty(), status.pod_ip) {
            addresses.push(address);
        }
        let mut seen = BTreeSet::new();
        addresses.retain(|address| seen.insert(*address));
        let restartable =
            |container: &&Container| container.restart_policy.as_deref() == Some("Always");
        let containers = spec
            .containers
            .iter()
            .chain(spec.init_containers.iter().filter(restartable));
        let named_ports = containers
            .flat_map(|container| &container.ports)
            .filter(|port| port.protocol == Protocol::Tcp)
            .filter_map(|port| Some((port.name.clone()?, port.container_port.get())))
            .collect();
        Ok(Self {
            node: spec.node_name.unwrap_or_default().into(),
            service_account: account.into(),
            host_network: spec.host_network,
            named_ports,
            addresses,
            ended: matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")),
            ready: status
                .conditions
                .iter()
                .find(|condition| condition.kind == "Ready")
                .is_none_or(|condition| condition.status == "True"),
        })
    }

    /// The TCP port that its containers give this name.
    pub fn named_port(&self, name: &str) -> Option<u16> {
        self.named_ports
            .iter()
            .find(|(known, _)| known == name)
            .map(|&(_, port)| port)
    }
}

/// Whether it takes load.
pub(crate) fn health(pod: &Resource<Pod>) -> Health {
    match (pod.body.ready, pod.meta.deleting) {
        (true, false) => Health::Healthy,
        (true, true) => Health::Terminating,
        (false, _) => Health::Unhealthy,
    }
}

/// What is wrong with the label that asks for enrolment, if something is.
pub(crate) fn mode_fault(meta: &Meta) -> Option<String> {
    let mode = meta.label(MODE_LABEL)?;
    let known = ["ambient", "none", "sidecar"].contains(&mode);
    (!known).then(|| format!("label {MODE_LABEL}: `{mode}` is not known; ambient and none are"))
}

/// Whether a pod is to be enrolled: istio-cni's rule. A pod that is being deleted is not enrolled
/// any more, but stays so if it is: taking it out would send its last words in clear.
pub(crate) fn wanted(pod: &Resource<Pod>, objects: &Objects, enrolled: bool) -> Wanted {
    let mode = pod.meta.label(MODE_LABEL);
    let namespace_mode = objects.namespace_label(&pod.meta.key.namespace, MODE_LABEL);
    let no = if pod.body.ended {
        "it has ended"
    } else if pod.body.host_network {
        "it is on the host's network"
    } else if pod.meta.annotations.contains_key(SIDECAR_ANNOTATION) {
        "it has a sidecar"
    } else if mode == Some("none") {
        "its label istio.io/dataplane-mode is none"
    } else if mode != Some("ambient") && namespace_mode != Some("ambient") {
        "neither it nor its namespace has the label istio.io/dataplane-mode=ambient"
    } else if pod.meta.deleting && !enrolled {
        "it is being deleted"
    } else {
        return Wanted::Yes;
    };
    Wanted::No(no.into())
}

/// Where its network namespace is, if it says so.
pub(crate) fn netns_path(meta: &Meta) -> Option<PathBuf> {
    meta.annotations.get(NETNS_ANNOTATION).map(PathBuf::from)
}

/// The uid that the kubelet knows it by, if it is one of a file.
pub(crate) fn config_hash(meta: &Meta) -> Option<Arc<str>> {
    let hash = meta.annotations.get(HASH_ANNOTATION)?;
    let is_mirror = meta.annotations.get(MIRROR_ANNOTATION) == Some(hash);
    is_mirror.then(|| hash.as_str().into())
}

/// The name of what owns the pod, or its own.
pub(crate) fn workload_name(meta: &Meta) -> String {
    if let Some(name) = meta.label("service.istio.io/workload-name") {
        return name.to_owned();
    }
    let (Some(_), Some((kind, owner))) = (&meta.generate_name, &meta.controller) else {
        return meta.key.name.to_string();
    };
    match kind.as_str() {
        "ReplicaSet" => meta
            .label("pod-template-hash")
            .and_then(|hash| owner.strip_suffix(hash)?.strip_suffix('-'))
            .unwrap_or(owner)
            .to_owned(),
        "Job" => cron_job(owner).unwrap_or(owner).to_owned(),
        _ => owner.clone(),
    }
}

/// The CronJob of a Job that carries its time as a suffix.
fn cron_job(job: &str) -> Option<&str> {
    let (name, suffix) = job.rsplit_once('-')?;
    let is_time = (8..=10).contains(&suffix.len()) && suffix.bytes().all(|b| b.is_ascii_digit());
    (is_time && !name.is_empty()).then_some(name)
}

#[derive(Deserialize)]
struct Raw {
    spec: Spec,
    status: Option<Status>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Spec {
    node_name: Option<String>,
    service_account_name: Option<String>,
    service_account: Option<String>,
    #[serde(default)]
    host_network: bool,
    #[serde(default)]
    containers: Vec<Container>,
    #[serde(default)]
    init_containers: Vec<Container>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Container {
    restart_policy: Option<String>,
    #[serde(default)]
    ports: Vec<ContainerPort>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ContainerPort {
    name: Option<String>,
    container_port: NonZeroU16,
    #[serde(default)]
    protocol: Protocol,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Status {
    phase: Option<String>,
    #[serde(rename = "podIP")]
    pod_ip: Option<Address>,
    #[serde(rename = "podIPs", default)]
    pod_ips: Vec<PodIp>,
    #[serde(default)]
    conditions: Vec<Condition>,
}

#[derive(Deserialize)]
struct PodIp {
    ip: Address,
}

#[derive(Deserialize)]
struct Condition {
    #[serde(rename = "type")]
    kind: String,
    status: String,
}

//! Pods: the fields that are read, the rule by which they join the mesh, and parts of their workloads.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::num::NonZeroU16;
use std::path::PathBuf;
use std::sync::Arc;

use serde::Deserialize;

use super::object::{Meta, Objects, Resource, is_name, wrong};
use super::service::Protocol;
use super::translate::Wanted;
use super::yaml::{Node, NodeError};
use crate::control::ip::Address;
use crate::mesh::workload::Health;

/// The annotation that names a pod's network namespace by path.
pub const NETNS_ANNOTATION: &str = "ambient.dataplane/netns";
/// The annotation with the kubelet's own uid of a static pod; the API object has another uid.
pub(super) const HASH_ANNOTATION: &str = "kubernetes.io/config.hash";
/// The same uid, on the API object that the kubelet makes for a static pod. The API server lets nobody add it
/// to a pod or change it, whereas whoever may annotate a pod can set the hash alone.
pub(super) const MIRROR_ANNOTATION: &str = "kubernetes.io/config.mirror";
pub(super) const MODE_LABEL: &str = "istio.io/dataplane-mode";
pub(super) const SIDECAR_ANNOTATION: &str = "sidecar.istio.io/status";

/// The fields of a Pod that are read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// The node it runs on; empty if it has none yet.
    pub node: Arc<str>,
    /// Its service account.
    pub service_account: Arc<str>,
    /// `true` if it shares its node's network namespace.
    pub host_network: bool,
    /// Named TCP ports of its containers: name and number.
    pub named_ports: Vec<(String, u16)>,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// `true` if its containers have ended for good.
    pub ended: bool,
    /// `true` if it takes connections; also if its status does not tell.
    pub ready: bool,
}

impl Pod {
    pub(crate) fn read(node: &Node) -> Result<Self, NodeError> {
        let Raw { spec, status } = node.read()?;
        let status = status.unwrap_or_default();
        // `serviceAccount` is the older name of the field, which the API server still takes.
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

    /// Returns the TCP port with this name in its containers.
    pub fn named_port(&self, name: &str) -> Option<u16> {
        self.named_ports
            .iter()
            .find(|(known, _)| known == name)
            .map(|&(_, port)| port)
    }
}

/// Returns if it takes connections.
pub(crate) fn health(pod: &Resource<Pod>) -> Health {
    match (pod.body.ready, pod.meta.deleting) {
        (true, false) => Health::Healthy,
        (true, true) => Health::Terminating,
        (false, _) => Health::Unhealthy,
    }
}

/// Returns a message if the value of the label for enrolment is not known.
pub(crate) fn mode_fault(meta: &Meta) -> Option<String> {
    let mode = meta.label(MODE_LABEL)?;
    let known = ["ambient", "none", "sidecar"].contains(&mode);
    (!known).then(|| format!("label {MODE_LABEL}: `{mode}` is not known; ambient and none are"))
}

/// Decides if a pod is to be enrolled, by istio-cni's rule. A pod that is being deleted is not enrolled any
/// more, but stays enrolled if it is: otherwise its last words would be sent in clear.
pub(crate) fn wanted(pod: &Resource<Pod>, objects: &Objects, enrolled: bool) -> Wanted {
    let mode = pod.meta.label(MODE_LABEL);
    let namespace_mode = objects.namespace_label(&pod.meta.key.namespace, MODE_LABEL);
    let no = if pod.body.ended {
        "it has ended"
    } else if pod.body.host_network {
        "it is on the host's network"
    } else if pod.meta.annotation(SIDECAR_ANNOTATION).is_some() {
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

/// Returns the path of its network namespace, if the annotation has one.
pub(crate) fn netns_path(meta: &Meta) -> Option<PathBuf> {
    meta.annotation(NETNS_ANNOTATION).map(PathBuf::from)
}

/// Returns the uid by which the kubelet knows it, if it is a static pod.
pub(crate) fn config_hash(meta: &Meta) -> Option<Arc<str>> {
    let hash = meta.annotation(HASH_ANNOTATION)?;
    let is_mirror = meta.annotation(MIRROR_ANNOTATION) == Some(hash);
    is_mirror.then(|| hash.into())
}

/// Returns the name of the pod's owner, or its own.
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

/// Returns the CronJob of a Job with a time as suffix.
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

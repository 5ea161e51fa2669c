//! Translates objects into store types. Pure: the same objects give the same mesh.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use super::super::enrolled::Enrolled;
use super::authorization_policy;
use super::endpoint_slice::{Endpoint, EndpointSlice, SERVICE_LABEL};
use super::gateway::{self, WaypointUser};
use super::object::{Key, Meta, Objects, Resource, all_in, selects};
use super::peer_authentication::PeerAuthentications;
use super::pod::{self, Pod};
use super::service;
use crate::mesh::Identity;
use crate::mesh::policy::Policy;
use crate::mesh::service::{NetworkAddress, Service};
use crate::mesh::workload::{
    self, Health, Locality, Ports, Protocol, Services, Workload, WorkloadType,
};

/// The label with the network of an object's addresses.
const NETWORK_LABEL: &str = "topology.istio.io/network";

/// The mesh's names, and the name of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MeshConfig {
    /// The cluster's name.
    pub cluster_id: String,
    /// The domain at the end of host names.
    pub cluster_domain: String,
    /// The namespace whose policies apply to the whole mesh.
    pub root_namespace: String,
    /// The trust domain of its workloads.
    pub trust_domain: String,
    /// This node's name.
    pub node: String,
    /// The network of objects without a network label; empty if there is only one network.
    pub network: String,
}

impl MeshConfig {
    /// Returns the configuration of a mesh with the usual names, on `node`.
    pub fn of_node(node: impl Into<String>) -> Self {
        Self {
            cluster_id: "Kubernetes".into(),
            cluster_domain: "cluster.local".into(),
            root_namespace: "istio-system".into(),
            trust_domain: "cluster.local".into(),
            node: node.into(),
            network: String::new(),
        }
    }
}

/// Identifies a pod, and not an earlier one of the same name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PodKey {
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
    /// Its uid; empty if its manifest has none.
    pub uid: Arc<str>,
}

/// A pod of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalPodSpec {
    /// The workload's uid.
    pub uid: Arc<str>,
    /// The pod's own uid; empty if its manifest has none.
    pub pod_uid: Arc<str>,
    /// The kubelet's own uid for it instead, if it is a static pod, from a file of the kubelet's.
    pub config_hash: Option<Arc<str>>,
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
    /// Its service account.
    pub service_account: Arc<str>,
    /// The trust domain.
    pub trust_domain: Arc<str>,
    /// Its addresses; empty while it has none, and once it has ended.
    pub addresses: Vec<IpAddr>,
    /// The path of its network namespace, if its manifest has one.
    pub netns_path: Option<PathBuf>,
    /// Enrol it or not.
    pub wanted: Wanted,
}

impl LocalPodSpec {
    /// Returns its identity.
    pub fn identity(&self) -> Identity {
        Identity::new(&self.trust_domain, &self.namespace, &self.service_account)
    }

    /// Returns the uids after which the kubelet may have named its cgroup; none if its manifest has none.
    pub fn cgroup_uids(&self) -> impl Iterator<Item = &str> {
        let uids = [Some(&self.pod_uid), self.config_hash.as_ref()];
        uids.into_iter()
            .flatten()
            .map(|uid| &**uid)
            .filter(|uid| !uid.is_empty())
    }
}

/// Says if a pod is to be enrolled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// Enrol it.
    Yes,
    /// Do not enrol it, for this reason.
    No(Arc<str>),
}

/// The result of a translation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Translation {
    /// Workloads, by uid.
    pub workloads: Vec<Workload>,
    /// Services, by key.
    pub services: Vec<Service>,
    /// Policies, by key.
    pub policies: Vec<Policy>,
    /// The pods of this node, in the mesh or not.
    pub local: Vec<LocalPodSpec>,
    /// Configuration that is not supported, and what happens instead.
    pub problems: Vec<String>,
}

/// Translates `objects`. `enrolled` stands for Kubernetes' `ambient.istio.io/redirection`; `captured` are
/// the uids of the workloads captured on this node, with or without a record.
pub fn translate(
    objects: &Objects,
    enrolled: &Enrolled,
    captured: &BTreeSet<Arc<str>>,
    mesh: &MeshConfig,
) -> Translation {
    let all = (objects, enrolled, captured);
    let (mut made, of_pods) = translate_part(all, mesh, &MeshContext::default());
    made.problems.extend(of_pods.into_values().flatten());
    let mut told = HashSet::new();
    made.problems.retain(|problem| told.insert(problem.clone()));
    made
}

/// Facts about all objects, for the translation of some of them.
#[derive(Debug, Default)]
pub(super) struct MeshContext {
    /// The networks of workloads.
    pub(super) networks: BTreeSet<Arc<str>>,
    /// `true` if there is a PeerAuthentication.
    pub(super) peer_authentications: bool,
}

/// The problems of pods, by the workload's uid. Several pods may have the same one.
pub(super) type PodProblems = BTreeMap<Arc<str>, Vec<String>>;

/// Like [`translate()`], for a part of all objects. The problems of its pods are apart.
pub(super) fn translate_part(
    (objects, enrolled, captured): (&Objects, &Enrolled, &BTreeSet<Arc<str>>),
    mesh: &MeshConfig,
    context: &MeshContext,
) -> (Translation, PodProblems) {
    let translator = Translator::new(objects, enrolled, mesh);
    let mut problems = Vec::new();
    let policies = authorization_policies(objects, mesh, &mut problems);
    let mut of_pods = PodProblems::new();
    let mut workloads = Vec::new();
    let mut local = Vec::new();
    for pod in objects.pods.values() {
        let made = translator.pod(pod, &policies, captured);
        workloads.extend(made.workload);
        local.extend(made.local);
        if !made.problems.is_empty() {
            of_pods.insert(made.uid, made.problems);
        }
    }
    // An endpoint written by hand with a pod's address is that pod, and is dialled with its identity.
    let mut pods_at: HashMap<IpAddr, usize> = HashMap::new();
    for (number, pod) in workloads
        .iter()
        .enumerate()
        .filter(|(_, pod)| !pod.host_network)
    {
        for address in &pod.addresses {
            pods_at.entry(*address).or_insert(number);
        }
    }
    for slice in objects.endpoint_slices.values() {
        translator.endpoints(slice, &mut workloads, &pods_at);
    }
    let peers = &translator.peers;
    let strict = peers.translate(context.peer_authentications, &mut problems);
    peers.tell(&mut problems);
    let services = translator.services(&workloads, &context.networks, &mut problems);
    workloads.sort_by(|a, b| a.uid.cmp(&b.uid));
    workloads.dedup_by(|a, b| a.uid == b.uid);
    for found in objects.namespaces.values() {
        let fault = pod::mode_fault(&found.meta);
        problems.extend(fault.map(|fault| format!("Namespace {}: {fault}", found.meta.key)));
    }
    let policies = policies.into_iter().map(|(policy, _)| policy);
    let mut policies: Vec<Policy> = policies.chain(strict).collect();
    policies.sort_by_cached_key(Policy::key);
    let made = Translation {
        workloads,
        services,
        policies,
        local,
        problems,
    };
    (made, of_pods)
}

/// Translates all pods of `objects`: what [`translate_part`] makes of them as long as no endpoint is written by
/// hand.
pub(super) fn translate_pods(
    (objects, enrolled, captured): (&Objects, &Enrolled, &BTreeSet<Arc<str>>),
    mesh: &MeshConfig,
) -> Vec<TranslatedPod> {
    let translator = Translator::new(objects, enrolled, mesh);
    let policies = authorization_policies(objects, mesh, &mut Vec::new());
    let pods = objects.pods.values();
    pods.map(|pod| translator.pod(pod, &policies, captured))
        .collect()
}

/// A pod, translated.
#[derive(Debug)]
pub(super) struct TranslatedPod {
    /// Its workload's uid.
    pub(super) uid: Arc<str>,
    /// `None` if it has no address, or has ended.
    pub(super) workload: Option<Workload>,
    /// `None` if it is of another node.
    pub(super) local: Option<LocalPodSpec>,
    /// What of its configuration is not supported, and what happens instead.
    pub(super) problems: Vec<String>,
}

/// Returns the uid of a pod's workload.
pub(super) fn pod_uid(mesh: &MeshConfig, Key { namespace, name }: &Key) -> Arc<str> {
    format!("{}//Pod/{namespace}/{name}", mesh.cluster_id).into()
}

/// AuthorizationPolicies, each with the selector of the pods that it is attached to, if it has one.
type Selected<'a> = Vec<(Policy, Option<&'a BTreeMap<String, String>>)>;

/// Returns them in the order of their keys.
fn authorization_policies<'a>(
    objects: &'a Objects,
    mesh: &MeshConfig,
    problems: &mut Vec<String>,
) -> Selected<'a> {
    let mut policies: Selected<'a> = Vec::new();
    for found in objects.authorization_policies.values() {
        if let Some(policy) = authorization_policy::translate(found, mesh, problems) {
            policies.push((policy, found.body.selector()));
        }
    }
    policies.sort_by_cached_key(|(policy, _)| policy.key());
    policies
}

struct Translator<'a> {
    objects: &'a Objects,
    enrolled: &'a Enrolled,
    mesh: &'a MeshConfig,
    peers: PeerAuthentications<'a>,
    trust_domain: Arc<str>,
    cluster_id: Arc<str>,
    network: Arc<str>,
    /// For each pod, the services without a selector whose slices name it: the uid that the slice names,
    /// the service's key, and the endpoint's health.
    named: HashMap<Key, Vec<(&'a str, &'a Key, Health)>>,
}

impl<'a> Translator<'a> {
    fn new(objects: &'a Objects, enrolled: &'a Enrolled, mesh: &'a MeshConfig) -> Self {
        let mut named: HashMap<Key, Vec<_>> = HashMap::new();
        for slice in objects.endpoint_slices.values() {
            let Some(service) = service_of(objects, slice) else {
                continue;
            };
            if !service.body.selector.is_empty() {
                continue;
            }
            for (pod, health) in slice
                .body
                .endpoints
                .iter()
                .filter_map(|endpoint| Some((endpoint.pod.as_ref()?, endpoint.health)))
            {
                let elsewhere = !pod.namespace.is_empty();
                let same = slice.meta.key.namespace.clone();
                let namespace = if elsewhere {
                    pod.namespace.as_str().into()
                } else {
                    same
                };
                let key = Key {
                    namespace,
                    name: pod.name.as_str().into(),
                };
                named
                    .entry(key)
                    .or_default()
                    .push((pod.uid.as_str(), &service.meta.key, health));
            }
        }
        Self {
            objects,
            enrolled,
            mesh,
            peers: PeerAuthentications::new(&objects.peer_authentications, &mesh.root_namespace),
            trust_domain: mesh.trust_domain.as_str().into(),
            cluster_id: mesh.cluster_id.as_str().into(),
            network: network(objects, mesh),
            named,
        }
    }

    fn pod(
        &self,
        pod: &Resource<Pod>,
        policies: &Selected<'_>,
        captured: &BTreeSet<Arc<str>>,
    ) -> TranslatedPod {
        let Resource { meta, body, .. } = pod;
        let uid = pod_uid(self.mesh, &meta.key);
        let mut problems = Vec::new();
        let is_local = *body.node == *self.mesh.node && !self.mesh.node.is_empty();
        let local = is_local.then(|| self.local(pod, &uid, captured));
        let is_there = !body.ended && !body.addresses.is_empty();
        let workload = is_there.then(|| self.workload(pod, &uid, policies, &mut problems));
        self.peers.tell_of_pod(meta, &mut problems);
        let fault = pod::mode_fault(meta);
        problems.extend(fault.map(|fault| format!("Pod {}: {fault}", meta.key)));
        TranslatedPod {
            uid,
            workload,
            local,
            problems,
        }
    }

    fn is_enrolled(&self, pod: &Resource<Pod>) -> bool {
        let Key { namespace, name } = pod.meta.key.clone();
        self.enrolled.contains(&PodKey {
            namespace,
            name,
            uid: pod.meta.uid.clone(),
        })
    }

    fn local(
        &self,
        pod: &Resource<Pod>,
        uid: &Arc<str>,
        captured: &BTreeSet<Arc<str>>,
    ) -> LocalPodSpec {
        let is_in = self.is_enrolled(pod) || captured.contains(uid);
        LocalPodSpec {
            uid: Arc::clone(uid),
            pod_uid: pod.meta.uid.clone(),
            config_hash: pod::config_hash(&pod.meta),
            namespace: pod.meta.key.namespace.clone(),
            name: pod.meta.key.name.clone(),
            service_account: pod.body.service_account.clone(),
            trust_domain: self.trust_domain.clone(),
            // The addresses of a pod that has ended may belong to another by now.
            addresses: match pod.body.ended {
                true => Vec::new(),
                false => pod.body.addresses.clone(),
            },
            netns_path: pod::netns_path(&pod.meta),
            wanted: pod::wanted(pod, self.objects, is_in),
        }
    }

    fn workload(
        &self,
        pod: &Resource<Pod>,
        uid: &Arc<str>,
        policies: &Selected<'_>,
        problems: &mut Vec<String>,
    ) -> Workload {
        let Resource { meta, body, .. } = pod;
        let first = |names: [&str; 3]| names.iter().find_map(|name| meta.label(name));
        let workload_name: Arc<str> = pod::workload_name(meta).into();
        let canonical_name = first([
            "service.istio.io/canonical-name",
            "app.kubernetes.io/name",
            "app",
        ]);
        let canonical_revision = first([
            "service.istio.io/canonical-revision",
            "app.kubernetes.io/version",
            "version",
        ]);
        let own_tunnel = meta
            .label("networking.istio.io/tunnel")
            .is_some_and(|kind| kind.contains("http"));
        let waypoint = self.waypoint(WaypointUser::Workload, "Pod", meta, problems);
        Workload {
            uid: Arc::clone(uid),
            name: meta.key.name.clone(),
            namespace: meta.key.namespace.clone(),
            service_account: body.service_account.clone(),
            trust_domain: self.trust_domain.clone(),
            node: body.node.clone(),
            cluster_id: self.cluster_id.clone(),
            network: self.network_of(Some(meta), &body.node),
            network_gateway: None,
            addresses: body.addresses.clone(),
            protocol: match own_tunnel || self.is_enrolled(pod) {
                true => Protocol::Hbone,
                false => Protocol::Tcp,
            },
            host_network: body.host_network,
            health: pod::health(pod),
            canonical_name: canonical_name.map_or_else(|| workload_name.clone(), Arc::from),
            canonical_revision: canonical_revision.unwrap_or("latest").into(),
            workload_name,
            workload_type: WorkloadType::Pod,
            waypoint,
            policies: self.policies_of(pod, policies),
            services: self.services_of(pod).into(),
            locality: self.locality(&body.node),
            capacity: 1,
            unsupported: None,
        }
    }

    /// Returns the keys of the policies that select a pod, and of its PeerAuthentications' policy.
    fn policies_of(&self, pod: &Resource<Pod>, policies: &Selected<'_>) -> Arc<[Arc<str>]> {
        let here = |policy: &Policy| {
            policy.namespace == pod.meta.key.namespace
                || *policy.namespace == *self.mesh.root_namespace
        };
        policies
            .iter()
            .filter(|(policy, selector)| {
                here(policy) && selector.is_some_and(|labels| selects(labels, &pod.meta.labels))
            })
            .map(|(policy, _)| policy.key().into())
            .chain(self.peers.key(&pod.meta))
            .collect()
    }

    fn services_of(&self, pod: &Resource<Pod>) -> Services {
        let own = pod::health(pod);
        let services = all_in(&self.objects.services, &pod.meta.key.namespace);
        let selecting = services
            .map(|(_, service)| service)
            .filter(|service| {
                let selector = &service.body.selector;
                !selector.is_empty() && selects(selector, &pod.meta.labels)
            })
            .map(|service| (service, own));
        let names = self.named.get(&pod.meta.key).into_iter().flatten();
        let naming = names
            .filter(|(uid, ..)| uid.is_empty() || *uid == &*pod.meta.uid)
            .filter_map(|(_, key, health)| {
                Some((self.objects.services.get(*key)?, own.min(*health)))
            });
        selecting
            .chain(naming)
            .filter(|(service, _)| !service.body.external)
            .map(|(service, health)| {
                let ports = service.body.ports_in(&pod.body).into();
                let endpoint = workload::Endpoint { ports, health };
                (self.key(&service.meta.key), endpoint)
            })
            .collect()
    }

    /// Adds the endpoints that name no object: to the pod that has the address, or as a workload of their own.
    fn endpoints(
        &self,
        slice: &Resource<EndpointSlice>,
        workloads: &mut Vec<Workload>,
        pods_at: &HashMap<IpAddr, usize>,
    ) {
        let Some(service) = service_of(self.objects, slice).filter(|s| !s.body.external) else {
            return;
        };
        let ports: Ports = service
            .body
            .ports
            .iter()
            .filter_map(|port| {
                let (_, there) = slice
                    .body
                    .ports
                    .iter()
                    .find(|(name, _)| *name == port.name)?;
                Some((port.port, *there))
            })
            .collect();
        let ports = Arc::new(ports);
        let key = self.key(&service.meta.key);
        let no_object = |endpoint: &&Endpoint| endpoint.pod.is_none() && !endpoint.other_object;
        for endpoint in slice.body.endpoints.iter().filter(no_object) {
            let of_service = |health| workload::Endpoint {
                ports: Arc::clone(&ports),
                health,
            };
            for address in &endpoint.addresses {
                if let Some(pod) = pods_at.get(address).map(|&number| &mut workloads[number]) {
                    let of_service = of_service(endpoint.health.min(pod.health));
                    let services = Arc::make_mut(&mut pod.services);
                    services.entry(key.clone()).or_insert(of_service);
                    continue;
                }
                let services = BTreeMap::from([(key.clone(), of_service(endpoint.health))]);
                workloads.push(self.bare(slice, endpoint, *address, services));
            }
        }
    }

    fn bare(
        &self,
        slice: &Resource<EndpointSlice>,
        endpoint: &Endpoint,
        address: IpAddr,
        services: Services,
    ) -> Workload {
        let Key { namespace, name } = &slice.meta.key;
        let cluster = &self.cluster_id;
        let node = endpoint.node.as_deref().unwrap_or_default();
        Workload {
            uid: format!("{cluster}/discovery.k8s.io/EndpointSlice/{namespace}/{name}/{address}")
                .into(),
            name: name.clone(),
            namespace: namespace.clone(),
            service_account: "".into(),
            trust_domain: self.trust_domain.clone(),
            node: node.into(),
            cluster_id: cluster.clone(),
            network: self.network_of(None, node),
            network_gateway: None,
            addresses: vec![address],
            protocol: Protocol::Tcp,
            host_network: true,
            health: endpoint.health,
            workload_name: name.clone(),
            workload_type: WorkloadType::Pod,
            canonical_name: name.clone(),
            canonical_revision: "latest".into(),
            waypoint: None,
            policies: Arc::default(),
            services: services.into(),
            locality: self.locality(node),
            capacity: 1,
            unsupported: None,
        }
    }

    fn services(
        &self,
        workloads: &[Workload],
        others: &BTreeSet<Arc<str>>,
        problems: &mut Vec<String>,
    ) -> Vec<Service> {
        // A service's addresses belong to the cluster, so they are known in each of its networks.
        let networks = workloads.iter().map(|workload| &workload.network);
        let networks = networks.chain([&self.network]).chain(others);
        let networks: BTreeSet<&Arc<str>> = networks.collect();
        let in_networks = |addresses: &[IpAddr]| {
            let of = |address: &IpAddr| {
                let address = *address;
                networks.iter().map(move |network| NetworkAddress {
                    network: Arc::clone(network),
                    address,
                })
            };
            addresses.iter().flat_map(of).collect::<Vec<_>>()
        };
        let all = self.objects.services.values();
        let mut services = Vec::new();
        for found in all.filter(|found| !found.body.external) {
            let (key, body) = (&found.meta.key, &found.body);
            if body.vips.is_empty() && !body.headless {
                problems.push(format!(
                    "Service {key}: has no clusterIP, only its pods' own addresses reach it"
                ));
            }
            let notes = body.notes.iter();
            problems.extend(notes.map(|note| format!("Service {key}: {note}")));
            services.push(Service {
                name: key.name.clone(),
                namespace: key.namespace.clone(),
                hostname: self.hostname(key).into(),
                vips: in_networks(&body.vips),
                balanced: in_networks(&body.ingress),
                external: in_networks(&body.external_ips),
                cidrs: Vec::new(),
                ports: body.port_map(),
                subject_alt_names: Vec::new(),
                waypoint: self.waypoint(WaypointUser::Service, "Service", &found.meta, problems),
                publish_not_ready: body.publish_not_ready,
                family: body.family,
                private: false,
                canonical: true,
                age: found.age,
                unsupported: None,
                load_balancing: service::load_balancing(found, self.objects),
            });
        }
        services.sort_by_cached_key(Service::key);
        services
    }

    fn waypoint(
        &self,
        user: WaypointUser,
        kind: &str,
        meta: &Meta,
        problems: &mut Vec<String>,
    ) -> Option<Arc<str>> {
        let waypoint = gateway::waypoint(user, meta, self.objects, &self.mesh.cluster_domain)?;
        problems.push(format!(
            "{kind} {}: is behind waypoint {waypoint}; waypoints are not carried yet, traffic to it is refused",
            meta.key
        ));
        Some(waypoint)
    }

    fn hostname(&self, service: &Key) -> String {
        let Key { namespace, name } = service;
        format!("{name}.{namespace}.svc.{}", self.mesh.cluster_domain)
    }

    /// Returns a service's key in the store.
    fn key(&self, service: &Key) -> Arc<str> {
        format!("{}/{}", service.namespace, self.hostname(service)).into()
    }

    /// Returns the network of an object on a node: its own label's, else its node's, else the cluster's.
    fn network_of(&self, own: Option<&Meta>, node: &str) -> Arc<str> {
        let own = own.and_then(|own| own.label(NETWORK_LABEL));
        let network = own.or_else(|| self.node_label(node, NETWORK_LABEL));
        network.map_or_else(|| self.network.clone(), Arc::from)
    }

    fn node_label(&self, node: &str, name: &str) -> Option<&str> {
        let key = Key {
            namespace: "".into(),
            name: node.into(),
        };
        self.objects.nodes.get(&key)?.meta.label(name)
    }

    fn locality(&self, node: &str) -> Arc<Locality> {
        let label = |name| self.node_label(node, name).map(Arc::from);
        Arc::new(Locality {
            region: label("topology.kubernetes.io/region").unwrap_or_default(),
            zone: label("topology.kubernetes.io/zone").unwrap_or_default(),
            subzone: label("topology.istio.io/subzone").unwrap_or_default(),
        })
    }
}

fn service_of<'a>(
    objects: &'a Objects,
    slice: &Resource<EndpointSlice>,
) -> Option<&'a Resource<service::Service>> {
    let name = slice.meta.label(SERVICE_LABEL)?.into();
    let key = Key {
        namespace: slice.meta.key.namespace.clone(),
        name,
    };
    objects.services.get(&key).map(Arc::as_ref)
}

/// Returns the network of the cluster: the root namespace's label, or the configured one.
fn network(objects: &Objects, mesh: &MeshConfig) -> Arc<str> {
    let labelled = objects.namespace_label(&mesh.root_namespace, NETWORK_LABEL);
    labelled.unwrap_or(&mesh.network).into()
}

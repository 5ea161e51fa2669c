//! What is known of the mesh at one moment, indexed as it is looked up. Immutable: a change makes a
//! new one, and nobody waits for it.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;
use tokio::sync::watch;

use super::policy::{Policy, PolicyScope};
use super::service::Service;
use super::workload::{Protocol, Workload};

#[cfg(test)]
mod tests;

/// What is known by something that means nothing without its network.
type ByNetwork<K, V> = HashMap<Arc<str>, HashMap<K, V>>;

/// A snapshot of the mesh.
#[derive(Debug, Default)]
pub struct Mesh {
    generation: u64,
    workloads: HashMap<Arc<str>, Arc<Workload>>,
    by_address: ByNetwork<IpAddr, Arc<Workload>>,
    services: HashMap<Arc<str>, Arc<Service>>,
    /// Those of an address, the oldest first; more than one is rare.
    by_vip: ByNetwork<IpAddr, Vec<Arc<Service>>>,
    /// Whose an address from outside is, with a port: that of a load balancer, which its owner
    /// assigns, before one that anybody who may write a Service claims, and then the oldest.
    by_external: ByNetwork<(IpAddr, u16), Arc<Service>>,
    cidrs: Vec<(Arc<str>, IpNet, Arc<Service>)>,
    /// By the service's key, in the order of their uids.
    endpoints: HashMap<Arc<str>, Vec<Arc<Workload>>>,
    policies: HashMap<Arc<str>, Arc<Policy>>,
    global: Vec<Arc<Policy>>,
    by_namespace: HashMap<Arc<str>, Vec<Arc<Policy>>>,
}

/// The policies that apply to a workload.
#[derive(Debug, Default)]
pub struct Applicable<'a> {
    /// Those of everybody, of its namespace, and those that it names.
    pub policies: Vec<&'a Arc<Policy>>,
    /// Keys that it names and that are not there: nobody knows what they say.
    pub unknown: Vec<&'a Arc<str>>,
}

/// Whom an address means to one who connects to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destination<'a> {
    /// A workload, by its own address.
    Workload(&'a Arc<Workload>),
    /// A service, by a virtual address.
    Service(&'a Arc<Service>),
    /// A service, by an address from outside.
    External(&'a Arc<Service>),
    /// A service, by a range of addresses.
    Range(&'a Arc<Service>),
}

impl Mesh {
    /// Of what the sources of configuration say. Of two that share a key the later one holds.
    pub fn build(
        generation: u64,
        workloads: Vec<Workload>,
        services: Vec<Service>,
        policies: Vec<Policy>,
    ) -> Self {
        let mut mesh = Self {
            generation,
            ..Self::default()
        };
        for workload in workloads {
            let uid = Arc::clone(&workload.uid);
            mesh.workloads.insert(uid, Arc::new(workload));
        }
        // The indices are made of what holds, in an order that no source of configuration sways.
        let mut workloads: Vec<Arc<Workload>> = mesh.workloads.values().cloned().collect();
        workloads.sort_by(|one, other| one.uid.cmp(&other.uid));
        for workload in workloads {
            if !workload.host_network {
                for address in &workload.addresses {
                    let of = entry(
                        &mut mesh.by_address,
                        &workload.network,
                        address.to_canonical(),
                    );
                    let of = of.or_insert_with(|| Arc::clone(&workload));
                    if rank(&workload) > rank(of) {
                        *of = Arc::clone(&workload);
                    }
                }
            }
            for service in workload.services.keys() {
                let endpoints = mesh.endpoints.entry(Arc::clone(service)).or_default();
                endpoints.push(Arc::clone(&workload));
            }
        }
        for service in services {
            mesh.services
                .insert(service.key().into(), Arc::new(service));
        }
        let mut services: Vec<&Arc<Service>> = mesh.services.values().collect();
        services.sort_by_cached_key(|service| (service.seniority, service.key()));
        for service in &services {
            for vip in &service.vips {
                let of = entry(&mut mesh.by_vip, &vip.network, vip.address.to_canonical());
                of.or_default().push(Arc::clone(service));
            }
        }
        let balanced = services.iter().map(|service| (service, &service.balanced));
        let external = services.iter().map(|service| (service, &service.external));
        for (service, addresses) in balanced.chain(external) {
            for at in addresses {
                for port in service.ports.keys() {
                    let at_port = (at.address.to_canonical(), *port);
                    entry(&mut mesh.by_external, &at.network, at_port)
                        .or_insert_with(|| Arc::clone(service));
                }
            }
        }
        for service in services {
            for (network, range) in &service.cidrs {
                mesh.cidrs
                    .push((Arc::clone(network), *range, Arc::clone(service)));
            }
        }
        for policy in policies {
            let policy = Arc::new(policy);
            mesh.policies.insert(policy.key().into(), policy);
        }
        let mut keys: Vec<&Arc<str>> = mesh.policies.keys().collect();
        keys.sort();
        for key in keys {
            let policy = &mesh.policies[key];
            match policy.scope {
                PolicyScope::Global => mesh.global.push(Arc::clone(policy)),
                PolicyScope::Namespace => {
                    let of = mesh.by_namespace.entry(policy.namespace.clone());
                    of.or_default().push(Arc::clone(policy));
                }
                PolicyScope::WorkloadSelector => {}
            }
        }
        mesh
    }

    /// How many snapshots there were before it.
    pub fn generation(&self) -> u64 {
        self.generation
    }
    /// Whom a workload means by an address: a workload of its network before a service, and a
    /// service by its own address before one by an address from outside.
    pub fn destination(&self, source: &Workload, to: SocketAddr) -> Option<Destination<'_>> {
        let (network, address) = (&source.network, to.ip().to_canonical());
        if let Some(workload) = self.workload_at(network, address) {
            return Some(Destination::Workload(workload));
        }
        // One that the client may not use counts where no other does, so that it is refused.
        let preference = |service: &&Arc<Service>| {
            let own = service.namespace == source.namespace;
            let visible = service.is_visible_to(&source.namespace);
            std::cmp::Reverse((own, visible, service.canonical))
        };
        let by_vip = self.services_at(network, address);
        if let Some(service) = by_vip.iter().min_by_key(preference) {
            return Some(Destination::Service(service));
        }
        let by_external = self.by_external.get(network);
        let external = by_external.and_then(|all| all.get(&(address, to.port())));
        if let Some(service) = external {
            return Some(Destination::External(service));
        }
        let has =
            |(of, range, _): &&(Arc<str>, IpNet, _)| of == network && range.contains(&address);
        let range = self.cidrs.iter().find(has);
        range.map(|(.., service)| Destination::Range(service))
    }
    /// Whose address it is in a network. Workloads on their node's network have none of their own.
    pub fn workload_at(&self, network: &str, address: IpAddr) -> Option<&Arc<Workload>> {
        self.by_address.get(network)?.get(&address.to_canonical())
    }
    /// The workload of a uid.
    pub fn workload(&self, uid: &str) -> Option<&Arc<Workload>> {
        self.workloads.get(uid)
    }
    /// The services of a virtual address in a network.
    pub fn services_at(&self, network: &str, address: IpAddr) -> &[Arc<Service>] {
        let of = self.by_vip.get(network);
        let of = of.and_then(|of| of.get(&address.to_canonical()));
        of.map_or(&[], Vec::as_slice)
    }
    /// The service of a key, `namespace/hostname`.
    pub fn service(&self, key: &str) -> Option<&Arc<Service>> {
        self.services.get(key)
    }
    /// All endpoints of a service, in whatever health.
    pub fn endpoints(&self, service: &Service) -> &[Arc<Workload>] {
        let of = self.endpoints.get(service.key().as_str());
        of.map_or(&[], Vec::as_slice)
    }
    /// The policies that apply to a workload.
    pub fn policies_of<'a>(&'a self, workload: &'a Workload) -> Applicable<'a> {
        let of_namespace = self.by_namespace.get(&workload.namespace);
        let mut applicable = Applicable {
            policies: self
                .global
                .iter()
                .chain(of_namespace.into_iter().flatten())
                .collect(),
            unknown: Vec::new(),
        };
        for key in &workload.policies {
            match self.policies.get(key) {
                // Whatever its scope says: one that is passed over would let everything pass.
                Some(policy) => {
                    let there = |other: &&Arc<Policy>| Arc::ptr_eq(other, policy);
                    if !applicable.policies.iter().any(there) {
                        applicable.policies.push(policy);
                    }
                }
                None => applicable.unknown.push(key),
            }
        }
        applicable
    }
    /// All workloads, in no order.
    pub fn workloads(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.workloads.values()
    }
    /// All services, in no order.
    pub fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.services.values()
    }
    /// All policies, in no order.
    pub fn policies(&self) -> impl Iterator<Item = &Arc<Policy>> {
        self.policies.values()
    }
}

fn entry<'a, K: Eq + Hash, V>(
    of: &'a mut ByNetwork<K, V>,
    network: &Arc<str>,
    key: K,
) -> std::collections::hash_map::Entry<'a, K, V> {
    of.entry(Arc::clone(network)).or_default().entry(key)
}

/// Of several workloads with one address the one of the highest rank is meant: a pod rather than an
/// endpoint that somebody wrote, and one in the mesh rather than one outside.
fn rank(workload: &Workload) -> u8 {
    let pod = workload.uid.contains("//Pod/");
    u8::from(pod) * 2 + u8::from(workload.protocol == Protocol::Hbone)
}

/// The writer's end, for control.
#[derive(Debug)]
pub struct MeshWriter(watch::Sender<Arc<Mesh>>);

/// A reader's end, for rooms.
#[derive(Clone, Debug)]
pub struct MeshReader(watch::Receiver<Arc<Mesh>>);

/// A mesh with nothing in it, and its two ends.
pub fn store() -> (MeshWriter, MeshReader) {
    let (writer, reader) = watch::channel(Arc::default());
    (MeshWriter(writer), MeshReader(reader))
}

impl MeshWriter {
    /// From now on this is the mesh.
    pub fn publish(&self, mesh: Mesh) {
        self.0.send_replace(Arc::new(mesh));
    }
}

impl MeshReader {
    /// The mesh as it is now.
    pub fn current(&self) -> Arc<Mesh> {
        Arc::clone(&self.0.borrow())
    }

    /// Waits for a mesh that this reader has not waited for yet. For ever, if there will be none.
    pub async fn changed(&mut self) -> Arc<Mesh> {
        if self.0.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
        Arc::clone(&self.0.borrow_and_update())
    }
}

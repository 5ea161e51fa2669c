//! What is known of the mesh at one moment, indexed as it is looked up. Immutable: a change makes a
//! new one, and nobody waits for it.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use tokio::sync::watch;

use super::policy::{Policy, PolicyScope};
use super::service::Service;
use super::workload::{Protocol, Workload};

/// A snapshot of the mesh.
#[derive(Debug, Default)]
pub struct Mesh {
    generation: u64,
    workloads: HashMap<Arc<str>, Arc<Workload>>,
    by_address: HashMap<IpAddr, Arc<Workload>>,
    services: HashMap<Arc<str>, Arc<Service>>,
    by_vip: HashMap<IpAddr, Arc<Service>>,
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
                    let of = mesh
                        .by_address
                        .entry(address.to_canonical())
                        .or_insert_with(|| Arc::clone(&workload));
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
        let mut keys: Vec<&Arc<str>> = mesh.services.keys().collect();
        keys.sort();
        for key in keys {
            let service = &mesh.services[key];
            for vip in &service.vips {
                mesh.by_vip
                    .entry(vip.to_canonical())
                    .or_insert_with(|| Arc::clone(service));
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
    /// Whose address it is. Workloads on their node's network have none of their own.
    pub fn workload_at(&self, address: IpAddr) -> Option<&Arc<Workload>> {
        self.by_address.get(&address.to_canonical())
    }
    /// The workload of a uid.
    pub fn workload(&self, uid: &str) -> Option<&Arc<Workload>> {
        self.workloads.get(uid)
    }
    /// The service of a virtual address.
    pub fn service_at(&self, address: IpAddr) -> Option<&Arc<Service>> {
        self.by_vip.get(&address.to_canonical())
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

#[cfg(test)]
mod tests {
    use super::super::workload::tests::workload;
    use super::*;

    #[test]
    fn of_two_with_one_key_the_later_one_holds_in_every_index() {
        let at = |last| Workload {
            addresses: vec![IpAddr::from([10, 0, 0, last])],
            ..workload(&[])
        };
        let mesh = Mesh::build(1, vec![at(1), at(2)], Vec::new(), Vec::new());
        assert_eq!(mesh.workloads().count(), 1);
        assert!(mesh.workload_at(IpAddr::from([10, 0, 0, 1])).is_none());
        assert!(mesh.workload_at(IpAddr::from([10, 0, 0, 2])).is_some());
    }

    #[test]
    fn an_address_is_found_as_ipv4_and_mapped_and_not_on_the_nodes_network() {
        let mesh = |host_network| {
            let one = Workload {
                host_network,
                ..workload(&[])
            };
            Mesh::build(1, vec![one], Vec::new(), Vec::new())
        };
        for address in ["10.0.0.1", "::ffff:10.0.0.1"] {
            let address = address.parse().expect("an address");
            assert!(mesh(false).workload_at(address).is_some());
            assert!(mesh(true).workload_at(address).is_none());
        }
    }
}

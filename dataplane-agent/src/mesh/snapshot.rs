//! The mesh at one moment, indexed for look-ups. It is a persistent value: a change makes a new one that
//! shares all unchanged parts with the old one, so readers never wait for a writer.

use std::cmp::Reverse;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use imbl::OrdMap;

use super::claims::Claims;
use super::delta::Delta;
use super::endpoints::Endpoints;
use super::identity::Identity;
use super::policy::{Policy, PolicyScope};
use super::ranges::Ranges;
use super::service::{NetworkAddress, Service};
use super::workload::{Protocol, Workload};

#[cfg(test)]
mod tests;

/// A snapshot of the mesh.
#[derive(Clone, Debug, Default)]
pub struct Mesh {
    generation: u64,
    workloads: OrdMap<Arc<str>, Since<Workload>>,
    at_address: Claims<IpAddr, Workload>,
    services: OrdMap<Arc<str>, Arc<Service>>,
    at_vip: Claims<IpAddr, Service>,
    /// The owners of external addresses and ports. Addresses of load balancers, which the balancer's owner
    /// assigns, count before those of `at_external`, which anybody who may write a Service can claim. Of
    /// several claims of one kind the oldest counts.
    at_balanced: Claims<(IpAddr, u16), Service>,
    at_external: Claims<(IpAddr, u16), Service>,
    in_range: Ranges<Service>,
    /// By the service's key.
    endpoints: OrdMap<Arc<str>, Endpoints>,
    policies: OrdMap<Arc<str>, Since<Policy>>,
    /// The policies of all workloads.
    global: Shared,
    /// The policies of whole namespaces.
    by_namespace: OrdMap<Arc<str>, Shared>,
    /// The generation at which a namespace last lost all of its policies.
    emptied: u64,
}

/// A value, and the generation since which it holds.
#[derive(Debug)]
struct Since<T>(Arc<T>, u64);

impl<T> Clone for Since<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0), self.1)
    }
}

/// Policies that apply to several workloads, and the generation of their last change.
#[derive(Clone, Debug, Default)]
struct Shared {
    policies: OrdMap<Arc<str>, Arc<Policy>>,
    since: u64,
}

/// The policies that apply to a workload.
#[derive(Debug, Default)]
pub struct Applicable<'a> {
    /// Global ones, those of its namespace, and those that it names.
    pub policies: Vec<&'a Arc<Policy>>,
    /// Keys that it names but that no policy has.
    pub unknown: Vec<&'a Arc<str>>,
}

/// The object that a client's destination address belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destination<'a> {
    /// A workload, by its own address.
    Workload(&'a Arc<Workload>),
    /// A service, by a virtual address.
    Service(&'a Arc<Service>),
    /// A service, by an external address.
    External(&'a Arc<Service>),
    /// A service, by a range of addresses.
    Range(&'a Arc<Service>),
}

impl Mesh {
    /// Returns a mesh of exactly these objects. Of two with the same key the later one counts.
    pub fn of(workloads: Vec<Workload>, services: Vec<Service>, policies: Vec<Policy>) -> Self {
        let mut mesh = Self::default();
        mesh.apply(Delta::of(workloads, services, policies));
        mesh
    }

    /// Applies a change, and raises the generation.
    pub fn apply(&mut self, delta: Delta) {
        self.generation += 1;
        for (key, service) in delta.services {
            self.put_service(key, service);
        }
        for (uid, workload) in delta.workloads {
            self.put_workload(uid, workload);
        }
        for (key, policy) in delta.policies {
            self.put_policy(key, policy);
        }
    }

    fn put_workload(&mut self, uid: Arc<str>, workload: Option<Workload>) {
        if let Some(Since(old, _)) = self.workloads.remove(&uid) {
            for address in own_addresses(&old) {
                self.at_address.remove(&old.network, &address, &old);
            }
            for service in old.services.keys() {
                let endpoints = self.endpoints_of(service);
                endpoints.remove(&uid);
                if endpoints.is_empty() && !self.services.contains_key(service) {
                    self.endpoints.remove(service);
                }
            }
        }
        let Some(workload) = workload else {
            return;
        };
        let workload = Arc::new(workload);
        for address in own_addresses(&workload) {
            self.at_address
                .insert(&workload.network, address, &workload, is_meant_before);
        }
        for service in workload.services.keys() {
            self.endpoints_of(service).insert(&workload);
        }
        let since = Since(workload, self.generation);
        self.workloads.insert(uid, since);
    }

    fn put_service(&mut self, key: Arc<str>, service: Option<Service>) {
        if let Some(old) = self.services.remove(&key) {
            for vip in &old.vips {
                let address = vip.address.to_canonical();
                self.at_vip.remove(&vip.network, &address, &old);
            }
            for (network, place) in places(&old, &old.balanced) {
                self.at_balanced.remove(network, &place, &old);
            }
            for (network, place) in places(&old, &old.external) {
                self.at_external.remove(network, &place, &old);
            }
            for (network, range) in &old.cidrs {
                self.in_range.remove(network, *range, &old);
            }
        }
        let Some(service) = service else {
            if self.endpoints.get(&key).is_some_and(Endpoints::is_empty) {
                self.endpoints.remove(&key);
            }
            return;
        };
        let service = Arc::new(service);
        for vip in &service.vips {
            let address = vip.address.to_canonical();
            self.at_vip
                .insert(&vip.network, address, &service, is_older);
        }
        for (network, place) in places(&service, &service.balanced) {
            self.at_balanced.insert(network, place, &service, is_older);
        }
        for (network, place) in places(&service, &service.external) {
            self.at_external.insert(network, place, &service, is_older);
        }
        for (network, range) in &service.cidrs {
            self.in_range.insert(network, *range, &service, is_older);
        }
        self.endpoints_of(&key).rank_by(&service);
        self.services.insert(key, service);
    }

    fn put_policy(&mut self, key: Arc<str>, policy: Option<Policy>) {
        if let Some(Since(old, _)) = self.policies.remove(&key) {
            match old.scope {
                PolicyScope::Global => self.global.remove(&key, self.generation),
                PolicyScope::Namespace => {
                    if let Some(shared) = self.by_namespace.get_mut(&old.namespace) {
                        shared.remove(&key, self.generation);
                        if shared.policies.is_empty() {
                            self.by_namespace.remove(&old.namespace);
                            self.emptied = self.generation;
                        }
                    }
                }
                PolicyScope::WorkloadSelector => {}
            }
        }
        let Some(policy) = policy else {
            return;
        };
        let policy = Arc::new(policy);
        match policy.scope {
            PolicyScope::Global => self.global.insert(&key, &policy, self.generation),
            PolicyScope::Namespace => {
                let shared = self.by_namespace.entry(Arc::clone(&policy.namespace));
                shared.or_default().insert(&key, &policy, self.generation);
            }
            PolicyScope::WorkloadSelector => {}
        }
        self.policies.insert(key, Since(policy, self.generation));
    }

    fn endpoints_of(&mut self, service: &Arc<str>) -> &mut Endpoints {
        let of = self.endpoints.entry(Arc::clone(service));
        of.or_insert_with(|| Endpoints::new(Arc::clone(service)))
    }

    /// Returns the number of changes that were applied so far.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Returns the generation since which the policies of a workload are the same: as long as it does not
    /// change, neither does any decision about the workload. `None` if there is no such workload.
    pub fn policy_since(&self, uid: &str) -> Option<u64> {
        let Since(workload, since) = self.workloads.get(uid)?;
        let of_namespace = self.by_namespace.get(&workload.namespace);
        let of_namespace = of_namespace.map_or(self.emptied, |shared| shared.since);
        // A named policy that is missing may have been removed just now.
        let named = workload.policies.iter().map(|key| {
            let policy = self.policies.get(key);
            policy.map_or(self.generation, |Since(_, since)| *since)
        });
        named.chain([*since, self.global.since, of_namespace]).max()
    }

    /// Returns the object that an address belongs to, as seen from `source`: a workload of its network before
    /// a service, a service's virtual address before an external one, and a range last.
    pub fn destination(&self, source: &Workload, to: SocketAddr) -> Option<Destination<'_>> {
        let (network, address) = (&source.network, to.ip().to_canonical());
        if let Some(workload) = self.workload_at(network, address) {
            return Some(Destination::Workload(workload));
        }
        // A service that the client may not use counts if there is no other, so that it is refused.
        let preference = |service: &&Arc<Service>| {
            let own = service.namespace == source.namespace;
            let visible = service.is_visible_to(&source.namespace);
            Reverse((own, visible, service.canonical))
        };
        let by_vip = self.services_at(network, address);
        if let Some(service) = by_vip.iter().min_by_key(preference) {
            return Some(Destination::Service(service));
        }
        let place = (address, to.port());
        let balanced = self.at_balanced.of(network, &place).first();
        let external = || self.at_external.of(network, &place).first();
        if let Some(service) = balanced.or_else(external) {
            return Some(Destination::External(service));
        }
        let range = self.in_range.of(network, address);
        range.map(Destination::Range)
    }
    /// Returns the workload of an address in a network. Workloads on their node's network have no address of
    /// their own.
    pub fn workload_at(&self, network: &str, address: IpAddr) -> Option<&Arc<Workload>> {
        self.at_address.of(network, &address.to_canonical()).first()
    }
    /// Returns the workload with a uid.
    pub fn workload(&self, uid: &str) -> Option<&Arc<Workload>> {
        self.workloads.get(uid).map(|Since(of, _)| of)
    }
    /// Returns the workload with a uid if it has this identity: another one is another pod of that name.
    pub fn workload_as(&self, uid: &str, identity: &Identity) -> Option<&Arc<Workload>> {
        self.workload(uid).filter(|found| found.is(identity))
    }
    /// Returns the services of a virtual address in a network, the oldest first; more than one is rare.
    pub fn services_at(&self, network: &str, address: IpAddr) -> &[Arc<Service>] {
        self.at_vip.of(network, &address.to_canonical())
    }
    /// Returns the service with a key, `namespace/hostname`.
    pub fn service(&self, key: &str) -> Option<&Arc<Service>> {
        self.services.get(key)
    }
    /// Returns the endpoints of a service.
    pub fn endpoints(&self, service: &Service) -> Option<&Endpoints> {
        self.endpoints.get(service.key().as_str())
    }
    /// Returns the policies that apply to a workload.
    pub fn policies_of<'a>(&'a self, workload: &'a Workload) -> Applicable<'a> {
        let of_namespace = self.by_namespace.get(&workload.namespace);
        let shared = [Some(&self.global), of_namespace];
        let shared = shared.into_iter().flatten();
        let mut applicable = Applicable {
            policies: shared.flat_map(|shared| shared.policies.values()).collect(),
            unknown: Vec::new(),
        };
        for key in workload.policies.iter() {
            match self.policies.get(key) {
                // It applies whatever its scope: leaving out a named policy would let everything pass.
                Some(Since(policy, _)) => {
                    let there = match policy.scope {
                        PolicyScope::Global => true,
                        PolicyScope::Namespace => policy.namespace == workload.namespace,
                        PolicyScope::WorkloadSelector => false,
                    };
                    if !there {
                        applicable.policies.push(policy);
                    }
                }
                None => applicable.unknown.push(key),
            }
        }
        applicable
    }
    /// Returns the policy with a key, `namespace/name`.
    pub fn policy(&self, key: &str) -> Option<&Arc<Policy>> {
        self.policies.get(key).map(|Since(of, _)| of)
    }
    /// Returns all workloads, in the order of their uids.
    pub fn workloads(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.workloads.values().map(|Since(of, _)| of)
    }
    /// Returns all services with their keys, in the order of the keys.
    pub fn services(&self) -> impl Iterator<Item = (&Arc<str>, &Arc<Service>)> {
        self.services.iter()
    }
    /// Returns all policies with their keys, in the order of the keys.
    pub fn policies(&self) -> impl ExactSizeIterator<Item = (&Arc<str>, &Arc<Policy>)> {
        self.policies.iter().map(|(key, Since(of, _))| (key, of))
    }
}

impl Shared {
    fn insert(&mut self, key: &Arc<str>, policy: &Arc<Policy>, generation: u64) {
        self.policies.insert(Arc::clone(key), Arc::clone(policy));
        self.since = generation;
    }

    fn remove(&mut self, key: &str, generation: u64) {
        self.policies.remove(key);
        self.since = generation;
    }
}

/// Returns the addresses that identify a workload.
fn own_addresses(workload: &Workload) -> impl Iterator<Item = IpAddr> + use<'_> {
    let own = workload.addresses.iter().filter(|_| !workload.host_network);
    own.map(IpAddr::to_canonical)
}

/// Returns each of the external addresses with each of the service's ports, and the address's network.
fn places<'a>(
    service: &'a Service,
    addresses: &'a [NetworkAddress],
) -> impl Iterator<Item = (&'a Arc<str>, (IpAddr, u16))> {
    addresses.iter().flat_map(|at| {
        let address = at.address.to_canonical();
        let ports = service.ports.keys();
        ports.map(move |port| (&at.network, (address, *port)))
    })
}

/// The order of several workloads with one address, of which the first is meant: a pod comes before an endpoint
/// without a pod, and a workload in the mesh before one outside.
fn is_meant_before(one: &Workload, other: &Workload) -> bool {
    let rank = |of: &Workload| {
        let pod = of.uid.contains("//Pod/");
        Reverse((pod, of.protocol == Protocol::Hbone))
    };
    (rank(one), &one.uid) < (rank(other), &other.uid)
}

fn is_older(one: &Service, other: &Service) -> bool {
    (one.age, one.key()) < (other.age, other.key())
}

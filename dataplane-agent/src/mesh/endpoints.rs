//! The endpoints of a service, indexed for load balancing: a client gets a healthy one near it, at random by
//! weight, in a time that does not depend on the number of endpoints.
//!
//! For a given client, endpoints are ranked by health, then by the number of scopes that they share with the
//! client, counted from the widest. So each endpoint is in one pool for each number of scopes from none to
//! all, keyed by its values of these scopes: the endpoints that share the first two scopes with a client are
//! in the pool of the client's own first two values.

use std::sync::Arc;

use imbl::{OrdMap, Vector};
use rand::Rng;
use rand::distr::Distribution;
use rand::distr::weighted::WeightedIndex;

use super::service::{Family, Scope, Service};
use super::workload::{Health, Workload};

#[cfg(test)]
mod tests;

/// All endpoints of one service, whatever their health. A clone shares its contents.
#[derive(Clone, Debug)]
pub struct Endpoints {
    /// The service's key.
    service: Arc<str>,
    ranking: Ranking,
    /// By uid.
    members: OrdMap<Arc<str>, Member>,
    pools: OrdMap<PoolKey, Pool>,
}

/// The settings of a service that rank its endpoints.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Ranking {
    preferences: Vec<Scope>,
    publish_not_ready: bool,
    family: Option<Family>,
}

#[derive(Clone, Debug)]
struct Member {
    workload: Arc<Workload>,
    /// Its index in the pool of no scope, of the first scope, of the first two, and so on; empty if it takes
    /// no load.
    at: Arc<[usize]>,
}

/// The properties that all endpoints of one pool share.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct PoolKey {
    /// The network in which they can be reached. It is the first field: see [`Endpoints::elsewhere`].
    network: Arc<str>,
    health: Health,
    /// Their values of the first scopes, from the widest.
    shared: Vec<Arc<str>>,
}

/// Endpoints in classes by their weight, rounded down to a power of two, so that none weighs twice as much as
/// another of its class. There are few classes, usually one.
#[derive(Clone, Debug, Default)]
struct Pool(Arc<[Class]>);

#[derive(Clone, Debug, Default)]
struct Class {
    /// The power of two.
    power: u32,
    /// The sum of their weights.
    weight: u64,
    workloads: Vector<Arc<Workload>>,
}

impl Endpoints {
    /// Returns an empty set for a service that is known only by its key.
    pub(super) fn new(service: Arc<str>) -> Self {
        Self {
            service,
            ranking: Ranking::default(),
            members: OrdMap::default(),
            pools: OrdMap::default(),
        }
    }

    /// Returns an endpoint that takes load and is in another network than this one, if there is any.
    pub fn elsewhere(&self, network: &str) -> Option<&Arc<Workload>> {
        // Pools are ordered by network first: if both ends are of this one, all are.
        let ends = [self.pools.get_min(), self.pools.get_max()];
        let other = ends.into_iter().flatten();
        let mut other = other.filter(|(key, _)| *key.network != *network);
        other.find_map(|(_, pool)| pool.0.first()?.workloads.front())
    }

    /// Returns all endpoints, in the order of their uids.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.members.values().map(|member| &member.workload)
    }

    /// Picks an endpoint for a client: of those that take load and are in its network the healthiest, of these
    /// those that share most scopes with it, and of these one at random by weight.
    ///
    /// With `all` only those that share all scopes with the client count. An endpoint for which `takes` returns
    /// `None` is not picked; otherwise its value is returned with the endpoint.
    pub fn draw<T>(
        &self,
        client: &Workload,
        all: bool,
        takes: impl Fn(&Workload) -> Option<T>,
    ) -> Option<(&Arc<Workload>, T)> {
        let scopes = self.ranking.preferences.len();
        let least = if all { scopes } else { 0 };
        let healths = [Health::Healthy, Health::Terminating].into_iter();
        let ranks = healths.flat_map(|health| (least..=scopes).rev().map(move |of| (health, of)));
        ranks
            .map(|(health, scopes)| self.key(client, health, scopes))
            .find_map(|key| self.pools.get(&key)?.draw(&takes))
    }

    /// Ranks the endpoints anew if the service's settings have changed.
    pub(super) fn rank_by(&mut self, service: &Service) {
        let ranking = Ranking {
            preferences: service.load_balancing.preferences.clone(),
            publish_not_ready: service.publish_not_ready,
            family: service.family,
        };
        if ranking == self.ranking {
            return;
        }
        self.ranking = ranking;
        self.pools = OrdMap::default();
        for (_, member) in std::mem::take(&mut self.members) {
            self.insert(&member.workload);
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// Adds an endpoint that is not in it yet.
    pub(super) fn insert(&mut self, workload: &Arc<Workload>) {
        let mut at = Vec::new();
        if let Some(health) = self.takes_load(workload) {
            for scopes in 0..=self.ranking.preferences.len() {
                let key = self.key(workload, health, scopes);
                at.push(self.pools.entry(key).or_default().push(workload));
            }
        }
        let member = Member {
            workload: Arc::clone(workload),
            at: at.into(),
        };
        self.members.insert(Arc::clone(&workload.uid), member);
    }

    /// Removes an endpoint, if it is there.
    pub(super) fn remove(&mut self, uid: &str) {
        let Some(Member { workload, at }) = self.members.remove(uid) else {
            return;
        };
        let Some(health) = self.takes_load(&workload) else {
            return;
        };
        for (scopes, &at) in at.iter().enumerate() {
            let key = self.key(&workload, health, scopes);
            let Some(pool) = self.pools.get_mut(&key) else {
                continue;
            };
            let moved = pool.take(at, workload.capacity);
            if pool.0.is_empty() {
                self.pools.remove(&key);
            }
            if let Some(member) = moved.and_then(|moved| self.members.get_mut(&moved.uid)) {
                Arc::make_mut(&mut member.at)[scopes] = at;
            }
        }
    }

    /// Returns the health that a workload counts with; `None` if it takes no load.
    fn takes_load(&self, workload: &Workload) -> Option<Health> {
        let Ranking {
            publish_not_ready,
            family,
            ..
        } = self.ranking;
        let health = match publish_not_ready {
            true => Health::Healthy,
            false => workload.services.get(&self.service)?.health,
        };
        let allowed = |at| family.is_none_or(|family| family.has(at));
        let reached = workload.addresses.iter().any(allowed);
        (health != Health::Unhealthy && reached && workload.capacity > 0).then_some(health)
    }

    /// Returns the key of the pool of endpoints that share the first `scopes` scopes with a workload.
    fn key(&self, workload: &Workload, health: Health, scopes: usize) -> PoolKey {
        let scopes = self.ranking.preferences.iter().take(scopes);
        PoolKey {
            network: Arc::clone(&workload.network),
            health,
            shared: scopes.map(|scope| Arc::clone(scope.of(workload))).collect(),
        }
    }
}

impl Pool {
    /// Number of random draws before all endpoints are looked at; most draws find one that will do at once.
    const DRAWS: usize = 16;

    fn draw<T>(&self, takes: impl Fn(&Workload) -> Option<T>) -> Option<(&Arc<Workload>, T)> {
        for _ in 0..Self::DRAWS {
            let class = self.class(rand::rng().random_range(0..self.weight()))?;
            let workload = class.draw();
            if let Some(taken) = takes(workload) {
                return Some((workload, taken));
            }
        }
        let all = self.0.iter().flat_map(|class| class.workloads.iter());
        let able = all.filter_map(|workload| Some((workload, takes(workload)?)));
        let mut able: Vec<_> = able.collect();
        let weights = able.iter().map(|(workload, _)| workload.capacity);
        let drawn = WeightedIndex::new(weights).ok()?.sample(&mut rand::rng());
        Some(able.swap_remove(drawn))
    }

    fn weight(&self) -> u64 {
        self.0.iter().map(|class| class.weight).sum()
    }

    /// Returns the class that holds a point of the pool's total weight.
    fn class(&self, mut drawn: u64) -> Option<&Class> {
        self.0.iter().find(|class| {
            let is = drawn < class.weight;
            drawn = drawn.saturating_sub(class.weight);
            is
        })
    }

    /// Adds an endpoint, and returns its index in its class.
    fn push(&mut self, workload: &Arc<Workload>) -> usize {
        let power = workload.capacity.ilog2();
        let at = self.0.iter().position(|class| class.power == power);
        let at = at.unwrap_or_else(|| {
            let new = Class {
                power,
                ..Class::default()
            };
            self.0 = self.0.iter().cloned().chain([new]).collect();
            self.0.len() - 1
        });
        let class = &mut Arc::make_mut(&mut self.0)[at];
        class.weight += u64::from(workload.capacity);
        class.workloads.push_back(Arc::clone(workload));
        class.workloads.len() - 1
    }

    /// Removes the endpoint at this index of the class of its weight, and returns the one that was moved there.
    fn take(&mut self, at: usize, weight: u32) -> Option<Arc<Workload>> {
        let power = weight.ilog2();
        let mut classes = Arc::make_mut(&mut self.0).iter_mut();
        let class = classes.find(|class| class.power == power)?;
        class.weight -= u64::from(weight);
        let last = class.workloads.pop_back()?;
        if class.workloads.is_empty() {
            let others = self.0.iter().filter(|class| class.power != power);
            self.0 = others.cloned().collect();
        } else if at < class.workloads.len() {
            class.workloads.set(at, Arc::clone(&last));
            return Some(last);
        }
        None
    }
}

impl Class {
    /// Draws an endpoint by weight. An attempt succeeds with a probability of at least one half.
    fn draw(&self) -> &Arc<Workload> {
        loop {
            let mut rng = rand::rng();
            let workload = &self.workloads[rng.random_range(0..self.workloads.len())];
            let twice = 2_u64 << workload.capacity.ilog2();
            if rng.random_range(0..twice) < u64::from(workload.capacity) {
                return workload;
            }
        }
    }
}

//! The endpoints of a service, ready to be drawn from: whoever connects to it gets one that is healthy and
//! near, at random by weight, in a time that does not depend on how many there are.
//!
//! What makes an endpoint better than another, for a given client, is its health and then how many scopes
//! it shares with the client, from the widest on. So an endpoint is in one pool for each number of scopes
//! from none to all, by its values of these: whoever shares the first two scopes with a client is in the
//! pool of the client's own first two values.

use std::sync::Arc;

use imbl::{OrdMap, Vector};
use rand::Rng;
use rand::distr::Distribution;
use rand::distr::weighted::WeightedIndex;

use super::service::{Family, Scope, Service};
use super::workload::{Health, Workload};

#[cfg(test)]
mod tests;

/// All endpoints of one service, in whatever health. A copy shares what is in it.
#[derive(Clone, Debug)]
pub struct Endpoints {
    /// The service's key.
    service: Arc<str>,
    ranking: Ranking,
    /// By uid.
    members: OrdMap<Arc<str>, Member>,
    pools: OrdMap<PoolKey, Pool>,
}

/// What of a service says which of its endpoints are the better ones.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Ranking {
    preferences: Vec<Scope>,
    publish_not_ready: bool,
    family: Option<Family>,
}

#[derive(Clone, Debug)]
struct Member {
    workload: Arc<Workload>,
    /// Where it is in the pool of no scope, of the first one, and so on; empty if it takes no load.
    at: Arc<[usize]>,
}

/// What endpoints have in common that are alike to a client.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct PoolKey {
    /// The network in which they can be reached.
    network: Arc<str>,
    health: Health,
    /// Their values of so many scopes, from the widest on.
    shared: Vec<Arc<str>>,
}

/// Endpoints by the power of two that their weight is at least, so that none of a class weighs twice as
/// much as another. There are few classes, mostly one.
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
    /// Of a service of which nothing is known but its key.
    pub(super) fn new(service: Arc<str>) -> Self {
        Self {
            service,
            ranking: Ranking::default(),
            members: OrdMap::default(),
            pools: OrdMap::default(),
        }
    }

    /// All of them, in the order of their uids.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.members.values().map(|member| &member.workload)
    }

    /// One for a client: of those that take load and can be reached the healthiest, of these those that
    /// share most with it, and of these one at random by weight.
    ///
    /// `all`: only those that share all scopes with it. `takes`: what one has that may be drawn.
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

    /// Ranks them by what a service says.
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

    /// Adds one that is not in it.
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

    /// Takes one out.
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

    /// How healthy one counts; none if it takes no load.
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

    /// The pool of those that share so many scopes with a workload.
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
    /// How often one is drawn, of those that will do most probably, before all are looked at.
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

    /// Whose turn it is.
    fn class(&self, mut drawn: u64) -> Option<&Class> {
        self.0.iter().find(|class| {
            let is = drawn < class.weight;
            drawn = drawn.saturating_sub(class.weight);
            is
        })
    }

    /// Adds one, and says where it is in its class.
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

    /// Takes out the one of that weight that is there, and says who is in its place now.
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
    /// One by weight: at least every second attempt brings one.
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

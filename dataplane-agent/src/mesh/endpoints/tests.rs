//! Which endpoints are drawn, and how often, also after some were added and removed.

use std::collections::{BTreeMap, HashMap};

use proptest::collection::vec;
use proptest::prelude::*;

use super::super::workload::{self, tests::workload};
use super::*;

const KEY: &str = "ns/svc";

/// Returns an endpoint; `number` makes its uid, `capacity` is its weight.
fn endpoint(number: u8, capacity: u32, health: Health, zone: &str) -> Arc<Workload> {
    let mut one = workload(&[]);
    one.uid = format!("c//Pod/ns/{number}").into();
    one.capacity = capacity;
    Arc::make_mut(&mut one.locality).zone = zone.into();
    let of_service = workload::Endpoint {
        ports: Arc::default(),
        health,
    };
    one.services = BTreeMap::from([(KEY.into(), of_service)]).into();
    Arc::new(one)
}

fn client() -> Workload {
    let mut client = workload(&[]);
    Arc::make_mut(&mut client.locality).zone = "here".into();
    client
}

fn preferring_zones() -> Endpoints {
    let mut endpoints = Endpoints::new(KEY.into());
    endpoints.ranking.preferences = vec![Scope::Zone];
    endpoints
}

/// Returns how often each endpoint is drawn.
fn draws(endpoints: &Endpoints, times: usize) -> HashMap<Arc<str>, f64> {
    let mut drawn = HashMap::new();
    for _ in 0..times {
        let client = client();
        if let Some((workload, ())) = endpoints.draw(&client, false, |_| Some(())) {
            *drawn.entry(Arc::clone(&workload.uid)).or_default() += 1.0;
        }
    }
    drawn
}

#[test]
fn each_is_drawn_as_often_as_it_weighs_whatever_the_others_weigh() {
    let weights = [1, 2, 3, 7, 8, 15, 64, 100];
    let mut endpoints = preferring_zones();
    for (number, weight) in (0..).zip(weights) {
        endpoints.insert(&endpoint(number, weight, Health::Healthy, "here"));
    }
    const TIMES: usize = 100_000;
    let drawn = draws(&endpoints, TIMES);
    let total: u32 = weights.iter().sum();
    let mut chi_square = 0.0;
    for (number, weight) in (0..).zip(weights) {
        let expected = TIMES as f64 * f64::from(weight) / f64::from(total);
        let uid = &endpoint(number, 1, Health::Healthy, "").uid;
        let found = drawn.get(uid).copied().unwrap_or_default();
        chi_square += (found - expected).powi(2) / expected;
    }
    // Seven degrees of freedom: one run in ten million goes beyond this.
    assert!(chi_square < 45.0, "{chi_square}: {drawn:?}");
}

#[test]
fn one_that_will_do_is_found_among_many_that_will_not() {
    let mut endpoints = preferring_zones();
    for number in 0..250 {
        endpoints.insert(&endpoint(number, 1, Health::Healthy, "here"));
    }
    let only = "c//Pod/ns/17";
    let takes = |workload: &Workload| (*workload.uid == *only).then_some(17);
    for _ in 0..20 {
        let client = client();
        let drawn = endpoints.draw(&client, false, takes);
        let (workload, taken) = drawn.expect("there is one");
        assert_eq!((&*workload.uid, taken), (only, 17));
    }
    let nobody = endpoints.draw(&client(), false, |_| None::<()>);
    assert!(nobody.is_none());
}

#[test]
fn one_of_another_network_is_found_wherever_it_is_among_others_if_it_takes_load() {
    let of = |number, network: &str, health| {
        let mut one = Workload::clone(&endpoint(number, 1, health, "here"));
        one.network = network.into();
        Arc::new(one)
    };
    for network in ["a", "z"] {
        let mut endpoints = preferring_zones();
        for number in 0..20 {
            endpoints.insert(&of(number, "mine", Health::Healthy));
        }
        endpoints.insert(&of(20, network, Health::Unhealthy));
        assert_eq!(endpoints.elsewhere("mine"), None);
        let found = of(21, network, Health::Terminating);
        endpoints.insert(&found);
        assert_eq!(endpoints.elsewhere("mine"), Some(&found));
        assert!(endpoints.elsewhere(network).is_some());
    }
}

/// Mostly equal endpoints, so that many are in one pool.
fn endpoints() -> impl Strategy<Value = (u32, Health, &'static str)> {
    let capacity = prop_oneof![6 => Just(1), 1 => Just(0), 2 => Just(2)];
    let health = prop_oneof![
        6 => Just(Health::Healthy),
        1 => Just(Health::Terminating),
        1 => Just(Health::Unhealthy)
    ];
    (
        capacity,
        health,
        prop_oneof![4 => Just("here"), 1 => Just("away")],
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever was added and removed: only the best of those that are there are drawn.
    #[test]
    fn the_best_that_are_there_are_drawn(
        steps in vec((0..8_u8, prop::option::weighted(0.7, endpoints())), 1..20),
    ) {
        let mut endpoints = preferring_zones();
        let mut there: BTreeMap<u8, (u32, Health, bool)> = BTreeMap::new();
        for (number, is) in steps {
            endpoints.remove(&endpoint(number, 0, Health::Healthy, "").uid);
            there.remove(&number);
            if let Some((capacity, health, zone)) = is {
                endpoints.insert(&endpoint(number, capacity, health, zone));
                there.insert(number, (capacity, health, zone == "here"));
            }
            let able = there.iter().filter(|(_, (capacity, health, _))| {
                *capacity > 0 && *health != Health::Unhealthy
            });
            let best = able.clone().map(|(_, (_, health, here))| (*health, *here)).max();
            let mut expected: Vec<Arc<str>> = able
                .filter(|(_, (_, health, here))| Some((*health, *here)) == best)
                .map(|(number, _)| Arc::clone(&endpoint(*number, 0, Health::Healthy, "").uid))
                .collect();
            // An endpoint with a fifteenth of the total weight is missed once in a trillion runs.
            let mut found: Vec<Arc<str>> = draws(&endpoints, 400).into_keys().collect();
            found.sort();
            expected.sort();
            prop_assert_eq!(found, expected);
            let all: Vec<&Arc<str>> = endpoints.iter().map(|one| &one.uid).collect();
            prop_assert_eq!(all.len(), there.len());
        }
    }
}

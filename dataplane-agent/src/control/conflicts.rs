//! Reports addresses that more than one object claims. Who gets such an address is decided where it is looked
//! up.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use crate::mesh::service::{NetworkAddress, Service};
use crate::mesh::workload::Workload;

/// Network and address.
type At<'a> = (&'a str, IpAddr);

/// Adds a problem for each such address, in the order of the addresses.
pub(crate) fn report<'a>(
    workloads: impl Iterator<Item = &'a Workload>,
    services: impl Iterator<Item = &'a Service>,
    problems: &mut Vec<String>,
) {
    let pods = pods(workloads);
    for ((_, address), uids) in pods.iter().filter(|(_, uids)| uids.len() > 1) {
        problems.push(format!(
            "address {address}: is that of {}",
            uids.join(" and ")
        ));
    }
    let mut services: Vec<&Service> = services.collect();
    services.sort_by_cached_key(|service| (service.age, service.key()));
    let mut own: BTreeMap<At<'_>, Vec<String>> = BTreeMap::new();
    for service in &services {
        for vip in &service.vips {
            own.entry(at(vip)).or_default().push(service.key());
        }
    }
    for (at, keys) in &own {
        if let Some(uids) = pods.get(at) {
            report_conflict(at.1, &uids.join(" and "), keys, problems);
        } else if let [first, others @ ..] = keys.as_slice()
            && !others.is_empty()
        {
            report_conflict(at.1, &format!("service {first}"), others, problems);
        }
    }
    for ((at, port), keys) in outside(&services) {
        let address = SocketAddr::new(at.1, port);
        if let Some(uids) = pods.get(&at) {
            report_conflict(address, &uids.join(" and "), &keys, problems);
        } else if let Some(own) = own.get(&at) {
            report_conflict(
                address,
                &format!("service {}", own.join(" and ")),
                &keys,
                problems,
            );
        } else if let [first, others @ ..] = keys.as_slice()
            && !others.is_empty()
        {
            report_conflict(address, &format!("service {first}"), others, problems);
        }
    }
}

fn report_conflict(
    address: impl std::fmt::Display,
    holds: &str,
    others: &[String],
    problems: &mut Vec<String>,
) {
    let others = others.join(" and ");
    problems.push(format!(
        "address {address}: is that of {holds}; service {others} claims it too, and does not get it"
    ));
}

fn pods<'a>(workloads: impl Iterator<Item = &'a Workload>) -> BTreeMap<At<'a>, Vec<&'a str>> {
    let mut pods: BTreeMap<At<'_>, Vec<&str>> = BTreeMap::new();
    for workload in workloads.filter(|workload| !workload.host_network) {
        for address in &workload.addresses {
            let at = (&*workload.network, address.to_canonical());
            let uids = pods.entry(at).or_default();
            if !uids.contains(&&*workload.uid) {
                uids.push(&workload.uid);
            }
        }
    }
    pods
}

/// Returns the services that claim each outside address and port, the one that gets it first.
fn outside<'a>(services: &[&'a Service]) -> BTreeMap<(At<'a>, u16), Vec<String>> {
    let mut all: BTreeMap<(At<'a>, u16), Vec<String>> = BTreeMap::new();
    let balanced = services.iter().map(|service| (service, &service.balanced));
    let external = services.iter().map(|service| (service, &service.external));
    for (service, addresses) in balanced.chain(external) {
        for address in addresses {
            for port in service.ports.keys() {
                let keys = all.entry((at(address), *port)).or_default();
                if !keys.contains(&service.key()) {
                    keys.push(service.key());
                }
            }
        }
    }
    all
}

fn at(of: &NetworkAddress) -> At<'_> {
    (&of.network, of.address.to_canonical())
}

//! Headers of a CONNECT request: authority, `forwarded`, `baggage`, `traceparent`. Pure functions.

use std::fmt::Write as _;
use std::net::SocketAddr;

use crate::mesh::workload::{Workload, WorkloadType};

/// Most bytes of a host's name (RFC 1035, 2.3.4, without the dot at its end).
const MAX_HOST: usize = 253;

/// Parses an authority that is one address and port, `192.0.2.1:80` or `[2001:db8::1]:80`. Host names, users, zones
/// and port 0 are rejected.
pub fn authority(text: &str) -> Option<SocketAddr> {
    let address: SocketAddr = text.parse().ok()?;
    let (_, port) = text.rsplit_once(':')?;
    // The standard parser takes `+`-less digits only, but any number of leading zeros.
    if address.port() == 0 || port.starts_with('0') || text.contains('%') {
        return None;
    }
    Some(address)
}

/// Returns the `host=` of a `forwarded` header, unquoted: the service that the client asked for. `for=` is not read,
/// since the peer could write anything there. What is longer than a host's name can be is none.
pub fn forwarded_host(text: &str) -> Option<&str> {
    text.split(';').find_map(|pair| {
        let (name, value) = pair.split_once('=')?;
        if !name.trim().eq_ignore_ascii_case("host") {
            return None;
        }
        let value = value.trim();
        let value = value
            .strip_prefix('"')
            .map_or(Some(value), |rest| rest.strip_suffix('"'))?;
        let fits = (1..=MAX_HOST).contains(&value.len());
        (fits && !value.contains('"')).then_some(value)
    })
}

/// Formats a `forwarded` header with the client and the service that it asked for, if any.
pub fn forwarded(client: SocketAddr, host: Option<&str>) -> String {
    match host {
        Some(host) => format!("for=\"{client}\";host={host}"),
        None => format!("for=\"{client}\""),
    }
}

/// Formats the `baggage` that describes a workload to the other end. Keys without a value are left out.
pub fn baggage(workload: &Workload) -> String {
    let kind = match workload.workload_type {
        WorkloadType::Deployment => "k8s.deployment.name",
        WorkloadType::CronJob => "k8s.cronjob.name",
        WorkloadType::Pod => "k8s.pod.name",
        WorkloadType::Job => "k8s.job.name",
    };
    let mut text = String::with_capacity(192);
    for (key, value) in [
        ("k8s.cluster.name", &workload.cluster_id),
        ("k8s.namespace.name", &workload.namespace),
        (kind, &workload.workload_name),
        ("service.name", &workload.canonical_name),
        ("service.version", &workload.canonical_revision),
        ("cloud.region", &workload.locality.region),
        ("cloud.availability_zone", &workload.locality.zone),
    ] {
        if value.is_empty() {
            continue;
        }
        if !text.is_empty() {
            text.push(',');
        }
        text.push_str(key);
        text.push('=');
        text.push_str(value);
    }
    text
}

/// Returns a new `traceparent`, not sampled.
pub fn traceparent() -> String {
    let mut text = String::with_capacity(55);
    // Writing to a String cannot fail.
    let _ = write!(
        text,
        "00-{:032x}-{:016x}-00",
        rand::random::<u128>(),
        rand::random::<u64>()
    );
    text
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_authority_is_one_address_and_port() {
        for good in ["10.0.0.1:80", "[2001:db8::1]:15008"] {
            assert_eq!(authority(good).expect(good).to_string(), good);
        }
        for bad in [
            "",
            "10.0.0.1",
            "10.0.0.1:",
            "10.0.0.1:0",
            "10.0.0.1:080",
            "10.0.0.1:65536",
            "host:80",
            "2001:db8::1:80",
            "[2001:db8::1]",
            "[fe80::1%1]:80",
            "me@10.0.0.1:80",
            "10.0.0.1:80 ",
            "10.0.0.01:80",
            "010.0.0.1:80",
        ] {
            assert_eq!(authority(bad), None, "{bad}");
        }
    }

    #[test]
    fn only_the_host_of_forwarded_is_read() {
        assert_eq!(forwarded_host("for=\"10.0.0.1:80\";host=a.b"), Some("a.b"));
        assert_eq!(forwarded_host("Host=\"a.b\" ; for=x"), Some("a.b"));
        for none in ["", "for=x", "host=", "host=\"", "host=\"a", "hostname=a"] {
            assert_eq!(forwarded_host(none), None, "{none}");
        }
        let host = |length| format!("host={}", "a".repeat(length));
        assert!(forwarded_host(&host(253)).is_some());
        assert_eq!(forwarded_host(&host(254)), None);
        let client = "[2001:db8::1]:4".parse().expect("an address");
        assert_eq!(
            forwarded(client, Some("s")),
            "for=\"[2001:db8::1]:4\";host=s"
        );
    }

    #[test]
    fn a_traceparent_has_its_length() {
        assert_eq!(traceparent().len(), 55);
    }

    proptest! {
        #[test]
        fn no_header_panics(text in ".*") {
            let _ = authority(&text);
            if let Some(host) = forwarded_host(&text) {
                prop_assert!(!host.is_empty() && text.contains(host));
            }
        }
        #[test]
        fn what_is_printed_is_parsed(ip: std::net::IpAddr, port in 1u16.., host in "[a-z][a-z0-9.-]{0,40}") {
            let address = SocketAddr::new(ip, port);
            prop_assert_eq!(authority(&address.to_string()), Some(address));
            let text = forwarded(address, Some(&host));
            prop_assert_eq!(forwarded_host(&text), Some(host.as_str()));
        }
        #[test]
        fn baggage_names_only_what_is_known(name in "[a-z]{0,8}", region in "[a-z]{0,8}") {
            let workload = workload(&name, &region);
            let text = baggage(&workload);
            for pair in text.split(',').filter(|pair| !pair.is_empty()) {
                let (_, value) = pair.split_once('=').expect("a pair");
                prop_assert!(!value.is_empty());
            }
            prop_assert_eq!(text.contains("k8s.deployment.name="), !name.is_empty());
            prop_assert_eq!(text.contains("cloud.region="), !region.is_empty());
        }
    }

    fn workload(name: &str, region: &str) -> Workload {
        let mut workload = crate::mesh::workload::tests::workload(&[]);
        workload.workload_name = name.into();
        workload.workload_type = WorkloadType::Deployment;
        std::sync::Arc::make_mut(&mut workload.locality).region = region.into();
        workload
    }
}

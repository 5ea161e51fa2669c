//! Compares our policies with istiod's, on istiod's own test files. These are not kept here: `ISTIOD_PAIRS` names
//! their folder, with a file `X-in.yaml` and istiod's result `X.yaml` for each case.

use std::fs;
use std::path::Path;

use serde::Deserialize;

use super::super::yaml::documents;
use super::translation;
use crate::mesh::policy::{
    Action, Clause, Match, Policy, PolicyScope, Rule, ServiceAccountMatch, StringMatch,
};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Authorization {
    name: String,
    namespace: Option<String>,
    scope: Option<String>,
    action: Option<String>,
    #[serde(default)]
    groups: Vec<Group>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Group {
    rules: Vec<Rules>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Rules {
    matches: Vec<RawMatch>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct RawMatch {
    namespaces: Vec<Text>,
    not_namespaces: Vec<Text>,
    principals: Vec<Text>,
    not_principals: Vec<Text>,
    service_accounts: Vec<ServiceAccountMatch>,
    not_service_accounts: Vec<ServiceAccountMatch>,
    source_ips: Vec<Address>,
    not_source_ips: Vec<Address>,
    destination_ips: Vec<Address>,
    not_destination_ips: Vec<Address>,
    destination_ports: Vec<u16>,
    not_destination_ports: Vec<u16>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Text {
    exact: Option<String>,
    prefix: Option<String>,
    suffix: Option<String>,
    presence: Option<serde::de::IgnoredAny>,
}

/// An address: Base64 of four bytes, and a prefix length.
#[derive(Deserialize)]
struct Address {
    address: String,
    length: u8,
}

impl Address {
    fn net(self) -> ipnet::IpNet {
        let letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        let bits = self
            .address
            .chars()
            .filter_map(|c| letters.find(c))
            .fold(0u64, |bits, at| bits << 6 | at as u64);
        let address = std::net::Ipv4Addr::from((bits >> 4) as u32);
        format!("{address}/{}", self.length)
            .parse()
            .expect("a block")
    }
}

impl Text {
    fn expected(self) -> StringMatch {
        match (self.exact, self.prefix, self.suffix, self.presence) {
            (Some(text), None, None, None) => StringMatch::Exact(text.into()),
            (None, Some(text), None, None) => StringMatch::Prefix(text.into()),
            (None, None, Some(text), None) => StringMatch::Suffix(text.into()),
            (None, None, None, Some(_)) => StringMatch::Presence,
            _ => panic!("one of them"),
        }
    }
}

impl Authorization {
    fn expected(self) -> Policy {
        let texts = |raw: Vec<Text>| raw.into_iter().map(Text::expected).collect();
        let nets = |raw: Vec<Address>| raw.into_iter().map(Address::net).collect();
        let one = |raw: RawMatch| Match {
            namespaces: texts(raw.namespaces),
            not_namespaces: texts(raw.not_namespaces),
            principals: texts(raw.principals),
            not_principals: texts(raw.not_principals),
            service_accounts: raw.service_accounts,
            not_service_accounts: raw.not_service_accounts,
            source_ips: nets(raw.source_ips),
            not_source_ips: nets(raw.not_source_ips),
            destination_ips: nets(raw.destination_ips),
            not_destination_ips: nets(raw.not_destination_ips),
            destination_ports: raw.destination_ports,
            not_destination_ports: raw.not_destination_ports,
        };
        let clause = |raw: Rules| Clause {
            matches: raw.matches.into_iter().map(one).collect(),
        };
        let rule = |raw: Group| Rule {
            clauses: raw.rules.into_iter().map(clause).collect(),
        };
        Policy {
            name: self.name.into(),
            // istiod's cases have no namespace where Kubernetes would say `default`.
            namespace: self.namespace.as_deref().unwrap_or("default").into(),
            scope: match self.scope.as_deref() {
                None => PolicyScope::Global,
                Some("NAMESPACE") => PolicyScope::Namespace,
                Some("WORKLOAD_SELECTOR") => PolicyScope::WorkloadSelector,
                Some(other) => panic!("scope {other}"),
            },
            action: match self.action.as_deref() {
                None => Action::Allow,
                Some("DENY") => Action::Deny,
                Some(other) => panic!("action {other}"),
            },
            rules: self.groups.into_iter().map(rule).collect(),
            dry_run: false,
        }
    }
}

#[test]
#[expect(
    clippy::disallowed_methods,
    reason = "what a test is told, and no setting"
)]
#[ignore = "ISTIOD_PAIRS has to name the folder of istiod's pairs of policies"]
fn istiods_pairs_come_out_the_same() {
    let dir = std::env::var_os("ISTIOD_PAIRS").expect("ISTIOD_PAIRS names a folder");
    let dir = Path::new(&dir);
    let entries = fs::read_dir(dir).expect("a folder");
    let mut ran = 0;
    for path in entries.map(|entry| entry.expect("an entry").path()) {
        let name = path
            .file_name()
            .and_then(|name| name.to_str())
            .expect("a name");
        let Some(name) = name.strip_suffix("-in.yaml") else {
            continue;
        };
        let made = translation(&fs::read_to_string(&path).expect("input"));
        let made: Vec<Policy> = made
            .policies
            .into_iter()
            .filter(|policy| &*policy.name != "istio_converted_static_strict")
            .collect();
        let expected = fs::read_to_string(dir.join(format!("{name}.yaml"))).expect("output");
        let expected: Vec<Policy> = documents(&expected)
            .expect("YAML")
            .iter()
            .map(|node| {
                node.read::<Authorization>()
                    .expect("an Authorization")
                    .expected()
            })
            .collect();
        assert_eq!(made, expected, "{name}");
        ran += 1;
    }
    assert!(ran > 0, "the folder has none");
}

//! L4 policy, as istiod sends it and the translators make it: `istio.security.Authorization`.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

/// A policy. It matches a connection if any rule matches; none matches if there is no rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Its name.
    pub name: Arc<str>,
    /// Its namespace.
    pub namespace: Arc<str>,
    /// The workloads that it applies to.
    pub scope: PolicyScope,
    /// What a match does.
    pub action: Action,
    /// Alternatives: any of them has to match.
    pub rules: Vec<Rule>,
    /// `true` if it is only logged and never enforced.
    pub dry_run: bool,
}

/// The workloads that a policy applies to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub enum PolicyScope {
    /// All workloads.
    Global,
    /// The workloads of its namespace.
    Namespace,
    /// The workloads that name it.
    WorkloadSelector,
}

/// What a match does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub enum Action {
    /// Lets the connection pass; where any ALLOW policy applies, one has to match.
    Allow,
    /// Refuses the connection.
    Deny,
}

/// A rule: all of its clauses have to match; a rule without clauses matches everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rule {
    /// Conditions: all of them have to match.
    pub clauses: Vec<Clause>,
}

/// A clause: any of its matches has to match; a clause without matches matches everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Clause {
    /// Alternatives: any of them has to match.
    pub matches: Vec<Match>,
}

/// A match: all fields have to match. A positive field matches if any of its values does, a negative one
/// (`not_…`) if none does. A match with no field set matches nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Match {
    /// The peer's namespace.
    pub namespaces: Vec<StringMatch>,
    /// Excluded namespaces.
    pub not_namespaces: Vec<StringMatch>,
    /// The peer's identity, without `spiffe://`.
    pub principals: Vec<StringMatch>,
    /// Excluded identities.
    pub not_principals: Vec<StringMatch>,
    /// The peer's service account, in any trust domain.
    pub service_accounts: Vec<ServiceAccountMatch>,
    /// Excluded service accounts.
    pub not_service_accounts: Vec<ServiceAccountMatch>,
    /// The peer's address.
    pub source_ips: Vec<IpNet>,
    /// Excluded addresses of the peer.
    pub not_source_ips: Vec<IpNet>,
    /// The destination address.
    pub destination_ips: Vec<IpNet>,
    /// Excluded destination addresses.
    pub not_destination_ips: Vec<IpNet>,
    /// The destination port: the pod's, not a service's.
    pub destination_ports: Vec<u16>,
    /// Excluded destination ports.
    pub not_destination_ports: Vec<u16>,
}

/// A service account by namespace and name.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceAccountMatch {
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its name.
    pub service_account: Arc<str>,
}

/// A comparison of strings. Values are literal; there is no pattern language.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StringMatch {
    /// The string equals the value.
    Exact(Arc<str>),
    /// The string begins with the value.
    Prefix(Arc<str>),
    /// The string ends with the value.
    Suffix(Arc<str>),
    /// The string is not empty.
    Presence,
}

impl StringMatch {
    /// Returns true if the string that is made of `parts` matches. Nothing is allocated: thousands of matches may be
    /// looked at for one connection.
    pub fn matches(&self, parts: &[&str]) -> bool {
        let mut text = parts.iter().flat_map(|part| part.bytes());
        match self {
            Self::Exact(exact) => text.eq(exact.bytes()),
            Self::Prefix(prefix) => prefix.bytes().all(|byte| text.next() == Some(byte)),
            Self::Suffix(suffix) => {
                let mut suffix = suffix.bytes().rev();
                suffix.all(|byte| text.next_back() == Some(byte))
            }
            Self::Presence => text.next().is_some(),
        }
    }
}

/// The properties of a connection that policy decides by.
#[derive(Clone, Debug)]
pub struct Question<'a> {
    /// The peer's identity; `None` if it connected in plaintext.
    pub source: Option<&'a crate::mesh::Identity>,
    /// The peer's address.
    pub source_ip: IpAddr,
    /// The pod's address that the peer connects to.
    pub destination_ip: IpAddr,
    /// The pod's port that the peer connects to.
    pub destination_port: u16,
}

impl Policy {
    /// Returns its key, `namespace/name`.
    pub fn key(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }
}

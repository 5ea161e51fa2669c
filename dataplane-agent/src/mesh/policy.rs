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
    /// Any of these.
    pub rules: Vec<Rule>,
    /// Only told in the log, never enforced.
    pub dry_run: bool,
}

/// The workloads that a policy applies to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub enum PolicyScope {
    /// All.
    Global,
    /// Those of its namespace.
    Namespace,
    /// Those that name it.
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

/// All of its clauses have to match; one without clauses matches everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rule {
    /// All of these.
    pub clauses: Vec<Clause>,
}

/// Any of its matches has to match; one without matches matches everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Clause {
    /// Any of these.
    pub matches: Vec<Match>,
}

/// All fields have to match; within a field, any positive value and no negative one. A match
/// with no field set matches nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Match {
    /// The peer's namespace.
    pub namespaces: Vec<StringMatch>,
    /// Not the peer's namespace.
    pub not_namespaces: Vec<StringMatch>,
    /// The peer's identity, without `spiffe://`.
    pub principals: Vec<StringMatch>,
    /// Not the peer's identity.
    pub not_principals: Vec<StringMatch>,
    /// The peer's service account, in any trust domain.
    pub service_accounts: Vec<ServiceAccountMatch>,
    /// Not the peer's service account.
    pub not_service_accounts: Vec<ServiceAccountMatch>,
    /// The peer's address.
    pub source_ips: Vec<IpNet>,
    /// Not the peer's address.
    pub not_source_ips: Vec<IpNet>,
    /// The address that is connected to.
    pub destination_ips: Vec<IpNet>,
    /// Not the address that is connected to.
    pub not_destination_ips: Vec<IpNet>,
    /// The port that is connected to, of the pod and not of a service.
    pub destination_ports: Vec<u16>,
    /// Not the port that is connected to.
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

/// How a string is compared. Always literal; there is no pattern language.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StringMatch {
    /// Equal.
    Exact(Arc<str>),
    /// Begins with.
    Prefix(Arc<str>),
    /// Ends with.
    Suffix(Arc<str>),
    /// Not empty.
    Presence,
}

/// What a policy is asked about.
#[derive(Clone, Debug)]
pub struct Question<'a> {
    /// The peer's identity; none for a peer that came in clear.
    pub source: Option<&'a crate::mesh::Identity>,
    /// The peer's address.
    pub source_ip: IpAddr,
    /// The pod's own address that it connects to.
    pub destination_ip: IpAddr,
    /// The pod's port that it connects to.
    pub destination_port: u16,
}

impl Policy {
    /// Its key, `namespace/name`.
    pub fn key(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }
}

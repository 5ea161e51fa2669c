//! AuthorizationPolicy: strict parsing, and the translation of the L4 part that nodes enforce.
//!
//! Fields that L4 cannot decide are dropped and reported. With such a field, a rule of an ALLOW is dropped as a
//! whole, so that it lets nobody through; a rule of a DENY loses only the field, and then denies more. But a rule
//! with a `to`, a `from` or a `when` that is only about HTTP denies nobody: only a waypoint can enforce it. It has
//! no effect with istiod and ztunnel either.

use std::collections::BTreeMap;

use ipnet::IpNet;
use serde::Deserialize;

use super::object::{Resource, wrong};
use super::principal::{may_be_here, may_be_name, principal};
use super::translate::MeshConfig;
use super::yaml::{Node, NodeError};
use crate::control::ip::Cidr;
use crate::mesh::policy::{
    Action, Clause, Match, Policy, PolicyScope, Rule, ServiceAccountMatch, StringMatch,
};

pub(super) const DRY_RUN_ANNOTATION: &str = "istio.io/dry-run";

/// The fields of an AuthorizationPolicy that are read; the values are checked.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AuthorizationPolicy {
    selector: Option<Selector>,
    target_ref: Option<TargetRef>,
    #[serde(default)]
    target_refs: Vec<TargetRef>,
    #[serde(default)]
    rules: Vec<RawRule>,
    #[serde(default)]
    action: RawAction,
    provider: Option<Provider>,
    #[serde(skip)]
    dry_run: bool,
}

/// The pods that a policy applies to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Selector {
    /// Labels that the pods have.
    #[serde(default)]
    pub match_labels: BTreeMap<String, String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct TargetRef {
    #[serde(default)]
    group: String,
    kind: String,
    name: String,
    #[serde(default)]
    namespace: String,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
enum RawAction {
    #[default]
    Allow,
    Deny,
    Audit,
    Custom,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Provider {
    name: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRule {
    from: Option<Vec<From>>,
    to: Option<Vec<To>>,
    when: Option<Vec<Condition>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct From {
    source: Source,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct To {
    operation: Operation,
}

/// A list of values; not empty if it is present.
type Values = Option<Vec<String>>;

/// The lists of one object, each with its name.
type Lists<'a> = Vec<(&'static str, &'a Values, Sort)>;

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Source {
    principals: Values,
    not_principals: Values,
    request_principals: Values,
    not_request_principals: Values,
    namespaces: Values,
    not_namespaces: Values,
    service_accounts: Values,
    not_service_accounts: Values,
    trust_domains: Values,
    not_trust_domains: Values,
    ip_blocks: Values,
    not_ip_blocks: Values,
    remote_ip_blocks: Values,
    not_remote_ip_blocks: Values,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Operation {
    hosts: Values,
    not_hosts: Values,
    ports: Values,
    not_ports: Values,
    methods: Values,
    not_methods: Values,
    paths: Values,
    not_paths: Values,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Condition {
    key: String,
    values: Values,
    not_values: Values,
}

/// The form of a list's values.
#[derive(Clone, Copy, PartialEq)]
enum Sort {
    Text,
    /// A pattern of a principal: a text with at most one `*`, at its beginning or its end.
    Principal,
    /// A pattern of a trust domain.
    TrustDomain,
    /// A pattern of a namespace.
    Namespace,
    Account,
    Ip,
    Port,
}

impl Sort {
    /// Returns what makes a value of this form match nobody in the mesh, if anything does.
    fn matches_nobody(self, value: &str, trust_domain: &str) -> Option<String> {
        let domain = || format!("is nobody in this mesh, whose trust domain is {trust_domain}");
        match self {
            Sort::Principal if !may_be_here(&principal(value, trust_domain), trust_domain) => {
                Some(domain())
            }
            Sort::TrustDomain if !text(value).matches(&[trust_domain]) => Some(domain()),
            Sort::Namespace if !may_be_name(value.trim_matches('*')) => {
                Some("is no name of a namespace, so it is nobody".into())
            }
            _ => None,
        }
    }
}

impl AuthorizationPolicy {
    pub(crate) fn read(node: &Node) -> Result<Self, NodeError> {
        #[derive(Deserialize)]
        struct Raw {
            spec: AuthorizationPolicy,
        }
        let Raw { mut spec } = node.read()?;
        // Kubernetes reads `from:` without a value as no `from` at all, which in an ALLOW means anybody. A
        // half-written file looks like this.
        if let Some(path) = node.field("spec").and_then(Node::null) {
            return Err(wrong(node, &format!("spec.{path}"), "no value"));
        }
        spec.check()
            .map_err(|(path, what)| wrong(node, &format!("spec.{path}"), what))?;
        if let Some(value) = node.annotation(DRY_RUN_ANNOTATION) {
            let fault = |what: &str| {
                wrong(
                    node,
                    "metadata.annotations",
                    format_args!("{DRY_RUN_ANNOTATION}: {what}"),
                )
            };
            // These are the values of Go's ParseBool, with which istiod reads it.
            spec.dry_run = match value {
                "1" | "t" | "T" | "true" | "TRUE" | "True" => true,
                "0" | "f" | "F" | "false" | "FALSE" | "False" => false,
                _ => return Err(fault(&format!("`{value}` is neither true nor false"))),
            };
            if !matches!(spec.action, RawAction::Allow | RawAction::Deny) {
                return Err(fault("is for ALLOW and DENY alone"));
            }
        }
        Ok(spec)
    }

    /// Returns the labels of the pods that it applies to, if it has a selector. An empty selector selects all.
    pub fn selector(&self) -> Option<&BTreeMap<String, String>> {
        self.selector
            .as_ref()
            .map(|selector| &selector.match_labels)
    }

    /// Returns `true` if the node enforces it.
    pub(crate) fn is_enforced(&self) -> bool {
        self.enforced_as().is_ok()
    }

    /// Returns the action that the node enforces.
    ///
    /// # Errors
    /// It is not enforced; the text says why.
    fn enforced_as(&self) -> Result<Action, String> {
        if let Some(TargetRef { kind, name, .. }) =
            self.target_ref.iter().chain(&self.target_refs).next()
        {
            return Err(format!(
                "is for {kind} {name}: waypoints are not carried yet, not enforced"
            ));
        }
        if self.dry_run {
            return Err("is a dry run: not enforced, and not told in the log yet".into());
        }
        match self.action {
            RawAction::Allow => Ok(Action::Allow),
            RawAction::Deny => Ok(Action::Deny),
            RawAction::Audit | RawAction::Custom => {
                Err("only ALLOW and DENY can be enforced at L4, not enforced".into())
            }
        }
    }

    fn check(&self) -> Result<(), (String, String)> {
        for (at, rule) in self.rules.iter().enumerate() {
            rule.check()
                .map_err(|(path, what)| (format!("rules[{at}].{path}"), what))?;
        }
        if self.selector.is_some() && (self.target_ref.is_some() || !self.target_refs.is_empty()) {
            return Err(("selector".into(), "not together with targetRefs".into()));
        }
        if (self.action == RawAction::Custom) != self.provider.is_some() {
            return Err((
                "provider".into(),
                "belongs to action CUSTOM, and to no other".into(),
            ));
        }
        Ok(())
    }
}

impl RawRule {
    fn check(&self) -> Result<(), (String, String)> {
        for (field, empty) in [
            ("from", self.from.as_ref().is_some_and(Vec::is_empty)),
            ("to", self.to.as_ref().is_some_and(Vec::is_empty)),
            ("when", self.when.as_ref().is_some_and(Vec::is_empty)),
        ] {
            if empty {
                return Err((field.into(), "an empty list".into()));
            }
        }
        for (at, when) in self.when.iter().flatten().enumerate() {
            if attribute(&when.key).is_none() {
                let what = format!("unknown attribute `{}`", when.key);
                return Err((format!("when[{at}].key"), what));
            }
        }
        for (path, lists) in self.lists() {
            check_lists(&path, &lists)?;
        }
        Ok(())
    }

    /// Returns its lists of values, each group with the path of the object they are in.
    fn lists(&self) -> Vec<(String, Lists<'_>)> {
        let mut lists = Vec::new();
        for (at, from) in self.from.iter().flatten().enumerate() {
            lists.push((format!("from[{at}].source"), from.source.lists().to_vec()));
        }
        for (at, to) in self.to.iter().flatten().enumerate() {
            lists.push((format!("to[{at}].operation"), to.operation.lists().to_vec()));
        }
        for (at, when) in self.when.iter().flatten().enumerate() {
            let sort = attribute(&when.key).map_or(Sort::Text, Attribute::sort);
            let values = ("values", &when.values, sort);
            let nots = ("notValues", &when.not_values, sort);
            lists.push((format!("when[{at}]"), vec![values, nots]));
        }
        lists
    }

    /// Returns a line for each value that no workload of the mesh can have, beginning with its path.
    fn strangers(&self, trust_domain: &str) -> Vec<String> {
        let mut strangers = Vec::new();
        for (path, lists) in self.lists() {
            for (name, values, sort) in lists {
                for (at, value) in values.iter().flatten().enumerate() {
                    if let Some(why) = sort.matches_nobody(value, trust_domain) {
                        strangers.push(format!("{path}.{name}[{at}]: `{value}` {why}"));
                    }
                }
            }
        }
        strangers
    }
}

fn check_lists(path: &str, lists: &Lists<'_>) -> Result<(), (String, String)> {
    if lists.iter().all(|(_, values, _)| values.is_none()) {
        return Err((path.into(), "says nothing".into()));
    }
    for (name, values, sort) in lists {
        let Some(values) = values else { continue };
        if values.is_empty() {
            return Err((format!("{path}.{name}"), "an empty list".into()));
        }
        for (at, value) in values.iter().enumerate() {
            let what = match sort {
                Sort::Text | Sort::Principal | Sort::TrustDomain | Sort::Namespace
                    if value.is_empty() =>
                {
                    "is empty"
                }
                // It would be compared literally and match nobody, so a DENY would let all pass.
                Sort::Principal | Sort::TrustDomain | Sort::Namespace if !is_pattern(value) => {
                    "has a `*` that is neither at its beginning nor at its end"
                }
                Sort::Account if account("", value).is_none() => "is not a service account",
                Sort::Ip => match value.parse::<Cidr>() {
                    Err(what) => what,
                    Ok(_) => continue,
                },
                Sort::Port if port(value).is_none() => "is not a port",
                _ => continue,
            };
            return Err((format!("{path}.{name}[{at}]"), format!("`{value}` {what}")));
        }
    }
    Ok(())
}

impl Source {
    fn lists(&self) -> [(&'static str, &Values, Sort); 14] {
        [
            ("principals", &self.principals, Sort::Principal),
            ("notPrincipals", &self.not_principals, Sort::Principal),
            ("requestPrincipals", &self.request_principals, Sort::Text),
            (
                "notRequestPrincipals",
                &self.not_request_principals,
                Sort::Text,
            ),
            ("namespaces", &self.namespaces, Sort::Namespace),
            ("notNamespaces", &self.not_namespaces, Sort::Namespace),
            ("serviceAccounts", &self.service_accounts, Sort::Account),
            (
                "notServiceAccounts",
                &self.not_service_accounts,
                Sort::Account,
            ),
            ("trustDomains", &self.trust_domains, Sort::TrustDomain),
            (
                "notTrustDomains",
                &self.not_trust_domains,
                Sort::TrustDomain,
            ),
            ("ipBlocks", &self.ip_blocks, Sort::Ip),
            ("notIpBlocks", &self.not_ip_blocks, Sort::Ip),
            ("remoteIpBlocks", &self.remote_ip_blocks, Sort::Ip),
            ("notRemoteIpBlocks", &self.not_remote_ip_blocks, Sort::Ip),
        ]
    }
}

impl Operation {
    fn lists(&self) -> [(&'static str, &Values, Sort); 8] {
        [
            ("hosts", &self.hosts, Sort::Text),
            ("notHosts", &self.not_hosts, Sort::Text),
            ("ports", &self.ports, Sort::Port),
            ("notPorts", &self.not_ports, Sort::Port),
            ("methods", &self.methods, Sort::Text),
            ("notMethods", &self.not_methods, Sort::Text),
            ("paths", &self.paths, Sort::Text),
            ("notPaths", &self.not_paths, Sort::Text),
        ]
    }
}

/// The attribute that a `when` is about.
#[derive(Clone, Copy, PartialEq)]
enum Attribute {
    SourceIp,
    SourceNamespace,
    SourcePrincipal,
    SourceAccount,
    DestinationIp,
    DestinationPort,
    L7,
}

fn attribute(key: &str) -> Option<Attribute> {
    Some(match key {
        "source.ip" => Attribute::SourceIp,
        "source.namespace" => Attribute::SourceNamespace,
        "source.principal" => Attribute::SourcePrincipal,
        "source.serviceAccount" => Attribute::SourceAccount,
        "destination.ip" => Attribute::DestinationIp,
        "destination.port" => Attribute::DestinationPort,
        "remote.ip"
        | "request.auth.principal"
        | "request.auth.audiences"
        | "request.auth.presenter"
        | "connection.sni" => Attribute::L7,
        _ if [
            "request.headers[",
            "request.auth.claims[",
            "experimental.envoy.filters.",
        ]
        .iter()
        .any(|prefix| key.starts_with(prefix)) =>
        {
            Attribute::L7
        }
        _ => return None,
    })
}

impl Attribute {
    fn sort(self) -> Sort {
        match self {
            Attribute::SourceIp | Attribute::DestinationIp => Sort::Ip,
            Attribute::DestinationPort => Sort::Port,
            Attribute::SourceAccount => Sort::Account,
            Attribute::SourceNamespace => Sort::Namespace,
            Attribute::SourcePrincipal => Sort::Principal,
            Attribute::L7 => Sort::Text,
        }
    }
}

/// Returns the L4 policy, if the node is to enforce one. Dropped parts are reported in `problems`.
pub(crate) fn translate(
    policy: &Resource<AuthorizationPolicy>,
    mesh: &MeshConfig,
    problems: &mut Vec<String>,
) -> Option<Policy> {
    let key = &policy.meta.key;
    let spec = &policy.body;
    let mut report = |what: &str| problems.push(format!("AuthorizationPolicy {key}: {what}"));
    let action = match spec.enforced_as() {
        Ok(action) => action,
        Err(why) => {
            report(&why);
            return None;
        }
    };
    let scope = if spec.selector.is_some() {
        PolicyScope::WorkloadSelector
    } else if *key.namespace == *mesh.root_namespace {
        PolicyScope::Global
    } else {
        PolicyScope::Namespace
    };
    // An ALLOW without rules is the usual way to deny all, so only the DENY is reported.
    if action == Action::Deny && spec.rules.is_empty() {
        report("is a DENY without rules, which denies nothing");
    }
    let trust_domain = &mesh.trust_domain;
    let mut rules = Vec::new();
    for (at, raw) in spec.rules.iter().enumerate() {
        for stranger in raw.strangers(trust_domain) {
            report(&format!("rules[{at}].{stranger}"));
        }
        let mut dropped = Vec::new();
        let rule = raw.translate((&key.namespace, trust_domain), &mut dropped);
        if dropped.is_empty() {
            rules.push(rule);
            continue;
        }
        let dropped = dropped.join(", ");
        match action {
            Action::Allow => report(&format!("rule {at} is dropped, L4 cannot tell {dropped}")),
            Action::Deny => {
                let how = if never_matches(&rule) {
                    "never matches"
                } else {
                    "is enforced"
                };
                report(&format!(
                    "rule {at} {how} without {dropped}, which L4 cannot tell"
                ));
                rules.push(rule);
            }
        }
    }
    Some(Policy {
        name: key.name.clone(),
        namespace: key.namespace.clone(),
        scope,
        action,
        rules,
        dry_run: false,
    })
}

/// Returns `true` if nothing is left of a clause. The rule then has no effect, as with istiod.
fn never_matches(rule: &Rule) -> bool {
    let nothing = |found: &Match| *found == Match::default();
    let empty = |clause: &Clause| !clause.matches.is_empty() && clause.matches.iter().all(nothing);
    rule.clauses.iter().any(empty)
}

/// The policy's namespace, and the mesh's trust domain.
type Names<'a> = (&'a str, &'a str);

impl RawRule {
    fn translate(&self, names: Names<'_>, dropped: &mut Vec<String>) -> Rule {
        let mut clauses = Vec::new();
        if let Some(to) = &self.to {
            let matches = to
                .iter()
                .map(|to| to.operation.translate(dropped))
                .collect();
            clauses.push(Clause { matches });
        }
        if let Some(from) = &self.from {
            let matches: Vec<Option<Match>> = from
                .iter()
                .map(|from| from.source.translate(names, dropped))
                .collect();
            // If L4 cannot decide one of the sources at all, the clause always matches.
            let matches = matches
                .into_iter()
                .collect::<Option<_>>()
                .unwrap_or_default();
            clauses.push(Clause { matches });
        }
        for when in self.when.iter().flatten() {
            clauses.push(Clause {
                matches: vec![when.translate(names, dropped)],
            });
        }
        Rule { clauses }
    }
}

impl Operation {
    fn translate(&self, dropped: &mut Vec<String>) -> Match {
        drop_fields(dropped, &self.lists(), &["ports", "notPorts"]);
        Match {
            destination_ports: each(&self.ports, port),
            not_destination_ports: each(&self.not_ports, port),
            ..Match::default()
        }
    }
}

impl Source {
    /// Returns `None` if it is only about a trust domain that L4 cannot decide: it may be any source.
    fn translate(&self, names: Names<'_>, dropped: &mut Vec<String>) -> Option<Match> {
        const L4: [&str; 10] = [
            "principals",
            "notPrincipals",
            "namespaces",
            "notNamespaces",
            "serviceAccounts",
            "notServiceAccounts",
            "trustDomains",
            "notTrustDomains",
            "ipBlocks",
            "notIpBlocks",
        ];
        drop_fields(dropped, &self.lists(), &L4);
        let (namespace, trust_domain) = names;
        let principal = |value: &str| Some(principal(value, trust_domain));
        let mut made = Match {
            namespaces: each(&self.namespaces, pattern),
            not_namespaces: each(&self.not_namespaces, pattern),
            principals: each(&self.principals, principal),
            not_principals: each(&self.not_principals, principal),
            service_accounts: each(&self.service_accounts, |value| account(namespace, value)),
            not_service_accounts: each(&self.not_service_accounts, |v| account(namespace, v)),
            source_ips: each(&self.ip_blocks, ip),
            not_source_ips: each(&self.not_ip_blocks, ip),
            ..Match::default()
        };
        // istiod drops these two silently. A principal begins with its trust domain, so most have an exact
        // form; a further condition besides `principals` has none.
        let mut untold = false;
        if let Some(domains) = &self.trust_domains {
            match trust_domains(domains).filter(|_| self.principals.is_none()) {
                Some(principals) => made.principals = principals,
                None => {
                    dropped.push("trustDomains".into());
                    untold = true;
                }
            }
        }
        if let Some(domains) = &self.not_trust_domains {
            match trust_domains(domains) {
                Some(principals) => made.not_principals.extend(principals),
                None => {
                    dropped.push("notTrustDomains".into());
                    untold = true;
                }
            }
        }
        (!untold || made != Match::default()).then_some(made)
    }
}

impl Condition {
    fn translate(&self, names: Names<'_>, dropped: &mut Vec<String>) -> Match {
        let (namespace, trust_domain) = names;
        let principal = |value: &str| Some(principal(value, trust_domain));
        let (values, nots) = (&self.values, &self.not_values);
        let mut made = Match::default();
        match attribute(&self.key) {
            Some(Attribute::SourceIp) => {
                (made.source_ips, made.not_source_ips) = (each(values, ip), each(nots, ip));
            }
            Some(Attribute::DestinationIp) => {
                (made.destination_ips, made.not_destination_ips) =
                    (each(values, ip), each(nots, ip));
            }
            Some(Attribute::SourceNamespace) => {
                (made.namespaces, made.not_namespaces) =
                    (each(values, pattern), each(nots, pattern));
            }
            Some(Attribute::SourcePrincipal) => {
                (made.principals, made.not_principals) =
                    (each(values, principal), each(nots, principal));
            }
            // istiod does not translate this one to L4, although it could.
            Some(Attribute::SourceAccount) => {
                made.service_accounts = each(values, |value| account(namespace, value));
                made.not_service_accounts = each(nots, |value| account(namespace, value));
            }
            Some(Attribute::DestinationPort) => {
                made.destination_ports = each(values, port);
                made.not_destination_ports = each(nots, port);
            }
            Some(Attribute::L7) | None => dropped.push(self.key.clone()),
        }
        made
    }
}

fn drop_fields(dropped: &mut Vec<String>, lists: &[(&str, &Values, Sort)], kept: &[&str]) {
    let gone = lists
        .iter()
        .filter(|(name, values, _)| values.is_some() && !kept.contains(name));
    dropped.extend(gone.map(|(name, _, _)| (*name).to_owned()));
}

fn each<T>(values: &Values, parse: impl Fn(&str) -> Option<T>) -> Vec<T> {
    values
        .iter()
        .flatten()
        .filter_map(|value| parse(value))
        .collect()
}

fn is_pattern(value: &str) -> bool {
    let rest = value.strip_prefix('*').or_else(|| value.strip_suffix('*'));
    !rest.unwrap_or(value).contains('*')
}

/// Parses a text with at most one `*`, at its beginning or its end.
pub(super) fn text(value: &str) -> StringMatch {
    if value == "*" {
        StringMatch::Presence
    } else if let Some(suffix) = value.strip_prefix('*') {
        StringMatch::Suffix(suffix.into())
    } else if let Some(prefix) = value.strip_suffix('*') {
        StringMatch::Prefix(prefix.into())
    } else {
        StringMatch::Exact(value.into())
    }
}

fn pattern(value: &str) -> Option<StringMatch> {
    Some(text(value))
}

/// Returns the principals of these trust domains; `None` if one is a suffix (`*…`).
fn trust_domains(values: &[String]) -> Option<Vec<StringMatch>> {
    let principal = |value: &String| match text(value) {
        StringMatch::Exact(domain) => Some(StringMatch::Prefix(format!("{domain}/").into())),
        StringMatch::Suffix(_) => None,
        told @ (StringMatch::Prefix(_) | StringMatch::Presence) => Some(told),
    };
    values.iter().map(principal).collect()
}

/// Parses `name` or `namespace/name`.
fn account(namespace: &str, value: &str) -> Option<ServiceAccountMatch> {
    let (namespace, name) = value.split_once('/').unwrap_or((namespace, value));
    let bad = name.is_empty() || name.contains(['/', '*']) || namespace.contains('*');
    let bad = bad || (value.contains('/') && namespace.is_empty());
    (!bad).then(|| ServiceAccountMatch {
        namespace: namespace.into(),
        service_account: name.into(),
    })
}

fn ip(value: &str) -> Option<IpNet> {
    value.parse().ok().map(|Cidr(block)| block)
}

fn port(value: &str) -> Option<u16> {
    let digits = !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit());
    value.parse().ok().filter(|&port| digits && port > 0)
}

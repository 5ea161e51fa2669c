//! Checks a connection against policies, as a pure function.

use std::sync::Arc;

use super::{Denied, Rule as Allowed};
use crate::mesh::policy::{
    Action, Clause, Match, Policy, Question, Rule, ServiceAccountMatch, StringMatch,
};
use crate::mesh::snapshot::Applicable;
use crate::mesh::{Identity, Mesh, Workload};

#[cfg(test)]
mod tests;

/// Decides for a workload: DENY first, then ALLOW, as Istio does. Unlike in ztunnel, a policy that is named and does
/// not exist refuses.
///
/// # Errors
/// The connection is refused; the error says by what.
pub fn check(applicable: &Applicable<'_>, question: &Question<'_>) -> Result<Allowed, Denied> {
    if let Some(unknown) = applicable.unknown.first() {
        return Err(Denied::UnknownPolicy(Arc::clone(unknown)));
    }
    let all = |action, dry_run| {
        let policies = applicable.policies.iter();
        policies.filter(move |policy| policy.action == action && policy.dry_run == dry_run)
    };
    for policy in all(Action::Deny, true).chain(all(Action::Allow, true)) {
        if matches(policy, question) {
            tracing::debug!(policy = policy.key(), "dry-run: policy match");
        }
    }
    if let Some(policy) = all(Action::Deny, false).find(|policy| matches(policy, question)) {
        return Err(Denied::Denied(policy.key().into()));
    }
    let mut allows = all(Action::Allow, false).peekable();
    if allows.peek().is_none() {
        return Ok(Allowed::NoPolicy);
    }
    match allows.find(|policy| matches(policy, question)) {
        Some(policy) => Ok(Allowed::Allowed(policy.key().into())),
        None => Err(Denied::NotAllowed),
    }
}

/// Decides as [`check`] does, for a workload that may be gone.
///
/// # Errors
/// It fails as [`check`] does, or there is no workload.
pub fn check_workload(
    mesh: &Mesh,
    workload: Option<&Workload>,
    question: &Question<'_>,
) -> Result<Allowed, Denied> {
    let workload = workload.ok_or(Denied::NoWorkload)?;
    check(&mesh.policies_of(workload), question)
}

fn matches(policy: &Policy, question: &Question<'_>) -> bool {
    policy.rules.iter().any(|rule| rule_matches(rule, question))
}

fn rule_matches(rule: &Rule, question: &Question<'_>) -> bool {
    rule.clauses
        .iter()
        .all(|clause| clause_matches(clause, question))
}

fn clause_matches(clause: &Clause, question: &Question<'_>) -> bool {
    clause.matches.is_empty()
        || clause
            .matches
            .iter()
            .any(|one| match_matches(one, question))
}

fn match_matches(one: &Match, question: &Question<'_>) -> bool {
    if *one == Match::default() {
        return false;
    }
    let identity = question.source;
    let namespace = identity.map_or("", |identity| identity.namespace());
    let is_namespace = |string: &StringMatch| string.matches(&[namespace]);
    let is_principal = |string: &StringMatch| {
        identity.is_some_and(|identity| string.matches(&principal(identity)))
    };
    let is_account = |account: &ServiceAccountMatch| {
        identity.is_some_and(|identity| {
            *account.namespace == *identity.namespace()
                && *account.service_account == *identity.service_account()
        })
    };
    field(&one.namespaces, &one.not_namespaces, is_namespace)
        && field(&one.principals, &one.not_principals, is_principal)
        && field(&one.service_accounts, &one.not_service_accounts, is_account)
        && field(&one.source_ips, &one.not_source_ips, |net| {
            net.contains(&question.source_ip)
        })
        && field(&one.destination_ips, &one.not_destination_ips, |net| {
            net.contains(&question.destination_ip)
        })
        && field(&one.destination_ports, &one.not_destination_ports, |port| {
            *port == question.destination_port
        })
}

/// Returns true if a positive value matches, or there are none, and no negative one matches.
fn field<T>(positive: &[T], negative: &[T], is: impl Fn(&T) -> bool) -> bool {
    (positive.is_empty() || positive.iter().any(&is)) && !negative.iter().any(&is)
}

/// Returns the parts of a principal: the identity's URI without its scheme.
fn principal(identity: &Identity) -> [&str; 5] {
    let (trust_domain, namespace) = (identity.trust_domain(), identity.namespace());
    [
        trust_domain,
        "/ns/",
        namespace,
        "/sa/",
        identity.service_account(),
    ]
}

//! The check against a slow and obvious reference, and cases that are easy to get wrong.

use std::net::IpAddr;

use ipnet::IpNet;
use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::mesh::policy::PolicyScope;
use crate::mesh::workload::tests::workload;
use crate::mesh::{Identity, Mesh};

fn string() -> impl Strategy<Value = StringMatch> {
    prop_oneof![
        Just(StringMatch::Presence),
        "(td/ns/)?[ab]?(/sa/s)?".prop_map(|text| StringMatch::Exact(text.into())),
        "(td|a|b)?".prop_map(|text| StringMatch::Prefix(text.into())),
        "(s|a|b)?".prop_map(|text| StringMatch::Suffix(text.into())),
    ]
}

fn net() -> impl Strategy<Value = IpNet> {
    prop_oneof![
        Just("0.0.0.0/0".parse().expect("a net")),
        Just("::/0".parse().expect("a net")),
        Just("10.0.0.0/31".parse().expect("a net")),
        Just("10.0.0.1/32".parse().expect("a net")),
        Just("fd00::1/128".parse().expect("a net")),
    ]
}

fn account() -> impl Strategy<Value = ServiceAccountMatch> {
    ("[ab]", "[st]").prop_map(|(namespace, account)| ServiceAccountMatch {
        namespace: namespace.into(),
        service_account: account.into(),
    })
}

fn one() -> impl Strategy<Value = Match> {
    let few = 0..2;
    (
        (vec(string(), few.clone()), vec(string(), few.clone())),
        (vec(string(), few.clone()), vec(string(), few.clone())),
        (vec(account(), few.clone()), vec(account(), few.clone())),
        (vec(net(), few.clone()), vec(net(), few.clone())),
        (vec(net(), few.clone()), vec(net(), few.clone())),
        (vec(80..82_u16, few.clone()), vec(80..82_u16, few)),
    )
        .prop_map(
            |(namespaces, principals, accounts, sources, destinations, ports)| Match {
                namespaces: namespaces.0,
                not_namespaces: namespaces.1,
                principals: principals.0,
                not_principals: principals.1,
                service_accounts: accounts.0,
                not_service_accounts: accounts.1,
                source_ips: sources.0,
                not_source_ips: sources.1,
                destination_ips: destinations.0,
                not_destination_ips: destinations.1,
                destination_ports: ports.0,
                not_destination_ports: ports.1,
            },
        )
}

fn policy() -> impl Strategy<Value = Policy> {
    let clause = vec(one(), 0..3).prop_map(|matches| Clause { matches });
    let rule = vec(clause, 0..3).prop_map(|clauses| Rule { clauses });
    let scope = prop_oneof![
        Just(PolicyScope::Global),
        Just(PolicyScope::Namespace),
        Just(PolicyScope::WorkloadSelector)
    ];
    let action = prop_oneof![Just(Action::Allow), Just(Action::Deny)];
    (
        0..4_u8,
        "ns|other",
        scope,
        action,
        vec(rule, 0..3),
        prop::bool::weighted(0.1),
    )
        .prop_map(
            |(number, namespace, scope, action, rules, dry_run)| Policy {
                name: format!("p{number}").into(),
                namespace: namespace.into(),
                scope,
                action,
                rules,
                dry_run,
            },
        )
}

fn address() -> impl Strategy<Value = IpAddr> {
    prop_oneof![
        Just("10.0.0.1".parse().expect("an address")),
        Just("10.0.0.2".parse().expect("an address")),
        Just("fd00::1".parse().expect("an address")),
    ]
}

/// The rules of Istio's documentation word for word, one sentence after the other.
mod reference {
    use super::*;

    pub(super) fn allowed(policies: &[Policy], names: &[&str], question: &Question<'_>) -> bool {
        let applies = |policy: &&Policy| {
            let named = names.contains(&policy.key().as_str());
            let of_all = policy.scope == PolicyScope::Global;
            let of_namespace = policy.scope == PolicyScope::Namespace && *policy.namespace == *"ns";
            named || of_all || of_namespace
        };
        for name in names {
            if !policies.iter().any(|policy| policy.key() == *name) {
                return false;
            }
        }
        let mut any_allow_exists = false;
        let mut any_allow_matches = false;
        for policy in policies.iter().filter(applies) {
            if policy.dry_run {
                continue;
            }
            let matched = policy.rules.iter().any(|rule| rule_holds(rule, question));
            match policy.action {
                Action::Deny if matched => return false,
                Action::Deny => {}
                Action::Allow => {
                    any_allow_exists = true;
                    any_allow_matches |= matched;
                }
            }
        }
        !any_allow_exists || any_allow_matches
    }

    fn rule_holds(rule: &Rule, question: &Question<'_>) -> bool {
        for clause in &rule.clauses {
            let mut holds = clause.matches.is_empty();
            for one in &clause.matches {
                holds = holds || match_holds(one, question);
            }
            if !holds {
                return false;
            }
        }
        true
    }

    fn match_holds(one: &Match, question: &Question<'_>) -> bool {
        let mut constraints = 0;
        let mut holds = true;
        let mut constrain = |positive: Vec<bool>, negative: Vec<bool>| {
            constraints += positive.len() + negative.len();
            if !positive.is_empty() && !positive.contains(&true) {
                holds = false;
            }
            if negative.contains(&true) {
                holds = false;
            }
        };
        let namespace = match question.source {
            Some(identity) => identity.namespace().to_owned(),
            None => String::new(),
        };
        let strings = |all: &[StringMatch], text: &str| {
            all.iter()
                .map(|string| match string {
                    StringMatch::Exact(exact) => **exact == *text,
                    StringMatch::Prefix(prefix) => text.find(&**prefix) == Some(0),
                    StringMatch::Suffix(suffix) => {
                        text.len() >= suffix.len() && text[text.len() - suffix.len()..] == **suffix
                    }
                    StringMatch::Presence => !text.is_empty(),
                })
                .collect::<Vec<bool>>()
        };
        constrain(
            strings(&one.namespaces, &namespace),
            strings(&one.not_namespaces, &namespace),
        );
        let principals = |all: &[StringMatch]| match question.source {
            Some(identity) => strings(
                all,
                &format!(
                    "{}/ns/{}/sa/{}",
                    identity.trust_domain(),
                    identity.namespace(),
                    identity.service_account()
                ),
            ),
            None => vec![false; all.len()],
        };
        constrain(principals(&one.principals), principals(&one.not_principals));
        let accounts = |all: &[ServiceAccountMatch]| {
            all.iter()
                .map(|account| match question.source {
                    Some(identity) => {
                        (identity.namespace(), identity.service_account())
                            == (&*account.namespace, &*account.service_account)
                    }
                    None => false,
                })
                .collect::<Vec<bool>>()
        };
        constrain(
            accounts(&one.service_accounts),
            accounts(&one.not_service_accounts),
        );
        let nets = |all: &[IpNet], ip: IpAddr| {
            all.iter()
                .map(|net| net.contains(&ip))
                .collect::<Vec<bool>>()
        };
        constrain(
            nets(&one.source_ips, question.source_ip),
            nets(&one.not_source_ips, question.source_ip),
        );
        constrain(
            nets(&one.destination_ips, question.destination_ip),
            nets(&one.not_destination_ips, question.destination_ip),
        );
        let ports = |all: &[u16]| {
            all.iter()
                .map(|&port| port == question.destination_port)
                .collect::<Vec<bool>>()
        };
        constrain(
            ports(&one.destination_ports),
            ports(&one.not_destination_ports),
        );
        constraints > 0 && holds
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn the_check_agrees_with_the_reference(
        policies in vec(policy(), 0..5),
        names in vec(prop_oneof![Just("ns/p0"), Just("ns/p1"), Just("other/p2")], 0..3),
        identity in prop::option::of(("td|ud", "[ab]", "[st]")),
        (source_ip, destination_ip, destination_port) in (address(), address(), 80..82_u16),
    ) {
        // Each key belongs to one policy.
        let mut unique: Vec<Policy> = Vec::new();
        for policy in policies {
            if !unique.iter().any(|other| other.key() == policy.key()) {
                unique.push(policy);
            }
        }
        let identity = identity.map(|(td, ns, sa)| Identity::new(&td, &ns, &sa));
        let question = Question {
            source: identity.as_ref(),
            source_ip,
            destination_ip,
            destination_port,
        };
        let workload = workload(&names);
        let mesh = Mesh::of(vec![workload.clone()], Vec::new(), unique.clone());
        let checked = check(&mesh.policies_of(&workload), &question);
        prop_assert_eq!(checked.is_ok(), reference::allowed(&unique, &names, &question), "{:?}", checked);
    }
}

#[test]
fn a_policy_that_is_named_and_not_there_refuses() {
    let workload = workload(&["ns/not-yet"]);
    let mesh = Mesh::of(vec![workload.clone()], Vec::new(), Vec::new());
    let question = Question {
        source: None,
        source_ip: IpAddr::from([10, 0, 0, 2]),
        destination_ip: IpAddr::from([10, 0, 0, 1]),
        destination_port: 80,
    };
    let denied = check(&mesh.policies_of(&workload), &question).expect_err("nobody knows");
    assert_eq!(denied, Denied::UnknownPolicy("ns/not-yet".into()));
}

fn named(key: &str, scope: PolicyScope, action: Action, rules: Vec<Rule>) -> Policy {
    let (namespace, name) = key.split_once('/').expect("a key");
    Policy {
        name: name.into(),
        namespace: namespace.into(),
        scope,
        action,
        rules,
        dry_run: false,
    }
}

/// Returns a rule with one clause of these matches.
fn rule(matches: Vec<Match>) -> Rule {
    Rule {
        clauses: vec![Clause { matches }],
    }
}

fn decide(
    names: &[&str],
    policies: Vec<Policy>,
    source: Option<&Identity>,
) -> Result<Allowed, Denied> {
    let workload = workload(names);
    let mesh = Mesh::of(vec![workload.clone()], Vec::new(), policies);
    let question = Question {
        source,
        source_ip: IpAddr::from([10, 0, 0, 2]),
        destination_ip: IpAddr::from([10, 0, 0, 1]),
        destination_port: 80,
    };
    check(&mesh.policies_of(&workload), &question)
}

#[test]
fn a_policy_that_is_named_applies_whatever_its_scope_says() {
    for scope in [
        PolicyScope::Global,
        PolicyScope::Namespace,
        PolicyScope::WorkloadSelector,
    ] {
        let deny = |key| named(key, scope, Action::Deny, vec![Rule::default()]);
        for key in ["ns/deny", "other/deny"] {
            let denied = decide(&[key], vec![deny(key)], None);
            assert_eq!(denied, Err(Denied::Denied(key.into())), "{scope:?}");
        }
    }
}

#[test]
fn what_is_empty_matches_all_or_nothing() {
    let empty_rule = || vec![Rule::default()];
    let empty_clause = || vec![rule(Vec::new())];
    let empty_match = || vec![rule(vec![Match::default()])];
    let all = |action, rules| {
        let key = "ns/p";
        decide(
            &[],
            vec![named(key, PolicyScope::Namespace, action, rules)],
            None,
        )
    };
    let (denied, allowed) = (
        Err(Denied::Denied("ns/p".into())),
        Ok(Allowed::Allowed("ns/p".into())),
    );
    // No rules: ALLOW allows nothing, DENY does nothing.
    assert_eq!(all(Action::Allow, Vec::new()), Err(Denied::NotAllowed));
    assert_eq!(all(Action::Deny, Vec::new()), Ok(Allowed::NoPolicy));
    // A rule without clauses, and a clause without matches, match everything.
    assert_eq!(all(Action::Allow, empty_rule()), allowed);
    assert_eq!(all(Action::Deny, empty_rule()), denied);
    assert_eq!(all(Action::Allow, empty_clause()), allowed);
    assert_eq!(all(Action::Deny, empty_clause()), denied);
    // A match without fields matches nothing.
    assert_eq!(all(Action::Allow, empty_match()), Err(Denied::NotAllowed));
    assert_eq!(all(Action::Deny, empty_match()), Ok(Allowed::NoPolicy));
}

#[test]
fn strict_refuses_who_has_no_identity_and_nobody_else() {
    let strict = "istio-system/istio_converted_static_strict";
    let policy = named(
        strict,
        PolicyScope::WorkloadSelector,
        Action::Deny,
        vec![rule(vec![Match {
            not_principals: vec![StringMatch::Presence],
            ..Match::default()
        }])],
    );
    let peer = Identity::new("td", "a", "s");
    let of = |source| decide(&[strict], vec![policy.clone()], source);
    assert_eq!(of(None), Err(Denied::Denied(strict.into())));
    assert_eq!(of(Some(&peer)), Ok(Allowed::NoPolicy));
}

#[test]
fn deny_comes_before_allow_and_a_dry_run_decides_nothing() {
    let every = || vec![Rule::default()];
    let allow = named("ns/allow", PolicyScope::Namespace, Action::Allow, every());
    let deny = named("ns/deny", PolicyScope::Global, Action::Deny, every());
    let dry = |policy: &Policy| Policy {
        dry_run: true,
        ..policy.clone()
    };
    assert_eq!(
        decide(&[], vec![allow.clone(), deny.clone()], None),
        Err(Denied::Denied("ns/deny".into()))
    );
    assert_eq!(
        decide(&[], vec![allow.clone(), dry(&deny)], None),
        Ok(Allowed::Allowed("ns/allow".into()))
    );
    assert_eq!(
        decide(&[], vec![dry(&allow)], None),
        Ok(Allowed::NoPolicy),
        "as if it were not there"
    );
}

#[test]
fn refusals_are_told_in_ztunnels_words() {
    let rejection = "connection closed due to policy rejection";
    for (denied, words) in [
        (Denied::Denied("ns/p".into()), "explicitly denied by: ns/p"),
        (Denied::NotAllowed, "allow policies exist, but none allowed"),
        (Denied::NoWorkload, "workload not found"),
    ] {
        assert_eq!(denied.to_string(), format!("{rejection}: {words}"));
    }
}

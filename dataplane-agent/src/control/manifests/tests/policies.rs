use super::{policy, refusal, translation, translation_in};
use crate::control::manifests::MeshConfig;
use crate::mesh::policy::{Action, Clause, Match, Policy, PolicyScope, Rule, StringMatch};

fn authorization(namespace: &str, spec: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
         metadata: {{name: gate, namespace: {namespace}}}\nspec: {spec}\n---\n"
    )
}

fn peer(name: &str, namespace: &str, spec: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\n\
         metadata: {{name: {name}, namespace: {namespace}}}\nspec: {spec}\n---\n"
    )
}

const POD: &str = "apiVersion: v1\nkind: Pod\nmetadata: {name: till, namespace: shop, labels: {app: till}}\n\
                   spec: {}\nstatus: {podIP: 10.0.0.1}\n---\n";

/// Returns the keys of the policies that a pod of these objects gets.
fn given(text: &str) -> Vec<String> {
    let made = translation(&format!("{text}{POD}"));
    made.workloads[0]
        .policies
        .iter()
        .map(|key| key.to_string())
        .collect()
}

#[test]
fn scope_follows_selector_and_root_namespace() {
    for (namespace, spec, scope, listed) in [
        ("shop", "{}", PolicyScope::Namespace, false),
        ("istio-system", "{}", PolicyScope::Global, false),
        (
            "shop",
            "{selector: {matchLabels: {app: till}}}",
            PolicyScope::WorkloadSelector,
            true,
        ),
        (
            "istio-system",
            "{selector: {matchLabels: {app: till}}}",
            PolicyScope::WorkloadSelector,
            true,
        ),
        (
            "shop",
            "{selector: {}}",
            PolicyScope::WorkloadSelector,
            true,
        ),
        (
            "shop",
            "{selector: {matchLabels: {app: cellar}}}",
            PolicyScope::WorkloadSelector,
            false,
        ),
        (
            "elsewhere",
            "{selector: {matchLabels: {app: till}}}",
            PolicyScope::WorkloadSelector,
            false,
        ),
    ] {
        let text = authorization(namespace, spec);
        let made = translation(&text);
        assert_eq!(made.policies[0].scope, scope, "{namespace} {spec}");
        assert_eq!(
            given(&text).len(),
            usize::from(listed),
            "{namespace} {spec}"
        );
    }
}

#[test]
fn no_rule_and_an_empty_rule_are_told_apart() {
    let none = translation(&authorization("shop", "{action: DENY}"));
    assert!(none.policies[0].rules.is_empty());
    let all = translation(&authorization("shop", "{action: DENY, rules: [{}]}"));
    assert_eq!(all.policies[0].rules, [Rule::default()]);
}

#[test]
fn an_allow_loses_the_rule_that_l4_cannot_tell_and_stays() {
    let made = translation(&authorization(
        "shop",
        "{rules: [{from: [{source: {namespaces: [a]}}], to: [{operation: {methods: [GET]}}]}]}",
    ));
    assert!(
        made.policies[0].rules.is_empty(),
        "it then denies everything"
    );
    assert_eq!(
        made.problems,
        ["AuthorizationPolicy shop/gate: rule 0 is dropped, L4 cannot tell methods"]
    );
}

#[test]
fn cluster_local_is_the_meshs_own_trust_domain_wherever_a_principal_is() {
    let mesh = MeshConfig {
        trust_domain: "mesh.example".into(),
        ..MeshConfig::of_node("here")
    };
    let rule = "{from: [{source: {principals: [cluster.local/ns/x/sa/y], \
                notPrincipals: ['cluster.local/*']}}], \
                when: [{key: source.principal, values: ['spiffe://cluster.local/ns/x/*'], \
                notValues: [cluster.local/ns/x/sa/z]}]}";
    let made = translation_in(
        &mesh,
        &authorization("shop", &format!("{{rules: [{rule}]}}")),
    );
    let clauses = &made.policies[0].rules[0].clauses;
    let (source, when) = (&clauses[0].matches[0], &clauses[1].matches[0]);
    let exact = |text: &str| vec![StringMatch::Exact(text.into())];
    let prefix = |text: &str| vec![StringMatch::Prefix(text.into())];
    assert_eq!(source.principals, exact("mesh.example/ns/x/sa/y"));
    assert_eq!(source.not_principals, prefix("mesh.example/"));
    assert_eq!(when.principals, prefix("mesh.example/ns/x/"));
    assert_eq!(when.not_principals, exact("mesh.example/ns/x/sa/z"));
    assert_eq!(made.problems, [""; 0]);
}

#[test]
fn a_principal_that_nobody_in_the_mesh_can_be_is_told() {
    let made = translation(&authorization(
        "shop",
        "{action: DENY, rules: [{from: [{source: {principals: [cluster.local/ns/x/sa/y, other/ns/x/sa/y]}}], \
         when: [{key: source.principal, notValues: [cluster.local/sa/y]}]}]}",
    ));
    assert_eq!(
        made.problems,
        [
            "AuthorizationPolicy shop/gate: rules[0].from[0].source.principals[1]: `other/ns/x/sa/y` is nobody in \
             this mesh, whose trust domain is cluster.local",
            "AuthorizationPolicy shop/gate: rules[0].when[0].notValues[0]: `cluster.local/sa/y` is nobody in this \
             mesh, whose trust domain is cluster.local",
        ]
    );
}

#[test]
fn a_trust_domain_and_a_namespace_that_nobody_can_be_of_are_told() {
    let source = "{trustDomains: [other, 'clust*', 'other*'], notNamespaces: ['Shop*', shop, '*', '*-b_c', ns/shop]}";
    let spec = format!(
        "{{action: DENY, rules: [{{from: [{{source: {source}}}], when: [{{key: source.namespace, values: [Shop]}}]}}]}}"
    );
    let source = "AuthorizationPolicy shop/gate: rules[0].from[0].source";
    let stranger = "is nobody in this mesh, whose trust domain is cluster.local";
    let nameless = "is no name of a namespace, so it is nobody";
    assert_eq!(
        translation(&authorization("shop", &spec)).problems,
        [
            format!("{source}.notNamespaces[0]: `Shop*` {nameless}"),
            format!("{source}.notNamespaces[3]: `*-b_c` {nameless}"),
            format!("{source}.notNamespaces[4]: `ns/shop` {nameless}"),
            format!("{source}.trustDomains[0]: `other` {stranger}"),
            format!("{source}.trustDomains[2]: `other*` {stranger}"),
            format!("AuthorizationPolicy shop/gate: rules[0].when[0].values[0]: `Shop` {nameless}"),
        ]
    );
}

#[test]
fn a_dry_run_is_one_in_each_of_istios_spellings_and_another_word_is_a_fault() {
    let with = |value: &str| {
        authorization("shop", "{action: DENY, rules: [{}]}").replace(
            "namespace: shop}",
            &format!("namespace: shop, annotations: {{istio.io/dry-run: '{value}'}}}}"),
        )
    };
    for value in ["1", "t", "T", "true", "TRUE", "True"] {
        assert_eq!(translation(&with(value)).policies, [], "{value}");
    }
    for value in ["0", "f", "F", "false", "FALSE", "False"] {
        assert_eq!(translation(&with(value)).policies.len(), 1, "{value}");
    }
    for value in ["", "yes", "on", "tRUE", " true", "2"] {
        let refused = refusal(&with(value));
        let told =
            format!("metadata.annotations: istio.io/dry-run: `{value}` is neither true nor false");
        assert!(refused.contains(&told), "{refused}");
    }
    let audit = with("true").replace("DENY", "AUDIT");
    assert!(refusal(&audit).contains("is for ALLOW and DENY alone"));
    let mtls = with("true").replace("AuthorizationPolicy", "PeerAuthentication");
    let mtls = mtls.replace("{action: DENY, rules: [{}]}", "{mtls: {mode: STRICT}}");
    assert!(refusal(&mtls).contains("is for AuthorizationPolicies alone"));
}

#[test]
fn what_a_waypoint_is_for_is_one_of_istios_words() {
    let gateway = |word: &str| {
        format!(
            "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\n\
             metadata: {{name: w, namespace: shop, labels: {{istio.io/waypoint-for: {word}}}}}\n\
             spec: {{gatewayClassName: istio-waypoint}}\n---\n"
        )
    };
    for word in ["service", "workload", "all", "none"] {
        assert_eq!(translation(&gateway(word)).problems, [""; 0]);
    }
    let refused = refusal(&gateway("Service"));
    assert!(
        refused.contains("`Service` is none of service, workload, all, none"),
        "{refused}"
    );
}

#[test]
fn a_block_that_stands_for_one_of_ipv4_is_that_one() {
    let made = translation(&authorization(
        "shop",
        "{action: DENY, rules: [{from: [{source: {ipBlocks: ['::ffff:10.0.0.0/104'], notIpBlocks: ['::ffff:10.0.0.1']}}]}]}",
    ));
    let found = &made.policies[0].rules[0].clauses[0].matches[0];
    assert_eq!(found.source_ips[0].to_string(), "10.0.0.0/8");
    assert_eq!(found.not_source_ips[0].to_string(), "10.0.0.1/32");
    let wide = "{rules: [{from: [{source: {ipBlocks: ['::ffff:10.0.0.0/90']}}]}]}";
    assert!(refusal(&authorization("shop", wide)).contains("has more than IPv4 in it"));
}

#[test]
fn trust_domains_are_told_by_principals() {
    let of = |spec: &str| translation(&authorization("shop", spec)).policies[0].clone();
    let first = |policy: &Policy| policy.rules[0].clauses[0].matches[0].clone();
    let made =
        of("{rules: [{from: [{source: {trustDomains: [a.b, 'c*'], notTrustDomains: [d]}}]}]}");
    assert_eq!(
        first(&made),
        Match {
            principals: vec![
                StringMatch::Prefix("a.b/".into()),
                StringMatch::Prefix("c".into())
            ],
            not_principals: vec![StringMatch::Prefix("d/".into())],
            ..Match::default()
        }
    );
}

#[test]
fn trust_domains_that_cannot_be_told_let_nothing_more_through() {
    let source = "{source: {trustDomains: ['*.b']}}";
    let allow = translation(&authorization(
        "shop",
        &format!("{{rules: [{{from: [{source}]}}]}}"),
    ));
    assert!(allow.policies[0].rules.is_empty());
    let deny = format!("{{action: DENY, rules: [{{from: [{source}]}}]}}");
    let deny = translation(&authorization("shop", &deny));
    assert_eq!(
        deny.policies[0].rules,
        [Rule {
            clauses: vec![Clause::default()]
        }]
    );
    assert!(
        deny.problems[0].contains("trustDomains"),
        "{:?}",
        deny.problems
    );
    // Besides principals it would be a further condition, so the DENY is enforced without it.
    let both = "{action: DENY, rules: [{from: [{source: {trustDomains: [b], principals: [p]}}]}]}";
    let both = translation(&authorization("shop", both));
    let expected = Match {
        principals: vec![StringMatch::Exact("p".into())],
        ..Match::default()
    };
    assert_eq!(both.policies[0].rules[0].clauses[0].matches, [expected]);
}

#[test]
fn a_deny_of_l7_alone_is_told_to_be_without_effect() {
    let spec = "{action: DENY, rules: [{to: [{operation: {paths: [/admin]}}]}, {to: [{operation: {paths: [/a], ports: ['80']}}]}]}";
    let made = translation(&authorization("shop", spec));
    assert_eq!(
        made.problems,
        [
            "AuthorizationPolicy shop/gate: rule 0 never matches without paths, which L4 cannot tell",
            "AuthorizationPolicy shop/gate: rule 1 is enforced without paths, which L4 cannot tell",
        ]
    );
}

#[test]
fn service_accounts_are_told_in_a_when() {
    let spec = "{rules: [{when: [{key: source.serviceAccount, values: [a, b/c]}]}]}";
    let made = translation(&authorization("shop", spec));
    let accounts = &made.policies[0].rules[0].clauses[0].matches[0].service_accounts;
    let accounts: Vec<String> = accounts
        .iter()
        .map(|found| format!("{}/{}", found.namespace, found.service_account))
        .collect();
    assert_eq!(accounts, ["shop/a", "b/c"]);
}

#[test]
fn what_the_node_does_not_enforce_is_told() {
    for (spec, told) in [
        ("{action: AUDIT}", "only ALLOW and DENY"),
        (
            "{action: CUSTOM, provider: {name: p}}",
            "only ALLOW and DENY",
        ),
        (
            "{targetRefs: [{kind: Gateway, group: gateway.networking.k8s.io, name: w}]}",
            "is for Gateway w",
        ),
    ] {
        let made = translation(&authorization("shop", spec));
        assert!(made.policies.is_empty());
        assert!(made.problems[0].contains(told), "{:?}", made.problems);
    }
}

const STATIC: &str = "istio-system/istio_converted_static_strict";
const CONVERTED: &str = "shop/converted_peer_authentication_w";

#[test]
fn of_two_for_the_same_pods_the_oldest_holds_or_else_the_strict_one() {
    for (namespace, selector) in [
        ("istio-system", ""),
        ("shop", ""),
        ("shop", "selector: {matchLabels: {app: till}}, "),
    ] {
        let one = |name: &str, mode: &str, created: &str| {
            let spec = format!("{{{selector}mtls: {{mode: {mode}}}}}");
            let created = match created {
                "" => String::new(),
                day => format!(", creationTimestamp: '2026-01-{day}T00:00:00Z'"),
            };
            let namespaced = format!("namespace: {namespace}");
            peer(name, namespace, &spec).replace(&namespaced, &format!("{namespaced}{created}"))
        };
        // Each case has the timestamps of the strict and of the open one, and if the pod is strict then.
        for (strict, open, is_strict) in [
            ("", "", true),
            ("02", "", true),
            ("", "01", true),
            ("02", "03", true),
            ("02", "01", false),
        ] {
            for (first, second) in [("a", "b"), ("b", "a")] {
                let text = one(first, "STRICT", strict) + &one(second, "PERMISSIVE", open) + POD;
                let made = translation(&text);
                let policies = &made.workloads[0].policies;
                let said = format!("{text}\n{:?}", made.problems);
                assert_eq!(
                    policies.iter().any(|key| **key == *STATIC),
                    is_strict,
                    "{said}"
                );
                let (holds, other) = match is_strict {
                    true => (first, second),
                    false => (second, first),
                };
                let told = format!("{namespace}/{other}: {namespace}/{holds} is for the same pods");
                let problems = made
                    .problems
                    .iter()
                    .filter(|problem| problem.contains(&told));
                assert_eq!(problems.count(), 1, "{said}");
            }
        }
        let made = translation(&(one("a", "STRICT", "") + POD));
        assert!(made.problems.is_empty(), "{:?}", made.problems);
    }
}

#[test]
fn strict_is_inherited_and_overridden() {
    let mesh = |mode: &str| peer("m", "istio-system", &format!("{{mtls: {{mode: {mode}}}}}"));
    let space = |mode: &str| peer("ns", "shop", &format!("{{mtls: {{mode: {mode}}}}}"));
    let own = |rest: &str| {
        peer(
            "w",
            "shop",
            &format!("{{selector: {{matchLabels: {{app: till}}}}, {rest}}}"),
        )
    };
    let cases: [(String, Option<&str>); 14] = [
        (mesh("STRICT"), Some(STATIC)),
        (mesh("PERMISSIVE"), None),
        (mesh("STRICT") + &space("PERMISSIVE"), None),
        (mesh("STRICT") + &space("UNSET"), Some(STATIC)),
        (mesh("PERMISSIVE") + &space("STRICT"), Some(STATIC)),
        (mesh("STRICT") + &own("mtls: {mode: DISABLE}"), None),
        (own("mtls: {mode: STRICT}"), Some(STATIC)),
        (
            own("mtls: {mode: STRICT}, portLevelMtls: {80: {mode: STRICT}}"),
            Some(STATIC),
        ),
        (
            own("mtls: {mode: STRICT}, portLevelMtls: {80: {mode: DISABLE}}"),
            Some(CONVERTED),
        ),
        (
            own("mtls: {mode: PERMISSIVE}, portLevelMtls: {80: {mode: STRICT}}"),
            Some(CONVERTED),
        ),
        (
            own("mtls: {mode: PERMISSIVE}, portLevelMtls: {80: {mode: DISABLE}}"),
            None,
        ),
        (
            mesh("STRICT") + &own("portLevelMtls: {80: {mode: DISABLE}}"),
            Some(STATIC),
        ),
        (
            mesh("STRICT") + &own("portLevelMtls: {80: {mode: PERMISSIVE}}"),
            Some(CONVERTED),
        ),
        // istiod refers to a policy here that it does not make; we make it.
        (
            mesh("STRICT") + &space("UNSET") + &own("portLevelMtls: {80: {mode: PERMISSIVE}}"),
            Some(CONVERTED),
        ),
    ];
    for (text, expected) in cases {
        assert_eq!(
            given(&text),
            expected.map_or(vec![], |key| vec![key.to_owned()]),
            "{text}"
        );
        let made = translation(&text);
        if let Some(key) = expected {
            let made = policy(&made, key);
            assert_eq!(
                (made.action, made.scope),
                (Action::Deny, PolicyScope::WorkloadSelector)
            );
            assert!(!made.rules.is_empty());
        }
    }
}

#[test]
fn one_with_a_selector_in_the_root_namespace_has_no_effect() {
    let text = peer(
        "w",
        "istio-system",
        "{selector: {matchLabels: {app: till}}, mtls: {mode: STRICT}}",
    );
    assert!(given(&text).is_empty());
    assert!(translation(&text).problems[0].contains("no effect"));
}

#[test]
fn a_deny_that_denies_nothing_is_told_and_an_allow_that_allows_nobody_is_not() {
    for (spec, told) in [
        ("{action: DENY}", true),
        ("{action: DENY, rules: []}", true),
        ("{action: DENY, rules: [{}]}", false),
        ("{}", false),
        ("{action: ALLOW}", false),
    ] {
        let problems = translation(&authorization("shop", spec)).problems;
        let problem =
            "AuthorizationPolicy shop/gate: is a DENY without rules, which denies nothing";
        assert_eq!(
            problems.iter().any(|told| told == problem),
            told,
            "{spec}: {problems:?}"
        );
    }
}

use super::super::applies::{not_enforced, problems};
use super::objects;

fn told(text: &str) -> Vec<String> {
    problems(&objects(text), "istio-system")
}

fn namespace(name: &str) -> String {
    format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}}}\n---\n")
}

fn pod(namespace: &str, labels: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: web, namespace: {namespace}, labels: {labels}}}\n\
         spec: {{}}\n---\n"
    )
}

fn policy(kind: &str, namespace: &str, spec: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: {kind}\n\
         metadata: {{name: gate, namespace: {namespace}}}\nspec: {spec}\n---\n"
    )
}

const KINDS: [&str; 2] = ["AuthorizationPolicy", "PeerAuthentication"];

#[test]
fn a_policy_of_a_namespace_that_no_manifest_has_is_told() {
    let shop = namespace("shop") + &pod("shop", "{app: web}");
    let more = ["barn", "hill", "mill", "pond", "quay"]
        .map(namespace)
        .concat();
    let nobodys = "applies to no namespace that a manifest has";
    for kind in KINDS {
        for (with, of, problem) in [
            (shop.clone(), "shop", None),
            (pod("shop", "{istio.io/dataplane-mode: none}"), "shop", None),
            (shop.clone(), "istio-system", None),
            (shop.clone(), "sohp", Some("; did you mean shop?")),
            (shop.clone(), "default", Some("; did you mean shop?")),
            (shop.clone() + &more, "sohp", Some("; did you mean shop?")),
            (
                shop.clone() + &more,
                "default",
                Some("; they have barn, hill, mill, pond, quay, …"),
            ),
            (String::new(), "shop", Some("")),
        ] {
            let told = told(&(with + &policy(kind, of, "{}")));
            let problem = problem.map(|meant| format!("{kind} {of}/gate: {nobodys}{meant}"));
            assert_eq!(told, Vec::from_iter(problem), "{kind} {of}");
        }
    }
}

#[test]
fn a_policy_that_selects_no_pod_is_told() {
    let pods = namespace("shop") + &namespace("mill") + &pod("shop", "{app: web, tier: a}");
    for kind in KINDS {
        for (of, labels, none) in [
            ("shop", "{app: web}", false),
            ("shop", "{}", false),
            ("mill", "{}", false),
            ("shop", "{app: wbe}", true),
            ("shop", "{app: web, tier: b}", true),
            ("mill", "{app: web}", true),
            ("istio-system", "{app: web}", false),
        ] {
            let spec = format!("{{selector: {{matchLabels: {labels}}}}}");
            let told = told(&(pods.clone() + &policy(kind, of, &spec)));
            let labels = labels.trim_matches(['{', '}']);
            let problem = none.then(|| format!("{kind} {of}/gate: selects no pod ({labels})"));
            assert_eq!(told, Vec::from_iter(problem), "{kind} {of} {labels}");
        }
    }
}

#[test]
fn pods_of_a_namespace_without_a_manifest_are_told_once_unless_they_say_themselves() {
    let undecided =
        "Pod shop/web: is of namespace shop, of which no manifest is, and so not in the mesh";
    for (namespaces, labels, meant) in [
        ("shop", "{}", None),
        ("shpo", "{}", Some("; did you mean it by Namespace shpo?")),
        ("mill", "{}", Some("")),
        ("shpo", "{istio.io/dataplane-mode: none}", None),
        ("shpo", "{istio.io/dataplane-mode: ambient}", None),
    ] {
        let other = pod("shop", labels).replace("name: web", "name: web2");
        let told = told(&(namespace(namespaces) + &pod("shop", labels) + &other));
        let problem = meant.map(|meant| format!("{undecided}{meant}"));
        assert_eq!(told, Vec::from_iter(problem), "{namespaces} {labels}");
    }
}

#[test]
fn what_is_not_enforced_is_counted() {
    let authorization = |spec: &str| policy(KINDS[0], "shop", spec);
    let peer = |namespace: &str, spec: &str| policy(KINDS[1], namespace, spec);
    let strict = "{mtls: {mode: STRICT}}";
    for (text, count) in [
        (authorization("{}"), 0),
        (authorization("{action: DENY, rules: [{}]}"), 0),
        (authorization("{action: AUDIT}"), 1),
        (authorization("{targetRefs: [{kind: Service, name: s}]}"), 1),
        (
            authorization("{}").replace(
                "namespace: shop}",
                "namespace: shop, annotations: {istio.io/dry-run: 'true'}}",
            ),
            1,
        ),
        (peer("shop", strict), 0),
        (
            peer("shop", strict) + &peer("shop", strict).replace("gate", "gate2"),
            1,
        ),
        (
            peer("shop", strict) + &peer("barn", strict) + &peer("istio-system", strict),
            0,
        ),
        (
            peer("istio-system", "{selector: {matchLabels: {app: a}}}"),
            1,
        ),
        (
            authorization("{action: AUDIT}")
                + &peer("istio-system", "{selector: {matchLabels: {app: a}}}"),
            2,
        ),
    ] {
        let counted = not_enforced(&objects(&text), "istio-system");
        assert_eq!(counted, count, "{text}");
    }
}

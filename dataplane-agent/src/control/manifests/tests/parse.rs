use super::{objects, refusal, translation};

#[test]
fn documents_lists_and_json_are_read() {
    let read = objects(
        "# a comment\n---\napiVersion: v1\nkind: Namespace\nmetadata:\n  name: shop\n---\n\
         apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: ServiceAccount\n  metadata: {name: till}\n\
         - {\"apiVersion\": \"v1\", \"kind\": \"ServiceAccount\", \"metadata\": {\"name\": \"cellar\", \"namespace\": \"shop\", \"creationTimestamp\": null}}\n",
    );
    assert_eq!(read.namespaces.len(), 1);
    let accounts: Vec<String> = read
        .service_accounts
        .keys()
        .map(ToString::to_string)
        .collect();
    assert_eq!(accounts, ["default/till", "shop/cellar"]);
}

#[test]
fn kinds_that_are_not_read_are_named() {
    let made = translation(
        "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: till}\n---\n\
         apiVersion: v1\nkind: ConfigMap\nmetadata: {name: prices}\n",
    );
    assert_eq!(
        made.problems,
        [
            "test.yaml:1: Deployment till makes no pods here, write them as Pod",
            "test.yaml:5: ConfigMap prices is of a kind that is not read, passed over",
        ]
    );
}

#[test]
fn errors_name_file_line_and_field() {
    let policy = |rules: &str| {
        format!(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata:\n  name: till\nspec:\n{rules}"
        )
    };
    let pod = |rest: &str| format!("apiVersion: v1\nkind: Pod\nmetadata:\n  name: till\n{rest}");
    let cases = [
        (policy("  rules:\n  - from:\n    - source:\n        principal: [a]\n"), "test.yaml:9: spec.rules[0].from[0].source.principal: unknown field `principal`"),
        (policy("  action: PERMIT\n"), "test.yaml:6: spec.action: unknown variant `PERMIT`"),
        (policy("  rules:\n  - from: []\n"), "test.yaml:7: spec.rules[0].from: an empty list"),
        (policy("  rules:\n  - from:\n"), "test.yaml:7: spec.rules[0].from: no value"),
        (policy("  rules:\n  - from:\n    - source: {}\n"), "test.yaml:8: spec.rules[0].from[0].source: says nothing"),
        (policy("  rules:\n  - to:\n    - operation:\n        ports: [80]\n"), "test.yaml:9: spec.rules[0].to[0].operation.ports[0]: invalid type: integer `80`, expected a string"),
        (policy("  rules:\n  - to:\n    - operation:\n        ports:\n        - \"80\"\n        - \"80000\"\n"), "test.yaml:11: spec.rules[0].to[0].operation.ports[1]: `80000` is not a port"),
        (policy("  rules:\n  - from:\n    - source:\n        ipBlocks: [10.0.0.0/33]\n"), "test.yaml:9: spec.rules[0].from[0].source.ipBlocks[0]: `10.0.0.0/33` is not an IP address or block"),
        (policy("  rules:\n  - when:\n    - key: source.prinzipal\n      values: [a]\n"), "test.yaml:8: spec.rules[0].when[0].key: unknown attribute `source.prinzipal`"),
        (policy("  selector:\n    matchLabel: {}\n"), "test.yaml:7: spec.selector.matchLabel: unknown field `matchLabel`"),
        (pod("spec:\n  hostNetwork: maybe\n"), "test.yaml:6: spec.hostNetwork: invalid type: string \"maybe\", expected a boolean"),
        (pod("spec: {}\nstatus:\n  podIPs:\n  - ip: 10.0.0.256\n"), "test.yaml:8: status.podIPs[0].ip: invalid IP address syntax"),
        (pod("spec:\n  serviceAccountName: a/sa/b\n"), "test.yaml:6: spec.serviceAccountName: `a/sa/b` is not a name"),
        ("apiVersion: v1\nkind: Pod\nmetadata: {name: a/b}\nspec: {}\n".into(), "test.yaml:3: metadata.name: `a/b` is not a name"),
        ("apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec:\n  ports:\n  - port: 70000\n".into(), "test.yaml:6: spec.ports[0].port: invalid value: integer `70000`"),
        ("apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec:\n  ports:\n  - port: 80\n    targetPort: 0\n".into(), "test.yaml:7: spec.ports[0].targetPort: `0` is not a port"),
        ("apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: Pod\n  metadata: {name: 7}\n  spec: {}\n".into(), "test.yaml:6: items[0].metadata.name: invalid type: integer `7`"),
        (policy("  rules:\n  - from:\n    - source:\n        principals: [\"cluster.local/ns/*/sa/b\"]\n"), "test.yaml:9: spec.rules[0].from[0].source.principals[0]: `cluster.local/ns/*/sa/b` has a `*` that is neither"),
        (policy("  rules:\n  - from:\n    - source:\n        notNamespaces: [\"*a*\"]\n"), "test.yaml:9: spec.rules[0].from[0].source.notNamespaces[0]: `*a*` has a `*`"),
        (policy("  rules:\n  - when:\n    - key: source.principal\n      values: [\"a*b\"]\n"), "test.yaml:9: spec.rules[0].when[0].values[0]: `a*b` has a `*`"),
        (policy("  rules:\n  - from:\n    - source: [[a]]\n"), "test.yaml:8: spec.rules[0].from[0].source: invalid type: sequence, expected a map"),
        ("apiVersion: security.istio.io/v1\nkind: Autho\n".into(), "test.yaml:1: metadata.name: a Autho without a name"),
        ("kind: Pod\n".into(), "test.yaml:1: missing field `apiVersion`"),
        ("apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: a}\nspec:\n  mtls: {mode: LAX}\n".into(), "test.yaml:5: spec.mtls.mode: unknown variant `LAX`"),
        ("apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: a}\n".into(), "test.yaml:1: missing field `spec`"),
    ];
    for (text, expected) in cases {
        let told = refusal(&text);
        assert!(told.starts_with(expected), "{told}\nis not\n{expected}");
    }
}

#[test]
fn malformed_yaml_names_its_line() {
    let told = refusal("apiVersion: v1\nkind: Pod\nmetadata: {name: [}\n");
    assert!(told.starts_with("test.yaml:3: "), "{told}");
    assert!(!told.contains('\n'), "{told}");
}

#[test]
fn an_object_twice_in_a_file_is_refused() {
    let one = "apiVersion: v1\nkind: Namespace\nmetadata: {name: a}\n";
    assert_eq!(
        refusal(&format!("{one}---\n{one}")),
        "test.yaml:5: Namespace a is also on line 1"
    );
}

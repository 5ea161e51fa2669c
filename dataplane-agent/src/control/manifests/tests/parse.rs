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
        ("nothing but a text\n".into(), "test.yaml:1: invalid type: string \"nothing but a text\", expected a map"),
        ("- a\n- b\n".into(), "test.yaml:1: invalid type: sequence, expected a map"),
        (pod("spec:\n  nodeName: a\n  nodeName: b\n"), "test.yaml:7: duplicate mapping key: nodeName"),
        (pod("spec: text\n"), "test.yaml:5: spec: invalid type: string \"text\", expected a map"),
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
        (pod("spec: {}\nstatus:\n  podIPs:\n  - ip: 10.0.0.256\n"), "test.yaml:8: status.podIPs[0].ip: `10.0.0.256` is not an IP address"),
        (pod("spec:\n  serviceAccountName: a/sa/b\n"), "test.yaml:6: spec.serviceAccountName: `a/sa/b` is not a name"),
        ("apiVersion: v1\nkind: Pod\nmetadata: {name: a/b}\nspec: {}\n".into(), "test.yaml:3: metadata.name: `a/b` is not a name"),
        ("apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec:\n  ports:\n  - port: 70000\n".into(), "test.yaml:6: spec.ports[0].port: invalid value: integer `70000`"),
        ("apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec:\n  ports:\n  - port: 80\n    targetPort: 0\n".into(), "test.yaml:7: spec.ports[0].targetPort: `0` is not a port"),
        ("apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: Pod\n  metadata: {name: 7}\n  spec: {}\n".into(), "test.yaml:6: items[0].metadata.name: invalid type: integer `7`"),
        (policy("  rules:\n  - from:\n    - source:\n        principals: [\"cluster.local/ns/*/sa/b\"]\n"), "test.yaml:9: spec.rules[0].from[0].source.principals[0]: `cluster.local/ns/*/sa/b` has a `*` that is neither"),
        (policy("  rules:\n  - from:\n    - source:\n        notNamespaces: [\"*a*\"]\n"), "test.yaml:9: spec.rules[0].from[0].source.notNamespaces[0]: `*a*` has a `*`"),
        (policy("  rules:\n  - when:\n    - key: source.principal\n      values: [\"a*b\"]\n"), "test.yaml:9: spec.rules[0].when[0].values[0]: `a*b` has a `*`"),
        (policy("  rules:\n  - from:\n    - source: [[a]]\n"), "test.yaml:8: spec.rules[0].from[0].source: invalid type: sequence, expected a map"),
        ("apiVersion: security.istio.io/v1\nkind: Autho\n".into(), "test.yaml:2: kind: unknown kind `Autho`, did you mean `AuthorizationPolicy`?"),
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
fn a_near_miss_of_what_is_read_is_a_fault_and_not_passed_over() {
    let object = |version: &str, kind: &str| {
        format!("apiVersion: {version}\nkind: {kind}\nmetadata: {{name: a}}\nspec: {{}}\n")
    };
    for (version, kind, told) in [
        (
            "security.istio/v1",
            "AuthorizationPolicy",
            "did you mean `security.istio.io/v1`?",
        ),
        (
            "security.istio.io",
            "AuthorizationPolicy",
            "did you mean `security.istio.io/v1`?",
        ),
        (
            "security.istio.io/v1alpha1",
            "PeerAuthentication",
            "`security.istio.io/v1` is",
        ),
        (
            "authentication.istio.io/v1",
            "PeerAuthentication",
            "did you mean `security.istio.io/v1`?",
        ),
        (
            "v1",
            "AuthorizationPolicy",
            "did you mean `security.istio.io/v1`?",
        ),
        (
            "security.istio.io/v1",
            "AuthorisationPolicy",
            "did you mean `AuthorizationPolicy`?",
        ),
        (
            "security.istio.io/v1",
            "peerauthentication",
            "did you mean `PeerAuthentication`?",
        ),
        (
            "security.istio.io/v1",
            "Nonsense",
            "known are AuthorizationPolicy, PeerAuthentication",
        ),
        ("v1", "Pods", "did you mean `Pod`?"),
        ("v1", "pod", "did you mean `Pod`?"),
        ("v1", "Namepace", "did you mean `Namespace`?"),
        ("V1", "Pod", "did you mean `v1`?"),
        ("v2", "Pod", "`v1` is"),
        ("core/v1", "Pod", "did you mean `v1`?"),
        (
            "gateway.networking.k8s/v1",
            "Gateway",
            "did you mean `gateway.networking.k8s.io/v1`?",
        ),
        (
            "discovery.k8s.io/v1",
            "EndpointSlices",
            "did you mean `EndpointSlice`?",
        ),
        (
            "gateway.networking.k8s.io/v1",
            "HTTPRoutes",
            "did you mean `HTTPRoute`?",
        ),
    ] {
        let error = refusal(&object(version, kind));
        assert!(error.contains(told), "{version} {kind}: {error}");
        let line = if error.contains("apiVersion: ") { 1 } else { 2 };
        assert!(error.starts_with(&format!("test.yaml:{line}: ")), "{error}");
    }
    for (version, kind) in [
        ("networking.istio.io/v1", "Gateway"),
        ("networking.istio.io/v1", "VirtualService"),
        ("security.istio.io/v1", "RequestAuthentication"),
        ("policy.linkerd.io/v1alpha1", "AuthorizationPolicy"),
        ("serving.knative.dev/v1", "Service"),
        ("metrics.k8s.io/v1beta1", "PodMetrics"),
        ("gateway.networking.k8s.io/v1alpha2", "TCPRoute"),
        ("gateway.networking.k8s.io/v1", "GRPCRoute"),
        ("gateway.networking.k8s.io/v1", "GatewayClass"),
        ("gateway.networking.k8s.io/v1alpha3", "BackendTLSPolicy"),
        ("apps/v1", "Deployment"),
        ("v1", "Endpoints"),
        ("example.com/v1", "Thing"),
    ] {
        let made = translation(&object(version, kind));
        assert_eq!(
            made.problems.len(),
            1,
            "{version} {kind}: told and passed over"
        );
    }
}

/// Returns the text of an object with an annotation.
fn distributed(kind: &str, annotation: &str) -> String {
    format!(
        "apiVersion: v1\nkind: {kind}\nmetadata:\n  name: a\n  annotations: {{{annotation}}}\nspec: {{}}\n"
    )
}

#[test]
fn a_near_miss_of_a_field_that_is_read_is_a_fault() {
    let pod = |spec: &str| format!("apiVersion: v1\nkind: Pod\nmetadata: {{name: a}}\n{spec}");
    let service =
        |spec: &str| format!("apiVersion: v1\nkind: Service\nmetadata: {{name: a}}\n{spec}");
    let policy =
        |rest: &str| format!("apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n{rest}");
    for (text, expected) in [
        (pod("spec:\n  serviceaccountName: b\n"), "test.yaml:5: spec.serviceaccountName: unknown field `serviceaccountName`, did you mean `serviceAccountName`?"),
        (pod("spec:\n  nodename: b\n"), "test.yaml:5: spec.nodename: unknown field `nodename`, did you mean `nodeName`?"),
        (pod("spec: {}\nstatuss: {}\n"), "test.yaml:5: statuss: unknown field `statuss`, did you mean `status`?"),
        (pod("spec: {}\nstatus:\n  podIps: []\n"), "test.yaml:6: status.podIps: unknown field `podIps`, did you mean `podIPs`?"),
        (pod("spec:\n  containers:\n  - ports:\n    - containerPort: 80\n      protocol: tcp\n"), "test.yaml:8: spec.containers[0].ports[0].protocol: unknown variant `tcp`, did you mean `TCP`?"),
        (service("spec:\n  ports:\n  - port: 80\n    protocol: tcp\n"), "test.yaml:7: spec.ports[0].protocol: unknown variant `tcp`, did you mean `TCP`?"),
        (service("spec:\n  selectors: {a: b}\n"), "test.yaml:5: spec.selectors: unknown field `selectors`, did you mean `selector`?"),
        (policy("metadata: {name: a, namspace: b}\nspec: {}\n"), "test.yaml:3: metadata.namspace: unknown field `namspace`, did you mean `namespace`?"),
        (policy("metadata: {name: a}\nspec: {}\nrules: []\n"), "test.yaml:5: rules: unknown field `rules`"),
        (policy("metadata: {name: a}\nspec:\n  rule: []\n"), "test.yaml:5: spec.rule: unknown field `rule`, did you mean `rules`?"),
        (policy("metadata: {name: a}\nspec:\n  action: Deny\n"), "test.yaml:5: spec.action: unknown variant `Deny`, did you mean `DENY`?"),
        ("apiVersion: v1\nkind: Namespace\nmetadata:\n  name: a\n  labels: {istio.io/dataplane-mode: Ambient}\n".into(), "test.yaml:5: metadata.labels: unknown mode `Ambient`, did you mean `ambient`?"),
        ("apiVersion: v1\nkind: Namespace\nmetadata:\n  name: a\n  labels: {istio.io/dataplane-mod: ambient}\n".into(), "test.yaml:5: metadata.labels: unknown label `istio.io/dataplane-mod`"),
        (distributed("Namespace", "networking.istio.io/traffic-distribution: PreferClos"), "test.yaml:5: metadata.annotations: unknown word `PreferClos`, did you mean `PreferClose`?"),
        (distributed("Service", "networking.istio.io/traffic-distribution: PreferSameNod"), "test.yaml:5: metadata.annotations: unknown word `PreferSameNod`, did you mean `PreferSameNode`?"),
        (distributed("Service", "networking.istio.io/trafic-distribution: PreferClose"), "test.yaml:5: metadata.annotations: unknown annotation `networking.istio.io/trafic-distribution`, did you mean `networking.istio.io/traffic-distribution`?"),
    ] {
        let told = refusal(&text);
        assert!(told.starts_with(expected), "{told}\nis not\n{expected}");
    }
    objects(&distributed(
        "Service",
        "networking.istio.io/traffic-distribution: preferclose",
    ));
    // Kubernetes' other fields are accepted.
    objects(&pod(
        "spec: {hostname: a, serviceAccount: a, nodeSelector: {}, hostPID: true, containers: [{name: a, image: b, ports: [{containerPort: 1, hostPort: 2}]}]}\nstatus: {hostIP: 10.0.0.1, hostIPs: [], qosClass: x}\n",
    ));
    objects(&service(
        "spec: {externalTrafficPolicy: Local, externalIPs: [], ports: [{port: 1, nodePort: 2, appProtocol: x}]}\n",
    ));
}

#[test]
fn malformed_yaml_names_its_line() {
    let told = refusal("apiVersion: v1\nkind: Pod\nmetadata: {name: [}\n");
    assert!(told.starts_with("test.yaml:3: "), "{told}");
    assert!(!told.contains('\n'), "{told}");
}

#[test]
fn what_is_said_of_a_file_is_for_people_and_not_for_programmers() {
    let told = refusal("apiVersion: v1\nkind: Pod\nmetadata: {name: a, name: b}\nspec: {}\n");
    assert_eq!(told, "test.yaml:3: duplicate mapping key: name");
}

#[test]
fn an_object_twice_in_a_file_is_refused() {
    let one = "apiVersion: v1\nkind: Namespace\nmetadata: {name: a}\n";
    assert_eq!(
        refusal(&format!("{one}---\n{one}")),
        "test.yaml:5: Namespace a is also on line 1"
    );
}

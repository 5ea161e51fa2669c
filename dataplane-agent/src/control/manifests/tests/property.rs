//! Checks that any folder is read or refused, and translated, without a panic.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::Path;

use proptest::prelude::*;

use super::super::super::enrolled::Enrolled;
use super::super::object::{self, Objects};
use super::super::translate::{MeshConfig, PodKey, translate};

/// One of a few words, so that objects meet.
pub(super) fn word() -> impl Strategy<Value = &'static str> {
    prop::sample::select(vec!["a", "b", "istio-system", "ambient", "none"])
}

fn mode() -> impl Strategy<Value = &'static str> {
    prop::sample::select(vec!["STRICT", "PERMISSIVE", "DISABLE", "UNSET"])
}

pub(super) fn object() -> impl Strategy<Value = String> {
    let words = prop::collection::vec(word(), 8);
    let numbers = prop::collection::vec(0u16..=300, 4);
    (0..11u8, words, numbers, mode(), mode()).prop_map(|(kind, w, n, own, port)| {
        let meta = format!(
            "metadata: {{name: {}, namespace: {}, uid: {}, labels: {{app: {}, istio.io/dataplane-mode: {}, istio.io/use-waypoint: {}, kubernetes.io/service-name: {}}}}}",
            w[0], w[1], w[2], w[3], w[4], w[5], w[6]
        );
        match kind {
            0 => format!("apiVersion: v1\nkind: Namespace\n{meta}\n"),
            1 | 2 => format!(
                "apiVersion: v1\nkind: Pod\n{meta}\nspec: {{nodeName: {}, containers: [{{ports: [{{name: {}, containerPort: {}}}]}}]}}\nstatus: {{podIPs: [{{ip: 10.0.0.{}}}]}}\n",
                w[7], w[6], n[0], n[1]
            ),
            3 => format!(
                "apiVersion: v1\nkind: Service\n{meta}\nspec: {{clusterIP: 10.9.0.{}, selector: {{app: {}}}, ports: [{{port: {}, targetPort: {}}}, {{port: {}, targetPort: {}}}]}}\n",
                n[0], w[7], n[1], w[3], n[2], n[3]
            ),
            4 => format!(
                "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n{meta}\naddressType: IPv4\nendpoints: [{{addresses: [10.0.0.{0}, 10.0.0.{0}]}}, {{addresses: [], targetRef: {{kind: Pod, name: {1}}}}}]\nports: [{{port: {2}}}]\n",
                n[0], w[7], n[1]
            ),
            5 => format!(
                "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n{meta}\nspec: {{action: {}, selector: {{matchLabels: {{app: {}}}}}, rules: [{{from: [{{source: {{namespaces: ['{}*'], trustDomains: ['*{}']}}}}], to: [{{operation: {{ports: ['{}']}}}}]}}]}}\n",
                if n[1] % 2 == 0 { "ALLOW" } else { "DENY" }, w[7], w[3], w[4], n[0]
            ),
            6 => format!(
                "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\n{meta}\nspec: {{selector: {{matchLabels: {{app: {}}}}}, mtls: {{mode: {own}}}, portLevelMtls: {{{}: {{mode: {port}}}}}}}\n",
                w[7], n[0]
            ),
            7 => format!(
                "apiVersion: v1\nkind: Node\nmetadata: {{name: {}, labels: {{topology.istio.io/network: {}, topology.kubernetes.io/zone: {}}}}}\n",
                w[0], w[1], w[2]
            ),
            8 => format!(
                "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {{name: {}, namespace: {}, labels: {{istio.io/waypoint-for: all}}}}\nspec: {{gatewayClassName: istio-waypoint}}\n",
                w[0], w[1]
            ),
            9 => format!(
                "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n{meta}\naddressType: IPv4\nendpoints: [{{addresses: [10.0.0.9], targetRef: {{kind: Pod, name: {}}}}}]\nports: [{{port: {}}}]\n",
                w[7], n[1]
            ),
            _ => format!("apiVersion: security.istio.io/v1\nkind: PeerAuthentication\n{meta}\nspec: {{mtls: {{mode: {own}}}}}\n"),
        }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn translating_never_panics_and_leaves_no_key_without_a_policy(
        texts in prop::collection::vec(object(), 0..12),
        enrolled in prop::collection::vec((word(), word(), word()), 0..4),
    ) {
        let mut objects = Objects::default();
        for (order, text) in (0..).zip(&texts) {
            // A port or an address out of range is refused, which is fine too.
            for item in object::parse(Path::new("p.yaml"), text).into_iter().flat_map(|p| p.items) {
                objects.insert(item, crate::mesh::service::Age::new(time::OffsetDateTime::UNIX_EPOCH, order));
            }
        }
        let enrolled: Enrolled = enrolled
            .into_iter()
            .map(|(namespace, name, uid)| PodKey { namespace: namespace.into(), name: name.into(), uid: uid.into() })
            .collect();
        let made = translate(&objects, &enrolled, &BTreeSet::new(), &MeshConfig::of_node("a"));
        let keys: BTreeSet<String> = made.policies.iter().map(|policy| policy.key()).collect();
        for workload in &made.workloads {
            for key in workload.policies.iter() {
                prop_assert!(keys.contains(&**key), "{key} is attached and not there");
            }
        }
        let uids: BTreeSet<_> = made.workloads.iter().map(|workload| &workload.uid).collect();
        prop_assert_eq!(uids.len(), made.workloads.len());
    }

    #[test]
    fn reading_never_panics(text in "[a-z0-9:\\-\\[\\]{}!&*'\" \n]{0,200}", object in object(), cut in 0usize..400) {
        let _ = object::parse(Path::new("p.yaml"), &text);
        let mut half: String = object.chars().take(cut).collect();
        let _ = write!(half, "{text}");
        let _ = object::parse(Path::new("p.yaml"), &half);
    }
}

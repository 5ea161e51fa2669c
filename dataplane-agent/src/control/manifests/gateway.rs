//! Gateways, and the labels that refer to them. Waypoints are not supported yet: what must pass through one is
//! marked with it, so that the data path refuses it rather than bypass the waypoint.

use std::sync::Arc;

use serde::Deserialize;

use super::object::{Key, Meta, Objects, wrong};
use super::yaml::{Node, NodeError};

const USE_LABEL: &str = "istio.io/use-waypoint";
const USE_NAMESPACE_LABEL: &str = "istio.io/use-waypoint-namespace";
const FOR_LABEL: &str = "istio.io/waypoint-for";

const CARRIED: [&str; 4] = ["service", "workload", "all", "none"];

/// The fields of a Gateway that are read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gateway {
    /// Its class name.
    pub class: String,
}

impl Gateway {
    pub(crate) fn read(node: &Node) -> Result<Self, NodeError> {
        #[derive(Deserialize)]
        struct Raw {
            spec: Spec,
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Spec {
            gateway_class_name: String,
        }
        let Raw { spec } = node.read()?;
        let labels = node.field("metadata").and_then(|meta| meta.field("labels"));
        let carries = labels.and_then(|labels| labels.field(FOR_LABEL)?.text());
        // With an unknown value the waypoint would carry nothing, and its users would bypass it.
        if let Some(other) = carries.filter(|word| !CARRIED.contains(word)) {
            let what = format_args!("{FOR_LABEL}: `{other}` is none of {}", CARRIED.join(", "));
            return Err(wrong(node, "metadata.labels", what));
        }
        Ok(Self {
            class: spec.gateway_class_name,
        })
    }
}

/// The kind of object that uses a waypoint.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum WaypointUser {
    Service,
    Workload,
}

/// Returns the waypoint that an object must be reached through, as `namespace/hostname`.
///
/// By istiod's rule a waypoint that is not ready does not count. Here it does if the object itself asks for
/// it, since nothing may bypass what was asked for.
pub(crate) fn waypoint(
    user: WaypointUser,
    meta: &Meta,
    objects: &Objects,
    cluster_domain: &str,
) -> Option<Arc<str>> {
    let own = meta.label(USE_LABEL);
    let namespace = &meta.key.namespace;
    let name = own.or_else(|| objects.namespace_label(namespace, USE_LABEL))?;
    if name == "none" || name.is_empty() || is_gateway(user, meta) {
        return None;
    }
    let of_namespace = || objects.namespace_label(namespace, USE_NAMESPACE_LABEL);
    let in_namespace = match own {
        Some(_) => meta.label(USE_NAMESPACE_LABEL),
        None => of_namespace(),
    }
    .unwrap_or(namespace);
    if own.is_none() {
        let key = Key {
            namespace: in_namespace.into(),
            name: name.into(),
        };
        let carries = objects
            .gateways
            .get(&key)
            .and_then(|gateway| gateway.meta.label(FOR_LABEL));
        let carried = match user {
            WaypointUser::Service => matches!(carries, None | Some("service" | "all")),
            WaypointUser::Workload => matches!(carries, Some("workload" | "all")),
        };
        if !carried {
            return None;
        }
    }
    Some(format!("{in_namespace}/{name}.{in_namespace}.svc.{cluster_domain}").into())
}

/// Returns `true` for a gateway's own service and pods, which are never behind one.
fn is_gateway(user: WaypointUser, meta: &Meta) -> bool {
    match user {
        WaypointUser::Service => meta
            .label("gateway.istio.io/managed")
            .is_some_and(|by| by.contains("mesh-controller") || by.contains("eastwest-controller")),
        WaypointUser::Workload => meta
            .label("gateway.networking.k8s.io/gateway-name")
            .is_some(),
    }
}

//! `/config_dump`: the agent's configuration and state, under ztunnel's keys.

use std::time::SystemTime;

use rustls_pki_types::CertificateDer;
use serde_json::{Map, Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::status::StatusReport;
use crate::mesh::Mesh;
use crate::mesh::endpoints::Endpoints;
use crate::mesh::policy::{Clause, Match, Policy, Rule, ServiceAccountMatch, StringMatch};
use crate::mesh::service::Service;
use crate::mesh::workload::{Health, Workload, WorkloadType};
use crate::proxy::identity::Certs;
use crate::proxy::identity::certs::Listed;

/// Returns the whole dump.
pub fn dump(mesh: &Mesh, certs: &Certs, status: &StatusReport) -> Value {
    let states: Map<String, Value> = status
        .pods
        .iter()
        .filter(|pod| pod.state != "ignored")
        .map(|pod| {
            (
                pod.uid.clone(),
                json!({
                    "state": if pod.state == "up" { "Up" } else { "Pending" },
                    "reason": pod.reason,
                    "info": { "name": pod.name, "namespace": pod.namespace },
                }),
            )
        })
        .collect();
    json!({
        "workloads": mesh.workloads().map(|of| workload(of)).collect::<Vec<_>>(),
        "services": mesh.services().map(|(_, of)| service(mesh, of)).collect::<Vec<_>>(),
        "policies": mesh.policies().map(|(_, of)| policy(of)).collect::<Vec<_>>(),
        "certificates": certs.list().iter().map(certificate).collect::<Vec<_>>(),
        "workloadState": states,
        "version": { "version": status.version },
        "generation": mesh.generation(),
    })
}

fn workload(of: &Workload) -> Value {
    json!({
        "uid": of.uid,
        "workloadIps": of.addresses,
        "protocol": of.protocol,
        "networkMode": if of.host_network { "HostNetwork" } else { "Standard" },
        "name": of.name,
        "namespace": of.namespace,
        "serviceAccount": of.service_account,
        "trustDomain": of.trust_domain,
        "workloadName": of.workload_name,
        "workloadType": match of.workload_type {
            WorkloadType::Deployment => "deployment",
            WorkloadType::CronJob => "cronjob",
            WorkloadType::Pod => "pod",
            WorkloadType::Job => "job",
        },
        "canonicalName": of.canonical_name,
        "canonicalRevision": of.canonical_revision,
        "node": of.node,
        "status": status(of.health),
        "clusterId": of.cluster_id,
        "network": of.network,
        "networkGateway": of.network_gateway.as_ref().map(|destination| json!({ "destination": destination })),
        "capacity": of.capacity,
        "waypoint": of.waypoint.as_ref().map(|destination| json!({ "destination": destination })),
        "authorizationPolicies": of.policies,
        "services": of.services.iter().map(|(key, endpoint)| (key.to_string(), json!(endpoint.ports))).collect::<Map<_, _>>(),
        "locality": {
            "region": of.locality.region,
            "zone": of.locality.zone,
            "subzone": of.locality.subzone,
        },
    })
}

fn service(mesh: &Mesh, of: &Service) -> Value {
    let endpoints: Map<String, Value> = mesh
        .endpoints(of)
        .into_iter()
        .flat_map(Endpoints::iter)
        .map(|endpoint| {
            let own = endpoint.services.get(of.key().as_str());
            (
                endpoint.uid.to_string(),
                json!({
                    "workloadUid": endpoint.uid,
                    "port": own.map(|own| &own.ports),
                    "status": status(own.map_or(Health::Unhealthy, |own| own.health)),
                }),
            )
        })
        .collect();
    json!({
        "name": of.name,
        "namespace": of.namespace,
        "hostname": of.hostname,
        "vips": of.vips.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "externalIps": of.balanced.iter().chain(&of.external).map(ToString::to_string).collect::<Vec<_>>(),
        "ports": of.ports,
        "endpoints": endpoints,
        "subjectAltNames": of.subject_alt_names,
        "waypoint": of.waypoint.as_ref().map(|destination| json!({ "destination": destination })),
    })
}

/// As in ztunnel's dump, a terminating endpoint is not ready for new connections.
fn status(of: Health) -> &'static str {
    match of {
        Health::Healthy => "Healthy",
        Health::Terminating | Health::Unhealthy => "Unhealthy",
    }
}

fn policy(of: &Policy) -> Value {
    let clause = |of: &Clause| of.matches.iter().map(matches).collect::<Vec<_>>();
    let rule = |of: &Rule| of.clauses.iter().map(clause).collect::<Vec<_>>();
    json!({
        "name": of.name,
        "namespace": of.namespace,
        "scope": of.scope,
        "action": of.action,
        "rules": of.rules.iter().map(rule).collect::<Vec<_>>(),
        "dryRun": of.dry_run,
    })
}

fn matches(of: &Match) -> Value {
    let strings = |of: &[StringMatch]| {
        let one = |of: &StringMatch| match of {
            StringMatch::Exact(text) => json!({ "Exact": text }),
            StringMatch::Prefix(text) => json!({ "Prefix": text }),
            StringMatch::Suffix(text) => json!({ "Suffix": text }),
            StringMatch::Presence => json!("Presence"),
        };
        of.iter().map(one).collect::<Vec<_>>()
    };
    let accounts = |of: &[ServiceAccountMatch]| json!(of);
    let fields = [
        ("namespaces", json!(strings(&of.namespaces))),
        ("notNamespaces", json!(strings(&of.not_namespaces))),
        ("principals", json!(strings(&of.principals))),
        ("notPrincipals", json!(strings(&of.not_principals))),
        ("serviceAccounts", accounts(&of.service_accounts)),
        ("notServiceAccounts", accounts(&of.not_service_accounts)),
        ("sourceIps", json!(of.source_ips)),
        ("notSourceIps", json!(of.not_source_ips)),
        ("destinationIps", json!(of.destination_ips)),
        ("notDestinationIps", json!(of.not_destination_ips)),
        ("destinationPorts", json!(of.destination_ports)),
        ("notDestinationPorts", json!(of.not_destination_ports)),
    ];
    let set = fields
        .into_iter()
        .filter(|(_, value)| value.as_array().is_some_and(|all| !all.is_empty()));
    Value::Object(set.map(|(name, value)| (name.to_owned(), value)).collect())
}

fn certificate(of: &Listed) -> Value {
    let held = of.certificate.as_ref();
    let state = match (held, &of.failed) {
        (Some(held), _) if held.is_valid(SystemTime::now()) => "Available".to_owned(),
        (_, Some(error)) => format!("Unavailable: {error}"),
        (_, None) => "Initializing".to_owned(),
    };
    let told = |chain: &[CertificateDer<'_>]| chain.iter().filter_map(one).collect::<Vec<_>>();
    json!({
        "identity": of.identity.to_string(),
        "state": state,
        "certChain": held.map_or_else(Vec::new, |held| told(held.chain())),
        "rootCerts": held.map_or_else(Vec::new, |held| told(held.roots())),
    })
}

fn one(der: &CertificateDer<'_>) -> Option<Value> {
    let (_, parsed) = X509Certificate::from_der(der).ok()?;
    let at = |seconds| {
        OffsetDateTime::from_unix_timestamp(seconds)
            .ok()?
            .format(&Rfc3339)
            .ok()
    };
    Some(json!({
        "serialNumber": parsed.serial.to_string(),
        "validFrom": at(parsed.validity().not_before.timestamp()),
        "expirationTime": at(parsed.validity().not_after.timestamp()),
    }))
}

//! The metric labels of a connection, under Istio's names.

use std::fmt;
use std::sync::Arc;

use prometheus_client::encoding::{EncodeLabel, EncodeLabelSet, LabelSetEncoder};

use super::record::ConnectionInfo;
use super::series::OVERFLOW;
use crate::mesh::workload::Workload;

/// The value of a label that is not known.
const UNKNOWN: &str = "unknown";

/// The labels of a connection's series.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Labels(Arc<Values>);

#[derive(Debug, PartialEq, Eq, Hash)]
struct Values {
    reporter: &'static str,
    source: Party,
    service: [Arc<str>; 3],
    destination: Party,
    mutual_tls: bool,
}

/// The labels of one end of a connection.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Party {
    workload: Arc<str>,
    namespace: Arc<str>,
    principal: Arc<str>,
    canonical: Arc<str>,
    revision: Arc<str>,
    cluster: Arc<str>,
}

impl Labels {
    /// Returns the labels of a connection.
    pub fn of(info: &ConnectionInfo) -> Self {
        let unknown = || Arc::<str>::from(UNKNOWN);
        let source_principal = info.source_identity.as_ref().filter(|_| info.mutual_tls);
        let target = info.target.as_ref();
        let target_identity = target
            .filter(|_| info.mutual_tls)
            .map(|target| target.identity());
        let service = info.service.as_ref();
        let service = [
            service.map_or_else(unknown, |service| service.hostname.clone()),
            service.map_or_else(unknown, |service| service.namespace.clone()),
            service.map_or_else(unknown, |service| service.name.clone()),
        ];
        Self(Arc::new(Values {
            reporter: info.reporter.word(),
            source: Party::of(
                info.source.as_deref(),
                source_principal.map(|identity| identity.to_string()),
            ),
            service,
            destination: Party::of(
                target.map(|target| &**target),
                target_identity.map(|identity| identity.to_string()),
            ),
            mutual_tls: info.mutual_tls,
        }))
    }
}

impl Labels {
    /// Returns the labels of the overflow series: only the reporter is kept.
    pub fn overflow(&self) -> Self {
        let all = || Arc::<str>::from(OVERFLOW);
        let party = || Party {
            workload: all(),
            namespace: all(),
            principal: all(),
            canonical: all(),
            revision: all(),
            cluster: all(),
        };
        Self(Arc::new(Values {
            reporter: self.0.reporter,
            source: party(),
            service: [all(), all(), all()],
            destination: party(),
            mutual_tls: false,
        }))
    }
}

impl Party {
    fn of(workload: Option<&Workload>, principal: Option<String>) -> Self {
        let known = |part: fn(&Workload) -> &Arc<str>| {
            let value = workload.map(part).filter(|value| !value.is_empty());
            value.cloned().unwrap_or_else(|| UNKNOWN.into())
        };
        Self {
            workload: known(|workload| &workload.workload_name),
            namespace: known(|workload| &workload.namespace),
            principal: principal.map_or_else(|| UNKNOWN.into(), Arc::from),
            canonical: known(|workload| &workload.canonical_name),
            revision: known(|workload| &workload.canonical_revision),
            cluster: known(|workload| &workload.cluster_id),
        }
    }
}

impl Labels {
    fn put(&self, encoder: &mut LabelSetEncoder<'_>, flag: &str) -> fmt::Result {
        let Values {
            reporter,
            source,
            service,
            destination,
            mutual_tls,
        } = &*self.0;
        let security = if *mutual_tls { "mutual_tls" } else { UNKNOWN };
        let pairs: [(&str, &str); 23] = [
            ("reporter", reporter),
            ("source_workload", &source.workload),
            ("source_canonical_service", &source.canonical),
            ("source_canonical_revision", &source.revision),
            ("source_workload_namespace", &source.namespace),
            ("source_principal", &source.principal),
            ("source_app", &source.canonical),
            ("source_version", &source.revision),
            ("source_cluster", &source.cluster),
            ("destination_service", &service[0]),
            ("destination_service_namespace", &service[1]),
            ("destination_service_name", &service[2]),
            ("destination_workload", &destination.workload),
            ("destination_canonical_service", &destination.canonical),
            ("destination_canonical_revision", &destination.revision),
            ("destination_workload_namespace", &destination.namespace),
            ("destination_principal", &destination.principal),
            ("destination_app", &destination.canonical),
            ("destination_version", &destination.revision),
            ("destination_cluster", &destination.cluster),
            ("request_protocol", "tcp"),
            ("response_flags", flag),
            ("connection_security_policy", security),
        ];
        for pair in pairs {
            pair.encode(encoder.encode_label())?;
        }
        Ok(())
    }
}

/// Labels, and the value of `response_flags`.
#[derive(Debug)]
pub struct Flagged<'a>(pub &'a Labels, pub &'static str);

impl EncodeLabelSet for Flagged<'_> {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> fmt::Result {
        self.0.put(encoder, self.1)
    }
}

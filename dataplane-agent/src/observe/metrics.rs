//! Metrics, under ztunnel's names.

use std::fmt;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeLabelSet, EncodeMetric, LabelSetEncoder,
};
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

use super::Flag;
use super::record::{Facts, Reporter};
use crate::resolve::workload::Workload;

/// What stands where nothing is known.
const UNKNOWN: &str = "unknown";

/// The registry, and what is counted.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    opened: Family<Flagged, Counter>,
    closed: Family<Flagged, Counter>,
    failed: Family<Flagged, Counter>,
    received: Family<Labels, Counter>,
    sent: Family<Labels, Counter>,
    refused: Family<Refused, Counter>,
}

/// What a connection's series are labelled with.
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

/// One end.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Party {
    workload: Arc<str>,
    namespace: Arc<str>,
    principal: Arc<str>,
    canonical: Arc<str>,
    revision: Arc<str>,
    cluster: Arc<str>,
}

/// Labels with how it ended.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Flagged {
    labels: Labels,
    flag: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Refused {
    reporter: &'static str,
    response_flags: &'static str,
}

impl Labels {
    /// Of a connection.
    pub fn of(facts: &Facts) -> Self {
        let unknown = || Arc::<str>::from(UNKNOWN);
        let source_principal = facts.source_identity.as_ref().filter(|_| facts.mutual_tls);
        let target = facts.target.as_ref();
        let target_identity = target
            .filter(|_| facts.mutual_tls)
            .map(|target| target.identity());
        let service = facts.service.as_ref();
        let service = [
            service.map_or_else(unknown, |service| service.hostname.clone()),
            service.map_or_else(unknown, |service| service.namespace.clone()),
            service.map_or_else(unknown, |service| service.name.clone()),
        ];
        Self(Arc::new(Values {
            reporter: facts.reporter.word(),
            source: Party::of(
                facts.source.as_deref(),
                source_principal.map(|identity| identity.to_string()),
            ),
            service,
            destination: Party::of(
                target.map(|target| &**target),
                target_identity.map(|identity| identity.to_string()),
            ),
            mutual_tls: facts.mutual_tls,
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
            prometheus_client::encoding::EncodeLabel::encode(&pair, encoder.encode_label())?;
        }
        Ok(())
    }
}

impl EncodeLabelSet for Labels {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> fmt::Result {
        self.put(encoder, "-")
    }
}

impl EncodeLabelSet for Flagged {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> fmt::Result {
        self.labels.put(encoder, self.flag)
    }
}

/// Reads the kernel programs' counters when the metrics are asked for.
type Kernel = Box<dyn Fn() -> Vec<(&'static str, u64)> + Send + Sync>;

struct FromKernel(Kernel);

impl fmt::Debug for FromKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FromKernel")
    }
}

impl Collector for FromKernel {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let counter = ConstCounter::new(0_u64);
        let mut encoder = encoder.encode_descriptor(
            "dataplane_kernel_decisions",
            "What the kernel programs decided",
            None,
            counter.metric_type(),
        )?;
        for (decision, count) in (self.0)() {
            let labels = [("decision", decision)];
            ConstCounter::new(count).encode(encoder.encode_family(&labels)?)?;
        }
        Ok(())
    }
}

struct Descriptors;

impl fmt::Debug for Descriptors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Descriptors")
    }
}

impl Collector for Descriptors {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let open = std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
        let gauge = ConstGauge::new(i64::try_from(open).unwrap_or(i64::MAX));
        let kind = gauge.metric_type();
        let encoder =
            encoder.encode_descriptor("process_open_fds", "Open file descriptors", None, kind)?;
        gauge.encode(encoder)
    }
}

impl Metrics {
    /// With what the kernel programs count.
    pub fn new(kernel: impl Fn() -> Vec<(&'static str, u64)> + Send + Sync + 'static) -> Self {
        let mut registry = Registry::default();
        let (opened, closed, failed) = (Family::default(), Family::default(), Family::default());
        let (received, sent) = (Family::default(), Family::default());
        let refused = Family::default();
        let istio = registry.sub_registry_with_prefix("istio");
        istio.register(
            "build",
            "Build of the node dataplane",
            Info::new(vec![
                ("component", "dataplane"),
                ("tag", env!("CARGO_PKG_VERSION")),
            ]),
        );
        istio.register(
            "tcp_connections_opened",
            "Connections opened",
            opened.clone(),
        );
        istio.register(
            "tcp_connections_closed",
            "Connections closed",
            closed.clone(),
        );
        istio.register(
            "tcp_connections_failed",
            "Connections that failed",
            failed.clone(),
        );
        let bytes = || Unit::Bytes;
        istio.register_with_unit(
            "tcp_received",
            "Bytes from client to server",
            bytes(),
            received.clone(),
        );
        istio.register_with_unit(
            "tcp_sent",
            "Bytes from server to client",
            bytes(),
            sent.clone(),
        );
        registry.register(
            "dataplane_connections_refused",
            "Connections that ended before it was known who they were of or where they went",
            refused.clone(),
        );
        registry.register_collector(Box::new(FromKernel(Box::new(kernel))));
        registry.register_collector(Box::new(Descriptors));
        Self {
            registry,
            opened,
            closed,
            failed,
            received,
            sent,
            refused,
        }
    }

    pub(super) fn opened(&self, labels: &Labels) {
        self.opened
            .get_or_create(&Flagged {
                labels: labels.clone(),
                flag: "-",
            })
            .inc();
    }

    pub(super) fn closed(&self, labels: &Labels, flag: Option<Flag>, up: u64, down: u64) {
        let flagged = Flagged {
            labels: labels.clone(),
            flag: flag.map_or("-", Flag::word),
        };
        if flag.is_some() {
            self.failed.get_or_create(&flagged).inc();
        }
        self.closed.get_or_create(&flagged).inc();
        self.received.get_or_create(labels).inc_by(up);
        self.sent.get_or_create(labels).inc_by(down);
    }

    pub(super) fn refused(&self, reporter: Reporter, flag: Flag) {
        let labels = Refused {
            reporter: reporter.word(),
            response_flags: flag.word(),
        };
        self.refused.get_or_create(&labels).inc();
    }

    /// All of it, as OpenMetrics text.
    pub fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a String cannot fail.
        let _ = encode(&mut text, &self.registry);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A name that changes breaks somebody's dashboard: it is to be a decision.
    #[test]
    fn the_names_are_these() {
        let metrics = Metrics::new(|| vec![("captured", 3)]);
        // A name is told once there is something to tell.
        let labels = Labels::of(&crate::observe::record::tests::facts());
        metrics.opened(&labels);
        metrics.closed(&labels, Some(Flag::Deny), 1, 2);
        metrics.refused(Reporter::Destination, Flag::Connect);
        let text = metrics.text();
        let mut names: Vec<&str> = text
            .lines()
            .filter_map(|line| line.strip_prefix("# TYPE "))
            .collect();
        names.sort_unstable();
        assert_eq!(
            names,
            [
                "dataplane_connections_refused counter",
                "dataplane_kernel_decisions counter",
                "istio_build info",
                "istio_tcp_connections_closed counter",
                "istio_tcp_connections_failed counter",
                "istio_tcp_connections_opened counter",
                "istio_tcp_received_bytes counter",
                "istio_tcp_sent_bytes counter",
                "process_open_fds gauge",
            ]
        );
        assert!(
            text.contains("dataplane_kernel_decisions_total{decision=\"captured\"} 3"),
            "{text}"
        );
    }
}

//! Metrics, under ztunnel's names, or under our own where ztunnel has no such metric.

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::{encode, encode_registry};
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

use super::labels::{Flagged, Labels};
use super::record::Reporter;
use super::series::{AllSeries, Counts, MAX_SERIES, Series};
use super::status::StatusReport;
use super::status_gauges::StatusGauges;
use super::{Failure, Flag, log};
use crate::load::Load;
use crate::proxy::limits::NodePlaces;

/// The metrics of the process.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    series: Arc<AllSeries>,
    failed: Family<Failed, Counter>,
}

/// Returns counters that are kept elsewhere, each with its label.
pub type ReadCounters = dyn Fn() -> Vec<(&'static str, u64)> + Send + Sync;

/// The values that are read when metrics are requested.
pub struct Sources {
    /// Counters of the kernel programs.
    pub kernel: Box<ReadCounters>,
    /// Number of repairs of each part of capture.
    pub repairs: Box<ReadCounters>,
    /// The node's places for connections.
    pub places: NodePlaces,
    /// The workers' loads.
    pub workers: Vec<Load>,
    /// When the root certificate ends, in Unix time.
    pub root_ends: i64,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Failed {
    reporter: &'static str,
    reason: &'static str,
}

impl Metrics {
    /// Registers all metrics.
    pub fn new(sources: Sources) -> Self {
        let mut registry = Registry::default();
        let (failed, series) = (Family::default(), Arc::new(AllSeries::new(MAX_SERIES)));
        let istio = registry.sub_registry_with_prefix("istio");
        istio.register(
            "build",
            "Build of the node dataplane",
            Info::new(vec![
                ("component", "dataplane"),
                ("tag", env!("CARGO_PKG_VERSION")),
            ]),
        );
        istio.register_collector(Box::new(Connections(Arc::clone(&series))));
        registry.register(
            "dataplane_connections_failed",
            "Connections that failed, by the reason in the log",
            failed.clone(),
        );
        registry.register_collector(Box::new(CaptureCounters {
            name: "dataplane_kernel_decisions",
            help: "What the kernel programs decided.",
            label: "decision",
            read: sources.kernel,
        }));
        registry.register_collector(Box::new(CaptureCounters {
            name: "dataplane_repairs",
            help: "How often a part of what keeps pods captured was gone and was put back.",
            label: "part",
            read: sources.repairs,
        }));
        registry.register_collector(Box::new(Process {
            places: sources.places,
            workers: sources.workers,
            series: Arc::clone(&series),
            root_ends: sources.root_ends,
        }));
        Self {
            registry,
            series,
            failed,
        }
    }

    /// Returns the series that a connection is counted in.
    pub(super) fn series(&self, labels: Labels) -> Arc<Series> {
        self.series.of(labels)
    }

    pub(super) fn failed(&self, reporter: Reporter, failure: &dyn Failure) {
        let labels = Failed {
            reporter: reporter.word(),
            reason: failure.reason(),
        };
        self.failed.get_or_create(&labels).inc();
    }

    /// Removes series that were not used for long.
    pub fn expire(&self) {
        self.series.expire(Instant::now());
    }

    /// Returns all metrics as OpenMetrics text, those of `status` too.
    pub fn text(&self, status: &StatusReport) -> String {
        self.expire();
        let mut text = String::new();
        let mut of_status = Registry::default();
        of_status.register_collector(Box::new(StatusGauges::of(status)));
        // Writing to a String cannot fail.
        let _ = encode_registry(&mut text, &of_status);
        let _ = encode(&mut text, &self.registry);
        text
    }
}

/// Collects the series of connections.
#[derive(Debug)]
struct Connections(Arc<AllSeries>);

impl Collector for Connections {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let all: Vec<_> = self.0.list();
        let all: Vec<_> = all.iter().map(|of| (of.labels(), of.counts())).collect();
        /// Returns the values of a family for one series, each with its flag.
        type Read = fn(&Counts) -> Vec<(&'static str, u64)>;
        fn ended(counts: &Counts, from: usize) -> Vec<(&'static str, u64)> {
            let flags = ["-"].into_iter().chain(Flag::ALL.map(Flag::word));
            let told = flags.zip(counts.ended).skip(from);
            told.filter(|(_, count)| *count > 0).collect()
        }
        let bytes = Some(&Unit::Bytes);
        let families: [(&str, &str, Option<&Unit>, Read); 5] = [
            (
                "tcp_connections_opened",
                "Connections opened.",
                None,
                |of| vec![("-", of.opened)],
            ),
            (
                "tcp_connections_closed",
                "Connections closed.",
                None,
                |of| ended(of, 0),
            ),
            (
                "tcp_connections_failed",
                "Connections that failed.",
                None,
                |of| ended(of, 1),
            ),
            (
                "tcp_received",
                "Bytes from client to server, those of open connections too.",
                bytes,
                |of| vec![("-", of.up)],
            ),
            (
                "tcp_sent",
                "Bytes from server to client, those of open connections too.",
                bytes,
                |of| vec![("-", of.down)],
            ),
        ];
        for (name, help, unit, read) in families {
            let mut family = encoder.encode_descriptor(name, help, unit, MetricType::Counter)?;
            for (labels, counts) in &all {
                for (flag, count) in read(counts) {
                    let labels = Flagged(labels, flag);
                    ConstCounter::new(count).encode(family.encode_family(&labels)?)?;
                }
            }
        }
        Ok(())
    }
}

/// Collects counters of capture.
struct CaptureCounters {
    name: &'static str,
    help: &'static str,
    label: &'static str,
    read: Box<ReadCounters>,
}

impl fmt::Debug for CaptureCounters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

impl Collector for CaptureCounters {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let counter = ConstCounter::new(0_u64);
        let kind = counter.metric_type();
        let mut encoder = encoder.encode_descriptor(self.name, self.help, None, kind)?;
        for (word, count) in (self.read)() {
            let labels = [(self.label, word)];
            ConstCounter::new(count).encode(encoder.encode_family(&labels)?)?;
        }
        Ok(())
    }
}

/// Collects the metrics of the process itself.
#[derive(Debug)]
struct Process {
    places: NodePlaces,
    workers: Vec<Load>,
    series: Arc<AllSeries>,
    root_ends: i64,
}

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let open = std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
        let (unsent, undelivered) = self.places.held();
        let gauges = [
            ("process_open_fds", "Open file descriptors.", open),
            (
                "dataplane_connections",
                "Connections and tunnels that have a place.",
                self.places.taken(),
            ),
            (
                "dataplane_connections_limit",
                "Places for connections and tunnels of all pods.",
                self.places.all(),
            ),
            (
                "dataplane_metric_series",
                "Combinations of labels of connections that are counted.",
                self.series.list().len(),
            ),
            (
                "dataplane_undelivered_bytes",
                "What has come by tunnels and its connections have not taken, besides what each may always hold.",
                undelivered,
            ),
            (
                "dataplane_unsent_bytes",
                "What waits to be sent, besides what each connection may always have waiting.",
                unsent,
            ),
        ];
        for (name, help, value) in gauges {
            let gauge = ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX));
            let encoder = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            gauge.encode(encoder)?;
        }
        let ends = encoder.encode_descriptor(
            "citadel_server_root_cert_expiry_timestamp",
            "When the root certificate ends, in Unix time.",
            None,
            MetricType::Gauge,
        )?;
        ConstGauge::new(self.root_ends).encode(ends)?;
        let lost = encoder.encode_descriptor(
            "dataplane_log_lines_lost",
            "Log lines that came faster than they were read, or could not be written.",
            None,
            MetricType::Counter,
        )?;
        ConstCounter::new(log::lost()).encode(lost)?;
        let mut busy = encoder.encode_descriptor(
            "dataplane_worker_busy",
            "How long each worker was busy.",
            Some(&Unit::Seconds),
            MetricType::Counter,
        )?;
        for (number, load) in self.workers.iter().enumerate() {
            let labels = [("worker", number.to_string())];
            let counter = ConstCounter::new(load.busy().as_secs_f64());
            counter.encode(busy.encode_family(&labels)?)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::record::tests::{Refusal, connection_info};
    use crate::observe::status::PodStatus;

    /// A changed name breaks somebody's dashboard, so it has to be a decision.
    #[test]
    fn names_labels_and_help_are_the_golden_ones() {
        let runtime = tokio::runtime::Builder::new_current_thread().build();
        let metrics = Metrics::new(Sources {
            kernel: Box::new(|| vec![("captured", 3)]),
            repairs: Box::new(|| vec![("rule", 1)]),
            places: NodePlaces::new(100),
            workers: vec![Load::of(runtime.expect("a runtime").metrics())],
            root_ends: 1_795_811_471,
        });
        let series = metrics.series(Labels::of(&connection_info()));
        series.open();
        series.end(Some(Flag::Deny));
        series.add_up(1);
        series.add_down(2);
        metrics.failed(Reporter::Destination, &Refusal);
        let status = StatusReport {
            pods: vec![PodStatus {
                state: "waiting".into(),
                ..PodStatus::default()
            }],
            policies: 2,
            policies_not_enforced: 3,
            manifests_refused: 4,
            problems: vec!["one".into()],
            ..StatusReport::default()
        };
        let text: String = metrics
            .text(&status)
            .lines()
            .map(|line| match line.split_once(' ') {
                // It counts the whole process, in which other tests run too.
                Some((name @ "process_open_fds", _)) => {
                    format!("{name} N\n")
                }
                _ => format!("{line}\n"),
            })
            .collect();
        let golden = include_str!("../../../tests/golden/metrics.txt");
        assert!(
            text == golden,
            "tests/golden/metrics.txt differs from this:\n{text}"
        );
    }
}

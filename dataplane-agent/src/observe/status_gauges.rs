//! What `dataplane status` says, as gauges: so that one can alert on it.

use std::collections::BTreeMap;
use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::gauge::ConstGauge;

use super::status::{POD_STATES, StatusReport};

/// The gauges of one report.
#[derive(Debug)]
pub(super) struct StatusGauges {
    pods: BTreeMap<String, usize>,
    /// Name, help, and value.
    others: [(&'static str, &'static str, usize); 4],
}

impl StatusGauges {
    /// Counts what a report says.
    pub(super) fn of(report: &StatusReport) -> Self {
        let mut pods = BTreeMap::from(POD_STATES.map(|state| (state.to_owned(), 0)));
        for pod in &report.pods {
            *pods.entry(pod.state.clone()).or_default() += 1;
        }
        Self {
            pods,
            others: [
                (
                    "dataplane_manifests_refused",
                    "Manifests that are not accepted: what they said before holds.",
                    report.manifests_refused,
                ),
                (
                    "dataplane_policies",
                    "Policies that are enforced.",
                    report.policies,
                ),
                (
                    "dataplane_policies_not_enforced",
                    "Policies that are not enforced.",
                    report.policies_not_enforced,
                ),
                (
                    "dataplane_problems",
                    "Problems that `dataplane status` lists.",
                    report.problems.len(),
                ),
            ],
        }
    }
}

impl Collector for StatusGauges {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let gauge = |value: usize| ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX));
        let help = "Pods of the node, by state.";
        let mut family =
            encoder.encode_descriptor("dataplane_pods", help, None, MetricType::Gauge)?;
        for (state, count) in &self.pods {
            gauge(*count).encode(family.encode_family(&[("state", state.as_str())])?)?;
        }
        for (name, help, value) in self.others {
            gauge(value).encode(encoder.encode_descriptor(
                name,
                help,
                None,
                MetricType::Gauge,
            )?)?;
        }
        Ok(())
    }
}

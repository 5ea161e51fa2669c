//! What the admin socket tells, out of what each part says.

use std::sync::Arc;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::control::ca::RootEnd;
use crate::control::configuration::Configured;
use crate::mesh::MeshReader;
use crate::mesh::workload::named;
use crate::node::capture::reconciler::CaptureHandle;
use crate::node::pods::{PodView, State, StatusSnapshot};
use crate::observe::admin::{self, Sources};
use crate::observe::dump;
use crate::observe::log::Level;
use crate::observe::metrics::Metrics;
use crate::observe::status::{PodStatus, StatusReport};
use crate::proxy::identity::Certs;
use crate::seam::Serving;
use crate::seam::borrow::Lent;

/// What there is to tell of. A half that knows nothing of something says nothing of it.
#[derive(Clone)]
pub(super) struct AdminState {
    pub(super) node: String,
    pub(super) configured: watch::Receiver<Configured>,
    /// Of the half that knows the node.
    pub(super) node_half: Option<NodeState>,
    /// Of the half that serves pods.
    pub(super) proxy_half: Option<ProxyState>,
}

/// What the node half tells of.
#[derive(Clone)]
pub(super) struct NodeState {
    pub(super) handle: CaptureHandle,
    pub(super) view: watch::Receiver<StatusSnapshot>,
    /// Who serves its pods, where others do.
    pub(super) serving: Option<watch::Receiver<Serving>>,
}

/// What the proxy half tells of.
#[derive(Clone)]
pub(super) struct ProxyState {
    pub(super) mesh: MeshReader,
    pub(super) certs: Certs,
    pub(super) root_end: RootEnd,
    /// What the node has lent, if it is another process.
    pub(super) lent: Option<watch::Receiver<Lent>>,
    /// Cancelled when this process accepts nothing any more, if others do.
    pub(super) leaving: Option<CancellationToken>,
}

/// Why connections wait, where somebody else is to serve them.
const NOBODY: &str = "no proxy serves this node's pods (`dataplane proxy`); what comes to them, and from them, waits";

impl AdminState {
    /// As the admin socket asks for it.
    pub(super) fn sources(self, level: Level, metrics: Arc<Metrics>) -> Sources {
        let (for_dump, for_status, for_ready) = (self.clone(), self.clone(), self.clone());
        let handle = self.node_half.map(|node| node.handle);
        Sources {
            config_dump: Arc::new(move || match &for_dump.proxy_half {
                Some(proxy) => dump::dump(&proxy.mesh.current(), &proxy.certs, &for_dump.report()),
                None => serde_json::json!(for_dump.report()),
            }),
            status: Arc::new(move || for_status.report()),
            ready: Arc::new(move || for_ready.ready()),
            kernel_log: Arc::new(move |on| match &handle {
                Some(handle) => handle.set_log(on).map_err(|error| error.to_string()),
                None => Err("this half has no kernel programs: ask the node's".into()),
            }),
            level,
            metrics,
        }
    }

    /// Ready is a node that has captured and serves every pod of its own that is here, and of which other
    /// nodes know that. One that may not run yet does not count: it may never. A proxy process
    /// is ready once the node has lent it all its pods, if it can serve them, and until it is told to end.
    ///
    /// # Errors
    /// What is waited for: the first look at the machine, the state that nodes share, who serves, the node,
    /// an enrolment, pods that this proxy can serve, a capture that is broken, or the end of a proxy that drains.
    fn ready(&self) -> Result<(), String> {
        let leaving = self
            .proxy_half
            .as_ref()
            .and_then(|proxy| proxy.leaving.as_ref());
        if leaving.is_some_and(CancellationToken::is_cancelled) {
            return Err(admin::END.into());
        }
        if self.configured.borrow().away {
            return Err("state".into());
        }
        if let Some(proxy) = &self.proxy_half {
            let lent = proxy.lent.as_ref();
            match lent.map(|lent| lent.borrow().clone()) {
                None | Some(Lent::All) => {}
                Some(Lent::AllBut(_)) => return Err("pods".into()),
                Some(Lent::NotAll | Lent::Refused(_)) => return Err("node".into()),
            }
        }
        let Some(node) = &self.node_half else {
            return Ok(());
        };
        let view = node.view.borrow();
        let any = |state| view.pods.iter().any(|pod| pod.state == state && pod.here);
        if !view.scanned {
            Err("pods".into())
        } else if node.unserved().next().is_some() {
            Err("proxy".into())
        } else if any(State::Waiting) || view.undecided {
            Err("enrolment".into())
        } else if any(State::Broken) {
            Err("capture".into())
        } else {
            Ok(())
        }
    }

    fn report(&self) -> StatusReport {
        let configured = self.configured.borrow();
        let mut report = StatusReport {
            node: self.node.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            policies: configured.policies,
            policies_not_enforced: configured.policies_not_enforced,
            manifests_refused: configured.refused,
            problems: configured.problems.clone(),
            ..StatusReport::default()
        };
        if let Some(node) = &self.node_half {
            let view = node.view.borrow();
            report.pods = view.pods.iter().map(pod).collect();
            report.problems.extend_from_slice(&view.problems);
            report.problems.extend(node.unserved());
            let counters = node.handle.counters().into_iter();
            report.counters = counters
                .map(|(word, count)| (word.to_owned(), count))
                .collect();
        }
        if let Some(proxy) = &self.proxy_half {
            report.problems.extend(proxy.root_end.problem());
            let lent = proxy.lent.as_ref().map(|lent| lent.borrow().clone());
            match lent {
                Some(Lent::Refused(why)) => report.problems.push(why),
                Some(Lent::AllBut(refused)) => report.problems.extend(refused),
                Some(Lent::NotAll | Lent::All) | None => {}
            }
        }
        report
    }
}

impl NodeState {
    /// Returns what nobody serves.
    fn unserved(&self) -> impl Iterator<Item = String> + use<> {
        let serving = self.serving.as_ref();
        let serving = serving.map(|serving| serving.borrow().clone());
        let nobody = serving.as_ref().is_some_and(|of| of.proxies == 0);
        let refused = serving.map_or_else(Vec::new, |of| of.refused).into_iter();
        let refused = refused.map(|uid| {
            format!(
                "Pod {}: no proxy can serve it; what comes to it, and from it, waits",
                named(&uid)
            )
        });
        nobody.then(|| NOBODY.to_owned()).into_iter().chain(refused)
    }
}

fn pod(pod: &PodView) -> PodStatus {
    PodStatus {
        namespace: pod.namespace.to_string(),
        name: pod.name.to_string(),
        uid: pod.uid.to_string(),
        state: pod.state.word().to_owned(),
        reason: pod.reason.clone(),
        addresses: pod.addresses.iter().map(ToString::to_string).collect(),
        netns: pod.netns,
        cgroup: (!pod.cgroups.is_empty()).then(|| {
            let folders = pod
                .cgroups
                .iter()
                .map(|folder| folder.display().to_string());
            folders.collect::<Vec<_>>().join(", ")
        }),
        outside: pod.outside.processes,
        in_clear: pod.outside.in_clear,
        forwards: pod.forwards,
    }
}

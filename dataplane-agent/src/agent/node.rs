//! The half that knows the node: which pods are here, and what captures them. It has no key, and asks no
//! policy.

use std::sync::Arc;

use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use super::config_source::ConfigSource;
use super::peer_node::{shared_settings, state_path};
use super::{AgentError, Halves};
use crate::cli::check;
use crate::config::{self, RunOptions};
use crate::control::configuration::{Configuration, Configured, LocalPods, Source};
use crate::control::enrolled::EnrolmentRecords;
use crate::control::state::SharedState;
use crate::mesh::MeshWriter;
use crate::node::capture::node_folder::{Mark, NodeFolder};
use crate::node::capture::reconciler::{self, CaptureHandle, Reports};
use crate::node::capture::uninstall::canonical;
use crate::node::capture::{Reconciler, Status, Wanted};
use crate::node::machine::Scanner;
use crate::node::pods::{self, Channels, PodController, StatusSnapshot};
use crate::node::recording::RecordWriter;
use crate::observe::metrics::ReadCounters;
use crate::seam::{CUT_TIMEOUT, PodEvent, SharedSettings};
use crate::sys::bpffs::{self, Mounted};
use crate::sys::netns::Netns;
use crate::sys::{cgroup, machine_id};

/// What was asked of the machine, and nothing is left of if it is dropped.
pub(super) struct Prepared {
    config: reconciler::Config,
    scanner: Scanner,
    folder: NodeFolder,
    mark: Mark,
    mounted: Mounted,
}

/// Capture, as it was opened.
pub(super) struct Node {
    pub(super) reconciler: Reconciler,
    pub(super) handle: CaptureHandle,
    pub(super) reports: Reports,
    pub(super) status: watch::Receiver<Status>,
    pub(super) events: mpsc::Receiver<PodEvent>,
    /// Has capture rest.
    pub(super) rest: CancellationToken,
    pub(super) scanner: Scanner,
    /// What proxies must have too.
    pub(super) settings: SharedSettings,
}

/// What says which pods capture is to take, and follows what is configured.
pub(super) struct Control {
    configuration: Configuration<Status>,
    pods: PodController,
    pub(super) configured: watch::Receiver<Configured>,
    pub(super) view: watch::Receiver<StatusSnapshot>,
}

impl Control {
    /// Publishes the mesh as it is configured. The other end hears what capture is to do.
    pub(super) fn new(
        scanner: Scanner,
        status: watch::Receiver<Status>,
        (source, records): (Source, Option<EnrolmentRecords>),
        mesh: MeshWriter,
    ) -> (Self, watch::Receiver<Option<Wanted>>) {
        let (wanted, to_capture) = watch::channel(None);
        let (view_writer, view) = watch::channel(StatusSnapshot::default());
        let records_changed = Arc::new(Notify::new());
        let here = (status.clone(), pods::local_pods as fn(&Status) -> LocalPods);
        let (configuration, configured) =
            Configuration::new(source, here, mesh, Arc::clone(&records_changed));
        let ends = Channels {
            configured: configured.clone(),
            wanted,
            status,
            recording: records.map(RecordWriter::new),
            records_changed,
            view: view_writer,
        };
        let new = Self {
            configuration,
            pods: PodController::new(scanner, ends),
            configured,
            view,
        };
        (new, to_capture)
    }

    /// Runs until capture is gone. Once it drains it follows what is configured alone, and `told` hears when other
    /// nodes are told of what came last.
    pub(super) async fn run(self, draining: CancellationToken, told: oneshot::Sender<()>) {
        tokio::select! {
            () = self.configuration.run() => {}
            () = self.pods.run(draining, told) => {}
        }
    }
}

/// What capture counts, for the metrics: events of the kernel programs, and what was put back.
pub(super) fn counted(handle: &CaptureHandle) -> (Box<ReadCounters>, Box<ReadCounters>) {
    let (counters, repairs) = (handle.clone(), handle.clone());
    (
        Box::new(move || counters.counters()),
        Box::new(move || repairs.repairs()),
    )
}

impl Prepared {
    /// Refuses where an agent of this node cannot run.
    pub(super) async fn new(
        halves: Halves,
        options: &RunOptions,
        opened: &ConfigSource,
    ) -> Result<Self, AgentError> {
        let config = config(halves, options)?;
        let mark = Mark {
            node: options.node.clone(),
            bpffs: canonical(&options.places.bpffs),
            cgroup: config.cgroup.clone(),
            state: state_path(options).await,
            cluster_id: options.cluster_id.clone(),
            root: None,
            boot: machine_id::boot(),
            local_policies: opened.has_local_policies(),
        };
        let scanner = Scanner::new(&config.cgroup).map_err(|error| {
            AgentError::Settings(format!("--cgroup: {}: {error}", config.cgroup.display()))
        })?;
        let folder = NodeFolder::claim(&options.places.run_dir, &mark)?;
        reconciler::refuse(&config, &folder)?;
        opened.refuse_lost(&options.places.run_dir, &options.node)?;
        let bpffs = &options.places.bpffs;
        let mounted = bpffs::ensure(bpffs).map_err(|error| {
            AgentError::Machine(format!(
                "no BPF file system at {}: {error}",
                bpffs.display()
            ))
        })?;
        // A kernel that lacks something is told of now, and not at the first pod.
        let found = check::kernel(bpffs).await;
        let of = |verdict| found.iter().filter(move |line| line.verdict == verdict);
        for line in of(check::Verdict::Note) {
            tracing::warn!("{}: {}", line.what, line.detail);
        }
        let lacks = of(check::Verdict::Lacks);
        let lacks: Vec<String> = lacks
            .map(|line| format!("{}: {}", line.what, line.detail))
            .collect();
        if !lacks.is_empty() {
            return Err(AgentError::Machine(lacks.join("\n")));
        }
        Ok(Self {
            config,
            scanner,
            folder,
            mark,
            mounted,
        })
    }

    /// The fingerprint of the root that the node had of its state, if it had one.
    pub(super) fn known_root(&self) -> Option<String> {
        self.folder.known_root()
    }

    /// Takes the node. From now on what is made stays until it is uninstalled.
    pub(super) async fn open(
        mut self,
        options: &RunOptions,
        state: Option<&SharedState>,
    ) -> Result<Node, AgentError> {
        self.mark.state = state_path(options).await;
        let root = state.map(|state| state.root().to_owned());
        self.mark.root = root.or_else(|| self.known_root());
        let settings = shared_settings(options, &self.mark.state, self.mark.root.as_deref());
        self.folder.write_mark(&self.mark)?;
        self.mounted.keep();
        let (events, told) = mpsc::channel(64);
        let rest = CancellationToken::new();
        let opened = Reconciler::open(self.config, self.folder, events, rest.clone())?;
        let (reconciler, handle, reports, status) = opened;
        Ok(Node {
            reconciler,
            handle,
            reports,
            status,
            events: told,
            rest,
            scanner: self.scanner,
            settings,
        })
    }
}

fn config(halves: Halves, options: &RunOptions) -> Result<reconciler::Config, AgentError> {
    let machine = |error: std::io::Error| AgentError::Machine(error.to_string());
    let fits = options.places.socket_fits(&options.node);
    fits.map_err(AgentError::Settings)?;
    let root = cgroup::root().map_err(machine)?;
    let pods = options.cgroup.as_deref().unwrap_or(&root);
    let pods = config::folder("--cgroup", pods).map_err(AgentError::Settings)?;
    Ok(reconciler::Config {
        cgroup: pods,
        hosts: Netns::host_cookies().map_err(machine)?,
        bpffs: options.places.bpffs.clone(),
        node: options.node.clone(),
        drain: options.drain,
        cut: (halves == Halves::Both).then_some(CUT_TIMEOUT),
    })
}

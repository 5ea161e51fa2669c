//! The architect: builds the rooms from settings, lets the corridor walk, and drains in reverse.

use std::collections::HashMap;
use std::fs;
use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use crate::authorize::Authorizer;
use crate::capture::node_folder::{self, Mark, NodeFolder};
use crate::capture::uninstall::canonical;
use crate::capture::{self, CaptureError, Room, room};
use crate::cli::check;
use crate::config::{self, RunOptions};
use crate::control::ca::{CaError, RootEnd};
use crate::control::configuration::{Configuration, Configured, Source};
use crate::control::enrolled;
use crate::control::local;
use crate::control::machine::Looks;
use crate::control::manifests::{Folder, MeshConfig, Translated, Translation, Watch};
use crate::control::pods::{Ends, Pods, State, View};
use crate::control::recorded::Recorded;
use crate::control::recording::Recording;
use crate::control::state::{SharedState, StateError};
use crate::exit::Exit;
use crate::identity::Certs;
use crate::limits::NodePlaces;
use crate::mesh::{self, Identity, MeshReader};
use crate::observe::admin::{self, Socket, Sources};
use crate::observe::log::Level;
use crate::observe::status::{PodStatus, StatusReport};
use crate::observe::{Metrics, Observer, dump, kernel, metrics};
use crate::seam::{Instance, PodEvent};
use crate::sys::netns::Netns;
use crate::sys::{bpffs, caps, cgroup, limits, machine_id, memory, processes};
use crate::workers::{Shared, Threads};

/// How often it is looked whether memory can be given back.
const TIDY: Duration = Duration::from_secs(10);
/// How many connections must have ended for that.
const MANY: usize = 100;

/// Why the daemon ends before it is told to.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// A setting, or a file that one names, is wrong.
    #[error("{0}")]
    Settings(String),
    /// The machine lacks something; a line each.
    #[error("{0}")]
    Machine(String),
    /// Capture failed.
    #[error(transparent)]
    Capture(#[from] CaptureError),
    /// Anything else.
    #[error("{0:#}")]
    Other(#[from] anyhow::Error),
}

impl AgentError {
    /// How the process ends with it.
    pub fn exit(&self) -> Exit {
        match self {
            Self::Settings(_) => Exit::Settings,
            Self::Capture(CaptureError::Held(_) | CaptureError::Attached { .. }) => Exit::Held,
            Self::Capture(CaptureError::NotOurs { .. } | CaptureError::OtherPlace(_)) => {
                Exit::Settings
            }
            Self::Machine(_) | Self::Capture(CaptureError::Program { .. }) => Exit::Machine,
            Self::Capture(_) | Self::Other(_) => Exit::Failed,
        }
    }
}

/// Refuses where the machine lacks something, and gives up what is not needed. Before any thread is
/// made: capabilities are a thread's own.
///
/// # Errors
/// What is lacking, a line each.
pub fn privileges() -> Result<(), AgentError> {
    let missing = caps::missing();
    if !missing.is_empty() {
        let lines: Vec<String> = missing
            .iter()
            .map(|(capability, why)| format!("{capability} is missing: needed to {why}"))
            .collect();
        return Err(AgentError::Machine(lines.join("\n")));
    }
    processes::refuse_in_other_namespace().map_err(AgentError::Machine)?;
    caps::drop_others().map_err(|error| AgentError::Machine(format!("capabilities: {error}")))
}

/// Runs the daemon until it is told to end.
///
/// # Errors
/// It cannot start; a room failed.
pub async fn run(options: RunOptions, level: Level) -> Result<(), AgentError> {
    if let Err(error) = limits::raise_files() {
        tracing::warn!(%error, "the limit of open files stays as it is");
    }
    let mut signals = Signals::new()?;
    let config = room_config(&options)?;
    let mut mark = Mark {
        node: options.node.clone(),
        bpffs: canonical(&options.places.bpffs),
        cgroup: config.cgroup.clone(),
        state: canonical(&options.state),
        cluster_id: options.cluster_id.clone(),
        root: None,
    };
    // What is configured first: a wrong file stops the start before anything is made or touched. What is
    // made before nothing can refuse it any more is taken back with `folder` and `mounted`.
    let opened = opened(&options)?;
    let machine = Looks::new(&config.cgroup).map_err(|error| {
        AgentError::Settings(format!("--cgroup: {}: {error}", config.cgroup.display()))
    })?;
    let mut folder = NodeFolder::claim(&options.places.run_dir, &mark)?;
    room::refuse(&config, &folder)?;
    let captured = node_folder::captured(&options.places.run_dir, &options.node);
    if captured > 0
        && let Opened::Manifests { folder, .. } = &opened
        && folder.is_empty()
    {
        return Err(AgentError::Settings(format!(
            "--manifests: there are none, as if the folder were not mounted, and {captured} pods of \
             this node are captured; to say that they shall be let go put a manifest in it, if only an \
             empty List"
        )));
    }
    let bpffs = &options.places.bpffs;
    let mounted = bpffs::ensure(bpffs).map_err(|error| {
        AgentError::Machine(format!(
            "no BPF file system at {}: {error}",
            bpffs.display()
        ))
    })?;
    // A kernel that lacks something is told of now, and not at the first pod.
    let found = check::kernel(&options.places.bpffs).await;
    for line in found
        .iter()
        .filter(|line| line.verdict == check::Verdict::Note)
    {
        tracing::warn!("{}: {}", line.what, line.detail);
    }
    let lacks: Vec<String> = found
        .iter()
        .filter(|line| line.verdict == check::Verdict::Lacks)
        .map(|line| format!("{}: {}", line.what, line.detail))
        .collect();
    if !lacks.is_empty() {
        return Err(AgentError::Machine(lacks.join("\n")));
    }

    let known = folder.known_root();
    let (state, ca) = SharedState::open(
        &options.state,
        known.as_deref(),
        &options.trust_domain,
        options.secret_ttl,
    )
    .map_err(of_state)?;
    (mark.state, mark.root) = (canonical(&options.state), Some(state.root().to_owned()));
    let (source, recording) = source(&options, opened, state)?;
    folder.mark(&mark)?;
    mounted.keep();

    // The rooms, from the kernel on.
    let (events, mut pod_events) = mpsc::channel(64);
    let rest = CancellationToken::new();
    let (room, window, reports, status) = Room::open(config, folder, events, rest.clone())?;
    let root_end = ca.root_end().clone();
    let certs = Certs::new(Arc::new(ca));
    let (mesh_writer, mesh) = mesh::store();
    let authorizer = Authorizer::new(mesh.clone());
    let count = options.workers.map_or_else(processors, usize::from);
    let threads = Threads::new(count).context("cannot start workers")?;
    let places = places(&options)?;
    let (counters, repairs) = (window.clone(), window.clone());
    let metrics = Arc::new(Metrics::new(metrics::Sources {
        kernel: Box::new(move || counters.counters()),
        repairs: Box::new(move || repairs.repairs()),
        places: places.clone(),
        workers: threads.loads(),
        root_ends: root_end.unix(),
    }));
    let shared = Shared {
        mesh: mesh.clone(),
        authorizer: authorizer.clone(),
        certs: certs.clone(),
        observer: Observer::new(Arc::clone(&metrics)),
        places: places.clone(),
    };
    let mut workers = threads.start(&shared).context("cannot start workers")?;

    // What fills their stores.
    let (wanted, to_capture) = watch::channel(None::<capture::Wanted>);
    let (view_writer, view) = watch::channel(View::default());
    let rewritten = Arc::new(Notify::new());
    let (configuration, configured) =
        Configuration::new(source, status.clone(), mesh_writer, Arc::clone(&rewritten));
    let ends = Ends {
        configured: configured.clone(),
        wanted,
        status,
        recording,
        rewritten,
        view: view_writer,
    };
    let pods = Pods::new(machine, ends);

    // Who watches.
    let socket = options.places.socket(&options.node);
    let listener =
        Socket::open(&socket).with_context(|| format!("admin socket {}", socket.display()))?;
    let tidied = Arc::clone(&metrics);
    let sources = sources(
        options.node.as_str(),
        &window,
        (&configured, &view),
        &mesh,
        (&certs, root_end),
        level,
        metrics,
    );

    tracing::info!(
        node = %options.node,
        workers = count,
        connections = places.all(),
        admin = %socket.display(),
        "started"
    );
    let draining = CancellationToken::new();
    let (rests, at_rest) = oneshot::channel();
    let capture = room.run(to_capture, rests);
    let control = async {
        tokio::select! {
            () = configuration.run() => {}
            () = pods.run(draining.clone()) => {}
        }
    };
    let background = async {
        tokio::select! {
            () = certs.clone().rotate() => {}
            () = authorizer.watch() => {}
            () = kernel::events(reports.events) => {}
            () = kernel::log(reports.log) => {}
            () = tidy(&tidied, &places) => {}
            () = admin::serve(listener, sources) => {}
        }
    };
    // One for all of the agent's life: none of them may stand still meanwhile.
    let rooms = one_ends(capture, control, background);
    tokio::pin!(rooms);
    let mut held: HashMap<Instance, Identity> = HashMap::new();
    let ended = async {
        let mut apply = |event| {
            hold(&certs, &mut held, &event);
            workers.apply(event);
        };
        let (never, signal) = (pending::<()>(), signals.next());
        let signal = hand_on(rooms.as_mut(), never, &mut pod_events, &mut apply, signal).await?;
        tracing::info!(signal, drain = ?options.drain, "draining; pods stay captured");
        // Capture rests: no pod is enrolled or let go any more, and none is left half in.
        rest.cancel();
        let again = signals.next();
        let again = hand_on(rooms.as_mut(), at_rest, &mut pod_events, &mut apply, again);
        if let Some(name) = again.await? {
            tracing::warn!(
                signal = name,
                pods = unfinished(&view.borrow()),
                "ending at once, while pods are enrolled or let go: what is half done the next agent \
                 finishes, or `dataplane uninstall` takes back"
            );
            return Ok(());
        }
        // What it has handed on before: the listeners of a pod that has just come are in there.
        while let Ok(event) = pod_events.try_recv() {
            apply(event);
        }
        // Other nodes are told of what came last. What is configured goes on to hold, for what runs and for
        // what comes.
        draining.cancel();
        let (idle, again) = (workers.drain(options.drain), signals.next());
        if let Some(name) = hand_on(rooms.as_mut(), idle, &mut pod_events, drop, again).await? {
            tracing::warn!(signal = name, "ending at once");
        }
        Ok(())
    };
    let ended = ended.await;
    // However it ends, what is cut is told of.
    workers.end().await;
    let _ = fs::remove_file(socket);
    tracing::info!("ended");
    ended
}

/// Waits until a room ends. None does as long as the agent runs, but for capture if it fails.
async fn one_ends(
    capture: impl Future<Output = Result<(), CaptureError>>,
    control: impl Future<Output = ()>,
    background: impl Future<Output = ()>,
) -> AgentError {
    let room = tokio::select! {
        end = capture => match end {
            Ok(()) => "capture",
            Err(error) => return error.into(),
        },
        () = control => "control",
        () = background => "a room",
    };
    anyhow::anyhow!("{room} has ended by itself").into()
}

/// Hands on what capture says until it is `over`, or until the agent is told to end: by what.
///
/// # Errors
/// One of the `rooms` has ended.
async fn hand_on<T>(
    rooms: impl Future<Output = AgentError>,
    over: impl Future<Output = T>,
    events: &mut mpsc::Receiver<PodEvent>,
    mut apply: impl FnMut(PodEvent),
    signal: impl Future<Output = &'static str>,
) -> Result<Option<&'static str>, AgentError> {
    tokio::pin!(rooms, over, signal);
    loop {
        tokio::select! {
            Some(event) = events.recv() => apply(event),
            error = &mut rooms => return Err(error),
            _ = &mut over => return Ok(None),
            name = &mut signal => return Ok(Some(name)),
        }
    }
}

/// The pods that were being enrolled or let go when they were told of last.
fn unfinished(view: &View) -> String {
    let busy = view
        .pods
        .iter()
        .filter(|pod| pod.here && pod.state != State::Up);
    let names = busy.map(|pod| format!("{}/{}", pod.namespace, pod.name));
    names.collect::<Vec<_>>().join(", ")
}

/// Holds the certificate of a pod for as long as it is served.
fn hold(certs: &Certs, held: &mut HashMap<Instance, Identity>, event: &PodEvent) {
    match event {
        PodEvent::Up(lease) => {
            certs.hold(&lease.identity);
            held.insert(lease.instance, lease.identity.clone());
        }
        PodEvent::Down(instance, _) => {
            if let Some(identity) = held.remove(instance) {
                certs.forget(&identity);
            }
        }
        PodEvent::Addresses(..) | PodEvent::Drain(..) | PodEvent::Revive(_) => {}
    }
}

fn room_config(options: &RunOptions) -> Result<room::Config, AgentError> {
    let machine = |error: std::io::Error| AgentError::Machine(error.to_string());
    let fits = options.places.socket_fits(&options.node);
    fits.map_err(AgentError::Settings)?;
    let root = cgroup::root().map_err(machine)?;
    let pods = options.cgroup.as_deref().unwrap_or(&root);
    let pods = config::folder("--cgroup", pods).map_err(AgentError::Settings)?;
    Ok(room::Config {
        cgroup: pods,
        hosts: Netns::host_cookies().map_err(machine)?,
        bpffs: options.places.bpffs.clone(),
        node: options.node.clone(),
        drain: options.drain,
    })
}

/// A disk that is full is no setting that is wrong: to try again later may help.
fn of_state(error: StateError) -> AgentError {
    match error {
        StateError::File { .. } | StateError::Ca(CaError::File { .. }) => {
            AgentError::Other(anyhow::anyhow!("--state: {error}"))
        }
        StateError::Ca(error) => AgentError::Settings(error.to_string()),
        error => AgentError::Settings(format!("--state: {error}")),
    }
}

/// What is configured, read once.
#[expect(clippy::large_enum_variant, reason = "there is one")]
enum Opened {
    Manifests { folder: Folder, watch: Watch },
    Local(Translation),
}

fn opened(options: &RunOptions) -> Result<Opened, AgentError> {
    let wrong = |error: String| AgentError::Settings(error);
    if let Some(file) = &options.local_xds_path {
        let node = options.node.as_str();
        let read = local::read(file, node, &options.network, &options.trust_domain);
        return read
            .map(Opened::Local)
            .map_err(|error| wrong(error.to_string()));
    }
    let Some(folder) = &options.manifests else {
        return Err(wrong("--manifests or LOCAL_XDS_PATH is wanted".into()));
    };
    config::folder("--manifests", folder).map_err(wrong)?;
    // As it was given, and not what it leads to: another folder may take its place.
    let dir =
        std::path::absolute(folder).map_err(|error| wrong(format!("--manifests: {error}")))?;
    Ok(Opened::Manifests {
        watch: Watch::new(&dir),
        folder: Folder::open(&dir).map_err(|error| wrong(error.to_string()))?,
    })
}

fn source(
    options: &RunOptions,
    opened: Opened,
    state: SharedState,
) -> Result<(Source, Option<Recording>), AgentError> {
    let (folder, watch) = match opened {
        Opened::Local(translation) => return Ok((Source::Local(Some(translation)), None)),
        Opened::Manifests { folder, watch } => (folder, watch),
    };
    let records = enrolled::Records::new(state, options.node.as_str(), &machine_id::facts());
    let records_watch = Watch::without(records.folder(), enrolled::UNFINISHED);
    let recording = Recording::new(records.clone());
    let source = Source::Manifests {
        watch,
        folder,
        records_watch,
        records: Recorded::new(records).context("--state")?,
        translated: Translated::new(MeshConfig {
            cluster_id: options.cluster_id.clone(),
            cluster_domain: options.cluster_domain.clone(),
            trust_domain: options.trust_domain.clone(),
            network: options.network.clone(),
            ..MeshConfig::of_node(options.node.as_str())
        }),
    };
    Ok((source, Some(recording)))
}

fn sources(
    node: &str,
    window: &room::Window,
    (configured, view): (&watch::Receiver<Configured>, &watch::Receiver<View>),
    mesh: &MeshReader,
    (certs, root_end): (&Certs, RootEnd),
    level: Level,
    metrics: Arc<Metrics>,
) -> Sources {
    let (node, counted) = (node.to_owned(), window.clone());
    let (said, shown) = (configured.clone(), view.clone());
    let status = Arc::new(move || {
        let mut report = report(&node, &said.borrow(), &shown.borrow(), counted.counters());
        report.problems.extend(root_end.problem());
        report
    });
    let (for_dump, mesh, certs) = (Arc::clone(&status), mesh.clone(), certs.clone());
    let (programs, said, seen) = (window.clone(), configured.clone(), view.clone());
    Sources {
        config_dump: Arc::new(move || dump::dump(&mesh.current(), &certs, &for_dump())),
        status,
        ready: Arc::new(move || ready(&said.borrow(), &seen.borrow())),
        kernel_log: Arc::new(move |on| programs.set_log(on).map_err(|error| error.to_string())),
        level,
        metrics,
    }
}

/// Ready is a node that has captured and serves every pod of its own that is here, and of which other
/// nodes know that. One that may not run yet does not count: it may never.
///
/// # Errors
/// What is waited for: the first look at the machine, the state that nodes share, an enrolment, or a capture that is broken.
fn ready(configured: &Configured, view: &View) -> Result<(), String> {
    let any = |state| view.pods.iter().any(|pod| pod.state == state && pod.here);
    if !view.looked {
        Err("pods".into())
    } else if configured.away {
        Err("state".into())
    } else if any(State::Waiting) {
        Err("enrolment".into())
    } else if any(State::Broken) {
        Err("capture".into())
    } else {
        Ok(())
    }
}

fn report(
    node: &str,
    configured: &Configured,
    view: &View,
    counters: Vec<(&'static str, u64)>,
) -> StatusReport {
    let pod = |pod: &crate::control::pods::PodView| PodStatus {
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
    };
    StatusReport {
        node: node.to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pods: view.pods.iter().map(pod).collect(),
        policies: configured.policies,
        problems: [&configured.problems[..], &view.problems].concat(),
        counters: counters
            .into_iter()
            .map(|(word, count)| (word.to_owned(), count))
            .collect(),
    }
}

fn places(options: &RunOptions) -> Result<NodePlaces, AgentError> {
    let files = limits::files().map_err(|error| AgentError::Machine(error.to_string()))?;
    let wanted = options
        .connections
        .and_then(|wanted| wanted.try_into().ok());
    Ok(NodePlaces::fitting(wanted, limits::memory(), files))
}

/// Gives back what connections took that have ended; never returns.
async fn tidy(metrics: &Metrics, places: &NodePlaces) {
    loop {
        tokio::time::sleep(TIDY).await;
        metrics.expire();
        if places.peak() > places.taken() + MANY {
            memory::give_back();
        }
    }
}

fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    fn new() -> Result<Self, AgentError> {
        let of = |kind| signal(kind).context("cannot wait for signals");
        Ok(Self {
            terminate: of(SignalKind::terminate())?,
            interrupt: of(SignalKind::interrupt())?,
            hangup: of(SignalKind::hangup())?,
        })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
            _ = self.hangup.recv() => "SIGHUP",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn who_is_told_twice_to_end_does_not_wait_until_capture_rests() {
        let (events, mut inbox) = mpsc::channel(1);
        let (rests, mut at_rest) = oneshot::channel();
        let instance = Instance::next();
        let mut heard = Vec::new();
        let (told, _) = oneshot::channel();
        let event = PodEvent::Down(instance, told);
        events.send(event).await.expect("there is room");
        let again = async {
            tokio::time::sleep(Duration::from_millis(50)).await;
            "SIGTERM"
        };
        let apply = |event| heard.push(event);
        let end = hand_on(pending(), &mut at_rest, &mut inbox, apply, again);
        let end = tokio::time::timeout(Duration::from_secs(5), end).await;
        let end = end.expect("it does not wait").expect("no room has failed");
        assert_eq!((end, heard.len()), (Some("SIGTERM"), 1));
        rests.send(()).expect("somebody waits");
        let end = hand_on(pending(), at_rest, &mut inbox, drop, pending());
        assert_eq!(end.await.expect("no room has failed"), None);
    }

    /// How an agent ends as the room of this number does, and the others run on.
    async fn ends(room: usize, capture: Result<(), CaptureError>) -> String {
        let runs = async |number: usize| {
            if number != room {
                pending::<()>().await;
            }
        };
        let capture = async {
            runs(0).await;
            capture
        };
        let (_events, mut inbox) = mpsc::channel(1);
        let rooms = one_ends(capture, runs(1), runs(2));
        let end = hand_on(rooms, pending::<()>(), &mut inbox, drop, pending());
        let end = tokio::time::timeout(Duration::from_secs(5), end).await;
        let end = end.expect("that is noticed");
        end.expect_err("none ends by itself").to_string()
    }

    #[tokio::test]
    async fn a_room_that_ends_by_itself_is_an_error() {
        for (room, name) in ["capture", "control", "a room"].into_iter().enumerate() {
            assert_eq!(
                ends(room, Ok(())).await,
                format!("{name} has ended by itself")
            );
        }
        let why = CaptureError::Stopping;
        let told = why.to_string();
        assert_eq!(ends(0, Err(why)).await, told);
    }
}

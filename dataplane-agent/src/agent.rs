//! The architect: builds the halves of the agent from settings, in one process or in two, lets the corridor
//! walk, and drains in reverse.

mod admin_state;
mod config_source;
mod node;
mod peer_node;
mod proxy;

use std::future::pending;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use self::admin_state::{AdminState, NodeState, ProxyState};
use self::config_source::ConfigSource;
use self::node::{Control, Node, Prepared, counted};
use self::peer_node::{PeerNode, exclude_proxies};
use self::proxy::Proxy;
use crate::config::RunOptions;
use crate::control::ca::{CaError, EmbeddedCa};
use crate::control::configuration::{Configuration, LocalPods};
use crate::control::disk;
use crate::control::state::{SharedState, StateError};
use crate::exit::Exit;
use crate::mesh::{self, Identity};
use crate::node::capture::CaptureError;
use crate::node::pods::{State, StatusSnapshot};
use crate::observe::admin::{self, Socket};
use crate::observe::log::Level;
use crate::observe::{Metrics, kernel, metrics};
use crate::proxy::limits::NodePlaces;
use crate::seam::borrow::Borrower;
use crate::seam::lend::Lender;
use crate::seam::{Leases, PodEvent, SeamListener};
use crate::sys::{caps, limits, processes, seccomp};

/// How long a node that ends waits for the records that tell other nodes of its pods.
const LAST_RECORDS: Duration = Duration::from_secs(5);
/// How often it is looked whether the state has been made that a proxy makes.
const STATE_INTERVAL: Duration = Duration::from_secs(1);

/// What of the daemon a process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Halves {
    /// All of it.
    Both,
    /// The half that knows the node.
    Node,
    /// The half that serves its pods.
    Proxy,
}

/// Why the daemon ends before it is told to.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// A setting, or a file that one names, is wrong.
    #[error("{0}")]
    Settings(String),
    /// The machine lacks something; a line each.
    #[error("{0}")]
    Machine(String),
    /// Another process has what this one needs of the node.
    #[error("{0}")]
    Held(String),
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
            Self::Held(_)
            | Self::Capture(
                CaptureError::Held(_) | CaptureError::Serves(_) | CaptureError::Attached { .. },
            ) => Exit::Held,
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
pub fn privileges(halves: Halves) -> Result<(), AgentError> {
    let needed = match halves {
        Halves::Both | Halves::Node => caps::NEEDED,
        Halves::Proxy => caps::NEEDED_BY_PROXY,
    };
    let missing = caps::missing(needed);
    if !missing.is_empty() {
        let lines: Vec<String> = missing
            .iter()
            .map(|(capability, why)| format!("{capability} is missing: needed to {why}"))
            .collect();
        return Err(AgentError::Machine(lines.join("\n")));
    }
    if halves != Halves::Proxy {
        processes::refuse_in_other_namespace().map_err(AgentError::Machine)?;
    }
    let given_up = |what, error: String| AgentError::Machine(format!("{what}: {error}"));
    caps::drop_others(needed).map_err(|error| given_up("capabilities", error.to_string()))?;
    match halves {
        Halves::Proxy => seccomp::give_up().map_err(|error| given_up("seccomp", error.to_string())),
        Halves::Both | Halves::Node => Ok(()),
    }
}

/// Runs what of the daemon this process is, until it is told to end.
///
/// # Errors
/// It cannot start; a room failed.
pub async fn run(halves: Halves, options: RunOptions, level: Level) -> Result<(), AgentError> {
    match halves {
        Halves::Both => both(options, level).await,
        Halves::Node => node(options, level).await,
        Halves::Proxy => proxy(options, level).await,
    }
}

/// Both halves in one process.
async fn both(options: RunOptions, level: Level) -> Result<(), AgentError> {
    raise_files();
    let mut signals = Signals::new()?;
    let open = async {
        // What is configured first: a wrong file stops the start before anything is made or touched.
        let config = ConfigSource::new(&options).await?;
        let prepared = Prepared::new(Halves::Both, &options, &config).await?;
        let no_proxy = exclude_proxies(&options)?;
        let (state, ca) = open_state(&options, prepared.known_root()).await?;
        let configured = config.into_source(&options, Some(state.clone())).await?;
        let node = prepared.open(&options, Some(&state)).await?;
        Ok((no_proxy, ca, configured, node))
    };
    let Some((_no_proxy, ca, configured, node)) = signals.unless_told(open).await? else {
        return Ok(());
    };
    let Node {
        reconciler,
        handle,
        reports,
        status,
        mut events,
        rest,
        scanner,
        settings: _,
    } = node;

    let (mesh_writer, mesh) = mesh::store();
    let mut proxy = Proxy::start(&options, ca, &mesh, counted(&handle))?;
    let (control, to_capture) = Control::new(scanner, status, configured, mesh_writer);
    let view = control.view.clone();

    let socket = options.places.socket(&options.node);
    let listener = open_socket(&socket).await?;
    let admin = AdminState {
        node: options.node.to_string(),
        configured: control.configured.clone(),
        node_half: Some(NodeState {
            handle,
            view: view.clone(),
            serving: None,
        }),
        proxy_half: Some(ProxyState {
            mesh,
            certs: proxy.certs.clone(),
            root_end: proxy.root_end.clone(),
            lent: None,
            leaving: None,
        }),
    };
    let sources = admin.sources(level, Arc::clone(&proxy.metrics));
    tracing::info!(
        node = %options.node,
        workers = proxy.threads,
        connections = proxy.places.all(),
        admin = %socket.display(),
        "started"
    );
    let draining = CancellationToken::new();
    let (rests, at_rest) = oneshot::channel();
    let (told, others_know) = oneshot::channel();
    let besides = proxy.background();
    let background = async {
        tokio::select! {
            () = besides => {}
            () = kernel::events(reports.events) => {}
            () = kernel::log(reports.log) => {}
            () = admin::serve(listener, sources) => {}
        }
    };
    // One for all of the agent's life: none of them may stand still meanwhile.
    let rooms = first_to_end(
        reconciler.run(to_capture, rests),
        control.run(draining.clone(), told),
        background,
    );
    tokio::pin!(rooms);
    let ended = async {
        let (never, signal) = (pending::<()>(), signals.next());
        let mut apply = |event| proxy.apply(event);
        let signal = forward_events(rooms.as_mut(), never, &mut events, &mut apply, signal).await?;
        tracing::info!(signal, drain = ?options.drain, "draining; pods stay captured");
        // Capture rests: no pod is enrolled or let go any more, and none is left half in.
        rest.cancel();
        let again = signals.next();
        let again = forward_events(rooms.as_mut(), at_rest, &mut events, &mut apply, again);
        if let Some(name) = again.await? {
            warn_unfinished(name, &view.borrow());
            return Ok(());
        }
        // What it has handed on before: the listeners of a pod that has just come are in there.
        while let Ok(event) = events.try_recv() {
            apply(event);
        }
        // Other nodes are told of what came last. What is configured goes on to hold, for what runs and for
        // what comes.
        draining.cancel();
        let drained = proxy.drain(options.drain);
        let idle = async { tokio::join!(drained, wait_for_records(others_know)) };
        let again = signals.next();
        if let Some(name) = forward_events(rooms.as_mut(), idle, &mut events, drop, again).await? {
            tracing::warn!(signal = name, "ending at once");
        }
        Ok(())
    };
    let ended = ended.await;
    // However it ends, what is cut is told of.
    proxy.end().await;
    tracing::info!("ended");
    ended
}

/// The half that knows the node. Others serve its pods, and go on to when it has ended.
async fn node(options: RunOptions, level: Level) -> Result<(), AgentError> {
    raise_files();
    let mut signals = Signals::new()?;
    let open = async {
        let config = ConfigSource::new(&options).await?;
        let prepared = Prepared::new(Halves::Node, &options, &config).await?;
        let state = match config.has_records() {
            true => Some(wait_for_state(&options, prepared.known_root()).await?),
            false => None,
        };
        let configured = config.into_source(&options, state.clone()).await?;
        let node = prepared.open(&options, state.as_ref()).await?;
        Ok((configured, node))
    };
    let Some((configured, node)) = signals.unless_told(open).await? else {
        return Ok(());
    };
    let Node {
        reconciler,
        handle,
        reports,
        status,
        events,
        rest,
        scanner,
        settings,
    } = node;

    let mesh_writer = mesh::store_of_node(options.node.as_str());
    let (control, to_capture) = Control::new(scanner, status, configured, mesh_writer);
    let view = control.view.clone();
    let (lender, serving) = Lender::new(options.node.as_str(), &settings, reconciler.stamp());
    let seam = options.places.seam(&options.node);
    let entry = SeamListener::open(&seam)
        .with_context(|| format!("socket for proxies {}", seam.display()))?;

    let socket = options.places.socket(&options.node);
    let listener = open_socket(&socket).await?;
    let (kernel, repairs) = counted(&handle);
    let metrics = Arc::new(Metrics::new(metrics::Sources {
        kernel,
        repairs,
        places: NodePlaces::fitting(None, 0, 0),
        workers: Vec::new(),
        root_ends: 0,
    }));
    let admin = AdminState {
        node: options.node.to_string(),
        configured: control.configured.clone(),
        node_half: Some(NodeState {
            handle,
            view: view.clone(),
            serving: Some(serving),
        }),
        proxy_half: None,
    };
    let sources = admin.sources(level, metrics);
    tracing::info!(node = %options.node, admin = %socket.display(), seam = %seam.display(), "started");
    let draining = CancellationToken::new();
    let (rests, at_rest) = oneshot::channel();
    let (told, others_know) = oneshot::channel();
    let background = async {
        tokio::select! {
            () = lender.run(entry, events) => {}
            () = kernel::events(reports.events) => {}
            () = kernel::log(reports.log) => {}
            () = admin::serve(listener, sources) => {}
        }
    };
    let rooms = first_to_end(
        reconciler.run(to_capture, rests),
        control.run(draining.clone(), told),
        background,
    );
    tokio::pin!(rooms);
    let (_never, mut nothing) = mpsc::channel(1);
    let ended = async {
        let (never, signal) = (pending::<()>(), signals.next());
        let signal = forward_events(rooms.as_mut(), never, &mut nothing, drop, signal).await?;
        tracing::info!(
            signal,
            "ending; pods stay captured, and are served as before"
        );
        rest.cancel();
        let again = signals.next();
        let again = forward_events(rooms.as_mut(), at_rest, &mut nothing, drop, again);
        if let Some(name) = again.await? {
            warn_unfinished(name, &view.borrow());
        }
        draining.cancel();
        let (known, again) = (wait_for_records(others_know), signals.next());
        forward_events(rooms.as_mut(), known, &mut nothing, drop, again).await?;
        Ok(())
    };
    let ended = ended.await;
    tracing::info!("ended");
    ended
}

/// The half that serves the pods of a node. Told to end it accepts nothing any more, and what runs goes on
/// for a while.
async fn proxy(options: RunOptions, level: Level) -> Result<(), AgentError> {
    raise_files();
    let mut signals = Signals::new()?;
    let open = async {
        let config = ConfigSource::new(&options).await?;
        let mut peer = PeerNode::new(&options, &config).await?;
        let (state, ca) = open_state(&options, peer.known_root()).await?;
        let settings = peer.keep(state.root()).await;
        let (source, _) = config.into_source(&options, Some(state.clone())).await?;
        Ok((peer, state, ca, settings, source))
    };
    let Some((peer, state, ca, settings, source)) = signals.unless_told(open).await? else {
        return Ok(());
    };
    let (mesh_writer, mesh) = mesh::store();
    let mut proxy = Proxy::start(
        &options,
        ca,
        &mesh,
        (Box::new(Vec::new), Box::new(Vec::new)),
    )?;
    let (events, mut pod_events) = mpsc::channel(64);
    let leaving = CancellationToken::new();
    let seam = options.places.seam(&options.node);
    let (leases, (here, told_here)) = (Leases::default(), watch::channel(LocalPods::default()));
    let told_here = (told_here, LocalPods::clone as fn(&LocalPods) -> LocalPods);
    let (configuration, configured) =
        Configuration::new(source, told_here, mesh_writer, Arc::new(Notify::new()));
    let knows = {
        let configured = configured.clone();
        Box::new(move |uid: &str, identity: &Identity| configured.borrow().enrols(uid, identity))
    };
    let borrower = Borrower::new(seam, settings, knows, events, leaving.clone());

    let socket = options.places.proxy_socket(&options.node);
    let listener = open_socket(&socket).await?;
    let admin = AdminState {
        node: options.node.to_string(),
        configured,
        node_half: None,
        proxy_half: Some(ProxyState {
            mesh,
            certs: proxy.certs.clone(),
            root_end: proxy.root_end.clone(),
            lent: Some(borrower.lent()),
            leaving: Some(leaving.clone()),
        }),
    };
    let sources = admin.sources(level, Arc::clone(&proxy.metrics));
    tracing::info!(
        node = %options.node,
        workers = proxy.threads,
        connections = proxy.places.all(),
        admin = %socket.display(),
        "started"
    );
    let besides = proxy.background();
    let background = async {
        tokio::select! {
            () = besides => {}
            () = admin::serve(listener, sources) => {}
        }
    };
    let borrows = async {
        peer.wait_until_started(&state).await?;
        borrower.run().await;
        Ok::<(), AgentError>(())
    };
    let rooms = first_to_end(borrows, configuration.run(), background);
    tokio::pin!(rooms);
    let ended = async {
        let apply = |proxy: &mut Proxy, event| {
            leases.apply(&event);
            let (served, captured) = leases.uids();
            here.send_replace(LocalPods { captured, served });
            proxy.apply(event);
        };
        let (never, signal) = (pending::<()>(), signals.next());
        let hear = |event| apply(&mut proxy, event);
        let signal = forward_events(rooms.as_mut(), never, &mut pod_events, hear, signal).await?;
        leaving.cancel();
        tracing::info!(signal, drain = ?options.drain, "draining; what comes waits for the next proxy");
        // The node goes on to say what happens to its pods.
        let (idle, again) = (proxy.stop_accepting(options.drain), signals.next());
        let hear = |event| match event {
            // The lease was on its way. Others have it too.
            PodEvent::Up(lease) => drop(lease),
            event => apply(&mut proxy, event),
        };
        if let Some(name) =
            forward_events(rooms.as_mut(), idle, &mut pod_events, hear, again).await?
        {
            tracing::warn!(signal = name, "ending at once");
        }
        Ok(())
    };
    let ended = ended.await;
    proxy.end().await;
    tracing::info!("ended");
    ended
}

fn raise_files() {
    if let Err(error) = limits::raise_files() {
        tracing::warn!(%error, "the limit of open files stays as it is");
    }
}

async fn open_socket(path: &Path) -> Result<Socket, AgentError> {
    let socket = Socket::open(path).await;
    Ok(socket.with_context(|| format!("admin socket {}", path.display()))?)
}

/// Reads or writes what is on a disk, at the start, when there is nothing to do but to wait for it.
async fn ask_disk<T: Send + 'static>(path: &Path, work: impl FnOnce() -> T + Send + 'static) -> T {
    let tell = |line: &str| tracing::error!("{line}; the agent cannot start before that is done");
    disk::answer(path, tell, work).await
}

async fn open_state(
    options: &RunOptions,
    known: Option<String>,
) -> Result<(SharedState, EmbeddedCa), AgentError> {
    let (folder, domain) = (options.state.clone(), options.trust_domain.clone());
    let ttl = options.secret_ttl;
    let open = move || SharedState::open(&folder, known.as_deref(), &domain, ttl);
    ask_disk(&options.state, open).await.map_err(state_error)
}

/// Waits for the state that nodes share, which proxies make: who has no key makes none.
async fn wait_for_state(
    options: &RunOptions,
    known: Option<String>,
) -> Result<SharedState, AgentError> {
    let folder = &options.state;
    let mut told = false;
    loop {
        let (of, known, domain) = (folder.clone(), known.clone(), options.trust_domain.clone());
        let found = ask_disk(folder, move || {
            SharedState::open_existing(&of, known.as_deref(), &domain)
        });
        if let Some(state) = found.await.map_err(state_error)? {
            return Ok(state);
        }
        if !told {
            tracing::info!(state = %folder.display(), "waits for the state that nodes share; a proxy makes it");
        }
        told = true;
        tokio::time::sleep(STATE_INTERVAL).await;
    }
}

/// Waits until other nodes are told of what came last, as long as the state that nodes share answers.
async fn wait_for_records(others_know: oneshot::Receiver<()>) {
    if timeout(LAST_RECORDS, others_know).await.is_err() {
        tracing::warn!(
            "ending, and other nodes are not told of what came last: the state that nodes share has not answered \
             for {LAST_RECORDS:?}"
        );
    }
}

/// Waits until a room ends. None does as long as the agent runs, but for capture if it fails, or what a
/// proxy has in its place.
async fn first_to_end<E: Into<AgentError>>(
    capture: impl Future<Output = Result<(), E>>,
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
async fn forward_events<T>(
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

/// Tells which pods were being enrolled or let go, when they were told of last.
fn warn_unfinished(signal: &str, view: &StatusSnapshot) {
    let busy = view
        .pods
        .iter()
        .filter(|pod| pod.here && pod.state != State::Up);
    let names = busy.map(|pod| format!("{}/{}", pod.namespace, pod.name));
    let pods = names.collect::<Vec<_>>().join(", ");
    tracing::warn!(
        signal,
        pods,
        "ending at once, while pods are enrolled or let go: what is half done the next agent finishes, or \
         `dataplane uninstall` takes back"
    );
}

/// A disk that is full is no setting that is wrong: to try again later may help.
fn state_error(error: StateError) -> AgentError {
    match error {
        StateError::File { .. } | StateError::Ca(CaError::File { .. }) => {
            AgentError::Other(anyhow::anyhow!("--state: {error}"))
        }
        StateError::Ca(error) => AgentError::Settings(error.to_string()),
        error => AgentError::Settings(format!("--state: {error}")),
    }
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

    /// Returns what `start` makes, or none if the agent is told to end before.
    async fn unless_told<T>(
        &mut self,
        start: impl Future<Output = Result<T, AgentError>>,
    ) -> Result<Option<T>, AgentError> {
        tokio::select! {
            started = start => started.map(Some),
            signal = self.next() => {
                tracing::info!(signal, "ending, before it has started");
                Ok(None)
            }
        }
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
    use crate::seam::Instance;

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
        let end = forward_events(pending(), &mut at_rest, &mut inbox, apply, again);
        let end = tokio::time::timeout(Duration::from_secs(5), end).await;
        let end = end.expect("it does not wait").expect("no room has failed");
        assert_eq!((end, heard.len()), (Some("SIGTERM"), 1));
        rests.send(()).expect("somebody waits");
        let end = forward_events(pending(), at_rest, &mut inbox, drop, pending());
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
        let rooms = first_to_end(capture, runs(1), runs(2));
        let end = forward_events(rooms, pending::<()>(), &mut inbox, drop, pending());
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

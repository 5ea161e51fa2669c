//! The reconciler: receives the wanted pods from control, carries out one step after the other, and publishes
//! how far each pod is.

mod held;
mod leave;
mod look;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
use std::time::Duration;

use aya::Ebpf;
use dataplane_ebpf::pod::Node;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use self::held::HeldPod;
use self::look::LookSchedule;
use super::enrol::PreparedPod;
use super::maps::{NodeMaps, PinnedMaps};
use super::node_folder::NodeFolder;
use super::pins::Pins;
use super::programs::{self, Links, Loader, PodProgram};
use super::reconcile::{Has, Phase, Step, Want, diff};
use super::repair::Repairs;
use super::routing::Routing;
use super::takeover::{self, Takeover};
use super::undo::{self, UndoRecord, UndoRecords};
use super::wanted::{Desired, PodState, PodStatus, Status, Wanted};
use super::{CaptureError, attached, enrol};
use crate::config::NodeName;
use crate::mesh::workload::named;
use crate::seam::{Instance, Lease, Listeners, PodEvent, Stamp};
use crate::sys::interfaces::Interfaces;
use crate::sys::netns::{Changes, Netns};

/// How long a pod's listeners stay open after it stopped being captured, so that handshakes in progress can finish.
const LINGER: Duration = Duration::from_secs(1);
/// Delay before a failed step is tried again; the upper bound for failed enrolments.
const RETRY: Duration = Duration::from_secs(5);
/// First delay after a failed enrolment. It doubles with each further failure, up to [`RETRY`].
const FIRST_RETRY: Duration = Duration::from_millis(250);
/// Minimum interval between status updates while many pods are enrolled in a row: control walks all pods for each.
const STATUS_INTERVAL: Duration = Duration::from_millis(100);

/// Where the reconciler works.
#[derive(Clone, Debug)]
pub struct Config {
    /// The cgroup that holds the pods.
    pub cgroup: PathBuf,
    /// Cookies of the host's network namespaces; 0 means none.
    pub hosts: [u64; 2],
    /// Path of a mounted bpffs.
    pub bpffs: PathBuf,
    /// The node's name.
    pub node: NodeName,
    /// How long the connections of a leaving pod may go on.
    pub drain: Duration,
    /// How long it may take to cut them; `None` if whoever lends the pods to proxies sees to that.
    pub cut: Option<Duration>,
}

/// A handle on the running capture, for those who observe it.
#[derive(Clone)]
pub struct CaptureHandle {
    maps: Arc<Mutex<NodeMaps>>,
    repairs: Arc<Repairs>,
}

impl CaptureHandle {
    /// Returns the counts of the kernel programs.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        self.maps().counters()
    }

    /// Returns how often each part of capture was lost and restored.
    pub fn repairs(&self) -> Vec<(&'static str, u64)> {
        self.repairs.all()
    }

    /// Turns the kernel programs' logging on or off.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn set_log(&self, on: bool) -> Result<(), CaptureError> {
        self.maps().set_log(on)
    }

    pub(super) fn maps(&self) -> std::sync::MutexGuard<'_, NodeMaps> {
        self.maps.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Brings the pods to what control wants, one step at a time.
pub struct Reconciler {
    config: Config,
    pins: Pins,
    records: UndoRecords,
    loader: Loader,
    handle: CaptureHandle,
    pods: BTreeMap<u64, Pod>,
    failed: BTreeMap<u64, Failure>,
    /// Pods of a predecessor whose records cannot be read.
    unread: BTreeSet<u64>,
    /// Whether [`PodEvent::Snapshot`] has been sent.
    snapshot_sent: bool,
    /// When a failed undo is tried again.
    undo_retry: Option<Instant>,
    events: mpsc::Sender<PodEvent>,
    status: watch::Sender<Status>,
    /// The map by which the agent's own sockets are known; lent with each pod.
    stamp: Arc<Stamp>,
    /// When the node's programs are looked at next.
    schedule: LookSchedule,
    /// Cancelled when capture is to rest.
    rest: CancellationToken,
    /// The node's programs, maps and locks. They go with the reconciler; what is pinned stays.
    node: Ebpf,
    links: Links,
    pinned: PinnedMaps,
    pins_lock: File,
    _folder: NodeFolder,
}

struct Failure {
    desired: Desired,
    why: String,
    wait: Duration,
    retry_at: Instant,
}

struct Pod {
    record: UndoRecord,
    uid: Arc<str>,
    /// Held since the pod was found, so that undoing does not depend on finding the namespace again. `None`
    /// if it was not found at the start.
    netns: Option<Netns>,
    phase: PodPhase,
    /// The capture of a pod that nobody serves, kept in repair until it has left; `None` if the pod is served, or is
    /// not to be captured.
    held: Option<HeldPod>,
    /// Whether its connections have been cut since it was last served. A proxy outlives node processes, and
    /// may still carry connections of a pod that a predecessor left.
    cleared: bool,
}

enum PodPhase {
    Unserved,
    Serving(Box<ServedPod>),
    /// The listeners stay open until this time; then the proxy is told to drain the pod.
    Lingering {
        /// `None` if this process has not served the pod; a proxy may have listeners of an earlier one.
        served: Option<Box<ServedPod>>,
        until: Instant,
    },
    Draining {
        /// As above.
        served: Option<Box<ServedPod>>,
        idle: oneshot::Receiver<()>,
        until: Instant,
    },
    /// Its connections are being cut. When that is done it is unserved.
    Cutting {
        /// As above.
        served: Option<Box<ServedPod>>,
        /// `None` once it is done.
        done: Option<oneshot::Receiver<()>>,
        /// When it is not waited for any longer.
        until: Option<Instant>,
    },
}

/// A pod that the proxy serves.
struct ServedPod {
    desired: Desired,
    instance: Instance,
    /// The pod's own addresses, as sent to the proxy.
    addresses: Arc<[IpAddr]>,
    program: PodProgram,
    /// The pod's interfaces and their addresses at the last look.
    interfaces: Interfaces,
    /// `true` once the kernel and the proxy have the addresses of `interfaces`.
    addresses_sent: bool,
    /// `true` if the pod forwards between its interfaces.
    forwards: bool,
    /// The rules and routes that were put in place for `interfaces`.
    routing: Routing,
    /// Duplicates of the proxy's listeners, to see whether they are alive.
    listeners: Listeners,
    changes: Changes,
    schedule: LookSchedule,
}

impl Pod {
    /// Ends [`PodPhase::Cutting`]: nobody serves the pod any more. It is held from then on.
    fn finish_cutting(&mut self) {
        let phase = std::mem::replace(&mut self.phase, PodPhase::Unserved);
        if let Some(served) = phase.into_served() {
            self.held = Some(HeldPod::with_program(served.program));
        }
        self.cleared = true;
    }

    /// Returns the id of the program that steers in the pod, pinned or not, if this agent knows it.
    fn program(&self) -> Option<u32> {
        let served = self.phase.served().and_then(|served| served.program.id());
        served.or(self.held.as_ref().and_then(HeldPod::program))
    }

    /// Returns the schedule of the pod's looks, if it has one.
    fn schedule(&self) -> Option<&LookSchedule> {
        let served = self.phase.served().map(|served| &served.schedule);
        served.or(self.held.as_ref().map(|held| &held.schedule))
    }
}

impl ServedPod {
    /// Sends the pod's addresses to the proxy if they have changed.
    ///
    /// # Errors
    /// The receiver of pod events is gone.
    async fn send_addresses(
        &mut self,
        addresses: Arc<[IpAddr]>,
        events: &mpsc::Sender<PodEvent>,
    ) -> Result<(), CaptureError> {
        if self.addresses != addresses {
            self.addresses = Arc::clone(&addresses);
            let event = PodEvent::Addresses(self.instance, addresses);
            events
                .send(event)
                .await
                .map_err(|_| CaptureError::Stopping)?;
        }
        Ok(())
    }
}

impl PodPhase {
    /// Returns the pod as the proxy serves it.
    fn served(&self) -> Option<&ServedPod> {
        match self {
            Self::Unserved => None,
            Self::Serving(served) => Some(served),
            Self::Lingering { served, .. }
            | Self::Draining { served, .. }
            | Self::Cutting { served, .. } => served.as_deref(),
        }
    }

    fn served_mut(&mut self) -> Option<&mut ServedPod> {
        match self {
            Self::Unserved => None,
            Self::Serving(served) => Some(served),
            Self::Lingering { served, .. }
            | Self::Draining { served, .. }
            | Self::Cutting { served, .. } => served.as_deref_mut(),
        }
    }

    fn into_served(self) -> Option<Box<ServedPod>> {
        match self {
            Self::Unserved => None,
            Self::Serving(served) => Some(served),
            Self::Lingering { served, .. }
            | Self::Draining { served, .. }
            | Self::Cutting { served, .. } => served,
        }
    }

    fn phase(&self) -> Phase {
        match self {
            Self::Unserved => Phase::Unserved,
            Self::Serving(_) => Phase::Serving,
            Self::Lingering { .. } | Self::Draining { .. } => Phase::Draining,
            Self::Cutting { .. } => Phase::Cutting,
        }
    }
}

/// The outputs of the kernel programs, for `observe`.
pub struct Reports {
    /// The ring buffer of events.
    pub events: aya::maps::RingBuf<aya::maps::MapData>,
    /// The programs' log; `None` if this kernel lacks what it needs.
    pub log: Option<aya_log::EbpfLogger<&'static dyn log::Log>>,
}

/// Refuses where [`Reconciler::open`] would refuse, without making anything.
///
/// # Errors
/// Another agent runs, or its programs are attached; another user made the pins, or a pinned map cannot be
/// taken over; the undo records of pinned pods are in another folder.
pub fn refuse(config: &Config, folder: &NodeFolder) -> Result<(), CaptureError> {
    let mut pins = Pins::new(&config.bpffs, &config.node);
    let _lock = pins.lock()?;
    pins.refuse()?;
    attached::refuse_on_cgroup(&config.cgroup, &pins, &BTreeSet::new())?;
    pins.refuse_unrecorded(&folder.records()?)?;
    takeover::refuse(&pins)
}

impl Reconciler {
    /// Loads and attaches the node's programs, and takes over what a predecessor left. No pod is released,
    /// and none is served yet.
    ///
    /// # Errors
    /// Another agent runs, or its programs are attached; the kernel refuses.
    pub fn open(
        config: Config,
        folder: NodeFolder,
        events: mpsc::Sender<PodEvent>,
        rest: CancellationToken,
    ) -> Result<(Self, CaptureHandle, Reports, watch::Receiver<Status>), CaptureError> {
        let mut pins = Pins::new(&config.bpffs, &config.node);
        let lock = pins.make()?;
        let predecessors = pins.programs();
        attached::refuse_on_cgroup(&config.cgroup, &pins, &predecessors)?;
        let records = folder.records()?;
        pins.refuse_unrecorded(&records)?;
        let takeover = Takeover::begin(&pins)?;
        let mut loader = Loader::taking_over(&takeover);
        let mut node = loader.node()?;
        takeover.copy()?;
        let mut maps = NodeMaps::take(&mut node)?;
        maps.set_node(Node {
            hosts: config.hosts,
            ..Node::default()
        })?;
        let reports = Reports {
            events: super::maps::events(&mut node)?,
            log: aya_log::EbpfLogger::init(&mut node).ok(),
        };
        takeover.replace_pod_programs(&mut loader, &pins, &maps)?;
        let mut links = Links::new();
        programs::restore(&mut node, &config.cgroup, &pins, &mut links)?.whole?;
        // If two agents checked at the same time, at least one of them sees the other now.
        attached::refuse_on_cgroup(&config.cgroup, &pins, &predecessors)?;
        takeover.finish(&mut pins)?;
        // Entries without a record are leftovers of an enrolment that was not finished; nothing uses them. A
        // record that cannot be read still protects its pod's entries.
        let recorded = records.cookies()?;
        for cookie in maps.enrolled() {
            if !recorded.contains(&cookie) {
                maps.forget(cookie)?;
            }
        }
        pins.sweep(|cookie| recorded.contains(&cookie))?;
        let pods = unserved_pods(readable_records(&records)?);
        let unread = recorded
            .into_iter()
            .filter(|cookie| !pods.contains_key(cookie));
        let unread = unread.collect();
        let handle = CaptureHandle {
            maps: Arc::new(Mutex::new(maps)),
            repairs: Arc::default(),
        };
        let (status, status_reader) = watch::channel(Status::new());
        let reconciler = Self {
            config,
            records,
            loader: Loader::new(&pins),
            handle: handle.clone(),
            pods,
            failed: BTreeMap::new(),
            unread,
            snapshot_sent: false,
            undo_retry: None,
            events,
            status,
            stamp: Arc::new(super::maps::stamp(&mut node)?),
            schedule: LookSchedule::staggered(0),
            rest,
            pinned: PinnedMaps::open(&pins)?,
            node,
            links,
            pins,
            pins_lock: lock,
            _folder: folder,
        };
        // A reader that comes before the first step learns which pods a predecessor has captured.
        reconciler.publish_status();
        Ok((reconciler, handle, reports, status_reader))
    }

    /// Returns the map by which the agent's own sockets in pods are known.
    pub fn stamp(&self) -> Arc<Stamp> {
        Arc::clone(&self.stamp)
    }

    /// Does what control wants until control is gone or capture is to rest; pods stay captured then. It rests
    /// between two steps, reports that on `rests`, and keeps all that it holds: in the middle of an enrolment
    /// there would be listeners from which nobody accepts.
    ///
    /// # Errors
    /// The receiver of pod events is gone.
    pub async fn run(
        mut self,
        mut wanted: watch::Receiver<Option<Wanted>>,
        rests: oneshot::Sender<()>,
    ) -> Result<(), CaptureError> {
        loop {
            if self.rest.is_cancelled() {
                let _ = rests.send(());
                return std::future::pending().await;
            }
            // Nothing is done before control has sent its first wishes.
            let want = wanted.borrow_and_update().clone();
            if let Some(want) = &want {
                while self.reconcile(want).await? {}
            }
            self.publish_status();
            let next = self.next_due();
            tokio::select! {
                changed = wanted.changed() => if changed.is_err() { return Ok(()) },
                () = sleep_until_any(next) => {}
                () = idle_or_changed(&mut self.pods) => {}
                () = self.rest.cancelled() => continue,
            }
            self.advance_leaving().await?;
            self.look().await?;
        }
    }

    /// Takes each pod one step further. Returns `true` if that made another step possible.
    async fn reconcile(&mut self, wanted: &Wanted) -> Result<bool, CaptureError> {
        let now = Instant::now();
        self.undo_retry = None;
        self.failed
            .retain(|cookie, _| wanted.pods.iter().any(|pod| pod.cookie == *cookie));
        let want = Want {
            pods: wanted
                .pods
                .iter()
                .map(|pod| (pod.cookie, pod.uid.clone()))
                .collect(),
            unlocated: wanted.unlocated.clone(),
            gone: wanted.gone.clone(),
        };
        let by_cookie: BTreeMap<u64, &Desired> =
            wanted.pods.iter().map(|pod| (pod.cookie, pod)).collect();
        let have = self
            .pods
            .iter()
            .map(|(cookie, pod)| {
                let served = pod.phase.served();
                let has = Has {
                    uid: pod.uid.clone(),
                    phase: pod.phase.phase(),
                    captured: self.counts_as_captured(*cookie, &pod.phase),
                    unchanged: by_cookie.get(cookie).is_none_or(|want| match served {
                        Some(is) => is.desired.same_identity_and_addresses(want),
                        None => !pod.record.is_other(want),
                    }),
                    cleared: pod.cleared,
                };
                (*cookie, has)
            })
            .collect();
        // The status does not show yet what is enrolled here.
        let (mut more, mut published) = (false, None::<Instant>);
        self.capture_unserved(&want, &have);
        self.update_cgroups(&by_cookie);
        for step in diff(&want, &have) {
            if self.rest.is_cancelled() {
                return Ok(false);
            }
            match step {
                Step::Enrol(cookie) => {
                    if self
                        .failed
                        .get(&cookie)
                        .is_some_and(|failed| failed.retry_at > now)
                    {
                        continue;
                    }
                    if let Some(desired) = by_cookie.get(&cookie) {
                        self.enrol((*desired).clone()).await?;
                    }
                    // Until the status is published other nodes dial the pod in clear, which STRICT refuses.
                    if published.is_none_or(|at| at.elapsed() >= STATUS_INTERVAL) {
                        self.publish_status();
                        published = Some(Instant::now());
                    }
                }
                Step::Revive(cookie) => {
                    if let Some(desired) = by_cookie.get(&cookie) {
                        self.revive((*desired).clone()).await?;
                    }
                    let pod = self.pods.get(&cookie);
                    more |= pod.is_some_and(|pod| matches!(pod.phase, PodPhase::Unserved));
                }
                Step::StopServing(cookie) => self.stop_serving(cookie).await?,
                Step::Leave(cookie) => self.leave(cookie),
                Step::ForceRemove(cookie) => {
                    self.stop_capture(cookie);
                    self.cut_connections(cookie).await?;
                }
                Step::Undo(cookie) => {
                    self.stop_capture(cookie);
                    if self.pods.get(&cookie).is_some_and(|pod| !pod.cleared) {
                        self.cut_connections(cookie).await?;
                        continue;
                    }
                    self.undo(cookie).await;
                    more |= !self.pods.contains_key(&cookie);
                }
            }
        }
        if !more {
            self.send_snapshot(&want, &by_cookie).await?;
        }
        Ok(more)
    }

    /// Tells the proxy, once, that every pod that was captured when this process began has been leased or is let go.
    /// Pods that are not found yet, that no manifest says yet, or that could not be enrolled so far are not decided:
    /// the proxy goes on to serve them from before. But for those that are known to be another now. Pods that are let
    /// go without having been leased are to drain, and so are not decided for the proxy either.
    async fn send_snapshot(
        &mut self,
        want: &Want,
        by_cookie: &BTreeMap<u64, &Desired>,
    ) -> Result<(), CaptureError> {
        if self.snapshot_sent {
            return Ok(());
        }
        self.snapshot_sent = true;
        let waits = self.pods.iter().filter(|(cookie, pod)| {
            let unserved = match &pod.phase {
                PodPhase::Unserved => true,
                PodPhase::Lingering { served, .. } | PodPhase::Draining { served, .. } => {
                    return served.is_none();
                }
                PodPhase::Serving(_) | PodPhase::Cutting { .. } => false,
            };
            let is_other = by_cookie
                .get(cookie)
                .is_some_and(|want| pod.record.is_other(want));
            let captured = self.counts_as_captured(**cookie, &pod.phase);
            unserved && !is_other && want.keeps_captured(**cookie, &pod.uid, captured)
        });
        let waits = waits.map(|(cookie, _)| *cookie);
        let unread = self.unread.iter().copied();
        let unread =
            unread.filter(|cookie| !self.pods.contains_key(cookie) && !want.gone.contains(cookie));
        let undecided = waits.chain(unread).collect();
        self.send(PodEvent::Snapshot(undecided)).await
    }

    /// Captures pods that are to be served and that nobody serves yet. An undo record does not prove that a
    /// pod is captured: its predecessor may have ended before the last step of enrolment, or while the pod
    /// was leaving.
    fn capture_unserved(&mut self, want: &Want, have: &BTreeMap<u64, Has>) {
        for (cookie, pod) in &mut self.pods {
            if !matches!(pod.phase, PodPhase::Unserved) {
                continue;
            }
            let captured = have.get(cookie).is_some_and(|has| has.captured);
            if !want.keeps_captured(*cookie, &pod.uid, captured) {
                pod.held = None;
                continue;
            }
            pod.held.get_or_insert_default();
            if let Err(error) = self.handle.maps().capture(*cookie, None) {
                tracing::error!(pod = %named(&pod.uid), %error, "pod is not captured");
            }
        }
    }

    /// Returns `true` if a pod is captured as far as its next step is concerned: it is served, or the kernel
    /// captures what it begins.
    fn counts_as_captured(&self, cookie: u64, phase: &PodPhase) -> bool {
        match phase {
            PodPhase::Serving(_) => true,
            PodPhase::Lingering { .. } | PodPhase::Draining { .. } => false,
            PodPhase::Unserved | PodPhase::Cutting { .. } => {
                self.handle.maps().captures(cookie).unwrap_or(true)
            }
        }
    }

    /// Adds cgroups that pods have got since, and removes those that are gone. Connections are not touched.
    fn update_cgroups(&mut self, wanted: &BTreeMap<u64, &Desired>) {
        for (cookie, pod) in &mut self.pods {
            if let (PodPhase::Serving(served), Some(want)) = (&mut pod.phase, wanted.get(cookie))
                && served.desired.same_identity_and_addresses(want)
                && served.desired.groups != want.groups
            {
                match self.handle.maps().set_cgroups(*cookie, &want.groups) {
                    Ok(()) => served.desired.groups.clone_from(&want.groups),
                    Err(error) => {
                        tracing::warn!(pod = %named(&pod.uid), %error, "the pod's cgroups are not all known to the kernel");
                    }
                }
            }
        }
    }

    /// Stops serving a pod that is to be served as something else, such as with another identity. It becomes
    /// unserved, and is enrolled anew.
    async fn stop_serving(&mut self, cookie: u64) -> Result<(), CaptureError> {
        let Some(pod) = self.pods.get_mut(&cookie) else {
            return Ok(());
        };
        tracing::info!(
            pod = %named(&pod.uid),
            "pod is another than it was; its connections are cut"
        );
        self.cut_connections(cookie).await
    }

    async fn enrol(&mut self, desired: Desired) -> Result<(), CaptureError> {
        let cookie = desired.cookie;
        self.look_at_node();
        let prepared = match self.pin_held(&desired) {
            Ok(()) => {
                let (loader, records) = (&mut self.loader, &self.records);
                enrol::prepare(&desired, loader, records, &self.pins, &self.handle).await
            }
            Err(error) => Err(error),
        };
        let prepared = prepared.and_then(|prepared| {
            let watched = watch_pod(&desired, &prepared)?;
            let record = self.enable_capture(&desired, &prepared.addresses)?;
            Ok((prepared, watched, record))
        });
        match prepared {
            Ok((prepared, (listeners, changes), record)) => {
                let instance = Instance::next();
                tracing::info!(
                    pod = %format_args!("{}/{}", desired.namespace, desired.name),
                    netns = cookie,
                    addresses = ?prepared.addresses,
                    "pod enrolled"
                );
                self.failed.remove(&cookie);
                let lease = Lease {
                    instance,
                    uid: desired.uid.clone(),
                    namespace: desired.namespace.clone(),
                    name: desired.name.clone(),
                    identity: desired.identity.clone(),
                    addresses: Arc::clone(&prepared.addresses),
                    netns: desired.netns.clone(),
                    cookie,
                    listeners: prepared.listeners,
                    stamp: Arc::clone(&self.stamp),
                };
                let pod = Pod {
                    record,
                    uid: desired.uid.clone(),
                    netns: Some(desired.netns.clone()),
                    phase: PodPhase::Serving(Box::new(ServedPod {
                        desired,
                        instance,
                        addresses: Arc::clone(&prepared.addresses),
                        program: prepared.program,
                        interfaces: prepared.interfaces,
                        addresses_sent: true,
                        forwards: false,
                        routing: prepared.routing,
                        listeners,
                        changes,
                        schedule: LookSchedule::staggered(cookie),
                    })),
                    held: None,
                    cleared: false,
                };
                self.pods.insert(cookie, pod);
                self.send(PodEvent::Up(Box::new(lease))).await
            }
            Err(error) => {
                let before = self.failed.remove(&cookie);
                let why = error.to_string();
                if before.as_ref().is_none_or(|before| before.why != why) {
                    tracing::warn!(
                        pod = %format_args!("{}/{}", desired.namespace, desired.name),
                        error = %why,
                        "pod cannot be enrolled; it is tried again"
                    );
                }
                // A predecessor's capture stays (see `capture_unserved`): a pod that cannot be served must
                // not pass in clear.
                let adopted = self.pods.contains_key(&cookie);
                if !adopted && let Ok(Some(record)) = self.records.read(cookie) {
                    self.stop_capture(cookie);
                    if let Err(error) = self.put_back(&record, Some(&desired.netns)).await {
                        tracing::warn!(%error, "what was begun cannot be undone; it is tried again");
                        // It becomes unserved, like a pod that a predecessor enrolled only in part.
                        let half = Pod {
                            uid: record.uid.clone(),
                            netns: Some(desired.netns.clone()),
                            phase: PodPhase::Unserved,
                            held: None,
                            cleared: true,
                            record,
                        };
                        self.pods.insert(cookie, half);
                    }
                }
                let wait = wait_after(before.map(|before| before.wait));
                self.failed.insert(
                    cookie,
                    Failure {
                        desired,
                        why,
                        wait,
                        retry_at: Instant::now() + wait,
                    },
                );
                Ok(())
            }
        }
    }

    /// Pins the program of a held pod again if its pin was lost. So the only program that steers in a pod
    /// while it is enrolled is the pinned one, which stays until the new one serves.
    fn pin_held(&self, desired: &Desired) -> Result<(), CaptureError> {
        let pod = self.pods.get(&desired.cookie);
        let held = pod.and_then(|pod| pod.held.as_ref());
        let pin = self.pins.pod(desired.cookie);
        held.map_or(Ok(()), |held| held.pin(&desired.netns, &pin))
    }

    /// The last step of enrolment: captures the pod's connections from here on.
    fn enable_capture(
        &self,
        desired: &Desired,
        addresses: &[IpAddr],
    ) -> Result<UndoRecord, CaptureError> {
        let record = self.records.read(desired.cookie)?;
        let mut record = record.ok_or_else(|| CaptureError::Namespace {
            what: "find the record of what was changed",
            why: "it is gone from the run folder".into(),
        })?;
        let identity = Some(desired.identity_text());
        if record.identity != identity {
            record.identity = identity;
            self.records.write(&record)?;
        }
        let first = addresses.first().copied();
        let mut maps = self.handle.maps();
        maps.enrol(desired.cookie, first, &desired.groups)?;
        Ok(record)
    }

    async fn send(&self, event: PodEvent) -> Result<(), CaptureError> {
        self.events
            .send(event)
            .await
            .map_err(|_| CaptureError::Stopping)
    }

    fn publish_status(&self) {
        let mut status = Status::new();
        for (&cookie, pod) in &self.pods {
            let schedule = pod.phase.served().map(|of| &of.schedule);
            let schedule = schedule.or(pod.held.as_ref().map(|held| &held.schedule));
            let broken = schedule.and_then(|schedule| schedule.broken.clone());
            let lost = broken.clone();
            let broken = broken.or_else(|| self.schedule.broken.clone());
            let state = match (pod.phase.phase(), self.failed.get(&cookie)) {
                (Phase::Serving, _) => match broken {
                    Some(why) => PodState::Broken { why },
                    None => PodState::Up,
                },
                (Phase::Draining, _) => PodState::Draining,
                (Phase::Cutting, _) => match self.captures(cookie) {
                    true => PodState::Unserved { captured: true },
                    false => PodState::Draining,
                },
                (Phase::Unserved, failed) => {
                    let captured = self.captures(cookie);
                    match failed.map(|failed| failed.why.clone()).or(lost) {
                        None => PodState::Unserved { captured },
                        Some(why) => PodState::Failed { why, captured },
                    }
                }
            };
            let is = PodStatus {
                uid: pod.uid.clone(),
                inode: pod.record.inode,
                cgroup: pod.record.cgroup,
                enrolled: pod.record.enrolled,
                state,
                forwards: pod.phase.served().is_some_and(|served| served.forwards),
            };
            status.insert(cookie, is);
        }
        for (&cookie, failed) in &self.failed {
            status.entry(cookie).or_insert_with(|| PodStatus {
                uid: failed.desired.uid.clone(),
                inode: failed.desired.netns.inode(),
                cgroup: failed.desired.groups.first().map_or(0, |group| group.id),
                enrolled: 0,
                state: PodState::Failed {
                    why: failed.why.clone(),
                    captured: self.captures(cookie),
                },
                forwards: false,
            });
        }
        self.status.send_if_modified(|old| {
            let changed = *old != status;
            *old = status;
            changed
        });
    }

    /// Returns `true` if the kernel captures both what the pod sends and what comes to it, whatever was intended.
    fn captures(&self, cookie: u64) -> bool {
        let netns = self.pods.get(&cookie).and_then(|pod| pod.netns.as_ref());
        // A pod whose record cannot be read is known only by its failed enrolment.
        let failed = self.failed.get(&cookie);
        let netns = netns.or(failed.map(|failed| &failed.desired.netns));
        let steers = netns.is_some_and(|netns| {
            let pinned = self.pins.programs_of(cookie).into_iter();
            let mut own = pinned.chain(self.pods.get(&cookie).and_then(Pod::program));
            own.any(|program| programs::is_attached(netns, Some(program)).unwrap_or(false))
        });
        steers && self.handle.maps().captures(cookie).unwrap_or(false)
    }

    /// Returns the time of the next thing to do without an event.
    fn next_due(&self) -> Option<Instant> {
        let leaving = self.pods.values().filter_map(|pod| match &pod.phase {
            PodPhase::Lingering { until, .. } | PodPhase::Draining { until, .. } => Some(*until),
            PodPhase::Cutting { until, .. } => *until,
            PodPhase::Unserved | PodPhase::Serving(_) => None,
        });
        let failed = self.failed.values().map(|failed| failed.retry_at);
        let schedule = self
            .pods
            .values()
            .filter_map(Pod::schedule)
            .map(LookSchedule::next);
        let schedule = schedule.chain([self.schedule.next()]);
        leaving
            .chain(failed)
            .chain(schedule)
            .chain(self.undo_retry)
            .min()
    }
}

/// Returns how long a failed enrolment waits for its next attempt; `before` is the previous wait.
fn wait_after(before: Option<Duration>) -> Duration {
    before.map_or(FIRST_RETRY, |before| RETRY.min(before * 2))
}

/// Completes when a draining pod is idle, or when the namespace of a served pod changes.
async fn idle_or_changed(pods: &mut BTreeMap<u64, Pod>) {
    std::future::poll_fn(|context| {
        let idle = leave::idle(pods, context).is_ready();
        if idle || look::changed(pods, context).is_ready() {
            return Poll::Ready(());
        }
        Poll::Pending
    })
    .await;
}

/// Returns what shows whether a pod's listeners are alive, and whether its namespace changes.
fn watch_pod(
    desired: &Desired,
    prepared: &PreparedPod,
) -> Result<(Listeners, Changes), CaptureError> {
    let listeners = prepared.listeners.share();
    let both = listeners.and_then(|listeners| Ok((listeners, Changes::of(&desired.netns)?)));
    both.map_err(|error| CaptureError::Namespace {
        what: "watch what is changed",
        why: error.to_string(),
    })
}

async fn sleep_until_any(when: Option<Instant>) {
    match when {
        Some(when) => sleep_until(when).await,
        None => std::future::pending().await,
    }
}

/// Returns the records that can be read; logs the others.
fn readable_records(records: &UndoRecords) -> Result<Vec<UndoRecord>, CaptureError> {
    let each = records.read_all()?.into_iter();
    Ok(each
        .filter_map(|(_, record)| {
            let told = |error: &CaptureError| {
                tracing::error!(%error, "record of a pod cannot be read; until it can the pod is not served, and stays as it is");
            };
            record.inspect_err(told).ok()
        })
        .collect())
}

/// Returns the pods of these records, with the namespaces that still exist.
fn unserved_pods(records: Vec<UndoRecord>) -> BTreeMap<u64, Pod> {
    let mut found = undo::find_namespaces(&records);
    let adopted = records.into_iter().map(|record| {
        let netns = match found.remove(&record.cookie) {
            Some(Ok(netns)) => netns,
            Some(Err(error)) => {
                tracing::warn!(pod = %named(&record.uid), %error, "the pod's network namespace is looked for again later");
                None
            }
            None => None,
        };
        let pod = Pod {
            uid: record.uid.clone(),
            netns,
            phase: PodPhase::Unserved,
            held: None,
            cleared: false,
            record,
        };
        (pod.record.cookie, pod)
    });
    adopted.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_enrolment_that_fails_is_tried_again_soon_and_then_less_often() {
        let next = |before: &Duration| Some(wait_after(Some(*before)));
        let waits = std::iter::successors(Some(wait_after(None)), next);
        let waits: Vec<u128> = waits.take(7).map(|wait| wait.as_millis()).collect();
        assert_eq!(waits, [250, 500, 1000, 2000, 4000, 5000, 5000]);
    }
}

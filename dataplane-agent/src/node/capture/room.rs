//! The room itself: hears what control wants, takes the steps, and tells how far each pod is.

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
use crate::sys::netns::{Changes, Interfaces, Netns};

/// How long listeners stay after their pod has left: handshakes that had begun end in them.
const LINGER: Duration = Duration::from_secs(1);
/// How long until a step that failed is tried again.
const RETRY: Duration = Duration::from_secs(5);
/// How long until an enrolment that failed is: twice as long each time that it fails again, up to the above.
const FIRST_RETRY: Duration = Duration::from_millis(250);
/// How often control is told while many pods are enrolled one after the other: it looks at all of them.
const STATUS_INTERVAL: Duration = Duration::from_millis(100);

/// Where the room works.
#[derive(Clone, Debug)]
pub struct Config {
    /// The cgroup that holds the pods.
    pub cgroup: PathBuf,
    /// Cookies of the host's network namespaces; 0 is none.
    pub hosts: [u64; 2],
    /// A mounted bpffs.
    pub bpffs: PathBuf,
    /// The node's name.
    pub node: NodeName,
    /// How long a pod that leaves may go on with what runs.
    pub drain: Duration,
}

/// Hands on the running room, for whoever watches it.
#[derive(Clone)]
pub struct CaptureHandle {
    maps: Arc<Mutex<NodeMaps>>,
    repairs: Arc<Repairs>,
}

impl CaptureHandle {
    /// What the programs counted.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        self.maps().counters()
    }

    /// How often each part of capture was gone and was put back.
    pub fn repairs(&self) -> Vec<(&'static str, u64)> {
        self.repairs.all()
    }

    /// Turns the programs' logging on or off.
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

/// The room.
pub struct Reconciler {
    config: Config,
    pins: Pins,
    records: UndoRecords,
    loader: Loader,
    handle: CaptureHandle,
    pods: BTreeMap<u64, Pod>,
    failed: BTreeMap<u64, Failure>,
    /// When what could not be undone is tried again.
    undo_retry: Option<Instant>,
    events: mpsc::Sender<PodEvent>,
    status: watch::Sender<Status>,
    /// What is lent with each pod.
    stamp: Arc<Stamp>,
    /// When the node's programs are looked at.
    schedule: LookSchedule,
    /// Whether it is to rest.
    rest: CancellationToken,
    /// Programs, maps and locks of the node, which go with the room. What is pinned stays.
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
    /// Held since the pod was found: the way back does not depend on finding it again. None if it was
    /// not there at the start.
    netns: Option<Netns>,
    phase: PodPhase,
    /// What keeps it captured, if nobody serves it and it is to be captured all the same.
    held: Option<HeldPod>,
}

enum PodPhase {
    Unserved,
    Serving(Box<ServedPod>),
    /// Its listeners linger until then; then the corridor is told.
    Lingering(Box<ServedPod>, Instant),
    Draining {
        served: Box<ServedPod>,
        idle: oneshot::Receiver<()>,
        until: Instant,
    },
}

/// What the corridor serves.
struct ServedPod {
    desired: Desired,
    instance: Instance,
    /// Its own addresses, as the corridor knows them.
    addresses: Arc<[IpAddr]>,
    program: PodProgram,
    /// What it had on its interfaces as it was looked at last.
    interfaces: Interfaces,
    /// Whether its own addresses are those of these interfaces.
    addresses_sent: bool,
    /// Whether it forwards between them.
    forwards: bool,
    /// What was put in place for them.
    routing: Routing,
    /// The corridor's listeners, to see whether they are alive.
    listeners: Listeners,
    changes: Changes,
    schedule: LookSchedule,
}

impl Pod {
    /// Takes it from who serves it, if somebody does: who that was. It is held from then on.
    fn take_back(&mut self) -> Option<Instance> {
        let served = match std::mem::replace(&mut self.phase, PodPhase::Unserved) {
            PodPhase::Unserved => return None,
            PodPhase::Serving(served)
            | PodPhase::Lingering(served, _)
            | PodPhase::Draining { served, .. } => served,
        };
        self.held = Some(HeldPod::with_program(served.program));
        Some(served.instance)
    }

    /// The id of what steers in it, pinned or not, as far as this agent has it.
    fn program(&self) -> Option<u32> {
        let served = self.phase.served().and_then(|served| served.program.id());
        served.or(self.held.as_ref().and_then(HeldPod::program))
    }

    /// When it is looked at.
    fn schedule(&self) -> Option<&LookSchedule> {
        let served = self.phase.served().map(|served| &served.schedule);
        served.or(self.held.as_ref().map(|held| &held.schedule))
    }
}

impl ServedPod {
    /// It has these addresses now, and the corridor is told if they are others.
    ///
    /// # Errors
    /// The rooms behind this one are gone.
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
    /// What the corridor has of it.
    fn served(&self) -> Option<&ServedPod> {
        match self {
            Self::Unserved => None,
            Self::Serving(served) | Self::Lingering(served, _) | Self::Draining { served, .. } => {
                Some(served)
            }
        }
    }

    fn served_mut(&mut self) -> Option<&mut ServedPod> {
        match self {
            Self::Unserved => None,
            Self::Serving(served) | Self::Lingering(served, _) | Self::Draining { served, .. } => {
                Some(served)
            }
        }
    }

    fn phase(&self) -> Phase {
        match self {
            Self::Unserved => Phase::Unserved,
            Self::Serving(_) => Phase::Serving,
            Self::Lingering(..) | Self::Draining { .. } => Phase::Draining,
        }
    }
}

/// What the room is left with after the node's programs were loaded: for `observe`.
pub struct Reports {
    /// The ring buffer of reports.
    pub events: aya::maps::RingBuf<aya::maps::MapData>,
    /// The programs' log; none if this kernel has none.
    pub log: Option<aya_log::EbpfLogger<&'static dyn log::Log>>,
}

/// Refuses where [`Reconciler::open`] would, before anything is made.
///
/// # Errors
/// Another agent runs, or its programs are attached; another user has made the pins, or what is pinned
/// cannot be taken over; how to undo it is recorded elsewhere.
pub fn refuse(config: &Config, folder: &NodeFolder) -> Result<(), CaptureError> {
    let mut pins = Pins::new(&config.bpffs, &config.node);
    let _lock = pins.lock()?;
    pins.refuse()?;
    attached::refuse_on_cgroup(&config.cgroup, &pins, &BTreeSet::new())?;
    pins.refuse_unrecorded(&folder.records()?)?;
    takeover::refuse(&pins)
}

impl Reconciler {
    /// Loads and attaches the node's programs, and takes over what a predecessor left. No pod is
    /// let go, and none is served yet.
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
        // Of two that looked at once, one at least sees the other now.
        attached::refuse_on_cgroup(&config.cgroup, &pins, &predecessors)?;
        takeover.finish(&mut pins)?;
        // What has no record was pinned by nobody who finished; nothing of it is in use. One that cannot be
        // read is of a pod that stays as it is.
        let recorded = records.cookies()?;
        for cookie in maps.enrolled() {
            if !recorded.contains(&cookie) {
                maps.forget(cookie)?;
            }
        }
        pins.sweep(|cookie| recorded.contains(&cookie))?;
        let pods = unserved_pods(readable_records(&records)?);
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
        // Whoever asks before the first step knows of what a predecessor has captured.
        reconciler.publish_status();
        Ok((reconciler, handle, reports, status_reader))
    }

    /// What the agent's own sockets in pods are known by.
    pub fn stamp(&self) -> Arc<Stamp> {
        Arc::clone(&self.stamp)
    }

    /// Does what control wants until control is gone, or it is to rest: pods stay captured then. It rests
    /// between two steps, tells so, and keeps what it has: of a pod that is half in the listeners would be
    /// there, and nobody would accept from them.
    ///
    /// # Errors
    /// The rooms behind this one are gone.
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
            // Nothing is done before control has said its first word.
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

    /// Takes each pod one step further; whether that made room for another step.
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
                    unchanged: by_cookie.get(cookie).is_none_or(|want| {
                        served.is_some_and(|is| is.desired.same_identity_and_addresses(want))
                    }),
                };
                (*cookie, has)
            })
            .collect();
        // Nothing yet of what is enrolled here.
        let (mut more, mut published) = (false, None::<Instant>);
        self.capture_unserved(&want);
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
                    // Other nodes dial it in clear until then, and STRICT refuses that.
                    if published.is_none_or(|at| at.elapsed() >= STATUS_INTERVAL) {
                        self.publish_status();
                        published = Some(Instant::now());
                    }
                }
                Step::Revive(cookie) => {
                    if let Some(desired) = by_cookie.get(&cookie) {
                        self.revive((*desired).clone()).await?;
                    }
                }
                Step::StopServing(cookie) => {
                    self.stop_serving(cookie).await?;
                    more = true;
                }
                Step::Leave(cookie) => self.leave(cookie),
                Step::ForceRemove(cookie) => {
                    self.stop_capture(cookie);
                    self.cut_and_undo(cookie).await?;
                    more |= !self.pods.contains_key(&cookie);
                }
                Step::Undo(cookie) => {
                    self.stop_capture(cookie);
                    self.undo(cookie).await;
                    more |= !self.pods.contains_key(&cookie);
                }
            }
        }
        Ok(more)
    }

    /// Captures what is on its way to be served and is served by nobody yet. That there is a record of it
    /// does not say that: its predecessor may have ended before the last step in, or while the pod left.
    fn capture_unserved(&mut self, want: &Want) {
        for (cookie, pod) in &mut self.pods {
            let adopted = matches!(pod.phase, PodPhase::Unserved);
            if !adopted || !want.keeps_captured(*cookie, &pod.uid) {
                pod.held = None;
                continue;
            }
            pod.held.get_or_insert_default();
            if let Err(error) = self.handle.maps().capture(*cookie, None) {
                tracing::error!(pod = %named(&pod.uid), %error, "pod is not captured");
            }
        }
    }

    /// Adds the cgroups that pods have had since, and takes away those that are gone: what runs is not
    /// touched.
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

    /// Takes back from the workers a pod of which control now says something else, such as another
    /// identity. It is then as one that a predecessor left, and is enrolled anew.
    async fn stop_serving(&mut self, cookie: u64) -> Result<(), CaptureError> {
        let Some(pod) = self.pods.get_mut(&cookie) else {
            return Ok(());
        };
        if let Some(instance) = pod.take_back() {
            tracing::info!(
                pod = %named(&pod.uid),
                "pod is another than it was; its connections are cut"
            );
            self.cut_connections(instance).await?;
        }
        Ok(())
    }

    /// Has the workers cut what runs of an enrolment, and waits until they have.
    async fn cut_connections(&self, instance: Instance) -> Result<(), CaptureError> {
        let (told, done) = oneshot::channel();
        self.send(PodEvent::Down(instance, told)).await?;
        let _ = done.await;
        Ok(())
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
                // A predecessor's capture stays (see `capture_unserved`): what cannot be served must not pass in clear.
                let adopted = self.pods.contains_key(&cookie);
                if !adopted && let Ok(Some(record)) = self.records.read(cookie) {
                    self.stop_capture(cookie);
                    if let Err(error) = self.put_back(&record, Some(&desired.netns)).await {
                        tracing::warn!(%error, "what was begun cannot be undone; it is tried again");
                        // As one that a predecessor left half in.
                        let half = Pod {
                            uid: record.uid.clone(),
                            netns: Some(desired.netns.clone()),
                            phase: PodPhase::Unserved,
                            held: None,
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

    /// What steers in a pod that is to be enrolled is what is pinned, and nothing else: a held one's program
    /// is pinned first, which may have lost its pin, and kept until another one serves.
    fn pin_held(&self, desired: &Desired) -> Result<(), CaptureError> {
        let pod = self.pods.get(&desired.cookie);
        let held = pod.and_then(|pod| pod.held.as_ref());
        let pin = self.pins.pod(desired.cookie);
        held.map_or(Ok(()), |held| held.pin(&desired.netns, &pin))
    }

    /// The last step in: from here on the pod's own connections are captured.
    fn enable_capture(
        &self,
        desired: &Desired,
        addresses: &[IpAddr],
    ) -> Result<UndoRecord, CaptureError> {
        let record = self.records.read(desired.cookie)?;
        let record = record.ok_or_else(|| CaptureError::Namespace {
            what: "find the record of what was changed",
            why: "it is gone from the run folder".into(),
        })?;
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

    /// Whether the kernel captures it, whatever was meant: what it sends, and what comes to it.
    fn captures(&self, cookie: u64) -> bool {
        let netns = self.pods.get(&cookie).and_then(|pod| pod.netns.as_ref());
        // Of one whose record cannot be read nothing else is known here.
        let failed = self.failed.get(&cookie);
        let netns = netns.or(failed.map(|failed| &failed.desired.netns));
        let steers = netns.is_some_and(|netns| {
            let pinned = self.pins.programs_of(cookie).into_iter();
            let mut own = pinned.chain(self.pods.get(&cookie).and_then(Pod::program));
            own.any(|program| programs::is_attached(netns, Some(program)).unwrap_or(false))
        });
        steers && self.handle.maps().captures(cookie).unwrap_or(false)
    }

    /// When there is something to do by itself.
    fn next_due(&self) -> Option<Instant> {
        let leaving = self.pods.values().filter_map(|pod| match &pod.phase {
            PodPhase::Lingering(_, until) | PodPhase::Draining { until, .. } => Some(*until),
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

/// How long an enrolment that failed waits for its next trial, if it has waited so long for this one.
fn wait_after(before: Option<Duration>) -> Duration {
    before.map_or(FIRST_RETRY, |before| RETRY.min(before * 2))
}

/// Completes when a pod that drains is idle, or the namespace of one that is served changes.
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

/// What shows whether a pod's listeners are alive, and whether something changes in its namespace.
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

/// The records that can be read.
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

/// What a predecessor captured, with the namespaces that are still there.
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

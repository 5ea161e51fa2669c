//! The room itself: hears what control wants, takes the steps, and tells how far each pod is.

mod leave;

use std::collections::BTreeMap;
use std::fs::File;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use aya::Ebpf;
use dataplane_ebpf::pod::Node;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep_until};

use super::maps::NodeMaps;
use super::node_folder::NodeFolder;
use super::pins::Pins;
use super::programs::{self, Loader, PodProgram};
use super::reconcile::{Phase, Step, Want, diff};
use super::undo::{Record, Records};
use super::wanted::{Desired, PodState, Status, Wanted};
use super::{CaptureError, Instance, LocalPod, PodEvent, attached, enrol, named};
use crate::config::NodeName;

/// How long listeners stay after their pod has left: handshakes that had begun end in them.
const LINGER: Duration = Duration::from_secs(1);
/// How long until a step that failed is tried again.
const RETRY: Duration = Duration::from_secs(5);

/// Where the room works.
#[derive(Clone, Debug)]
pub struct Config {
    /// The cgroup that holds the pods.
    pub cgroup: PathBuf,
    /// What is the agent's own and the host's.
    pub own: Node,
    /// A mounted bpffs.
    pub bpffs: PathBuf,
    /// The node's name.
    pub node: NodeName,
    /// How long a pod that leaves may go on with what runs.
    pub drain: Duration,
}

/// Hands on the running room, for whoever watches it.
#[derive(Clone)]
pub struct Window(Arc<Mutex<NodeMaps>>);

impl Window {
    /// What the programs counted.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        self.maps().counters()
    }

    /// Turns the programs' logging on or off.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn set_log(&self, on: bool) -> Result<(), CaptureError> {
        self.maps().set_log(on)
    }

    pub(super) fn maps(&self) -> std::sync::MutexGuard<'_, NodeMaps> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The room.
pub struct Room {
    config: Config,
    pins: Pins,
    records: Records,
    loader: Loader,
    window: Window,
    pods: BTreeMap<u64, Pod>,
    failed: BTreeMap<u64, Failure>,
    /// When what could not be undone is tried again.
    again: Option<Instant>,
    events: mpsc::Sender<PodEvent>,
    status: watch::Sender<Status>,
    /// Programs and locks of the node, which go with the room. What is pinned stays.
    _held: (Ebpf, NodeFolder, File),
}

struct Failure {
    uid: Arc<str>,
    why: String,
    again: Instant,
}

struct Pod {
    record: Record,
    uid: Arc<str>,
    phase: InPhase,
}

enum InPhase {
    Adopted,
    Serving(Box<Served>),
    /// Its listeners linger until then; then the corridor is told.
    Lingering(Box<Served>, Instant),
    Draining {
        served: Box<Served>,
        idle: oneshot::Receiver<()>,
        until: Instant,
    },
}

/// What the corridor serves.
struct Served {
    desired: Desired,
    local: Arc<LocalPod>,
    program: PodProgram,
}

impl InPhase {
    /// What the corridor has of it.
    fn instance(&self) -> Option<Instance> {
        match self {
            Self::Adopted => None,
            Self::Serving(served) | Self::Lingering(served, _) | Self::Draining { served, .. } => {
                Some(served.local.instance)
            }
        }
    }

    fn phase(&self) -> Phase {
        match self {
            Self::Adopted => Phase::Adopted,
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

impl Room {
    /// Loads and attaches the node's programs, and takes over what a predecessor left. No pod is
    /// let go, and none is served yet.
    ///
    /// # Errors
    /// Another agent runs, or its programs are attached; the kernel refuses.
    pub fn open(
        config: Config,
        folder: NodeFolder,
        events: mpsc::Sender<PodEvent>,
    ) -> Result<(Self, Window, Reports, watch::Receiver<Status>), CaptureError> {
        let pins = Pins::new(&config.bpffs, &config.node);
        let lock = pins.make()?;
        let predecessors = pins.programs();
        attached::refuse_on_cgroup(&config.cgroup, &pins, &predecessors)?;
        let records = folder.records()?;
        pins.refuse_without(&records)?;
        let mut loader = Loader::new(&pins);
        let mut node = loader.node()?;
        node.maps.declare(config.own)?;
        let reports = Reports {
            events: super::maps::events(&mut node.ebpf)?,
            log: aya_log::EbpfLogger::init(&mut node.ebpf).ok(),
        };
        programs::attach(&mut node.ebpf, &config.cgroup, &pins)?;
        // Of two that looked at once, one at least sees the other now.
        attached::refuse_on_cgroup(&config.cgroup, &pins, &predecessors)?;
        let pods: BTreeMap<u64, Pod> = records
            .all()?
            .into_iter()
            .map(|record| {
                let pod = Pod {
                    uid: record.uid.clone(),
                    phase: InPhase::Adopted,
                    record,
                };
                (pod.record.cookie, pod)
            })
            .collect();
        // What has no record was pinned by nobody who finished; nothing of it is in use.
        for cookie in node.maps.enrolled() {
            if !pods.contains_key(&cookie) {
                node.maps.forget(cookie)?;
            }
        }
        pins.sweep(|cookie| pods.contains_key(&cookie))?;
        let window = Window(Arc::new(Mutex::new(node.maps)));
        let (status, told) = watch::channel(Status::new());
        let room = Self {
            config,
            pins,
            records,
            loader,
            window: window.clone(),
            pods,
            failed: BTreeMap::new(),
            again: None,
            events,
            status,
            _held: (node.ebpf, folder, lock),
        };
        Ok((room, window, reports, told))
    }

    /// Does what control wants until control is gone. Pods stay captured then.
    ///
    /// # Errors
    /// The rooms behind this one are gone.
    pub async fn run(
        mut self,
        mut wanted: watch::Receiver<Option<Wanted>>,
    ) -> Result<(), CaptureError> {
        loop {
            // Nothing is done before control has said its first word.
            let want = wanted.borrow_and_update().clone();
            if let Some(want) = &want {
                while self.reconcile(want).await? {}
            }
            self.tell();
            let next = self.next();
            tokio::select! {
                changed = wanted.changed() => if changed.is_err() { return Ok(()) },
                () = until(next) => {}
                () = leave::idle(&mut self.pods) => {}
            }
            self.go_on().await?;
        }
    }

    /// Takes each pod one step further; whether that made room for another step.
    async fn reconcile(&mut self, wanted: &Wanted) -> Result<bool, CaptureError> {
        let now = Instant::now();
        self.again = None;
        self.renew(wanted).await?;
        self.failed
            .retain(|cookie, _| wanted.pods.iter().any(|pod| pod.cookie == *cookie));
        let want = Want {
            pods: wanted
                .pods
                .iter()
                .map(|pod| (pod.cookie, pod.uid.clone()))
                .collect(),
            waiting: wanted.waiting.clone(),
            gone: wanted.gone.clone(),
        };
        let have = self
            .pods
            .iter()
            .map(|(cookie, pod)| (*cookie, (pod.uid.clone(), pod.phase.phase())))
            .collect();
        let mut removed = false;
        for step in diff(&want, &have) {
            match step {
                Step::Enrol(cookie) => {
                    if self
                        .failed
                        .get(&cookie)
                        .is_some_and(|failed| failed.again > now)
                    {
                        continue;
                    }
                    if let Some(desired) = wanted.pods.iter().find(|pod| pod.cookie == cookie) {
                        self.enrol(desired.clone()).await?;
                    }
                }
                Step::Revive(cookie) => self.revive(cookie).await?,
                Step::Leave(cookie) => self.leave(cookie),
                Step::Cut(cookie) => {
                    self.release(cookie);
                    self.end(cookie).await?;
                    removed |= !self.pods.contains_key(&cookie);
                }
                Step::Undo(cookie) => {
                    self.release(cookie);
                    self.undo(cookie).await;
                    removed |= !self.pods.contains_key(&cookie);
                }
            }
        }
        Ok(removed)
    }

    /// Takes back from the workers pods of which control now says something else, such as another
    /// identity. They stay captured, as a predecessor's do, and are enrolled anew.
    async fn renew(&mut self, wanted: &Wanted) -> Result<(), CaptureError> {
        for want in &wanted.pods {
            let Some(pod) = self.pods.get_mut(&want.cookie) else {
                continue;
            };
            let InPhase::Serving(served) = &pod.phase else {
                continue;
            };
            if served.desired.uid != want.uid || served.desired.says(want) {
                continue;
            }
            tracing::info!(
                pod = %named(&pod.uid),
                "pod is another than it was; its connections are cut"
            );
            let (told, done) = oneshot::channel();
            let down = PodEvent::Down(served.local.instance, told);
            pod.phase = InPhase::Adopted;
            self.send(down).await?;
            let _ = done.await;
        }
        Ok(())
    }

    async fn enrol(&mut self, desired: Desired) -> Result<(), CaptureError> {
        let cookie = desired.cookie;
        let entered = enrol::enter(
            &desired,
            &mut self.loader,
            &self.records,
            &self.pins,
            &self.window,
        )
        .await;
        let entered = match entered {
            Ok((pod, listeners, program)) => self
                .mark(&desired, &pod)
                .map(|record| (pod, listeners, program, record)),
            Err(error) => Err(error),
        };
        match entered {
            Ok((pod, listeners, program, record)) => {
                tracing::info!(
                    pod = %format_args!("{}/{}", desired.namespace, desired.name),
                    netns = cookie,
                    addresses = ?pod.addresses(),
                    "pod enrolled"
                );
                self.failed.remove(&cookie);
                let pod_in_room = Pod {
                    record,
                    uid: desired.uid.clone(),
                    phase: InPhase::Serving(Box::new(Served {
                        desired,
                        local: Arc::clone(&pod),
                        program,
                    })),
                };
                self.pods.insert(cookie, pod_in_room);
                self.send(PodEvent::Up(pod, listeners)).await
            }
            Err(error) => {
                tracing::warn!(
                    pod = %format_args!("{}/{}", desired.namespace, desired.name),
                    %error,
                    "pod cannot be enrolled; it is tried again"
                );
                self.failed.insert(
                    cookie,
                    Failure {
                        uid: desired.uid.clone(),
                        why: error.to_string(),
                        again: Instant::now() + RETRY,
                    },
                );
                // A predecessor's capture stays: what cannot be served must not pass in clear.
                let adopted = self.pods.contains_key(&cookie);
                if !adopted && let Ok(Some(record)) = self.records.of(cookie) {
                    self.release(cookie);
                    if let Err(error) = self.put_back(&record).await {
                        tracing::warn!(%error, "what was begun cannot be undone");
                    }
                }
                Ok(())
            }
        }
    }

    /// The last step in: from here on the pod's own connections are captured.
    fn mark(&self, desired: &Desired, pod: &LocalPod) -> Result<Record, CaptureError> {
        let mut maps = self.window.maps();
        maps.enrol(
            desired.cookie,
            pod.addresses().first().copied(),
            desired.cgroup,
            desired.alone,
        )?;
        self.records
            .of(desired.cookie)?
            .ok_or_else(|| CaptureError::Namespace {
                what: "find the record of what was changed",
                why: "it is gone from the run folder".into(),
            })
    }

    async fn send(&self, event: PodEvent) -> Result<(), CaptureError> {
        self.events
            .send(event)
            .await
            .map_err(|_| CaptureError::Stopping)
    }

    fn tell(&self) {
        let mut status: Status = self
            .failed
            .values()
            .map(|failed| (failed.uid.clone(), PodState::Failed(failed.why.clone())))
            .collect();
        for (&cookie, pod) in &self.pods {
            let state = match pod.phase.phase() {
                Phase::Serving => PodState::Up { cookie },
                Phase::Draining => PodState::Draining,
                Phase::Adopted => continue,
            };
            status.insert(pod.uid.clone(), state);
        }
        self.status.send_if_modified(|old| {
            let changed = *old != status;
            *old = status;
            changed
        });
    }

    /// When there is something to do by itself.
    fn next(&self) -> Option<Instant> {
        let leaving = self.pods.values().filter_map(|pod| match &pod.phase {
            InPhase::Lingering(_, until) | InPhase::Draining { until, .. } => Some(*until),
            InPhase::Adopted | InPhase::Serving(_) => None,
        });
        let failed = self.failed.values().map(|failed| failed.again);
        leaving.chain(failed).chain(self.again).min()
    }
}

async fn until(when: Option<Instant>) {
    match when {
        Some(when) => sleep_until(when).await,
        None => std::future::pending().await,
    }
}

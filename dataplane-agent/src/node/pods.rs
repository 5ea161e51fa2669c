//! Controls enrolment: finds the configured pods on this machine, and tells capture which to take.
//!
//! Other nodes dial a pod by HBONE only while it is captured: its record is written when capture reports that
//! it serves the pod, and removed before capture is told to release it.

mod leaving;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use dataplane_ebpf::pod::CGROUPS;
use tokio::sync::{Notify, oneshot, watch};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use self::leaving::LeavingPods;
use super::machine::{NotFound, OutsideProcesses, Scan, Scanner};
use super::recording::{Known, RecordWriter};
use crate::control::configuration::{Configured, LocalPods};
use crate::control::manifests::{self, LocalPodSpec, PodKey};
use crate::mesh::workload::named;
use crate::node::capture::{self, Desired, PodState, Status};

/// Interval at which pending work is retried, such as a record that could not be written.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// The state of this node's pods, for the admin interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StatusSnapshot {
    /// The pods of this node.
    pub pods: Vec<PodView>,
    /// Why the last look at the machine failed, if it did.
    failed: Option<String>,
    /// Problems with the machine, with pods that are to be enrolled, and with this node's records.
    pub problems: Vec<String>,
    /// True if a pod that a predecessor captured is in no manifest, and stays captured and unserved for now.
    pub undecided: bool,
    /// True once the machine has been scanned.
    pub scanned: bool,
}

/// One pod of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodView {
    /// The workload's uid.
    pub uid: Arc<str>,
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// True if the pod is on this machine, or may be.
    pub here: bool,
    /// The state of its enrolment.
    pub state: State,
    /// The reason why it is not up.
    pub reason: Option<String>,
    /// The cookie of its network namespace, once found.
    pub netns: Option<u64>,
    /// Its cgroups, once found.
    pub cgroups: Vec<PathBuf>,
    /// The processes in its network namespace that are outside of its cgroups.
    pub outside: OutsideProcesses,
    /// True if it forwards between its interfaces.
    pub forwards: bool,
}

/// The state of a pod's enrolment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Captured and served.
    Up,
    /// Captured but not working: a part of its capture is gone and cannot be restored.
    Broken,
    /// To be enrolled, but not captured yet, or its record is not written yet.
    Waiting,
    /// Leaving; open connections continue.
    Draining,
    /// Not to be captured.
    Ignored,
}

impl State {
    /// The word for it in the admin interface.
    pub fn word(self) -> &'static str {
        match self {
            Self::Up => "up",
            Self::Broken => "broken",
            Self::Waiting => "waiting",
            Self::Draining => "draining",
            Self::Ignored => "ignored",
        }
    }
}

/// The task that controls enrolment.
pub struct PodController {
    configured: watch::Receiver<Configured>,
    machine: Scanner,
    wanted: watch::Sender<Option<capture::Wanted>>,
    status: watch::Receiver<Status>,
    recording: Option<RecordWriter>,
    records_changed: Arc<Notify>,
    view: watch::Sender<StatusSnapshot>,
    leaving: LeavingPods,
    /// Workload uids of pods that a predecessor captured and that no manifest mentions. They stay captured
    /// until the configuration is complete.
    unconfigured: BTreeSet<Arc<str>>,
}

/// The inputs and outputs of [`PodController`].
pub struct Channels {
    /// The configuration.
    pub configured: watch::Receiver<Configured>,
    /// What capture is to do. `None` until the first scan.
    pub wanted: watch::Sender<Option<capture::Wanted>>,
    /// The state of each captured pod.
    pub status: watch::Receiver<Status>,
    /// The writer of this node's records, if other nodes are told by records.
    pub recording: Option<RecordWriter>,
    /// Notified when a record was written or removed.
    pub records_changed: Arc<Notify>,
    /// The state for the admin interface.
    pub view: watch::Sender<StatusSnapshot>,
}

impl PodController {
    /// Creates the controller, without a scan yet.
    pub fn new(machine: Scanner, channels: Channels) -> Self {
        let captured = channels.status.borrow();
        let unconfigured = captured.values().map(|of| Arc::clone(&of.uid)).collect();
        drop(captured);
        let mut pods = Self {
            configured: channels.configured,
            machine,
            wanted: channels.wanted,
            status: channels.status,
            recording: channels.recording,
            records_changed: channels.records_changed,
            view: channels.view,
            leaving: LeavingPods::default(),
            unconfigured,
        };
        let configured = pods.configured.borrow().clone();
        pods.settle_unconfigured(&configured);
        for uid in &pods.unconfigured {
            tracing::warn!(pod = %named(uid), "no manifest says a pod that was captured; it stays so for now");
        }
        pods
    }

    /// Follows the configuration, the machine and capture, until capture is gone. When `draining` is
    /// cancelled capture is at rest; the controller then processes the last status and stops updating,
    /// because its successor decides which pods are here. `told` hears when other nodes are told of that.
    pub async fn run(mut self, draining: CancellationToken, told: oneshot::Sender<()>) {
        loop {
            self.step();
            if draining.is_cancelled() {
                break;
            }
            let next = self.leaving.next_release();
            tokio::select! {
                told = self.configured.changed() => if told.is_err() { return },
                () = self.machine.due() => {}
                () = sleep(RETRY_INTERVAL) => {}
                () = sleep_until_some(next) => {}
                told = self.status.changed() => if told.is_err() { return },
                () = settled(&mut self.recording) => {}
                () = draining.cancelled() => {}
            }
        }
        if self
            .recording
            .as_ref()
            .is_some_and(|recording| !recording.is_settled())
        {
            settled(&mut self.recording).await;
        }
        // Whoever waits may have given up.
        let _ = told.send(());
        std::future::pending::<()>().await;
    }

    fn step(&mut self) {
        let configured = self.configured.borrow_and_update().clone();
        self.settle_unconfigured(&configured);
        let local = &*configured.local;
        let wants = |pod: &&LocalPodSpec| pod.wanted == manifests::Wanted::Yes;
        let here: Vec<&LocalPodSpec> = local.iter().filter(wants).collect();
        let status = self.status.borrow_and_update().clone();
        let scan = self.machine.scan(local, &status);
        self.record(&here, &status, &scan, &configured);
        let wanted = self.wanted(&here, &scan);
        self.publish_status(&configured, &scan, &status);
        self.wanted.send_if_modified(|old| {
            let changed = old.as_ref().is_none_or(|old| !is_same(old, &wanted));
            *old = Some(wanted);
            changed
        });
    }

    /// Removes from `unconfigured` the pods that a manifest mentions, and all of them once the configuration
    /// is complete.
    fn settle_unconfigured(&mut self, configured: &Configured) {
        for pod in &*configured.local {
            self.unconfigured.remove(&pod.uid);
        }
        if configured.partial.is_none() {
            for uid in std::mem::take(&mut self.unconfigured) {
                tracing::warn!(pod = %named(&uid), "no manifest says a pod that was captured; it is let go");
            }
        }
    }

    /// Computes what capture is to do: take the pods that were found, and keep leaving ones for a while, also those
    /// that a predecessor has captured and that were not found. By then it is decided which records are to be removed.
    fn wanted(&mut self, here: &[&LocalPodSpec], scan: &Scan) -> capture::Wanted {
        let mut wanted = capture::Wanted {
            pods: here.iter().filter_map(|pod| desired(pod, scan)).collect(),
            unlocated: scan
                .waiting
                .keys()
                .chain(&self.unconfigured)
                .cloned()
                .collect(),
            gone: scan.gone.clone(),
        };
        let before = self.wanted.borrow().clone().unwrap_or_default();
        let again: BTreeSet<u64> = wanted.pods.iter().map(|pod| pod.cookie).collect();
        // One that was found in another namespace does not leave this one: capture keeps its earlier instance.
        let uids = wanted.pods.iter().map(|pod| &pod.uid);
        let uids: BTreeSet<Arc<str>> = uids.chain(&wanted.unlocated).cloned().collect();
        for pod in before.pods {
            let stays = again.contains(&pod.cookie) || uids.contains(&pod.uid);
            if !stays && !wanted.gone.contains(&pod.cookie) {
                self.leaving.add(pod);
            }
        }
        for uid in before.unlocated {
            if !uids.contains(&uid) {
                self.leaving.add_unlocated(uid);
            }
        }
        let is_over = |cookie| again.contains(&cookie) || wanted.gone.contains(&cookie);
        let recording = self.recording.as_ref();
        let is_held = |uid: &str| recording.is_some_and(|recording| recording.holds(named(uid)));
        let is_wanted = |uid: &Arc<str>| uids.contains(uid);
        self.leaving
            .release(is_over, is_wanted, is_held, Instant::now());
        wanted.pods.extend(self.leaving.pods().cloned());
        wanted.unlocated.extend(self.leaving.unlocated().cloned());
        wanted
    }

    /// Has the records of pods that are served written, and all others of this node removed.
    fn record(
        &mut self,
        here: &[&LocalPodSpec],
        status: &Status,
        scan: &Scan,
        configured: &Configured,
    ) {
        let (Some(recording), Some(said)) = (&mut self.recording, &configured.recorded) else {
            return;
        };
        recording.set_snapshot(said, configured.away);
        let (mut served, mut unserved) = (BTreeMap::new(), BTreeSet::new());
        for pod in here {
            let found = scan.found.get(&pod.uid).map(|found| found.cookie);
            let mut of_pod = status.iter().filter(|(cookie, of)| {
                of.uid == pod.uid && found.is_none_or(|found| found == **cookie)
            });
            // The status has the pods of a predecessor from the beginning.
            if of_pod.clone().any(|(_, of)| is_unserved(&of.state)) {
                unserved.insert(pod_key(pod));
            }
            if of_pod.any(|(_, of)| matches!(of.state, PodState::Up | PodState::Broken { .. })) {
                served.insert(pod_key(pod), *pod);
            }
        }
        let unconfigured = &self.unconfigured;
        let is_unconfigured = |pod_key: &PodKey| {
            let name = format!("{}/{}", pod_key.namespace, pod_key.name);
            unconfigured.iter().any(|uid| named(uid) == name)
        };
        let stays = |pod_key: &PodKey| unserved.contains(pod_key) || is_unconfigured(pod_key);
        if recording.update(&served, stays, Instant::now()) {
            self.records_changed.notify_one();
        }
    }

    /// Collects the problems with the machine, with pods that are to be enrolled, and with this node's
    /// records.
    fn problems(&self, scan: &Scan, partial: Option<&str>) -> Vec<String> {
        let missing = scan
            .waiting
            .iter()
            .filter_map(|(uid, missing)| match missing {
                NotFound::NotYet(_) => None,
                NotFound::Nowhere(why) | NotFound::Doubtful(why) => {
                    Some(format!("Pod {}: {why}", named(uid)))
                }
            });
        let unconfigured = self.unconfigured.iter().filter_map(|uid| {
            let (name, why) = (named(uid), partial?);
            Some(format!(
                "Pod {name}: was captured, and no manifest says it; it stays so as long as {why}"
            ))
        });
        let doubtful = scan.doubts.iter();
        let doubtful = doubtful.map(|(uid, why)| format!("Pod {}: {why}", named(uid)));
        let problems = scan
            .failed
            .iter()
            .cloned()
            .chain(missing)
            .chain(doubtful)
            .chain(unconfigured);
        let unrecorded = self.recording.iter().flat_map(RecordWriter::problems);
        problems.chain(unrecorded).collect()
    }

    /// Returns whether other nodes know that a pod is served.
    fn known(&self, pod: &LocalPodSpec) -> Known {
        match &self.recording {
            Some(recording) => recording.known(&pod_key(pod)),
            None => Known::Yes,
        }
    }

    fn publish_status(&self, configured: &Configured, scan: &Scan, status: &Status) {
        let pods = configured.local.iter().map(|pod| {
            let found = scan.found.get(&pod.uid);
            let (state, reason) = state(pod, scan, status, self.known(pod));
            PodView {
                uid: pod.uid.clone(),
                namespace: pod.namespace.clone(),
                name: pod.name.clone(),
                addresses: pod.addresses.clone(),
                here: is_here(pod, scan, status),
                state,
                reason,
                netns: found.map(|found| found.cookie),
                cgroups: found.map_or_else(Vec::new, |found| {
                    found
                        .groups
                        .iter()
                        .map(|(folder, _)| folder.clone())
                        .collect()
                }),
                outside: scan.outside.get(&pod.uid).copied().unwrap_or_default(),
                forwards: status.values().any(|of| of.uid == pod.uid && of.forwards),
            }
        });
        let earlier = configured.local.iter().flat_map(|pod| {
            let found = scan.found.get(&pod.uid).map(|found| found.cookie);
            earlier_instances(pod, found, status)
        });
        let view = StatusSnapshot {
            pods: pods.chain(earlier).collect(),
            failed: scan.failed.clone(),
            problems: self.problems(scan, configured.partial.as_deref()),
            undecided: !self.unconfigured.is_empty(),
            scanned: true,
        };
        self.view.send_if_modified(|old| {
            if old.failed != view.failed {
                match &view.failed {
                    Some(failed) => tracing::warn!("{failed}; what was found before holds"),
                    None => tracing::info!("the machine can be looked at again"),
                }
            }
            for pod in &view.pods {
                let was = old.pods.iter().find(|old| old.uid == pod.uid);
                if pod.state == State::Waiting && was.is_none_or(|was| was.reason != pod.reason) {
                    let reason = pod.reason.as_deref().unwrap_or_default();
                    let whose = format_args!("{}/{}", pod.namespace, pod.name);
                    match reason.ends_with(NOT_CAPTURED) || reason.ends_with(IN_CLEAR) {
                        true => tracing::warn!(pod = %whose, reason, "pod waits"),
                        false => tracing::info!(pod = %whose, reason, "pod waits"),
                    }
                }
                if was.is_some_and(|was| was.forwards && !pod.forwards) {
                    tracing::info!(pod = %format_args!("{}/{}", pod.namespace, pod.name), "the pod does not forward between its interfaces any more");
                }
                if pod.forwards && was.is_none_or(|was| !was.forwards) {
                    tracing::warn!(pod = %format_args!("{}/{}", pod.namespace, pod.name), "the pod forwards between its interfaces: what it does for others is not captured, and no policy of it holds");
                }
                if was.is_some_and(|was| was.outside.processes > 0) && pod.outside.processes == 0 {
                    tracing::info!(pod = %format_args!("{}/{}", pod.namespace, pod.name), "no process in the pod's network namespace is outside of its cgroups any more");
                }
                if pod.outside.processes > 0 && was.is_none_or(|was| was.outside != pod.outside) {
                    let reason = match pod.cgroups.len() < CGROUPS as usize {
                        true => "outside_of_cgroups",
                        false => "too_many_cgroups",
                    };
                    let OutsideProcesses {
                        processes,
                        in_clear,
                    } = pod.outside;
                    let then = match in_clear {
                        0 => "",
                        _ => "; those that are outside of the pods' cgroup too connect in clear and without identity",
                    };
                    tracing::warn!(pod = %format_args!("{}/{}", pod.namespace, pod.name), reason, processes, in_clear, "processes in the pod's network namespace are outside of its cgroups{then}");
                }
            }
            let changed = *old != view;
            *old = view;
            changed
        });
    }
}

fn pod_key(pod: &LocalPodSpec) -> PodKey {
    PodKey {
        namespace: pod.namespace.clone(),
        name: pod.name.clone(),
        uid: pod.pod_uid.clone(),
    }
}

/// Returns `true` if a pod is on this machine, or may be.
fn is_here(pod: &LocalPodSpec, scan: &Scan, status: &Status) -> bool {
    match scan.waiting.get(&pod.uid) {
        // What is served is an earlier instance of it.
        Some(NotFound::NotYet(_) | NotFound::Nowhere(_)) => {
            let mut of_uid = status.values().filter(|of| of.uid == pod.uid);
            scan.doubts.contains_key(&pod.uid) || of_uid.any(|of| !is_served(&of.state))
        }
        Some(NotFound::Doubtful(_)) | None => true,
    }
}

const BEING_ENROLLED: &str = "it is being enrolled";
/// Said of a pod that may be in a newer network namespace than the one in which it is served.
const FORMER_SERVED: &str =
    "it is served in the one in which it was found first, and may be in the other one";
/// Endings of the reason why a pod waits. They say what is not protected meanwhile.
const NOT_CAPTURED: &str = "until then it is not captured, and no policy holds";
const IN_CLEAR: &str = "until then it is captured, and they connect to it in clear";
/// The same of a pod that is not found, while what was found before is served.
const SERVED_BEFORE: &str = "until then what was found before stays captured and served";

/// Returns the state of a pod, and why it is not up. `known`: whether other nodes know a pod that is up.
fn state(
    pod: &LocalPodSpec,
    scan: &Scan,
    status: &Status,
    known: Known,
) -> (State, Option<String>) {
    let of_uid = || status.iter().filter(|(_, of)| of.uid == pod.uid);
    if let manifests::Wanted::No(why) = &pod.wanted {
        return match of_uid().any(|(_, of)| is_served(&of.state)) {
            true => (State::Draining, None),
            false => (State::Ignored, Some(why.to_string())),
        };
    }
    // Of two pods with its uid, the one that was found now.
    let found = scan.found.get(&pod.uid).map(|found| found.cookie);
    let is = of_uid()
        .find(|(cookie, _)| found == Some(**cookie))
        .or_else(|| of_uid().find(|_| found.is_none()));
    let captured = is.is_some_and(|(_, of)| {
        matches!(
            of.state,
            PodState::Up
                | PodState::Unserved { captured: true }
                | PodState::Failed { captured: true, .. }
        )
    });
    if let Some((_, of)) = is
        && let PodState::Up | PodState::Broken { .. } = of.state
        && let Some(missing) = scan.waiting.get(&pod.uid)
    {
        let reason = format!("{}; {SERVED_BEFORE}", missing.why());
        return (State::Waiting, Some(reason));
    }
    let why = match is {
        Some((_, of)) if of.state == PodState::Up => {
            if let Some(why) = scan.doubts.get(&pod.uid) {
                return (
                    State::Waiting,
                    Some(format!("{why}; {FORMER_SERVED}; {NOT_CAPTURED}")),
                );
            }
            return match known {
                Known::Yes => (State::Up, None),
                Known::NotYet => (State::Waiting, Some(BEING_ENROLLED.into())),
                Known::No(why) => (State::Waiting, Some(format!("{why}; {IN_CLEAR}"))),
            };
        }
        Some((_, of)) if let PodState::Broken { why } = &of.state => {
            return (State::Broken, Some(why.clone()));
        }
        Some((_, of)) if let PodState::Failed { why, .. } = &of.state => Some(why.as_str()),
        _ => {
            let missing = scan.waiting.get(&pod.uid).map(NotFound::why);
            scan.doubts.get(&pod.uid).map(String::as_str).or(missing)
        }
    };
    let leaves = is.is_some_and(|(_, of)| of.state == PodState::Draining);
    let reason = match (why, captured) {
        (None, _) if leaves => format!("{BEING_ENROLLED}; {NOT_CAPTURED}"),
        (None, _) => BEING_ENROLLED.into(),
        (Some(why), true) => format!("{why}; until then it stays captured, and nothing passes"),
        (Some(why), false) => format!("{why}; {NOT_CAPTURED}"),
    };
    (State::Waiting, Some(reason))
}

/// Returns the instances of a wanted pod other than the one that was `found`: what ran under its name before.
fn earlier_instances(
    pod: &LocalPodSpec,
    found: Option<u64>,
    status: &Status,
) -> impl Iterator<Item = PodView> {
    let of_uid = status.iter().filter(|(_, of)| of.uid == pod.uid);
    let earlier = of_uid.filter(move |(cookie, _)| {
        pod.wanted == manifests::Wanted::Yes && found.is_some_and(|found| found != **cookie)
    });
    earlier.map(|(cookie, of)| {
        let then = match is_captured(&of.state) {
            true => "it stays captured until nothing runs in its network namespace",
            false => "what it begins is not captured any more",
        };
        PodView {
            uid: pod.uid.clone(),
            namespace: pod.namespace.clone(),
            name: pod.name.clone(),
            addresses: Vec::new(),
            here: true,
            state: State::Draining,
            reason: Some(format!("another pod of its name has come; {then}")),
            netns: Some(*cookie),
            cgroups: Vec::new(),
            outside: OutsideProcesses::default(),
            forwards: of.forwards,
        }
    })
}

/// Returns the pods of this node that are captured or served, by their status in capture.
pub fn local_pods(status: &Status) -> LocalPods {
    let uids = |are: fn(&PodState) -> bool| {
        let all = status.values().filter(|of| are(&of.state));
        all.map(|of| Arc::clone(&of.uid)).collect()
    };
    LocalPods {
        captured: uids(is_captured),
        served: uids(is_served),
    }
}

fn is_captured(state: &PodState) -> bool {
    match state {
        PodState::Up | PodState::Broken { .. } => true,
        PodState::Unserved { captured } | PodState::Failed { captured, .. } => *captured,
        PodState::Draining => false,
    }
}

fn is_served(state: &PodState) -> bool {
    matches!(
        state,
        PodState::Up | PodState::Broken { .. } | PodState::Draining
    )
}

fn is_unserved(state: &PodState) -> bool {
    matches!(
        state,
        PodState::Unserved { .. } | PodState::Failed { captured: true, .. }
    )
}

fn desired(pod: &LocalPodSpec, scan: &Scan) -> Option<Desired> {
    let found = scan.found.get(&pod.uid)?;
    Some(Desired {
        uid: pod.uid.clone(),
        namespace: pod.namespace.clone(),
        name: pod.name.clone(),
        identity: pod.identity(),
        addresses: pod.addresses.clone(),
        netns: found.netns.clone(),
        cookie: found.cookie,
        groups: found.groups.iter().map(|(_, id)| *id).collect(),
    })
}

fn is_same(one: &capture::Wanted, other: &capture::Wanted) -> bool {
    let has = |wanted: &capture::Wanted, pod: &Desired| {
        let own = wanted.pods.iter().find(|own| own.cookie == pod.cookie);
        own.is_some_and(|own| own.same_identity_and_addresses(pod) && own.groups == pod.groups)
    };
    one.pods.len() == other.pods.len()
        && one.pods.iter().all(|pod| has(other, pod))
        && one.unlocated == other.unlocated
        && one.gone == other.gone
}

/// Waits until this node's records are written and removed as was decided last.
async fn settled(recording: &mut Option<RecordWriter>) {
    match recording {
        Some(recording) => recording.settled().await,
        None => std::future::pending().await,
    }
}

async fn sleep_until_some(when: Option<Instant>) {
    match when {
        Some(when) => tokio::time::sleep_until(when).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests;

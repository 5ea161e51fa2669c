//! Which pods are here, and how far they are: reads what is configured, finds the pods on this
//! machine, tells capture which to take, and publishes the mesh.
//!
//! A pod is dialled by HBONE only while it is captured: its record is written when capture says that
//! it serves the pod, and removed before capture is told to let it go.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use dataplane_ebpf::pod::CGROUPS;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::conflicts;
use super::doubts::Doubts;
use super::kept::{IsSaid, Kept};
use super::machine::{Look, Machine, Missing, Outside};
use super::manifests::applies;
use super::manifests::changes::PolicyChange;
use super::manifests::{self, Folder, LocalPodSpec, PodKey, Translated, Translation, Watch};
use super::recording::Recording;
use crate::capture::{self, Desired, PodState, PodStatus, Status, named};
use crate::mesh::{Delta, Identity, MeshWriter, Workload};

/// How often the machine is looked at for pods that come and go.
const LOOK: Duration = Duration::from_secs(1);
/// Between the removal of a pod's record and the end of its capture: other nodes stop dialling it.
const NOTICE: Duration = Duration::from_secs(1);

/// Where the configuration is.
#[expect(clippy::large_enum_variant, reason = "there is one")]
pub enum Source {
    /// A folder of manifests, and the records of enrolled pods beside it.
    Manifests {
        /// The folder, read once.
        folder: Folder,
        /// What tells of its changes.
        watch: Watch,
        /// The records.
        records: Recording,
        /// What tells of theirs.
        records_watch: Watch,
        /// What they mean.
        translated: Translated,
    },
    /// ztunnel's file; read once, as ztunnel does.
    Local(Option<Translation>),
}

/// What is told to whoever asks for the state of the node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct View {
    /// Pods of this node.
    pub pods: Vec<PodView>,
    /// What is wrong with the configuration, and what holds instead.
    pub problems: Vec<String>,
    /// How many policies there are.
    pub policies: usize,
    /// Whether the machine was looked at yet.
    pub looked: bool,
    /// Whether the state that nodes share cannot be read.
    pub away: bool,
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
    /// Whether it is on this machine, or may be.
    pub here: bool,
    /// How far it is.
    pub state: State,
    /// Why it is not up.
    pub reason: Option<String>,
    /// The cookie of its network namespace, once found.
    pub netns: Option<u64>,
    /// Its cgroups, once found.
    pub cgroups: Vec<PathBuf>,
    /// Processes of its namespace outside of its cgroups.
    pub outside: Outside,
    /// Whether it forwards between its interfaces.
    pub forwards: bool,
}

/// How far a pod is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Captured and served.
    Up,
    /// Captured, and does not work: what is gone of its capture cannot be put back.
    Broken,
    /// Wanted, and not captured yet, or other nodes are not told of it yet.
    Waiting,
    /// Leaving; what runs goes on.
    Draining,
    /// Not to be captured.
    Ignored,
}

impl State {
    /// Its word.
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

/// The task.
pub struct Pods {
    source: Source,
    machine: Machine,
    wanted: watch::Sender<Option<capture::Wanted>>,
    status: watch::Receiver<Status>,
    mesh: MeshWriter,
    view: watch::Sender<View>,
    /// The pods of this node that are configured.
    local: Vec<LocalPodSpec>,
    /// What is wrong with the files.
    problems: Vec<String>,
    /// What was written and cannot be carried, and what is done instead.
    uncarried: Vec<String>,
    /// What is likely a slip.
    doubts: Doubts,
    /// What the mesh knows beyond what is configured.
    kept: Kept,
    /// The uids of the pods that are captured, as of the last translation.
    captured: BTreeSet<Arc<str>>,
    /// Pods whose record is removed, and that are let go then; by the cookies of their namespaces, since
    /// one of the same name may have come.
    leaving: BTreeMap<u64, (Desired, Instant)>,
    /// Pods that a predecessor captured and of which nothing is said, by uid: they stay so until what is
    /// configured is whole.
    unsaid: BTreeSet<Arc<str>>,
}

/// What it is connected to.
pub struct Ends {
    /// What capture is to do.
    pub wanted: watch::Sender<Option<capture::Wanted>>,
    /// How far capture is.
    pub status: watch::Receiver<Status>,
    /// Where the mesh is published.
    pub mesh: MeshWriter,
    /// What is told to whoever asks.
    pub view: watch::Sender<View>,
}

impl Pods {
    /// Publishes the mesh as it is configured; no pod is looked for yet.
    pub fn new(source: Source, machine: Machine, ends: Ends) -> Self {
        let mut pods = Self {
            source,
            machine,
            wanted: ends.wanted,
            status: ends.status,
            mesh: ends.mesh,
            view: ends.view,
            local: Vec::new(),
            problems: Vec::new(),
            uncarried: Vec::new(),
            doubts: Doubts::default(),
            kept: Kept::default(),
            captured: BTreeSet::new(),
            leaving: BTreeMap::new(),
            unsaid: BTreeSet::new(),
        };
        pods.publish();
        let captured = pods
            .status
            .borrow()
            .values()
            .map(|of| Arc::clone(&of.uid))
            .collect();
        pods.unsaid = captured;
        pods.tell_of_none();
        pods.hear_of();
        for uid in &pods.unsaid {
            tracing::warn!(pod = %named(uid), "no manifest says a pod that was captured; it stays so for now");
        }
        pods
    }

    /// Follows the configuration, the machine and capture, until capture is gone. Once it is told to drain,
    /// when capture rests, it hears what capture said last, and follows the configuration alone from then on:
    /// which pods are here is for the successor to say.
    pub async fn run(mut self, draining: CancellationToken) {
        let mut look = interval(LOOK);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            self.step();
            if draining.is_cancelled() {
                break;
            }
            let next = self.leaving.values().map(|(_, when)| *when).min();
            tokio::select! {
                () = changed(&mut self.source, &mut self.problems) => {}
                _ = look.tick() => {}
                () = until(next) => {}
                told = self.status.changed() => if told.is_err() { return },
                () = draining.cancelled() => {}
            }
        }
        loop {
            self.read_records();
            self.publish();
            let problems = self.problems(&Look::default());
            let (away, policies) = (self.is_away(), self.policies());
            self.view.send_modify(|view| {
                (view.problems, view.policies, view.away) = (problems, policies, away);
            });
            changed(&mut self.source, &mut self.problems).await;
        }
    }

    fn step(&mut self) {
        self.read_records();
        self.publish();
        self.hear_of();
        let local = std::mem::take(&mut self.local);
        let wants = |pod: &&LocalPodSpec| pod.wanted == manifests::Wanted::Yes;
        let here: Vec<&LocalPodSpec> = local.iter().filter(wants).collect();
        let status = self.status.borrow_and_update().clone();
        let look = self.machine.look(&local, &status);
        let wanted = self.wanted(&here, &look, &local);
        self.record(&here, &status, &look);
        self.tell(&local, &look, &status);
        self.local = local;
        self.wanted.send_if_modified(|old| {
            let changed = old.as_ref().is_none_or(|old| !same(old, &wanted));
            *old = Some(wanted);
            changed
        });
        // What was recorded is part of the mesh.
        self.publish();
    }

    fn read_records(&mut self) {
        if let Source::Manifests { records, .. } = &mut self.source {
            records.look();
        }
    }

    /// Makes the mesh what is configured, as far as that has changed.
    fn publish(&mut self) {
        let mesh = self.mesh.current();
        let captured = captured(&self.status.borrow());
        let mut delta = match &mut self.source {
            Source::Manifests {
                folder,
                records,
                translated,
                ..
            } => {
                let (touched, mut stale) = (folder.touched(), records.stale());
                for uid in captured.symmetric_difference(&self.captured) {
                    stale.pod(uid);
                }
                match touched.is_empty() && stale.is_empty() {
                    true => Delta::default(),
                    false => {
                        self.doubts.expire();
                        let objects = (folder.objects(), &touched[..]);
                        let here = (records.enrolled(), &captured);
                        let delta = translated.update(objects, stale, here, &mesh);
                        self.captured = captured;
                        self.local = translated.local().cloned().collect();
                        let problems = translated.problems();
                        let problems = problems.chain(&folder.objects().warnings).cloned();
                        tell(&mut self.uncarried, problems.collect());
                        delta
                    }
                }
            }
            Source::Local(said) => said.take().map_or_else(Delta::default, |said| {
                self.local = said.local;
                tell(&mut self.uncarried, said.problems);
                Delta::of(said.workloads, said.services, said.policies)
            }),
        };
        let status = self.status.borrow();
        let served = status.values().filter(|pod| is_served(pod));
        let served: BTreeSet<Arc<str>> = served.map(|pod| Arc::clone(&pod.uid)).collect();
        drop(status);
        let workload: IsSaid<'_> = &|uid| self.source.says_workload(uid);
        let policy: IsSaid<'_> = &|key| self.source.says_policy(key);
        self.kept
            .keep(&served, (workload, policy), &mesh, &mut delta);
        if !delta.is_empty() {
            self.mesh.apply(delta);
            self.doubts.expire();
        }
        self.doubt();
    }

    /// Looks for what is likely a slip.
    fn doubt(&mut self) {
        let find = || {
            let (mesh, mut found) = (self.mesh.current(), Vec::new());
            let is_said = |of: &&Arc<Workload>| !self.kept.has(&of.uid);
            let workloads = mesh.workloads().filter(is_said).map(Arc::as_ref);
            let services = mesh.services().map(|(_, of)| &**of);
            conflicts::tell(workloads, services, &mut found);
            if let Source::Manifests {
                folder, translated, ..
            } = &self.source
            {
                let root = &translated.config().root_namespace;
                found.extend(applies::problems(folder.objects(), root));
            }
            found
        };
        self.doubts.look(find, tell);
    }

    /// A node of another name than its pods' would serve nobody, without a word.
    fn tell_of_none(&self) {
        let mesh = self.mesh.current();
        let nodes: BTreeSet<&str> = mesh.workloads().map(|pod| &*pod.node).collect();
        if self.local.is_empty() && !nodes.is_empty() {
            let some: Vec<&str> = nodes.into_iter().take(3).collect();
            let some = some.join(", ");
            tracing::warn!(
                nodes = some,
                "no pod is of this node (spec.nodeName); others are"
            );
        }
    }

    /// Forgets of which captured pods nothing is said, as far as something is, or nothing more will be.
    fn hear_of(&mut self) {
        for pod in &self.local {
            self.unsaid.remove(&pod.uid);
        }
        if self.partial().is_none() {
            for uid in std::mem::take(&mut self.unsaid) {
                tracing::warn!(pod = %named(&uid), "no manifest says a pod that was captured; it is let go");
            }
        }
    }

    /// Why more may be configured than what is there yet.
    fn partial(&self) -> Option<String> {
        match &self.source {
            Source::Manifests { folder, .. } => folder.is_partial(),
            Source::Local(_) => None,
        }
    }

    /// What capture is to do: found pods, and for a while those that leave.
    fn wanted(
        &mut self,
        here: &[&LocalPodSpec],
        look: &Look,
        local: &[LocalPodSpec],
    ) -> capture::Wanted {
        let now = Instant::now();
        let mut wanted = capture::Wanted {
            pods: here.iter().filter_map(|pod| desired(pod, look)).collect(),
            waiting: look.waiting.keys().chain(&self.unsaid).cloned().collect(),
            gone: look.gone.clone(),
        };
        let before = self.wanted.borrow().clone().unwrap_or_default();
        let again: BTreeSet<u64> = wanted.pods.iter().map(|pod| pod.cookie).collect();
        for pod in before.pods {
            let stays = again.contains(&pod.cookie) || wanted.waiting.contains(&pod.uid);
            if !stays && !wanted.gone.contains(&pod.cookie) {
                let cookie = pod.cookie;
                if !self.leaving.contains_key(&cookie) {
                    self.tell_of_another_node(&pod, local);
                }
                self.leaving.entry(cookie).or_insert((pod, now + NOTICE));
            }
        }
        self.leaving.retain(|cookie, (_, when)| {
            *when > now && !again.contains(cookie) && !wanted.gone.contains(cookie)
        });
        wanted
            .pods
            .extend(self.leaving.values().map(|(pod, _)| pod.clone()));
        wanted
    }

    /// A pod that went to another node has another address there. One that its manifest says to be on
    /// another node, and at the address at which it is here, leaves the mesh by a slip. One that is known only
    /// as it is still served has no manifest.
    fn tell_of_another_node(&self, pod: &Desired, local: &[LocalPodSpec]) {
        let is_here = local.iter().any(|now| now.uid == pod.uid);
        let mesh = self.mesh.current();
        let is_it = |now: &&Arc<Workload>| {
            let mut addresses = now.addresses.iter();
            addresses.any(|ip| pod.addresses.contains(ip))
        };
        if let Some(now) = mesh.workload(&pod.uid).filter(is_it)
            && !is_here
            && !self.kept.has(&pod.uid)
        {
            tracing::warn!(
                pod = %named(&pod.uid),
                node = &*now.node,
                "a pod that is on this machine leaves the mesh, as its manifest says another node (spec.nodeName)"
            );
        }
    }

    /// Has records of pods that are served, and of no others.
    fn record(&mut self, here: &[&LocalPodSpec], status: &Status, look: &Look) {
        let Source::Manifests { records, .. } = &mut self.source else {
            return;
        };
        let (mut served, mut adopted) = (BTreeMap::new(), BTreeSet::new());
        for pod in here {
            let found = look.found.get(&pod.uid).map(|found| found.cookie);
            let mut of_pod = status.iter().filter(|(cookie, of)| {
                of.uid == pod.uid && found.is_none_or(|found| found == **cookie)
            });
            // What is captured is in the status from the first one on.
            if of_pod.clone().any(|(_, of)| is_adopted(&of.state)) {
                adopted.insert(key(pod));
            }
            if of_pod.any(|(_, of)| matches!(of.state, PodState::Up | PodState::Broken { .. })) {
                served.insert(key(pod), *pod);
            }
        }
        let unsaid = &self.unsaid;
        let is_unsaid = |key: &PodKey| {
            let name = format!("{}/{}", key.namespace, key.name);
            unsaid.iter().any(|uid| named(uid) == name)
        };
        let stays = |key: &PodKey| adopted.contains(key) || is_unsaid(key);
        records.update(&served, stays, Instant::now());
    }

    /// What is wrong now: with the configuration, with the machine, and with the records.
    fn problems(&self, look: &Look) -> Vec<String> {
        let missing = look
            .waiting
            .iter()
            .filter_map(|(uid, missing)| match missing {
                Missing::NotYet(_) => None,
                Missing::Nowhere(why) | Missing::Doubtful(why) => {
                    Some(format!("Pod {}: {why}", named(uid)))
                }
            });
        let problems = self.problems.iter().chain(&self.uncarried);
        let problems = problems.chain(self.doubts.found());
        let unsaid = self.unsaid.iter().filter_map(|uid| {
            let (name, why) = (named(uid), self.partial()?);
            Some(format!(
                "Pod {name}: was captured, and no manifest says it; it stays so as long as {why}"
            ))
        });
        let problems = problems
            .chain(&look.failed)
            .cloned()
            .chain(missing)
            .chain(unsaid);
        match &self.source {
            Source::Manifests { records, .. } => problems.chain(records.problems()).collect(),
            Source::Local(_) => problems.collect(),
        }
    }

    /// How many policies are configured, whomever they are for.
    fn policies(&self) -> usize {
        match &self.source {
            Source::Manifests { folder, .. } => {
                let objects = folder.objects();
                objects.authorization_policies.len() + objects.peer_authentications.len()
            }
            Source::Local(_) => self.mesh.current().policies().len(),
        }
    }

    fn is_away(&self) -> bool {
        match &self.source {
            Source::Manifests { records, .. } => records.is_away(),
            Source::Local(_) => false,
        }
    }

    /// Why other nodes do not know that a pod is served, if that is so.
    fn unrecorded(&self, pod: &LocalPodSpec) -> Option<String> {
        match &self.source {
            Source::Manifests { records, .. } => records.why_not(&key(pod)),
            Source::Local(_) => None,
        }
    }

    fn tell(&self, local: &[LocalPodSpec], look: &Look, status: &Status) {
        let pods = local.iter().map(|pod| {
            let found = look.found.get(&pod.uid);
            let (state, reason) = state(pod, look, status, self.unrecorded(pod));
            PodView {
                uid: pod.uid.clone(),
                namespace: pod.namespace.clone(),
                name: pod.name.clone(),
                addresses: pod.addresses.clone(),
                here: match look.waiting.get(&pod.uid) {
                    Some(Missing::NotYet(_) | Missing::Nowhere(_)) => {
                        status.values().any(|of| of.uid == pod.uid)
                    }
                    Some(Missing::Doubtful(_)) | None => true,
                },
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
                outside: look.outside.get(&pod.uid).copied().unwrap_or_default(),
                forwards: status.values().any(|of| of.uid == pod.uid && of.forwards),
            }
        });
        let view = View {
            pods: pods.collect(),
            problems: self.problems(look),
            policies: self.policies(),
            looked: true,
            away: self.is_away(),
        };
        self.view.send_if_modified(|old| {
            if let Some(failed) = &look.failed
                && !old.problems.contains(failed)
            {
                tracing::warn!("{failed}; what was found before holds");
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
                if pod.forwards && was.is_none_or(|was| !was.forwards) {
                    tracing::warn!(pod = %format_args!("{}/{}", pod.namespace, pod.name), "the pod forwards between its interfaces: what it does for others is not captured, and no policy of it holds");
                }
                if pod.outside.processes > 0 && was.is_none_or(|was| was.outside != pod.outside) {
                    let reason = match pod.cgroups.len() < CGROUPS as usize {
                        true => "outside_of_cgroups",
                        false => "too_many_cgroups",
                    };
                    let Outside {
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

fn key(pod: &LocalPodSpec) -> PodKey {
    PodKey {
        namespace: pod.namespace.clone(),
        name: pod.name.clone(),
        uid: pod.pod_uid.clone(),
    }
}

/// What is told of a pod that is open.
const NOT_CAPTURED: &str = "until then it is not captured, and no policy holds";
const IN_CLEAR: &str = "until then it is captured, and they connect to it in clear";

/// How far a pod is, and why it is not up. `unrecorded`: why other nodes do not know of one that is.
fn state(
    pod: &LocalPodSpec,
    look: &Look,
    status: &Status,
    unrecorded: Option<String>,
) -> (State, Option<String>) {
    let of_uid = || status.iter().filter(|(_, of)| of.uid == pod.uid);
    if let manifests::Wanted::No(why) = &pod.wanted {
        return match of_uid().any(|(_, of)| is_served(of)) {
            true => (State::Draining, None),
            false => (State::Ignored, Some(why.to_string())),
        };
    }
    // Of two of its name, the one that is here now.
    let found = look.found.get(&pod.uid).map(|found| found.cookie);
    let is = of_uid()
        .find(|(cookie, _)| found == Some(**cookie))
        .or_else(|| of_uid().find(|_| found.is_none()));
    let captured = is.is_some_and(|(_, of)| {
        matches!(
            of.state,
            PodState::Up
                | PodState::Adopted { captured: true }
                | PodState::Failed { captured: true, .. }
        )
    });
    let why = match is {
        Some((_, of)) if of.state == PodState::Up => {
            let Some(why) = unrecorded else {
                return (State::Up, None);
            };
            let why = format!("{why}; {IN_CLEAR}");
            return (State::Waiting, Some(why));
        }
        Some((_, of)) if let PodState::Broken { why } = &of.state => {
            return (State::Broken, Some(why.clone()));
        }
        Some((_, of)) if let PodState::Failed { why, .. } = &of.state => Some(why.as_str()),
        _ => look.waiting.get(&pod.uid).map(Missing::why),
    };
    let reason = match (why, captured) {
        (None, _) => "it is being enrolled".into(),
        (Some(why), true) => format!("{why}; until then it stays captured, and nothing passes"),
        (Some(why), false) => format!("{why}; {NOT_CAPTURED}"),
    };
    (State::Waiting, Some(reason))
}

fn is_served(pod: &PodStatus) -> bool {
    matches!(
        pod.state,
        PodState::Up | PodState::Broken { .. } | PodState::Draining
    )
}

/// Those that are captured, and do not leave.
fn captured(status: &Status) -> BTreeSet<Arc<str>> {
    let captured = status.values().filter(|of| match of.state {
        PodState::Up | PodState::Broken { .. } => true,
        PodState::Adopted { captured } | PodState::Failed { captured, .. } => captured,
        PodState::Draining => false,
    });
    captured.map(|of| Arc::clone(&of.uid)).collect()
}

fn is_adopted(state: &PodState) -> bool {
    matches!(
        state,
        PodState::Adopted { .. } | PodState::Failed { captured: true, .. }
    )
}

fn desired(pod: &LocalPodSpec, look: &Look) -> Option<Desired> {
    let found = look.found.get(&pod.uid)?;
    Some(Desired {
        uid: pod.uid.clone(),
        namespace: pod.namespace.clone(),
        name: pod.name.clone(),
        identity: Identity::new(&pod.trust_domain, &pod.namespace, &pod.service_account),
        addresses: pod.addresses.clone(),
        netns: found.netns.clone(),
        cookie: found.cookie,
        groups: found.groups.iter().map(|(_, id)| *id).collect(),
    })
}

fn same(one: &capture::Wanted, other: &capture::Wanted) -> bool {
    let has = |wanted: &capture::Wanted, pod: &Desired| {
        let own = wanted.pods.iter().find(|own| own.cookie == pod.cookie);
        own.is_some_and(|own| own.says(pod) && own.groups == pod.groups)
    };
    one.pods.len() == other.pods.len()
        && one.pods.iter().all(|pod| has(other, pod))
        && one.waiting == other.waiting
        && one.gone == other.gone
}

/// Waits until there is something new to read, and reads it.
async fn changed(source: &mut Source, problems: &mut Vec<String>) {
    let Source::Manifests {
        folder,
        watch,
        records_watch,
        ..
    } = source
    else {
        return std::future::pending().await;
    };
    tokio::select! {
        reload = folder.next(watch) => {
            let told: Vec<String> = reload.problems.iter().map(ToString::to_string).collect();
            for problem in told.iter().filter(|problem| !problems.contains(problem)) {
                tracing::error!("{problem}; what it said before holds");
            }
            *problems = told;
            for renamed in &reload.renamed {
                tracing::warn!("{renamed}");
            }
            reload.policies.iter().for_each(PolicyChange::log);
        }
        () = records_watch.changed() => {}
    }
}

/// Takes what is wrong now in the place of what was, and tells of what is new.
fn tell(told: &mut Vec<String>, problems: Vec<String>) {
    let before: HashSet<&String> = told.iter().collect();
    for problem in problems.iter().filter(|problem| !before.contains(problem)) {
        tracing::warn!("{problem}");
    }
    *told = problems;
}

impl Source {
    /// Whether a workload is configured.
    fn says_workload(&self, uid: &str) -> bool {
        match self {
            Self::Manifests { translated, .. } => translated.says_workload(uid),
            Self::Local(_) => true,
        }
    }

    /// Whether a policy is configured.
    fn says_policy(&self, key: &str) -> bool {
        match self {
            Self::Manifests { translated, .. } => translated.says_policy(key),
            Self::Local(_) => true,
        }
    }
}

async fn until(when: Option<Instant>) {
    match when {
        Some(when) => tokio::time::sleep_until(when).await,
        None => std::future::pending().await,
    }
}

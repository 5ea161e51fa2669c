//! Follows what is configured: publishes the mesh, and tells which pods are of this node. On a thread of its own:
//! nobody waits for it.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::time::{MissedTickBehavior, interval};

use super::conflicts;
use super::enrolled::RecordsSnapshot;
use super::lints::Lints;
use super::local_xds::Unchanged;
use super::manifests::applies;
use super::manifests::changes::PolicyChange;
use super::manifests::{LocalPodSpec, ManifestFolder, Translated, Translation, Wanted, Watch};
use super::problems;
use super::recorded::RecordReader;
use super::retained::{IsConfigured, RetainedPods};
use crate::drain;
use crate::mesh::workload::named;
use crate::mesh::{Delta, Identity, Mesh, MeshWriter, Workload};
use crate::sys::memory;

/// How often it is looked whether records have changed of which nothing tells.
const RECORDS_POLL_INTERVAL: Duration = Duration::from_secs(1);
/// What so many changes left behind is given back: what they were read from, and what was there before.
const TRIM_THRESHOLD: usize = 1000;

/// Where the configuration is.
#[expect(clippy::large_enum_variant, reason = "there is one")]
pub enum Source {
    /// A folder of manifests, and the records of enrolled pods beside it.
    Manifests {
        /// The folder, read once.
        folder: ManifestFolder,
        /// What tells of its changes.
        watch: Watch,
        /// The records.
        records: RecordReader,
        /// What tells of theirs.
        records_watch: Watch,
        /// What they mean.
        translated: Translated,
    },
    /// ztunnel's file; read once, as ztunnel does. And whether it stays as it was read.
    Local(Option<Translation>, Unchanged),
}

/// What is configured, as far as it concerns this node's pods and whoever asks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Configured {
    /// The pods of this node.
    pub local: Arc<[LocalPodSpec]>,
    /// Why more may be configured than what is there yet.
    pub partial: Option<String>,
    /// What is wrong with it, and what holds instead.
    pub problems: Vec<String>,
    /// The number of files whose content is not accepted.
    pub refused: usize,
    /// The number of policies that are enforced, whomever they are for.
    pub policies: usize,
    /// The number of policies that are not enforced.
    pub policies_not_enforced: usize,
    /// What the records say; none where there are none.
    pub recorded: Option<Arc<RecordsSnapshot>>,
    /// Whether the state that nodes share cannot be read.
    pub away: bool,
}

impl Configured {
    /// Whether a pod of this node is to be enrolled with this identity.
    pub fn enrols(&self, uid: &str, identity: &Identity) -> bool {
        self.local
            .iter()
            .any(|pod| *pod.uid == *uid && pod.wanted == Wanted::Yes && pod.identity() == *identity)
    }
}

/// The pods of this node that are here, by the uids of their workloads.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LocalPods {
    /// Those that are captured, and do not leave.
    pub captured: BTreeSet<Arc<str>>,
    /// Those of which anything may run.
    pub served: BTreeSet<Arc<str>>,
}

/// The task; `S` is what tells which pods are here.
pub struct Configuration<S> {
    source: Source,
    status: watch::Receiver<S>,
    local_pods: fn(&S) -> LocalPods,
    mesh: MeshWriter,
    configured: watch::Sender<Configured>,
    /// Told when this node has written or removed a record.
    records_changed: Arc<Notify>,
    /// The pods of this node.
    local: Arc<[LocalPodSpec]>,
    /// The number of policies in a file that is read once.
    policies: usize,
    /// The files whose content is not accepted, and why.
    refused: Vec<String>,
    /// Why the folder of manifests cannot be read now.
    silent: Vec<String>,
    /// What was written and cannot be carried, and what is done instead.
    unsupported: Vec<String>,
    /// What is likely a slip.
    lints: Lints,
    /// What the mesh knows beyond what is configured.
    retained: RetainedPods,
    /// The uids of the pods that are captured, as of the last translation.
    captured: BTreeSet<Arc<str>>,
}

impl<S: Send + Sync + 'static> Configuration<S> {
    /// Publishes the mesh as it is configured. `status`, `here`: which pods of this node are here.
    pub fn new(
        source: Source,
        (status, here): (watch::Receiver<S>, fn(&S) -> LocalPods),
        mesh: MeshWriter,
        records_changed: Arc<Notify>,
    ) -> (Self, watch::Receiver<Configured>) {
        let (sender, configured) = watch::channel(Configured::default());
        let mut new = Self {
            source,
            status,
            local_pods: here,
            mesh,
            configured: sender,
            records_changed,
            local: Arc::default(),
            policies: 0,
            refused: Vec::new(),
            silent: Vec::new(),
            unsupported: Vec::new(),
            lints: Lints::default(),
            retained: RetainedPods::default(),
            captured: BTreeSet::new(),
        };
        let delta = new.delta();
        new.warn_of_no_local_pods(&delta);
        new.publish(delta);
        (new, configured)
    }

    /// Follows the configuration, and which pods are here, until nobody tells of these any more. To read and to
    /// translate takes the processor for longer than a connection should have to wait, so it is done on a thread of
    /// its own.
    pub async fn run(self) {
        match drain::on_own_thread("configuration", move || self.follow()) {
            Ok(ended) => ended.await,
            Err(error) => tracing::error!(%error, "cannot follow the configuration"),
        }
    }

    async fn follow(mut self) {
        let mut look = interval(RECORDS_POLL_INTERVAL);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let look_again = tokio::select! {
                look_again = changed(&mut self.source, &mut self.refused) => look_again,
                _ = look.tick() => true,
                () = self.records_changed.notified() => true,
                told = self.status.changed() => match told {
                    Ok(()) => true,
                    Err(_) => return,
                },
            };
            if let Source::Manifests { records, .. } = &mut self.source
                && look_again
            {
                records.look();
            }
            let delta = self.delta();
            self.publish(delta);
        }
    }

    /// Returns the changes of the mesh by what is configured and by which pods are here.
    fn delta(&mut self) -> Delta {
        let LocalPods { captured, served } = (self.local_pods)(&self.status.borrow_and_update());
        let mesh = self.mesh.current();
        let mut delta = self.read(captured, &mesh);
        let workload: IsConfigured<'_> = &|uid| self.source.has_workload(uid);
        let policy: IsConfigured<'_> = &|key| self.source.has_policy(key);
        self.retained
            .keep(&served, (workload, policy), &mesh, &mut delta);
        self.warn_of_moved_pods(&served, &mesh, &delta);
        delta
    }

    /// Makes the mesh what is configured; then tells of the pods of this node, which so are in the mesh before
    /// they are looked for.
    fn publish(&mut self, delta: Delta) {
        let changes = delta.len();
        if changes > 0 {
            self.mesh.apply(delta);
            self.lints.expire();
        }
        self.lint();
        if let Source::Manifests { folder, watch, .. } = &self.source {
            let silent = watch.problem().or_else(|| folder.problem()).into_iter();
            let silent = silent.map(|problem| format!("{problem}; what they said last holds"));
            problems::replace(&mut self.silent, silent.collect(), problems::warn);
        }
        if changes >= TRIM_THRESHOLD {
            memory::give_back();
        }
        let configured = self.configured();
        self.configured.send_if_modified(|old| {
            let changed = *old != configured;
            *old = configured;
            changed
        });
    }

    /// What has changed by what is configured now.
    fn read(&mut self, captured: BTreeSet<Arc<str>>, mesh: &Mesh) -> Delta {
        match &mut self.source {
            Source::Manifests {
                folder,
                records,
                translated,
                ..
            } => {
                let (touched, mut stale) = (folder.touched(), records.stale());
                for uid in captured.symmetric_difference(&self.captured) {
                    stale.workload(uid);
                }
                if touched.is_empty() && stale.is_empty() {
                    return Delta::default();
                }
                self.lints.expire();
                let objects = (folder.objects(), &touched[..]);
                let here = (records.enrolled(), &captured);
                let delta = translated.update(objects, stale, here, mesh);
                self.captured = captured;
                self.local = translated.local().cloned().collect();
                let unsupported = translated.problems();
                let unsupported = unsupported.chain(&folder.objects().warnings).cloned();
                problems::replace(&mut self.unsupported, unsupported.collect(), problems::warn);
                delta
            }
            Source::Local(said, _) => said.take().map_or_else(Delta::default, |said| {
                self.local = said.local.into();
                self.policies = said.policies.len();
                problems::replace(&mut self.unsupported, said.problems, problems::warn);
                Delta::of(said.workloads, said.services, said.policies)
            }),
        }
    }

    fn configured(&self) -> Configured {
        let problems = self.refused.iter().chain(&self.silent);
        let problems = problems.chain(&self.unsupported);
        let mut problems: Vec<String> = problems.chain(self.lints.found()).cloned().collect();
        let mut configured = Configured {
            local: Arc::clone(&self.local),
            refused: self.refused.len(),
            ..Configured::default()
        };
        match &self.source {
            Source::Manifests {
                folder,
                records,
                translated,
                ..
            } => {
                problems.extend_from_slice(records.problems());
                let objects = folder.objects();
                let all = objects.authorization_policies.len() + objects.peer_authentications.len();
                configured.policies_not_enforced =
                    applies::not_enforced(objects, &translated.config().root_namespace);
                configured.policies = all - configured.policies_not_enforced;
                configured.partial = folder.is_partial();
                configured.recorded = Some(Arc::clone(records.said()));
                configured.away = records.is_away();
            }
            Source::Local(_, unchanged) => {
                configured.policies = self.policies;
                configured.partial = unchanged.is_partial();
            }
        }
        configured.problems = problems;
        configured
    }

    /// Looks for what is likely a slip.
    fn lint(&mut self) {
        let find = || {
            let (mesh, mut found) = (self.mesh.current(), Vec::new());
            let is_configured = |of: &&Arc<Workload>| !self.retained.has(&of.uid);
            let workloads = mesh.workloads().filter(is_configured).map(Arc::as_ref);
            let services = mesh.services().map(|(_, of)| &**of);
            conflicts::report(workloads, services, &mut found);
            if let Source::Manifests {
                folder, translated, ..
            } = &self.source
            {
                let root = &translated.config().root_namespace;
                found.extend(applies::problems(folder.objects(), root));
            }
            found
        };
        self.lints.refresh(find, |known, now| {
            problems::replace(known, now, problems::warn);
        });
    }

    /// A pod that went to another node has another address there. One that its manifest says to be on another
    /// node, and at an address that it has here, leaves the mesh by a slip.
    fn warn_of_moved_pods(&self, served: &BTreeSet<Arc<str>>, mesh: &Mesh, delta: &Delta) {
        let is_here = |uid: &Arc<str>| self.local.iter().any(|pod| pod.uid == *uid);
        for uid in served {
            if let (Some(is), Some(Some(now))) = (mesh.workload(uid), delta.workloads.get(uid))
                && is.node != now.node
                && !is_here(uid)
                && is.addresses.iter().any(|ip| now.addresses.contains(ip))
            {
                tracing::warn!(
                    pod = %named(uid),
                    node = &*now.node,
                    "a pod that is on this machine leaves the mesh, as its manifest says another node (spec.nodeName)"
                );
            }
        }
    }

    /// A node of another name than its pods' would serve nobody, without a word.
    fn warn_of_no_local_pods(&self, all: &Delta) {
        let pods = all.workloads.values().flatten();
        let nodes: BTreeSet<&str> = pods.map(|pod| &*pod.node).collect();
        if self.local.is_empty() && !nodes.is_empty() {
            let some: Vec<&str> = nodes.into_iter().take(3).collect();
            let some = some.join(", ");
            tracing::warn!(
                nodes = some,
                "no pod is of this node (spec.nodeName); others are"
            );
        }
    }
}

/// Waits until there is something new to read, and reads it. Returns true if the records are to be looked at.
async fn changed(source: &mut Source, refused: &mut Vec<String>) -> bool {
    let (folder, watch, records, records_watch) = match source {
        Source::Manifests {
            folder,
            watch,
            records,
            records_watch,
            ..
        } => (folder, watch, records, records_watch),
        Source::Local(_, unchanged) => {
            unchanged.known().await;
            return false;
        }
    };
    tokio::select! {
        reload = folder.next(watch) => {
            let faults: HashMap<String, _> =
                reload.problems.iter().map(|fault| (fault.to_string(), fault)).collect();
            let now = reload.problems.iter().map(ToString::to_string).collect();
            problems::replace(refused, now, |new| {
                tracing::error!("{new}; {}", folder.in_effect(faults[new]));
            });
            for renamed in &reload.renamed {
                tracing::warn!("{renamed}");
            }
            reload.policies.iter().for_each(PolicyChange::log);
        }
        () = records_watch.changed() => {}
        () = records.looked() => return false,
    }
    true
}

impl Source {
    /// Whether a workload is configured.
    fn has_workload(&self, uid: &str) -> bool {
        match self {
            Self::Manifests { translated, .. } => translated.has_workload(uid),
            Self::Local(..) => true,
        }
    }

    /// Whether a policy is configured.
    fn has_policy(&self, key: &str) -> bool {
        match self {
            Self::Manifests { translated, .. } => translated.has_policy(key),
            Self::Local(..) => true,
        }
    }
}

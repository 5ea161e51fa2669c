//! Writes the records of enrolled pods: one for each pod of this node that is served, and no others.
//!
//! They are written and removed on a thread of their own, one at a time: the state may be on a disk that does not
//! answer, and nothing else is to wait for that. A failure is logged once, and retried at growing intervals.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::future::pending;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::control::disk::{SLOW_DISK, unanswered};
use crate::control::enrolled::{EnrolmentRecords, RecordsSnapshot};
use crate::control::manifests::{LocalPodSpec, PodKey};
use crate::drain;

/// Delay before the first retry of a failed write or removal. It doubles with each failure.
const FIRST_RETRY: Duration = Duration::from_secs(1);
/// Longest delay between retries.
const MAX_RETRY: Duration = Duration::from_secs(30);

/// Writer of this node's records.
#[derive(Debug)]
pub struct RecordWriter {
    records: EnrolmentRecords,
    /// The records as they were read last.
    said: Arc<RecordsSnapshot>,
    /// True if the state cannot be read now. Nothing is written or removed then.
    away: bool,
    /// This node's records: those in `said`, with what was written and removed since.
    own: BTreeSet<PodKey>,
    /// Those of them that do not name this machine.
    unsigned: BTreeSet<PodKey>,
    /// The write or removal that is running.
    running: Option<Running>,
    /// Those that follow, in this order. None is of the pod of `running`.
    next: VecDeque<Task>,
    /// Records that could not be written or removed.
    failed: BTreeMap<PodKey, Failure>,
    /// True if a record was written or removed since the last [`RecordWriter::update`].
    changed: bool,
}

/// A record that is to be written or removed.
#[derive(Clone, Debug)]
enum Task {
    Write(PodKey, LocalPodSpec),
    Remove(PodKey),
}

/// A task that is running.
#[derive(Debug)]
struct Running {
    task: Task,
    since: Instant,
    /// True once it was reported that it takes long.
    overdue: bool,
    done: JoinHandle<io::Result<()>>,
}

#[derive(Debug)]
struct Failure {
    what: &'static str,
    why: String,
    wait: Duration,
    retry_at: Instant,
}

/// Whether other nodes know that a pod is served.
#[derive(Debug, PartialEq, Eq)]
pub enum Known {
    /// They do.
    Yes,
    /// Its record is being written.
    NotYet,
    /// Its record cannot be written: why.
    No(String),
}

const NOT_WRITTEN: &str = "other nodes cannot be told of it";
const NOT_REMOVED: &str = "other nodes cannot be told that it leaves";
const AWAY: &str = "the state that nodes share cannot be read";

impl RecordWriter {
    /// Creates a writer that knows of no record yet.
    pub fn new(records: EnrolmentRecords) -> Self {
        Self {
            records,
            said: Arc::default(),
            away: false,
            own: BTreeSet::new(),
            unsigned: BTreeSet::new(),
            running: None,
            next: VecDeque::new(),
            failed: BTreeMap::new(),
            changed: false,
        }
    }

    /// Takes a new snapshot of all records, and whether the state is away. A snapshot that was read while this node
    /// wrote or removed a record does not count for this node's own.
    pub fn set_snapshot(&mut self, said: &Arc<RecordsSnapshot>, away: bool) {
        self.away = away;
        if !Arc::ptr_eq(said, &self.said) {
            self.said = Arc::clone(said);
            if said.writes == self.records.writes() {
                (self.own, self.unsigned) = (said.own.clone(), said.unsigned.clone());
            }
        }
    }

    /// Decides what is to be done: to write the records of `served` pods, and to remove all others of this node for
    /// which `stays` is false. Begins it if nothing is running; [`RecordWriter::settled`] goes on with it. Returns
    /// true if any record was written or removed since the last call.
    pub fn update(
        &mut self,
        served: &BTreeMap<PodKey, &LocalPodSpec>,
        stays: impl Fn(&PodKey) -> bool,
        now: Instant,
    ) -> bool {
        let is_written = |key: &PodKey| match self.own.contains(key) {
            true => !self.unsigned.contains(key),
            // The record of a node of the same name says the same; two that overwrite each other's would
            // never end.
            false => self.said.namesakes.contains(key),
        };
        let unwritten = served.iter().filter(|(key, _)| !is_written(key));
        let write = unwritten.map(|(key, pod)| Task::Write(key.clone(), (*pod).clone()));
        let leaves = |key: &&PodKey| !served.contains_key(*key) && !stays(key);
        let remove = self.own.iter().filter(leaves).cloned().map(Task::Remove);
        let mut tasks: VecDeque<Task> = write.chain(remove).collect();
        let keys: BTreeSet<&PodKey> = tasks.iter().map(Task::key).collect();
        self.failed.retain(|key, _| keys.contains(key));
        tasks.retain(|task| !self.is_running(task.key()) && self.may_retry(task.key(), now));
        match self.away {
            true => {
                for task in &tasks {
                    self.note(task, Err(io::Error::other(AWAY)), now);
                }
                self.next.clear();
            }
            false => self.next = tasks,
        }
        self.report_overdue(now);
        self.start(now);
        std::mem::take(&mut self.changed)
    }

    /// Waits until what is to be done is done or has failed. Waits for ever if nothing is running. Cancelling the
    /// wait loses nothing.
    pub async fn settled(&mut self) {
        if self.is_settled() {
            return pending().await;
        }
        while let Some(running) = &mut self.running {
            let done = drain::finished(&mut running.done).await;
            self.accept(done, Instant::now());
        }
    }

    /// Returns true if no record is being written or removed.
    pub fn is_settled(&self) -> bool {
        self.running.is_none()
    }

    /// Returns true if a pod that leaves has to stay, since other nodes may still be told to dial it: its record is
    /// being written or removed. `name` is `<namespace>/<name>`. A removal that has failed holds no pod, nor does a state
    /// that is away.
    pub fn holds(&self, name: &str) -> bool {
        let is_of = |task: &Task| named(task.key()) == name;
        let running = self.running.iter().map(|running| &running.task);
        !self.away && running.chain(&self.next).any(is_of)
    }

    /// Returns whether other nodes know that a pod is served.
    pub fn known(&self, pod: &PodKey) -> Known {
        let is_recorded = self.own.contains(pod) || self.said.namesakes.contains(pod);
        match (self.failed.get(pod), &self.running) {
            (Some(failure), _) if failure.what == NOT_WRITTEN => Known::No(failure.told()),
            (_, running) if is_recorded && !removes(running, pod) => Known::Yes,
            (_, Some(running)) if running.overdue => {
                let file = self.records.path_of(running.task.key());
                Known::No(format!("{NOT_WRITTEN}: {}", unanswered(&file)))
            }
            _ => Known::NotYet,
        }
    }

    /// Returns one line for each record that could not be written or removed, or for which that takes long.
    pub fn problems(&self) -> impl Iterator<Item = String> {
        let of = |key: &PodKey, told: &dyn std::fmt::Display| format!("Pod {}: {told}", named(key));
        let overdue = self.running.iter().filter(|running| running.overdue);
        let overdue = overdue.map(move |running| {
            let path = self.records.path_of(running.task.key());
            let told = format_args!(
                "{}: {}: the disk has not answered for {} s",
                running.task.failure(),
                path.display(),
                running.since.elapsed().as_secs()
            );
            of(running.task.key(), &told)
        });
        let failed = self.failed.iter();
        failed
            .map(move |(key, failure)| of(key, &failure.told()))
            .chain(overdue)
    }

    /// Begins the next task, unless one is running.
    fn start(&mut self, now: Instant) {
        if self.running.is_none()
            && let Some(task) = self.next.pop_front()
        {
            let (records, of_thread) = (self.records.clone(), task.clone());
            self.running = Some(Running {
                task,
                since: now,
                overdue: false,
                done: drain::spawn_blocking(move || of_thread.run(&records)),
            });
        }
    }

    /// Takes the result of the running task, and begins the next one.
    fn accept(&mut self, done: io::Result<()>, now: Instant) {
        let Some(Running { task, overdue, .. }) = self.running.take() else {
            return;
        };
        if done.is_ok() {
            self.changed = true;
            match &task {
                Task::Write(key, _) => {
                    self.own.insert(key.clone());
                    self.unsigned.remove(key);
                }
                Task::Remove(key) => {
                    self.own.remove(key);
                }
            }
            if overdue && !self.failed.contains_key(task.key()) {
                tracing::info!(pod = %named(task.key()), "other nodes are told");
            }
        }
        self.note(&task, done, now);
        self.start(now);
    }

    fn is_running(&self, key: &PodKey) -> bool {
        self.running
            .as_ref()
            .is_some_and(|running| running.task.key() == key)
    }

    fn may_retry(&self, key: &PodKey, now: Instant) -> bool {
        self.failed
            .get(key)
            .is_none_or(|failure| failure.retry_at <= now)
    }

    fn report_overdue(&mut self, now: Instant) {
        if let Some(running) = &mut self.running
            && !running.overdue
            && now.duration_since(running.since) >= SLOW_DISK
        {
            running.overdue = true;
            let (key, what) = (running.task.key(), running.task.failure());
            let error = unanswered(&self.records.path_of(key));
            tracing::error!(pod = %named(key), %error, "{what}; it goes on");
        }
    }

    fn note(&mut self, task: &Task, done: io::Result<()>, now: Instant) {
        let (key, what) = (task.key(), task.failure());
        let before = self.failed.remove(key);
        let Err(error) = done else {
            if before.is_some() {
                tracing::info!(pod = %named(key), "other nodes are told");
            }
            return;
        };
        let why = error.to_string();
        let is_new = before
            .as_ref()
            .is_none_or(|before| (before.what, &before.why) != (what, &why));
        if is_new {
            tracing::error!(pod = %named(key), error = %why, "{what}; it is tried again");
        }
        let wait = before.map_or(FIRST_RETRY, |before| (before.wait * 2).min(MAX_RETRY));
        let failure = Failure {
            what,
            why,
            wait,
            retry_at: now + wait,
        };
        self.failed.insert(key.clone(), failure);
    }
}

impl Task {
    fn key(&self) -> &PodKey {
        match self {
            Self::Write(key, _) | Self::Remove(key) => key,
        }
    }

    /// The consequence if it fails.
    fn failure(&self) -> &'static str {
        match self {
            Self::Write(..) => NOT_WRITTEN,
            Self::Remove(_) => NOT_REMOVED,
        }
    }

    /// Does it. Takes as long as the disk does.
    fn run(&self, records: &EnrolmentRecords) -> io::Result<()> {
        match self {
            Self::Write(_, pod) => records.write(pod),
            Self::Remove(key) => records.remove(key),
        }
    }
}

impl Failure {
    fn told(&self) -> String {
        format!("{}: {}", self.what, self.why)
    }
}

fn removes(running: &Option<Running>, pod: &PodKey) -> bool {
    running
        .as_ref()
        .is_some_and(|running| matches!(&running.task, Task::Remove(key) if key == pod))
}

fn named(key: &PodKey) -> String {
    format!("{}/{}", key.namespace, key.name)
}

#[cfg(test)]
mod tests;

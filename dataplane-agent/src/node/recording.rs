//! Writes the records of enrolled pods: one for each pod of this node that is served, and no others. A
//! failure is logged once, and retried at growing intervals.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::control::enrolled::{EnrolmentRecords, RecordsSnapshot};
use crate::control::manifests::{LocalPodSpec, PodKey};

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
    /// This node's records: those in `said`, with what was written and removed since.
    own: BTreeSet<PodKey>,
    /// Those of them that do not name this machine.
    unsigned: BTreeSet<PodKey>,
    /// Records that could not be written or removed.
    failed: BTreeMap<PodKey, Failure>,
}

#[derive(Debug)]
struct Failure {
    what: &'static str,
    why: String,
    wait: Duration,
    retry_at: Instant,
}

const NOT_WRITTEN: &str = "other nodes cannot be told of it";
const NOT_REMOVED: &str = "other nodes cannot be told that it leaves";

impl RecordWriter {
    /// Creates a writer that knows of no record yet.
    pub fn new(records: EnrolmentRecords) -> Self {
        Self {
            records,
            said: Arc::default(),
            own: BTreeSet::new(),
            unsigned: BTreeSet::new(),
            failed: BTreeMap::new(),
        }
    }

    /// Takes a new snapshot of all records. One that was read while this node wrote or removed a record does not
    /// count for this node's own.
    pub fn set_snapshot(&mut self, said: &Arc<RecordsSnapshot>) {
        if !Arc::ptr_eq(said, &self.said) {
            self.said = Arc::clone(said);
            if said.writes == self.records.writes() {
                (self.own, self.unsigned) = (said.own.clone(), said.unsigned.clone());
            }
        }
    }

    /// Writes the records of `served` pods, and removes all others of this node for which `stays` is false.
    /// Returns true if any was written or removed.
    pub fn update(
        &mut self,
        served: &BTreeMap<PodKey, &LocalPodSpec>,
        stays: impl Fn(&PodKey) -> bool,
        now: Instant,
    ) -> bool {
        let own = &self.own;
        let is_written = |key: &PodKey| match own.contains(key) {
            true => !self.unsigned.contains(key),
            // The record of a node of the same name says the same; two that overwrite each other's would
            // never end.
            false => self.said.namesakes.contains(key),
        };
        let write: Vec<_> = served.iter().filter(|(key, _)| !is_written(key)).collect();
        let stays = |key: &PodKey| served.contains_key(key) || stays(key);
        let remove: Vec<PodKey> = own.iter().filter(|key| !stays(key)).cloned().collect();
        self.failed
            .retain(|key, _| !is_written(key) && served.contains_key(key) || remove.contains(key));
        let mut changed = false;
        for (key, pod) in write {
            if self.may_retry(key, now) {
                let written = self.records.write(pod);
                if written.is_ok() {
                    changed = true;
                    self.own.insert(key.clone());
                    self.unsigned.remove(key);
                }
                self.note(key, NOT_WRITTEN, written, now);
            }
        }
        for key in &remove {
            if self.may_retry(key, now) {
                let removed = self.records.remove(key);
                if removed.is_ok() {
                    changed = true;
                    self.own.remove(key);
                }
                self.note(key, NOT_REMOVED, removed, now);
            }
        }
        changed
    }

    /// Returns why the record of a pod could not be written.
    pub fn write_failure(&self, pod: &PodKey) -> Option<String> {
        let failure = self.failed.get(pod)?;
        (failure.what == NOT_WRITTEN).then(|| failure.told())
    }

    /// Returns one line for each record that could not be written or removed.
    pub fn problems(&self) -> impl Iterator<Item = String> {
        let failed = self.failed.iter();
        failed.map(|(key, failure)| format!("Pod {}: {}", named(key), failure.told()))
    }

    fn may_retry(&self, key: &PodKey, now: Instant) -> bool {
        self.failed
            .get(key)
            .is_none_or(|failure| failure.retry_at <= now)
    }

    fn note(&mut self, key: &PodKey, what: &'static str, done: io::Result<()>, now: Instant) {
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

impl Failure {
    fn told(&self) -> String {
        format!("{}: {}", self.what, self.why)
    }
}

fn named(key: &PodKey) -> String {
    format!("{}/{}", key.namespace, key.name)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;
    use std::time::SystemTime;

    use super::*;
    use crate::control::enrolled::tests::{self, key_of, pod};
    use crate::control::recorded::RecordReader;

    /// The writer of node `one`, and a reader.
    struct WriterAndReader {
        recording: RecordWriter,
        recorded: RecordReader,
    }

    impl WriterAndReader {
        fn of(state: &Path) -> Self {
            let records = tests::records(state, "one");
            Self {
                recorded: RecordReader::new(records.clone()).expect("no record yet"),
                recording: RecordWriter::new(records),
            }
        }

        fn update(&mut self, served: &[(&PodKey, &LocalPodSpec)], now: Instant) {
            self.recording.set_snapshot(self.recorded.said());
            let served = served.iter().map(|(key, pod)| ((*key).clone(), *pod));
            if self.recording.update(&served.collect(), |_| false, now) {
                self.recorded.look_at(SystemTime::now());
            }
        }
    }

    #[test]
    fn what_cannot_be_written_is_told_and_tried_again_less_and_less_often() {
        let state = tempfile::tempdir().expect("a folder");
        let mut both = WriterAndReader::of(state.path());
        let (key, pod) = (key_of("a", ""), pod("a", ""));
        let served = [(&key, &pod)];
        let begin = Instant::now();
        let at = |seconds| begin + Duration::from_secs(seconds);
        // A folder where the temporary file would be made.
        let in_the_way = both.recording.records.unfinished();
        fs::create_dir(&in_the_way).expect("a folder");
        both.update(&served, at(0));
        let why = both
            .recording
            .write_failure(&key)
            .expect("it is not written");
        assert!(
            why.contains("enrolled/ns.a.json: ") && why.contains("os error"),
            "{why}"
        );
        let mut problems = both.recording.problems();
        assert!(problems.any(|problem| problem.contains("Pod ns/a: ")));
        drop(problems);
        both.update(&served, at(1));
        fs::remove_dir(&in_the_way).expect("a folder");
        both.update(&served, at(2));
        assert!(
            both.recording.write_failure(&key).is_some(),
            "it waits twice as long"
        );
        both.update(&served, at(3));
        assert_eq!(both.recording.write_failure(&key), None);
        assert!(both.recorded.enrolled().contains(&key));
    }

    #[test]
    fn records_that_were_read_before_one_was_removed_do_not_say_that_it_is_there() {
        let state = tempfile::tempdir().expect("a folder");
        let mut both = WriterAndReader::of(state.path());
        let (key, pod) = (key_of("a", ""), pod("a", ""));
        let (served, now) = (BTreeMap::from([(key.clone(), &pod)]), Instant::now());
        both.update(&[(&key, &pod)], now);
        let stale = Arc::clone(both.recorded.said());
        let mut update = |served| both.recording.update(served, |_| false, now);
        assert!(update(&BTreeMap::new()));
        // A look that had begun before.
        both.recording
            .set_snapshot(&Arc::new(RecordsSnapshot::clone(&stale)));
        let mut update = |served| both.recording.update(served, |_| false, now);
        assert!(update(&served), "it is written again");
        assert!(both.recording.records.path_of(&key).exists());
    }

    #[test]
    fn who_leaves_before_its_record_was_written_is_no_problem_any_more() {
        let state = tempfile::tempdir().expect("a folder");
        let mut both = WriterAndReader::of(state.path());
        let (key, pod) = (key_of("a", ""), pod("a", ""));
        fs::create_dir(both.recording.records.unfinished()).expect("a folder");
        both.update(&[(&key, &pod)], Instant::now());
        assert_eq!(both.recording.problems().count(), 1);
        both.update(&[], Instant::now());
        assert_eq!(both.recording.problems().count(), 0);
    }

    #[test]
    fn records_of_the_same_node_on_another_machine_stay_and_are_a_problem() {
        let state = tempfile::tempdir().expect("a folder");
        let there = tests::of_machine(state.path(), "one", "there");
        there.write(&pod("a", "1")).expect("a record");
        let mut both = WriterAndReader::of(state.path());
        let (key, pod) = (key_of("a", "1"), pod("a", "1"));
        both.update(&[], Instant::now());
        assert!(
            both.recorded.enrolled().contains(&key),
            "it is not dialled in clear"
        );
        let problems = both.recorded.problems();
        assert!(
            problems.len() == 1
                && problems[0].contains("enrolled/ns.a.json: a node of this name wrote it"),
            "{problems:?}"
        );
        // The owner of the record does not alternate.
        both.update(&[(&key, &pod)], Instant::now());
        assert_eq!(both.recording.write_failure(&key), None);
        assert!(there.read().expect("records").own.contains(&key));
    }

    #[test]
    fn a_record_that_names_no_machine_is_written_anew() {
        let state = tempfile::tempdir().expect("a folder");
        drop(tests::records(state.path(), "one"));
        let text = r#"{"namespace":"ns","name":"a","uid":"","node":"one","addresses":[]}"#;
        fs::write(state.path().join("enrolled/ns.a.json"), text).expect("a file");
        let mut both = WriterAndReader::of(state.path());
        let (key, pod) = (key_of("a", ""), pod("a", ""));
        both.update(&[(&key, &pod)], Instant::now());
        let said = both.recorded.said();
        assert!(
            said.own.contains(&key) && said.unsigned.is_empty(),
            "{said:?}"
        );
        assert_eq!(both.recorded.problems(), [""; 0]);
    }

    #[test]
    fn what_was_written_is_not_written_again_before_it_is_read() {
        let state = tempfile::tempdir().expect("a folder");
        let mut both = WriterAndReader::of(state.path());
        let (key, pod) = (key_of("a", ""), pod("a", ""));
        let served = BTreeMap::from([(key, &pod)]);
        let mut update = |served: &_| both.recording.update(served, |_| false, Instant::now());
        assert!(update(&served) && !update(&served));
        assert!(update(&BTreeMap::new()) && !update(&BTreeMap::new()));
    }
}

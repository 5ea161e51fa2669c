//! Keeps the records of enrolled pods true: one for each pod of this node that is served, and none for
//! another. What could not be written or removed is told once, and tried again less and less often.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::time::{Duration, SystemTime};

use tokio::time::Instant;

use super::enrolled::{Enrolled, Records, Said};
use super::manifests::{LocalPodSpec, PodKey, Stale};

/// What did not work is tried again after this time,
const FIRST: Duration = Duration::from_secs(1);
/// and after twice as long each time that it fails again, up to this.
const LONGEST: Duration = Duration::from_secs(30);

/// A folder that was changed since so long may be changed again without showing it: clocks of file systems
/// are coarse.
const COARSE: Duration = Duration::from_secs(2);
/// How often records are read of which nothing tells that they have changed: one may be written in place.
const SLOW: Duration = Duration::from_secs(10);

/// The records, and what is not as it should be with them.
#[derive(Debug)]
pub struct Recording {
    records: Records,
    /// The pods of all nodes, as they could be read last.
    enrolled: Enrolled,
    /// Since when they had not changed as they were read last, and when that was; none if that is to be
    /// done again whatever the folder looks like.
    read: Option<(SystemTime, Instant)>,
    /// Whether none of them can be read now.
    away: bool,
    /// What of them cannot be read now, and why.
    unread: Vec<String>,
    /// Of which namespaces that is another, since it was last asked for.
    stale: Stale,
    /// Those of this node, as they could be read last,
    own: BTreeSet<PodKey>,
    /// those of them that do not say its machine,
    unsigned: BTreeSet<PodKey>,
    /// and those of its name of another machine.
    namesakes: BTreeSet<PodKey>,
    /// What could not be written, or removed.
    failed: BTreeMap<PodKey, Failure>,
}

#[derive(Debug)]
struct Failure {
    what: &'static str,
    why: String,
    wait: Duration,
    again: Instant,
}

const NOT_WRITTEN: &str = "other nodes cannot be told of it";
const NOT_REMOVED: &str = "other nodes cannot be told that it leaves";

impl Recording {
    /// Reads the records for the first time.
    ///
    /// # Errors
    /// Their folder cannot be read.
    pub fn new(records: Records) -> io::Result<Self> {
        let said = records.read()?;
        let mut new = Self {
            enrolled: Enrolled::default(),
            stale: Stale::all(),
            own: BTreeSet::new(),
            unsigned: BTreeSet::new(),
            namesakes: BTreeSet::new(),
            records,
            read: None,
            away: false,
            unread: Vec::new(),
            failed: BTreeMap::new(),
        };
        new.hear(said);
        Ok(new)
    }

    /// The enrolled pods of all nodes; the last that could be read, if they cannot be now.
    pub fn enrolled(&self) -> &Enrolled {
        &self.enrolled
    }

    /// Of which namespaces [`Recording::enrolled`] is another than when this was last asked.
    pub fn stale(&mut self) -> Stale {
        std::mem::take(&mut self.stale)
    }

    /// Whether the state that nodes share cannot be read now: of what other nodes say since nothing is known.
    pub fn is_away(&self) -> bool {
        self.away
    }

    /// Reads what is recorded now.
    pub fn look(&mut self) {
        let changed = self.records.changed();
        if let (Ok(changed), Some((as_read, when))) = (&changed, self.read)
            && *changed == as_read
            && when.elapsed() < SLOW
        {
            return;
        }
        let said = self.records.read();
        self.away = said.is_err();
        let is_settled = |at: &SystemTime| at.elapsed().is_ok_and(|age| age > COARSE);
        let whole = said.as_ref().is_ok_and(|said| said.problems.is_empty());
        self.read = match changed {
            Ok(at) if whole && is_settled(&at) => Some((at, Instant::now())),
            _ => None,
        };
        match said {
            Ok(said) => self.hear(said),
            Err(error) => self.tell(vec![format!("{error}; what they said last holds")]),
        }
    }

    fn hear(&mut self, said: Said) {
        let Said {
            enrolled,
            own,
            unsigned,
            namesakes,
            mut problems,
        } = said;
        if let Some(some) = namesakes.first() {
            problems.push(format!(
                "{}: a node of this name wrote it on another machine, and {} others: they stay; give one of \
                 the two another --node, or, if this machine was another one before (/etc/machine-id and \
                 the firmware's serial numbers say so), remove them",
                self.records.path_of(some).display(),
                namesakes.len() - 1,
            ));
        }
        enrolled.differ(&self.enrolled, &mut self.stale);
        self.enrolled = enrolled;
        (self.own, self.unsigned, self.namesakes) = (own, unsigned, namesakes);
        self.tell(problems);
    }

    fn tell(&mut self, unread: Vec<String>) {
        let unread = unread.into_iter();
        let told = unread.map(|problem| format!("records of enrolled pods: {problem}"));
        let told: Vec<String> = told.collect();
        for problem in told.iter().filter(|problem| !self.unread.contains(problem)) {
            tracing::warn!("{problem}");
        }
        self.unread = told;
    }

    /// Writes the records of pods that are served, and removes those of all others that need not stay.
    pub fn update(
        &mut self,
        served: &BTreeMap<PodKey, &LocalPodSpec>,
        stays: impl Fn(&PodKey) -> bool,
        now: Instant,
    ) {
        let own = &self.own;
        let is_written = |key: &PodKey| match own.contains(key) {
            true => !self.unsigned.contains(key),
            // It says the same, and two that write over each other never end.
            false => self.namesakes.contains(key),
        };
        let write: Vec<_> = served.iter().filter(|(key, _)| !is_written(key)).collect();
        let stays = |key: &PodKey| served.contains_key(key) || stays(key);
        let remove: Vec<PodKey> = own.iter().filter(|key| !stays(key)).cloned().collect();
        self.failed
            .retain(|key, _| !is_written(key) && served.contains_key(key) || remove.contains(key));
        let mut changed = false;
        for (key, pod) in write {
            if self.is_due(key, now) {
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
            if self.is_due(key, now) {
                let removed = self.records.remove(key);
                if removed.is_ok() {
                    changed = true;
                    self.own.remove(key);
                }
                self.note(key, NOT_REMOVED, removed, now);
            }
        }
        if changed {
            self.look();
        }
    }

    /// Why a pod that is served has no record, if that is so.
    pub fn why_not(&self, pod: &PodKey) -> Option<String> {
        let failure = self.failed.get(pod)?;
        (failure.what == NOT_WRITTEN).then(|| failure.told())
    }

    /// What is wrong now.
    pub fn problems(&self) -> impl Iterator<Item = String> {
        let failed = self.failed.iter();
        let failed = failed.map(|(key, failure)| format!("Pod {}: {}", named(key), failure.told()));
        self.unread.iter().cloned().chain(failed)
    }

    fn is_due(&self, key: &PodKey, now: Instant) -> bool {
        self.failed
            .get(key)
            .is_none_or(|failure| failure.again <= now)
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
        let wait = before.map_or(FIRST, |before| (before.wait * 2).min(LONGEST));
        let failure = Failure {
            what,
            why,
            wait,
            again: now + wait,
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

    use super::super::enrolled::tests::{self, key_of, pod};
    use super::*;

    fn recording(state: &Path) -> Recording {
        Recording::new(tests::records(state, "one")).expect("no record yet")
    }

    #[test]
    fn what_cannot_be_written_is_told_and_tried_again_less_and_less_often() {
        let state = tempfile::tempdir().expect("a folder");
        let mut recording = recording(state.path());
        let (key, pod) = (key_of("a", ""), pod("a", ""));
        let served = BTreeMap::from([(key.clone(), &pod)]);
        let begin = Instant::now();
        let at = |seconds| begin + Duration::from_secs(seconds);
        // Where the file would be made.
        let in_the_way = recording.records.unfinished();
        fs::create_dir(&in_the_way).expect("a folder");
        recording.update(&served, |_| false, at(0));
        let why = recording.why_not(&key).expect("it is not written");
        assert!(
            why.contains("enrolled/ns.a.json: ") && why.contains("os error"),
            "{why}"
        );
        assert!(
            recording
                .problems()
                .any(|problem| problem.contains("Pod ns/a: "))
        );
        recording.update(&served, |_| false, at(1));
        fs::remove_dir(&in_the_way).expect("a folder");
        recording.update(&served, |_| false, at(2));
        assert!(recording.why_not(&key).is_some(), "it waits twice as long");
        recording.update(&served, |_| false, at(3));
        assert_eq!(recording.why_not(&key), None);
        assert!(recording.enrolled().contains(&key));
    }

    #[test]
    fn who_leaves_before_its_record_was_written_is_no_problem_any_more() {
        let state = tempfile::tempdir().expect("a folder");
        let mut recording = recording(state.path());
        let (key, pod) = (key_of("a", ""), pod("a", ""));
        fs::create_dir(recording.records.unfinished()).expect("a folder");
        let served = BTreeMap::from([(key, &pod)]);
        recording.update(&served, |_| false, Instant::now());
        assert_eq!(recording.problems().count(), 1);
        recording.update(&BTreeMap::new(), |_| false, Instant::now());
        assert_eq!(recording.problems().count(), 0);
    }

    #[test]
    fn a_record_that_cannot_be_read_hides_no_other_and_its_pod_counts_as_enrolled() {
        let state = tempfile::tempdir().expect("a folder");
        let two = tests::records(state.path(), "two");
        two.write(&pod("a", "1")).expect("a record");
        let bad = state.path().join("enrolled/ns.bad.json");
        fs::write(&bad, "{").expect("a file");
        // At a start as later.
        let mut recording = recording(state.path());
        two.write(&pod("b", "2")).expect("a record");
        recording.look();
        for (name, uid) in [("a", "1"), ("b", "2"), ("bad", "3"), ("bad", "")] {
            assert!(
                recording.enrolled().contains(&key_of(name, uid)),
                "{name} {uid}"
            );
        }
        assert!(!recording.enrolled().contains(&key_of("a", "2")));
        let problems: Vec<String> = recording.problems().collect();
        assert!(
            problems.len() == 1 && problems[0].contains("enrolled/ns.bad.json: EOF"),
            "{problems:?}"
        );
        two.write(&pod("bad", "3")).expect("a record");
        recording.look();
        assert!(recording.enrolled().contains(&key_of("bad", "3")));
        assert!(!recording.enrolled().contains(&key_of("bad", "")));
        assert_eq!(recording.problems().count(), 0);
    }

    #[test]
    fn records_of_the_same_node_on_another_machine_stay_and_are_a_problem() {
        let state = tempfile::tempdir().expect("a folder");
        let there = tests::of_machine(state.path(), "one", "there");
        there.write(&pod("a", "1")).expect("a record");
        let mut here = recording(state.path());
        let (key, pod) = (key_of("a", "1"), pod("a", "1"));
        here.update(&BTreeMap::new(), |_| false, Instant::now());
        assert!(here.enrolled().contains(&key), "it is not dialled in clear");
        let problems: Vec<String> = here.problems().collect();
        assert!(
            problems.len() == 1
                && problems[0].contains("enrolled/ns.a.json: a node of this name wrote it"),
            "{problems:?}"
        );
        // Whose it is does not go to and fro.
        here.update(
            &BTreeMap::from([(key.clone(), &pod)]),
            |_| false,
            Instant::now(),
        );
        assert_eq!(here.why_not(&key), None);
        assert!(there.read().expect("records").own.contains(&key));
    }

    #[test]
    fn a_record_that_names_no_machine_is_written_anew() {
        let state = tempfile::tempdir().expect("a folder");
        let mut here = recording(state.path());
        let text = r#"{"namespace":"ns","name":"a","uid":"","node":"one","addresses":[]}"#;
        fs::write(state.path().join("enrolled/ns.a.json"), text).expect("a file");
        let (key, pod) = (key_of("a", ""), pod("a", ""));
        here.update(
            &BTreeMap::from([(key.clone(), &pod)]),
            |_| false,
            Instant::now(),
        );
        let said = here.records.read().expect("records");
        assert!(
            said.own.contains(&key) && said.unsigned.is_empty(),
            "{said:?}"
        );
        assert_eq!(here.problems().count(), 0);
    }

    #[test]
    fn records_are_read_again_when_their_folder_has_changed() -> io::Result<()> {
        let state = tempfile::tempdir()?;
        let (mut recording, two) = (recording(state.path()), tests::records(state.path(), "two"));
        let folder = state.path().join("enrolled");
        let long_ago = SystemTime::now() - Duration::from_secs(3600);
        two.write(&pod("a", "1"))?;
        fs::File::open(&folder)?.set_modified(long_ago)?;
        recording.look();
        assert!(recording.enrolled().contains(&key_of("a", "1")));
        fs::write(folder.join("ns.a.json"), "{")?;
        recording.look();
        assert_eq!(recording.problems().count(), 0, "it is not read again");
        two.write(&pod("b", "2"))?;
        recording.look();
        assert!(recording.enrolled().contains(&key_of("b", "2")));
        assert_eq!(recording.problems().count(), 1);
        // What is not whole is read at every look.
        fs::File::open(&folder)?.set_modified(long_ago)?;
        fs::remove_file(folder.join("ns.a.json"))?;
        fs::File::open(&folder)?.set_modified(long_ago)?;
        recording.look();
        assert_eq!(recording.problems().count(), 0);
        // What is away is told of at once.
        recording.look();
        fs::rename(&folder, state.path().join("away"))?;
        recording.look();
        assert!(recording.is_away());
        Ok(())
    }

    #[test]
    fn records_that_cannot_be_read_are_a_problem_and_the_last_ones_hold() {
        let state = tempfile::tempdir().expect("a folder");
        let mut recording = recording(state.path());
        let (key, pod) = (key_of("a", ""), pod("a", ""));
        let served = BTreeMap::from([(key.clone(), &pod)]);
        recording.update(&served, |_| false, Instant::now());
        assert!(recording.enrolled().contains(&key));
        fs::rename(state.path().join("enrolled"), state.path().join("away")).expect("a folder");
        recording.look();
        assert!(recording.enrolled().contains(&key) && recording.is_away());
        recording.update(&served, |_| false, Instant::now());
        assert_eq!(recording.why_not(&key), None, "it was told");
        let problems: Vec<String> = recording.problems().collect();
        assert!(
            problems[0].contains("what they said last holds"),
            "{problems:?}"
        );
    }
}

//! Reads the records of enrolled pods again when their folder has changed. If that fails, the last snapshot
//! stays in effect.

use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::time::Instant;

use super::enrolled::{Enrolled, EnrolmentRecords, RecordsSnapshot};
use super::manifests::Stale;

/// Age from which a folder's modification time can be trusted. A younger folder may change again with the
/// same time, since the clocks of file systems are coarse.
const MTIME_GRANULARITY: Duration = Duration::from_secs(2);
/// Interval at which records are read although their folder has not changed: one may be written in place.
const REREAD_INTERVAL: Duration = Duration::from_secs(10);

/// Reader of the records, with the last snapshot.
#[derive(Debug)]
pub struct RecordReader {
    records: EnrolmentRecords,
    said: Arc<RecordsSnapshot>,
    /// The modification time of the folder and the time of the last complete read. `None` if the records are
    /// to be read again whatever the folder's time is.
    read: Option<(SystemTime, Instant)>,
    /// True if the records cannot be read now.
    away: bool,
    /// Problems with the records, for `status`.
    problems: Vec<String>,
    /// Namespaces whose enrolled pods have changed since the last call of [`RecordReader::stale`].
    stale: Stale,
}

impl RecordReader {
    /// Reads the records for the first time.
    ///
    /// # Errors
    /// The folder cannot be read.
    pub fn new(records: EnrolmentRecords) -> io::Result<Self> {
        let said = records.read()?;
        let mut new = Self {
            records,
            said: Arc::default(),
            read: None,
            away: false,
            problems: Vec::new(),
            stale: Stale::all(),
        };
        new.accept(said);
        Ok(new)
    }

    /// The last snapshot that could be read.
    pub fn said(&self) -> &Arc<RecordsSnapshot> {
        &self.said
    }

    /// The enrolled pods of all nodes.
    pub fn enrolled(&self) -> &Enrolled {
        &self.said.enrolled
    }

    /// Takes the namespaces in which [`RecordReader::enrolled`] has changed since the last call.
    pub fn stale(&mut self) -> Stale {
        std::mem::take(&mut self.stale)
    }

    /// Returns true if the shared state cannot be read now. Changes by other nodes are unknown meanwhile.
    pub fn is_away(&self) -> bool {
        self.away
    }

    /// The problems with the records.
    pub fn problems(&self) -> &[String] {
        &self.problems
    }

    /// Reads the records again if they may have changed.
    pub fn look(&mut self) {
        let changed = self.records.changed();
        if let (Ok(changed), Some((as_read, when))) = (&changed, self.read)
            && *changed == as_read
            && when.elapsed() < REREAD_INTERVAL
        {
            return;
        }
        let said = self.records.read();
        self.away = said.is_err();
        let is_settled = |at: &SystemTime| at.elapsed().is_ok_and(|age| age > MTIME_GRANULARITY);
        let whole = said.as_ref().is_ok_and(|said| said.problems.is_empty());
        self.read = match changed {
            Ok(at) if whole && is_settled(&at) => Some((at, Instant::now())),
            _ => None,
        };
        match said {
            Ok(said) => self.accept(said),
            Err(error) => self.set_problems(vec![format!("{error}; what they said last holds")]),
        }
    }

    fn accept(&mut self, said: RecordsSnapshot) {
        let mut problems = said.problems.clone();
        if let Some(some) = said.namesakes.first() {
            problems.push(format!(
                "{}: a node of this name wrote it on another machine, and {} others: they stay; give one of \
                 the two another --node, or, if this machine was another one before (/etc/machine-id and \
                 the firmware's serial numbers say so), remove them",
                self.records.path_of(some).display(),
                said.namesakes.len() - 1,
            ));
        }
        said.enrolled.differ(&self.said.enrolled, &mut self.stale);
        if said != *self.said {
            self.said = Arc::new(said);
        }
        self.set_problems(problems);
    }

    fn set_problems(&mut self, problems: Vec<String>) {
        let problems = problems.into_iter();
        let told = problems.map(|problem| format!("records of enrolled pods: {problem}"));
        let told: Vec<String> = told.collect();
        for problem in told
            .iter()
            .filter(|problem| !self.problems.contains(problem))
        {
            tracing::warn!("{problem}");
        }
        self.problems = told;
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::super::enrolled::tests::{self, key_of, pod};
    use super::*;

    fn recorded(state: &Path) -> RecordReader {
        RecordReader::new(tests::records(state, "one")).expect("a folder")
    }

    #[test]
    fn a_record_that_cannot_be_read_hides_no_other_and_its_pod_counts_as_enrolled() {
        let state = tempfile::tempdir().expect("a folder");
        let two = tests::records(state.path(), "two");
        two.write(&pod("a", "1")).expect("a record");
        let bad = state.path().join("enrolled/ns.bad.json");
        fs::write(&bad, "{").expect("a file");
        // The same at a start as later.
        let mut recorded = recorded(state.path());
        two.write(&pod("b", "2")).expect("a record");
        recorded.look();
        for (name, uid) in [("a", "1"), ("b", "2"), ("bad", "3"), ("bad", "")] {
            assert!(
                recorded.enrolled().contains(&key_of(name, uid)),
                "{name} {uid}"
            );
        }
        assert!(!recorded.enrolled().contains(&key_of("a", "2")));
        let problems = recorded.problems();
        assert!(
            problems.len() == 1 && problems[0].contains("enrolled/ns.bad.json: EOF"),
            "{problems:?}"
        );
        two.write(&pod("bad", "3")).expect("a record");
        recorded.look();
        assert!(recorded.enrolled().contains(&key_of("bad", "3")));
        assert!(!recorded.enrolled().contains(&key_of("bad", "")));
        assert_eq!(recorded.problems(), [""; 0]);
    }

    #[test]
    fn records_are_read_again_when_their_folder_has_changed() -> io::Result<()> {
        let state = tempfile::tempdir()?;
        let (mut recorded, two) = (recorded(state.path()), tests::records(state.path(), "two"));
        let folder = state.path().join("enrolled");
        let long_ago = SystemTime::now() - Duration::from_secs(3600);
        two.write(&pod("a", "1"))?;
        fs::File::open(&folder)?.set_modified(long_ago)?;
        recorded.look();
        assert!(recorded.enrolled().contains(&key_of("a", "1")));
        fs::write(folder.join("ns.a.json"), "{")?;
        recorded.look();
        assert_eq!(recorded.problems(), [""; 0], "it is not read again");
        two.write(&pod("b", "2"))?;
        recorded.look();
        assert!(recorded.enrolled().contains(&key_of("b", "2")));
        assert_eq!(recorded.problems().len(), 1);
        // Incomplete reads are repeated at every look.
        fs::File::open(&folder)?.set_modified(long_ago)?;
        fs::remove_file(folder.join("ns.a.json"))?;
        fs::File::open(&folder)?.set_modified(long_ago)?;
        recorded.look();
        assert_eq!(recorded.problems(), [""; 0]);
        // A missing state is reported at once.
        recorded.look();
        fs::rename(&folder, state.path().join("away"))?;
        recorded.look();
        assert!(recorded.is_away());
        Ok(())
    }

    #[test]
    fn records_that_cannot_be_read_are_a_problem_and_the_last_ones_hold() {
        let state = tempfile::tempdir().expect("a folder");
        let two = tests::records(state.path(), "two");
        two.write(&pod("a", "")).expect("a record");
        let mut recorded = recorded(state.path());
        let key = key_of("a", "");
        fs::rename(state.path().join("enrolled"), state.path().join("away")).expect("a folder");
        recorded.look();
        assert!(recorded.enrolled().contains(&key) && recorded.is_away());
        let problems = recorded.problems();
        assert!(
            problems[0].contains("what they said last holds"),
            "{problems:?}"
        );
    }
}

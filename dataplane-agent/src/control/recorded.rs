//! Follows the records of enrolled pods. They are read on a thread of their own, since the folder may be large
//! or on a slow disk. If that fails, the last snapshot stays in effect.

use std::future::pending;
use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout_at};

use super::disk::SLOW_DISK;
use super::enrolled::{Enrolled, EnrolmentRecords, RecordsSnapshot};
use super::manifests::Stale;
use super::problems;
use super::record_cache::{Change, RecordCache};
use crate::drain;

/// Time after which the state counts as away, if a look has not ended. The look goes on.
const LOOK_TIMEOUT: Duration = Duration::from_secs(30);

/// Reader of the records, with the last snapshot.
#[derive(Debug)]
pub struct RecordReader {
    records: EnrolmentRecords,
    /// `None` while a look uses it.
    cache: Option<RecordCache>,
    look: Option<Look>,
    said: Arc<RecordsSnapshot>,
    /// True if the records cannot be read now.
    away: bool,
    /// Problems with the records, for `status`.
    problems: Vec<String>,
    /// Namespaces whose enrolled pods have changed since the last call of [`RecordReader::stale`].
    stale: Stale,
}

/// A look that is running.
#[derive(Debug)]
struct Look {
    found: JoinHandle<(RecordCache, Found)>,
    /// The time of the next report: at first that it is slow, then that the state is away.
    report_at: Instant,
    /// True if it was reported that it is slow.
    slow: bool,
    /// True if another look is to follow: this one may have missed what has changed since it began.
    again: bool,
}

type Found = io::Result<Option<Change>>;

impl RecordReader {
    /// Reads the records for the first time.
    ///
    /// # Errors
    /// The folder cannot be read.
    pub fn new(records: EnrolmentRecords) -> io::Result<Self> {
        let mut cache = RecordCache::new(records.clone());
        cache.look(SystemTime::now())?;
        let mut new = Self {
            records,
            said: Arc::clone(cache.said()),
            cache: Some(cache),
            look: None,
            away: false,
            problems: Vec::new(),
            stale: Stale::all(),
        };
        new.set_problems(new.found_problems());
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

    /// Starts a look at the records, or one more after the look that is running. [`RecordReader::looked`] takes
    /// the result.
    pub fn look(&mut self) {
        if let Some(look) = &mut self.look {
            look.again = true;
        } else if let Some(mut cache) = self.cache.take() {
            let look = move || {
                let found = cache.look(SystemTime::now());
                (cache, found)
            };
            self.look = Some(Look {
                found: drain::spawn_blocking(look),
                report_at: Instant::now() + SLOW_DISK,
                slow: false,
                again: false,
            });
        }
    }

    /// Waits until the running look ends, and takes its result; or until it has taken too long. Waits for ever if
    /// no look is running. Cancelling the wait loses nothing.
    pub async fn looked(&mut self) {
        let Some(look) = &mut self.look else {
            return pending().await;
        };
        match timeout_at(look.report_at, drain::finished(&mut look.found)).await {
            Ok((cache, found)) => {
                let again = look.again;
                (self.cache, self.look) = (Some(cache), None);
                self.accept(found);
                if again {
                    self.look();
                }
            }
            Err(_) if !look.slow => {
                look.slow = true;
                look.report_at += LOOK_TIMEOUT - SLOW_DISK;
                let mut problems = self.found_problems();
                problems.push(self.is_read_for(SLOW_DISK));
                self.set_problems(problems);
            }
            Err(_) => {
                look.report_at = Instant::now() + LOOK_TIMEOUT;
                self.accept(Err(io::Error::other(self.is_read_for(LOOK_TIMEOUT))));
            }
        }
    }

    fn is_read_for(&self, long: Duration) -> String {
        let folder = self.records.folder().display();
        format!("{folder}: has been read for longer than {long:?}")
    }

    fn accept(&mut self, found: Found) {
        self.away = found.is_err();
        match found {
            Ok(change) => {
                if let Some(change) = change {
                    self.said = change.said;
                    self.stale.add(change.stale);
                }
                self.set_problems(self.found_problems());
            }
            Err(error) => {
                let mut problems = self.found_problems();
                problems.push(format!("{error}; what they said last holds"));
                self.set_problems(problems);
            }
        }
    }

    /// Returns the problems with the last snapshot.
    fn found_problems(&self) -> Vec<String> {
        let mut wrong = self.said.problems.clone();
        if let Some(some) = self.said.namesakes.first() {
            wrong.push(format!(
                "{}: a node of this name wrote it on another machine, and {} others: they stay; give one of \
                 the two another --node, or, if this machine was another one before (/etc/machine-id and \
                 the firmware's serial numbers say so), remove them",
                self.records.path_of(some).display(),
                self.said.namesakes.len() - 1,
            ));
        }
        wrong
    }

    fn set_problems(&mut self, problems: Vec<String>) {
        let problems = problems.into_iter();
        let told = problems.map(|problem| format!("records of enrolled pods: {problem}"));
        problems::replace(&mut self.problems, told.collect(), problems::warn);
    }
}

#[cfg(test)]
impl RecordReader {
    /// Looks at the records as if at this time, and takes the result.
    pub(crate) fn look_at(&mut self, now: SystemTime) {
        let found = self.cache.as_mut().expect("nobody looks").look(now);
        self.accept(found);
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

    fn in_seconds(seconds: u64) -> SystemTime {
        SystemTime::now() + Duration::from_secs(seconds)
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
        recorded.look_at(SystemTime::now());
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
        recorded.look_at(SystemTime::now());
        assert!(recorded.enrolled().contains(&key_of("bad", "3")));
        assert!(!recorded.enrolled().contains(&key_of("bad", "")));
        assert_eq!(recorded.problems(), [""; 0]);
    }

    #[test]
    fn records_are_looked_at_when_their_folder_has_changed_and_now_and_then() -> io::Result<()> {
        let state = tempfile::tempdir()?;
        let (mut recorded, two) = (recorded(state.path()), tests::records(state.path(), "two"));
        let folder = state.path().join("enrolled");
        two.write(&pod("a", "1"))?;
        recorded.look_at(in_seconds(3));
        assert!(recorded.enrolled().contains(&key_of("a", "1")));
        fs::write(folder.join("ns.a.json"), "{")?;
        recorded.look_at(in_seconds(12));
        assert_eq!(recorded.problems(), [""; 0], "nothing tells of it");
        recorded.look_at(in_seconds(14));
        assert_eq!(recorded.problems().len(), 1);
        // An incomplete snapshot is looked at each time.
        two.write(&pod("a", "1"))?;
        recorded.look_at(in_seconds(15));
        assert_eq!(recorded.problems(), [""; 0]);
        // A missing state is reported at once.
        recorded.look_at(in_seconds(16));
        fs::rename(&folder, state.path().join("away"))?;
        recorded.look_at(in_seconds(17));
        assert!(recorded.is_away());
        Ok(())
    }

    #[tokio::test]
    async fn a_look_that_does_not_end_is_told_of_and_keeps_nobody_waiting() -> io::Result<()> {
        let state = tempfile::tempdir()?;
        tests::records(state.path(), "two").write(&pod("a", "1"))?;
        let mut recorded = recorded(state.path());
        let (answer, waits) = std::sync::mpsc::channel();
        let mut cache = recorded.cache.take().expect("nobody looks");
        recorded.look = Some(Look {
            found: drain::spawn_blocking(move || {
                waits.recv().expect("an answer");
                let found = cache.look(SystemTime::now());
                (cache, found)
            }),
            report_at: Instant::now(),
            slow: false,
            again: false,
        });
        for (long, away) in [("5s", false), ("30s", true)] {
            recorded.look.as_mut().expect("it looks").report_at = Instant::now();
            recorded.looked().await;
            assert!(recorded.enrolled().contains(&key_of("a", "1")));
            assert_eq!(recorded.is_away(), away);
            let problems = recorded.problems().to_vec();
            let told = format!("enrolled: has been read for longer than {long}");
            assert!(
                problems.len() == 1 && problems[0].contains(&told),
                "{problems:?}"
            );
        }
        recorded.look();
        answer.send(()).expect("it waits");
        recorded.looked().await;
        assert!(
            !recorded.is_away() && recorded.look.is_some(),
            "as asked meanwhile"
        );
        recorded.looked().await;
        assert_eq!(recorded.problems(), [""; 0]);
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
        recorded.look_at(SystemTime::now());
        assert!(recorded.enrolled().contains(&key) && recorded.is_away());
        let problems = recorded.problems();
        assert!(
            problems[0].contains("what they said last holds"),
            "{problems:?}"
        );
    }
}

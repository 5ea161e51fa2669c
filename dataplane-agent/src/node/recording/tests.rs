use std::fs;
use std::path::Path;
use std::sync::mpsc;
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

    /// Decides, and waits until that is done.
    async fn step(&mut self, served: &[(&PodKey, &LocalPodSpec)], now: Instant) {
        self.decide(served, now);
        self.settle(now).await;
    }

    fn decide(&mut self, served: &[(&PodKey, &LocalPodSpec)], now: Instant) {
        let served = served.iter().map(|(key, pod)| ((*key).clone(), *pod));
        self.recording.update(&served.collect(), |_| false, now);
    }

    async fn settle(&mut self, now: Instant) {
        while let Some(running) = &mut self.recording.running {
            let done = (&mut running.done).await.expect("no panic");
            self.recording.accept(done, now);
        }
    }

    /// As [`WriterAndReader::step`], with the records as they are before, and they are read again.
    async fn update(&mut self, served: &[(&PodKey, &LocalPodSpec)], now: Instant) {
        self.recording.set_snapshot(self.recorded.said(), false);
        self.step(served, now).await;
        self.recorded.look_at(SystemTime::now());
    }

    /// Begins a task that ends only when the result is sent.
    fn hang(&mut self, task: Task, since: Instant) -> mpsc::Sender<io::Result<()>> {
        let (answer, waits) = mpsc::channel();
        self.recording.running = Some(Running {
            task,
            since,
            overdue: false,
            done: drain::spawn_blocking(move || waits.recv().unwrap_or(Ok(()))),
        });
        answer
    }
}

fn not_written(known: Known) -> String {
    match known {
        Known::No(why) => why,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn what_cannot_be_written_is_told_and_tried_again_less_and_less_often() {
    let state = tempfile::tempdir().expect("a folder");
    let mut both = WriterAndReader::of(state.path());
    let (key, pod) = (key_of("a", ""), pod("a", ""));
    let served = [(&key, &pod)];
    let begin = Instant::now();
    let at = |seconds| begin + Duration::from_secs(seconds);
    // A folder where the temporary file would be made.
    let in_the_way = both.recording.records.unfinished();
    fs::create_dir(&in_the_way).expect("a folder");
    both.update(&served, at(0)).await;
    let why = not_written(both.recording.known(&key));
    assert!(
        why.contains("enrolled/ns.a.json: ") && why.contains("os error"),
        "{why}"
    );
    let mut problems = both.recording.problems();
    assert!(problems.any(|problem| problem.contains("Pod ns/a: ")));
    drop(problems);
    both.update(&served, at(1)).await;
    fs::remove_dir(&in_the_way).expect("a folder");
    both.update(&served, at(2)).await;
    let known = both.recording.known(&key);
    assert!(matches!(known, Known::No(_)), "it waits twice as long");
    both.update(&served, at(3)).await;
    assert_eq!(both.recording.known(&key), Known::Yes);
    assert!(both.recorded.enrolled().contains(&key));
}

#[tokio::test]
async fn a_disk_that_does_not_answer_is_told_and_keeps_nobody_waiting() {
    let state = tempfile::tempdir().expect("a folder");
    let mut both = WriterAndReader::of(state.path());
    let [(a, of_a), (b, of_b)] = ["a", "b"].map(|name| (key_of(name, ""), pod(name, "")));
    let served = [(&a, &of_a), (&b, &of_b)];
    let begin = Instant::now();
    let answer = both.hang(Task::Write(a.clone(), of_a.clone()), begin);
    both.decide(&served, begin + SLOW_DISK / 2);
    let known = |both: &WriterAndReader| [&a, &b].map(|key| both.recording.known(key));
    assert_eq!(known(&both), [Known::NotYet, Known::NotYet]);
    assert_eq!(both.recording.problems().count(), 0);

    both.decide(&served, begin + SLOW_DISK);
    for why in known(&both).map(not_written) {
        let told = "enrolled/ns.a.json: the disk has not answered for longer than 5s";
        assert!(why.contains(told), "{why}");
    }
    let problems: Vec<String> = both.recording.problems().collect();
    assert!(
        problems.len() == 1 && problems[0].contains("ns.a.json: the disk has not answered for "),
        "{problems:?}"
    );
    answer.send(Ok(())).expect("it waits");
    both.settle(begin).await;
    assert_eq!(known(&both), [Known::Yes, Known::Yes]);
    assert_eq!(both.recording.problems().count(), 0);
}

#[tokio::test]
async fn who_leaves_stays_until_its_record_is_removed_or_that_has_failed() {
    let state = tempfile::tempdir().expect("a folder");
    let mut both = WriterAndReader::of(state.path());
    let (key, pod, now) = (key_of("a", ""), pod("a", ""), Instant::now());
    let holds = |both: &WriterAndReader| both.recording.holds("ns/a");
    both.step(&[(&key, &pod)], now).await;
    assert!(!holds(&both));
    both.decide(&[], now);
    assert!(holds(&both) && !both.recording.holds("ns/b"));
    both.settle(now).await;
    assert!(!holds(&both));

    let answer = both.hang(Task::Write(key.clone(), pod.clone()), now);
    both.decide(&[], now);
    assert!(holds(&both), "it may be written yet");
    answer.send(Ok(())).expect("it waits");
    both.settle(now).await;
    both.decide(&[], now);
    assert!(holds(&both), "and is removed then");
    both.settle(now).await;
    assert!(!holds(&both));

    both.step(&[(&key, &pod)], now).await;
    let record = both.recording.records.path_of(&key);
    fs::write(&record, "{").expect("a file");
    both.step(&[], now).await;
    assert!(!holds(&both) && both.recording.problems().count() == 1);
}

#[tokio::test]
async fn nothing_is_asked_of_a_state_that_is_away_and_it_holds_nobody() {
    let state = tempfile::tempdir().expect("a folder");
    let mut both = WriterAndReader::of(state.path());
    let (stays, leaves, now) = (key_of("a", ""), key_of("b", ""), Instant::now());
    let specs = [pod("a", ""), pod("b", "")];
    both.update(&[(&leaves, &specs[1])], now).await;
    let answer = both.hang(Task::Remove(key_of("c", "")), now);
    let writes = both.recording.records.writes();
    both.recording.set_snapshot(both.recorded.said(), true);
    both.decide(&[(&stays, &specs[0])], now);
    answer.send(Ok(())).expect("it waits");
    both.settle(now).await;
    both.decide(&[(&stays, &specs[0])], now);
    assert!(both.recording.is_settled());
    assert_eq!(both.recording.records.writes(), writes);
    assert!(!both.recording.holds("ns/b"));
    let why = not_written(both.recording.known(&stays));
    assert!(why.contains(AWAY), "{why}");
    let problems = both.recording.problems();
    assert!(
        problems
            .into_iter()
            .any(|problem| problem.contains("Pod ns/b: other nodes cannot be told that it leaves"))
    );

    both.recording.set_snapshot(both.recorded.said(), false);
    both.step(&[(&stays, &specs[0])], now + FIRST_RETRY).await;
    let read = both.recording.records.read().expect("records");
    assert_eq!(read.own, [stays].into());
}

#[tokio::test]
async fn records_that_were_read_before_one_was_removed_do_not_say_that_it_is_there() {
    let state = tempfile::tempdir().expect("a folder");
    let mut both = WriterAndReader::of(state.path());
    let (key, pod, now) = (key_of("a", ""), pod("a", ""), Instant::now());
    both.update(&[(&key, &pod)], now).await;
    let stale = Arc::clone(both.recorded.said());
    both.recording.set_snapshot(&stale, false);
    both.step(&[], now).await;
    let record = both.recording.records.path_of(&key);
    assert!(!record.exists());
    // A look that had begun before.
    both.recording
        .set_snapshot(&Arc::new(RecordsSnapshot::clone(&stale)), false);
    both.step(&[(&key, &pod)], now).await;
    assert!(record.exists(), "it is written again");
}

#[tokio::test]
async fn who_leaves_before_its_record_was_written_is_no_problem_any_more() {
    let state = tempfile::tempdir().expect("a folder");
    let mut both = WriterAndReader::of(state.path());
    let (key, pod) = (key_of("a", ""), pod("a", ""));
    fs::create_dir(both.recording.records.unfinished()).expect("a folder");
    both.update(&[(&key, &pod)], Instant::now()).await;
    assert_eq!(both.recording.problems().count(), 1);
    both.update(&[], Instant::now()).await;
    assert_eq!(both.recording.problems().count(), 0);
}

#[tokio::test]
async fn records_of_the_same_node_on_another_machine_stay_and_are_a_problem() {
    let state = tempfile::tempdir().expect("a folder");
    let there = tests::of_machine(state.path(), "one", "there");
    there.write(&pod("a", "1")).expect("a record");
    let mut both = WriterAndReader::of(state.path());
    let (key, pod) = (key_of("a", "1"), pod("a", "1"));
    both.update(&[], Instant::now()).await;
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
    both.update(&[(&key, &pod)], Instant::now()).await;
    assert_eq!(both.recording.known(&key), Known::Yes);
    assert!(there.read().expect("records").own.contains(&key));
}

#[tokio::test]
async fn a_record_that_names_no_machine_is_written_anew() {
    let state = tempfile::tempdir().expect("a folder");
    drop(tests::records(state.path(), "one"));
    let text = r#"{"namespace":"ns","name":"a","uid":"","node":"one","addresses":[]}"#;
    fs::write(state.path().join("enrolled/ns.a.json"), text).expect("a file");
    let mut both = WriterAndReader::of(state.path());
    let (key, pod) = (key_of("a", ""), pod("a", ""));
    both.update(&[(&key, &pod)], Instant::now()).await;
    let said = both.recorded.said();
    assert!(
        said.own.contains(&key) && said.unsigned.is_empty(),
        "{said:?}"
    );
    assert_eq!(both.recorded.problems(), [""; 0]);
}

#[tokio::test]
async fn what_was_written_is_not_written_again_before_it_is_read() {
    let state = tempfile::tempdir().expect("a folder");
    let mut both = WriterAndReader::of(state.path());
    let (key, pod, now) = (key_of("a", ""), pod("a", ""), Instant::now());
    for (served, writes) in [(true, 1), (true, 1), (false, 2), (false, 2)] {
        let all = [(&key, &pod)];
        both.step(&all[..usize::from(served)], now).await;
        assert_eq!(both.recording.records.writes(), writes);
    }
}

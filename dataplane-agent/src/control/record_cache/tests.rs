//! What is read of the records that have changed is what reading all of them says.

use std::os::unix::fs::PermissionsExt;
use std::thread::sleep;

use proptest::prelude::*;

use super::super::enrolled::tests::{key_of, pod, records};
use super::*;

fn in_seconds(seconds: u64) -> SystemTime {
    SystemTime::now() + Duration::from_secs(seconds)
}

/// How many records a look opens.
fn opens(cache: &mut RecordCache, now: SystemTime) -> usize {
    cache.opened = 0;
    cache.look(now).expect("a state");
    cache.opened
}

#[test]
fn of_many_records_those_that_have_changed_are_opened() -> io::Result<()> {
    let state = tempfile::tempdir()?;
    let two = records(state.path(), "two");
    for number in 0..20 {
        two.write(&pod(&format!("p{number}"), "1"))?;
    }
    let mut cache = RecordCache::new(records(state.path(), "one"));
    assert_eq!(opens(&mut cache, in_seconds(3)), 20);
    assert_eq!(opens(&mut cache, in_seconds(20)), 0);
    two.write(&pod("p7", "2"))?;
    assert_eq!(opens(&mut cache, in_seconds(21)), 1);
    assert!(cache.said.enrolled.contains(&key_of("p7", "2")));
    assert!(!cache.said.enrolled.contains(&key_of("p7", "1")));
    two.remove(&key_of("p7", "2"))?;
    assert_eq!(opens(&mut cache, in_seconds(22)), 0);
    assert!(!cache.said.enrolled.contains(&key_of("p7", "2")));
    Ok(())
}

#[test]
fn what_was_written_just_now_is_read_again_and_so_is_what_cannot_be_read() -> io::Result<()> {
    let state = tempfile::tempdir()?;
    let (one, two) = (records(state.path(), "one"), records(state.path(), "two"));
    two.write(&pod("a", "1"))?;
    two.write(&pod("b", "1"))?;
    let mut cache = RecordCache::new(one);
    assert_eq!(opens(&mut cache, in_seconds(3)), 2);
    two.write(&pod("b", "2"))?;
    assert_eq!(opens(&mut cache, SystemTime::now()), 1);
    assert_eq!(opens(&mut cache, SystemTime::now()), 1);
    fs::write(state.path().join("enrolled/ns.c.json"), "{")?;
    for seconds in [20, 40] {
        opens(&mut cache, in_seconds(seconds));
    }
    assert_eq!(opens(&mut cache, in_seconds(60)), 1);
    Ok(())
}

#[test]
fn all_are_read_again_once_the_state_was_away() -> io::Result<()> {
    let state = tempfile::tempdir()?;
    let two = records(state.path(), "two");
    two.write(&pod("a", "1"))?;
    let mut cache = RecordCache::new(records(state.path(), "one"));
    assert_eq!(opens(&mut cache, in_seconds(3)), 1);
    let (folder, away) = (state.path().join("enrolled"), state.path().join("away"));
    fs::rename(&folder, &away)?;
    assert!(cache.look(in_seconds(4)).is_err());
    assert!(cache.said.enrolled.contains(&key_of("a", "1")));
    fs::rename(&away, &folder)?;
    assert_eq!(opens(&mut cache, in_seconds(5)), 1);
    fs::rename(&folder, &away)?;
    assert!(cache.look(in_seconds(6)).is_err());
    fs::rename(&away, &folder)?;
    fs::remove_file(folder.join("ns.a.json"))?;
    opens(&mut cache, in_seconds(7));
    assert!(!cache.said.enrolled.contains(&key_of("a", "1")));
    Ok(())
}

/// What may happen to the records of pods `0`, `1` and `2`.
#[derive(Clone, Debug)]
enum Step {
    /// One is written by a node, in place or by a new file.
    Write(u8, &'static str, &'static str, bool),
    /// It is not whole.
    Break(u8),
    /// Others may write to it, or not any more.
    Mode(u8, u32),
    Remove(u8),
    Rename(u8, u8),
    /// A look, at once or after a while.
    Look,
    Later,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let which = || 0..3_u8;
    let (node, uid) = (
        prop::sample::select(vec!["one", "two"]),
        prop::sample::select(vec!["1", "2"]),
    );
    let write = (which(), node, uid, any::<bool>())
        .prop_map(|(which, node, uid, new)| Step::Write(which, node, uid, new));
    let mode = (which(), prop::sample::select(vec![0o644, 0o666]));
    let step = prop_oneof![
        4 => write,
        1 => which().prop_map(Step::Break),
        1 => mode.prop_map(|(which, mode)| Step::Mode(which, mode)),
        1 => which().prop_map(Step::Remove),
        1 => (which(), which()).prop_map(|(from, to)| Step::Rename(from, to)),
        3 => Just(Step::Look),
        3 => Just(Step::Later),
    ];
    prop::collection::vec(step, 1..16)
}

/// Does what happens; of files that are not there nothing does.
fn happens(folder: &Path, step: &Step) {
    let at = |which: &u8| folder.join(format!("ns.{which}.json"));
    let _ = match step {
        Step::Write(which, node, uid, new) => {
            let text = serde_json::json!({
                "namespace": "ns", "name": which.to_string(), "uid": uid, "node": node, "addresses": [],
            });
            match new {
                true => fs::write(folder.join("x.new"), text.to_string())
                    .and_then(|()| fs::rename(folder.join("x.new"), at(which))),
                false => fs::write(at(which), text.to_string()),
            }
        }
        Step::Break(which) => fs::write(at(which), "{"),
        Step::Mode(which, mode) => {
            fs::set_permissions(at(which), fs::Permissions::from_mode(*mode))
        }
        Step::Remove(which) => fs::remove_file(at(which)),
        Step::Rename(from, to) => fs::rename(at(from), at(to)),
        Step::Look | Step::Later => Ok(()),
    };
}

/// What all of them say, each read.
fn all(records: &EnrolmentRecords) -> RecordsSnapshot {
    let mut said = RecordsSnapshot::default();
    for entry in fs::read_dir(records.folder()).expect("a folder") {
        let path = entry.expect("a file").path();
        let name = path.file_name().expect("a name");
        if let (true, Some(word)) = (name != "mark", records.content(&path)) {
            said.add(name, &word);
        }
    }
    said.problems.sort();
    said
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn what_has_changed_says_with_what_was_read_before_what_all_say(steps in steps()) {
        let state = tempfile::tempdir().expect("a folder");
        let records = records(state.path(), "one");
        let mut cache = RecordCache::new(records.clone());
        let mut late = 0;
        for step in &steps {
            happens(records.folder(), step);
            let now = match step {
                Step::Look => SystemTime::now(),
                Step::Later => {
                    // What happens next has another time, as after seconds it has on any file system.
                    sleep(Duration::from_millis(12));
                    late += 20;
                    in_seconds(late)
                }
                _ => continue,
            };
            let before = Arc::clone(cache.said());
            let change = cache.look(now).expect("a state");
            prop_assert_eq!(&**cache.said(), &all(&records), "{:?}", step);
            prop_assert_eq!(change.is_some(), *before != **cache.said());
        }
    }
}

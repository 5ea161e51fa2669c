use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::super::folder::{Folder, Reload, SETTLE};
use super::super::watch::Watch;

const POLICY: &str = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata:\n  name: gate\nspec:\n  action: DENY\n  rules:\n  - from:\n    - source:\n        namespaces: [a]\n";

fn namespace(name: &str) -> String {
    format!("apiVersion: v1\nkind: Namespace\nmetadata:\n  name: {name}\n")
}

fn put(dir: &TempDir, name: &str, text: &str) {
    fs::write(dir.path().join(name), text).expect("write");
}

/// A folder for which every change has settled at once.
fn folder(files: &[(&str, &str)]) -> (TempDir, Folder) {
    let dir = tempfile::tempdir().expect("a folder");
    for (name, text) in files {
        put(&dir, name, text);
    }
    let folder = Folder::open_settling(dir.path(), Duration::ZERO).expect("good files");
    (dir, folder)
}

fn told(reload: &Reload) -> Vec<String> {
    reload.problems.iter().map(ToString::to_string).collect()
}

#[test]
fn a_bad_file_stops_the_start() {
    let dir = tempfile::tempdir().expect("a folder");
    put(&dir, "good.yaml", POLICY);
    put(
        &dir,
        "bad.yaml",
        "apiVersion: v1\nkind: Pod\nmetadata: {name: p}\nspec: []\n",
    );
    let error = Folder::open(dir.path()).expect_err("a bad file");
    assert!(
        error
            .to_string()
            .starts_with("bad.yaml:4: spec: invalid type"),
        "{error}"
    );
    assert!(Folder::open(Path::new("/nowhere/at/all")).is_err());
}

#[test]
fn an_object_in_two_files_stops_the_start() {
    let dir = tempfile::tempdir().expect("a folder");
    put(&dir, "a.yaml", &namespace("shop"));
    put(&dir, "b.yml", &namespace("shop"));
    let error = Folder::open(dir.path()).expect_err("twice").to_string();
    assert_eq!(error, "b.yml:1: Namespace shop is also in a.yaml:1");
}

#[test]
fn a_bad_half_or_empty_file_leaves_what_it_said() {
    let (dir, mut folder) = folder(&[("gate.yaml", POLICY), ("other.txt", "not one of ours")]);
    let before = folder.objects().clone();
    for at in 0..POLICY.len() {
        // A cut that is a policy of its own cannot be told from an edit; settling is for that.
        put(&dir, "gate.yaml", &POLICY[..at]);
        let reload = folder.reload();
        assert!(
            !reload.changed || POLICY[..at].contains("action: DENY"),
            "cut at {at}"
        );
        assert_eq!(
            folder.objects().authorization_policies.len(),
            1,
            "cut at {at}"
        );
        if reload.changed {
            put(&dir, "gate.yaml", POLICY);
            folder.reload();
        }
    }
    put(&dir, "gate.yaml", "");
    let reload = folder.reload();
    assert_eq!(
        told(&reload),
        ["gate.yaml: is empty; delete it to remove its objects"]
    );
    assert_eq!(*folder.objects(), before);
    put(&dir, "gate.yaml", POLICY);
    assert_eq!(folder.reload(), Reload::default());
}

#[test]
fn a_renamed_over_and_a_deleted_file_count() {
    let (dir, mut folder) = folder(&[
        ("gate.yaml", POLICY),
        (
            "sub.json",
            "{\"apiVersion\": \"v1\", \"kind\": \"Namespace\", \"metadata\": {\"name\": \"a\"}}",
        ),
    ]);
    put(&dir, ".new", &POLICY.replace("DENY", "ALLOW"));
    fs::rename(dir.path().join(".new"), dir.path().join("gate.yaml")).expect("rename");
    assert!(folder.reload().changed);
    fs::remove_file(dir.path().join("gate.yaml")).expect("remove");
    assert!(folder.reload().changed);
    assert!(folder.objects().authorization_policies.is_empty());
    assert_eq!(folder.objects().namespaces.len(), 1);
    fs::create_dir(dir.path().join("below")).expect("a folder");
    put(&dir, "below/gate.yaml", POLICY);
    assert!(folder.reload().changed);
    assert_eq!(folder.objects().authorization_policies.len(), 1);
}

#[test]
fn an_object_may_move_from_file_to_file() {
    let (dir, mut folder) = folder(&[
        ("a.yaml", &namespace("shop")),
        ("b.yaml", &namespace("mill")),
    ]);
    put(
        &dir,
        "b.yaml",
        &format!("{}---\n{}", namespace("mill"), namespace("shop")),
    );
    let reload = folder.reload();
    assert!(!reload.changed);
    assert_eq!(
        told(&reload),
        ["b.yaml:6: Namespace shop is also in a.yaml:1"]
    );
    put(&dir, "a.yaml", &namespace("quay"));
    let reload = folder.reload();
    assert!(reload.changed && reload.problems.is_empty(), "{reload:?}");
    assert_eq!(folder.objects().namespaces.len(), 3);
}

#[test]
fn age_is_kept_while_an_object_lives() {
    let (dir, mut folder) = folder(&[("b.yaml", &namespace("old"))]);
    put(&dir, "a.yaml", &namespace("new"));
    put(&dir, "b.yaml", &format!("# touched\n{}", namespace("old")));
    folder.reload();
    let age = |name: &str| {
        folder
            .objects()
            .namespaces
            .values()
            .find(|found| &*found.meta.key.name == name)
            .map(|found| found.age)
    };
    assert!(age("old") < age("new"));
}

#[test]
fn a_folder_that_is_away_says_nothing_about_its_files() {
    let (dir, mut folder) = folder(&[("gate.yaml", POLICY)]);
    let away = dir.path().with_extension("away");
    fs::rename(dir.path(), &away).expect("rename");
    let reload = folder.reload();
    assert!(!reload.changed && reload.problems.len() == 1);
    assert_eq!(folder.objects().authorization_policies.len(), 1);
    fs::rename(&away, dir.path()).expect("rename back");
}

#[test]
fn a_change_counts_when_it_has_settled() {
    let dir = tempfile::tempdir().expect("a folder");
    put(&dir, "gate.yaml", POLICY);
    let mut folder = Folder::open(dir.path()).expect("good");
    put(
        &dir,
        "gate.yaml",
        &POLICY[..POLICY.find("  rules").unwrap_or(0)],
    );
    let reload = folder.reload();
    assert!(!reload.changed && reload.settling);
    put(&dir, "gate.yaml", POLICY);
    std::thread::sleep(SETTLE + Duration::from_millis(50));
    assert_eq!(folder.reload(), Reload::default());
}

#[tokio::test]
async fn the_watch_brings_changes() {
    let dir = tempfile::tempdir().expect("a folder");
    put(&dir, "a.yaml", &namespace("shop"));
    let mut folder = Folder::open(dir.path()).expect("good");
    let mut watch = Watch::new(dir.path());
    let begin = Instant::now();
    put(&dir, "gate.yaml", POLICY);
    assert!(folder.next(&mut watch).await.changed);
    assert!(
        begin.elapsed() < Duration::from_secs(2),
        "told, not found by the regular look"
    );
    fs::remove_file(dir.path().join("gate.yaml")).expect("remove");
    assert!(folder.next(&mut watch).await.changed);
    assert!(folder.objects().authorization_policies.is_empty());
}

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use tempfile::TempDir;

use super::super::changes::PolicyChange;
use super::super::files::SETTLE;
use super::super::folder::{ManifestFolder, Reload};
use super::super::watch::{RESYNC, Reported, Watch};
use crate::sys::memory;

const POLICY: &str = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata:\n  name: gate\nspec:\n  action: DENY\n  rules:\n  - from:\n    - source:\n        namespaces: [a]\n";

/// An empty List: the file is empty on purpose.
const NOTHING: &str = "apiVersion: v1\nkind: List\nitems: []\n";

fn namespace(name: &str) -> String {
    format!("apiVersion: v1\nkind: Namespace\nmetadata:\n  name: {name}\n")
}

fn put(dir: &TempDir, name: &str, text: &str) {
    let path = dir.path().join(name);
    fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
    fs::write(path, text).expect("write");
}

/// Opens a folder in which every change settles at once.
fn folder(files: &[(&str, &str)]) -> (TempDir, ManifestFolder) {
    let dir = tempfile::tempdir().expect("a folder");
    for (name, text) in files {
        put(&dir, name, text);
    }
    let folder = ManifestFolder::open_settling(dir.path(), Duration::ZERO).expect("good files");
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
    let error = ManifestFolder::open(dir.path()).expect_err("a bad file");
    assert!(
        error
            .to_string()
            .starts_with("bad.yaml:4: spec: invalid type"),
        "{error}"
    );
    assert!(ManifestFolder::open(Path::new("/nowhere/at/all")).is_err());
}

#[test]
fn an_object_in_two_files_stops_the_start() {
    let dir = tempfile::tempdir().expect("a folder");
    put(&dir, "a.yaml", &namespace("shop"));
    put(&dir, "b.yml", &namespace("shop"));
    let error = ManifestFolder::open(dir.path())
        .expect_err("twice")
        .to_string();
    assert_eq!(error, "b.yml:1: Namespace shop is also in a.yaml:1");
}

#[test]
fn a_bad_half_or_empty_file_leaves_what_it_said() {
    let (dir, mut folder) = folder(&[("gate.yaml", POLICY), ("other.txt", "not one of ours")]);
    let before = folder.objects().clone();
    for at in 0..POLICY.len() {
        // A cut that leaves a valid policy looks like an edit; that is what settling is for.
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
        ["gate.yaml: has no objects in it; delete it to remove what it said"]
    );
    assert_eq!(*folder.objects(), before);
    put(&dir, "gate.yaml", POLICY);
    assert_eq!(folder.reload(), Reload::default());
}

#[test]
fn a_file_in_which_all_is_commented_out_leaves_what_it_said() {
    let (dir, mut folder) = folder(&[("gate.yaml", POLICY), ("a.yaml", &namespace("a"))]);
    let before = folder.objects().clone();
    let commented: String = POLICY.lines().map(|line| format!("# {line}\n")).collect();
    for nothing in [commented.as_str(), "---\n---\n", " \n", "# gate\n"] {
        put(&dir, "gate.yaml", nothing);
        let reload = folder.reload();
        assert!(!reload.changed, "{nothing}");
        assert_eq!(
            told(&reload),
            ["gate.yaml: has no objects in it; delete it to remove what it said"]
        );
        assert_eq!(*folder.objects(), before);
        let error = ManifestFolder::open(dir.path()).expect_err("and stops a start");
        assert!(
            error.to_string().contains("gate.yaml: has no objects"),
            "{error}"
        );
    }
    put(&dir, "gate.yaml", NOTHING);
    let reload = folder.reload();
    assert!(reload.changed && reload.problems.is_empty(), "{reload:?}");
    assert!(
        folder.objects().authorization_policies.is_empty(),
        "it was said"
    );
}

#[test]
fn what_is_not_read_takes_nothing_away_in_whose_place_it_comes() {
    let service = "apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec: {}\n";
    let deployment = "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: web}\n";
    let both = format!("{POLICY}---\n{service}---\n{deployment}");
    for before in [POLICY.to_owned(), both.clone()] {
        let (dir, mut folder) = folder(&[("gate.yaml", &before)]);
        let good = folder.objects().clone();
        for (slip, told_of) in [
            (
                before.replace("security.istio.io/v1", "policy.example.com/v1"),
                "gate.yaml:1: policy.example.com/v1 AuthorizationPolicy is not read, and stands in the place of AuthorizationPolicy default/gate",
            ),
            (
                before.replace("kind: AuthorizationPolicy", "kind: RequestAuthentication"),
                "gate.yaml:1: security.istio.io/v1 RequestAuthentication is not read",
            ),
            (
                "apiVersion: v1\nkind: List\n".into(),
                "gate.yaml:1: items: a List without items",
            ),
        ] {
            put(&dir, "gate.yaml", &slip);
            let reload = folder.reload();
            assert!(!reload.changed, "{slip}");
            let told = told(&reload);
            assert!(told[0].starts_with(told_of), "{told:?}");
            assert_eq!(*folder.objects(), good);
        }
    }
    // An object of any name is refused if it is all that is left.
    let (dir, mut folder) = folder(&[("gate.yaml", &both)]);
    put(&dir, "gate.yaml", &deployment.replace("web", "other"));
    assert!(!folder.reload().changed);
    // An object that was not read before either has nothing to do with a removal beside it.
    put(&dir, "gate.yaml", &format!("{POLICY}---\n{deployment}"));
    let reload = folder.reload();
    assert!(reload.changed && reload.problems.is_empty(), "{reload:?}");
    put(&dir, "gate.yaml", deployment);
    let reload = folder.reload();
    assert!(reload.changed && reload.problems.is_empty(), "{reload:?}");
    assert!(folder.objects().authorization_policies.is_empty());
}

#[tokio::test]
async fn a_file_that_is_being_written_counts_when_it_is_closed() {
    use std::io::Write;
    let both = format!("{}---\n{POLICY}", namespace("shop"));
    let (dir, _) = folder(&[("gate.yaml", &both)]);
    let settle = Duration::from_millis(20);
    let mut folder = ManifestFolder::open_settling(dir.path(), settle).expect("good files");
    let before = folder.objects().clone();
    // Only the first document is written, and for long nothing more.
    let mut writing = fs::File::create(dir.path().join("gate.yaml")).expect("a file");
    writing
        .write_all(namespace("shop").as_bytes())
        .expect("a file");
    let mut problems = Vec::new();
    for _ in 0..15 {
        std::thread::sleep(settle);
        let reload = folder.reload();
        assert!(!reload.changed);
        problems = told(&reload);
    }
    assert_eq!(
        problems,
        ["gate.yaml: is open for writing, and counts when it is closed"]
    );
    let error = ManifestFolder::open(dir.path()).expect_err("nor does a start take it");
    assert!(error.to_string().contains("is open for writing"), "{error}");
    assert_eq!(*folder.objects(), before);
    let second = format!("---\n{}", POLICY.replace("[a]", "[b]"));
    writing.write_all(second.as_bytes()).expect("a file");
    std::thread::sleep(settle * 2);
    assert!(!folder.reload().changed);
    let begin = Instant::now();
    let mut watch = Watch::new(dir.path());
    drop(writing);
    let reload = folder.next(&mut watch).await;
    assert!(reload.changed && reload.problems.is_empty(), "{reload:?}");
    assert!(
        begin.elapsed() < RESYNC,
        "told, not found by the regular look"
    );
    assert_eq!(folder.objects().authorization_policies.len(), 1);
}

#[test]
fn a_folder_that_is_suddenly_empty_keeps_what_was_in_it_until_that_is_said() {
    let files = [
        ("gate.yaml", POLICY),
        ("below/a.yaml", &namespace("a")),
        ("below/deep/b.yaml", &namespace("b")),
    ];
    let (dir, mut folder) = folder(&files);
    let before = folder.objects().clone();
    let remove = |name: &str| fs::remove_file(dir.path().join(name)).expect("a file");
    // The files of a folder disappear, as if a mount was gone.
    remove("below/a.yaml");
    remove("below/deep/b.yaml");
    for _ in 0..3 {
        let reload = folder.reload();
        assert!(!reload.changed);
        let told = told(&reload);
        let below = dir.path().join("below").display().to_string();
        assert!(told.len() == 1 && told[0].starts_with(&below), "{told:?}");
        assert!(told[0].ends_with("or remove the folder"), "{told:?}");
        assert_eq!(*folder.objects(), before);
    }
    // All files disappear.
    remove("gate.yaml");
    let reload = folder.reload();
    assert!(!reload.changed);
    let whole = format!("{}: has no manifests any more", dir.path().display());
    assert!(told(&reload)[0].starts_with(&whole), "{:?}", told(&reload));
    // To remove the top folder would not confirm it, since then it cannot be read.
    assert!(!told(&reload)[0].contains("remove the folder"));
    assert_eq!(*folder.objects(), before);
    // The folder is back, without one that was removed meanwhile.
    for (name, text) in &files[..2] {
        put(&dir, name, text);
    }
    fs::remove_dir(dir.path().join("below/deep")).expect("a folder");
    let reload = folder.reload();
    assert!(reload.changed && reload.problems.is_empty(), "{reload:?}");
    assert_eq!(folder.objects().namespaces.len(), 1);
    // This time the removal is meant.
    remove("gate.yaml");
    fs::remove_dir_all(dir.path().join("below")).expect("a folder");
    assert!(!folder.reload().changed);
    put(&dir, "nothing.yaml", NOTHING);
    let reload = folder.reload();
    assert!(reload.changed && reload.problems.is_empty(), "{reload:?}");
    assert_eq!(*folder.objects(), Default::default());
}

#[test]
fn files_that_are_removed_one_by_one_are_removed() {
    let (dir, mut folder) = folder(&[("a.yaml", &namespace("a")), ("b.yaml", &namespace("b"))]);
    fs::remove_file(dir.path().join("a.yaml")).expect("a file");
    assert!(folder.reload().changed);
    assert_eq!(folder.objects().namespaces.len(), 1);
}

#[test]
fn what_cannot_be_looked_at_keeps_what_it_said_and_nothing_else() {
    let (dir, mut folder) = folder(&[
        ("gate.yaml", POLICY),
        ("linked/a.yaml", &namespace("a")),
        ("b.yaml", &namespace("b")),
    ]);
    // One link leads into a folder that is away, and one to itself.
    let away = dir.path().join("away");
    fs::rename(dir.path().join("gate.yaml"), dir.path().join("gate.txt")).expect("a file");
    std::os::unix::fs::symlink(&away, dir.path().join("gate.yaml")).expect("a link");
    std::os::unix::fs::symlink("loop.yaml", dir.path().join("loop.yaml")).expect("a link");
    put(&dir, "b.yaml", &namespace("c"));
    let reload = folder.reload();
    assert!(reload.changed, "what can be read is read: {reload:?}");
    let told = told(&reload);
    assert!(
        told.len() == 2 && told[0].starts_with("gate.yaml: ") && told[1].starts_with("loop.yaml: "),
        "{told:?}"
    );
    assert_eq!(folder.objects().authorization_policies.len(), 1);
    let names: Vec<String> = folder
        .objects()
        .namespaces
        .keys()
        .map(ToString::to_string)
        .collect();
    assert_eq!(names, ["a", "c"]);
    assert_eq!(
        ManifestFolder::open(dir.path())
            .expect_err("a start tells of all")
            .0
            .len(),
        2
    );
}

#[test]
fn what_is_passed_over_is_told() {
    let (dir, mut folder) = folder(&[("a.yaml", &namespace("a")), ("b.YAML", "kind: [")]);
    let other = tempfile::tempdir().expect("a folder");
    std::os::unix::fs::symlink(other.path(), dir.path().join("other")).expect("a link");
    fs::create_dir_all(dir.path().join("1/2/3/4/5/6/7/8/9")).expect("a folder");
    let _socket =
        std::os::unix::net::UnixListener::bind(dir.path().join("s.yaml")).expect("a socket");
    assert!(folder.reload().changed);
    let notes = &folder.objects().warnings;
    for name in [
        "b.YAML: ",
        "other: is a link",
        "1/2/3/4/5/6/7/8/9: ",
        "s.yaml: is no file",
    ] {
        assert!(
            notes.iter().any(|note| note.starts_with(name)),
            "{name}: {notes:?}"
        );
    }
}

#[tokio::test]
async fn a_folder_in_its_place_and_what_a_link_leads_to_are_looked_at() {
    let dir = tempfile::tempdir().expect("a folder");
    for (revision, name) in [("one", "a"), ("two", "b")] {
        fs::create_dir(dir.path().join(revision)).expect("a folder");
        fs::write(dir.path().join(revision).join("a.yaml"), namespace(name)).expect("a file");
    }
    let current = dir.path().join("current");
    std::os::unix::fs::symlink("one", &current).expect("a link");
    let mut folder = ManifestFolder::open(&current).expect("good");
    let mut watch = Watch::new(&current);
    let name = |folder: &ManifestFolder| {
        folder
            .objects()
            .namespaces
            .keys()
            .next()
            .map(ToString::to_string)
    };
    let swap = |to: &str| {
        std::os::unix::fs::symlink(to, dir.path().join("new")).expect("a link");
        fs::rename(dir.path().join("new"), &current).expect("a link");
    };
    swap("two");
    assert!(folder.next(&mut watch).await.changed);
    assert_eq!(name(&folder).as_deref(), Some("b"));
    // The file becomes a link to a place that is not watched.
    let elsewhere = dir.path().join("elsewhere.yaml");
    fs::write(&elsewhere, namespace("c")).expect("a file");
    fs::remove_file(dir.path().join("two/a.yaml")).expect("a file");
    std::os::unix::fs::symlink(&elsewhere, dir.path().join("two/a.yaml")).expect("a link");
    assert!(folder.next(&mut watch).await.changed);
    fs::write(&elsewhere, namespace("d")).expect("a file");
    assert!(folder.next(&mut watch).await.changed);
    assert_eq!(name(&folder).as_deref(), Some("d"));
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
    let mut folder = ManifestFolder::open(dir.path()).expect("good");
    put(
        &dir,
        "gate.yaml",
        &POLICY[..POLICY.find("  rules").unwrap_or(0)],
    );
    // A file of the future is as new as can be, however slow this test is.
    let file = fs::File::options()
        .write(true)
        .open(dir.path().join("gate.yaml"));
    let future = SystemTime::now() + Duration::from_secs(60);
    let dated = file.and_then(|file| file.set_modified(future));
    dated.expect("a file");
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
    let mut folder = ManifestFolder::open(dir.path()).expect("good");
    let begin = Instant::now();
    let mut watch = Watch::new(dir.path());
    put(&dir, "gate.yaml", POLICY);
    assert!(folder.next(&mut watch).await.changed);
    assert!(
        begin.elapsed() < RESYNC,
        "told, not found by the regular look"
    );
    fs::remove_file(dir.path().join("gate.yaml")).expect("remove");
    assert!(folder.next(&mut watch).await.changed);
    assert!(folder.objects().authorization_policies.is_empty());
}

#[test]
fn what_is_no_file_any_more_keeps_what_it_said_as_one() {
    use nix::sys::stat::Mode;
    let (dir, mut folder) = folder(&[("gate.yaml", POLICY), ("a.yaml", &namespace("a"))]);
    let before = folder.objects().clone();
    let path = dir.path().join("gate.yaml");
    let elsewhere = tempfile::tempdir().expect("a folder");
    let link = || std::os::unix::fs::symlink(elsewhere.path(), &path).map_err(|_| ());
    let socket = || _ = std::os::unix::net::UnixListener::bind(&path).expect("a socket");
    let fifo = || nix::unistd::mkfifo(&path, Mode::S_IRUSR).expect("a fifo");
    let kinds: [(&str, &dyn Fn()); 4] = [
        ("is no file", &fifo),
        ("is no file", &socket),
        ("is a folder", &|| fs::create_dir(&path).expect("a folder")),
        ("is a link to a folder", &|| link().expect("a link")),
    ];
    for (what, make) in kinds {
        fs::remove_file(&path).expect("a file");
        make();
        for _ in 0..2 {
            let reload = folder.reload();
            let told = told(&reload);
            assert!(!reload.changed, "{what}: {told:?}");
            let says = format!("gate.yaml: {what} now; to remove what it said");
            assert!(told.len() == 1 && told[0].starts_with(&says), "{told:?}");
            assert_eq!(*folder.objects(), before);
        }
        fs::remove_file(&path)
            .or_else(|_| fs::remove_dir(&path))
            .expect("it goes");
        put(&dir, "gate.yaml", POLICY);
        assert!(folder.reload().problems.is_empty());
    }
    // If the file was deleted first, anything may have its name.
    fs::remove_file(&path).expect("a file");
    assert!(folder.reload().changed);
    put(&dir, "gate.yaml/gate.yaml", POLICY);
    let reload = folder.reload();
    assert!(reload.changed && reload.problems.is_empty(), "{reload:?}");
}

#[test]
fn a_file_that_is_renamed_to_what_is_not_read_is_removed_and_that_is_told() {
    for (to, told) in [
        ("gate.YAML", true),
        ("gate.yaml.off", true),
        ("gate.yml", false),
    ] {
        let (dir, mut folder) = folder(&[("gate.yaml", POLICY), ("a.yaml", &namespace("a"))]);
        fs::rename(dir.path().join("gate.yaml"), dir.path().join(to)).expect("a file");
        let reload = folder.reload();
        let gone = format!(
            "gate.yaml: was renamed to {to}, which is not read, and what it said is gone: AuthorizationPolicy default/gate"
        );
        assert_eq!(reload.renamed, Vec::from_iter(told.then_some(gone)));
        assert_eq!(reload.changed, told, "{to}");
        assert_eq!(folder.reload(), Reload::default());
    }
}

#[test]
fn policies_that_come_change_and_go_are_told() {
    let (dir, mut folder) = folder(&[("a.yaml", &namespace("a"))]);
    let mut told = |change: &dyn Fn()| {
        change();
        let policies = folder.reload().policies;
        let line = |of: &PolicyChange| format!("{} {} {}", of.kind, of.key, of.what);
        policies.iter().map(line).collect::<Vec<_>>()
    };
    let gate = "AuthorizationPolicy default/gate";
    assert_eq!(
        told(&|| put(&dir, "gate.yaml", POLICY)),
        [format!("{gate} added")]
    );
    let touched = format!("# touched\n{POLICY}");
    assert_eq!(told(&|| put(&dir, "gate.yaml", &touched)), [""; 0]);
    let other = POLICY.replace("[a]", "[b]");
    assert_eq!(
        told(&|| put(&dir, "gate.yaml", &other)),
        [format!("{gate} changed")]
    );
    let strict = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: p, namespace: a}\nspec: {mtls: {mode: STRICT}}\n";
    assert_eq!(
        told(&|| put(&dir, "p.yaml", strict)),
        ["PeerAuthentication a/p added"]
    );
    // The age matters: of two for the same pods the oldest holds.
    let older = strict.replace(
        "namespace: a",
        "namespace: a, creationTimestamp: 2020-01-01T00:00:00Z",
    );
    assert_eq!(
        told(&|| put(&dir, "p.yaml", &older)),
        ["PeerAuthentication a/p changed"]
    );
    assert_eq!(
        told(&|| put(&dir, "p.yaml", &format!("# touched\n{older}"))),
        [""; 0]
    );
    let moved = POLICY.replace("name: gate", "name: gate\n  namespace: a");
    assert_eq!(
        told(&|| put(&dir, "gate.yaml", &moved)),
        [
            format!("{gate} removed"),
            "AuthorizationPolicy a/gate added".into()
        ]
    );
    let remove = || {
        for name in ["gate.yaml", "p.yaml"] {
            fs::remove_file(dir.path().join(name)).expect("a file");
        }
    };
    assert_eq!(
        told(&remove),
        [
            "AuthorizationPolicy a/gate removed",
            "PeerAuthentication a/p removed"
        ]
    );
}

/// Returns the objects without their ages, which depend on when they were first seen.
fn undated(objects: &super::super::Objects) -> Vec<String> {
    let namespaces = objects.namespaces.values();
    let namespaces = namespaces.map(|of| format!("{:?}", of.meta));
    let policies = objects.authorization_policies.values();
    let policies = policies.map(|of| format!("{:?} {:?}", of.meta, of.body));
    let warnings = objects.warnings.iter().cloned();
    namespaces.chain(policies).chain(warnings).collect()
}

proptest::proptest! {
    #![proptest_config(proptest::test_runner::Config::with_cases(64))]

    /// After any changes of files, the objects are those that a start would read, if it would succeed.
    #[test]
    fn what_holds_is_what_a_start_would_read(
        steps in proptest::collection::vec(
            proptest::collection::vec((0..3_usize, proptest::collection::vec(0..4_usize, 0..3)), 1..3),
            1..8,
        ),
    ) {
        let one = |number: &usize| match number {
            0 => POLICY.to_owned(),
            1 => POLICY.replace("[a]", "[b]"),
            2 => namespace("a"),
            _ => "apiVersion: v1\nkind: Secret\nmetadata: {name: s}\n".to_owned(),
        };
        let (dir, mut folder) = folder(&[("z.yaml", &namespace("z"))]);
        for files in steps {
            let before = undated(folder.objects());
            for (file, objects) in files {
                let name = format!("{file}.yaml");
                if objects.is_empty() {
                    let _ = fs::remove_file(dir.path().join(name));
                } else {
                    let texts: Vec<String> = objects.iter().map(one).collect();
                    put(&dir, &name, &texts.join("---\n"));
                }
            }
            let reload = folder.reload();
            let again = folder.reload();
            proptest::prop_assert_eq!(&again.problems, &reload.problems);
            proptest::prop_assert!(!again.changed && again.policies.is_empty());
            let now = undated(folder.objects());
            proptest::prop_assert_eq!(reload.changed, now != before);
            if reload.problems.is_empty() {
                let fresh = ManifestFolder::open_settling(dir.path(), Duration::ZERO);
                let fresh = fresh.map_err(|error| error.to_string());
                proptest::prop_assert_eq!(fresh.map(|fresh| undated(fresh.objects())), Ok(now));
            }
        }
    }
}

fn files(names: &[&str]) -> Reported {
    Reported::Files(names.iter().map(Into::into).collect())
}

#[test]
fn what_a_changed_file_costs_does_not_grow_with_its_folder() {
    let allocations = |many: u32| {
        let name = |number: u32| format!("{number}.yaml");
        let all: Vec<_> = (0..many)
            .map(|number| (name(number), namespace(&format!("n-{number}"))))
            .collect();
        let all: Vec<_> = all.iter().map(|(name, text)| (&**name, &**text)).collect();
        let (dir, mut folder) = folder(&all);
        // Where seconds pass between two of them, a file is read for which none was reported.
        let taken = ["one", "two", "three"].map(|changed| {
            folder.reload();
            put(&dir, "1.yaml", &namespace(changed));
            let before = memory::counted::taken().1;
            assert!(folder.reload_reported(files(&["1.yaml"])).changed);
            memory::counted::taken().1 - before
        });
        taken.into_iter().min().expect("three")
    };
    let (few, many) = (allocations(10), allocations(1000));
    assert!(
        many <= few + 10,
        "{few} in a small one, {many} in a large one"
    );
}

#[test]
fn of_a_file_with_a_problem_what_it_said_before_holds_or_nothing_if_it_is_new() {
    let two = [("a.yaml", &*namespace("a")), ("b/b.yaml", &*namespace("b"))];
    let (dir, mut folder) = folder(&two);
    let instead = |folder: &mut ManifestFolder| {
        let problems = folder.reload().problems.into_iter();
        let told = problems.map(|of| (of.file.display().to_string(), folder.in_effect(&of)));
        told.collect::<Vec<_>>()
    };
    let of = |name: &str, instead| (name.to_owned(), instead);
    let (before, nothing) = ("what it said before holds", "nothing of it is applied");
    put(&dir, "a.yaml", "kind: [");
    put(&dir, "new.yaml", "kind: [");
    // The same object as in another file.
    put(&dir, "twice.yaml", &namespace("b"));
    std::os::unix::fs::symlink("nowhere", dir.path().join("c.yaml")).expect("a link");
    let mut all = instead(&mut folder);
    all.sort();
    assert_eq!(
        all,
        [
            of("a.yaml", before),
            of("c.yaml", nothing),
            of("new.yaml", nothing),
            of("twice.yaml", nothing)
        ]
    );
    put(&dir, "a.yaml", &namespace("a"));
    for name in ["c.yaml", "new.yaml", "twice.yaml"] {
        fs::remove_file(dir.path().join(name)).expect("a file");
    }
    folder.reload();
    assert_eq!(instead(&mut folder), []);
    // A folder that has lost its manifests, and one that is gone, with all that is in it.
    fs::remove_file(dir.path().join("b/b.yaml")).expect("a file");
    folder.reload();
    let lost = dir.path().join("b").display().to_string();
    assert_eq!(instead(&mut folder), [of(&lost, before)]);
    fs::remove_dir_all(dir.path()).expect("a folder");
    let gone = dir.path().display().to_string();
    assert_eq!(instead(&mut folder), [of(&gone, before)]);
}

#[test]
fn more_than_a_changed_file_is_found_whatever_was_reported() {
    let two = [("a.yaml", &*namespace("a")), ("b.yaml", &*namespace("b"))];
    let (dir, mut folder) = folder(&two);
    let names = |folder: &ManifestFolder| {
        let names = folder.objects().namespaces.keys();
        names.map(|key| key.name.to_string()).collect::<Vec<_>>()
    };
    // A file that is new, one that is gone, and a folder that is called like one.
    put(&dir, "c.yaml", &namespace("c"));
    folder.reload_reported(files(&["c.yaml"]));
    assert_eq!(names(&folder), ["a", "b", "c"]);
    fs::remove_file(dir.path().join("c.yaml")).expect("a file");
    folder.reload_reported(files(&["c.yaml"]));
    assert_eq!(names(&folder), ["a", "b"]);
    put(&dir, "d.yaml/e.yaml", &namespace("e"));
    folder.reload_reported(files(&["d.yaml"]));
    assert_eq!(names(&folder), ["a", "b", "e"]);
    // A link to a file that changes where nobody watches.
    let elsewhere = tempfile::tempdir().expect("a folder");
    put(&elsewhere, "f", &namespace("f"));
    let link = dir.path().join("f.yaml");
    std::os::unix::fs::symlink(elsewhere.path().join("f"), link).expect("a link");
    folder.reload_reported(files(&["f.yaml"]));
    put(&elsewhere, "f", &namespace("g"));
    folder.reload_reported(files(&[]));
    assert_eq!(names(&folder), ["a", "b", "e", "g"]);
}

#[test]
fn a_pod_of_a_deployment_takes_less_than_a_kilobyte_and_a_half() {
    let dir = tempfile::tempdir().expect("a folder");
    let (files, in_a_file) = (50, 20);
    let applied = "x".repeat(1000);
    for file in 0..files {
        let pods = (0..in_a_file).map(|pod| {
            format!(
                "---\napiVersion: v1\nkind: Pod\nmetadata:\n  name: web-{file}-5d8b9c7f4-{pod:05}\n  namespace: ns-{0}\n  \
                 uid: 2b0a7f4e-0000-4000-8000-{file:06}{pod:06}\n  generateName: web-{file}-5d8b9c7f4-\n  \
                 labels: {{app: web-{file}, version: v1, pod-template-hash: 5d8b9c7f4}}\n  \
                 annotations: {{kubectl.kubernetes.io/last-applied-configuration: {applied}}}\n  \
                 ownerReferences: [{{apiVersion: apps/v1, kind: ReplicaSet, name: web-{file}-5d8b9c7f4, controller: true}}]\n\
                 spec: {{nodeName: node-{1}, serviceAccountName: web-{file}}}\n\
                 status: {{phase: Running, podIPs: [{{ip: 10.1.{file}.{pod}}}]}}\n",
                file % 10,
                pod % 10
            )
        });
        put(&dir, &format!("{file}.yaml"), &pods.collect::<String>());
    }
    let (before, _) = memory::counted::taken();
    let folder = ManifestFolder::open(dir.path()).expect("good files");
    let (after, _) = memory::counted::taken();
    let each = (after - before) / (files * in_a_file);
    assert!(each < 1500, "{each} bytes for each");
    assert_eq!(folder.objects().pods.len(), files * in_a_file);
}

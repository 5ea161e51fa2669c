//! Commands as people type them, also wrongly, and folders as people and machines treat them: nothing
//! is touched that is not an agent's, and nobody is let go whom nobody has let go.

#![allow(missing_docs, reason = "tests are named for what they show")]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::Duration;

use dataplane_tests::agent::{CAPABILITIES, Setup};
use dataplane_tests::one::tree;
use dataplane_tests::process::{output, place};
use dataplane_tests::world::Mounted;
use dataplane_tests::{Agent, One, Process, World, eventually, program, scaled};

const PORT: u16 = 7000;

/// `uninstall` with the places of this node, and with others in their stead.
fn uninstall(one: &One, others: &[(&str, &Path)]) -> Command {
    let mut uninstall = dataplane("uninstall");
    let (run, bpffs, state) = (
        one.world.folder().join("run"),
        one.world.bpffs().to_owned(),
        one.world.state.clone(),
    );
    for (name, place) in [
        ("--node", Path::new("one")),
        ("--run-dir", &run),
        ("--bpffs", &bpffs),
        ("--state", &state),
    ] {
        let other = others.iter().find(|(other, _)| *other == name);
        let place = other.map_or(place, |(_, other)| *other);
        uninstall.arg(name).arg(place);
    }
    uninstall
}

fn dataplane(command: &str) -> Command {
    let mut dataplane = Command::new(program("DATAPLANE_BIN"));
    dataplane.arg(command).env_remove("NODE_NAME");
    dataplane
}

/// How an agent ended that must not start, and what it said.
fn refused(setup: Setup) -> (ExitStatus, String) {
    let _ = fs::remove_file(&setup.log);
    let mut agent = Agent::start(setup);
    eventually("it ends by itself", 20, || !agent.runs());
    (agent.wait(), agent.log())
}

/// Whether nothing of a node is known. That is good, unless there are agents on this machine: other tests run
/// at the same time.
fn is_unknown(status: ExitStatus, said: &str) -> bool {
    let others = said.contains("links of a dataplane agent's programs are on this machine");
    let good = said.contains("no program or rule of an agent is on this machine");
    let as_told = match status.code() {
        Some(0) => good,
        Some(1) => others,
        _ => false,
    };
    as_told && said.contains("nothing of node")
}

/// How it ended, and all that it said.
fn run(command: &mut Command) -> (ExitStatus, String) {
    let (status, out, error) = output(command);
    (status, out + &error)
}

#[test]
fn uninstall_touches_nothing_that_is_not_an_agents_whatever_it_is_told() {
    let world = World::new();
    let scratch = tempfile::tempdir().expect("a folder");
    let (run_dir, outside) = (scratch.path().join("run"), scratch.path().join("outside"));
    for folder in [
        &run_dir.join("two/pods"),
        &run_dir.join("notours/pods"),
        &outside,
    ] {
        fs::create_dir_all(folder).expect("a folder");
        fs::write(folder.join("precious"), "precious").expect("a file");
    }
    fs::write(run_dir.join("notours/precious"), "precious").expect("a file");
    fs::write(run_dir.join("notours/lock"), "").expect("a file");
    symlink(&outside, run_dir.join("linked")).expect("a link");
    for pin in ["dataplane/two/v1/pods", "dataplane/notours/v1/pods"] {
        fs::create_dir_all(world.bpffs().join(pin)).expect("a folder");
    }
    let before = (tree(scratch.path()), tree(world.bpffs()));
    let absolute = outside.display().to_string();
    for (name, code) in [
        (Some(absolute.as_str()), 2),
        (Some("../outside"), 2),
        (Some("two/../../outside"), 2),
        (Some("."), 2),
        (Some(".."), 2),
        (Some(""), 2),
        (Some("linked/"), 2),
        (Some("linked"), 1),
        (Some("notours"), 1),
        (Some("nobody"), 0),
        (None, 2),
    ] {
        for by_variable in [true, false] {
            let mut uninstall = dataplane("uninstall");
            uninstall
                .arg("--run-dir")
                .arg(&run_dir)
                .arg("--bpffs")
                .arg(world.bpffs())
                .arg("--state")
                .arg(&world.state);
            match name {
                Some(name) if by_variable => _ = uninstall.env("NODE_NAME", name),
                Some(name) => _ = uninstall.arg("--node").arg(name),
                None => {}
            }
            let (status, said) = run(&mut uninstall);
            let after = (tree(scratch.path()), tree(world.bpffs()));
            assert_eq!(after, before, "{name:?}: {said}");
            let code = if code == 1 && said.contains("is not a dataplane agent's") {
                2
            } else {
                code
            };
            let fits = status.code() == Some(code) || (code == 0 && is_unknown(status, &said));
            assert!(fits, "{name:?}: {status}: {said}");
            assert!(!said.contains("nothing is left"), "{name:?}: {said}");
        }
    }
}

#[test]
fn a_folder_that_is_not_an_agents_is_not_made_one_by_run() {
    let world = World::new();
    let node = world.node("one");
    let theirs = world.folder().join("theirs/one");
    fs::create_dir_all(&theirs).expect("a folder");
    fs::write(theirs.join("precious"), "").expect("a file");
    let before = tree(&theirs);
    let mut setup = world.setup(&node);
    setup.run_dir = world.folder().join("theirs");
    let (status, said) = refused(setup);
    assert_eq!(status.code(), Some(2), "{said}");
    assert!(said.contains("is not a dataplane agent's"), "{said}");
    assert_eq!(tree(&theirs), before);
    let mut long = world.setup(&node);
    long.node = "n".repeat(127);
    let (status, said) = refused(long);
    assert_eq!(status.code(), Some(2), "{said}");
    assert!(said.contains("--node") && said.contains("bytes"), "{said}");
    assert!(!world.folder().join("run").join("n".repeat(127)).exists());
}

#[test]
fn uninstall_without_a_privilege_says_which_and_changes_nothing() {
    let mut one = One::new();
    one.agent.kill();
    assert!(one.is_captured());
    let before = one.traces();
    for (name, number) in CAPABILITIES {
        let mut uninstall = uninstall(&one, &[]);
        let mut setup = one.world.setup(&one.node);
        if let Some(keep) = &mut setup.place.capabilities {
            keep.retain(|kept| *kept != number);
        }
        place(&mut uninstall, &setup.place);
        let (status, said) = run(&mut uninstall);
        assert_eq!(status.code(), Some(3), "{name}: {said}");
        assert!(said.contains(&format!("{name} is missing")), "{said}");
        assert_eq!(one.traces(), before, "{name}");
    }
    let (status, said) = run(&mut uninstall(&one, &[]));
    assert!(
        status.success() && said.contains("1 pods let go, nothing is left"),
        "{said}"
    );
    assert_eq!(one.server.netns.show("rule show").lines().count(), 3);
}

#[test]
fn uninstall_with_other_places_than_its_agents_says_so_and_changes_nothing() {
    let mut one = One::new();
    let scratch = tempfile::tempdir().expect("a folder");
    let other = Mounted::new(scratch.path().join("bpf"));
    let before = one.traces();
    let unchanged = |one: &One, others: &[(&str, &Path)], code: i32, told: &[&str]| {
        let (status, said) = run(&mut uninstall(one, others));
        assert_eq!(status.code(), Some(code), "{others:?}: {said}");
        for part in told {
            assert!(said.contains(part), "{others:?}: {said}");
        }
        assert_eq!(one.traces(), before, "{others:?}");
        assert!(!said.contains("nothing is left"), "{said}");
    };
    let elsewhere = scratch.path().join("run");
    for running in [true, false] {
        if !running {
            one.agent.kill();
        }
        let own = one.world.bpffs().display().to_string();
        let (bpffs, state) = ([("--bpffs", other.path())], [("--state", scratch.path())]);
        if running {
            unchanged(&one, &bpffs, 4, &["already runs"]);
            unchanged(&one, &state, 4, &["already runs"]);
        } else {
            unchanged(&one, &bpffs, 2, &["was started with --bpffs", &own]);
            unchanged(&one, &state, 2, &["was started with --state"]);
        }
        unchanged(
            &one,
            &[("--run-dir", &elsewhere)],
            1,
            &["nothing of node one is known"],
        );
        // Nothing of the node is where it was looked for; but it is on this machine.
        let nowhere = [
            ("--run-dir", &*elsewhere),
            ("--bpffs", other.path()),
            ("--state", scratch.path()),
        ];
        let pins = other.path().join("dataplane/one").display().to_string();
        let told = [
            &format!(
                "nothing of node one is known in {}, nor pinned in {pins}",
                elsewhere.display()
            ),
            "links of a dataplane agent's programs are on this machine",
            "network namespaces have its rules",
        ];
        unchanged(&one, &nowhere, 1, &told);
        let typo = [("--node", Path::new("oen"))];
        unchanged(
            &one,
            &typo,
            1,
            &["nothing of node oen is known", "known are: one"],
        );
        if running {
            unchanged(&one, &[], 4, &["already runs"]);
            let _app = one.server.serve(PORT);
            assert!(
                one.outsider.ask(one.server.at(PORT), "x").is_ok(),
                "served on"
            );
        }
    }
    // Its pins cannot be seen any more: what they attached would go on without its routes.
    let moved = one.folder().join("node.json");
    let mark = fs::read_to_string(&moved).expect("a mark");
    let own = one.world.bpffs().display().to_string();
    let theirs = other.path().display().to_string();
    fs::write(&moved, mark.replace(&own, &theirs)).expect("a file");
    unchanged(&one, &[("--bpffs", other.path())], 4, &["not pinned in"]);
    fs::write(&moved, mark).expect("a file");
    let (status, said) = run(&mut uninstall(&one, &[]));
    assert!(status.success(), "{said}");
}

#[test]
fn what_cannot_be_taken_back_is_told_and_its_record_stays() {
    let mut one = One::new();
    one.agent.kill();
    let (stranger, broken) = (
        one.folder().join("precious"),
        one.folder().join("pods/7.json"),
    );
    for file in [&stranger, &broken] {
        fs::write(file, "{").expect("a file");
    }
    let (status, said) = run(&mut uninstall(&one, &[]));
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(said.contains("1 pods let go, 2 things are left"), "{said}");
    for file in [&stranger, &broken] {
        assert!(said.contains(&format!("{}", file.display())), "{said}");
        assert!(file.exists(), "{}", file.display());
        fs::remove_file(file).expect("a file");
    }
    assert_eq!(
        one.server.netns.show("rule show").lines().count(),
        3,
        "the pod itself is let go"
    );
    let (status, said) = run(&mut uninstall(&one, &[]));
    assert!(
        status.success() && said.contains("nothing is left"),
        "{said}"
    );
    assert!(!one.folder().exists());
    let (status, said) = run(&mut uninstall(&one, &[]));
    assert!(is_unknown(status, &said), "{status}: {said}");
}

#[test]
fn a_start_that_is_refused_leaves_nothing() {
    let mut one = One::new();
    let scratch = tempfile::tempdir().expect("a folder");
    let at = |name: &str| scratch.path().join(name);
    fs::create_dir(at("bpf")).expect("a folder");
    let (before, traces) = (tree(scratch.path()), one.traces());
    let mounts = || fs::read_to_string("/proc/self/mounts").expect("/proc is mounted");
    let refuse = |one: &One, what: &str, change: &dyn Fn(&mut Setup)| {
        let mut setup = one.world.setup(&one.node);
        change(&mut setup);
        let (status, said) = run(&mut under(&[], &setup.command(), &setup));
        assert!(
            matches!(status.code(), Some(2 | 4)),
            "{what}: {status}: {said}"
        );
        assert_eq!(tree(scratch.path()), before, "{what}: {said}");
        let bpf = at("bpf").display().to_string();
        assert!(!mounts().contains(&bpf), "{what}: {said}");
        assert_eq!(one.traces(), traces, "{what}: {said}");
    };
    for runs in [true, false] {
        if !runs {
            one.agent.kill();
        }
        refuse(&one, "run-dir", &|setup| setup.run_dir = at("run"));
        refuse(&one, "bpffs", &|setup| setup.bpffs = at("bpf"));
        refuse(&one, "state", &|setup| setup.state = at("state"));
        refuse(&one, "run-dir and state", &|setup| {
            (setup.run_dir, setup.state) = (at("run"), at("state"));
        });
        refuse(&one, "all", &|setup| {
            (setup.run_dir, setup.state, setup.bpffs) = (at("run"), at("state"), at("bpf"));
        });
        let wrong = one.world.manifests.folder.join("wrong.yaml");
        fs::write(&wrong, "kind: Pod\n").expect("a file");
        refuse(&one, "manifests", &|setup| {
            (setup.run_dir, setup.state, setup.bpffs) = (at("run"), at("state"), at("bpf"));
        });
        fs::remove_file(&wrong).expect("a file");
    }
    // Nor where it is the first.
    assert!(run(&mut uninstall(&one, &[])).0.success());
    let state = at("state").display().to_string();
    let mut setup = one.world.setup(&one.node);
    (setup.run_dir, setup.state, setup.bpffs) = (at("run"), at("state"), at("bpf"));
    fs::create_dir_all(at("state/ca")).expect("a folder");
    fs::write(at("state/ca/stranger"), "").expect("a file");
    let before = tree(scratch.path());
    let (status, said) = run(&mut under(&[], &setup.command(), &setup));
    assert_eq!(status.code(), Some(2), "{said}");
    assert!(said.contains(&state), "{said}");
    assert_eq!(tree(scratch.path()), before, "{said}");
    assert!(!mounts().contains(&at("bpf").display().to_string()));
}

#[test]
fn an_agent_whose_socket_is_gone_is_not_taken_for_none_and_makes_it_again() {
    let one = One::new();
    let pid = one.agent.pid().to_string();
    let kill = |signal: &str| {
        let (status, said) = run(Command::new("kill").args([signal, &pid]));
        assert!(status.success(), "{said}");
    };
    let status = |of: &[&str]| {
        let run_dir = one.world.folder().join("run");
        run(dataplane("status").arg("--run-dir").arg(run_dir).args(of))
    };
    kill("-STOP");
    let (ended, said) = status(&["--node", "one"]);
    assert_eq!(ended.code(), Some(1), "{said}");
    assert!(said.contains("does not answer within 5 s"), "{said}");
    let away = one.world.folder().join("away");
    fs::rename(one.agent.socket(), &away).expect("a socket");
    for of in [&["--node", "one"][..], &[]] {
        let (ended, said) = status(of);
        assert_eq!(ended.code(), Some(1), "{said}");
        assert!(said.contains("agent of node one runs"), "{said}");
        assert!(
            said.contains(&format!("{} is gone", one.agent.socket().display())),
            "{said}"
        );
    }
    kill("-CONT");
    eventually("it answers again", 10, || status(&[]).0.success());
    one.agent.logs(&["\twarn\t", "admin socket", "made again"]);
    fs::remove_file(&away).expect("a socket");
    // Another file in its place is none either.
    fs::remove_file(one.agent.socket()).expect("a socket");
    fs::write(one.agent.socket(), "").expect("a file");
    eventually("it answers by its own socket again", 10, || status(&[]).0.success());
}

#[test]
fn c8_a_node_has_one_agent_whatever_folders_another_one_is_given() {
    let mut one = One::new();
    let _app = one.server.serve(PORT);
    let scratch = tempfile::tempdir().expect("a folder");
    let bpffs = Mounted::new(scratch.path().join("bpf"));
    let run_dir = scratch.path().join("run");
    let others = |change: &dyn Fn(&mut Setup)| {
        let mut setup = one.world.setup(&one.node);
        setup.run_dir.clone_from(&run_dir);
        setup.log = scratch.path().join("log");
        change(&mut setup);
        refused(setup)
    };
    let all = || {
        [
            others(&|_| {}),
            others(&|setup| setup.bpffs = bpffs.path().to_owned()),
            others(&|setup| setup.node = "two".into()),
        ]
    };
    for (status, said) in all() {
        assert_eq!(status.code(), Some(4), "{said}");
        assert!(one.outsider.ask(one.server.at(PORT), "x").is_ok(), "{said}");
        assert!(one.agent.pod("server").0 == "up", "{said}");
    }
    one.agent.kill();
    // Its pods' way back is in its own folder.
    let before = one.traces();
    let (status, said) = {
        let mut setup = one.world.setup(&one.node);
        setup.run_dir.clone_from(&run_dir);
        setup.log = scratch.path().join("log");
        refused(setup)
    };
    assert_eq!(status.code(), Some(2), "{said}");
    assert!(said.contains("say the --run-dir"), "{said}");
    let (status, said) = run(&mut uninstall(&one, &[("--run-dir", &run_dir)]));
    assert_eq!(status.code(), Some(1), "{said}");
    assert_eq!(one.traces(), before);
    one.agent.restart();
    one.agent.up(&["server"]);
    // A pod has one as well, where the other one's cgroup is above.
    let mut above = one.world.setup(&one.node);
    above.run_dir.clone_from(&run_dir);
    above.bpffs = bpffs.path().to_owned();
    above.log = scratch.path().join("log");
    let at = above.arguments.iter().position(|word| word == "--cgroup");
    let folder = one.node.cgroup.folder.parent().expect("a folder");
    above.arguments[at.expect("it is there") + 1] = folder.display().to_string();
    let above = Agent::start(above);
    eventually("it says why it does not capture the pod", 20, || {
        let (state, why) = above.pod("server");
        state == "waiting" && why.contains("another dataplane agent")
    });
    assert!(one.outsider.ask(one.server.at(PORT), "x").is_ok());
    drop(above);
    one.agent.kill();
    let mut elsewhere = one.world.setup(&one.node);
    elsewhere.run_dir = run_dir;
    elsewhere.bpffs = bpffs.path().to_owned();
    let (status, said) = refused(elsewhere);
    assert_eq!(
        status.code(),
        Some(4),
        "its pods are captured still: {said}"
    );
    assert!(said.contains("not pinned in"), "{said}");
    one.agent.restart();
    one.agent.up(&["server"]);
    assert!(one.outsider.ask(one.server.at(PORT), "x").is_ok());
}

#[test]
fn check_and_load_leave_no_mount_and_no_pin() {
    let world = World::new();
    let node = world.node("one");
    let empty = world.folder().join("empty");
    fs::create_dir(&empty).expect("a folder");
    let mounts = || fs::read_to_string("/proc/self/mounts").expect("/proc is mounted");
    let cgroup = ["--cgroup".into(), node.cgroup.folder.display().to_string()];
    for (command, arguments) in [("check", &cgroup[..]), ("load", &[])] {
        for bpffs in [&empty, &world.bpffs().to_owned()] {
            let before = tree(bpffs);
            let (status, said) = run(dataplane(command).arg("--bpffs").arg(bpffs).args(arguments));
            assert!(status.success(), "{command}: {said}");
            assert_eq!(tree(bpffs), before, "{command}");
            assert!(
                !mounts().contains(&format!("{} bpf", empty.display())),
                "{command}"
            );
        }
    }
    let (status, said) = run(dataplane("check").arg("--bpffs").arg(world.folder()));
    assert_eq!(status.code(), Some(3), "{said}");
    assert!(
        said.contains("lacks  bpffs"),
        "`run` does not mount over it: {said}"
    );
}

#[test]
fn who_reads_no_output_gets_no_panic() {
    let world = World::new();
    for command in ["check", "load"] {
        for (sink, code) in [("true", None), ("cat >/dev/full", None), ("", Some(1))] {
            let line = match sink {
                "" => format!("\"$0\" {command} --bpffs \"$1\" >/dev/full"),
                sink => format!("\"$0\" {command} --bpffs \"$1\" | {sink}"),
            };
            let mut shell = Command::new("sh");
            shell
                .arg("-c")
                .arg(line)
                .arg(program("DATAPLANE_BIN"))
                .arg(world.bpffs());
            let (status, said) = run(&mut shell);
            assert!(!said.contains("panicked"), "{command}: {said}");
            if code.is_some() {
                assert_eq!(status.code(), code, "{command}: {said}");
                assert!(said.contains("standard output"), "{said}");
            }
        }
    }
}

/// What says that nothing is meant.
const NOTHING: &str = "apiVersion: v1\nkind: List\nitems: []\n";

fn policy(one: &One) -> PathBuf {
    one.world.manifests.folder.join("policy-demo-nobody.yaml")
}

/// One whose server nobody may reach.
fn closed() -> (One, Process) {
    let one = One::new();
    let app = one.server.serve(PORT);
    assert!(!one.denies(PORT), "nothing is said yet");
    let (manifests, nobody) = (&one.world.manifests, "cluster.local/ns/x/sa/y");
    manifests.policy("demo", "nobody", "ALLOW", "server", nobody);
    eventually("denied", 10, || one.denies(PORT));
    (one, app)
}

#[test]
fn a_policy_that_is_misspelt_or_commented_out_denies_still_and_that_is_told() {
    let (one, _app) = closed();
    let good = fs::read_to_string(policy(&one)).expect("a policy");
    let commented: String = good.lines().map(|line| format!("# {line}\n")).collect();
    for (bad, told) in [
        (
            good.replace("security.istio.io/v1", "security.istio/v1"),
            "did you mean `security.istio.io/v1`",
        ),
        (
            good.replace("security.istio.io/v1", "security.istio.io/v3"),
            "`security.istio.io/v3` is not read",
        ),
        (
            good.replace("AuthorizationPolicy", "AuthorisationPolicy"),
            "did you mean `AuthorizationPolicy`",
        ),
        (
            good.replace("namespace: demo", "namspace: demo"),
            "did you mean `namespace`",
        ),
        (commented, "has no objects in it"),
    ] {
        fs::write(policy(&one), &bad).expect("a file");
        eventually(told, 10, || one.problems().contains(told));
        assert!(one.denies(PORT), "{bad}");
        one.agent
            .logs(&["policy-demo-nobody.yaml", told, "what it said before holds"]);
    }
    fs::write(policy(&one), good).expect("a file");
    eventually("good again", 10, || one.problems() == "[]");
    assert!(one.denies(PORT));
    one.world.manifests.remove("policy-demo-nobody.yaml");
    eventually("allowed, as its file was removed", 10, || !one.denies(PORT));
}

#[test]
fn c1_a_manifests_folder_that_is_emptied_lets_nobody_go() {
    let (mut one, _app) = closed();
    let folder = one.world.manifests.folder.clone();
    let away = folder.with_extension("away");
    let empty = |one: &One| {
        // As an unmount leaves it.
        fs::rename(&folder, &away).expect("a folder");
        fs::create_dir(&folder).expect("a folder");
        eventually("it is told", 10, || {
            one.problems().contains("has no manifests any more")
        });
        one.agent
            .logs(&["has no manifests any more", "what it said before holds"]);
        assert!(one.is_captured() && one.denies(PORT));
        assert_eq!(one.agent.pod("server").0, "up");
    };
    empty(&one);
    fs::remove_dir(&folder).expect("it is empty");
    fs::rename(&away, &folder).expect("a folder");
    eventually("it is there again", 10, || one.problems() == "[]");
    empty(&one);
    // Nor does a successor that knows of nothing.
    one.agent.kill();
    one.agent.restart();
    eventually("it ends by itself", 20, || !one.agent.runs());
    assert_eq!(one.agent.wait().code(), Some(2));
    let said = one.agent.log();
    assert!(said.contains("1 pods of this node are captured"), "{said}");
    assert!(one.is_captured());
    fs::write(folder.join("nothing.yaml"), NOTHING).expect("a file");
    one.agent.restart();
    eventually("it was said, and the pod is let go", 20, || {
        one.server.netns.show("rule show").lines().count() == 3
    });
}

#[test]
fn c1_a_captured_pod_that_nothing_says_at_a_start_stays_until_manifests_are_whole() {
    let mut one = One::new();
    let folder = &one.world.manifests.folder;
    let (object, team) = (folder.join("pod-demo-server.yaml"), folder.join("team"));
    one.agent.kill();
    // As what is mounted there later.
    fs::create_dir(&team).expect("a folder");
    fs::rename(&object, one.world.folder().join("pod.yaml")).expect("a file");
    one.agent.restart();
    one.agent.logs(&["demo/server", "stays so for now"]);
    std::thread::sleep(scaled(Duration::from_secs(8)));
    assert!(one.is_captured());
    let record = one.world.state.join("enrolled/demo.server.json");
    assert!(record.exists());
    let team_is_empty = format!(
        "no manifest says it; it stays so as long as {} is empty",
        team.display()
    );
    assert!(
        one.problems().contains(&team_is_empty),
        "{}",
        one.problems()
    );
    fs::rename(one.world.folder().join("pod.yaml"), team.join("pod.yaml")).expect("a file");
    one.agent.up(&["server"]);
    assert_eq!(one.problems(), "[]");
    assert!(
        !one.agent.log().contains("left the mesh"),
        "{}",
        one.agent.log()
    );
    // What is still is whole.
    one.agent.kill();
    fs::remove_dir_all(&team).expect("a folder");
    one.agent.restart();
    one.agent.logs(&["demo/server", "stays so for now"]);
    assert!(one.is_captured());
    one.agent.logs(&["demo/server", "it is let go"]);
    eventually("it is let go", 20, || {
        !one.is_captured() && !record.exists()
    });
}

#[test]
fn a_policy_is_read_wherever_a_link_leads_and_whichever_folder_is_there() {
    let mut one = One::new();
    let _app = one.server.serve(PORT);
    let revisions = one.world.folder().join("revisions");
    let first = revisions.join("first");
    fs::create_dir(&revisions).expect("a folder");
    fs::rename(&one.world.manifests.folder, &first).expect("a folder");
    symlink(&first, &one.world.manifests.folder).expect("a link");
    one.agent.kill();
    one.agent.restart();
    one.agent.up(&["server"]);
    assert!(!one.denies(PORT));
    // A file that is a link, to what is edited elsewhere.
    let elsewhere = one.world.folder().join("gate.yaml");
    let gate = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: gate, namespace: demo}\nspec: {action: DENY, rules: [{to: [{operation: {ports: [\"1\"]}}]}]}\n";
    fs::write(&elsewhere, gate).expect("a file");
    symlink(&elsewhere, first.join("gate.yaml")).expect("a link");
    eventually("it is read", 10, || {
        one.agent.get("/config_dump").contains("gate")
    });
    assert!(!one.denies(PORT));
    fs::write(&elsewhere, gate.replace("\"1\"", "\"7000\"")).expect("a file");
    eventually("what is edited behind a link holds", 10, || {
        one.denies(PORT)
    });
    // The whole folder is a link, to another revision.
    let second = revisions.join("second");
    fs::create_dir(&second).expect("a folder");
    for entry in fs::read_dir(&first).expect("a folder").flatten() {
        if entry.file_name() != "gate.yaml" {
            fs::copy(entry.path(), second.join(entry.file_name())).expect("a file");
        }
    }
    let new = one.world.folder().join("new");
    symlink(&second, &new).expect("a link");
    fs::rename(&new, &one.world.manifests.folder).expect("a link");
    eventually("another revision holds", 10, || !one.denies(PORT));
    // The folder is removed, and made again.
    fs::remove_dir_all(&second).expect("a folder");
    eventually("that is told", 10, || {
        one.problems().contains("No such file")
    });
    fs::rename(&first, &second).expect("a folder");
    eventually("what is there now holds", 10, || one.denies(PORT));
    assert_eq!(one.agent.pod("server").0, "up");
}

#[test]
fn c1_pods_stay_with_the_places_that_their_agent_was_given() {
    let mut one = One::new();
    assert_eq!(one.agent.terminate().code(), Some(0));
    assert!(one.is_captured());
    let before = one.traces();
    let (cgroup, state) = (
        one.world.node("two").cgroup,
        one.world.folder().join("other"),
    );
    let at = one.world.setup(&one.node);
    let there = [one.node.cgroup.folder.clone(), at.state];
    let other = [cgroup.folder.clone(), state.clone()];
    for (number, setting) in ["--cgroup", "--state"].into_iter().enumerate() {
        let mut setup = one.world.setup(&one.node);
        match setting {
            "--state" => setup.state.clone_from(&state),
            _ => {
                let at = setup.arguments.iter().position(|word| word == setting);
                setup.arguments[at.expect("it is there") + 1] = cgroup.folder.display().to_string();
            }
        }
        let (status, said) = run(&mut under(&[], &setup.command(), &setup));
        assert_eq!(status.code(), Some(2), "{said}");
        let (there, other) = (there[number].display(), other[number].display());
        assert!(
            said.contains(&format!("{setting} {there}, not {other}")),
            "{said}"
        );
        assert_eq!(one.traces(), before, "{setting}");
    }
    // Of another cluster it would be another pod, and be let go and taken again.
    let mut setup = one.world.setup(&one.node);
    setup
        .arguments
        .extend(["--cluster-id".into(), "other".into()]);
    let (status, said) = run(&mut under(&[], &setup.command(), &setup));
    assert_eq!(status.code(), Some(2), "{said}");
    assert!(
        said.contains("--cluster-id Kubernetes, not other"),
        "{said}"
    );
    assert_eq!(one.traces(), before);
    one.agent.restart();
    one.agent.up(&["server"]);
}

/// The same command as a child of others, and ended if it does not end: an agent that is dropped would
/// uninstall what it shall leave as it is.
fn under(others: &[&str], command: &Command, at: &Setup) -> Command {
    let mut under = Command::new("timeout");
    under
        .args(["--signal=KILL", "20"])
        .args(others)
        .arg(command.get_program())
        .args(command.get_args());
    place(&mut under, &at.place);
    under
}

#[test]
fn c1_who_cannot_see_the_pods_processes_lets_nobody_go() {
    let mut one = One::new();
    assert_eq!(one.agent.terminate().code(), Some(0));
    assert!(one.is_captured());
    let (before, setup) = (one.traces(), one.world.setup(&one.node));
    let check = dataplane("check");
    // As in a container that has not the node's processes.
    let alone = [
        "unshare",
        "--mount",
        "--pid",
        "--fork",
        "--mount-proc",
        "--kill-child",
    ];
    for command in [setup.command(), uninstall(&one, &[]), check] {
        let (status, said) = run(&mut under(&alone, &command, &setup));
        assert_eq!(status.code(), Some(3), "{command:?}: {said}");
        assert!(said.contains("hostPID"), "{command:?}: {said}");
        assert_eq!(one.traces(), before, "{command:?}");
    }
    one.agent.restart();
    one.agent.up(&["server"]);
}

#[test]
fn c1_who_cannot_see_the_pods_cgroups_lets_nobody_go() {
    let mut one = One::new();
    assert_eq!(one.agent.terminate().code(), Some(0));
    let (before, setup) = (one.traces(), one.world.setup(&one.node));
    for command in [setup.command(), uninstall(&one, &[]), dataplane("check")] {
        let (status, said) = run(&mut under(&["unshare", "--cgroup"], &command, &setup));
        assert_eq!(status.code(), Some(3), "{command:?}: {said}");
        assert!(said.contains("--cgroupns=host"), "{command:?}: {said}");
        assert_eq!(one.traces(), before, "{command:?}");
    }
    one.agent.restart();
    one.agent.up(&["server"]);
}

#[test]
fn a_hangup_drains_as_a_request_to_end_does() {
    let mut one = One::new();
    let mut hangup = Command::new("kill");
    let (status, said) = run(hangup.args(["-HUP", &one.agent.pid().to_string()]));
    assert!(status.success(), "{said}");
    assert_eq!(one.agent.wait().code(), Some(0));
    assert!(one.agent.log().contains("draining"), "{}", one.agent.log());
    assert!(one.is_captured());
}

#[test]
fn what_kubernetes_sets_for_a_service_of_our_name_stops_no_command() {
    let world = World::new();
    let mut status = dataplane("status");
    status
        .arg("--run-dir")
        .arg(world.folder())
        .env("DATAPLANE_SERVICE_HOST", "10.0.0.1")
        .env("DATAPLANE_PORT_15020_TCP_ADDR", "10.0.0.1");
    let (ended, said) = run(&mut status);
    assert_eq!(ended.code(), Some(5), "{said}");
    let (ended, said) = run(status.env("DATAPLANE_RUNDIR", "/"));
    assert_eq!(ended.code(), Some(2), "{said}");
    assert!(said.contains("DATAPLANE_RUNDIR is no setting"), "{said}");
}

#[test]
fn a_pod_of_which_other_nodes_cannot_be_told_is_not_up_until_they_can() {
    let world = World::new();
    let node = world.node("one");
    let disk = Mounted::small(world.state.clone());
    let _first = node.pod(&world, "first");
    let mut agent = world.agent(&node);
    agent.up(&["first"]);
    let ready = |agent: &Agent| agent.get("/healthz/ready");
    eventually("it is ready", 10, || ready(&agent).contains(" 200 "));
    let filler = disk.path().join("filler");
    fs::write(&filler, vec![0; 1 << 20]).expect_err("the disk is full");
    let _second = node.pod(&world, "second");
    let full = "enrolled/demo.second.json: No space left on device (os error 28)";
    for _ in 0..2 {
        eventually("it waits, and says why", 20, || {
            let (state, why) = agent.pod("second");
            state == "waiting" && why.contains(full)
        });
        let status = agent.status().unwrap_or_default();
        assert!(status["problems"].to_string().contains(full), "{status}");
        assert!(!ready(&agent).contains(" 200 "));
        agent.up(&["first"]);
        agent.kill();
        fs::remove_file(agent.log_file()).expect("a log");
        agent.restart();
    }
    std::thread::sleep(scaled(Duration::from_secs(5)));
    let log = agent.log();
    let told = log.matches("No space left").count();
    assert!((1..=2).contains(&told), "{log}");
    assert_eq!(agent.tunnelled(), 1);
    fs::remove_file(&filler).expect("a file");
    agent.up(&["first", "second"]);
    assert_eq!(
        agent.status().unwrap_or_default()["problems"],
        serde_json::json!([])
    );
    assert!(ready(&agent).contains(" 200 "));
    eventually("it is dialled by HBONE", 5, || agent.tunnelled() == 2);
}

#[test]
fn levels_that_would_silence_the_log_are_refused_or_told() {
    let mut one = One::new();
    for (level, told) in [
        ("nonsense", "`nonsense` is no level"),
        ("aces=debug", "nothing is logged of `aces`"),
    ] {
        let answer = one.agent.post(&format!("/logging?level={level}"));
        assert!(
            answer.contains(" 400 ") && answer.contains(told),
            "{answer}"
        );
    }
    let answer = one.agent.post("/logging?levle=off");
    assert!(
        answer.contains(" 400 ") && answer.contains("levle"),
        "{answer}"
    );
    let answer = one.agent.post("/logging?level=warn,control=debug");
    assert!(answer.contains(" 200 "), "{answer}");
    for (levels, told) in [
        ("", "started"),
        ("info,aces=debug", "nothing is logged of `aces`"),
    ] {
        one.agent.kill();
        fs::remove_file(one.agent.log_file()).expect("a log");
        one.agent.setup().variables = vec![
            ("RUST_LOG".into(), levels.into()),
            ("LOG_FORMAT".into(), "json".into()),
        ];
        one.agent.restart();
        one.agent.logs(&[told]);
        one.agent.up(&["server"]);
    }
    // What ends it is said in the form of the log.
    one.agent.kill();
    one.agent
        .setup()
        .arguments
        .extend(["--cluster-id".into(), "other".into()]);
    one.agent.restart();
    eventually("it ends by itself", 20, || !one.agent.runs());
    assert_eq!(one.agent.wait().code(), Some(2));
    for line in one.agent.log().lines() {
        let line: serde_json::Value = serde_json::from_str(line).expect(line);
        assert!(line["message"].is_string(), "{line}");
    }
}

#[test]
fn a_node_that_no_pod_is_of_says_so() {
    let world = World::new();
    let (one, two) = world.two_nodes();
    let _pod = one.pod(&world, "pod");
    let agent = world.agent(&two);
    agent.logs(&["no pod is of this node", "nodes=\"one\""]);
}

#[test]
fn a_policy_that_comes_changes_or_goes_leaves_a_word() {
    let (one, _app) = closed();
    let told = |what: &str, namespace: &str| {
        let (what, which) = (
            format!("policy {what}"),
            format!("namespace={namespace} name=nobody kind=AuthorizationPolicy"),
        );
        one.agent.logs(&["info", &what, &which]);
    };
    let policies = || one.agent.status().expect("it answers")["policies"].clone();
    told("added", "demo");
    assert_eq!((policies(), one.problems().as_str()), (1.into(), "[]"));
    let good = fs::read_to_string(policy(&one)).expect("a policy");
    for (edit, problem) in [
        (
            good.replace("namespace: demo", "namespace: dmeo"),
            "AuthorizationPolicy dmeo/nobody: applies to no namespace that a manifest has; did you mean demo?",
        ),
        (
            good.replace("  namespace: demo\n", ""),
            "AuthorizationPolicy default/nobody: applies to no namespace that a manifest has; did you mean demo?",
        ),
        (
            good.replace("app: server", "app: sevrer"),
            "AuthorizationPolicy demo/nobody: selects no pod (app: sevrer)",
        ),
    ] {
        fs::write(policy(&one), &edit).expect("a file");
        eventually(problem, 10, || one.problems().contains(problem));
        one.agent.logs(&["warn", problem]);
        fs::write(policy(&one), &good).expect("a file");
        eventually("good again", 10, || one.problems() == "[]");
    }
    told("removed", "demo");
    told("added", "dmeo");
    told("changed", "demo");
    fs::rename(policy(&one), policy(&one).with_extension("YAML")).expect("a file");
    eventually("it is gone", 10, || policies() == 0);
    one.agent.logs(&[
        "warn",
        "which is not read, and what it said is gone: AuthorizationPolicy demo/nobody",
    ]);
}

#[test]
fn a_pod_that_a_slip_takes_out_of_the_mesh_is_warned_of() {
    let one = One::new();
    let manifests = &one.world.manifests.folder;
    let replace = |file: &str, from: &str, to: &str| {
        let path = manifests.join(file);
        let text = fs::read_to_string(&path).expect("a manifest");
        assert!(text.contains(from), "{text}");
        fs::write(path, text.replace(from, to)).expect("a file");
    };
    let pod = "pod-demo-server.yaml";
    replace(pod, "nodeName: one", "nodeName: noe");
    one.agent
        .logs(&["warn", "spec.nodeName", "demo/server", "node=\"noe\""]);
    replace(pod, "nodeName: noe", "nodeName: one");
    one.agent.up(&["server"]);
    replace("namespace-demo.yaml", "name: demo", "name: dmeo");
    let problem = "Pod demo/server: is of namespace demo, of which no manifest is, and so not in the mesh; did you mean it by Namespace dmeo?";
    eventually(problem, 10, || one.problems().contains(problem));
    one.agent.logs(&["warn", problem]);
}

//! Agents with other folders than those of their node, or that cannot see the pods' processes: they do not start,
//! and touch nothing.

#![allow(missing_docs, reason = "tests are named for what they show")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use dataplane_tests::agent::Setup;
use dataplane_tests::command::{dataplane, refused, run, under, uninstall};
use dataplane_tests::one::tree;
use dataplane_tests::world::Mounted;
use dataplane_tests::{Agent, SingleNode, World, bpf, eventually};

const PORT: u16 = 7000;

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
fn a_start_that_is_refused_leaves_nothing() {
    let mut one = SingleNode::new();
    let scratch = tempfile::tempdir().expect("a folder");
    let at = |name: &str| scratch.path().join(name);
    fs::create_dir(at("bpf")).expect("a folder");
    let (before, traces) = (tree(scratch.path()), one.traces());
    let mounts = || fs::read_to_string("/proc/self/mounts").expect("/proc is mounted");
    let refuse = |one: &SingleNode, what: &str, change: &dyn Fn(&mut Setup)| {
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
    // Nor on the first start.
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
fn a_start_that_is_refused_does_not_unmount_what_another_agent_has_begun_to_use() {
    let world = World::new();
    let node = world.node("one");
    let bpf = world.folder().join("its own");
    fs::create_dir(&bpf).expect("a folder");
    // The check that comes last refuses.
    fs::create_dir_all(world.state.join("ca")).expect("a folder");
    fs::write(world.state.join("ca/stranger"), "").expect("a file");
    let mut setup = world.setup(&node);
    setup.bpffs.clone_from(&bpf);
    let mut agent = Agent::start(setup);
    let others = bpf.join("dataplane");
    let is_mounted = || {
        fs::read_to_string("/proc/self/mounts")
            .is_ok_and(|mounts| mounts.contains("its\\040own bpf "))
    };
    for number in 0.. {
        while agent.runs() && !is_mounted() {
            std::thread::sleep(Duration::from_millis(1));
        }
        fs::create_dir(&others).expect("a folder");
        assert_eq!(agent.wait().code(), Some(2), "{}", agent.log());
        if is_mounted() {
            break;
        }
        // It was mounted for too short a time, and this is in the folder below.
        fs::remove_dir(&others).expect("it was not in what was unmounted");
        assert!(number < 20, "{}", agent.log());
        agent.restart();
    }
    assert!(others.exists());
    nix::mount::umount2(&bpf, nix::mount::MntFlags::empty()).expect("nobody uses it");
    fs::remove_dir_all(&world.state).expect("a folder");
}

#[test]
fn a_start_that_pins_refuse_has_begun_nothing() {
    let world = World::new();
    let node = world.node("one");
    let pins = world.bpffs().join("dataplane/one");
    fs::create_dir_all(&pins).expect("a folder");
    fs::set_permissions(&pins, fs::Permissions::from_mode(0o777)).expect("a mode");
    let refused = |told: &str| {
        let before = tree(world.folder());
        let (_, said) = refused(world.setup(&node));
        assert!(said.contains(told), "{said}");
        fs::remove_file(world.folder().join("one.log")).expect("its log");
        assert_eq!(tree(world.folder()), before, "{said}");
    };
    refused("others than its owner may write");
    fs::remove_dir(&pins).expect("a folder");
    // Nor may other users create a node's folder.
    let all = world.bpffs().join("dataplane");
    fs::set_permissions(&all, fs::Permissions::from_mode(0o777)).expect("a mode");
    refused("others than its owner may write");
    fs::set_permissions(&all, fs::Permissions::from_mode(0o700)).expect("a mode");
    let maps = pins.join("v1/maps");
    fs::create_dir_all(&maps).expect("a folder");
    bpf::hash(&maps.join("INSIDE"), 4);
    refused("`INSIDE`");
}

#[test]
fn c8_a_node_has_one_agent_whatever_folders_another_one_is_given() {
    let mut one = SingleNode::new();
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
    // The records to undo its pods' capture are in its own folder.
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
    // A pod has one agent too: here the other agent's cgroup is above the node's.
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
fn c1_pods_stay_with_the_places_that_their_agent_was_given() {
    let mut one = SingleNode::new();
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
    // In another cluster it would be another pod, and be released and captured again.
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

#[test]
fn c1_who_cannot_see_the_pods_processes_lets_nobody_go() {
    let mut one = SingleNode::new();
    assert_eq!(one.agent.terminate().code(), Some(0));
    assert!(one.is_captured());
    let (before, setup) = (one.traces(), one.world.setup(&one.node));
    let check = dataplane("check");
    // As in a container that does not see the node's processes.
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
    let mut one = SingleNode::new();
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

//! The operator's view of a running agent: commands and their output, log levels, and a full disk.

#![allow(missing_docs, reason = "tests are named for what they show")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::time::Duration;

use dataplane_tests::command::{dataplane, run};
use dataplane_tests::one::tree;
use dataplane_tests::world::Mounted;
use dataplane_tests::{Agent, SingleNode, World, eventually, pause, process, program};

#[test]
fn an_agent_whose_socket_is_gone_is_not_taken_for_none_and_makes_it_again() {
    let one = SingleNode::new();
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
    // Another file in its place does not count either.
    let file = one.world.folder().join("file");
    fs::write(&file, "").expect("a file");
    fs::rename(&file, one.agent.socket()).expect("in its place");
    eventually("it answers by its own socket again", 10, || {
        status(&[]).0.success()
    });
}

#[test]
fn who_may_not_ask_is_not_told_that_nobody_runs() {
    let one = SingleNode::new();
    // Root without capabilities is kept out of what is another user's.
    let mut place = one.world.setup(&one.node).place;
    place.capabilities = Some(Vec::new());
    let run_dir = one.world.folder().join("run");
    let status = |of: &[&str]| {
        let mut status = dataplane("status");
        status.arg("--run-dir").arg(&run_dir).args(of);
        process::place(&mut status, &place);
        run(&mut status)
    };
    assert!(status(&[]).0.success());
    let other = Some(nix::unistd::Uid::from_raw(65534));
    let node = run_dir.join("one");
    for folder in [&node, &run_dir] {
        nix::unistd::chown(folder, other, None).expect("a folder");
        fs::set_permissions(folder, fs::Permissions::from_mode(0o700)).expect("a folder");
        for of in [&[][..], &["--node", "one"]] {
            let (ended, said) = status(of);
            assert_eq!(ended.code(), Some(1), "{said}");
            assert!(
                said.contains(&folder.display().to_string()) && said.contains("may not ask"),
                "{said}"
            );
        }
    }
    nix::unistd::chown(&run_dir, Some(nix::unistd::Uid::from_raw(0)), None).expect("a folder");
    nix::unistd::chown(&node, Some(nix::unistd::Uid::from_raw(0)), None).expect("a folder");
    assert!(status(&[]).0.success());
}

#[test]
fn who_is_started_by_ip_netns_exec_is_told_what_that_takes_away() {
    let world = World::new();
    let node = world.node("one");
    let mut check = Command::new("ip");
    check
        .args(["netns", "exec"])
        .arg(&node.netns.name)
        .arg(program("DATAPLANE_BIN"))
        .arg("check");
    let (_, said) = run(&mut check);
    assert!(
        said.contains("lacks  cgroup v2") && said.contains("nsenter --net="),
        "{said}"
    );
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

#[test]
fn a_hangup_drains_as_a_request_to_end_does() {
    let mut one = SingleNode::new();
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
    agent.up(&["first"]);
    agent.logs(&["No space left"]);
    eventually("the first is dialled by HBONE", 20, || {
        agent.tunnelled() == 1
    });
    pause(Duration::from_secs(5));
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
    let mut one = SingleNode::new();
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
    // The error that ends it has the format of the log.
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

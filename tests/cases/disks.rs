//! Disks that do not answer, as a network file system whose server is away: who waits for one says so, and does all
//! else meanwhile.

#![allow(missing_docs, reason = "tests are named for what they show")]

use std::fs;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use dataplane_tests::agent::Agent;
use dataplane_tests::halves::PORT;
use dataplane_tests::world::Silent;
use dataplane_tests::{Halves, SingleNode, World, eventually, scaled};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// What the line about a disk says.
const TOLD: &str = "the disk has not answered for ";

/// Mounts a file system that answers nothing over a folder below those of a world.
fn silence(world: &World, folder: &str) -> Silent {
    Silent::over(&world.folder().join(folder))
}

/// Puts a manifest into a subfolder, `more`.
fn fill_subfolder(world: &World) {
    let folder = world.manifests.folder.join("more");
    fs::create_dir(&folder).expect("a folder");
    let text = "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: more\n";
    fs::write(folder.join("namespace.yaml"), text).expect("a file");
}

/// Tells an agent to end, and waits until it does.
fn end(agent: &mut Agent) {
    agent.ask_to_end();
    eventually("it ends when it is told to", 10, || !agent.runs());
    assert!(agent.wait().success(), "{}", agent.log());
}

#[test]
fn c1_an_agent_that_starts_on_a_disk_that_does_not_answer_says_so_and_lets_nothing_pass() {
    let mut mesh = Halves::new();
    let _app = mesh.server.serve(PORT);
    fill_subfolder(&mesh.world);
    let taps = mesh.taps();
    let at = mesh.server.at(PORT);
    for (silent, told) in [
        ("manifests", "/manifests: "),
        ("manifests/more", "/manifests: "),
        ("state", "/state: "),
        ("state/ca", "/state: "),
        ("state/enrolled", "/state: "),
    ] {
        let mut agents = [&mut mesh.node, &mut mesh.proxy, &mut mesh.two];
        agents.iter_mut().for_each(|agent| agent.end());
        let silence = silence(&mesh.world, silent);
        agents.iter_mut().for_each(|agent| agent.restart());
        assert!(mesh.client.ask(at, "x").is_err(), "{silent}");
        for agent in &agents {
            agent.logs(&[told, TOLD]);
            let asked = UnixStream::connect(agent.socket());
            assert!(asked.is_err(), "{silent}: nobody says that it is ready");
        }
        agents.iter_mut().for_each(|agent| end(agent));
        drop(silence);
    }
    for agent in [&mut mesh.node, &mut mesh.proxy, &mut mesh.two] {
        agent.restart();
    }
    mesh.node.up(&["client"]);
    mesh.two.up(&["server"]);
    mesh.serves();
    let answer = mesh.client.ask(at, "x");
    assert_eq!(answer, Ok(format!("{} x", mesh.client.v4)));
    taps.saw_nothing_of(PORT..PORT + 1);
}

#[test]
fn an_agent_whose_manifests_stop_to_answer_serves_says_so_and_ends_when_it_is_told_to() {
    let mut mesh = Halves::new();
    let _app = mesh.server.serve(PORT);
    fill_subfolder(&mesh.world);
    let mut live = mesh.live();
    let silence = silence(&mesh.world, "manifests/more");
    for agent in [&mesh.node, &mesh.proxy, &mesh.two] {
        agent.logs(&["/manifests: ", TOLD, "what they said last holds"]);
        assert!(agent.get("/status").contains(TOLD));
        assert!(agent.get("/metrics").contains("dataplane_"));
        assert!(agent.get("/healthz/ready").contains(" 200 "));
    }
    mesh.carries(&mut live, "still");
    let answer = mesh.client.ask(mesh.server.at(PORT), "new");
    assert_eq!(answer, Ok(format!("{} new", mesh.client.v4)));
    drop(live);
    for agent in [&mut mesh.proxy, &mut mesh.node, &mut mesh.two] {
        end(agent);
    }
    drop(silence);
}

#[test]
fn an_uninstall_that_waits_for_a_disk_says_so_and_ends_at_ctrl_c() {
    let mut one = SingleNode::new();
    one.agent.kill();
    let silence = silence(&one.world, "state");
    let log = one.world.folder().join("uninstall.log");
    let mut command = one.agent.uninstall_command();
    let file = fs::File::create(&log).expect("a file");
    let mut uninstall = command.stderr(file).spawn().expect("a program");
    eventually("which disk does not answer is told", 20, || {
        let said = fs::read_to_string(&log).expect("a file");
        said.contains("/state: ") && said.contains(TOLD)
    });
    let pid = Pid::from_raw(uninstall.id().try_into().expect("a pid"));
    kill(pid, Signal::SIGINT).expect("it runs");
    eventually("it ends", 10, || {
        uninstall.try_wait().expect("a child").is_some()
    });
    assert!(one.is_captured(), "nothing is let go without the state");
    drop(silence);
    let (status, said, error) = one.agent.uninstall();
    assert!(
        status.success() && said.contains("nothing is left"),
        "{error}"
    );
}

#[test]
fn a_state_that_does_not_answer_holds_up_neither_capture_nor_status_nor_the_end() {
    let mut one = SingleNode::new();
    let silent = silence(&one.world, "state");
    let late = one.node.pod(&one.world, "late");
    let mut told = String::new();
    eventually("which file does not answer is told", 20, || {
        let (state, reason) = one.agent.pod("late");
        told = format!("{state}: {reason}");
        told.contains("enrolled/demo.late.json: the disk has not answered for longer than 5s")
    });
    assert!(told.starts_with("waiting: "), "{told}");
    let told = one.problems();
    assert!(told.contains("has not answered for "), "{told}");
    assert!(
        late.netns.show("rule show").contains("0x511"),
        "it is captured"
    );

    // Other nodes may dial who leaves as long as they are not told; but not for ever.
    one.world.manifests.remove_pod("demo", "server");
    std::thread::sleep(Duration::from_secs(3));
    let is_captured = || one.server.netns.show("rule show").contains("0x511");
    assert!(is_captured());
    eventually("the state counts as away", 60, || {
        one.problems().contains("has been read for longer than 30s")
    });
    eventually("it is let go", 20, || !is_captured());

    let begin = Instant::now();
    assert!(one.agent.terminate().success());
    let took = begin.elapsed();
    assert!(took < scaled(Duration::from_secs(10)), "it took {took:?}");
    drop(silent);
    one.agent.restart();
    one.agent.up(&["late"]);
    eventually("all is well", 10, || one.problems() == "[]");
    let records = one.world.state.join("enrolled");
    assert!(!records.join("demo.server.json").exists());
}

#[test]
fn manifests_on_a_disk_that_does_not_answer_are_told_and_what_they_said_holds() {
    let one = SingleNode::new();
    let silent = silence(&one.world, "manifests");
    let told = "manifests: the disk has not answered for longer than 5s; what they said last holds";
    eventually("that is told", 20, || one.problems().contains(told));
    assert_eq!(one.agent.pod("server").0, "up");
    drop(silent);
    let _late = one.node.pod(&one.world, "late");
    one.agent.up(&["late"]);
    assert_eq!(one.problems(), "[]");
    one.agent.logs(&["\tinfo\t", "over: ", told]);
}

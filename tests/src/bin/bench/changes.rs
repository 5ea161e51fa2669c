//! How long a connection between nodes takes while the mesh changes 1,000 times a second, and what a change costs the
//! agent. To write the changes costs the machine too: that is measured by itself, in a folder that nobody watches.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use dataplane_tests::interrupt::interrupted;
use dataplane_tests::manifests::Manifests;
use dataplane_tests::{Agent, Node, Pod, Process, World, eventually, program};
use serde_json::Value;

use crate::rounds::{Numbers, Rounds};

/// Where the server listens.
const PORT: u16 = 7000;
/// Connections begun a second.
const RATE: u32 = 500;
/// The workloads of a file.
const IN_A_FILE: u32 = 10;
/// The files of workloads on other nodes.
const FILES: u32 = 1000;
/// How many files change at once, and how often they do: 1,000 workloads a second.
const AT_ONCE: u32 = 10;
const EVERY: Duration = Duration::from_millis(100);

/// Ticks of a second in `/proc/PID/stat`, on every Linux that the agent runs on.
const TICKS: u64 = 100;
/// After this long the agent follows what is written.
const SETTLES: Duration = Duration::from_secs(1);
/// How many workloads change a second.
const CHANGES: u32 = 1000;
const _: () = assert!(CHANGES as u128 * EVERY.as_millis() == 1000 * (AT_ONCE * IN_A_FILE) as u128);

/// The ways, in their order in a round.
const WAYS: [&str; 4] = [
    "idle",
    "idle again",
    "1,000 changes a second that nobody watches",
    "1,000 changes a second",
];
const P99: &str = "p99, µs";
/// The name of what the agent takes of the processor.
const PROCESSOR: &str = "processor time of the agent, ms a second";

/// Two pods of two nodes. The client's agent knows the mesh, the server's the two pods only: what is measured is one
/// agent.
struct Mesh {
    /// The processes come first: they end before what they are in is removed.
    _echo: Process,
    one: Agent,
    _two: Agent,
    client: Pod,
    server: Pod,
    _nodes: (Node, Node),
    world: World,
}

/// What was measured.
pub(crate) struct Measured {
    pub(crate) rounds: Rounds,
    /// p99 while the agent follows the changes, to that while they are only written: least, median and most.
    pub(crate) reaction: (f64, f64, f64),
    /// The agent's processor time for each change, in microseconds; of each round.
    pub(crate) for_each: Vec<f64>,
}

/// Returns `None` if it was interrupted.
pub(crate) fn measure(quick: bool) -> Option<Measured> {
    let (count, seconds) = if quick { (2, 3) } else { (10, 9) };
    println!(
        "two nodes, {} workloads elsewhere, {RATE} connections a second for {seconds} s each time",
        FILES * IN_A_FILE
    );
    let mesh = Mesh::start();
    let mut watched = Changes::new(Manifests {
        folder: mesh.world.manifests.folder.clone(),
    });
    let mut unwatched = Changes::new(Manifests::new(&mesh.world.folder().join("unwatched")));
    for changes in [&mut watched, &mut unwatched] {
        changes.write(FILES);
    }
    mesh.waits_for(&watched);
    // What the first connections wait for is measured by none.
    mesh.load(1);
    let mut rounds = Rounds::new(&WAYS);
    let mut for_each = Vec::new();
    for number in 1..=count {
        let mut round = Vec::new();
        for way in 0..WAYS.len() {
            round.push(match way {
                0 | 1 => mesh.load(seconds),
                2 => mesh.load_while(&mut unwatched, seconds),
                _ => mesh.load_while(&mut watched, seconds),
            });
            if interrupted() {
                return None;
            }
        }
        mesh.waits_for(&watched);
        rounds.add(round);
        println!("[{number}/{count}] p99, µs: {:?}", rounds.last(P99));
        let processor = rounds.last(PROCESSOR);
        let more = processor[3] - f64::midpoint(processor[0], processor[1]);
        for_each.push(more * 1000.0 / f64::from(CHANGES));
    }
    let reaction = rounds.ratio(P99, 3, 2);
    Some(Measured {
        rounds,
        reaction,
        for_each,
    })
}

impl Mesh {
    fn start() -> Self {
        let world = World::new();
        let nodes = world.two_nodes();
        let (client, server) = (nodes.0.pod(&world, "client"), nodes.1.pod(&world, "server"));
        // Who closes a connection keeps its port for a minute: there are not enough by default.
        for pod in [&client, &server] {
            let all = "1024 65535";
            pod.netns.set_sysctl("net.ipv4.ip_local_port_range", all);
        }
        let few = Manifests::new(&world.folder().join("few"));
        few.namespace("demo", true);
        for (node, pod) in [(&nodes.0, &client), (&nodes.1, &server)] {
            few.pod(&node.object(pod));
        }
        let mut settings = [&nodes.0, &nodes.1].map(|node| world.setup(node));
        for setup in &mut settings {
            setup.variables = Vec::new();
        }
        let [one, mut two] = settings;
        replace(&mut two.arguments, &world.manifests.folder, &few.folder);
        let (one, two) = (Agent::start(one), Agent::start(two));
        one.up(&["client"]);
        two.up(&["server"]);
        eventually("each pod is dialled by HBONE", 20, || {
            one.tunnelled() >= 2 && two.tunnelled() >= 2
        });
        let mut echo = server.command(program("DATAPLANE_TEST_LOAD"));
        let echo = Process::start(echo.args(["echo", &PORT.to_string()]));
        assert_eq!(echo.line(), "ready");
        Self {
            _echo: echo,
            one,
            _two: two,
            client,
            server,
            _nodes: nodes,
            world,
        }
    }

    fn load(&self, seconds: u32) -> Numbers {
        let mut load = self.client.command(program("DATAPLANE_TEST_LOAD"));
        let to = self.server.at(PORT).to_string();
        let before = processor_time(&self.one);
        let load =
            Process::start(load.args(["connects", &to, &RATE.to_string(), &seconds.to_string()]));
        let (status, lines) = load.end();
        let processor = processor_time(&self.one) - before;
        let said = lines.first().expect("what the load has measured");
        let said: Value = serde_json::from_str(said).expect("JSON");
        let all = said["answered"].as_u64() == Some((RATE * seconds).into());
        assert!(status.success() && all, "not all were answered: {said}");
        let number = |name: &str| said[name].as_f64().expect("a number");
        vec![
            ("p50, µs", number("p50")),
            (P99, number("p99")),
            ("p99.9, µs", number("p999")),
            (
                PROCESSOR,
                processor.as_secs_f64() * 1000.0 / f64::from(seconds),
            ),
        ]
    }

    /// The load while these change.
    fn load_while(&self, changes: &mut Changes, seconds: u32) -> Numbers {
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            let writer = scope.spawn(|| {
                let begin = Instant::now();
                for number in 1.. {
                    changes.write(AT_ONCE);
                    thread::sleep((EVERY * number).saturating_sub(begin.elapsed()));
                    if over.load(Ordering::Relaxed) {
                        let each = begin.elapsed() / number;
                        assert!(
                            each < EVERY * 11 / 10,
                            "files are written every {each:?} only"
                        );
                        return;
                    }
                }
            });
            // Also if the load fails: the writer would go on for ever.
            let end = End(&over);
            // A file counts some time after it was written: from then on as much is done as is written.
            thread::sleep(SETTLES);
            let numbers = self.load(seconds);
            drop(end);
            writer.join().expect("it writes in time");
            numbers
        })
    }

    fn waits_for(&self, changes: &Changes) {
        let account = changes.account();
        eventually("the last change is known", 60, || {
            self.one.get("/config_dump").contains(&account)
        });
    }
}

/// Sets a flag when it is dropped.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn replace(arguments: &mut [String], from: &Path, to: &Path) {
    let from = from.display().to_string();
    let place = arguments.iter_mut().find(|argument| **argument == from);
    *place.expect("it is there") = to.display().to_string();
}

/// Returns the time for which the agent has had a processor.
fn processor_time(agent: &Agent) -> Duration {
    let path = format!("/proc/{}/stat", agent.pid());
    let stat = fs::read_to_string(path).expect("it runs");
    // The command, in parentheses, may have spaces; user and system time are the 12th and 13th field after it.
    let after = stat.rsplit_once(')').expect("a command").1;
    let ticks = after.split_whitespace().skip(11).take(2);
    let ticks: u64 = ticks.map(|of| of.parse::<u64>().expect("a number")).sum();
    Duration::from_millis(ticks * 1000 / TICKS)
}

/// Workloads elsewhere, of which some become another account's each time.
struct Changes {
    manifests: Manifests,
    /// How many files were written.
    written: u32,
}

impl Changes {
    fn new(manifests: Manifests) -> Self {
        let written = 0;
        Self { manifests, written }
    }

    /// The account of what was written last.
    fn account(&self) -> String {
        format!("account-{:08}", self.written)
    }

    /// Writes the next so many files.
    fn write(&mut self, files: u32) {
        for _ in 0..files {
            self.write_next();
        }
    }

    fn write_next(&mut self) {
        let file = self.written % FILES;
        self.written += 1;
        let account = self.account();
        let mut text = String::new();
        for pod in 0..IN_A_FILE {
            let _ = write!(
                text,
                "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: pod-{file}-{pod}, namespace: demo}}\n\
                 spec: {{nodeName: elsewhere, serviceAccountName: {account}}}\n\
                 status: {{phase: Running, podIPs: [{{ip: 10.{}.{}.{pod}}}]}}\n",
                200 + file / 250,
                file % 250
            );
        }
        self.manifests.write(&format!("pods-{file}.yaml"), &text);
    }
}

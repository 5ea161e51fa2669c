//! How long a connection between nodes takes while the mesh changes 1,000 times a second.

use std::fmt::Write as _;
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

/// Returns `None` if it was interrupted.
pub(crate) fn measure(quick: bool) -> Option<Rounds> {
    let (count, seconds) = if quick { (2, 3) } else { (10, 10) };
    println!(
        "two nodes, {} workloads elsewhere, {RATE} connections a second for {seconds} s each time",
        FILES * IN_A_FILE
    );
    let mesh = Mesh::start();
    let mut changes = Changes::default();
    changes.write(&mesh.world.manifests, FILES);
    mesh.waits_for(&changes);
    // What the first connections wait for is measured by none.
    mesh.load(1);
    let mut rounds = Rounds::new(&["idle", "idle again", "1,000 changes a second"]);
    for number in 1..=count {
        let idle = mesh.load(seconds);
        let again = mesh.load(seconds);
        let busy = mesh.busy(&mut changes, seconds);
        println!(
            "[{number}/{count}] p99 {:?}",
            [&idle, &again, &busy].map(|of| of[1].1)
        );
        rounds.add(vec![idle, again, busy]);
        if interrupted() {
            return None;
        }
    }
    Some(rounds)
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
        let load =
            Process::start(load.args(["connects", &to, &RATE.to_string(), &seconds.to_string()]));
        let (status, lines) = load.end();
        let said: Value = serde_json::from_str(&lines[0]).expect("JSON");
        let all = said["answered"].as_u64() == Some((RATE * seconds).into());
        assert!(status.success() && all, "not all were answered: {said}");
        let number = |name: &str| said[name].as_f64().expect("a number");
        vec![
            ("p50, µs", number("p50")),
            ("p99, µs", number("p99")),
            ("p99.9, µs", number("p999")),
        ]
    }

    /// The load while the mesh changes. What was changed last is known at the end.
    fn busy(&self, changes: &mut Changes, seconds: u32) -> Numbers {
        let over = AtomicBool::new(false);
        let manifests = &self.world.manifests;
        let numbers = thread::scope(|scope| {
            let writer = scope.spawn(|| {
                let begin = Instant::now();
                for number in 1.. {
                    changes.write(manifests, AT_ONCE);
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
            let numbers = self.load(seconds);
            drop(end);
            writer.join().expect("it writes in time");
            numbers
        });
        self.waits_for(changes);
        numbers
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

/// Workloads elsewhere, of which some become another account's each time.
#[derive(Default)]
struct Changes {
    /// How many files were written.
    written: u32,
}

impl Changes {
    /// The account of what was written last.
    fn account(&self) -> String {
        format!("account-{:08}", self.written)
    }

    /// Writes the next so many files.
    fn write(&mut self, manifests: &Manifests, files: u32) {
        for _ in 0..files {
            self.write_next(manifests);
        }
    }

    fn write_next(&mut self, manifests: &Manifests) {
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
        manifests.write(&format!("pods-{file}.yaml"), &text);
    }
}

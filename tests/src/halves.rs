//! Two nodes, the first with an agent of two processes.

use std::path::PathBuf;

use crate::one::tree;
use crate::{Agent, Node, Pod, Process, Taps, World, eventually};

/// The port of the server's app.
pub const PORT: u16 = 7000;

/// The pods `client`, on a node whose agent is two processes, and `server`, on another node.
#[derive(Debug)]
pub struct Halves {
    /// The pod on the first node.
    pub client: Pod,
    /// The pod on the second node.
    pub server: Pod,
    /// The first node's proxy half. It logs to `proxy-1.log`.
    pub proxy: Agent,
    /// The first node's node half.
    pub node: Agent,
    /// The second node's agent, both halves in one process.
    pub two: Agent,
    /// The nodes.
    pub nodes: (Node, Node),
    /// The world that they are in.
    pub world: World,
}

impl Halves {
    /// Starts all, and waits until the client's proxy dials the server by HBONE.
    pub fn new() -> Self {
        let world = World::new();
        let nodes = world.two_nodes();
        let (client, server) = (nodes.0.pod(&world, "client"), nodes.1.pod(&world, "server"));
        let two = world.agent(&nodes.1);
        two.up(&["server"]);
        let node = Agent::start(world.half(&nodes.0, "node", "node"));
        let proxy = Agent::start(world.half(&nodes.0, "proxy", "proxy-1"));
        node.up(&["client"]);
        let halves = Self {
            client,
            server,
            proxy,
            node,
            two,
            nodes,
            world,
        };
        halves.serves();
        halves
    }

    /// Waits until the node is ready and its proxy dials the server by HBONE.
    pub fn serves(&self) {
        self.proxy.logs(&["started"]);
        eventually("the node is ready", 20, || {
            self.node.get("/healthz/ready").contains(" 200 ")
        });
        eventually("the server is in the mesh", 20, || {
            self.proxy.tunnelled() >= 2
        });
    }

    /// Starts another proxy half of the first node.
    pub fn another(&self, log: &str) -> Agent {
        Agent::start(self.world.half(&self.nodes.0, "proxy", log))
    }

    /// Captures what is on the wires between the pods.
    pub fn taps(&self) -> Taps {
        Taps::between(&self.nodes, (&self.client, &self.server))
    }

    /// Connects from the client to the server's app, and waits until that answers.
    pub fn live(&self) -> Process {
        self.client.live(self.server.at(PORT))
    }

    /// Checks that a connection of the client still carries a word and its answer.
    pub fn carries(&self, live: &mut Process, word: &str) {
        live.say(word);
        assert_eq!(live.line(), format!("{} {word}", self.client.v4));
    }

    /// Gives the client another service account.
    pub fn change_account(&self) {
        let mut object = self.nodes.0.object(&self.client);
        object.account = "another";
        self.world.manifests.pod(&object);
    }

    /// Kills the node half, starts it again, and waits until it has taken the pod over.
    pub fn restart_node(&mut self) {
        self.node.kill();
        self.node.restart();
        self.node.up(&["client"]);
    }

    /// Has the proxy drain for this long, as `300s`.
    pub fn drains_for(&mut self, long: &str) {
        self.proxy.terminate();
        self.proxy.setup().drains_for(long);
        self.proxy.restart();
        self.serves();
    }

    /// Returns the paths of all that the first node has in the run folder.
    pub fn left(&self) -> Vec<PathBuf> {
        let run = self.world.folder().join("run");
        let all = tree(&run).into_keys();
        all.filter(|path| {
            let below = path.strip_prefix(&run).expect("it is below");
            below.display().to_string().starts_with("one")
        })
        .collect()
    }
}

impl Default for Halves {
    fn default() -> Self {
        Self::new()
    }
}

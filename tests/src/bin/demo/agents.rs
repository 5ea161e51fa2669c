//! The agent of a node: one process, or a process for each half.

use dataplane_tests::{Agent, Node, World};
use serde_json::Value;

/// The processes of a node's agent. The proxy half is dropped first.
pub(crate) struct NodeAgent {
    proxy: Option<Agent>,
    node: Agent,
}

impl NodeAgent {
    /// Starts it, with `halves` as two processes.
    pub(crate) fn start(world: &World, node: &Node, halves: bool) -> Self {
        if !halves {
            let node = world.agent(node);
            return Self { proxy: None, node };
        }
        let half = |which| {
            let log = format!("{}.{which}", node.name);
            Agent::start(world.half(node, which, &log))
        };
        Self {
            proxy: Some(half("proxy")),
            node: half("node"),
        }
    }

    /// Returns the process that carries connections.
    fn proxy(&self) -> &Agent {
        self.proxy.as_ref().unwrap_or(&self.node)
    }

    /// Returns the state of the node, as the process that captures has it.
    pub(crate) fn status(&self) -> Option<Value> {
        self.node.status()
    }

    /// Returns all that the process that carries connections has logged.
    pub(crate) fn log(&self) -> String {
        self.proxy().log()
    }

    /// Returns the number of pods that it dials by HBONE.
    pub(crate) fn tunnelled(&self) -> usize {
        self.proxy().tunnelled()
    }

    /// Returns `true` if the mesh as it knows it contains `what`.
    pub(crate) fn knows(&self, what: &str) -> bool {
        self.proxy().get("/config_dump").contains(what)
    }

    /// Returns the paths of its logs, and of the admin socket that has the mesh.
    pub(crate) fn paths(&self) -> (Vec<String>, String) {
        let processes = self.proxy.iter().chain([&self.node]);
        let logs = processes.map(|process| process.log_file().display().to_string());
        let socket = self.proxy().socket().display().to_string();
        (logs.collect(), socket)
    }
}

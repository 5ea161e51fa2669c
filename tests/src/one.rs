//! The smallest mesh: one pod in it, another pod on the same node that is in none, and what keeps the
//! first one captured.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::{Agent, Node, Pod, World};

/// A node with its agent and two pods.
#[derive(Debug)]
pub struct SingleNode {
    /// The pod in the mesh, which is up.
    pub server: Pod,
    /// The pod that is not.
    pub outsider: Pod,
    /// The node's agent.
    pub agent: Agent,
    /// The node, `one`.
    pub node: Node,
    /// Where it is.
    pub world: World,
}

impl SingleNode {
    /// With the server up.
    pub fn new() -> Self {
        let world = World::new();
        let node = world.node("one");
        let server = node.pod(&world, "server");
        let outsider = node.bare(&world, "outside", "outsider");
        let agent = world.agent(&node);
        agent.up(&["server"]);
        Self {
            server,
            outsider,
            agent,
            node,
            world,
        }
    }

    /// The node's folder for what is running.
    pub fn folder(&self) -> PathBuf {
        self.world.folder().join("run/one")
    }

    /// What keeps the server captured: its rules, how many pins, how many records.
    pub fn traces(&self) -> (String, usize, usize) {
        let rules = self.server.netns.show("rule show");
        let pins = tree(self.world.bpffs()).len();
        let records = fs::read_dir(self.folder().join("pods")).map_or(0, Iterator::count);
        (rules, pins, records)
    }

    /// Whether all of it is there.
    pub fn is_captured(&self) -> bool {
        let (rules, pins, records) = self.traces();
        rules.lines().count() > 3 && pins > 7 && records == 1
    }

    /// Whether the outsider is refused at this port of the server, where an app serves.
    pub fn denies(&self, port: u16) -> bool {
        self.outsider.ask(self.server.at(port), "x").is_err()
    }

    /// What the agent says is wrong with its manifests, in JSON; `[]` if nothing is.
    pub fn problems(&self) -> String {
        let status = self.agent.status().unwrap_or_default();
        status["problems"].to_string()
    }
}

impl Default for SingleNode {
    fn default() -> Self {
        Self::new()
    }
}

/// All that is below a folder: what it is, and what is in it.
pub fn tree(folder: &Path) -> BTreeMap<PathBuf, String> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let (path, kind) = (entry.path(), entry.file_type().expect("a kind"));
        let what = match () {
            () if kind.is_dir() => {
                found.append(&mut tree(&path));
                "folder".into()
            }
            () if kind.is_symlink() => format!("to {:?}", fs::read_link(&path)),
            () => format!("file {:?}", fs::read_to_string(&path).ok()),
        };
        found.insert(path, what);
    }
    found
}

//! The smallest mesh: a node with one pod in the mesh and one outside of it, and the traces of the first one's
//! capture.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::{Agent, Node, Pod, World};

/// A node with its agent and two pods.
#[derive(Debug)]
pub struct SingleNode {
    /// The pod in the mesh, which is up.
    pub server: Pod,
    /// The pod outside of the mesh.
    pub outsider: Pod,
    /// The node's agent.
    pub agent: Agent,
    /// The node, `one`.
    pub node: Node,
    /// The world that it is in.
    pub world: World,
}

impl SingleNode {
    /// Starts it, and waits until the server is up.
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

    /// Returns the node's folder in `--run-dir`.
    pub fn folder(&self) -> PathBuf {
        self.world.folder().join("run/one")
    }

    /// Returns the traces of the server's capture: its rules, the number of pins, and the number of records.
    pub fn traces(&self) -> (String, usize, usize) {
        let rules = self.server.netns.show("rule show");
        let pins = tree(self.world.bpffs()).len();
        let records = fs::read_dir(self.folder().join("pods")).map_or(0, Iterator::count);
        (rules, pins, records)
    }

    /// Returns `true` if all traces are there.
    pub fn is_captured(&self) -> bool {
        let (rules, pins, records) = self.traces();
        rules.lines().count() > 3 && pins > 7 && records == 1
    }

    /// Returns `true` if the server refuses the outsider at this port, where an app serves.
    pub fn denies(&self, port: u16) -> bool {
        self.outsider.ask(self.server.at(port), "x").is_err()
    }

    /// Returns the problems of the manifests that the agent reports, in JSON; `[]` if there are none.
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

/// Returns all paths below a folder, each with its type and contents.
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

//! Undoes what an agent has left, by its records. What cannot be undone is reported, and its record stays, so
//! that it can be tried again.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf, absolute};

use aya::programs::links::LinkType;

use super::node_folder::{self, NodeFolder};
use super::pins::{self, Pins};
use super::{CaptureError, attached, enrol, routes};
use crate::config::{NodeName, Places};
use crate::mesh::workload::named;
use crate::seam::ProxyLock;
use crate::sys::hooks;

/// A node whose agent has stopped, locked so that nobody else can start or uninstall it.
#[derive(Debug)]
pub struct StoppedNode {
    folder: NodeFolder,
    pins: Pins,
    cgroup: PathBuf,
    root: Option<String>,
    /// The admin socket of its proxies, which one that was killed has left.
    proxy_socket: PathBuf,
    _lock: Option<File>,
    _no_proxy: ProxyLock,
}

/// The result of an uninstall.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Number of pods that are as they were before.
    pub pods: usize,
    /// What is left and why, one line each.
    pub left: Vec<String>,
}

impl StoppedNode {
    /// Finds a node with the places that its agent was given; `state` without links. Nothing but the lock file is
    /// changed.
    ///
    /// # Errors
    /// No such node is known here, or it has other places; an agent runs; a proxy runs: without capture its
    /// connections would leave in clear.
    pub fn find(places: &Places, state: &Path, node: &NodeName) -> Result<Self, CaptureError> {
        let (mut folder, mark) = NodeFolder::open(&places.run_dir, node)?;
        let mut others = Vec::new();
        for (setting, given, there) in [
            ("--bpffs", &*canonical(&places.bpffs), &mark.bpffs),
            ("--state", state, &mark.state),
        ] {
            if given != there {
                others.push(format!("{setting} {}", there.display()));
            }
        }
        if !others.is_empty() {
            return Err(CaptureError::OtherPlace(format!(
                "the agent of node {node} was started with {}: say so",
                others.join(" and ")
            )));
        }
        let mut pins = Pins::new(&mark.bpffs, node);
        let _lock = pins.lock()?;
        let path = places.proxy_lock(node);
        let no_proxy = ProxyLock::exclude(&path).map_err(CaptureError::file(&path))?;
        let _no_proxy = no_proxy.ok_or(CaptureError::Serves(path))?;
        pins.refuse_unrecorded(&folder.records()?)?;
        // Programs that are not pinned here would stay, without their routes.
        if mark.cgroup.exists() {
            attached::refuse_on_cgroup(&mark.cgroup, &pins, &BTreeSet::new())?;
        }
        folder.set_uninstalling();
        Ok(Self {
            folder,
            pins,
            cgroup: mark.cgroup,
            root: mark.root,
            proxy_socket: places.proxy_socket(node),
            _lock,
            _no_proxy,
        })
    }

    /// Returns the fingerprint of the root of the node's state, if its agent wrote it.
    pub fn root(&self) -> Option<&str> {
        self.root.as_deref()
    }

    /// Releases the node's pods, and removes all that its agent has left. `left` is what is left elsewhere
    /// already: while anything is left, what is needed to try again stays too.
    ///
    /// # Errors
    /// The pins cannot be removed, or the records cannot be read; they stay.
    pub async fn uninstall(self, left: Vec<String>) -> Result<Outcome, CaptureError> {
        let mut done = Outcome { pods: 0, left };
        let mut leave = |what: &dyn fmt::Display| done.left.push(what.to_string());
        let own = attached::own_programs(&self.pins)?;
        // The programs on the cgroup go first: without their mark a packet needs no route. Each pod's program
        // goes after its routes: what it has sent by them is retransmitted, and must not reach its own app.
        attached::detach(&own, Some(LinkType::Cgroup), &self.pins)?;
        let records = self.folder.records()?;
        let mut kept = Vec::new();
        for (path, record) in records.read_all()? {
            let undone = match record {
                Ok(record) => enrol::undo(&record, None, &records, &self.pins)
                    .await
                    .map_err(|error| format!("pod {}: {error}", named(&record.uid))),
                Err(error) => Err(error.to_string()),
            };
            match undone {
                Ok(()) => done.pods += 1,
                Err(error) => {
                    leave(&format_args!(
                        "{error}; how to undo it is in {}",
                        path.display()
                    ));
                    kept.push(path);
                }
            }
        }
        attached::detach(&own, None, &self.pins)?;
        if let Ok(folder) = File::open(&self.cgroup) {
            let attached = hooks::of_cgroup(&folder).map_err(CaptureError::file(&self.cgroup))?;
            if let Some(error) = attached::still_attached(&attached, &own) {
                leave(&format_args!(
                    "programs on {}: {error}",
                    self.cgroup.display()
                ));
            }
        }
        let stays = "is not an agent's";
        for path in self.pins.remove_all()? {
            leave(&format_args!("{}: {stays}", path.display()));
        }
        pins::remove(&self.proxy_socket)?;
        for path in self.folder.remove(done.left.is_empty())? {
            if !kept.contains(&path) {
                done.left.push(format!("{}: {stays}", path.display()));
            }
        }
        Ok(done)
    }
}

/// Refuses an unknown node if there is a folder or a pin of that name, or another node that may be meant.
///
/// # Errors
/// There is something.
pub fn refuse_unless_clean(
    unknown: CaptureError,
    run_dir: &Path,
    bpffs: &Path,
    node: &NodeName,
) -> Result<(), CaptureError> {
    let folder = run_dir.join(node.as_str());
    let pins = Pins::new(&canonical(bpffs), node);
    let is_there = std::fs::symlink_metadata(&folder).is_ok() || pins.exist();
    if is_there || !node_folder::known(run_dir).is_empty() {
        return Err(unknown);
    }
    Ok(())
}

/// Refuses if an agent's programs or rules are anywhere on this machine: it may have been started with other
/// places than those given.
///
/// # Errors
/// There are some; the machine cannot be searched.
pub fn refuse_elsewhere(run_dir: &Path, bpffs: &Path, node: &NodeName) -> Result<(), CaptureError> {
    let pins = Pins::new(&canonical(bpffs), node);
    let links = attached::count_links(&pins)?;
    let namespaces = routes::namespaces_with_rules()?;
    if links == 0 && namespaces == 0 {
        return Ok(());
    }
    Err(CaptureError::Elsewhere {
        node: node.clone(),
        run_dir: run_dir.to_owned(),
        pins: pins.folder().to_owned(),
        links,
        namespaces,
    })
}

/// Returns a path as it is written in a mark, whether it exists or not. Symbolic links on the way to what is
/// not mounted are resolved as before.
pub fn canonical(path: &Path) -> PathBuf {
    let path = absolute(path).unwrap_or_else(|_| path.to_owned());
    let there = path.ancestors().find_map(|above| {
        let rest = path.strip_prefix(above).ok()?;
        Some((std::fs::canonicalize(above).ok()?, rest))
    });
    match there {
        None => path,
        Some((there, rest)) => there.components().chain(rest.components()).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_behind_a_link_is_at_the_same_path_while_it_is_away() {
        let top = tempfile::tempdir().expect("a folder");
        let (link, disk) = (top.path().join("data"), top.path().join("disk"));
        std::fs::create_dir_all(disk.join("mesh/state")).expect("a folder");
        std::os::unix::fs::symlink(&disk, &link).expect("a link");
        let there = canonical(&link.join("mesh/state"));
        assert_eq!(there, canonical(&disk.join("mesh/state")));
        std::fs::remove_dir_all(disk.join("mesh")).expect("a folder");
        assert_eq!(canonical(&link.join("mesh/state")), there);
        assert_eq!(canonical(&link.join(".").join("mesh//state/")), there);
    }
}

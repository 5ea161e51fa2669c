//! Takes back what an agent has left, by what it wrote down. What cannot be taken back is told, and its
//! record stays, so that it can be tried again.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf, absolute};

use aya::programs::links::LinkType;

use super::node_folder::{self, NodeFolder};
use super::pins::Pins;
use super::{CaptureError, attached, enrol, routes};
use crate::config::NodeName;
use crate::mesh::workload::named;
use crate::sys::hooks;

/// A node whose agent has ended, and that nobody else can start or uninstall meanwhile.
#[derive(Debug)]
pub struct StoppedNode {
    folder: NodeFolder,
    pins: Pins,
    cgroup: PathBuf,
    root: Option<String>,
    _lock: Option<std::fs::File>,
}

/// What became of it.
#[derive(Debug, Default)]
pub struct Outcome {
    /// How many pods are as they were before.
    pub pods: usize,
    /// What is left, and why; a line each.
    pub left: Vec<String>,
}

impl StoppedNode {
    /// Finds it, with the places that its agent was given. Nothing is changed.
    ///
    /// # Errors
    /// No such node is known here, or with other places; an agent runs.
    pub fn find(
        run_dir: &Path,
        bpffs: &Path,
        state: &Path,
        node: &NodeName,
    ) -> Result<Self, CaptureError> {
        let (mut folder, mark) = NodeFolder::open(run_dir, node)?;
        let mut others = Vec::new();
        for (setting, given, there) in [
            ("--bpffs", bpffs, &mark.bpffs),
            ("--state", state, &mark.state),
        ] {
            if canonical(given) != *there {
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
        pins.refuse_unrecorded(&folder.records()?)?;
        // Whatever is not pinned here would go on without its routes.
        if mark.cgroup.exists() {
            attached::refuse_on_cgroup(&mark.cgroup, &pins, &BTreeSet::new())?;
        }
        folder.set_uninstalling();
        Ok(Self {
            folder,
            pins,
            cgroup: mark.cgroup,
            root: mark.root,
            _lock,
        })
    }

    /// The fingerprint of the root of its state, if its agent wrote it.
    pub fn root(&self) -> Option<&str> {
        self.root.as_deref()
    }

    /// Lets go of its pods, and removes all that is left of its agent. `left` is what is left elsewhere
    /// already: as long as something is, so is what it takes to try again.
    ///
    /// # Errors
    /// What is pinned cannot be removed, or the records not be read; they stay.
    pub async fn uninstall(self, left: Vec<String>) -> Result<Outcome, CaptureError> {
        let mut done = Outcome { pods: 0, left };
        let mut leave = |what: &dyn fmt::Display| done.left.push(what.to_string());
        let own = attached::own_programs(&self.pins)?;
        // First those that mark: what is not marked needs no route. Then each pod's routes, and its program
        // after them: what it has sent by them is sent again, and its own app must not get it.
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
        for path in self.folder.remove(done.left.is_empty())? {
            if !kept.contains(&path) {
                done.left.push(format!("{}: {stays}", path.display()));
            }
        }
        Ok(done)
    }
}

/// Refuses unless nothing of a node of which nothing is known is in its places: no folder, no pins, and no
/// other node that may be meant.
///
/// # Errors
/// Something is there.
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

/// Refuses where an agent's programs or rules are anywhere on this machine: it may have been given other
/// places than those in which nothing is known.
///
/// # Errors
/// There are some; the machine cannot be looked at.
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

/// A path as it is written in a mark, whether it is still there or not: links on the way to what is not
/// mounted lead where they did.
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

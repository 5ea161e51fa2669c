//! The node's run folder, `<run-dir>/<node>/`: the mark that says whose it is, the lock, the sockets,
//! and the undo records (`pods/`, see [`super::undo`]).
//!
//! Whoever removes something reads the mark first: the node's name, and the places with which its agent was
//! started. A folder without a mark is not an agent's.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::undo::{UndoRecord, UndoRecords};
use super::{CaptureError, pins};
use crate::config::{self, DEFAULT_CLUSTER, NodeName};
use crate::seam::SharedSettings;
use crate::sys::made::CreatedPaths;
use crate::sys::{machine_id, regular_file};

/// The file name of the mark.
const MARK: &str = "node.json";
const NEW_MARK: &str = "node.new";
const LOCK: &str = "lock";
/// The content of the lock file while a node is uninstalled.
const UNINSTALL: &[u8] = b"uninstall\n";
/// The sockets that an agent listens on.
const SOCKETS: [&str; 2] = [config::ADMIN_SOCKET, config::SEAM_SOCKET];
const PODS: &str = "pods";

/// Whose folder it is, and with which places its agent was started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// The node's name.
    pub node: NodeName,
    /// The bpffs in which its programs are pinned.
    pub bpffs: PathBuf,
    /// The cgroup that holds its pods.
    pub cgroup: PathBuf,
    /// The state folder that it shares with other nodes.
    pub state: PathBuf,
    /// The cluster of its pods.
    #[serde(default = "default_cluster")]
    pub cluster_id: String,
    /// The fingerprint of the state's root; `None` in marks of older agents.
    #[serde(default)]
    pub root: Option<String>,
    /// The boot of the machine in which the records were written; `None` in marks of older agents.
    #[serde(default)]
    pub boot: Option<String>,
    /// Whether the agent was started with policies in the file of LOCAL_XDS.
    #[serde(default)]
    pub local_policies: bool,
}

/// The setting's default, which also held for agents whose mark lacks it.
fn default_cluster() -> String {
    DEFAULT_CLUSTER.into()
}

impl Mark {
    /// Returns an error text if settings differ from those with which pods were captured. Programs that are
    /// pinned in one place are not seen from another; attached to another cgroup they miss what the pods
    /// send; through another state the nodes cannot learn that a pod leaves; and in another cluster it would
    /// be another pod.
    fn differs_from(&self, found: &Self) -> Option<String> {
        let clusters = [&found.cluster_id, &self.cluster_id].map(Path::new);
        let differ: Vec<String> = [
            ("--bpffs", found.bpffs.as_path(), self.bpffs.as_path()),
            ("--cgroup", &found.cgroup, &self.cgroup),
            ("--state", &found.state, &self.state),
            ("--cluster-id", clusters[0], clusters[1]),
        ]
        .iter()
        .filter(|(_, there, given)| there != given)
        .map(|(setting, there, given)| {
            format!("{setting} {}, not {}", there.display(), given.display())
        })
        .collect();
        let told = format!(
            "pods of node {} are captured by an agent that was started with {}: start it so again, or \
             uninstall it first",
            self.node,
            differ.join(", and with ")
        );
        (!differ.is_empty()).then_some(told)
    }

    /// Returns `true` if this mark is known to be of an earlier boot of the machine. What an agent has changed ended with
    /// that, and cookies and inode numbers of network namespaces begin again: its records speak of nothing that there is.
    fn is_of_earlier_boot(&self) -> bool {
        let boot = machine_id::boot();
        self.boot.is_some() && boot.is_some() && self.boot != boot
    }

    /// Returns the settings that a proxy of the node must share, as far as they are known without its state.
    pub fn shared_settings(&self) -> SharedSettings {
        SharedSettings {
            state: Some(self.state.clone()),
            cluster_id: Some(self.cluster_id.clone()),
            ..SharedSettings::default()
        }
    }

    /// Refuses another state than the node has. If the node's own state is not mounted, an agent would find
    /// an empty folder there and make a CA in it, whose root nobody trusts.
    fn refuse_other_state(&self, found: &Self) -> Result<(), CaptureError> {
        match found.root.is_some() && found.state != self.state {
            false => Ok(()),
            true => Err(CaptureError::OtherPlace(format!(
                "node {} shares --state {}, not {}: say so if that is what it leads to, or, if another \
                 one is meant, uninstall the node first",
                self.node,
                found.state.display(),
                self.state.display(),
            ))),
        }
    }
}

/// The folder, locked by this process.
#[derive(Debug)]
pub struct NodeFolder {
    path: PathBuf,
    found: Option<Mark>,
    /// Dropped before the lock, so that the folder is gone before another process can lock it.
    made: CreatedPaths,
    lock: File,
}

impl NodeFolder {
    /// Makes the folder, or takes it over from a predecessor. Unless it is marked, what was made is removed on drop.
    ///
    /// # Errors
    /// Another agent has the lock; the folder is not an agent's; pods were captured with other places; the
    /// node has another state.
    pub fn claim(run_dir: &Path, mark: &Mark) -> Result<Self, CaptureError> {
        let path = run_dir.join(mark.node.as_str());
        let made = CreatedPaths::missing(&path.join(PODS));
        fs::create_dir_all(run_dir).map_err(CaptureError::file(run_dir))?;
        match DirBuilder::new().mode(0o700).create(&path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(CaptureError::file(&path)(error));
            }
            _ => {}
        }
        let found = read(&path)?;
        if found.is_none()
            && let Some(stranger) = unknown_entries(&path)?.first()
        {
            let what = format!("{} is in it", stranger.display());
            return Err(CaptureError::NotOurs { path, what });
        }
        let mut folder = Self::lock(path, made)?;
        folder.found = read(&folder.path)?;
        if folder.found.is_none() {
            folder.made.also(&folder.path.join(LOCK));
        }
        if let Some(found) = &folder.found {
            folder.forget_earlier_boot(found)?;
            if let Some(why) = mark.differs_from(found)
                && !folder.records()?.read_all()?.is_empty()
            {
                return Err(CaptureError::OtherPlace(why));
            }
            mark.refuse_other_state(found)?;
        }
        Ok(folder)
    }

    /// Returns the fingerprint of the root with which an agent last marked the node, if it is known.
    pub fn known_root(&self) -> Option<String> {
        self.found.as_ref()?.root.clone()
    }

    /// Writes the mark; from now on the folder stays until it is removed.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn write_mark(&mut self, mark: &Mark) -> Result<(), CaptureError> {
        let (path, new) = (self.path.join(MARK), self.path.join(NEW_MARK));
        let write = || {
            let mut file = File::create(&new)?;
            file.write_all(&serde_json::to_vec(mark)?)?;
            file.sync_all()?;
            fs::rename(&new, &path)
        };
        write().map_err(|error| {
            let _ = fs::remove_file(&new);
            CaptureError::file(&path)(error)
        })?;
        self.made.keep();
        Ok(())
    }

    /// Takes the folder that an agent has left, with its mark.
    ///
    /// # Errors
    /// There is no such folder; an agent runs.
    pub fn open(run_dir: &Path, node: &NodeName) -> Result<(Self, Mark), CaptureError> {
        let path = run_dir.join(node.as_str());
        let unknown = || CaptureError::UnknownNode {
            node: node.clone(),
            run_dir: run_dir.to_owned(),
            known: known(run_dir),
        };
        read_mark(run_dir, node)?.ok_or_else(unknown)?;
        let folder = Self::lock(path, CreatedPaths::default())?;
        let mark = read(&folder.path)?.ok_or_else(unknown)?;
        folder.forget_earlier_boot(&mark)?;
        Ok((folder, mark))
    }

    /// Returns the folder's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Opens the undo records in the folder.
    ///
    /// # Errors
    /// The folder of records cannot be made.
    pub fn records(&self) -> Result<UndoRecords, CaptureError> {
        UndoRecords::open(&self.path.join(PODS))
    }

    /// Removes the records of an earlier boot, if the mark that was found is of one.
    fn forget_earlier_boot(&self, found: &Mark) -> Result<(), CaptureError> {
        if !found.is_of_earlier_boot() {
            return Ok(());
        }
        let records = self.records()?;
        let all = records.read_all()?;
        for (path, _) in &all {
            pins::remove(path)?;
        }
        if !all.is_empty() {
            tracing::warn!(
                records = all.len(),
                "records of pods are of an earlier boot of the machine, with which all that they say has ended; removed"
            );
        }
        Ok(())
    }

    /// Removes what an agent has in the folder, and the folder. Other files, and records, are returned and
    /// stay, and the mark with them. The mark also stays unless `all_else_is_gone`: without it the uninstall
    /// could not be repeated.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn remove(self, all_else_is_gone: bool) -> Result<Vec<PathBuf>, CaptureError> {
        for record in self.records()?.unfinished()? {
            pins::remove(&record)?;
        }
        pins::remove_if_empty(&self.path.join(PODS))?;
        for file in SOCKETS.iter().chain([&NEW_MARK]) {
            pins::remove(&self.path.join(file))?;
        }
        let mut left = unknown_entries(&self.path)?;
        left.extend(entries(&self.path.join(PODS)).unwrap_or_default());
        if left.is_empty() && all_else_is_gone {
            pins::remove(&self.path.join(MARK))?;
            pins::remove(&self.path.join(LOCK))?;
            pins::remove_if_empty(&self.path)?;
        }
        Ok(left)
    }

    /// Writes into the lock file that its holder uninstalls the node. This only informs people.
    pub fn set_uninstalling(&mut self) {
        let _ = self.lock.write_all(UNINSTALL);
    }

    fn lock(path: PathBuf, mut made: CreatedPaths) -> Result<Self, CaptureError> {
        let file = path.join(LOCK);
        // Only root may open it: whoever can open the file can lock it, and so keep an agent from starting.
        let mut options = OpenOptions::new();
        options.create(true).write(true).truncate(false).mode(0o600);
        let locked = pins::lock(&file, || options.open(&file));
        // If another process has the lock, the folder is in use and stays, whoever made it.
        let lock = locked.inspect_err(|_| made.keep())?;
        // A node that was uninstalled in part has left this text.
        if lock_text(&file) == UNINSTALL {
            lock.set_len(0).map_err(CaptureError::file(&file))?;
        }
        Ok(Self {
            path,
            found: None,
            made,
            lock,
        })
    }
}

/// The process that has locked a node's folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holder {
    /// The node's agent.
    Agent,
    /// An uninstall of the node.
    Uninstall,
}

/// Returns who has locked this folder, if anybody has.
pub fn holder(folder: &Path) -> Option<Holder> {
    let lock = folder.join(LOCK);
    pins::is_locked(&lock).then(|| match lock_text(&lock).as_slice() {
        UNINSTALL => Holder::Uninstall,
        _ => Holder::Agent,
    })
}

fn lock_text(lock: &Path) -> Vec<u8> {
    regular_file::read(lock).unwrap_or_default()
}

/// Reads the mark of a node; none if no agent of it has started.
///
/// # Errors
/// The folder is not an agent's; it cannot be read.
pub fn read_mark(run_dir: &Path, node: &NodeName) -> Result<Option<Mark>, CaptureError> {
    match read(&run_dir.join(node.as_str())) {
        Err(CaptureError::File { error, .. }) if error.kind() == io::ErrorKind::NotFound => {
            Ok(None)
        }
        mark => mark,
    }
}

/// Returns the number of pods that an agent has left captured, by their records.
pub fn captured(run_dir: &Path, node: &NodeName) -> usize {
    if let Ok(Some(mark)) = read_mark(run_dir, node)
        && mark.is_of_earlier_boot()
    {
        return 0;
    }
    let pods = entries(&run_dir.join(node.as_str()).join(PODS)).unwrap_or_default();
    pods.iter()
        .filter(|path| UndoRecord::cookie_of(path).is_some())
        .count()
}

/// Returns the nodes that have a marked folder here.
pub fn known(run_dir: &Path) -> Vec<NodeName> {
    let mut names: Vec<NodeName> = entries(run_dir)
        .unwrap_or_default()
        .iter()
        .filter_map(|path| read(path).ok()?)
        .map(|mark| mark.node)
        .collect();
    names.sort();
    names
}

/// Reads a folder's mark, if it has one.
fn read(path: &Path) -> Result<Option<Mark>, CaptureError> {
    let not_ours = |what: String| CaptureError::NotOurs {
        path: path.to_owned(),
        what,
    };
    let found = fs::symlink_metadata(path).map_err(CaptureError::file(path))?;
    if !found.is_dir() {
        return Err(not_ours("it is no folder".into()));
    }
    let file = path.join(MARK);
    let text = match fs::symlink_metadata(&file).and_then(|_| regular_file::read(&file)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        text => text.map_err(CaptureError::file(&file))?,
    };
    let mark: Mark = serde_json::from_slice(&text)
        .map_err(|error| not_ours(format!("{MARK} is not an agent's: {error}")))?;
    if path
        .file_name()
        .is_none_or(|name| name != mark.node.as_str())
    {
        return Err(not_ours(format!(
            "it is marked as that of node {}",
            mark.node
        )));
    }
    Ok(Some(mark))
}

/// Returns the entries that are not an agent's.
fn unknown_entries(path: &Path) -> Result<Vec<PathBuf>, CaptureError> {
    let known = [MARK, NEW_MARK, LOCK, PODS];
    let is_known = |path: &PathBuf| {
        known
            .iter()
            .chain(&SOCKETS)
            .any(|name| path.ends_with(name))
    };
    let mut all = entries(path).map_err(CaptureError::file(path))?;
    all.retain(|path| !is_known(path));
    Ok(all)
}

fn entries(path: &Path) -> io::Result<Vec<PathBuf>> {
    fs::read_dir(path)?.map(|entry| Ok(entry?.path())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mark(node: &str) -> Mark {
        Mark {
            node: node.parse().expect("a name"),
            bpffs: "/bpf".into(),
            cgroup: "/cgroup".into(),
            state: "/state".into(),
            cluster_id: DEFAULT_CLUSTER.into(),
            root: None,
            boot: machine_id::boot(),
            local_policies: false,
        }
    }

    /// Makes a folder with a mark.
    fn begun(run_dir: &Path, mark: &Mark) -> Result<NodeFolder, CaptureError> {
        let mut folder = NodeFolder::claim(run_dir, mark)?;
        folder.write_mark(mark).map(|()| folder)
    }

    #[test]
    fn a_folder_that_is_claimed_and_not_marked_goes_again() {
        let top = tempfile::tempdir().expect("a folder");
        let run = top.path().join("run");
        let folder = NodeFolder::claim(&run, &mark("one")).expect("free");
        folder.records().expect("a folder");
        assert_eq!(holder(folder.path()), Some(Holder::Agent));
        drop(folder);
        assert!(!run.exists());
        drop(begun(&run, &mark("one")).expect("free"));
        drop(NodeFolder::claim(&run, &mark("one")).expect("free"));
        let (folder, _) = NodeFolder::open(&run, &mark("one").node).expect("it stays");
        let none = Vec::<PathBuf>::new();
        assert_eq!(folder.remove(false).expect("nothing is in it"), none);
        let (folder, _) = NodeFolder::open(&run, &mark("one").node).expect("known still");
        assert_eq!(folder.remove(true).expect("nothing is in it"), none);
        assert!(!run.join("one").exists());
    }

    #[test]
    fn a_folder_that_is_not_an_agents_is_neither_taken_nor_opened() {
        let run = tempfile::tempdir().expect("a folder");
        let mark = mark("one");
        let node = run.path().join("one");
        fs::create_dir(&node).expect("a folder");
        fs::write(node.join("precious"), "").expect("a file");
        let error = NodeFolder::claim(run.path(), &mark).expect_err("theirs");
        assert!(error.to_string().contains("precious"), "{error}");
        let error = NodeFolder::open(run.path(), &mark.node).expect_err("theirs");
        assert!(matches!(error, CaptureError::UnknownNode { .. }), "{error}");
        assert_eq!(entries(&node).expect("a folder"), [node.join("precious")]);

        fs::remove_file(node.join("precious")).expect("a file");
        fs::remove_dir(&node).expect("a folder");
        let elsewhere = tempfile::tempdir().expect("a folder");
        std::os::unix::fs::symlink(elsewhere.path(), &node).expect("a link");
        let error = NodeFolder::claim(run.path(), &mark).expect_err("a link");
        assert!(error.to_string().contains("it is no folder"), "{error}");
        assert!(NodeFolder::open(run.path(), &mark.node).is_err());
        assert_eq!(entries(elsewhere.path()).expect("a folder").len(), 0);
    }

    #[test]
    fn what_is_not_an_agents_stays_and_keeps_the_mark() {
        let run = tempfile::tempdir().expect("a folder");
        let mark = mark("one");
        let folder = begun(run.path(), &mark).expect("free");
        let (path, pods) = (folder.path().to_owned(), folder.path().join("pods"));
        folder.records().expect("a folder");
        fs::write(pods.join("7.new"), "{").expect("a file");
        for socket in SOCKETS {
            fs::write(path.join(socket), "").expect("a file");
        }
        fs::write(path.join("precious"), "").expect("a file");
        fs::write(pods.join("8.json"), "{").expect("a file");
        drop(folder);
        assert_eq!(captured(run.path(), &mark.node), 1);
        let (folder, found) = NodeFolder::open(run.path(), &mark.node).expect("known");
        assert_eq!(found, mark);
        let mut left = folder.remove(true).expect("what is an agent's goes");
        left.sort();
        assert_eq!(left, [pods.join("8.json"), path.join("precious")]);
        fs::remove_file(path.join("precious")).expect("it stayed");
        fs::remove_file(pods.join("8.json")).expect("it stayed");
        let (folder, _) = NodeFolder::open(run.path(), &mark.node).expect("still known");
        assert_eq!(
            folder.remove(true).expect("all goes"),
            Vec::<PathBuf>::new()
        );
        assert!(!path.exists() && run.path().exists());
    }

    #[test]
    fn records_of_an_earlier_boot_say_nothing() {
        let run = tempfile::tempdir().expect("a folder");
        let now = mark("one");
        let record = run.path().join("one/pods/7.json");
        let left_by = |boot: Option<&str>| {
            // Of an agent that was given another place too.
            let earlier = Mark {
                boot: boot.map(str::to_owned),
                bpffs: "/other".into(),
                ..mark("one")
            };
            drop(begun(run.path(), &earlier).expect("free"));
            fs::create_dir_all(run.path().join("one/pods")).expect("a folder");
            fs::write(&record, "{}").expect("a file");
        };
        left_by(Some("earlier"));
        assert_eq!(captured(run.path(), &now.node), 0);
        drop(begun(run.path(), &now).expect("nothing is captured"));
        assert!(!record.exists());
        left_by(Some("earlier"));
        drop(NodeFolder::open(run.path(), &now.node).expect("known"));
        assert!(!record.exists());
        // Older agents do not say it: their records are of this boot, as far as one can tell.
        left_by(None);
        assert_eq!(captured(run.path(), &now.node), 1);
        assert!(NodeFolder::claim(run.path(), &now).is_err());
        drop(NodeFolder::open(run.path(), &now.node).expect("known"));
        assert!(record.exists());
        left_by(now.boot.as_deref());
        assert!(NodeFolder::claim(run.path(), &now).is_err());
        assert!(record.exists());
    }

    #[test]
    fn another_state_than_a_nodes_own_is_refused_also_where_no_pod_is_captured() {
        let run = tempfile::tempdir().expect("a folder");
        let had = Mark {
            root: Some("abc".into()),
            ..mark("one")
        };
        drop(begun(run.path(), &had).expect("free"));
        let moved = Mark {
            state: "/other".into(),
            ..mark("one")
        };
        let error = NodeFolder::claim(run.path(), &moved).expect_err("another state");
        assert!(matches!(error, CaptureError::OtherPlace(_)), "{error}");
        let told = error.to_string();
        assert!(
            told.contains("--state /state") && told.contains("uninstall"),
            "{told}"
        );
        let folder = NodeFolder::claim(run.path(), &mark("one")).expect("its own");
        assert_eq!(folder.known_root().as_deref(), Some("abc"));
    }

    #[test]
    fn one_process_has_it_and_pods_stay_with_the_place_that_captured_them() {
        let run = tempfile::tempdir().expect("a folder");
        let first = begun(run.path(), &mark("one")).expect("free");
        let error = NodeFolder::claim(run.path(), &mark("one")).expect_err("held");
        assert!(matches!(error, CaptureError::Held(_)), "{error}");
        let error = NodeFolder::open(run.path(), &mark("one").node).expect_err("held");
        assert!(matches!(error, CaptureError::Held(_)), "{error}");
        assert!(begun(run.path(), &mark("two")).is_ok());
        let pods = first.path().join("pods");
        drop(first);
        let others = [
            ("--bpffs /other, not /bpf", "/other", "/cgroup", "/state"),
            ("--cgroup /other, not /cgroup", "/bpf", "/other", "/state"),
            ("--state /other, not /state", "/bpf", "/cgroup", "/other"),
        ];
        for (told, bpffs, cgroup, state) in others {
            let moved = Mark {
                bpffs: bpffs.into(),
                cgroup: cgroup.into(),
                state: state.into(),
                ..mark("one")
            };
            drop(begun(run.path(), &moved).expect("nothing is captured"));
            fs::create_dir_all(&pods).expect("a folder");
            fs::write(pods.join("7.json"), "{}").expect("a file");
            let error = NodeFolder::claim(run.path(), &mark("one")).expect_err("captured there");
            assert!(matches!(error, CaptureError::OtherPlace(_)), "{error}");
            assert!(error.to_string().contains(told), "{error}");
            drop(begun(run.path(), &moved).expect("as it was"));
            fs::remove_file(pods.join("7.json")).expect("a file");
        }
        assert_eq!(known(run.path()).len(), 2);
    }
}

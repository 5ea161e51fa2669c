//! The folders in which a node's kernel objects are pinned, and the lock that makes one agent their owner.
//!
//! `<bpffs>/dataplane/<node>/v<layout>/` holds `maps/`, `links/` (attached to the cgroup) and `pods/`, with
//! one link per pod, named by the cookie of its network namespace. The layout's number says by which version
//! the maps were made; an agent of another layout takes them over (see [`super::takeover`]), and then gives
//! the folder its own number.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, Metadata, Permissions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use aya::maps::MapInfo;
use nix::unistd::geteuid;

use super::CaptureError;
use super::link::Link;
use super::undo::UndoRecords;
use crate::config::NodeName;
use crate::sys::{bpffs, locked};

/// The pin folders of one node.
#[derive(Clone, Debug)]
pub struct Pins {
    bpffs: PathBuf,
    node: PathBuf,
    /// The folder of the layout that exists, or else of this agent's.
    layout: PathBuf,
}

impl Pins {
    /// The pins of this node, in a mounted bpffs.
    pub fn new(bpffs: &Path, node: &NodeName) -> Self {
        // A bpffs reserves names with dots; no node's name has a colon.
        let node = node.as_str().replace('.', ":");
        Self::at(bpffs, bpffs.join("dataplane").join(node))
    }

    /// Pins for a trial, in a bpffs of its own.
    pub fn trial(bpffs: &Path) -> Self {
        Self::at(bpffs, bpffs.join("trial"))
    }

    fn at(bpffs: &Path, node: PathBuf) -> Self {
        let mut pins = Self {
            bpffs: bpffs.to_owned(),
            layout: PathBuf::new(),
            node,
        };
        pins.find_layout();
        pins
    }

    /// Looks for an existing layout.
    fn find_layout(&mut self) {
        let own = self.own_layout();
        let mut layouts = entries(&self.node).map(|entry| entry.path());
        let found = layouts.find(|path| path.file_name().is_some_and(is_layout));
        self.layout = found.unwrap_or(own);
    }

    /// Makes the folders, and locks them for this process until the returned file is dropped. There is one
    /// owner of these pins, whatever else its settings are.
    ///
    /// # Errors
    /// There is no bpffs; another user made the folders; another agent has the lock; something else is in the folder.
    pub fn make(&mut self) -> Result<File, CaptureError> {
        if !bpffs::is_mounted(&self.bpffs).map_err(CaptureError::file(&self.bpffs))? {
            let error = io::Error::other("no BPF file system is mounted there");
            return Err(CaptureError::file(&self.bpffs)(error));
        }
        for folder in self.folders().into_iter().rev() {
            make_private(folder).map_err(CaptureError::file(folder))?;
        }
        let lock = lock(&self.node, || File::open(&self.node))?;
        self.find_layout();
        self.refuse_others()?;
        for folder in [self.maps(), self.links(), self.pods()] {
            fs::create_dir_all(&folder).map_err(CaptureError::file(&folder))?;
        }
        Ok(lock)
    }

    /// Refuses what exists where [`Pins::make`] would refuse it; makes nothing.
    ///
    /// # Errors
    /// Another user made the folders; something else is in the folder.
    pub fn refuse(&self) -> Result<(), CaptureError> {
        for folder in self.folders() {
            if fs::symlink_metadata(folder).is_ok() {
                is_private(folder).map_err(CaptureError::file(folder))?;
            }
        }
        match self.exist() {
            true => self.refuse_others(),
            false => Ok(()),
        }
    }

    /// Returns the node's folder, and those above it below the bpffs.
    fn folders(&self) -> Vec<&Path> {
        let above = self.node.ancestors();
        above.take_while(|of| *of != self.bpffs).collect()
    }

    /// Refuses other entries beside the layout: their owner may come back.
    fn refuse_others(&self) -> Result<(), CaptureError> {
        for entry in fs::read_dir(&self.node).map_err(CaptureError::file(&self.node))? {
            let path = entry.map_err(CaptureError::file(&self.node))?.path();
            if path != self.layout {
                let what = format!("it is beside {}", self.layout.display());
                return Err(CaptureError::NotOurs { path, what });
            }
        }
        Ok(())
    }

    /// Makes missing folders again, and mounts the bpffs again if it was unmounted; `lock` is what
    /// [`Pins::make`] returned.
    ///
    /// # Errors
    /// As [`Pins::make`].
    pub fn restore(&mut self, lock: &mut File) -> Result<(), CaptureError> {
        let mounted = bpffs::ensure(&self.bpffs).map_err(CaptureError::file(&self.bpffs))?;
        mounted.keep();
        if !self.node.is_dir() {
            *lock = self.make()?;
        }
        for folder in [self.maps(), self.links(), self.pods()] {
            fs::create_dir_all(&folder).map_err(CaptureError::file(&folder))?;
        }
        Ok(())
    }

    /// Locks the pins for this process, if there are any.
    ///
    /// # Errors
    /// An agent has the lock.
    pub fn lock(&mut self) -> Result<Option<File>, CaptureError> {
        if !self.exist() {
            return Ok(None);
        }
        let lock = lock(&self.node, || File::open(&self.node))?;
        self.find_layout();
        Ok(Some(lock))
    }

    /// Renames the folder to this agent's layout, whichever it had.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn rename_to_own_layout(&mut self) -> Result<(), CaptureError> {
        let own = self.own_layout();
        if self.layout != own {
            fs::rename(&self.layout, &own).map_err(CaptureError::file(&self.layout))?;
            self.layout = own;
        }
        Ok(())
    }

    /// Returns `true` if the node has a folder of pins.
    pub fn exist(&self) -> bool {
        bpffs::is_mounted(&self.bpffs).unwrap_or(false)
            && fs::symlink_metadata(&self.node).is_ok_and(|found| found.is_dir())
    }

    /// Returns the folder of the node.
    pub fn folder(&self) -> &Path {
        &self.node
    }

    /// Returns the folder of the maps that programs share, by their names.
    pub fn maps(&self) -> PathBuf {
        self.layout.join(MAPS)
    }

    /// Returns the folder of the links to the cgroup, by the programs' names.
    pub fn links(&self) -> PathBuf {
        self.layout.join(LINKS)
    }

    /// Returns the folder of the links of the pods' programs, by the cookies of their network namespaces.
    pub fn pods(&self) -> PathBuf {
        self.layout.join(PODS)
    }

    /// Returns the pin of one pod's link.
    pub fn pod(&self, cookie: u64) -> PathBuf {
        self.pods().join(cookie.to_string())
    }

    /// Removes the links of all pods for which `keep` returns `false`, and what a crash left unfinished.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn sweep(&self, keep: impl Fn(u64) -> bool) -> Result<(), CaptureError> {
        for entry in fs::read_dir(self.pods()).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let cookie = name.to_str().and_then(|name| name.parse().ok());
            if !cookie.is_some_and(&keep) {
                remove(&entry.path())?;
            }
        }
        Ok(())
    }

    /// Returns the ids of all programs that are attached by links pinned here.
    pub fn programs(&self) -> BTreeSet<u32> {
        let folders = entries(&self.node)
            .flat_map(|layout| [LINKS, PODS].map(|folder| layout.path().join(folder)));
        folders
            .flat_map(|folder| entries(&folder))
            .filter_map(|entry| program(&entry.path()))
            .collect()
    }

    /// Returns the ids of all maps that are pinned here.
    pub fn map_ids(&self) -> BTreeSet<u32> {
        entries(&self.node)
            .flat_map(|layout| entries(&layout.path().join(MAPS)))
            .filter_map(|pin| Some(MapInfo::from_pin(pin.path()).ok()?.id()))
            .collect()
    }

    /// Returns the ids of one pod's pinned programs.
    pub fn programs_of(&self, cookie: u64) -> BTreeSet<u32> {
        let pin = self.pod(cookie);
        [new_pin(&pin), pin]
            .iter()
            .filter_map(|pin| program(pin))
            .collect()
    }

    /// Refuses if pods are pinned here that have no record there: how to undo their capture is in the run
    /// folder of the agent that captured them.
    ///
    /// # Errors
    /// There are such pods; the records cannot be listed.
    pub fn refuse_unrecorded(&self, records: &UndoRecords) -> Result<(), CaptureError> {
        let recorded = records.cookies()?;
        let lost = entries(&self.pods())
            .filter_map(|pin| pin.file_name().to_str()?.parse().ok())
            .filter(|cookie| !recorded.contains(cookie))
            .count();
        match lost {
            0 => Ok(()),
            lost => Err(CaptureError::OtherPlace(format!(
                "{lost} pods are captured by what is pinned in {pins}, and how to undo it is not in \
                 {records}: say the --run-dir that their agent was started with (if that is lost, \
                 removing {pins} lets go of them, without what was changed inside of them)",
                pins = self.node.display(),
                records = records.folder().display(),
            ))),
        }
    }

    /// Removes all pins of the node's agents, of any layout, which detaches what they attach. Returns what no
    /// agent pins: it stays, with its folders.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn remove_all(&self) -> Result<Vec<PathBuf>, CaptureError> {
        if !self.exist() {
            return Ok(Vec::new());
        }
        let mut left = Vec::new();
        for layout in children(&self.node)? {
            if !layout.is_dir || !is_layout(OsStr::new(&layout.name)) {
                left.push(layout.path);
                continue;
            }
            for folder in children(&layout.path)? {
                let Some((_, is_pin)) = FOLDERS
                    .iter()
                    .find(|(name, _)| folder.is_dir && *name == folder.name)
                else {
                    left.push(folder.path);
                    continue;
                };
                for pin in children(&folder.path)? {
                    if pin.is_file && is_pin(pin.name.strip_suffix("-new").unwrap_or(&pin.name)) {
                        remove(&pin.path)?;
                    } else {
                        left.push(pin.path);
                    }
                }
                remove_if_empty(&folder.path)?;
            }
            remove_if_empty(&layout.path)?;
        }
        remove_if_empty(&self.node)?;
        // If this was the last node, no folder stays.
        if let Some(all) = self.node.parent() {
            remove_if_empty(all)?;
        }
        Ok(left)
    }

    /// Returns the pins of all maps, also of those that this agent does not know.
    pub fn pinned_maps(&self) -> Vec<PathBuf> {
        let is_map = |name: &OsStr| name.to_str().is_some_and(FOLDERS[0].1);
        let pins = entries(&self.maps()).map(|entry| entry.path());
        pins.filter(|pin| pin.file_name().is_some_and(is_map))
            .collect()
    }

    fn own_layout(&self) -> PathBuf {
        self.node.join(format!("v{}", dataplane_ebpf::LAYOUT))
    }
}

const MAPS: &str = "maps";
const LINKS: &str = "links";
const PODS: &str = "pods";

/// The folders of a layout, and which names are pinned in each. Other layouts may have other maps and
/// programs, but name them alike.
const FOLDERS: [(&str, IsPin); 3] = [
    (MAPS, |name| is_word(name, |byte| byte.is_ascii_uppercase())),
    (LINKS, |name| {
        is_word(name, |byte| byte.is_ascii_lowercase())
    }),
    (PODS, |name| name.parse::<u64>().is_ok()),
];

/// Returns `true` for a name that an agent pins.
type IsPin = fn(&str) -> bool;

fn is_word(name: &str, is_letter: fn(u8) -> bool) -> bool {
    let fits = |byte: u8| is_letter(byte) || byte.is_ascii_digit() || byte == b'_';
    !name.is_empty() && name.bytes().all(fits)
}

fn is_layout(name: &OsStr) -> bool {
    let number = name.to_str().and_then(|name| name.strip_prefix('v'));
    number.is_some_and(|number| number.parse::<u32>().is_ok())
}

/// Returns where a pin is made before it replaces another one.
pub(super) fn new_pin(pin: &Path) -> PathBuf {
    let name = pin.file_name().unwrap_or_default().to_string_lossy();
    pin.with_file_name(format!("{name}-new"))
}

/// Returns the id of the program that a pinned link attaches.
fn program(pin: &Path) -> Option<u32> {
    Some(Link::at(pin)?.program())
}

fn entries(folder: &Path) -> impl Iterator<Item = fs::DirEntry> + use<> {
    fs::read_dir(folder).into_iter().flatten().flatten()
}

/// An entry of a folder; a symbolic link is neither a file nor a folder.
struct Child {
    name: String,
    path: PathBuf,
    is_dir: bool,
    is_file: bool,
}

fn children(folder: &Path) -> Result<Vec<Child>, CaptureError> {
    let mut all = Vec::new();
    for entry in fs::read_dir(folder).map_err(CaptureError::file(folder))? {
        let entry = entry.map_err(CaptureError::file(folder))?;
        let kind = entry
            .file_type()
            .map_err(CaptureError::file(entry.path()))?;
        all.push(Child {
            name: entry.file_name().to_string_lossy().into_owned(),
            path: entry.path(),
            is_dir: kind.is_dir(),
            is_file: kind.is_file(),
        });
    }
    Ok(all)
}

/// Makes a folder that only this user may open: whoever can open it can lock it, and so keep the agent from
/// starting. Any user may make one in a bpffs that was mounted without a mode.
///
/// # Errors
/// Another user may write to the existing folder; it is no folder; the file system refuses.
fn make_private(folder: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(folder) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let found = is_private(folder)?;
    if found.mode() & 0o077 != 0 {
        fs::set_permissions(folder, Permissions::from_mode(0o700))?;
    }
    Ok(())
}

/// Returns the metadata of a folder to which nobody else may write.
///
/// # Errors
/// As [`make_private`].
fn is_private(folder: &Path) -> io::Result<Metadata> {
    let found = fs::symlink_metadata(folder)?;
    let other = |why: String| Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
    if !found.is_dir() {
        return Err(io::ErrorKind::NotADirectory.into());
    }
    if found.uid() != geteuid().as_raw() {
        return other(format!(
            "it belongs to user {}, not to the agent's",
            found.uid()
        ));
    }
    if found.mode() & 0o022 != 0 {
        return other("others than its owner may write to it".into());
    }
    Ok(found)
}

/// Removes a file if it exists.
///
/// # Errors
/// The file cannot be removed.
pub fn remove(path: &Path) -> Result<(), CaptureError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(CaptureError::file(path)(error))
        }
        _ => Ok(()),
    }
}

/// Removes a folder if it exists and is empty.
///
/// # Errors
/// The empty folder cannot be removed.
pub fn remove_if_empty(folder: &Path) -> Result<(), CaptureError> {
    use io::ErrorKind::{DirectoryNotEmpty, NotFound};
    match fs::remove_dir(folder) {
        Err(error) if ![NotFound, DirectoryNotEmpty].contains(&error.kind()) => {
            Err(CaptureError::file(folder)(error))
        }
        _ => Ok(()),
    }
}

/// Returns `true` if the file exists and another process has locked it.
pub fn is_locked(path: &Path) -> bool {
    let lock = File::open(path).map(|file| file.try_lock_shared());
    matches!(lock, Ok(Err(TryLockError::WouldBlock)))
}

/// Locks the file that `open` opens at a path, until the result is dropped.
///
/// # Errors
/// Another process has the lock; the file cannot be opened.
pub fn lock(path: &Path, open: impl Fn() -> io::Result<File>) -> Result<File, CaptureError> {
    let locked = locked::lock(path, open, File::try_lock).map_err(CaptureError::file(path))?;
    locked.ok_or_else(|| CaptureError::Held(path.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_locked_is_what_is_at_the_path() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("lock");
        let open = || File::create(&path);
        // A file that was removed after it was opened is no longer the lock.
        let stale = std::cell::RefCell::new(Some(open().expect("a file")));
        fs::remove_file(&path).expect("a file");
        let taken = lock(&path, || stale.take().map_or_else(open, Ok)).expect("free");
        let error = lock(&path, open).expect_err("taken");
        assert!(matches!(error, CaptureError::Held(_)), "{error}");
        assert!(is_locked(&path));
        drop(taken);
        assert!(!is_locked(&path) && !is_locked(&dir.path().join("none")));
        assert!(lock(&path, open).is_ok());
    }

    #[test]
    fn where_no_bpf_file_system_is_mounted_nothing_is_ours() {
        let dir = tempfile::tempdir().expect("a folder");
        let pin = dir.path().join("dataplane/one/v1/maps/PODS");
        fs::create_dir_all(pin.parent().expect("a folder")).expect("a folder");
        fs::write(&pin, "").expect("a file");
        let mut pins = Pins::new(dir.path(), &"one".parse().expect("a name"));
        assert_eq!(
            pins.remove_all().expect("nothing to do"),
            Vec::<PathBuf>::new()
        );
        assert!(pin.exists());
        assert!(pins.make().is_err(), "and nothing is mounted");
    }
}

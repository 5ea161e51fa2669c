//! Where the kernel objects of a node are pinned, and the lock that makes one agent their owner.
//!
//! `<bpffs>/dataplane/<node>/v<layout>/` holds `maps/`, `links/` (attached to the cgroup) and
//! `pods/`, a link per pod named by the cookie of its network namespace. The layout's number says whose
//! maps they are; an agent of another layout takes them over as they are there (see [`super::takeover`]),
//! and then gives the folder its own number.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, Metadata, Permissions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use aya::maps::MapInfo;
use nix::unistd::geteuid;

use super::CaptureError;
use super::link::Link;
use super::undo::UndoRecords;
use crate::config::NodeName;
use crate::sys::bpffs;

/// The folders of one node.
#[derive(Clone, Debug)]
pub struct Pins {
    bpffs: PathBuf,
    node: PathBuf,
    /// The folder of the layout that is there, or else of this agent's.
    layout: PathBuf,
}

impl Pins {
    /// Of this node, below a mounted bpffs.
    pub fn new(bpffs: &Path, node: &NodeName) -> Self {
        // A bpffs keeps names with dots to itself; no node's name has a colon.
        let node = node.as_str().replace('.', ":");
        Self::at(bpffs, bpffs.join("dataplane").join(node))
    }

    /// Of a trial, in a bpffs of its own.
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

    /// Which layout is there.
    fn find_layout(&mut self) {
        let own = self.own_layout();
        let mut layouts = entries(&self.node).map(|entry| entry.path());
        let found = layouts.find(|path| path.file_name().is_some_and(is_layout));
        self.layout = found.unwrap_or(own);
    }

    /// Makes the folders, and this process the owner of what is pinned in them as long as it has what is
    /// returned. Whatever else an agent was told, there is one for these pins.
    ///
    /// # Errors
    /// There is no bpffs; another user has made them; another agent has them; something else is there.
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

    /// Refuses what is there already as [`Pins::make`] would; nothing is made.
    ///
    /// # Errors
    /// Another user has made it; something else is there.
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

    /// The folder of the node, and those above it that are an agent's.
    fn folders(&self) -> Vec<&Path> {
        let above = self.node.ancestors();
        above.take_while(|of| *of != self.bpffs).collect()
    }

    /// Whoever pinned something else there may come back.
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

    /// Makes again what of the folders is gone, and mounts what was unmounted; `lock` is what
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

    /// Makes this process the owner of what is pinned, if something is.
    ///
    /// # Errors
    /// An agent has it.
    pub fn lock(&mut self) -> Result<Option<File>, CaptureError> {
        if !self.exist() {
            return Ok(None);
        }
        let lock = lock(&self.node, || File::open(&self.node))?;
        self.find_layout();
        Ok(Some(lock))
    }

    /// Gives what is pinned this agent's layout, whichever it had.
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

    /// Whether the node has any.
    pub fn exist(&self) -> bool {
        bpffs::is_mounted(&self.bpffs).unwrap_or(false)
            && fs::symlink_metadata(&self.node).is_ok_and(|found| found.is_dir())
    }

    /// The folder of the node.
    pub fn folder(&self) -> &Path {
        &self.node
    }

    /// Maps that programs share, by their names.
    pub fn maps(&self) -> PathBuf {
        self.layout.join(MAPS)
    }

    /// Links of the programs that are attached to the cgroup, by the programs' names.
    pub fn links(&self) -> PathBuf {
        self.layout.join(LINKS)
    }

    /// Links of the pods' programs, by the cookies of their network namespaces.
    pub fn pods(&self) -> PathBuf {
        self.layout.join(PODS)
    }

    /// The link of one pod.
    pub fn pod(&self, cookie: u64) -> PathBuf {
        self.pods().join(cookie.to_string())
    }

    /// Removes the links of all pods but those of which this says so, and what a crash left half done.
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

    /// The ids of all programs that are attached by what is pinned here.
    pub fn programs(&self) -> BTreeSet<u32> {
        let folders = entries(&self.node)
            .flat_map(|layout| [LINKS, PODS].map(|folder| layout.path().join(folder)));
        folders
            .flat_map(|folder| entries(&folder))
            .filter_map(|entry| program(&entry.path()))
            .collect()
    }

    /// The ids of all maps that are pinned here.
    pub fn map_ids(&self) -> BTreeSet<u32> {
        entries(&self.node)
            .flat_map(|layout| entries(&layout.path().join(MAPS)))
            .filter_map(|pin| Some(MapInfo::from_pin(pin.path()).ok()?.id()))
            .collect()
    }

    /// Those of one pod.
    pub fn programs_of(&self, cookie: u64) -> BTreeSet<u32> {
        let pin = self.pod(cookie);
        [new_pin(&pin), pin]
            .iter()
            .filter_map(|pin| program(pin))
            .collect()
    }

    /// Refuses where pods are captured by what is pinned here of which nothing is recorded there: their
    /// way back is in the run folder of whoever captured them.
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

    /// Removes what agents of the node have pinned, of any layout: what was attached by it no longer
    /// is. What no agent pins stays, and with it the folders that it is in; it is returned.
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
        // Last of its kind: no folder is left behind either.
        if let Some(all) = self.node.parent() {
            remove_if_empty(all)?;
        }
        Ok(left)
    }

    /// Those of the maps, by their names; also those of which this agent does not know.
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

/// Who asks whether it is locked may have it for a moment.
const PROBE_TIME: Duration = Duration::from_millis(100);

const MAPS: &str = "maps";
const LINKS: &str = "links";
const PODS: &str = "pods";

/// The folders of a layout, and what is pinned in each. Other layouts may have other maps and programs,
/// but they are named alike.
const FOLDERS: [(&str, IsPin); 3] = [
    (MAPS, |name| is_word(name, |byte| byte.is_ascii_uppercase())),
    (LINKS, |name| {
        is_word(name, |byte| byte.is_ascii_lowercase())
    }),
    (PODS, |name| name.parse::<u64>().is_ok()),
];

/// Whether a name is one that an agent pins.
type IsPin = fn(&str) -> bool;

fn is_word(name: &str, is_letter: fn(u8) -> bool) -> bool {
    let fits = |byte: u8| is_letter(byte) || byte.is_ascii_digit() || byte == b'_';
    !name.is_empty() && name.bytes().all(fits)
}

fn is_layout(name: &OsStr) -> bool {
    let number = name.to_str().and_then(|name| name.strip_prefix('v'));
    number.is_some_and(|number| number.parse::<u32>().is_ok())
}

/// Where a pin is made before it takes another one's place.
pub(super) fn new_pin(pin: &Path) -> PathBuf {
    let name = pin.file_name().unwrap_or_default().to_string_lossy();
    pin.with_file_name(format!("{name}-new"))
}

/// The program of a pinned link.
fn program(pin: &Path) -> Option<u32> {
    Some(Link::at(pin)?.program())
}

fn entries(folder: &Path) -> impl Iterator<Item = fs::DirEntry> + use<> {
    fs::read_dir(folder).into_iter().flatten().flatten()
}

/// What is in a folder; a link is neither a file nor a folder.
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

/// Makes a folder that only this user may open: who may open it may lock it, and so keep the agent away.
/// Any user may make one in a bpffs that was mounted without a mode.
///
/// # Errors
/// Another user may write to what is there; it is no folder; the file system refuses.
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

/// What a folder is that nobody else may write to.
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

/// Removes a file that may be there.
///
/// # Errors
/// It is there and cannot be removed.
pub fn remove(path: &Path) -> Result<(), CaptureError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(CaptureError::file(path)(error))
        }
        _ => Ok(()),
    }
}

/// Removes a folder that may be there; one that has something in it stays.
///
/// # Errors
/// It is empty and cannot be removed.
pub fn remove_if_empty(folder: &Path) -> Result<(), CaptureError> {
    use io::ErrorKind::{DirectoryNotEmpty, NotFound};
    match fs::remove_dir(folder) {
        Err(error) if ![NotFound, DirectoryNotEmpty].contains(&error.kind()) => {
            Err(CaptureError::file(folder)(error))
        }
        _ => Ok(()),
    }
}

/// Whether another process has locked a file that may be there.
pub fn is_locked(path: &Path) -> bool {
    let lock = File::open(path).map(|file| file.try_lock_shared());
    matches!(lock, Ok(Err(TryLockError::WouldBlock)))
}

/// Locks what `open` opens at a path, until the process ends or drops it.
///
/// # Errors
/// Another process has it; it cannot be opened.
pub fn lock(path: &Path, open: impl Fn() -> io::Result<File>) -> Result<File, CaptureError> {
    let deadline = Instant::now() + PROBE_TIME;
    loop {
        let file = open().map_err(CaptureError::file(path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                std::thread::sleep(PROBE_TIME / 10);
                continue;
            }
            Err(TryLockError::WouldBlock) => return Err(CaptureError::Held(path.to_owned())),
            Err(TryLockError::Error(error)) => return Err(CaptureError::file(path)(error)),
        }
        // Who uninstalls removes what it has locked: then this is one that nobody else will find.
        let locked = file.metadata().map_err(CaptureError::file(path))?;
        let there = fs::symlink_metadata(path);
        if there.is_ok_and(|there| (there.dev(), there.ino()) == (locked.dev(), locked.ino())) {
            return Ok(file);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_locked_is_what_is_at_the_path() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("lock");
        let open = || File::create(&path);
        // One that was removed under whoever opened it is not the lock any more.
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

//! Where the kernel objects of a node are pinned, and the lock that makes one agent their owner.
//!
//! `<bpffs>/dataplane/<node>/v<layout>/` holds `maps/`, `links/` (attached to the cgroup) and
//! `pods/`, a link per pod named by the cookie of its network namespace. The layout's number is in
//! the path since a map of one layout must not be read by programs of another.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use aya::programs::links::FdLink;

use super::CaptureError;
use crate::sys::bpffs;

/// The folders of one node.
#[derive(Clone, Debug)]
pub struct Pins {
    bpffs: PathBuf,
    node: PathBuf,
}

impl Pins {
    /// Of this node, below a mounted bpffs.
    pub fn new(bpffs: &Path, node: &str) -> Self {
        Self {
            bpffs: bpffs.to_owned(),
            // A bpffs keeps names with dots to itself; no node's name has a colon.
            node: bpffs.join("dataplane").join(node.replace('.', ":")),
        }
    }

    /// Makes the folders, and mounts the BPF file system if it is not.
    ///
    /// # Errors
    /// There is no bpffs; pins of another layout are there.
    pub fn make(&self) -> Result<(), CaptureError> {
        bpffs::ensure(&self.bpffs).map_err(CaptureError::file(&self.bpffs))?;
        fs::create_dir_all(&self.node).map_err(CaptureError::file(&self.node))?;
        // Before anything is made: whoever pinned it may come back.
        for entry in fs::read_dir(&self.node).map_err(CaptureError::file(&self.node))? {
            let path = entry.map_err(CaptureError::file(&self.node))?.path();
            if path != self.layout() {
                return Err(CaptureError::OtherLayout(path));
            }
        }
        for folder in [self.maps(), self.links(), self.pods()] {
            fs::create_dir_all(&folder).map_err(CaptureError::file(&folder))?;
        }
        Ok(())
    }

    /// Maps that programs share, by their names.
    pub fn maps(&self) -> PathBuf {
        self.layout().join("maps")
    }

    /// Links of the programs that are attached to the cgroup, by the programs' names.
    pub fn links(&self) -> PathBuf {
        self.layout().join("links")
    }

    /// Links of the pods' programs, by the cookies of their network namespaces.
    pub fn pods(&self) -> PathBuf {
        self.layout().join("pods")
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

    /// Pins a link, in place of one that may be there: there is no moment without either.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn replace(link: FdLink, path: &Path) -> Result<(), CaptureError> {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let new = path.with_file_name(format!("{name}-new"));
        remove(&new)?;
        link.pin(&new)
            .map_err(|error| CaptureError::file(&new)(io::Error::other(error)))?;
        fs::rename(&new, path).map_err(CaptureError::file(path))
    }

    /// Removes everything, of any layout: what was attached by it no longer is.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn remove_all(&self) -> Result<(), CaptureError> {
        remove_tree(&self.node)?;
        // Last of its kind: no folder is left behind either.
        if let Some(all) = self.node.parent() {
            let _ = fs::remove_dir(all);
        }
        Ok(())
    }

    fn layout(&self) -> PathBuf {
        self.node.join(format!("v{}", dataplane_ebpf::LAYOUT))
    }
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

/// `remove_dir_all` does not work on a bpffs, which has no `openat` for its files.
fn remove_tree(folder: &Path) -> Result<(), CaptureError> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(CaptureError::file(folder))?,
    };
    for entry in entries {
        let entry = entry.map_err(CaptureError::file(folder))?;
        let path = entry.path();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&path)?;
        } else {
            remove(&path)?;
        }
    }
    fs::remove_dir(folder).map_err(CaptureError::file(folder))
}

/// Makes this process the one agent of its node, until it ends.
///
/// # Errors
/// Another one is; the folder cannot be made.
pub fn lock(run: &Path) -> Result<File, CaptureError> {
    fs::create_dir_all(run).map_err(CaptureError::file(run))?;
    let path = run.join("lock");
    let file = File::create(&path).map_err(CaptureError::file(&path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(CaptureError::Held(path)),
        Err(TryLockError::Error(error)) => Err(CaptureError::file(path)(error)),
    }
}

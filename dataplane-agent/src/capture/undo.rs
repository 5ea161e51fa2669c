//! What was changed on the machine, written down before it is changed, so that a crash does not
//! lose the way back: `<run>/pods/<cookie>.json`, a file per enrolled pod. It does not outlive a
//! boot, and neither does what it speaks of.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::CaptureError;
use super::pins;
use crate::sys::netns::Netns;

/// The folder of records.
#[derive(Clone, Debug)]
pub struct Records(PathBuf);

/// The record of one pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The workload's uid.
    pub uid: Arc<str>,
    /// The cookie of its network namespace.
    pub cookie: u64,
    /// The inode number of its network namespace.
    pub inode: u64,
    /// Its cgroup's id.
    pub cgroup: u64,
    /// Settings below `/proc/sys` and what they were.
    pub sysctls: BTreeMap<String, String>,
}

impl Records {
    /// Below the node's folder for what is running.
    ///
    /// # Errors
    /// The folder cannot be made.
    pub fn open(run: &Path) -> Result<Self, CaptureError> {
        let folder = run.join("pods");
        fs::create_dir_all(&folder).map_err(CaptureError::file(&folder))?;
        Ok(Self(folder))
    }

    /// All of them.
    ///
    /// # Errors
    /// One cannot be read: the way back of one pod would be lost.
    pub fn all(&self) -> Result<Vec<Record>, CaptureError> {
        let mut all = Vec::new();
        for entry in fs::read_dir(&self.0).map_err(CaptureError::file(&self.0))? {
            let path = entry.map_err(CaptureError::file(&self.0))?.path();
            if path.extension().is_none_or(|extension| extension != "json") {
                continue; // one that was not finished: nothing was changed yet
            }
            let text = fs::read(&path).map_err(CaptureError::file(&path))?;
            let record = serde_json::from_slice(&text)
                .map_err(|error| CaptureError::file(&path)(error.into()))?;
            all.push(record);
        }
        Ok(all)
    }

    /// The record of one pod, if there is one.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn of(&self, cookie: u64) -> Result<Option<Record>, CaptureError> {
        Ok(self
            .all()?
            .into_iter()
            .find(|record| record.cookie == cookie))
    }

    /// Writes one, whole or not at all, and to the disk.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write(&self, record: &Record) -> Result<(), CaptureError> {
        let path = self.path(record.cookie);
        let new = path.with_extension("new");
        let write = || {
            let mut file = fs::File::create(&new)?;
            file.write_all(&serde_json::to_vec(record)?)?;
            file.sync_all()?;
            fs::rename(&new, &path)
        };
        write().map_err(CaptureError::file(&path))
    }

    /// Removes one: everything it speaks of is as it was.
    ///
    /// # Errors
    /// It cannot be removed.
    pub fn remove(&self, cookie: u64) -> Result<(), CaptureError> {
        pins::remove(&self.path(cookie))
    }

    fn path(&self, cookie: u64) -> PathBuf {
        self.0.join(format!("{cookie}.json"))
    }
}

impl Record {
    /// Its network namespace, if that is still there: of a process, or of a name.
    pub fn find_netns(&self) -> Option<Netns> {
        let of_processes = entries("/proc").map(|process| process.join("ns/net"));
        let named = entries("/run/netns");
        of_processes.chain(named).find_map(|path| {
            use std::os::unix::fs::MetadataExt;
            (fs::metadata(&path).ok()?.ino() == self.inode).then_some(())?;
            let netns = Netns::open(&path).ok()?;
            // The number may have been given to another one since.
            (netns.cookie().ok()? == self.cookie).then_some(netns)
        })
    }
}

fn entries(folder: &str) -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten();
    entries.filter_map(|entry| Some(entry.ok()?.path()))
}

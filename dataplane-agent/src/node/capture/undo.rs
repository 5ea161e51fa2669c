//! Undo records: what is changed on the machine is written down before it is changed, so that a crash does
//! not lose the way back. `<run-dir>/<node>/pods/<cookie>.json` is the record of one enrolled pod. The changes that
//! they describe end with the boot of the machine, and so do records, wherever the folder is: see
//! [`super::node_folder`].

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::CaptureError;
use super::pins;
use super::wanted::Desired;
use crate::sys::netns::Netns;
use crate::sys::{processes, regular_file};

/// The folder of undo records.
#[derive(Clone, Debug)]
pub struct UndoRecords(PathBuf);

/// The undo record of one pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UndoRecord {
    /// The workload's uid.
    pub uid: Arc<str>,
    /// The cookie of the pod's network namespace.
    pub cookie: u64,
    /// The inode number of the pod's network namespace.
    pub inode: u64,
    /// The identity under which the pod was leased last; none if it was not, or an older version wrote the record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity: Option<Arc<str>>,
    /// The id of the pod's first cgroup; 0 if unknown.
    #[serde(default)]
    pub cgroup: u64,
    /// When the pod was first enrolled in this namespace, in hundredths of a second since the boot of the machine; 0 if
    /// an older version wrote the record.
    #[serde(default)]
    pub enrolled: u64,
    /// Settings below `/proc/sys` with their values before the change.
    #[serde(default)]
    pub sysctls: BTreeMap<String, String>,
    /// Fields that another version of the agent has written, kept for that version.
    #[serde(flatten)]
    pub rest: BTreeMap<String, Value>,
}

/// The file of a record, and the record if it can be read.
pub type RecordFile = (PathBuf, Result<UndoRecord, CaptureError>);

impl UndoRecords {
    /// Opens this folder, and makes it if it is missing.
    ///
    /// # Errors
    /// The folder cannot be made; it is a link or no folder.
    pub fn open(folder: &Path) -> Result<Self, CaptureError> {
        fs::create_dir_all(folder).map_err(CaptureError::file(folder))?;
        let found = fs::symlink_metadata(folder).map_err(CaptureError::file(folder))?;
        if !found.is_dir() {
            return Err(CaptureError::NotOurs {
                path: folder.to_owned(),
                what: "it is no folder".into(),
            });
        }
        Ok(Self(folder.to_owned()))
    }

    /// Returns all records with their files, also those that cannot be read.
    ///
    /// # Errors
    /// The folder cannot be read.
    pub fn read_all(&self) -> Result<Vec<RecordFile>, CaptureError> {
        let finished = self.files()?.into_iter().filter_map(|path| {
            let cookie = UndoRecord::cookie_of(&path)?;
            Some((read(&path, cookie), path))
        });
        Ok(finished.map(|(record, path)| (path, record)).collect())
    }

    /// Returns the cookies of all pods that have a record, readable or not.
    ///
    /// # Errors
    /// The folder cannot be read.
    pub fn cookies(&self) -> Result<BTreeSet<u64>, CaptureError> {
        let files = self.files()?;
        Ok(files
            .iter()
            .filter_map(|path| UndoRecord::cookie_of(path))
            .collect())
    }

    /// Returns the path of the folder.
    pub fn folder(&self) -> &Path {
        &self.0
    }

    /// Returns records that were begun and not finished. No change was made because of them.
    ///
    /// # Errors
    /// The folder cannot be read.
    pub fn unfinished(&self) -> Result<Vec<PathBuf>, CaptureError> {
        let mut files = self.files()?;
        files.retain(|path| cookie_in_name(path, "new").is_some());
        Ok(files)
    }

    /// Returns the record of one pod, if there is one.
    ///
    /// # Errors
    /// The record cannot be read.
    pub fn read(&self, cookie: u64) -> Result<Option<UndoRecord>, CaptureError> {
        match read(&self.path(cookie), cookie) {
            Err(CaptureError::File { error, .. }) if error.kind() == io::ErrorKind::NotFound => {
                Ok(None)
            }
            record => record.map(Some),
        }
    }

    /// Writes a record to the disk, atomically.
    ///
    /// # Errors
    /// The record cannot be written.
    pub fn write(&self, record: &UndoRecord) -> Result<(), CaptureError> {
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

    /// Removes a record, once all that it describes is undone.
    ///
    /// # Errors
    /// The record cannot be removed.
    pub fn remove(&self, cookie: u64) -> Result<(), CaptureError> {
        pins::remove(&self.path(cookie))
    }

    fn files(&self) -> Result<Vec<PathBuf>, CaptureError> {
        let entries = fs::read_dir(&self.0).map_err(CaptureError::file(&self.0))?;
        entries
            .map(|entry| Ok(entry.map_err(CaptureError::file(&self.0))?.path()))
            .collect()
    }

    fn path(&self, cookie: u64) -> PathBuf {
        self.0.join(format!("{cookie}.json"))
    }
}

impl UndoRecord {
    /// Returns the cookie of the pod whose record this file is, by its name.
    pub fn cookie_of(path: &Path) -> Option<u64> {
        cookie_in_name(path, "json")
    }

    /// Returns `true` if the pod that was leased last is known to be another one than this, or of another identity.
    pub fn is_other(&self, pod: &Desired) -> bool {
        let identity = pod.identity_text();
        self.uid != pod.uid || self.identity.as_ref().is_some_and(|was| *was != identity)
    }

    /// Finds the record's network namespace by its processes or its name; `None` if nobody has it any more.
    ///
    /// # Errors
    /// The search was incomplete, and has not found it: the namespace may exist, with all that was changed in it.
    pub fn netns(&self) -> Result<Option<Netns>, CaptureError> {
        let found = find_namespaces(std::slice::from_ref(self)).remove(&self.cookie);
        found
            .unwrap_or(Ok(None))
            .map_err(|error| CaptureError::Namespace {
                what: "look for what was changed",
                why: error.to_string(),
            })
    }
}

fn read(path: &Path, cookie: u64) -> Result<UndoRecord, CaptureError> {
    let text = regular_file::read(path).map_err(CaptureError::file(path))?;
    let record: UndoRecord =
        serde_json::from_slice(&text).map_err(|error| CaptureError::file(path)(error.into()))?;
    if record.cookie != cookie {
        let error = io::Error::other(format!("it is of network namespace {}", record.cookie));
        return Err(CaptureError::file(path)(error));
    }
    Ok(record)
}

/// Parses the cookie from a file name with this extension: `json` for records, `new` for unfinished ones.
fn cookie_in_name(path: &Path, extension: &str) -> Option<u64> {
    let name = path.file_name()?.to_str()?;
    name.strip_suffix(extension)?
        .strip_suffix('.')?
        .parse()
        .ok()
}

/// Finds the network namespaces of these records in one search, by their cookies. A namespace that is not
/// known to be gone has an error.
pub fn find_namespaces(records: &[UndoRecord]) -> BTreeMap<u64, io::Result<Option<Netns>>> {
    let listed = processes::namespaces();
    let find = |record: &UndoRecord| {
        let listed = listed.as_ref().map_err(clone_error)?;
        let Some(namespace) = listed.namespace(record.inode, record.cookie) else {
            return Ok(None);
        };
        let netns = Netns::open(&namespace.path)?;
        if netns.inode() != record.inode {
            return Err(io::Error::other("it changed while it was looked at"));
        }
        Ok((netns.cookie()? == record.cookie).then_some(netns))
    };
    let found = records.iter().map(|record| (record.cookie, find(record)));
    found.collect()
}

/// Copies an error, which cannot be cloned.
fn clone_error(error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_that_cannot_be_read_takes_no_other_ones_way_back() {
        let dir = tempfile::tempdir().expect("a folder");
        let records = UndoRecords::open(dir.path()).expect("a folder");
        let record = UndoRecord {
            uid: "pod".into(),
            cookie: 7,
            inode: 1,
            identity: Some("spiffe://td/ns/ns/sa/sa".into()),
            cgroup: 1,
            enrolled: 2,
            sysctls: BTreeMap::new(),
            rest: BTreeMap::new(),
        };
        records.write(&record).expect("a file");
        for (name, text) in [("8.json", "{"), ("9.new", "{"), ("notes.json", "")] {
            fs::write(dir.path().join(name), text).expect("a file");
        }
        fs::copy(dir.path().join("7.json"), dir.path().join("10.json")).expect("a file");
        assert_eq!(records.read(7).expect("readable"), Some(record));
        assert_eq!(records.read(11).expect("none"), None);
        assert!(records.read(8).is_err() && records.read(10).is_err());
        let mut each = records.read_all().expect("a folder");
        each.sort_by_key(|(path, _)| path.clone());
        let good: Vec<bool> = each.iter().map(|(_, record)| record.is_ok()).collect();
        assert_eq!(good, [false, true, false], "10, 7, 8");
        assert_eq!(
            records.unfinished().expect("a folder"),
            [dir.path().join("9.new")]
        );
    }

    #[test]
    fn a_record_of_another_version_is_read_and_keeps_what_that_one_wrote() {
        let dir = tempfile::tempdir().expect("a folder");
        let records = UndoRecords::open(dir.path()).expect("a folder");
        let path = dir.path().join("7.json");
        let older = r#"{"uid":"pod","cookie":7,"inode":1}"#;
        fs::write(&path, older).expect("a file");
        let record = records.read(7).expect("readable").expect("there");
        assert_eq!((record.cgroup, record.sysctls.len()), (0, 0));
        assert_eq!(record.enrolled, 0);
        let newer = r#"{"uid":"pod","cookie":7,"inode":1,"hold":{"mark":"0x512"}}"#;
        fs::write(&path, newer).expect("a file");
        let record = records.read(7).expect("readable").expect("there");
        records.write(&record).expect("a file");
        let written = fs::read_to_string(&path).expect("a file");
        assert!(written.contains(r#""hold":{"mark":"0x512"}"#), "{written}");
    }
}

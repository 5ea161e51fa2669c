//! The last read of the records of enrolled pods. A look opens only the records that have changed since.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::enrolled::{Content, EnrolmentRecords, RecordsSnapshot, with_path};
use super::manifests::{Stale, Stamp};

/// Age from which the times of a file or folder can be trusted. A younger one may change again with the same
/// times, since the clocks of file systems are coarse.
const MTIME_GRANULARITY: Duration = Duration::from_secs(2);
/// Interval at which the records are looked at although their folder has not changed: one may be written in
/// place.
const REREAD_INTERVAL: Duration = Duration::from_secs(10);

/// The records as they were last read.
#[derive(Debug)]
pub(super) struct RecordCache {
    records: EnrolmentRecords,
    /// The records by their file names.
    files: BTreeMap<OsString, File>,
    said: Arc<RecordsSnapshot>,
    /// True if `files` may differ from `said`.
    changed: bool,
    /// The number of looks.
    looks: u64,
    /// The stamp of the folder and the time of the last complete look. `None` if the folder is to be listed again
    /// whatever its stamp is.
    listed: Option<(Stamp, SystemTime)>,
    /// The number of files that were opened.
    #[cfg(test)]
    opened: usize,
}

#[derive(Debug)]
struct File {
    /// The stamp from before the read. `None` if the file is to be read again whatever its stamp is.
    stamp: Option<Stamp>,
    /// The last look that found the file.
    look: u64,
    content: Content,
}

/// A new snapshot.
#[derive(Debug)]
pub(super) struct Change {
    pub(super) said: Arc<RecordsSnapshot>,
    /// The namespaces whose enrolled pods differ from the last snapshot.
    pub(super) stale: Stale,
}

impl RecordCache {
    /// Returns an empty cache.
    pub(super) fn new(records: EnrolmentRecords) -> Self {
        Self {
            records,
            files: BTreeMap::new(),
            said: Arc::default(),
            changed: false,
            looks: 0,
            listed: None,
            #[cfg(test)]
            opened: 0,
        }
    }

    /// Returns the last snapshot.
    pub(super) fn said(&self) -> &Arc<RecordsSnapshot> {
        &self.said
    }

    /// Reads the records that have changed. Returns the new snapshot, or `None` if it is the same.
    ///
    /// # Errors
    /// The folder cannot be read, or the state is not the one that was opened. The last snapshot stays.
    pub(super) fn look(&mut self, now: SystemTime) -> io::Result<Option<Change>> {
        let change = self.read(now);
        if change.is_err() {
            // The files may have been those of another folder.
            self.files.clear();
            (self.changed, self.listed) = (true, None);
        }
        change
    }

    fn read(&mut self, now: SystemTime) -> io::Result<Option<Change>> {
        let writes = self.records.writes();
        self.records.look()?;
        let folder = self.records.folder();
        let stamp = fs::metadata(folder).map_err(|error| with_path(folder, &error))?;
        let stamp = Stamp::from(&stamp);
        if let Some((as_listed, when)) = self.listed
            && as_listed == stamp
            && now
                .duration_since(when)
                .is_ok_and(|age| age < REREAD_INTERVAL)
            && writes == self.said.writes
        {
            return Ok(None);
        }
        self.list(now)?;
        // The state may have been unmounted while it was read.
        self.records.look()?;
        let before = Arc::clone(&self.said);
        if self.changed || writes != before.writes {
            let said = self.snapshot(writes);
            if said != *before {
                self.said = Arc::new(said);
            }
            self.changed = false;
        }
        let is_whole = self.said.problems.is_empty();
        self.listed = (is_whole && stamp.is_older(MTIME_GRANULARITY, now)).then_some((stamp, now));
        if Arc::ptr_eq(&before, &self.said) {
            return Ok(None);
        }
        let mut stale = Stale::default();
        self.said.enrolled.differ(&before.enrolled, &mut stale);
        let said = Arc::clone(&self.said);
        Ok(Some(Change { said, stale }))
    }

    /// Lists the folder, and reads the files that have changed.
    fn list(&mut self, now: SystemTime) -> io::Result<()> {
        let folder = self.records.folder();
        let listed = fs::read_dir(folder).map_err(|error| with_path(folder, &error))?;
        self.looks += 1;
        for entry in listed {
            let path = entry?.path();
            if path
                .extension()
                .is_some_and(|extension| extension == "json")
            {
                self.refresh(&path, now); // other files are being written
            }
        }
        let there = self.files.len();
        self.files.retain(|_, file| file.look == self.looks);
        self.changed |= self.files.len() != there;
        Ok(())
    }

    /// Reads a file if it has changed.
    fn refresh(&mut self, path: &Path, now: SystemTime) {
        let Some(name) = path.file_name() else { return };
        // Before the read: a change during the read is seen at the next look.
        let stamp = fs::metadata(path).map(|file| Stamp::from(&file)).ok();
        let mut before = self.files.get_mut(name);
        if let Some(file) = &mut before
            && file.stamp.is_some()
            && file.stamp == stamp
        {
            file.look = self.looks;
            return;
        }
        #[cfg(test)]
        {
            self.opened += 1;
        }
        let Some(content) = self.records.content(path) else {
            return; // the file is gone
        };
        let may_hold = matches!(content, Content::Enrolled(..));
        let file = File {
            stamp: stamp.filter(|stamp| may_hold && stamp.is_older(MTIME_GRANULARITY, now)),
            look: self.looks,
            content,
        };
        self.changed |= before.is_none_or(|before| before.content != file.content);
        self.files.insert(name.to_owned(), file);
    }

    /// Returns the snapshot of all files.
    fn snapshot(&self, writes: u64) -> RecordsSnapshot {
        let mut said = RecordsSnapshot {
            writes,
            ..RecordsSnapshot::default()
        };
        for (name, file) in &self.files {
            said.add(name, &file.content);
        }
        said.problems.sort();
        said
    }
}

#[cfg(test)]
mod tests;

//! The files of a manifest folder: what each says, and which of them have changed since it was read.
//!
//! The text of a file does not show whether it is finished: half of a policy may be a valid policy, and some of a
//! file's policies are valid without the others. So a change counts only once the file has not changed for
//! [`SETTLE`] and nobody has it open for writing. Where the kernel does not say who has it open, missing objects
//! count later still. The absence of a file counts once the whole folder has not changed.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::ManifestError;
use super::collection::{Change, Collection};
use super::object::{self, Parsed};
use super::scan::{Scan, Stamp, at, scan};
use super::shared::SharedParts;
use super::watch::{RESYNC, Reported};
use crate::control::disk;
use crate::sys::regular_file;
use crate::sys::writers::has_writers;

/// Time for which a file must not change before it is read again.
pub(in crate::control) const SETTLE: Duration = Duration::from_millis(300);
/// The same for a file of which the kernel does not say whether it is open for writing.
pub(in crate::control) const SETTLE_UNSEEN: Duration = SETTLE.saturating_mul(LONG_SETTLE_FACTOR);
/// Multiple of the settle time that must pass before these count: missing objects in a file of which the
/// kernel does not say whether it is open for writing, and a file that is gone from a folder in which
/// something always changes. A file that is open for writing for longer is reported.
const LONG_SETTLE_FACTOR: u32 = 10;
/// Largest file that is read, in bytes. A larger one is a mistake.
const MAX_FILE_SIZE: u64 = 64 << 20;

/// The files.
#[derive(Debug)]
pub(super) struct FolderFiles {
    dir: PathBuf,
    settle: Duration,
    files: BTreeMap<PathBuf, FileState>,
    shared: SharedParts,
    /// What is there.
    found: Scan,
    /// The time since which the files there have been the same.
    same_since: Instant,
    /// The time of the last scan of the whole folder.
    scanned: Instant,
}

/// What a look at the files has found, besides their content.
#[derive(Debug)]
pub(super) struct Look {
    /// The files and folders that could not be read, and the folders that have no manifests any more.
    pub(super) problems: Vec<ManifestError>,
    /// The files that were removed.
    pub(super) gone: Vec<Change>,
    /// Messages about files that were renamed to an ending that is not read.
    pub(super) renamed: Vec<String>,
    /// What was passed over, and why.
    pub(super) notes: Vec<String>,
    /// An empty folder, if there is one.
    pub(super) empty: Option<PathBuf>,
    /// True if a change has not settled yet: look again soon.
    pub(super) settling: bool,
    /// Time since which the files have been the same.
    pub(super) same_since: Instant,
}

#[derive(Debug, Default)]
struct FileState {
    /// The content that is in effect.
    accepted: Arc<Parsed>,
    /// The content that was read last, or why it could not be read.
    latest: Option<Result<Arc<Parsed>, ManifestError>>,
    /// The stamp of the file when `latest` was read; `None` for a file that was not read yet.
    stamp: Option<Stamp>,
    /// The stamp that was last observed, and since when. The stamp is `None` if the file is gone.
    observed: Option<(Option<Stamp>, Instant)>,
}

impl FileState {
    fn was_read(&self) -> bool {
        self.stamp.is_some()
    }

    /// Returns the content that was read last, if it is not in effect yet.
    fn pending(&self) -> Option<&Arc<Parsed>> {
        let latest = self.latest.as_ref()?.as_ref().ok()?;
        (!Arc::ptr_eq(latest, &self.accepted)).then_some(latest)
    }
}

impl FolderFiles {
    /// Reads all files of a folder for the first time. What cannot be read is a problem.
    pub(super) fn open(dir: &Path, settle: Duration) -> (Self, Look) {
        let now = Instant::now();
        let mut new = Self {
            dir: dir.to_owned(),
            settle,
            files: BTreeMap::new(),
            shared: SharedParts::default(),
            found: scan(dir, &|_| false),
            same_since: now,
            scanned: now,
        };
        let mut look = new.look_of();
        for (name, stamp) in &new.found.files {
            match read_closed(dir, name) {
                Ok(mut parsed) => {
                    new.shared.share(&mut parsed);
                    let file = FileState {
                        stamp: Some(*stamp),
                        latest: Some(Ok(Arc::new(parsed))),
                        ..FileState::default()
                    };
                    new.files.insert(name.clone(), file);
                }
                Err(error) => look.problems.push(error),
            }
        }
        (new, look)
    }

    /// Looks for changes where they were reported, and reads the files that have settled. Takes as long as the disk
    /// does.
    pub(super) fn look(&mut self, reported: Reported) -> Look {
        let names = self.changed(reported);
        let mut look = self.look_of();
        self.read_settled(&names, &mut look);
        look
    }

    /// Finds out what is there now, and returns the names of the files that may differ from what was read.
    ///
    /// To scan takes a time by the size of the folder. So it is done now and then, and whenever more may have changed
    /// than the content of files that are there.
    fn changed(&mut self, reported: Reported) -> Vec<PathBuf> {
        if let Reported::Files(mut names) = reported
            && self.scanned.elapsed() < RESYNC
        {
            let unsettled = self.files.iter().filter(|(_, of)| of.observed.is_some());
            names.extend(unsettled.map(|(name, _)| name.clone()));
            if let Some(changed) = self.found.look_again(&self.dir, &names) {
                if changed {
                    self.same_since = Instant::now();
                }
                return names.into_iter().collect();
            }
        }
        let was_read = |name: &Path| self.files.get(name).is_some_and(FileState::was_read);
        let found = scan(&self.dir, &was_read);
        self.scanned = Instant::now();
        if self.found.files != found.files {
            self.same_since = self.scanned;
        }
        self.found = found;
        for name in self.found.files.keys() {
            self.files.entry(name.clone()).or_default();
        }
        self.files.keys().cloned().collect()
    }

    /// Returns true if there are no manifests.
    pub(super) fn is_empty(&self) -> bool {
        self.files.is_empty()
    }

    /// Returns true if any content of this file, or of a file in this folder, is in effect.
    pub(super) fn is_in_effect(&self, path: &Path) -> bool {
        let below = path.strip_prefix(&self.dir).unwrap_or(path);
        let mut files = self.files.iter();
        files.any(|(name, file)| name.starts_with(below) && *file.accepted != Parsed::default())
    }

    /// Returns the warnings in the content that is in effect.
    pub(super) fn warnings(&self) -> impl Iterator<Item = &String> {
        self.files.values().flat_map(|file| &file.accepted.warnings)
    }

    /// Returns an error for each file with an object that is in another file too.
    pub(super) fn conflicts(&self, objects: &Collection) -> Vec<(PathBuf, ManifestError)> {
        objects.conflicts(&pending(&self.files), &[])
    }

    fn look_of(&self) -> Look {
        let found = &self.found;
        Look {
            // A path that cannot be read does not mean that its objects are gone.
            problems: found
                .faults
                .iter()
                .map(|(_, error)| error.clone())
                .collect(),
            gone: Vec::new(),
            renamed: Vec::new(),
            notes: found.notes.clone(),
            empty: found.empty.first().cloned(),
            settling: false,
            same_since: self.same_since,
        }
    }

    /// Compares files of these names with what was read of them, and reads the settled ones. Adds removed files
    /// to `look`, and an error for each folder that has no manifests any more.
    fn read_settled(&mut self, names: &[PathBuf], look: &mut Look) {
        let found = &self.found;
        let now = Instant::now();
        let quiet = now.duration_since(self.same_since) >= self.settle;
        let mut gone = Vec::new();
        for name in names {
            let Some(file) = self.files.get_mut(name) else {
                continue;
            };
            if found.cannot_tell(name) {
                file.observed = None;
                continue;
            }
            let stamp = found.files.get(name).copied();
            if stamp.is_some() && stamp == file.stamp {
                file.observed = None;
                continue;
            }
            let since = match file.observed {
                Some((observed, since)) if observed == stamp => since,
                _ => now,
            };
            file.observed = Some((stamp, since));
            let age = stamp.and_then(|stamp| stamp.modified?.elapsed().ok());
            let still = now.duration_since(since).max(age.unwrap_or_default());
            if still < self.settle {
                look.settling = true;
                continue;
            }
            let Some(stamp) = stamp else {
                if quiet || still >= self.settle * LONG_SETTLE_FACTOR {
                    gone.push(name.clone());
                } else {
                    look.settling = true;
                }
                continue;
            };
            let writers = has_writers(&self.dir.join(name)).ok();
            if writers == Some(true) {
                // The watch reports when the file is closed.
                if now.duration_since(since) >= self.settle * LONG_SETTLE_FACTOR {
                    file.latest = Some(Err(open_for_writing(name)));
                }
                continue;
            }
            let mut latest = read(&self.dir, name);
            if let Ok(parsed) = &mut latest {
                self.shared.share(parsed);
            }
            let has_all = |latest: &Parsed| latest.has_all_of(&file.accepted);
            if !latest.as_ref().map_or(true, has_all)
                && !may_count_as_removed(writers, still, self.settle)
            {
                look.settling = true;
                continue;
            }
            // The file was written while it was read, so the text may be half old and half new.
            if fs::metadata(self.dir.join(name))
                .ok()
                .as_ref()
                .map(Stamp::from)
                != Some(stamp)
            {
                look.settling = true;
                continue;
            }
            // A failed read is repeated at every reload, since the cause may pass without a change of the
            // file.
            if latest.is_ok() {
                file.stamp = Some(stamp);
                file.observed = None;
            }
            file.latest = Some(latest.map(Arc::new));
        }
        let mut emptied = BTreeSet::new();
        for name in gone {
            // A file that went before it was read removes nothing.
            let held = self.files.get(&name).is_some_and(FileState::was_read);
            if let Some(folder) = found.emptied(&name).filter(|_| held) {
                emptied.insert(at(&self.dir, folder));
            } else if let Some(file) = self.files.remove(&name) {
                if let Some(now) = file.stamp.and_then(|stamp| found.renamed(stamp)) {
                    look.renamed
                        .push(describe_renamed(&name, now, &file.accepted));
                }
                look.gone.push(Change {
                    file: name.into(),
                    before: file.accepted,
                    now: Arc::default(),
                });
            }
        }
        let told = |folder: &Path| {
            // If the top folder is removed nothing can be read, so that does not confirm it either.
            let or = if folder == self.dir {
                ""
            } else {
                ", or remove the folder"
            };
            format!(
                "has no manifests any more, as if it were not mounted; to say that this is meant, put \
                 one in it, if only an empty List{or}"
            )
        };
        let emptied = emptied.into_iter();
        look.problems
            .extend(emptied.map(|folder| ManifestError::of_file(folder.clone(), told(&folder))));
    }

    /// Puts valid content into effect, and returns why the rest is not.
    ///
    /// If two files have the same object, neither is at fault alone: the object may be moving from one to the
    /// other. Those of the two that have changed keep their old content.
    pub(super) fn accept_valid(
        &mut self,
        objects: &Collection,
        changes: &mut Vec<Change>,
    ) -> Vec<ManifestError> {
        let mut held: BTreeMap<PathBuf, ManifestError> = BTreeMap::new();
        for (name, file) in &self.files {
            let fault = match (&file.latest, file.pending()) {
                (Some(Err(error)), _) => Some(error.clone()),
                (_, Some(latest)) => latest.may_follow(&file.accepted, name).err(),
                (_, None) => None,
            };
            held.extend(fault.map(|fault| (name.clone(), fault)));
        }
        loop {
            let mut candidates = pending(&self.files);
            candidates.retain(|name, _| !held.contains_key(*name));
            let conflicts = objects.conflicts(&candidates, changes).into_iter();
            let is_one = |(name, _): &(PathBuf, _)| candidates.contains_key(name);
            let more: Vec<_> = conflicts.filter(is_one).collect();
            if more.is_empty() {
                break;
            }
            held.extend(more);
        }
        for (name, file) in &mut self.files {
            if let (false, Some(latest)) = (held.contains_key(name), file.pending().cloned()) {
                changes.push(Change {
                    file: name.as_path().into(),
                    before: std::mem::replace(&mut file.accepted, Arc::clone(&latest)),
                    now: latest,
                });
            }
        }
        held.into_values().collect()
    }
}

/// Returns the content of each file that is not in effect yet.
fn pending(files: &BTreeMap<PathBuf, FileState>) -> BTreeMap<&PathBuf, &Parsed> {
    let of = |(name, file)| Some((name, &**FileState::pending(file)?));
    files.iter().filter_map(of).collect()
}

/// Reads a file as [`read`] does, and refuses one that is open for writing.
fn read_closed(dir: &Path, name: &Path) -> Result<Parsed, ManifestError> {
    match has_writers(&dir.join(name)) {
        Ok(true) => Err(open_for_writing(name)),
        // If asking fails because the file is not accessible, the read fails too; other failures say nothing
        // about the file.
        Ok(false) | Err(_) => read(dir, name),
    }
}

/// Returns true if objects that are missing in a file count as removed after it has not changed for `still`.
/// `writers`: true if the file is open for writing, `None` if that is not known.
fn may_count_as_removed(writers: Option<bool>, still: Duration, settle: Duration) -> bool {
    writers == Some(false) || still >= settle * LONG_SETTLE_FACTOR
}

/// Describes a file that was renamed to an ending that is not read.
fn describe_renamed(name: &Path, now: &Path, said: &Parsed) -> String {
    let objects = said.items.iter().map(|item| {
        let (kind, key) = item.identity();
        format!("{kind} {key}")
    });
    let objects: Vec<String> = objects.collect();
    format!(
        "{}: was renamed to {}, which is not read, and what it said is gone: {}",
        name.display(),
        now.display(),
        objects.join(", ")
    )
}

fn open_for_writing(name: &Path) -> ManifestError {
    ManifestError::of_file(name, "is open for writing, and counts when it is closed")
}

fn read(dir: &Path, name: &Path) -> Result<Parsed, ManifestError> {
    let fault = |what: &dyn std::fmt::Display| ManifestError::of_file(name, what);
    let path = dir.join(name);
    let size = fs::metadata(&path).map_err(|error| fault(&error))?.len();
    if size > MAX_FILE_SIZE {
        return Err(fault(&format_args!(
            "has {size} bytes, more than {MAX_FILE_SIZE}"
        )));
    }
    let text = regular_file::read_to_string(&path).map_err(|error| fault(&error))?;
    disk::answered();
    object::parse(name, &text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_counts_later_where_writers_cannot_be_seen() {
        let times = |times| SETTLE * times;
        assert!(may_count_as_removed(Some(false), times(1), SETTLE));
        assert!(!may_count_as_removed(
            None,
            times(LONG_SETTLE_FACTOR - 1),
            SETTLE
        ));
        assert!(may_count_as_removed(
            None,
            times(LONG_SETTLE_FACTOR),
            SETTLE
        ));
    }
}

//! The manifest folder: the last accepted state of every file, and the objects that the files make together.
//!
//! At the start a bad file is an error. Later it is not: a file that cannot be read, or not yet, keeps the
//! objects that it had. The text of a file does not show whether it is finished: half of a policy may be a
//! valid policy, and some of a file's policies are valid without the others. So a change counts only once the
//! file has not changed for [`SETTLE`] and nobody has it open for writing. Where the kernel does not say who
//! has it open, missing objects count later still. The absence of a file counts once the whole folder has not
//! changed.
//!
//! A file that is gone was removed. A folder that is there and has no manifests any more was more likely
//! unmounted, or is being filled, so its objects stay until the user confirms their removal: by removing the
//! folder, or by putting any manifest into it, if only an empty List.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::changes::PolicyChange;
use super::collection::{Change, Collection};
use super::object::{self, Identity, Objects, Parsed};
use super::scan::{Scan, Stamp, at, scan};
use super::{ManifestError, ManifestErrors, Watch};
use crate::sys::regular_file;
use crate::sys::writers::has_writers;

/// Time for which a file must not change before it is read again.
pub const SETTLE: Duration = Duration::from_millis(300);
/// Multiple of the settle time that must pass before these count: missing objects in a file of which the
/// kernel does not say whether it is open for writing, and a file that is gone from a folder in which
/// something always changes. A file that is open for writing for longer is reported.
const LONG_SETTLE_FACTOR: u32 = 10;
/// Time without a change since the start after which a folder counts as complete.
const COMPLETE_AFTER: Duration = Duration::from_secs(5);
/// Interval at which files that have not settled are checked.
const RETRY: Duration = Duration::from_millis(100);
/// Largest file that is read, in bytes. A larger one is a mistake.
const MAX_FILE_SIZE: u64 = 64 << 20;

/// A folder of manifests.
#[derive(Debug)]
pub struct ManifestFolder {
    dir: PathBuf,
    settle: Duration,
    files: BTreeMap<PathBuf, FileState>,
    objects: Collection,
    /// Objects that have changed since the last call of [`ManifestFolder::touched`].
    touched: Vec<Identity>,
    reported: Vec<ManifestError>,
    settling: bool,
    /// Time of the next check of unsettled files. It is kept here because [`ManifestFolder::next`] may be
    /// cancelled.
    retry_at: Option<tokio::time::Instant>,
    /// The files at the last scan, and the time since which they have been the same.
    last_scan: (BTreeMap<PathBuf, Stamp>, Instant),
    /// What the scan passed over, and why.
    notes: Vec<String>,
    /// Messages about files that were renamed to an ending that is not read, since the last reload.
    renamed: Vec<String>,
    /// An empty folder, if there is one.
    empty: Option<PathBuf>,
}

/// The outcome of a reload.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reload {
    /// True if the objects have changed.
    pub changed: bool,
    /// The files whose content is not accepted, and why.
    pub problems: Vec<ManifestError>,
    /// Messages about files that were renamed to an ending that is not read, with the objects that went with
    /// each.
    pub renamed: Vec<String>,
    /// The policies that have changed.
    pub policies: Vec<PolicyChange>,
    /// True if a change has not settled yet: reload again soon.
    pub settling: bool,
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

impl ManifestFolder {
    /// Reads a folder for the first time.
    ///
    /// # Errors
    /// Lists everything that is wrong: the folder or a file cannot be read, a file is not valid, or an object
    /// is in two files.
    pub fn open(dir: &Path) -> Result<Self, ManifestErrors> {
        Self::open_settling(dir, SETTLE)
    }

    pub(crate) fn open_settling(dir: &Path, settle: Duration) -> Result<Self, ManifestErrors> {
        let found = scan(dir, &|_| false);
        let mut folder = Self {
            dir: dir.to_owned(),
            settle,
            files: BTreeMap::new(),
            objects: Collection::default(),
            touched: Vec::new(),
            reported: Vec::new(),
            settling: false,
            retry_at: None,
            last_scan: (found.files.clone(), Instant::now()),
            notes: found.notes,
            renamed: Vec::new(),
            empty: found.empty.into_iter().next(),
        };
        let mut wrong: Vec<ManifestError> =
            found.faults.into_iter().map(|(_, error)| error).collect();
        for (name, stamp) in found.files {
            match read_closed(dir, &name) {
                Ok(parsed) => {
                    let file = FileState {
                        stamp: Some(stamp),
                        latest: Some(Ok(Arc::new(parsed))),
                        ..FileState::default()
                    };
                    folder.files.insert(name, file);
                }
                Err(error) => wrong.push(error),
            }
        }
        // Of two files with the same object, the error names the later one.
        let twice = folder.objects.conflicts(&pending(&folder.files), &[]);
        wrong.extend(twice.into_iter().step_by(2).map(|(_, error)| error));
        if !wrong.is_empty() {
            return Err(ManifestErrors(wrong));
        }
        let mut taken = Vec::new();
        folder.accept_valid(&mut taken);
        folder.touched = folder.objects.take(&taken).objects;
        folder.update_warnings();
        Ok(folder)
    }

    /// Returns true if the folder has no manifests.
    pub fn is_empty(&self) -> bool {
        self.files.is_empty()
    }

    /// Returns why more manifests may still appear. Until then the absence of an object means nothing.
    pub fn is_partial(&self) -> Option<String> {
        if let Some(empty) = &self.empty {
            let empty = empty.display();
            return Some(format!("{empty} is empty, as if it were not mounted"));
        }
        let still = self.last_scan.1.elapsed() >= COMPLETE_AFTER && self.reported.is_empty();
        (!still).then(|| {
            format!("manifests have not been right and unchanged for {COMPLETE_AFTER:?} yet")
        })
    }

    /// The objects that are in effect.
    pub fn objects(&self) -> &Objects {
        self.objects.objects()
    }

    /// Takes the objects that have changed since the last call.
    pub fn touched(&mut self) -> Vec<Identity> {
        std::mem::take(&mut self.touched)
    }

    /// Reads the files that have changed.
    pub fn reload(&mut self) -> Reload {
        self.settling = false;
        let mut problems = Vec::new();
        let was_read = |name: &Path| self.files.get(name).is_some_and(FileState::was_read);
        let found = scan(&self.dir, &was_read);
        if self.last_scan.0 != found.files {
            self.last_scan = (found.files.clone(), Instant::now());
        }
        let mut changes = Vec::new();
        problems.extend(self.read_settled(&found, &mut changes));
        // A path that cannot be read does not mean that its objects are gone.
        problems.extend(found.faults.into_iter().map(|(_, error)| error));
        self.notes = found.notes;
        self.empty = found.empty.into_iter().next();
        problems.extend(self.accept_valid(&mut changes));
        let touched = self.objects.take(&changes);
        let changed = !touched.objects.is_empty() | self.update_warnings();
        self.touched.extend(touched.objects);
        self.reported.clone_from(&problems);
        Reload {
            changed,
            problems,
            renamed: std::mem::take(&mut self.renamed),
            policies: touched.policies,
            settling: self.settling,
        }
    }

    /// Waits until a reload brings different objects or different problems.
    pub async fn next(&mut self, watch: &mut Watch) -> Reload {
        loop {
            if self.settling {
                let soon = tokio::time::Instant::now() + RETRY.min(self.settle);
                tokio::time::sleep_until(*self.retry_at.get_or_insert(soon)).await;
                self.retry_at = None;
            } else {
                watch.changed().await;
            }
            let told = self.reported.clone();
            let reload = self.reload();
            if reload.changed || reload.problems != told {
                return reload;
            }
        }
    }

    /// Compares the files that exist with those that were read, and reads the settled ones. Collects removed
    /// files in `changes`. Returns an error for each folder that has no manifests any more.
    fn read_settled(&mut self, found: &Scan, changes: &mut Vec<Change>) -> Vec<ManifestError> {
        let now = Instant::now();
        let quiet = now.duration_since(self.last_scan.1) >= self.settle;
        for name in found.files.keys() {
            self.files.entry(name.clone()).or_default();
        }
        let mut gone = Vec::new();
        for (name, file) in &mut self.files {
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
                self.settling = true;
                continue;
            }
            let Some(stamp) = stamp else {
                if quiet || still >= self.settle * LONG_SETTLE_FACTOR {
                    gone.push(name.clone());
                } else {
                    self.settling = true;
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
            let latest = read(&self.dir, name);
            let has_all = |latest: &Parsed| latest.has_all_of(&file.accepted);
            if !latest.as_ref().map_or(true, has_all)
                && !may_count_as_removed(writers, still, self.settle)
            {
                self.settling = true;
                continue;
            }
            // The file was written while it was read, so the text may be half old and half new.
            if fs::metadata(self.dir.join(name))
                .ok()
                .as_ref()
                .map(Stamp::from)
                != Some(stamp)
            {
                self.settling = true;
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
                    self.renamed
                        .push(describe_renamed(&name, now, &file.accepted));
                }
                changes.push(Change {
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
        emptied
            .into_iter()
            .map(|folder| ManifestError::of_file(folder.clone(), told(&folder)))
            .collect()
    }

    /// Puts valid content into effect, and returns why the rest is not.
    ///
    /// If two files have the same object, neither is at fault alone: the object may be moving from one to the
    /// other. Those of the two that have changed keep their old content.
    fn accept_valid(&mut self, changes: &mut Vec<Change>) -> Vec<ManifestError> {
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
            let conflicts = self.objects.conflicts(&candidates, changes).into_iter();
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

    /// Updates the warnings. Returns true if they have changed.
    fn update_warnings(&mut self) -> bool {
        let of_files = self.files.values().flat_map(|file| &file.accepted.warnings);
        let warnings = self.notes.iter().chain(of_files).cloned().collect();
        self.objects.warn(warnings)
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

//! The folder: every file's last good state, and the objects that they make together.
//!
//! At the start a bad file is an error. Later it is not: whatever cannot be read, or not yet, leaves
//! what the file said before. A file that is being written cannot be told from a finished one by its
//! text alone, since half of a policy may well be a policy, and some of a file's policies are some
//! policies; so a change counts only once it has not changed for [`SETTLE`] and nobody has the file open
//! for writing. Where that cannot be told, objects that are missing in it count later still. A file's
//! absence counts once the whole folder has not changed.
//!
//! A file that is gone was removed; a folder that is there and has no manifests any more was more likely
//! unmounted, or is being filled. So what was in it holds until that is said: by removing the folder, or by
//! any manifest in it, if only an empty List.

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
use crate::sys::writers::has_writers;

/// How long a file must have been left alone before it is read again.
pub const SETTLE: Duration = Duration::from_millis(300);
/// This many times that is how long a file must have been left alone that lacks objects which it had, if
/// one cannot tell whether it is being written, or a file that is gone from a folder in which something
/// always changes. A file that is open for longer is told of.
const LONG_SETTLE_FACTOR: u32 = 10;
/// A folder in which nothing has changed for so long since the start has all that it will have.
const COMPLETE_AFTER: Duration = Duration::from_secs(5);
/// How often files are looked at that have not settled yet.
const RETRY: Duration = Duration::from_millis(100);
/// A larger file is a mistake.
const MAX_FILE_SIZE: u64 = 64 << 20;

/// A folder of manifests.
#[derive(Debug)]
pub struct ManifestFolder {
    dir: PathBuf,
    settle: Duration,
    files: BTreeMap<PathBuf, FileState>,
    objects: Collection,
    /// Those that are others, since they were last asked for.
    touched: Vec<Identity>,
    reported: Vec<ManifestError>,
    settling: bool,
    /// When to look at what has not settled; kept here as who waits may be called away.
    retry_at: Option<tokio::time::Instant>,
    /// What was there at the last look, and since when it is so.
    last_scan: (BTreeMap<PathBuf, Stamp>, Instant),
    /// What is passed over, and why.
    notes: Vec<String>,
    /// What was said by files that were renamed to what is not read, since it was last told.
    renamed: Vec<String>,
    /// A folder that has nothing in it.
    empty: Option<PathBuf>,
}

/// What reading again brought.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reload {
    /// Whether the objects are others than before.
    pub changed: bool,
    /// Every file that is not what its last good state says, and why.
    pub problems: Vec<ManifestError>,
    /// Files that are not read any more since they were renamed, and what is gone with each.
    pub renamed: Vec<String>,
    /// The policies that are others than before.
    pub policies: Vec<PolicyChange>,
    /// Whether something changed that is not taken yet; look again soon.
    pub settling: bool,
}

#[derive(Debug, Default)]
struct FileState {
    /// What holds.
    accepted: Arc<Parsed>,
    /// What the file says now, if it can be read.
    latest: Option<Result<Arc<Parsed>, ManifestError>>,
    /// What `latest` was read from; none for a file that was not read yet.
    stamp: Option<Stamp>,
    /// What it looks like now, and since when.
    observed: Option<(Option<Stamp>, Instant)>,
}

impl FileState {
    fn was_read(&self) -> bool {
        self.stamp.is_some()
    }

    /// What it says now, if that is another than what holds.
    fn pending(&self) -> Option<&Arc<Parsed>> {
        let latest = self.latest.as_ref()?.as_ref().ok()?;
        (!Arc::ptr_eq(latest, &self.accepted)).then_some(latest)
    }
}

impl ManifestFolder {
    /// Reads a folder for the first time.
    ///
    /// # Errors
    /// The folder or a file cannot be read; a file is not right; an object is in two files. All of it.
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
        // Of two files that have an object the later one is told of.
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

    /// Whether there is no manifest in it.
    pub fn is_empty(&self) -> bool {
        self.files.is_empty()
    }

    /// Why there may be more to come than is here: what was not there at the start is no word yet.
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

    /// The objects that hold now.
    pub fn objects(&self) -> &Objects {
        self.objects.objects()
    }

    /// The objects that are others than when this was last asked.
    pub fn touched(&mut self) -> Vec<Identity> {
        std::mem::take(&mut self.touched)
    }

    /// Reads again what changed.
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
        // What could not be looked at is no word about what is in it.
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

    /// Waits until reading again brings something new: other objects, or other problems.
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

    /// Compares what is there with what was read, and reads what has settled; the folders that have
    /// nothing in them any more.
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
                // That it is closed is reported.
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
            // Written to while it was read: what was read may be half of each.
            if fs::metadata(self.dir.join(name))
                .ok()
                .as_ref()
                .map(Stamp::from)
                != Some(stamp)
            {
                self.settling = true;
                continue;
            }
            // What could not be read is tried again at every look: that may pass without a change.
            if latest.is_ok() {
                file.stamp = Some(stamp);
                file.observed = None;
            }
            file.latest = Some(latest.map(Arc::new));
        }
        let mut emptied = BTreeSet::new();
        for name in gone {
            // One that was new and went before it was read says nothing.
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
            // Without the whole folder nothing can be read: that is no word either.
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

    /// Makes what is right the state that holds, and says of the rest why it is not.
    ///
    /// An object that would be there twice is nobody's fault alone (it may be on its way from one
    /// file to another): of the files that have it, those that changed stay as they were.
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

    /// Collects what is passed over; whether that is another than before.
    fn update_warnings(&mut self) -> bool {
        let of_files = self.files.values().flat_map(|file| &file.accepted.warnings);
        let warnings = self.notes.iter().chain(of_files).cloned().collect();
        self.objects.warn(warnings)
    }
}

/// What files say that is another than what holds.
fn pending(files: &BTreeMap<PathBuf, FileState>) -> BTreeMap<&PathBuf, &Parsed> {
    let of = |(name, file)| Some((name, &**FileState::pending(file)?));
    files.iter().filter_map(of).collect()
}

/// As [`read`], and refuses a file of which more may come.
fn read_closed(dir: &Path, name: &Path) -> Result<Parsed, ManifestError> {
    match has_writers(&dir.join(name)) {
        Ok(true) => Err(open_for_writing(name)),
        // What keeps us from asking keeps us from reading too, or says nothing about the file.
        Ok(false) | Err(_) => read(dir, name),
    }
}

/// Whether a file may lack objects that it had, after it was left alone for so long. `writers`: whether
/// it is open for writing, if that can be told.
fn may_count_as_removed(writers: Option<bool>, still: Duration, settle: Duration) -> bool {
    writers == Some(false) || still >= settle * LONG_SETTLE_FACTOR
}

/// What to say of a file that was renamed to what is not read.
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
    let text = fs::read_to_string(&path).map_err(|error| fault(&error))?;
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

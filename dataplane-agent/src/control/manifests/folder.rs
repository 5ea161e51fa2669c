//! The folder: every file's last good state, and the objects that they make together.
//!
//! At the start a bad file is an error. Later it is not: whatever cannot be read, or not yet, leaves
//! what the file said before. A file that is being written cannot be told from a finished one by its
//! text alone, since half of a policy may well be a policy; so a change, and a file's absence too,
//! counts only once it has not changed for [`SETTLE`].

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use time::OffsetDateTime;

use super::object::{self, Age, Item, Key, Objects, Parsed};
use super::{ManifestError, Watch};

/// How long a file must have been left alone before it is read again.
pub const SETTLE: Duration = Duration::from_millis(300);
/// How often files are looked at that have not settled yet.
const RETRY: Duration = Duration::from_millis(100);
/// Deeper folders are not looked into: a loop of mounts ends here.
const DEPTH: usize = 8;
/// A larger file is a mistake.
const MAX_SIZE: u64 = 64 << 20;

/// A folder of manifests.
#[derive(Debug)]
pub struct Folder {
    dir: PathBuf,
    settle: Duration,
    files: BTreeMap<PathBuf, File>,
    /// When each object without a creation timestamp was first seen.
    seen: BTreeMap<(&'static str, Key), Age>,
    next: u64,
    objects: Objects,
    told: Vec<ManifestError>,
    settling: bool,
}

/// What reading again brought.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reload {
    /// Whether the objects are others than before.
    pub changed: bool,
    /// Every file that is not what its last good state says, and why.
    pub problems: Vec<ManifestError>,
    /// Whether something changed that is not taken yet; look again soon.
    pub settling: bool,
}

#[derive(Debug, Default)]
struct File {
    /// What holds.
    good: Parsed,
    /// What the file says now, if it can be read.
    latest: Option<Result<Parsed, ManifestError>>,
    /// What `latest` was read from; none for a file that was not read yet.
    stamp: Option<Stamp>,
    /// What it looks like now, and since when.
    looks: Option<(Option<Stamp>, Instant)>,
}

/// Changes whenever the file does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    inode: u64,
    size: u64,
    modified: Option<SystemTime>,
    changed: (i64, i64),
}

impl From<&Metadata> for Stamp {
    fn from(of: &Metadata) -> Self {
        Self {
            inode: of.ino(),
            size: of.len(),
            modified: of.modified().ok(),
            changed: (of.ctime(), of.ctime_nsec()),
        }
    }
}

impl Folder {
    /// Reads a folder for the first time.
    ///
    /// # Errors
    /// The folder or a file cannot be read; a file is not right; an object is in two files.
    pub fn open(dir: &Path) -> Result<Self, ManifestError> {
        Self::open_settling(dir, SETTLE)
    }

    pub(crate) fn open_settling(dir: &Path, settle: Duration) -> Result<Self, ManifestError> {
        let mut folder = Self {
            dir: dir.to_owned(),
            settle,
            files: BTreeMap::new(),
            seen: BTreeMap::new(),
            next: 0,
            objects: Objects::default(),
            told: Vec::new(),
            settling: false,
        };
        let found = scan(dir).map_err(|error| ManifestError::of_file(dir, error))?;
        for (name, stamp) in found {
            let mut file = File {
                stamp: Some(stamp),
                ..File::default()
            };
            // An empty file has nothing to lose yet.
            file.good = read(dir, &name)?.unwrap_or_default();
            file.latest = Some(Ok(file.good.clone()));
            folder.files.insert(name, file);
        }
        if let Some((_, error)) = conflicts(&folder.files, |file| &file.good)
            .into_iter()
            .next()
        {
            return Err(error);
        }
        folder.rebuild();
        Ok(folder)
    }

    /// The objects that hold now.
    pub fn objects(&self) -> &Objects {
        &self.objects
    }

    /// Reads again what changed.
    pub fn reload(&mut self) -> Reload {
        self.settling = false;
        let mut problems = Vec::new();
        match scan(&self.dir) {
            Ok(found) => self.look(&found),
            // The folder is away: that is no word about what is in it.
            Err(error) => problems.push(ManifestError::of_file(&self.dir, error)),
        }
        problems.extend(self.accept());
        let changed = self.rebuild();
        self.told.clone_from(&problems);
        Reload {
            changed,
            problems,
            settling: self.settling,
        }
    }

    /// Waits until reading again brings something new: other objects, or other problems.
    pub async fn next(&mut self, watch: &mut Watch) -> Reload {
        loop {
            if self.settling {
                tokio::time::sleep(RETRY.min(self.settle)).await;
            } else {
                watch.changed().await;
            }
            let told = self.told.clone();
            let reload = self.reload();
            if reload.changed || reload.problems != told {
                return reload;
            }
        }
    }

    /// Compares what is there with what was read, and reads what has settled.
    fn look(&mut self, found: &BTreeMap<PathBuf, Stamp>) {
        let now = Instant::now();
        for name in found.keys() {
            self.files.entry(name.clone()).or_default();
        }
        let mut gone = Vec::new();
        for (name, file) in &mut self.files {
            let stamp = found.get(name).copied();
            if stamp.is_some() && stamp == file.stamp {
                file.looks = None;
                continue;
            }
            let since = match file.looks {
                Some((looks, since)) if looks == stamp => since,
                _ => now,
            };
            file.looks = Some((stamp, since));
            let left_alone = stamp
                .and_then(|stamp| stamp.modified?.elapsed().ok())
                .is_some_and(|age| age >= self.settle);
            if now.duration_since(since) < self.settle && !left_alone {
                self.settling = true;
                continue;
            }
            let Some(stamp) = stamp else {
                gone.push(name.clone());
                continue;
            };
            let latest = match read(&self.dir, name) {
                Ok(Some(parsed)) => Ok(parsed),
                Ok(None) => Err(ManifestError::of_file(
                    name,
                    "is empty; delete it to remove its objects",
                )),
                Err(error) => Err(error),
            };
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
                file.looks = None;
            }
            file.latest = Some(latest);
        }
        for name in gone {
            self.files.remove(&name);
        }
    }

    /// Makes what is right the state that holds, and says of the rest why it is not.
    ///
    /// An object that would be there twice is nobody's fault alone (it may be on its way from one
    /// file to another): of the files that have it, those that changed stay as they were.
    fn accept(&mut self) -> Vec<ManifestError> {
        let mut held: BTreeMap<PathBuf, ManifestError> = BTreeMap::new();
        for (name, file) in &self.files {
            if let Some(Err(error)) = &file.latest {
                held.insert(name.clone(), error.clone());
            }
        }
        loop {
            let candidates: BTreeMap<&PathBuf, &Parsed> = self
                .files
                .iter()
                .map(|(name, file)| match &file.latest {
                    Some(Ok(latest)) if !held.contains_key(name) => (name, latest),
                    _ => (name, &file.good),
                })
                .collect();
            let more: Vec<(PathBuf, ManifestError)> = clashes(&candidates)
                .into_iter()
                .filter(|(name, _)| !held.contains_key(name))
                .filter(|(name, _)| {
                    let file = self.files.get(name);
                    file.is_some_and(|file| file.latest != Some(Ok(file.good.clone())))
                })
                .collect();
            if more.is_empty() {
                break;
            }
            held.extend(more);
        }
        for (name, file) in &mut self.files {
            if let (false, Some(Ok(latest))) = (held.contains_key(name), &file.latest) {
                file.good.clone_from(latest);
            }
        }
        held.into_values().collect()
    }

    /// Puts the objects together; true if they are others than before.
    fn rebuild(&mut self) -> bool {
        let mut objects = Objects::default();
        let mut present = BTreeSet::new();
        let now = OffsetDateTime::now_utc();
        for parsed in self.files.values().map(|file| &file.good) {
            objects.warnings.extend(parsed.warnings.iter().cloned());
            for item in &parsed.items {
                let identity = item.identity();
                let age = match item.meta.created {
                    Some(created) => Age::new(created, 0),
                    None => *self.seen.entry(identity.clone()).or_insert_with(|| {
                        self.next += 1;
                        Age::new(now, self.next)
                    }),
                };
                present.insert(identity);
                objects.insert(item.clone(), age);
            }
        }
        self.seen.retain(|identity, _| present.contains(identity));
        let changed = objects != self.objects;
        self.objects = objects;
        changed
    }
}

fn conflicts<'a>(
    files: &'a BTreeMap<PathBuf, File>,
    of: impl Fn(&'a File) -> &'a Parsed,
) -> Vec<(PathBuf, ManifestError)> {
    clashes(&files.iter().map(|(name, file)| (name, of(file))).collect())
}

/// The files that have an object of another one; each error names both.
fn clashes(files: &BTreeMap<&PathBuf, &Parsed>) -> Vec<(PathBuf, ManifestError)> {
    let mut first: BTreeMap<(&'static str, Key), (&PathBuf, &Item)> = BTreeMap::new();
    let mut found = Vec::new();
    for (&name, parsed) in files {
        for item in &parsed.items {
            let identity = item.identity();
            let Some(&(other, theirs)) = first.get(&identity) else {
                first.insert(identity, (name, item));
                continue;
            };
            let (kind, key) = identity;
            let error = |file: &PathBuf, line: u64, other: &PathBuf, at: u64| ManifestError {
                line: Some(line),
                ..ManifestError::of_file(
                    file,
                    format_args!("{kind} {key} is also in {}:{at}", other.display()),
                )
            };
            found.push((name.clone(), error(name, item.line, other, theirs.line)));
            found.push((other.clone(), error(other, theirs.line, name, item.line)));
        }
    }
    found
}

/// None for a file with nothing in it.
fn read(dir: &Path, name: &Path) -> Result<Option<Parsed>, ManifestError> {
    let fault = |what: &dyn std::fmt::Display| ManifestError::of_file(name, what);
    let path = dir.join(name);
    let size = fs::metadata(&path).map_err(|error| fault(&error))?.len();
    if size > MAX_SIZE {
        return Err(fault(&format_args!(
            "has {size} bytes, more than {MAX_SIZE}"
        )));
    }
    let text = fs::read_to_string(&path).map_err(|error| fault(&error))?;
    if text.trim().is_empty() {
        return Ok(None);
    }
    object::parse(name, &text).map(Some)
}

/// The manifests below `dir`. What begins with a dot is not one; neither are a mounted ConfigMap's
/// `..data` folders, whose files are there as links.
fn scan(dir: &Path) -> io::Result<BTreeMap<PathBuf, Stamp>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![(PathBuf::new(), 0)];
    while let Some((below, depth)) = folders.pop() {
        for entry in fs::read_dir(dir.join(&below))? {
            let entry = entry?;
            let name = below.join(entry.file_name());
            if entry.file_name().as_encoded_bytes().starts_with(b".") {
                continue;
            }
            if entry.file_type()?.is_dir() {
                if depth < DEPTH {
                    folders.push((name, depth + 1));
                }
                continue;
            }
            let known = ["yaml", "yml", "json"];
            if !name
                .extension()
                .is_some_and(|ending| known.iter().any(|known| ending == *known))
            {
                continue;
            }
            match fs::metadata(dir.join(&name)) {
                Ok(metadata) if metadata.is_file() => {
                    found.insert(name, Stamp::from(&metadata));
                }
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(found)
}

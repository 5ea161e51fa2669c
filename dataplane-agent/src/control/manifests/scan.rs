//! Lists the manifests in a folder, by names and metadata alone.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, DirEntry, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::ManifestError;

/// Depth below which folders are not read: this ends a loop of mounts.
const DEPTH: usize = 8;

/// The entries found. Paths are relative to the folder, whose own path is empty.
#[derive(Debug, Default)]
pub(super) struct Scan {
    pub(super) files: BTreeMap<PathBuf, Stamp>,
    /// `true` if a file is a link: what it leads to changes without a word.
    links: bool,
    /// Folders that were read.
    folders: BTreeSet<PathBuf>,
    /// Folders without any entry.
    pub(super) empty: Vec<PathBuf>,
    /// Paths that could not be inspected. Nothing is known of them, nor of anything below them.
    pub(super) faults: Vec<(PathBuf, ManifestError)>,
    /// Entries that are passed over, and why.
    pub(super) notes: Vec<String>,
    /// Files with an ending that is not read, by inode.
    unread: BTreeMap<u64, PathBuf>,
}

impl Scan {
    pub(super) fn cannot_tell(&self, name: &Path) -> bool {
        self.faults.iter().any(|(path, _)| name.starts_with(path))
    }

    /// Looks again at files of these names, of which nothing but the content is expected to differ. Returns whether
    /// any has changed; `None`, and does nothing, if only a whole scan can tell what is there.
    pub(super) fn look_again<'a>(
        &mut self,
        dir: &Path,
        names: impl IntoIterator<Item = &'a PathBuf>,
    ) -> Option<bool> {
        if self.links || !self.faults.is_empty() {
            return None;
        }
        let mut changed = Vec::new();
        for name in names {
            let before = self.files.get(name)?;
            let metadata = fs::symlink_metadata(dir.join(name)).ok();
            let stamp = Stamp::from(&metadata.filter(Metadata::is_file)?);
            if stamp != *before {
                changed.push((name.clone(), stamp));
            }
        }
        let is_any = !changed.is_empty();
        self.files.extend(changed);
        Some(is_any)
    }

    /// Returns the new path of a file that was renamed to an ending that is not read.
    pub(super) fn renamed(&self, stamp: Stamp) -> Option<&Path> {
        self.unread.get(&stamp.inode).map(PathBuf::as_path)
    }

    /// Returns the uppermost folder above `name` that exists and has no manifest in it.
    pub(super) fn emptied<'a>(&self, name: &'a Path) -> Option<&'a Path> {
        let has_none = |folder: &&Path| !self.files.keys().any(|file| file.starts_with(folder));
        let above = name.ancestors().skip(1);
        above
            .filter(|folder| self.folders.contains(*folder))
            .filter(has_none)
            .last()
    }
}

/// Returns the path of a folder below `dir`; for an empty `below`, `dir` as it was given.
pub(super) fn at(dir: &Path, below: &Path) -> PathBuf {
    match below.as_os_str().is_empty() {
        true => dir.to_owned(),
        false => dir.join(below),
    }
}

const ENDINGS: [&str; 3] = ["yaml", "yml", "json"];

/// Returns `true` if a file of this name is read.
pub(super) fn is_manifest(name: &Path) -> bool {
    let ending = name.extension().and_then(|ending| ending.to_str());
    ending.is_some_and(|ending| ENDINGS.contains(&ending))
}

/// Returns `true` if this name, which is relative to the folder, is left out.
pub(super) fn is_hidden(name: &Path) -> bool {
    let mut parts = name.iter();
    parts.any(|part| part.as_encoded_bytes().starts_with(b"."))
}

/// Lists the manifests below `dir`. `was_read`: returns `true` if a file of this name was read before. Names that
/// begin with a dot are left out, and with them a mounted ConfigMap's `..data` folders: their files are also there
/// as links.
pub(super) fn scan(dir: &Path, was_read: &dyn Fn(&Path) -> bool) -> Scan {
    let mut found = Scan::default();
    let mut folders = vec![(PathBuf::new(), 0)];
    while let Some((below, depth)) = folders.pop() {
        let listed =
            fs::read_dir(dir.join(&below)).and_then(Iterator::collect::<io::Result<Vec<_>>>);
        match listed {
            Ok(entries) => {
                found.folders.insert(below.clone());
                if entries.is_empty() {
                    found.empty.push(at(dir, &below));
                }
                for entry in entries {
                    let name = below.join(entry.file_name());
                    if !is_hidden(Path::new(&entry.file_name()))
                        && let Err(error) =
                            found.entry((&entry, &name), was_read, (depth, &mut folders))
                    {
                        let told = ManifestError::of_file(&name, error);
                        found.faults.push((name, told));
                    }
                }
            }
            // The folder was removed during the scan.
            Err(error) if error.kind() == io::ErrorKind::NotFound && depth > 0 => {}
            Err(error) => {
                let told = ManifestError::of_file(at(dir, &below), error);
                found.faults.push((below, told));
            }
        }
    }
    found.notes.sort();
    found.faults.sort_by(|(one, _), (other, _)| one.cmp(other));
    found
}

impl Scan {
    fn entry(
        &mut self,
        (entry, name): (&DirEntry, &Path),
        was_read: &dyn Fn(&Path) -> bool,
        (depth, folders): (usize, &mut Vec<(PathBuf, usize)>),
    ) -> io::Result<()> {
        // What a link is, not what it leads to.
        let own = match entry.metadata() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            own => own?,
        };
        // If a file with this name was read before, this does not count as its removal.
        let mut note = |why: &str| match was_read(name) {
            true => Err(io::Error::other(format!(
                "{why} now; to remove what it said as a file, delete it first"
            ))),
            false => {
                let name = name.display();
                self.notes.push(format!("{name}: {why}, passed over"));
                Ok(())
            }
        };
        if own.is_dir() {
            return match depth < DEPTH {
                _ if was_read(name) => note("is a folder"),
                true => {
                    folders.push((name.to_owned(), depth + 1));
                    Ok(())
                }
                false => note("is more than 8 folders deep"),
            };
        }
        let ending = name.extension().and_then(|ending| ending.to_str());
        let ending = ending.unwrap_or_default();
        if !ENDINGS.contains(&ending) {
            self.unread.insert(own.ino(), name.to_owned());
            return if ENDINGS.contains(&ending.to_ascii_lowercase().as_str()) {
                note("has an ending that is not in lower case")
            } else if own.is_symlink() && fs::metadata(entry.path()).is_ok_and(|to| to.is_dir()) {
                note("is a link to a folder")
            } else {
                Ok(())
            };
        }
        self.links |= own.is_symlink();
        let metadata = match own.is_symlink() {
            false => own,
            // A link to nothing is an error, since its target may come back.
            true => fs::metadata(entry.path()).map_err(|error| match error.kind() {
                io::ErrorKind::NotFound => io::Error::other("is a link that leads nowhere"),
                _ => error,
            })?,
        };
        if metadata.is_file() {
            self.files.insert(name.to_owned(), Stamp::from(&metadata));
            Ok(())
        } else if metadata.is_dir() {
            note("is a link to a folder")
        } else {
            note("is no file")
        }
    }
}

/// Identity and version of a file: differs after each change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::control) struct Stamp {
    inode: u64,
    size: u64,
    pub(super) modified: Option<SystemTime>,
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

impl Stamp {
    /// Returns true if the file was last changed longer ago than `age`, by the clock of its file system.
    pub(in crate::control) fn is_older(&self, age: Duration, now: SystemTime) -> bool {
        let (seconds, nanos) = self.changed;
        let changed = u64::try_from(seconds).ok().zip(u32::try_from(nanos).ok());
        let changed = changed.map(|(seconds, nanos)| UNIX_EPOCH + Duration::new(seconds, nanos));
        let is_older = |at: SystemTime| now.duration_since(at).is_ok_and(|since| since > age);
        changed.is_some_and(is_older) && self.modified.is_some_and(is_older)
    }
}

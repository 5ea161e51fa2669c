//! The objects of all files of a folder. The cost of a change depends only on the content of the changed files.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use time::OffsetDateTime;

use super::ManifestError;
use super::changes::PolicyChange;
use super::object::{Identity, Item, Objects, Parsed};
use crate::mesh::service::Age;

/// The objects, and the file of each.
#[derive(Debug, Default)]
pub(super) struct Collection {
    objects: Objects,
    owners: HashMap<Identity, Owner>,
    /// Number of objects without a creation timestamp so far.
    undated: u64,
}

#[derive(Debug)]
struct Owner {
    file: Arc<Path>,
    line: u64,
    age: Age,
}

/// The old and the new content of a file.
#[derive(Debug)]
pub(super) struct Change {
    pub(super) file: Arc<Path>,
    pub(super) before: Arc<Parsed>,
    pub(super) now: Arc<Parsed>,
}

/// The objects and policies that have changed.
#[derive(Debug, Default)]
pub(super) struct Touched {
    pub(super) objects: Vec<Identity>,
    pub(super) policies: Vec<PolicyChange>,
}

impl Collection {
    pub(super) fn objects(&self) -> &Objects {
        &self.objects
    }

    /// Finds objects that would be in two files if `files` had this content and those of `gone` were removed.
    /// Returns an error for each of the two files, which names the other.
    pub(super) fn conflicts(
        &self,
        files: &BTreeMap<&PathBuf, &Parsed>,
        gone: &[Change],
    ) -> Vec<(PathBuf, ManifestError)> {
        let gone = gone.iter().map(|change| &*change.file);
        let others = files.keys().map(|name| name.as_path()).chain(gone);
        let others: HashSet<&Path> = others.collect();
        let mut first: HashMap<Identity, (&Path, u64)> = HashMap::new();
        let mut found = Vec::new();
        for (&file, parsed) in files {
            for item in &parsed.items {
                let identity = item.identity();
                let stays = |owner: &&Owner| !others.contains(&*owner.file);
                let owner = self.owners.get(&identity).filter(stays);
                let owner = owner.map(|owner| (&*owner.file, owner.line));
                let Some((other, line)) = first.get(&identity).copied().or(owner) else {
                    first.insert(identity, (file, item.line));
                    continue;
                };
                let (kind, key) = identity;
                let error = |of: &Path, at: u64, other: &Path, line: u64| {
                    let other = other.display();
                    let what = format_args!("{kind} {key} is also in {other}:{line}");
                    let error = ManifestError {
                        line: Some(at),
                        ..ManifestError::of_file(of, what)
                    };
                    (of.to_owned(), error)
                };
                found.push(error(file, item.line, other, line));
                found.push(error(other, line, file, item.line));
            }
        }
        found
    }

    /// Replaces the old content of files by the new one. No object may be in two files.
    pub(super) fn take(&mut self, changes: &[Change]) -> Touched {
        let now = OffsetDateTime::now_utc();
        let mut removed: BTreeMap<Identity, (&Item, Age)> = BTreeMap::new();
        for item in changes.iter().flat_map(|change| &change.before.items) {
            let identity = item.identity();
            if let Some(owner) = self.owners.remove(&identity) {
                removed.insert(identity, (item, owner.age));
            }
        }
        let mut touched = Touched::default();
        for Change {
            file, now: says, ..
        } in changes
        {
            for item in &says.items {
                let identity = item.identity();
                let before = removed.remove(&identity);
                let age = match (item.meta.created, before) {
                    (Some(created), _) => Age::new(created, 0),
                    // Its age counts from when it was first seen.
                    (None, Some((before, age))) if before.meta.created.is_none() => age,
                    (None, _) => {
                        self.undated += 1;
                        Age::new(now, self.undated)
                    }
                };
                let owner = Owner {
                    file: Arc::clone(file),
                    line: item.line,
                    age,
                };
                self.owners.insert(identity.clone(), owner);
                let is = |(old, old_age): (&Item, Age)| old.says(item) && old_age == age;
                if before.is_some_and(is) {
                    continue;
                }
                let change = PolicyChange::of(before.map(|(before, _)| before), Some(item));
                touched.policies.extend(change);
                touched.objects.push(identity);
                self.objects.insert(item.clone(), age);
            }
        }
        for (identity, (item, _)) in removed {
            touched.policies.extend(PolicyChange::of(Some(item), None));
            self.objects.remove(item);
            touched.objects.push(identity);
        }
        touched.policies.sort();
        touched
    }

    /// Sets the warnings. Returns `true` if they have changed.
    pub(super) fn warn(&mut self, warnings: Vec<String>) -> bool {
        let changed = self.objects.warnings != warnings;
        self.objects.warnings = warnings;
        changed
    }
}

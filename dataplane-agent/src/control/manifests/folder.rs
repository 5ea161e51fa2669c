//! The manifest folder: the last accepted state of every file, and the objects that the files make together.
//!
//! At the start a bad file is an error. Later it is not: a file that cannot be read, or not yet, keeps the
//! objects that it had. Files are read again on a thread of its own, since their disk may not answer: what they
//! said last holds meanwhile.
//!
//! A file that is gone was removed. A folder that is there and has no manifests any more was more likely
//! unmounted, or is being filled, so its objects stay until the user confirms their removal: by removing the
//! folder, or by putting any manifest into it, if only an empty List.

use std::future::pending;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::changes::PolicyChange;
use super::collection::Collection;
use super::files::{FolderFiles, Look, SETTLE};
use super::object::{Identity, Objects};
use super::watch::Reported;
use super::{ManifestError, ManifestErrors, Watch};
use crate::control::disk::DiskTask;

/// Time without a change since the start after which a folder, or the file of LOCAL_XDS, counts as complete.
pub(in crate::control) const COMPLETE_AFTER: Duration = Duration::from_secs(5);
/// Interval at which files that have not settled are checked.
const RETRY: Duration = Duration::from_millis(100);

/// A folder of manifests.
#[derive(Debug)]
pub struct ManifestFolder {
    dir: PathBuf,
    settle: Duration,
    /// `None` while a look uses them.
    files: Option<FolderFiles>,
    /// The look that is running.
    look: Option<DiskTask<(FolderFiles, Look)>>,
    objects: Collection,
    /// Objects that have changed since the last call of [`ManifestFolder::touched`].
    touched: Vec<Identity>,
    reported: Vec<ManifestError>,
    settling: bool,
    /// Time of the next check of unsettled files. It is kept here because [`ManifestFolder::next`] may be
    /// cancelled.
    retry_at: Option<tokio::time::Instant>,
    /// Time since which the files have been the same.
    same_since: Instant,
    is_empty: bool,
    /// An empty folder, if there is one.
    empty: Option<PathBuf>,
}

/// The outcome of a look at the files.
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

impl ManifestFolder {
    /// Reads a folder for the first time. Takes as long as the disk does.
    ///
    /// # Errors
    /// Lists everything that is wrong: the folder or a file cannot be read, a file is not valid, or an object
    /// is in two files.
    pub fn open(dir: &Path) -> Result<Self, ManifestErrors> {
        Self::open_settling(dir, SETTLE)
    }

    pub(crate) fn open_settling(dir: &Path, settle: Duration) -> Result<Self, ManifestErrors> {
        let (mut files, mut look) = FolderFiles::open(dir, settle);
        let mut objects = Collection::default();
        // Of two files with the same object, the error names the later one.
        let twice = files.conflicts(&objects).into_iter().step_by(2);
        look.problems.extend(twice.map(|(_, error)| error));
        if !look.problems.is_empty() {
            return Err(ManifestErrors(look.problems));
        }
        let mut taken = Vec::new();
        files.accept_valid(&objects, &mut taken);
        let touched = objects.take(&taken).objects;
        objects.warn(look.notes.iter().chain(files.warnings()).cloned().collect());
        Ok(Self {
            dir: dir.to_owned(),
            settle,
            is_empty: files.is_empty(),
            files: Some(files),
            look: None,
            objects,
            touched,
            reported: Vec::new(),
            settling: false,
            retry_at: None,
            same_since: look.same_since,
            empty: look.empty,
        })
    }

    /// Returns true if the folder has no manifests.
    pub fn is_empty(&self) -> bool {
        self.is_empty
    }

    /// Returns why more manifests may still appear. Until then the absence of an object means nothing.
    pub fn is_partial(&self) -> Option<String> {
        if let Some(empty) = &self.empty {
            let empty = empty.display();
            return Some(format!("{empty} is empty, as if it were not mounted"));
        }
        let still = self.same_since.elapsed() >= COMPLETE_AFTER && self.reported.is_empty();
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

    /// Waits until the files have different objects or different problems. Cancelling the wait loses nothing.
    pub async fn next(&mut self, watch: &mut Watch) -> Reload {
        loop {
            if self.look.is_none() {
                self.due(watch).await;
                self.start_look(watch.reported());
            }
            let look = self.looked().await;
            let told = self.reported.clone();
            let reload = self.accept(look);
            if reload.changed || reload.problems != told {
                return reload;
            }
        }
    }

    /// Returns a problem if the disk has not answered for some time.
    pub fn problem(&self) -> Option<String> {
        self.look.as_ref()?.problem()
    }

    /// Returns what holds instead of a file or folder with a problem.
    pub fn in_effect(&self, problem: &ManifestError) -> &'static str {
        let files = self.files.as_ref();
        match files.is_none_or(|files| files.is_in_effect(&problem.file)) {
            true => "what it said before holds",
            false => "nothing of it is applied",
        }
    }

    /// Waits until it is time to look at the files.
    async fn due(&mut self, watch: &mut Watch) {
        if !self.settling {
            return watch.changed().await;
        }
        let soon = tokio::time::Instant::now() + RETRY.min(self.settle);
        tokio::time::sleep_until(*self.retry_at.get_or_insert(soon)).await;
        self.retry_at = None;
    }

    fn start_look(&mut self, reported: Reported) {
        if let Some(mut files) = self.files.take() {
            self.look = Some(DiskTask::start(&self.dir, move || {
                let look = files.look(reported);
                (files, look)
            }));
        }
    }

    /// Waits until the running look ends.
    async fn looked(&mut self) -> Look {
        let Some(running) = &mut self.look else {
            return pending().await;
        };
        let (files, look) = running.done().await;
        (self.files, self.look) = (Some(files), None);
        look
    }

    /// Puts valid content into effect.
    fn accept(&mut self, look: Look) -> Reload {
        let (mut problems, mut changes) = (look.problems, look.gone);
        let mut warnings = look.notes;
        if let Some(files) = &mut self.files {
            problems.extend(files.accept_valid(&self.objects, &mut changes));
            warnings.extend(files.warnings().cloned());
            self.is_empty = files.is_empty();
        }
        let touched = self.objects.take(&changes);
        let changed = !touched.objects.is_empty() | self.objects.warn(warnings);
        self.touched.extend(touched.objects);
        self.reported.clone_from(&problems);
        (self.settling, self.same_since) = (look.settling, look.same_since);
        self.empty = look.empty;
        Reload {
            changed,
            problems,
            renamed: look.renamed,
            policies: touched.policies,
            settling: self.settling,
        }
    }
}

#[cfg(test)]
impl ManifestFolder {
    /// Looks at the files, and takes the result.
    pub(crate) fn reload(&mut self) -> Reload {
        self.reload_reported(Reported::Anything)
    }

    /// The same, as if this had been reported.
    pub(super) fn reload_reported(&mut self, reported: Reported) -> Reload {
        let files = self.files.as_mut().expect("nobody looks");
        let look = files.look(reported);
        self.accept(look)
    }
}

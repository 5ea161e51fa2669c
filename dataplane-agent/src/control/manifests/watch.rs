//! Decides when to read a folder again: shortly after the kernel reports a change in it, and every few seconds
//! in any case. For not every file system reports, changes behind a link are not reported, and after a folder
//! was replaced the reports are still about the old one.
//!
//! Which folder is at the path now is asked on a thread of its own: its disk may not answer.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use notify::event::{AccessKind, AccessMode};
use notify::{EventKind, RecursiveMode, Watcher};
use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};
use tracing::warn;

use super::scan::{is_hidden, is_manifest};
use crate::control::disk::DiskTask;

/// Changes within this time count as one.
const DEBOUNCE: Duration = Duration::from_millis(50);
/// Time between reads without a report.
pub(super) const RESYNC: Duration = Duration::from_secs(3);

/// Names that are kept of what was reported. With more it is not worth to look at each.
const MOST_FILES: usize = 4096;

/// What has changed in a folder, by the kernel's reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Reported {
    /// Nothing but files of these names, which are relative to the folder. Names that begin with a dot are left out.
    Files(BTreeSet<PathBuf>),
    /// Anything may have.
    Anything,
}

/// A watch on a folder and what is below it.
pub struct Watch {
    dir: PathBuf,
    told: Arc<Notify>,
    /// What was reported since [`Watch::reported`] was last asked.
    reported: Arc<Mutex<Reported>>,
    /// Time of the next read without a report. It is kept here so that a wait goes on after it was cancelled.
    next: Instant,
    /// `None` while `following` uses it.
    follower: Option<Follower>,
    following: Option<DiskTask<Follower>>,
}

/// Watches the folder that is at a path.
struct Follower {
    dir: PathBuf,
    told: Arc<Notify>,
    reported: Arc<Mutex<Reported>>,
    /// Reports changes until dropped, of the folder with this device and inode; `None` if the kernel has no
    /// watches left.
    watcher: Option<(Identity, notify::RecommendedWatcher)>,
    /// `true` if the failure was logged.
    warned: bool,
    /// Ending of files whose changes do not matter.
    unread: Option<&'static str>,
}

type Identity = (u64, u64);

impl Watch {
    /// Watches the folder at `dir`, also after it was replaced. If that is not possible, the regular read has to
    /// do.
    pub fn new(dir: &Path) -> Self {
        Self::of(dir, None)
    }

    /// Like [`Watch::new`], but ignores files with this ending.
    pub fn without(dir: &Path, ending: &'static str) -> Self {
        Self::of(dir, Some(ending))
    }

    fn of(dir: &Path, unread: Option<&'static str>) -> Self {
        let told = Arc::new(Notify::new());
        let reported = Arc::new(Mutex::new(Reported::Anything));
        let mut follower = Follower {
            dir: dir.to_owned(),
            told: Arc::clone(&told),
            reported: Arc::clone(&reported),
            watcher: None,
            warned: false,
            unread,
        };
        follower.follow();
        Self {
            dir: dir.to_owned(),
            told,
            reported,
            next: Instant::now() + RESYNC,
            follower: Some(follower),
            following: None,
        }
    }

    /// Waits until the folder should be read again, and as long as the disk does not answer. Cancelling it loses
    /// neither a report nor the time it has waited.
    pub async fn changed(&mut self) {
        if self.following.is_none() {
            self.due().await;
            self.next = Instant::now() + RESYNC;
        }
        if let Some(mut follower) = self.follower.take() {
            self.following = Some(DiskTask::start(&self.dir, move || {
                follower.follow();
                follower
            }));
        }
        // Before the folder is read: what changes in it meanwhile is reported.
        if let Some(following) = &mut self.following {
            self.follower = Some(following.done().await);
            self.following = None;
        }
    }

    /// Returns a problem if the folder's disk has not answered for some time.
    pub fn problem(&self) -> Option<String> {
        self.following.as_ref()?.problem()
    }

    /// Returns what was reported since the last call: anything, if nothing reports, or not for the folder that is
    /// there now, or if it is time for a read without a report.
    pub(super) fn reported(&self) -> Reported {
        let nothing = Reported::Files(BTreeSet::new());
        let reported = std::mem::replace(&mut *lock(&self.reported), nothing);
        let follows = |follower: &Follower| follower.watcher.is_some();
        match self.follower.as_ref().is_some_and(follows) {
            true => reported,
            false => Reported::Anything,
        }
    }

    /// Waits for a report, or for the time of a read without one.
    async fn due(&mut self) {
        struct Again<'a>(Option<&'a Notify>);
        impl Drop for Again<'_> {
            fn drop(&mut self) {
                if let Some(told) = self.0 {
                    told.notify_one();
                }
            }
        }
        if timeout_at(self.next, self.told.notified()).await.is_ok() {
            let mut cancelled = Again(Some(&self.told));
            tokio::time::sleep(DEBOUNCE).await;
            cancelled.0 = None;
        } else {
            *lock(&self.reported) = Reported::Anything;
        }
    }
}

impl Follower {
    /// Watches the folder that is at the path now, if it is another one.
    fn follow(&mut self) {
        let Ok(found) = fs::metadata(&self.dir) else {
            return; // it is away; who looks will say so
        };
        let identity = (found.dev(), found.ino());
        if self
            .watcher
            .as_ref()
            .is_some_and(|(known, _)| *known == identity)
        {
            return;
        }
        *lock(&self.reported) = Reported::Anything;
        let (teller, unread) = (Arc::clone(&self.told), self.unread);
        let (reported, dir) = (Arc::clone(&self.reported), self.dir.clone());
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            // Our own reading is reported too; it must not make us read again.
            if let Ok(event) = &event
                && (is_of_readers(event) || is_unread(event, unread))
            {
                return;
            }
            lock(&reported).add(event.ok().as_ref().and_then(|event| names(event, &dir)));
            teller.notify_one();
        })
        .and_then(|mut watcher| {
            watcher.watch(&self.dir, RecursiveMode::Recursive)?;
            Ok(watcher)
        });
        match watcher {
            Ok(watcher) => {
                self.watcher = Some((identity, watcher));
                self.warned = false;
            }
            Err(error) => {
                self.watcher = None;
                if !self.warned {
                    warn!(folder = %self.dir.display(), %error, "cannot watch, looking regularly");
                    self.warned = true;
                }
            }
        }
    }
}

impl Reported {
    /// Adds the names of one event, or that it may be about anything.
    fn add(&mut self, names: Option<Vec<&Path>>) {
        let Self::Files(files) = self else {
            return;
        };
        match names {
            Some(names) if files.len() < MOST_FILES => {
                files.extend(names.into_iter().map(Path::to_owned));
            }
            _ => *self = Self::Anything,
        }
    }
}

fn lock(reported: &Mutex<Reported>) -> std::sync::MutexGuard<'_, Reported> {
    reported.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns the names of the manifests that an event is about; `None` if it may be about more.
fn names<'a>(event: &'a notify::Event, dir: &Path) -> Option<Vec<&'a Path>> {
    if event.need_rescan() || event.paths.is_empty() {
        return None;
    }
    let mut names = Vec::new();
    for path in &event.paths {
        let name = path.strip_prefix(dir).ok()?;
        match is_hidden(name) {
            true => {}
            false if is_manifest(name) => names.push(name),
            false => return None,
        }
    }
    Some(names)
}

/// Returns `true` for events that readers cause. Closing a written file is not one.
fn is_of_readers(event: &notify::Event) -> bool {
    let closed = EventKind::Access(AccessKind::Close(AccessMode::Write));
    event.kind.is_access() && event.kind != closed
}

/// Returns `true` if all files of an event have this ending. An event without a path is about everything.
fn is_unread(event: &notify::Event, ending: Option<&str>) -> bool {
    let has_ending = |path: &PathBuf| {
        path.extension()
            .is_some_and(|of| Some(of) == ending.map(OsStr::new))
    };
    !event.paths.is_empty() && event.paths.iter().all(has_ending)
}

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watch").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn who_is_called_away_looks_regularly_all_the_same() {
        let dir = tempfile::tempdir().expect("a folder");
        let begin = Instant::now();
        let mut watch = Watch::new(dir.path());
        // A caller that looks at the machine in between cancels the wait. Counted, not timed: the machine may be busy.
        for _ in 0..60 {
            let looked = tokio::time::timeout(RESYNC / 6, watch.changed()).await;
            if looked.is_ok() {
                return assert!(begin.elapsed() >= RESYNC);
            }
        }
        panic!("it never looks");
    }

    #[tokio::test]
    async fn a_file_that_is_being_written_wakes_nobody_until_it_has_its_name() {
        let dir = tempfile::tempdir().expect("a folder");
        let watch = Watch::without(dir.path(), "new");
        let told = |long| tokio::time::timeout(long, watch.told.notified());
        let new = dir.path().join("record.new");
        for _ in 0..3 {
            fs::write(&new, "record").expect("a file");
            fs::remove_file(&new).expect("a file");
        }
        assert!(told(RESYNC / 6).await.is_err(), "nothing is there to read");
        fs::write(&new, "record").expect("a file");
        fs::rename(&new, dir.path().join("record.json")).expect("a file");
        assert!(told(RESYNC * 10).await.is_ok());
    }

    #[tokio::test]
    async fn a_folder_in_its_place_is_watched_in_its_place() {
        let dir = tempfile::tempdir().expect("a folder");
        let at = dir.path().join("manifests");
        fs::create_dir(&at).expect("a folder");
        let mut watch = Watch::new(&at);
        let watched = |watch: &Watch| {
            let follower = watch.follower.as_ref().expect("it rests");
            follower.watcher.as_ref().map(|(identity, _)| *identity)
        };
        let first = watched(&watch);
        fs::rename(&at, dir.path().join("old")).expect("a folder");
        fs::create_dir(&at).expect("a folder");
        watch.changed().await;
        let now = watched(&watch);
        assert!(now.is_some() && now != first);
    }

    #[tokio::test]
    async fn a_disk_that_does_not_answer_keeps_waiting_nobody_but_who_reads() {
        let dir = tempfile::tempdir().expect("a folder");
        let mut watch = Watch::new(dir.path());
        let (answer, waits) = std::sync::mpsc::channel();
        let follower = watch.follower.take().expect("it rests");
        watch.following = Some(DiskTask::start(dir.path(), move || {
            waits.recv().expect("an answer");
            follower
        }));
        for _ in 0..2 {
            let changed = tokio::time::timeout(DEBOUNCE, watch.changed());
            assert!(changed.await.is_err());
        }
        assert_eq!(watch.problem(), None);
        watch.following.as_ref().expect("it asks").make_slow();
        let told = watch.problem().expect("it is silent");
        assert!(
            told.contains("has not answered for longer than 5s"),
            "{told}"
        );
        answer.send(()).expect("it waits");
        watch.changed().await;
        assert!(watch.follower.is_some() && watch.problem().is_none());
    }

    #[tokio::test]
    async fn files_are_reported_by_name_and_what_may_be_more_as_anything() {
        let dir = tempfile::tempdir().expect("a folder");
        let below = dir.path().join("below");
        fs::create_dir(&below).expect("a folder");
        let mut watch = Watch::new(dir.path());
        assert_eq!(watch.reported(), Reported::Anything, "nothing is known yet");
        let mut comes = async |expected: Reported| {
            loop {
                watch.next = Instant::now() + RESYNC * 10;
                watch.changed().await;
                match watch.reported() {
                    reported if reported == expected => return,
                    // Of what came before, or of a name that is left out.
                    Reported::Files(_) => {}
                    Reported::Anything => panic!("anything, and not {expected:?}"),
                }
            }
        };
        let file = || Reported::Files([PathBuf::from("below/a.yaml")].into());
        fs::write(below.join("a.yaml"), "a").expect("a file");
        comes(file()).await;
        fs::write(below.join(".a.new"), "b").expect("a file");
        fs::rename(below.join(".a.new"), below.join("a.yaml")).expect("a file");
        comes(file()).await;
        fs::rename(below.join("a.yaml"), below.join("a.yaml.off")).expect("a file");
        comes(Reported::Anything).await;
        fs::rename(&below, dir.path().join("above")).expect("a folder");
        comes(Reported::Anything).await;
    }
}

//! Says when to look at the folder again: shortly after the kernel reports a change in it, and every
//! few seconds in any case, since not every file system reports, nothing reports what a link leads to,
//! and a folder that was replaced reports of the one that it was.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use notify::event::{AccessKind, AccessMode};
use notify::{EventKind, RecursiveMode, Watcher};
use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};
use tracing::warn;

/// What comes within this time of a change is one change.
const DEBOUNCE: Duration = Duration::from_millis(50);
/// How often to look without having been told.
const RESYNC: Duration = Duration::from_secs(3);

/// A watch on a folder and what is below it.
pub struct Watch {
    dir: PathBuf,
    told: Arc<Notify>,
    /// When to look without having been told. It is kept here: who waits may be called away, and comes
    /// back for the rest of the time.
    next: Instant,
    /// Reports as long as it lives, of the folder with this device and inode; none where the kernel has no
    /// more of them to give.
    watcher: Option<(Identity, notify::RecommendedWatcher)>,
    /// Whether it was said that there is none.
    warned: bool,
    /// What names of files end in that nobody reads.
    unread: Option<&'static str>,
}

type Identity = (u64, u64);

impl Watch {
    /// Watches what is at `dir`, also when it is another folder later. Where that is not possible the
    /// regular look has to do.
    pub fn new(dir: &Path) -> Self {
        Self::of(dir, None)
    }

    /// As [`Watch::new`]; files with this ending tell nothing.
    pub fn without(dir: &Path, ending: &'static str) -> Self {
        Self::of(dir, Some(ending))
    }

    fn of(dir: &Path, unread: Option<&'static str>) -> Self {
        let mut watch = Self {
            dir: dir.to_owned(),
            told: Arc::new(Notify::new()),
            next: Instant::now() + RESYNC,
            watcher: None,
            warned: false,
            unread,
        };
        watch.follow();
        watch
    }

    /// Waits until it is worth looking. Cancelling it loses nothing: neither what was told nor how long it
    /// has waited.
    pub async fn changed(&mut self) {
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
        }
        self.next = Instant::now() + RESYNC;
        self.follow();
    }

    /// Watches the folder that is there now, if it is another one.
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
        let (teller, unread) = (Arc::clone(&self.told), self.unread);
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            // Reading the folder is reported too, and would keep us reading.
            if !event.is_ok_and(|event| is_of_readers(&event) || is_unread(&event, unread)) {
                teller.notify_one();
            }
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

/// Whether an event is what whoever reads does. One who closes what it has written does not.
fn is_of_readers(event: &notify::Event) -> bool {
    let closed = EventKind::Access(AccessKind::Close(AccessMode::Write));
    event.kind.is_access() && event.kind != closed
}

/// Whether an event is of nothing but files with this ending. One without a path is of everything.
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
        // As whoever looks at the machine in between. Counted, not timed: the machine may be busy.
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
        let told = || tokio::time::timeout(RESYNC / 6, watch.told.notified());
        let new = dir.path().join("record.new");
        for _ in 0..3 {
            fs::write(&new, "record").expect("a file");
            fs::remove_file(&new).expect("a file");
        }
        assert!(told().await.is_err(), "nothing is there to read");
        fs::write(&new, "record").expect("a file");
        fs::rename(&new, dir.path().join("record.json")).expect("a file");
        assert!(told().await.is_ok());
    }

    #[tokio::test]
    async fn a_folder_in_its_place_is_watched_in_its_place() {
        let dir = tempfile::tempdir().expect("a folder");
        let at = dir.path().join("manifests");
        fs::create_dir(&at).expect("a folder");
        let mut watch = Watch::new(&at);
        let first = watch.watcher.as_ref().map(|(identity, _)| *identity);
        fs::rename(&at, dir.path().join("old")).expect("a folder");
        fs::create_dir(&at).expect("a folder");
        watch.changed().await;
        let now = watch.watcher.as_ref().map(|(identity, _)| *identity);
        assert!(now.is_some() && now != first);
    }
}

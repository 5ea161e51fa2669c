//! Reports that a new look may find something else: cgroups that are made, filled, emptied or removed below
//! the pods' cgroup, and mounts and unmounts, such as those of named network namespaces.
//!
//! Not all changes are reported: that a process moves between two cgroups that both have processes, or into
//! another namespace, is no event. So callers also look now and then without one.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent, WatchDescriptor};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::cgroups;
use crate::sys::async_fd;

/// Most watches that the kernel is asked for.
const MAX_WATCHES: usize = 32_768;
/// The kernel's limit per user. We take half of it at most: the rest is for the machine's own services.
const USER_WATCH_LIMIT: &str = "/proc/sys/fs/inotify/max_user_watches";
/// Time until the next attempt to set up watches after the kernel has refused them.
const RETRY: Duration = Duration::from_secs(30);

/// The source of events of this machine.
#[derive(Debug)]
pub(super) struct MachineEvents {
    /// The cgroup below which all pods are.
    pods: PathBuf,
    /// `None` if cgroups cannot be watched.
    cgroups: Option<CgroupWatches>,
    /// The time of the next attempt to watch them, if the last one failed.
    retry_at: Option<Instant>,
    mounts: MountWatch,
}

/// The watch on this machine's mounts.
#[derive(Debug)]
struct MountWatch {
    /// `/proc/self/mountinfo`; the kernel signals changes of it as urgent data:
    /// <https://man7.org/linux/man-pages/man5/proc_pid_mounts.5.html>.
    path: PathBuf,
    /// `None` if it cannot be watched.
    file: Option<AsyncFd<OwnedFd>>,
    /// True if it has been told that it cannot.
    told: bool,
}

impl MachineEvents {
    /// Creates the source for cgroups below `pods`.
    pub(super) fn new(pods: &Path) -> Self {
        Self {
            pods: pods.to_owned(),
            cgroups: None,
            retry_at: None,
            mounts: MountWatch {
                path: "/proc/self/mountinfo".into(),
                file: None,
                told: false,
            },
        }
    }

    /// Sets up the watches that there are not; returns `true` if there are all. Changes from before are not reported:
    /// callers look after this call.
    pub(super) fn ensure_watching(&mut self, now: Instant) -> bool {
        let is_watching_mounts = self.mounts.ensure();
        self.ensure_watching_cgroups(now) && is_watching_mounts
    }

    fn ensure_watching_cgroups(&mut self, now: Instant) -> bool {
        if self.cgroups.is_none() && self.retry_at.is_none_or(|retry_at| now >= retry_at) {
            match CgroupWatches::watch(&self.pods) {
                Ok(cgroups) => {
                    if self.retry_at.is_some() {
                        tracing::info!("the kernel tells of changes of cgroups again");
                    }
                    (self.cgroups, self.retry_at) = (Some(cgroups), None);
                }
                Err(error) => {
                    if self.retry_at.is_none() {
                        tracing::warn!(
                            %error,
                            cgroup = %self.pods.display(),
                            "cannot be told of changes of cgroups (fs.inotify.max_user_watches, max_user_instances); looking each second"
                        );
                    }
                    // A cgroup that is made again is watched from the next look on.
                    let is_missing = error.kind() == io::ErrorKind::NotFound;
                    self.retry_at = Some(if is_missing { now } else { now + RETRY });
                }
            }
        }
        self.cgroups.is_some()
    }

    /// Waits for an event, and returns what it concerns. Cancelling it loses nothing.
    pub(super) async fn happened(&mut self) -> &'static str {
        let of_cgroups = of_cgroups(self.cgroups.as_mut());
        let happened = tokio::select! {
            happened = of_cgroups => happened,
            () = self.mounts.happened() => return "mounts",
        };
        if happened.is_err() {
            // Events were lost. A look follows, before which the watches are set up again.
            self.cgroups = None;
        }
        "cgroups"
    }
}

async fn of_cgroups(cgroups: Option<&mut CgroupWatches>) -> io::Result<()> {
    match cgroups {
        Some(cgroups) => cgroups.happened().await,
        None => std::future::pending().await,
    }
}

impl MountWatch {
    /// Sets up the watch if there is none; returns `true` if there is one.
    fn ensure(&mut self) -> bool {
        if self.file.is_some() {
            return true;
        }
        let file = File::open(&self.path);
        match file.and_then(|file| async_fd::urgent(file.into())) {
            Ok(file) => {
                self.file = Some(file);
                if std::mem::take(&mut self.told) {
                    tracing::info!("the kernel tells of mounts again");
                }
            }
            Err(error) => {
                if !std::mem::replace(&mut self.told, true) {
                    let path = self.path.display();
                    tracing::warn!(%path, %error, "cannot be told of mounts; looking each second");
                }
            }
        }
        self.file.is_some()
    }

    /// Waits for a change of the mounts. When the watch has failed it is gone.
    async fn happened(&mut self) {
        let Some(file) = &self.file else {
            return std::future::pending().await;
        };
        match file.ready(Interest::PRIORITY).await {
            Ok(mut readiness) => readiness.clear_ready(),
            Err(_) => self.file = None,
        }
    }
}

/// Watches on the cgroups below one.
///
/// The kernel keeps the watch of a cgroup that is removed, and the cgroup with it. So we remove the watch, on
/// an event of the parent cgroup.
#[derive(Debug)]
struct CgroupWatches {
    /// The cgroup below which all pods are.
    pods: PathBuf,
    inotify: Inotify,
    /// A copy of the same descriptor, on which the runtime waits.
    readable: AsyncFd<OwnedFd>,
    /// Most watches that there may be.
    most: usize,
    /// Watches by the cgroup's folder. One is on its `cgroup.events`, which is modified when the first process
    /// comes to it or below, and when the last is gone; the root has no such file:
    /// <https://www.kernel.org/doc/html/v6.1/admin-guide/cgroup-v2.html#un-populated-notification>.
    /// Another is on the folder, for its child cgroups; not if it is a pod's or a container's by its name, for what
    /// is below such a one is its own matter, and may be much.
    watches: BTreeMap<PathBuf, Vec<WatchDescriptor>>,
    /// The folder that a watch is on.
    folders: HashMap<WatchDescriptor, PathBuf>,
    /// The watch on the parent folder of `pods`, which reports that `pods` itself is removed.
    parent: Option<WatchDescriptor>,
}

impl CgroupWatches {
    fn watch(pods: &Path) -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        let limit = fs::read_to_string(USER_WATCH_LIMIT)?;
        let limit: usize = limit.trim().parse().map_err(io::Error::other)?;
        let mut cgroups = Self {
            pods: pods.to_owned(),
            readable: async_fd::readable(inotify.as_fd().try_clone_to_owned()?)?,
            inotify,
            most: MAX_WATCHES.min(limit / 2),
            watches: BTreeMap::new(),
            folders: HashMap::new(),
            parent: None,
        };
        if let Some(parent) = pods.parent() {
            let removed = AddWatchFlags::IN_DELETE | AddWatchFlags::IN_ONLYDIR;
            cgroups.parent = Some(cgroups.inotify.add_watch(parent, removed)?);
        }
        cgroups.add(pods.to_owned())?;
        match cgroups.watches.is_empty() {
            true => Err(io::ErrorKind::NotFound.into()),
            false => Ok(cgroups),
        }
    }

    /// Waits for an event.
    ///
    /// # Errors
    /// Events were lost, the cgroup of all pods was removed, or a new cgroup cannot be watched.
    async fn happened(&mut self) -> io::Result<()> {
        loop {
            let mut readiness = self.readable.readable().await?;
            let events = match self.inotify.read_events() {
                Err(Errno::EAGAIN) => {
                    readiness.clear_ready();
                    continue;
                }
                events => events?,
            };
            for event in events {
                self.apply(&event)?;
            }
            return Ok(());
        }
    }

    fn apply(&mut self, event: &InotifyEvent) -> io::Result<()> {
        use AddWatchFlags as Is;
        let is = |what| event.mask.contains(what);
        if is(Is::IN_Q_OVERFLOW) || is(Is::IN_UNMOUNT) {
            return Err(io::Error::other("events were lost"));
        }
        if Some(event.wd) == self.parent {
            // Unless it is another folder. One of the same name that is made later is another cgroup.
            return match event.name.as_deref() == self.pods.file_name() {
                true => Err(io::Error::other("the cgroup was removed")),
                false => Ok(()),
            };
        }
        let folder = self.folders.get(&event.wd);
        let below = folder.zip(event.name.as_ref());
        match below.map(|(folder, name)| folder.join(name)) {
            Some(folder) if is(Is::IN_ISDIR | Is::IN_CREATE) => self.add(folder),
            Some(folder) if is(Is::IN_ISDIR | Is::IN_DELETE) => {
                self.remove(&folder);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Watches a cgroup and those below it. Each is watched before it is read, so that no later one is missed.
    fn add(&mut self, folder: PathBuf) -> io::Result<()> {
        let mut folders = vec![folder];
        while let Some(folder) = folders.pop() {
            match self.add_one(&folder, &mut folders) {
                // It is gone again; its parent's watch reports that.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {}
                Err(error) => {
                    let told = format!("{}: {error}", folder.display());
                    return Err(io::Error::other(told));
                }
                Ok(()) => {}
            }
        }
        Ok(())
    }

    fn add_one(&mut self, folder: &Path, others: &mut Vec<PathBuf>) -> io::Result<()> {
        if 2 * self.watches.len() >= self.most {
            return Err(io::Error::other(format!(
                "it would be more than {} watches",
                self.most
            )));
        }
        let below = AddWatchFlags::IN_CREATE | AddWatchFlags::IN_DELETE | AddWatchFlags::IN_ONLYDIR;
        let own = match cgroups::named(folder, &self.pods) {
            Some(_) => None,
            None => Some(self.inotify.add_watch(folder, below)?),
        };
        let events = folder.join("cgroup.events");
        let events = match self.inotify.add_watch(&events, AddWatchFlags::IN_MODIFY) {
            Err(Errno::ENOENT) => None,
            events => Some(events?),
        };
        let watches: Vec<WatchDescriptor> = [own, events].into_iter().flatten().collect();
        // If the cgroup was removed and made again, the watches are others.
        if self.watches.get(folder).is_some_and(|of| *of != watches) {
            self.remove(folder);
            return self.add_one(folder, others);
        }
        self.watches.insert(folder.to_owned(), watches);
        let Some(own) = own else {
            return Ok(());
        };
        self.folders.insert(own, folder.to_owned());
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                others.push(entry.path());
            }
        }
        Ok(())
    }

    /// Removes the watches of a cgroup and those below it.
    fn remove(&mut self, folder: &Path) {
        let from = self.watches.range(folder.to_owned()..);
        let of_it = from.take_while(|(at, _)| at.starts_with(folder));
        let folders: Vec<PathBuf> = of_it.map(|(at, _)| at.clone()).collect();
        let watches = folders.iter().filter_map(|at| self.watches.remove(at));
        for watch in watches.flatten() {
            self.folders.remove(&watch);
            // Fails if the kernel has removed the watch with the cgroup.
            let _ = self.inotify.rm_watch(watch);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Makes a folder that looks like a pod's cgroup.
    fn cgroup(at: &Path) {
        fs::create_dir(at).expect("a folder");
        fs::write(at.join("cgroup.events"), "populated 0\n").expect("a file");
        fs::write(at.join("cgroup.procs"), "").expect("a file");
    }

    async fn is_reported(events: &mut MachineEvents) -> bool {
        let told = events.happened();
        tokio::time::timeout(Duration::from_millis(500), told)
            .await
            .is_ok()
    }

    /// Takes all pending events.
    async fn settle(events: &mut MachineEvents) {
        while is_reported(events).await {}
    }

    fn watched(events: &MachineEvents) -> usize {
        let cgroups = events.cgroups.as_ref().expect("they are watched");
        let on_folders = cgroups.watches.values().flatten();
        let on_folders = on_folders.filter(|watch| cgroups.folders.contains_key(watch));
        assert_eq!(on_folders.count(), cgroups.folders.len());
        cgroups.watches.len()
    }

    /// What the kernel would tell of as it does of mounts, and nobody changes.
    const QUIET: &str = "/proc/sys/kernel/hostname";

    /// Returns the events of a folder for pods, which is still to be made, and of no mounts: other tests may mount
    /// something on this machine.
    fn events() -> (tempfile::TempDir, PathBuf, MachineEvents) {
        let dir = tempfile::tempdir().expect("a folder");
        let pods = dir.path().join("pods");
        let mut events = MachineEvents::new(&pods);
        events.mounts.path = QUIET.into();
        (dir, pods, events)
    }

    #[tokio::test]
    async fn cgroups_that_come_fill_and_go_are_told() {
        let (_dir, pods, mut events) = events();
        cgroup(&pods);
        cgroup(&pods.join("before"));
        assert!(events.ensure_watching(Instant::now()));
        assert!(!is_reported(&mut events).await, "nothing happens");
        let deep = pods.join("before/later/below");
        fs::create_dir(pods.join("before/later")).expect("a folder");
        cgroup(&deep);
        settle(&mut events).await;
        assert_eq!(watched(&events), 4);
        fs::write(deep.join("cgroup.events"), "populated 1\n").expect("a file");
        assert!(is_reported(&mut events).await, "it fills");
        settle(&mut events).await;
        fs::write(deep.join("cgroup.procs"), "0\n").expect("a file");
        assert!(!is_reported(&mut events).await, "that is nothing");
        fs::remove_dir_all(pods.join("before")).expect("a folder");
        settle(&mut events).await;
        assert_eq!(watched(&events), 1);
        // A cgroup of the same name is made.
        cgroup(&pods.join("before"));
        assert!(is_reported(&mut events).await, "it is made again");
        fs::write(pods.join("before/cgroup.events"), "populated 1\n").expect("a file");
        settle(&mut events).await;
        fs::write(pods.join("before/cgroup.events"), "populated 0\n").expect("a file");
        assert!(is_reported(&mut events).await, "it fills");
        assert_eq!(watched(&events), 2);
    }

    #[tokio::test]
    async fn what_a_container_makes_below_its_cgroup_is_its_own() {
        let (_dir, pods, mut events) = events();
        cgroup(&pods);
        assert!(events.ensure_watching(Instant::now()));
        let container = pods.join(format!("docker-{:064x}.scope", 1));
        cgroup(&container);
        settle(&mut events).await;
        cgroup(&container.join("inside"));
        assert!(!is_reported(&mut events).await);
        assert_eq!(watched(&events), 2);
        fs::write(container.join("cgroup.events"), "populated 1\n").expect("a file");
        assert!(is_reported(&mut events).await, "it fills");
    }

    #[tokio::test]
    async fn more_cgroups_than_may_be_watched_are_looked_for_regularly() {
        let (_dir, pods, mut events) = events();
        cgroup(&pods);
        let now = Instant::now();
        assert!(events.ensure_watching(now));
        events.cgroups.as_mut().expect("they are watched").most = 2;
        cgroup(&pods.join("more"));
        assert!(is_reported(&mut events).await);
        assert!(events.cgroups.is_none(), "nothing is told any more");
        assert!(events.ensure_watching(now), "it is tried anew");
    }

    #[tokio::test]
    async fn where_there_is_nothing_to_watch_it_is_tried_again() {
        let (_dir, pods, mut events) = events();
        let now = Instant::now();
        assert!(!events.ensure_watching(now));
        cgroup(&pods);
        assert!(events.ensure_watching(now));
        // After events were lost, watching starts again at once.
        events.cgroups = None;
        assert!(events.ensure_watching(now));
    }

    #[tokio::test]
    async fn mounts_that_cannot_be_watched_are_looked_for_regularly_until_they_can() {
        let (_dir, pods, mut events) = events();
        cgroup(&pods);
        let now = Instant::now();
        let other = tempfile::tempdir().expect("a folder");
        let mounts = other.path().join("mountinfo");
        events.mounts.path.clone_from(&mounts);
        assert!(!events.ensure_watching(now));
        // A file of another kind tells of nothing.
        fs::write(&mounts, "").expect("a file");
        assert!(!events.ensure_watching(now));
        assert!(events.mounts.told);
        fs::remove_file(&mounts).expect("a file");
        std::os::unix::fs::symlink(QUIET, &mounts).expect("a link");
        assert!(events.ensure_watching(now));
        assert!(!is_reported(&mut events).await, "nothing happens");
    }

    #[tokio::test]
    async fn a_cgroup_that_is_made_again_is_watched_again() {
        let (dir, pods, mut events) = events();
        cgroup(&pods);
        let now = Instant::now();
        assert!(events.ensure_watching(now));
        settle(&mut events).await;
        fs::create_dir(dir.path().join("other")).expect("a folder");
        fs::remove_dir(dir.path().join("other")).expect("a folder");
        settle(&mut events).await;
        assert!(events.cgroups.is_some(), "another folder is nothing");
        fs::remove_dir_all(&pods).expect("a folder");
        settle(&mut events).await;
        assert!(!events.ensure_watching(now), "there is none");
        cgroup(&pods);
        assert!(events.ensure_watching(now), "it is there again");
        cgroup(&pods.join("new"));
        assert!(is_reported(&mut events).await, "it is told of what comes");
    }
}

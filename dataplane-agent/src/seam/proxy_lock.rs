//! The lock of proxy processes on their node. Capture keeps the connections of a proxy from leaving in clear,
//! so a node must not be uninstalled while a proxy runs.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::sys::locked;
use crate::sys::made::CreatedPaths;

/// A lock: shared by proxies, or exclusive. The last owner removes its file.
#[derive(Debug)]
pub struct ProxyLock {
    path: PathBuf,
    file: File,
}

impl ProxyLock {
    /// Takes the lock for a proxy. Makes the folder of the file, which is removed with `CreatedPaths` unless that is
    /// kept. Returns none while the lock is exclusive.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn share(path: &Path) -> io::Result<Option<(Self, CreatedPaths)>> {
        let folder = path.parent().unwrap_or(path);
        let made = CreatedPaths::missing(folder);
        fs::create_dir_all(folder)?;
        let lock = Self::new(path, File::try_lock_shared)?;
        Ok(lock.map(|lock| (lock, made)))
    }

    /// Takes the lock against proxies: none runs, and none starts. Returns none while one runs.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn exclude(path: &Path) -> io::Result<Option<Self>> {
        Self::new(path, File::try_lock)
    }

    fn new(path: &Path, lock: fn(&File) -> Result<(), TryLockError>) -> io::Result<Option<Self>> {
        // For root alone: whoever can open the file can lock it.
        let mut options = OpenOptions::new();
        options.create(true).write(true).truncate(false).mode(0o600);
        let file = locked::lock(path, || options.open(path), lock)?;
        Ok(file.map(|file| Self {
            path: path.to_owned(),
            file,
        }))
    }
}

impl Drop for ProxyLock {
    fn drop(&mut self) {
        let is_last = self.file.try_lock().is_ok();
        if is_last && locked::is_at(&self.path, &self.file).unwrap_or(false) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proxies_share_the_lock_and_the_last_one_removes_its_file() {
        let top = tempfile::tempdir().expect("a folder");
        let path = top.path().join("run/one.proxy.lock");
        let share = || ProxyLock::share(&path).expect("a file");
        let exclude = || ProxyLock::exclude(&path).expect("a file");
        let (first, made) = share().expect("it is free");
        let (second, mut also) = share().expect("it is shared");
        also.keep();
        drop(first);
        drop(made);
        assert!(exclude().is_none() && path.exists());
        drop(second);
        assert!(!path.exists());
        let exclusive = exclude().expect("no proxy runs");
        assert!(share().is_none());
        drop(exclusive);
        assert!(!path.exists() && path.parent().is_some_and(Path::exists));
        // A proxy that was killed has left its file.
        fs::write(&path, "").expect("a file");
        assert!(exclude().is_some() && !path.exists());
        fs::remove_dir(top.path().join("run")).expect("it is empty");
        drop(share().expect("it is free"));
        assert!(!top.path().join("run").exists());
    }
}

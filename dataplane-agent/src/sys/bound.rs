//! The name of a Unix socket in the file system, which others may remove or replace.

use std::cell::Cell;
use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

/// How often the path is checked; tests do not wait so long.
pub const POLL: Duration = Duration::from_millis(if cfg!(test) { 30 } else { 3000 });

/// The path of a socket of this process. It is removed on drop, unless another socket has it by then.
#[derive(Debug)]
pub struct BoundPath {
    path: PathBuf,
    /// Device and inode.
    is: (u64, u64),
    next: Cell<Instant>,
}

impl BoundPath {
    /// Has `bind` make a socket at the path, in place of one that is there, for its user alone.
    ///
    /// # Errors
    /// What is there cannot be removed, or the socket cannot be made.
    pub fn bind<T>(path: &Path, bind: impl FnOnce() -> io::Result<T>) -> io::Result<(T, Self)> {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let socket = bind()?;
        let bound = Self::at(path)?;
        fs::set_permissions(path, Permissions::from_mode(0o600))?;
        Ok((socket, bound))
    }

    /// Of the socket that is at the path now.
    ///
    /// # Errors
    /// There is none.
    pub fn at(path: &Path) -> io::Result<Self> {
        Ok(Self {
            path: path.to_owned(),
            is: inode(path)?,
            next: Cell::new(Instant::now() + POLL),
        })
    }

    /// Returns the path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Waits for the next check that does not find the socket at its path. Cancel safe: a call goes on where
    /// the last one was dropped.
    pub async fn removed(&self) {
        loop {
            sleep_until(self.next.get()).await;
            self.next.set(Instant::now() + POLL);
            if !self.is_there() {
                return;
            }
        }
    }

    fn is_there(&self) -> bool {
        inode(&self.path).is_ok_and(|there| there == self.is)
    }
}

impl Drop for BoundPath {
    fn drop(&mut self) {
        if self.is_there() {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn inode(path: &Path) -> io::Result<(u64, u64)> {
    let found = fs::symlink_metadata(path)?;
    Ok((found.dev(), found.ino()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[tokio::test]
    async fn a_path_that_another_socket_has_counts_as_removed_and_stays() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("socket");
        let _first = UnixListener::bind(&path).expect("a socket");
        let bound = BoundPath::at(&path).expect("it is there");
        let long = tokio::time::timeout(POLL * 10, bound.removed()).await;
        assert!(long.is_err(), "it is there");
        fs::rename(&path, folder.path().join("away")).expect("a socket");
        let second = UnixListener::bind(&path).expect("a socket");
        bound.removed().await;
        drop(bound);
        assert!(path.exists());
        drop(BoundPath::at(&path).expect("it is there"));
        assert!(!path.exists());
        drop(second);
    }
}

//! Reads ztunnel's file when nobody writes it: one that is cut may be valid too, without the pods and policies at
//! its end.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime};

use tokio::time::sleep_until;

use crate::control::disk::DiskTask;
use crate::control::manifests::{COMPLETE_AFTER, ManifestError, SETTLE, SETTLE_UNSEEN, Stamp};
use crate::sys::regular_file;
use crate::sys::writers::has_writers;

/// Interval at which a file that has just changed is looked at.
const RETRY: Duration = Duration::from_millis(50);
/// Time after which a file that does not stop to change is an error.
const MOST: Duration = Duration::from_secs(10);

/// Reads a file that has not changed for [`SETTLE`], and waits for that. Where the kernel does not say who has it
/// open, it waits for longer.
///
/// # Errors
/// It cannot be read; it is open for writing; it does not stop to change.
pub(super) fn read(file: &Path) -> Result<(String, Unchanged), ManifestError> {
    let fault = |error: io::Error| ManifestError::of_file(file, error);
    let begin = Instant::now();
    let mut seen = (stamp(file).map_err(fault)?, begin);
    while begin.elapsed() < MOST {
        let settle = match has_writers(file) {
            Ok(true) => return Err(ManifestError::of_file(file, "is open for writing")),
            Ok(false) => SETTLE,
            Err(_) => SETTLE_UNSEEN,
        };
        let (before, since) = seen;
        let is_still = since.elapsed() >= settle || before.is_older(settle, SystemTime::now());
        let text = is_still.then(|| regular_file::read_to_string(file));
        let now = stamp(file).map_err(fault)?;
        if now != before {
            seen = (now, Instant::now());
        } else if let Some(text) = text {
            return Ok((text.map_err(fault)?, Unchanged::new(file, now)));
        }
        sleep(RETRY);
    }
    let what = format!("has not stopped to change for {MOST:?}");
    Err(ManifestError::of_file(file, what))
}

fn stamp(file: &Path) -> io::Result<Stamp> {
    Ok(Stamp::from(&fs::metadata(file)?))
}

/// Whether the file has stayed as it was read: only then the absence of a pod means something.
#[derive(Debug)]
pub struct Unchanged {
    file: PathBuf,
    stamp: Stamp,
    read: tokio::time::Instant,
    /// The look at the file, once it is time for it.
    look: Option<DiskTask<Option<Stamp>>>,
    /// What the look has found.
    found: Option<bool>,
}

impl Unchanged {
    fn new(file: &Path, stamp: Stamp) -> Self {
        Self {
            file: file.to_owned(),
            stamp,
            read: tokio::time::Instant::now(),
            look: None,
            found: None,
        }
    }

    /// Waits until it is known. Cancelling the wait loses nothing; it returns once.
    pub async fn known(&mut self) {
        if self.found.is_some() {
            std::future::pending::<()>().await;
        }
        sleep_until(self.read + COMPLETE_AFTER).await;
        let file = &self.file;
        let look = self.look.get_or_insert_with(|| {
            let of = file.clone();
            DiskTask::start(file, move || stamp(&of).ok())
        });
        self.found = Some(look.done().await == Some(self.stamp));
        self.look = None;
    }

    /// Returns why the absence of a pod means nothing.
    pub fn is_partial(&self) -> Option<String> {
        let file = self.file.display();
        match self.found {
            Some(true) => None,
            Some(false) => Some(format!(
                "{file} has changed since it was read, at the start; start again"
            )),
            None => Some(format!(
                "{file} has not been unchanged for {COMPLETE_AFTER:?} since it was read"
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_file_is_read_when_nobody_writes_it_any_more() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("local.yaml");
        let mut writer = fs::File::create(&path).expect("a file");
        writer.write_all(b"half").expect("a disk");
        let refused = read(&path).expect_err("half").to_string();
        assert!(refused.ends_with("is open for writing"), "{refused}");
        drop(writer);
        let (text, _) = read(&path).expect("a file");
        assert_eq!(text, "half");
        let modified = fs::metadata(&path).and_then(|of| of.modified());
        let age = SystemTime::now().duration_since(modified.expect("a time"));
        assert!(age.expect("it is past") >= SETTLE);
    }

    #[tokio::test]
    async fn a_file_is_whole_once_it_has_stayed_as_it_was_read() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("local.yaml");
        fs::write(&path, "whole").expect("a file");
        for (change, partial) in [(false, false), (true, true)] {
            let mut unchanged = Unchanged::new(&path, stamp(&path).expect("a file"));
            assert!(unchanged.is_partial().is_some());
            unchanged.read -= COMPLETE_AFTER;
            if change {
                fs::write(&path, "whole, and more").expect("a file");
            }
            unchanged.known().await;
            assert_eq!(unchanged.is_partial().is_some(), partial);
        }
    }
}

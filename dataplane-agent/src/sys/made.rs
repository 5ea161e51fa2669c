//! Files and folders that are created for an operation, and removed if it fails.

use std::fs;
use std::path::{Path, PathBuf};

/// Paths that were created, the innermost first. Dropping this removes them, except folders that have other
/// contents by then, unless [`CreatedPaths::keep`] was called.
#[derive(Debug, Default)]
pub struct CreatedPaths(Vec<PathBuf>);

impl CreatedPaths {
    /// Returns the paths that are about to be created: `folder` and its ancestors that do not exist yet.
    pub fn missing(folder: &Path) -> Self {
        let missing = |path: &&Path| {
            let there = fs::symlink_metadata(path);
            there.is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound)
        };
        Self(
            folder
                .ancestors()
                .take_while(missing)
                .map(Path::to_owned)
                .collect(),
        )
    }

    /// Adds a file in the innermost folder.
    pub fn also(&mut self, file: &Path) {
        self.0.insert(0, file.to_owned());
    }

    /// Keeps the paths.
    pub fn keep(&mut self) {
        self.0.clear();
    }
}

impl Drop for CreatedPaths {
    fn drop(&mut self) {
        for path in &self.0 {
            let _ = match path.is_dir() {
                true => fs::remove_dir(path),
                false => fs::remove_file(path),
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_made_goes_unless_it_is_kept_or_somebody_uses_it() {
        let top = tempfile::tempdir().expect("a folder");
        let (outer, inner) = (top.path().join("outer"), top.path().join("outer/inner"));
        let make = || {
            let mut made = CreatedPaths::missing(&inner);
            fs::create_dir_all(&inner).expect("a folder");
            fs::write(inner.join("lock"), "").expect("a file");
            made.also(&inner.join("lock"));
            made
        };
        drop(make());
        assert!(!outer.exists() && top.path().exists());
        let used = make();
        fs::write(outer.join("precious"), "").expect("a file");
        drop(used);
        assert!(!inner.exists() && outer.join("precious").exists());
        make().keep();
        assert!(inner.join("lock").exists());
    }
}

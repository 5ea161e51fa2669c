//! Folders that are made on the way to something, and taken back if that comes to nothing.

use std::fs;
use std::path::{Path, PathBuf};

/// What was made, the innermost first. It is removed with this, as far as nobody has put something in it,
/// unless it is kept.
#[derive(Debug, Default)]
pub struct CreatedPaths(Vec<PathBuf>);

impl CreatedPaths {
    /// Of what is about to be made: the folder and those above it that are not there yet.
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

    /// A file in the innermost of them as well.
    pub fn also(&mut self, file: &Path) {
        self.0.insert(0, file.to_owned());
    }

    /// It stays.
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

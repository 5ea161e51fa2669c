//! A folder of ordinary Kubernetes manifests as a source of configuration.
//!
//! [`ManifestFolder`] reads it and keeps the last accepted state of every file; [`Watch`] decides when to read
//! again; [`translate()`] is pure and makes store types of the objects. The rules are istiod's, so that a mesh
//! from manifests behaves as one from a cluster. Where istiod would let more through than was written, we do
//! not; each such place has a comment.

use std::fmt;
use std::path::PathBuf;

pub(crate) mod applies;
pub mod authorization_policy;
pub mod changes;
mod collection;
pub mod endpoint_slice;
mod files;
pub mod folder;
pub mod gateway;
pub mod object;
pub mod peer_authentication;
pub mod pod;
mod principal;
mod scan;
pub mod service;
mod shared;
pub(crate) mod spelling;
pub mod translate;
pub mod translated;
pub mod watch;
pub(crate) mod yaml;

#[cfg(test)]
mod tests;

pub(super) use files::{SETTLE, SETTLE_UNSEEN};
pub(super) use folder::COMPLETE_AFTER;
pub use folder::{ManifestFolder, Reload};
pub use object::Objects;
pub(super) use scan::Stamp;
pub use translate::{LocalPodSpec, MeshConfig, PodKey, Translation, Wanted, translate};
pub use translated::{Stale, Translated};
pub use watch::Watch;

/// An error in a file, and its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ManifestError {
    /// The file, below the folder.
    pub file: PathBuf,
    /// The line, if one line is at fault.
    pub line: Option<u64>,
    /// The field's path in its object; empty if no field is at fault.
    pub field: String,
    /// The fault.
    pub what: String,
}

impl ManifestError {
    /// Creates an error about a whole file.
    pub fn of_file(file: impl Into<PathBuf>, what: impl fmt::Display) -> Self {
        Self {
            file: file.into(),
            line: None,
            field: String::new(),
            what: what.to_string(),
        }
    }

    pub(crate) fn at(file: impl Into<PathBuf>, error: yaml::NodeError) -> Self {
        Self {
            file: file.into(),
            line: error.line,
            field: error.field,
            what: error.what,
        }
    }
}

impl fmt::Display for ManifestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file.display())?;
        if let Some(line) = self.line {
            write!(f, ":{line}")?;
        }
        if !self.field.is_empty() {
            write!(f, ": {}", self.field)?;
        }
        write!(f, ": {}", self.what)
    }
}

impl std::error::Error for ManifestError {}

/// All errors of a folder, a line each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ManifestErrors(pub Vec<ManifestError>);

impl fmt::Display for ManifestErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, error) in self.0.iter().enumerate() {
            let line = if at == 0 { "" } else { "\n" };
            write!(f, "{line}{error}")?;
        }
        Ok(())
    }
}

impl std::error::Error for ManifestErrors {}

//! The link that keeps a program attached, pinned or not: while a process has its descriptor, nothing is
//! detached if the pin is lost or cannot be made.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;

use aya::programs::ProgramFd;
use aya::programs::links::{FdLink, PinnedLink};

use super::CaptureError;
use super::maps::chain;
use super::pins::{new_pin, remove};
use crate::sys::hooks;

/// A BPF link.
#[derive(Debug)]
pub struct Link {
    id: u32,
    program: u32,
    link: OwnedFd,
}

impl Link {
    /// Takes a descriptor of a new link. aya loses its own when pinning fails.
    ///
    /// # Errors
    /// The kernel does not describe the link.
    pub fn of(program: &'static str, link: &FdLink) -> Result<Self, CaptureError> {
        let untold = |why| CaptureError::Program { program, why };
        let info = link.info().map_err(|error| untold(chain(&error)))?;
        Ok(Self {
            id: info.id(),
            program: info.program_id(),
            link: hooks::link(info.id()).map_err(|error| untold(error.to_string()))?,
        })
    }

    /// Opens the link that is pinned at a path, if there is one.
    pub fn at(pin: &Path) -> Option<Self> {
        let info = FdLink::from(PinnedLink::from_pin(pin).ok()?).info().ok()?;
        Some(Self {
            id: info.id(),
            program: info.program_id(),
            link: hooks::link(info.id()).ok()?,
        })
    }

    /// Returns `true` if this link is pinned at a path. The file stays when a link is detached.
    pub fn is_at(&self, pin: &Path) -> bool {
        Self::at(pin).is_some_and(|pinned| pinned.id == self.id)
    }

    /// Returns the id of the program.
    pub fn program(&self) -> u32 {
        self.program
    }

    /// Attaches another program of the same kind in place of this one.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn replace(&self, program: &ProgramFd) -> std::io::Result<()> {
        hooks::replace(&self.link, program)
    }

    /// Pins the link, and replaces what is pinned there without a moment in between.
    ///
    /// # Errors
    /// The file system refuses; the program stays attached.
    pub fn pin(&self, path: &Path) -> Result<(), CaptureError> {
        let new = new_pin(path);
        remove(&new)?;
        hooks::pin(&self.link, &new).map_err(CaptureError::file(&new))?;
        let renamed = fs::rename(&new, path).map_err(CaptureError::file(path));
        if renamed.is_err() {
            remove(&new)?;
        }
        renamed
    }
}

//! What keeps a program attached, whether it is pinned or not: as long as a process has it nothing is
//! detached where the pin is lost, or cannot be made.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;

use aya::programs::ProgramFd;
use aya::programs::links::{FdLink, PinnedLink};

use super::CaptureError;
use super::maps::chain;
use super::pins::{new_pin, remove};
use crate::sys::hooks;

/// A link of a program.
#[derive(Debug)]
pub struct Link {
    id: u32,
    program: u32,
    link: OwnedFd,
}

impl Link {
    /// Of one that was just made. aya's own is lost with a pin that fails.
    ///
    /// # Errors
    /// The kernel does not tell of it.
    pub fn of(program: &'static str, link: &FdLink) -> Result<Self, CaptureError> {
        let untold = |why| CaptureError::Program { program, why };
        let info = link.info().map_err(|error| untold(chain(&error)))?;
        Ok(Self {
            id: info.id(),
            program: info.program_id(),
            link: hooks::link(info.id()).map_err(|error| untold(error.to_string()))?,
        })
    }

    /// The one that is pinned at a path, if one is.
    pub fn at(pin: &Path) -> Option<Self> {
        let info = FdLink::from(PinnedLink::from_pin(pin).ok()?).info().ok()?;
        Some(Self {
            id: info.id(),
            program: info.program_id(),
            link: hooks::link(info.id()).ok()?,
        })
    }

    /// Whether it is what is pinned at a path. Where a link was detached the file is there all the same.
    pub fn is_at(&self, pin: &Path) -> bool {
        Self::at(pin).is_some_and(|pinned| pinned.id == self.id)
    }

    /// The id of its program.
    pub fn program(&self) -> u32 {
        self.program
    }

    /// Has it attach another program of the same kind.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn replace(&self, program: &ProgramFd) -> std::io::Result<()> {
        hooks::replace(&self.link, program)
    }

    /// Pins it, in place of one that may be there: there is no moment without either.
    ///
    /// # Errors
    /// The file system refuses; what it keeps attached stays so.
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

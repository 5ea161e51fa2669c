//! Exit codes, on which scripts and units may rely.

use std::process::ExitCode;

/// The exit code of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// The command succeeded.
    Good = 0,
    /// Something failed; the last line says what.
    Failed = 1,
    /// A setting or an argument is wrong; the line names it. (Also clap's code.)
    Settings = 2,
    /// The machine lacks something; the lines say what.
    Machine = 3,
    /// Another agent runs for this node.
    Held = 4,
    /// No agent runs for this node.
    NotRunning = 5,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

//! A test that this kernel accepts the programs.

use std::process::Command;

use anyhow::Result;

use crate::build;
use crate::command::{require_root, run as run_command};

/// Loads and attaches the kernel programs on this machine, lists them, takes them off again.
///
/// The quickest way to hear what this kernel's verifier says: builds, then runs `dataplane load`
/// as root. Nothing stays behind, and no traffic is captured.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Uses the agent as it is shipped.
    #[arg(long)]
    release: bool,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    require_root("loading", "bpf(2)")?;
    let agent = build::agent(options.release)?;
    run_command(Command::new(agent).arg("load"))
}

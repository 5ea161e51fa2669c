//! Shows the dataplane at work on this machine.

use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, Result};

use crate::build;
use crate::command::{require_root, shown};
use crate::progress::say;

/// Shows the dataplane at work on this machine: two nodes, their pods, a mesh and its policies.
///
/// Nodes and pods are network namespaces and cgroups of this machine; no cluster and no control
/// plane is needed, and nothing leaves the machine. Needs root. Everything is taken away at the
/// end.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Leaves everything running to look at, until Ctrl-C.
    #[arg(long)]
    keep: bool,
    /// Runs the halves of each agent in processes of their own.
    #[arg(long)]
    halves: bool,
    /// Uses the agent as it is shipped.
    #[arg(long)]
    release: bool,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    require_root("the demo", "network namespaces, cgroups, bpf(2)")?;
    build::with_kernel_programs(|| {
        say("agent and demo");
        build::agent_and_programs(options.release)
    })?;
    say("demo");
    let binary = |name| build::binary(name, options.release);
    let mut demo = Command::new(binary("demo"));
    demo.args(options.keep.then_some("--keep"))
        .args(options.halves.then_some("--halves"))
        .env("DATAPLANE_BIN", binary("dataplane"))
        .env("DATAPLANE_TEST_APP", binary("dataplane-test-app"));
    // It replaces this process: a signal to the chore ends the demo, which then cleans up.
    let error = demo.exec();
    Err(error).with_context(|| format!("cannot start `{}`", shown(&demo)))
}

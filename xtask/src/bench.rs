//! Measures the dataplane on this machine.

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use crate::build;
use crate::command::{require_root, shown};
use crate::progress::say;

/// Measures the dataplane on this machine, as it is shipped: how long connections between nodes take while the mesh
/// changes 1,000 times a second, and what a change costs the agent.
///
/// A round has four ways: twice idle, while the changes are written where nobody watches, and while the agent follows
/// them. So what its reaction costs is told apart from what the writing does. It takes some seven minutes, after the
/// build, and is done with half a minute by `--quick`.
///
/// Nodes and pods are network namespaces and cgroups of this machine, and nothing leaves it. What
/// is compared is measured in turns, round by round, and once against itself: what differs by no
/// more than that is no difference. Needs root, and a machine that does nothing else. Everything is
/// taken away at the end, also after Ctrl-C, which ends it after some seconds.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Fewer and shorter rounds: shows that it works, not how fast.
    #[arg(long)]
    quick: bool,
    /// Writes each round's numbers to this file, as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    require_root("the benchmark", "network namespaces, cgroups, bpf(2)")?;
    build::with_kernel_programs(|| {
        say("agent and benchmark, released");
        build::agent_and_programs(true)
    })?;
    say("benchmark");
    let binary = |name| build::binary(name, true);
    let mut bench = Command::new(binary("bench"));
    bench
        .args(options.quick.then_some("--quick"))
        .env("DATAPLANE_BIN", binary("dataplane"))
        .env("DATAPLANE_TEST_APP", binary("dataplane-test-app"))
        .env("DATAPLANE_TEST_LOAD", binary("dataplane-load"));
    if let Some(file) = &options.json {
        bench.arg("--json").arg(file);
    }
    // It replaces this process: a signal to the chore ends the benchmark, which then cleans up.
    let error = bench.exec();
    Err(error).with_context(|| format!("cannot start `{}`", shown(&bench)))
}

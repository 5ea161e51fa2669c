//! The commands of `dataplane`, as people run them.

use std::fs;
use std::path::Path;
use std::process::{Command, ExitStatus};
use std::time::Duration;

use crate::agent::Setup;
use crate::process::{output, place};
use crate::{Agent, SingleNode, eventually, program, scaled};

/// Returns `dataplane` with a subcommand, and without settings from the environment.
pub fn dataplane(command: &str) -> Command {
    let mut dataplane = Command::new(program("DATAPLANE_BIN"));
    dataplane.arg(command).env_remove("NODE_NAME");
    dataplane
}

/// Returns `uninstall` with the paths of this node, some of which `others` replace.
pub fn uninstall(one: &SingleNode, others: &[(&str, &Path)]) -> Command {
    let mut uninstall = dataplane("uninstall");
    let (run, bpffs, state) = (
        one.world.folder().join("run"),
        one.world.bpffs().to_owned(),
        one.world.state.clone(),
    );
    for (name, place) in [
        ("--node", Path::new("one")),
        ("--run-dir", &run),
        ("--bpffs", &bpffs),
        ("--state", &state),
    ] {
        let other = others.iter().find(|(other, _)| *other == name);
        let place = other.map_or(place, |(_, other)| *other);
        uninstall.arg(name).arg(place);
    }
    uninstall
}

/// Runs a command; returns its exit status and all its output.
pub fn run(command: &mut Command) -> (ExitStatus, String) {
    let (status, out, error) = output(command);
    (status, out + &error)
}

/// Returns the same command as a child of other commands, with a time limit. It is used instead of an `Agent`,
/// which on drop would uninstall what has to stay as it is.
pub fn under(others: &[&str], command: &Command, at: &Setup) -> Command {
    let mut under = Command::new("timeout");
    let limit = scaled(Duration::from_secs(20)).as_secs();
    under
        .args(["--signal=KILL", &limit.to_string()])
        .args(others)
        .arg(command.get_program())
        .args(command.get_args());
    place(&mut under, &at.place);
    under
}

/// Runs an agent that must not start; returns its exit status and its output.
pub fn refused(setup: Setup) -> (ExitStatus, String) {
    let _ = fs::remove_file(&setup.log);
    let mut agent = Agent::start(setup);
    eventually("it ends by itself", 20, || !agent.runs());
    (agent.wait(), agent.log())
}

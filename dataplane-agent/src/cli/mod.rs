//! The command line: the daemon, and its clients.

pub mod check;
pub mod load;
pub mod status;
pub mod uninstall;

use std::io::{self, Write};
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::config::{NodeName, Places, RunOptions};

/// Node dataplane for Istio ambient mesh: captures the traffic of enrolled pods with eBPF, gives
/// each pod its identity, carries connections between nodes in HBONE and enforces L4 policy.
#[derive(Debug, Parser)]
#[command(
    name = "dataplane",
    version,
    propagate_version = true,
    after_help = "\
Examples:
  dataplane check                                       what this machine has and lacks
  dataplane run --manifests /etc/mesh --node $(hostname)  serve the pods of this node
  dataplane status                                      which pods are served, which wait and why
  dataplane uninstall --node $(hostname)                let go of everything that was captured

Exit codes: 0 good, 1 failed, 2 a setting is wrong, 3 the machine lacks something,
4 another agent runs for the node, 5 none runs."
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What can be done.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Runs the daemon of one node, until SIGTERM, SIGINT or SIGHUP.
    ///
    /// A signal drains: connections go on for as long as --drain, then they are cut. Pods stay
    /// captured, so that nothing of theirs passes in clear while no agent runs; the next one takes
    /// over. To let go of them run `dataplane uninstall`.
    Run(Box<RunOptions>),
    /// Runs the half of the daemon that knows the node: which pods are here, and what captures them.
    ///
    /// `dataplane proxy` serves the pods; any number may, one after the other or at once. The node keeps the
    /// pods' listeners, so that nothing is refused while none does: connections wait. It has no key, and asks
    /// no policy.
    Node(Box<RunOptions>),
    /// Runs the half of the daemon that carries the connections of a node's pods.
    ///
    /// It has their certificates, the mesh and its policies, and serves what `dataplane node` lends it. A
    /// signal drains: it accepts nothing any more, which the next one does, and what runs goes on for as long
    /// as --drain.
    Proxy(Box<RunOptions>),
    /// Says what this machine has and lacks, a line each; fails if `run` would refuse to start.
    Check(CheckOptions),
    /// Shows the pods of a running daemon: which are up, which wait and why.
    Status(StatusOptions),
    /// Loads, attaches and lists the kernel programs, and takes them off again.
    ///
    /// The quickest way to hear what this kernel says of them. No traffic is captured.
    Load(LoadOptions),
    /// Removes everything that the daemon of a node left: pods are no longer captured.
    ///
    /// It wants the places that `run` was given, and touches nothing where they are others, where the
    /// daemon or a half of it still runs, or where a privilege is missing. What cannot be taken back is
    /// told, a line each, and can be tried again. Where nothing of the node is there that is good as
    /// well, unless an agent's programs or rules are on the machine, which it may have been asked to
    /// remove.
    Uninstall(UninstallOptions),
}

/// Options of `dataplane check`.
#[derive(Args, Debug)]
pub struct CheckOptions {
    /// Cgroup (v2) that holds the pods; the root of the hierarchy if not set.
    #[arg(long, env = "DATAPLANE_CGROUP", value_name = "PATH")]
    pub cgroup: Option<PathBuf>,
    /// Where an agent keeps its things.
    #[command(flatten)]
    pub places: Places,
}

/// Options of `dataplane status`.
#[derive(Args, Debug)]
pub struct StatusOptions {
    /// Name of the node; not needed where one daemon runs.
    #[arg(long, env = "NODE_NAME", value_name = "NAME")]
    pub node: Option<NodeName>,
    /// Prints JSON.
    #[arg(long)]
    pub json: bool,
    /// Where an agent keeps its things.
    #[command(flatten)]
    pub places: Places,
}

/// Options of `dataplane load`.
#[derive(Args, Debug)]
pub struct LoadOptions {
    /// A folder over which a BPF file system is mounted that nobody else sees.
    #[arg(
        long,
        env = "DATAPLANE_BPFFS",
        value_name = "DIR",
        default_value = "/sys/fs/bpf"
    )]
    pub bpffs: PathBuf,
}

/// Options of `dataplane uninstall`.
#[derive(Args, Clone, Debug)]
pub struct UninstallOptions {
    /// Name of the node.
    #[arg(long, env = "NODE_NAME", value_name = "NAME")]
    pub node: NodeName,
    /// The state folder that was given to `run`: records that name this node are removed from it.
    #[arg(
        long,
        env = "DATAPLANE_STATE",
        value_name = "DIR",
        default_value = "/var/lib/dataplane"
    )]
    pub state: PathBuf,
    /// Where an agent keeps its things.
    #[command(flatten)]
    pub places: Places,
}

/// Prints the output of a command. A reader that closes its end early is no error.
///
/// # Errors
/// The output cannot be written.
pub fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `--help` says of it and of its subcommands, whatever the environment is.
    fn help(command: clap::Command, text: &mut String) {
        let mut command = command.mut_args(|arg| arg.hide_env_values(true));
        let name = command.get_bin_name().unwrap_or("dataplane").to_owned();
        text.push_str(&format!(
            "$ {name} --help\n{}\n",
            command.render_long_help()
        ));
        for sub in command.get_subcommands() {
            help(sub.clone(), text);
        }
    }

    #[test]
    fn what_help_says_is_the_golden_one() {
        let mut command = <Cli as clap::CommandFactory>::command().disable_help_subcommand(true);
        command.build();
        let mut text = String::new();
        help(command, &mut text);
        let golden = include_str!("../../../tests/golden/help.txt");
        assert!(
            text == golden,
            "tests/golden/help.txt differs from this:\n{text}"
        );
    }
}

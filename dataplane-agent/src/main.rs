//! The `dataplane` binary: arguments, log and exit code; the library does the rest.

use std::process::ExitCode;

use clap::{CommandFactory, Parser};
use dataplane_agent::agent::{self, AgentError, Halves};
use dataplane_agent::cli::{self, Cli, Command, UninstallOptions, check, load, status, uninstall};
use dataplane_agent::config::{RunOptions, unknown_variable};
use dataplane_agent::exit::Exit;
use dataplane_agent::node::capture::uninstall::Outcome;
use dataplane_agent::observe::writer::BUFFER_LIMIT;
use dataplane_agent::observe::{levels, log};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let variables = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok());
    if let Some(name) = unknown_variable(variables, &Cli::command()) {
        return fail(
            Exit::Settings,
            &format!("{name} is no setting (see `dataplane run --help`)"),
        );
    }
    match cli.command {
        Command::Run(options) => run(Halves::Both, *options),
        Command::Node(options) => run(Halves::Node, *options),
        Command::Proxy(options) => run(Halves::Proxy, *options),
        Command::Check(options) => match runtime().map(|all| all.block_on(check::run(&options))) {
            Ok((text, true)) => print(&text, Exit::Good),
            Ok((text, false)) => print(&text, Exit::Machine),
            Err(error) => fail(Exit::Failed, &error.to_string()),
        },
        Command::Status(options) => {
            match runtime().map(|all| all.block_on(status::run(&options))) {
                Ok(Ok(text)) => print(&text, Exit::Good),
                Ok(Err(error)) if error.is::<status::NotRunning>() => {
                    fail(Exit::NotRunning, &error.to_string())
                }
                Ok(Err(error)) => fail(Exit::Failed, &format!("{error:#}")),
                Err(error) => fail(Exit::Failed, &error.to_string()),
            }
        }
        Command::Load(options) => {
            // At this level all that the verifier says about a refused program is logged.
            let level = log::start(
                "warn,dataplane_agent::node::capture::programs=debug",
                log::Format::default(),
                usize::MAX,
            );
            match level.map(|_| load::run(&options.bpffs)) {
                Ok(Ok(text)) => print(&text, Exit::Good),
                Ok(Err(error)) => fail(Exit::Failed, &format!("{error:#}")),
                Err(error) => fail(Exit::Failed, &error),
            }
        }
        Command::Uninstall(options) => uninstall(&options),
    }
}

fn run(halves: Halves, options: RunOptions) -> ExitCode {
    let level = match log::start(&options.log, options.log_format, BUFFER_LIMIT) {
        Ok(level) => level,
        Err(error) => return fail(Exit::Settings, &format!("--log: {error}")),
    };
    if let Some(told) = levels::unknown_targets(&options.log) {
        tracing::warn!("--log: {told}");
    }
    let ended = agent::privileges(halves).and_then(|()| {
        let runtime = runtime().map_err(anyhow::Error::from)?;
        let ended = runtime.block_on(agent::run(halves, options, level));
        // Whoever waits for a disk on a thread of its own may do so for ever.
        runtime.shutdown_background();
        ended
    });
    log::flush();
    match ended {
        Ok(()) => Exit::Good.into(),
        Err(error) => fail(AgentError::exit(&error), &error.to_string()),
    }
}

fn uninstall(options: &UninstallOptions) -> ExitCode {
    let done = runtime()
        .map_err(|error| AgentError::Other(error.into()))
        .and_then(|runtime| runtime.block_on(uninstall::run(options)));
    let node = &options.node;
    match done {
        Ok(None) => print(
            &format!(
                "nothing of node {node} is known in {}, and none of it is in {} or {}; no program or rule of \
                 an agent is on this machine\n",
                options.places.run_dir.display(),
                options.places.bpffs.display(),
                options.state.display(),
            ),
            Exit::Good,
        ),
        Ok(Some(Outcome { pods, left })) if left.is_empty() => print(
            &format!("node {node}: {pods} pods let go, nothing is left\n"),
            Exit::Good,
        ),
        Ok(Some(Outcome { pods, left })) => {
            for line in &left {
                log::say(&format!("left: {line}"));
            }
            let left = left.len();
            fail(
                Exit::Failed,
                &format!("node {node}: {pods} pods let go, {left} things are left; see above"),
            )
        }
        Err(error) => match error.exit() {
            Exit::Held => fail(Exit::Held, &format!("{error}; end it first")),
            exit => fail(exit, &error.to_string()),
        },
    }
}

fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
}

/// Prints the output of a command, and returns the exit code.
fn print(text: &str, exit: Exit) -> ExitCode {
    match cli::print(text) {
        Ok(()) => exit.into(),
        Err(error) => fail(Exit::Failed, &format!("standard output: {error}")),
    }
}

fn fail(exit: Exit, error: &str) -> ExitCode {
    log::say(&format!("dataplane: {error}"));
    exit.into()
}

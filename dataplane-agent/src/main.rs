//! The `dataplane` binary: arguments, log, exit code; the rest is the library's.

use std::process::ExitCode;

use clap::Parser;
use dataplane_agent::agent::{self, AgentError};
use dataplane_agent::capture::{CaptureError, enrol};
use dataplane_agent::cli::{Cli, Command, UninstallOptions, check, load, status};
use dataplane_agent::config::{RunOptions, unknown_variable};
use dataplane_agent::control::enrolled::Records;
use dataplane_agent::exit::Exit;
use dataplane_agent::observe::log;
use dataplane_agent::observe::writer::WAITING;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let variables = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok());
    if let Some(name) = unknown_variable(variables) {
        return fail(
            Exit::Settings,
            &format!("{name} is no setting (see `dataplane run --help`)"),
        );
    }
    match cli.command {
        Command::Run(options) => run(*options),
        Command::Check(options) => match runtime().map(|all| all.block_on(check::run(&options))) {
            Ok(true) => Exit::Good.into(),
            Ok(false) => Exit::Machine.into(),
            Err(error) => fail(Exit::Failed, &error.to_string()),
        },
        Command::Status(options) => match status::run(&options) {
            Ok(()) => Exit::Good.into(),
            Err(error) if error.is::<status::NotRunning>() => {
                fail(Exit::NotRunning, &error.to_string())
            }
            Err(error) => fail(Exit::Failed, &format!("{error:#}")),
        },
        Command::Load(options) => {
            // With all that the verifier says of a program that it refuses.
            let level = log::start(
                "warn,dataplane_agent::capture::programs=debug",
                log::Format::default(),
                usize::MAX,
            );
            match level.map(|_| load::run(&options.bpffs)) {
                Ok(Ok(())) => Exit::Good.into(),
                Ok(Err(error)) => fail(Exit::Failed, &format!("{error:#}")),
                Err(error) => fail(Exit::Failed, &error),
            }
        }
        Command::Uninstall(options) => uninstall(&options),
    }
}

fn run(options: RunOptions) -> ExitCode {
    let level = match log::start(&options.log, options.log_format, WAITING) {
        Ok(level) => level,
        Err(error) => return fail(Exit::Settings, &format!("--log: {error}")),
    };
    let ended = agent::privileges().and_then(|()| {
        let runtime = runtime().map_err(anyhow::Error::from)?;
        runtime.block_on(agent::run(options, level))
    });
    log::flush();
    match ended {
        Ok(()) => Exit::Good.into(),
        Err(error) => fail(AgentError::exit(&error), &error.to_string()),
    }
}

fn uninstall(options: &UninstallOptions) -> ExitCode {
    let run = options.places.of_node(&options.node);
    let done = runtime()
        .map_err(|error| error.to_string())
        .and_then(|runtime| {
            let removed = enrol::uninstall(&options.places.bpffs, &run, &options.node);
            runtime.block_on(removed).map_err(|error| match error {
                CaptureError::Held(_) => format!("{error}; end it first"),
                error => error.to_string(),
            })
        });
    let pods = match done {
        Ok(pods) => pods,
        Err(error) => return fail(Exit::Failed, &error),
    };
    if options.state.is_dir()
        && let Err(error) = Records::open(&options.state, &options.node).and_then(|records| {
            records
                .own()?
                .iter()
                .try_for_each(|pod| records.remove(pod))
        })
    {
        return fail(
            Exit::Failed,
            &format!("{}: {error}", options.state.display()),
        );
    }
    println!("node {}: {pods} pods let go, nothing is left", options.node);
    Exit::Good.into()
}

fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
}

fn fail(exit: Exit, error: &str) -> ExitCode {
    log::say(&format!("dataplane: {error}"));
    exit.into()
}

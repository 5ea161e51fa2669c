//! Chores of the project. One file per chore; its doc comments are the help.

mod bench;
mod build;
mod check;
mod command;
mod compiler;
mod demo;
mod doors;
mod fuzz;
mod linker;
mod load;
mod progress;
mod setup;
mod test;
mod vm;
mod words;

use std::process::ExitCode;

use clap::Parser;

/// Builds, loads, tests and shows the dataplane.
///
/// Every chore does what it needs first: on a new machine `cargo xtask test` installs the kernel
/// programs' toolchain, builds everything and runs the tests. What is there already costs less
/// than a second.
#[derive(Parser)]
#[command(bin_name = "cargo xtask")]
enum Xtask {
    Setup(setup::Options),
    Build(build::Options),
    Load(load::Options),
    Test(test::Options),
    Demo(demo::Options),
    Bench(bench::Options),
    Check(check::Options),
    Fuzz(fuzz::Options),
    Vm(vm::Options),
}

fn main() -> ExitCode {
    let done = match Xtask::parse() {
        Xtask::Setup(options) => setup::run(&options),
        Xtask::Build(options) => build::run(&options),
        Xtask::Load(options) => load::run(&options),
        Xtask::Test(options) => test::run(&options),
        Xtask::Demo(options) => demo::run(&options),
        Xtask::Bench(options) => bench::run(&options),
        Xtask::Check(options) => check::run(&options),
        Xtask::Fuzz(options) => fuzz::run(&options),
        Xtask::Vm(options) => vm::run(&options),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

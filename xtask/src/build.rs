//! Builds the kernel programs, then the agent.

use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use anyhow::{Context, Result};

use crate::command::{cargo, host_target, run as run_command, target};
use crate::progress::say;
use crate::setup::{Setup, Toolchain};

/// Builds the kernel programs, then the agent with them in it.
///
/// The kernel programs are built by a toolchain of their own (see `cargo xtask setup`), always
/// optimised, and kept in target/ebpf-objects, from where the agent's build script takes them. The
/// agent is the binary `dataplane` in target/debug, or target/release.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Builds the agent optimised, as it is shipped.
    #[arg(long)]
    pub(crate) release: bool,
}

/// The two kernel objects: attached once per node, and once per pod.
const OBJECTS: &[&str] = &["node", "pod"];
/// See [`host_bins`].
pub(crate) const FEATURES_OF_TESTS: &str = "--examples";
/// The target of the kernel programs.
const BPF: &str = "bpfel-unknown-none";

pub(crate) fn run(options: &Options) -> Result<()> {
    let agent = agent(options.release)?;
    say(&format!("built {}", agent.display()));
    Ok(())
}

/// Builds everything that is shipped; returns the agent's path.
pub(crate) fn agent(release: bool) -> Result<PathBuf> {
    with_kernel_programs(|| {
        say("agent");
        run_command(host_bins(release).args(["--package", "dataplane-agent"]))
    })?;
    Ok(binary("dataplane", release))
}

/// Builds the kernel programs, and runs `host`, which builds the agent with them.
///
/// The first time both are built in parallel: the agent's build script waits for the lock that is
/// held meanwhile. Later the kernel programs come first, since cargo decides as it starts whether
/// the script has to run again.
pub(crate) fn with_kernel_programs<T>(host: impl FnOnce() -> Result<T>) -> Result<T> {
    let setup = Setup::programs()?;
    let programs = || kernel_programs(&setup.toolchain()?);
    let mut made = OBJECTS
        .iter()
        .map(|name| objects().join(format!("other-{name}")));
    if made.all(|object| object.exists()) {
        programs()?;
        return host();
    }
    let lock = lock()?;
    thread::scope(|scope| {
        let programs = scope.spawn(move || {
            let done = programs();
            drop(lock);
            if let Err(error) = &done {
                // Reported at once, as the rest goes on for minutes.
                say(&format!("the kernel programs cannot be built: {error:#}"));
            }
            done
        });
        let built = host();
        match programs.join() {
            Ok(done) => done.and(built),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// Keeps the agent's build script from taking the kernel programs until it is dropped.
fn lock() -> Result<File> {
    let path = objects().join("lock");
    let lock = || -> std::io::Result<File> {
        fs::create_dir_all(objects())?;
        let file = File::create(&path)?;
        file.lock()?;
        Ok(file)
    };
    lock().with_context(|| format!("cannot lock {}", path.display()))
}

/// Builds the kernel programs, and those of the layout that only tests have, and copies those that changed to
/// the folder from which the agent's build takes them.
fn kernel_programs(toolchain: &Toolchain) -> Result<()> {
    say("kernel programs");
    fs::create_dir_all(objects())
        .with_context(|| format!("cannot make {}", objects().display()))?;
    for (prefix, features) in [("", &[][..]), ("other-", &["--features", "other-layout"])] {
        let mut cargo = toolchain.compiler.cargo();
        let cargo = for_bpf(cargo.arg("build"), &toolchain.linker);
        run_command(cargo.arg("--bins").args(features))?;
        for name in OBJECTS {
            let built = target().join("ebpf").join(BPF).join("release").join(name);
            copy_changed(&built, &objects().join(format!("{prefix}{name}")))?;
        }
    }
    Ok(())
}

/// Adds the arguments for the BPF target to `cargo`, which is of the kernel programs' toolchain.
pub(crate) fn for_bpf<'a>(cargo: &'a mut Command, linker: &Path) -> &'a mut Command {
    let mut flags = OsString::from("-Clinker=");
    flags.push(linker);
    // BTF is made from debug information. The separator allows spaces in the path.
    flags.push("\x1f-Clink-arg=--btf\x1f-Cdebuginfo=2");
    cargo
        .args([
            "--quiet",
            "--locked",
            "--release",
            "--package",
            "dataplane-ebpf",
        ])
        .args([
            "--features",
            "programs",
            "--target",
            BPF,
            "-Zbuild-std=core",
        ])
        .env("CARGO_ENCODED_RUSTFLAGS", flags)
        .env("CARGO_TARGET_DIR", target().join("ebpf"))
}

/// Builds binaries for the host, with the features that their dependencies have in the tests' build.
///
/// If any test or example is requested, cargo adds the features that only tests need to all that it
/// builds. Without these features the agent and half of its dependencies would be built once more
/// for the demo. There are no examples. A release is built without the features of tests.
pub(crate) fn host_bins(release: bool) -> Command {
    let mut cargo = host("build", release);
    cargo
        .arg("--bins")
        .args((!release).then_some(FEATURES_OF_TESTS));
    cargo
}

/// Builds the agent, and the programs of the tests beside it. Both in one build: in two, cargo would choose the
/// features of shared dependencies anew for each.
pub(crate) fn agent_and_programs(release: bool) -> Result<()> {
    run_command(host_bins(release).args([
        "--package",
        "dataplane-agent",
        "--package",
        "dataplane-tests",
    ]))
}

/// Returns cargo for the host, with the path of the kernel programs in its environment.
pub(crate) fn host(chore: &str, release: bool) -> Command {
    let mut cargo = cargo();
    cargo
        .arg(chore)
        .args(release.then_some("--release"))
        .env("DATAPLANE_EBPF_OBJECTS", objects());
    cargo
}

/// Returns the path of a binary that cargo builds.
pub(crate) fn binary(name: &str, release: bool) -> PathBuf {
    let profile = if release { "release" } else { "debug" };
    host_target().join(profile).join(name)
}

/// Returns the folder from which the agent's build takes the kernel programs; the same as in `.cargo/config.toml`.
fn objects() -> PathBuf {
    target().join("ebpf-objects")
}

/// Copies a file if it differs. Otherwise the target keeps its time, so that the agent is not rebuilt.
fn copy_changed(from: &Path, to: &Path) -> Result<()> {
    let new = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
    if fs::read(to).is_ok_and(|old| old == new) {
        return Ok(());
    }
    fs::write(to, new).with_context(|| format!("cannot write {}", to.display()))
}

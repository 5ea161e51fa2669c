//! Finds or installs the tools that the other chores need.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, bail};

use crate::command::{find_program, is_root};
use crate::compiler::{self, Compiler};
use crate::linker;
use crate::progress::{Steps, run_quietly, say};

/// Finds or installs what building and testing needs.
///
/// Host tools (C compiler, cmake, iproute2, curl, procps) and the kernel programs' toolchain: a
/// nightly of rustup's that has rust-src and a linker that works with it, or else Debian's own
/// compiler, and bpf-linker, which is built into target/tools when the machine has none (half a
/// minute, once). Changes no default toolchain. Installs Debian packages only as root; otherwise
/// it says which command would. The other chores call it, so there is rarely a need to.
#[derive(clap::Args, Default)]
pub(crate) struct Options {}

/// Programs that the build or the tests call, and their packages.
const PROGRAMS: &[(&str, &str)] = &[
    ("cc", "gcc"),        // aws-lc-sys
    ("c++", "g++"),       // bpf-linker
    ("make", "make"),     // aws-lc-sys, by cmake
    ("cmake", "cmake"),   // aws-lc-sys
    ("ip", "iproute2"),   // tests: namespaces, routes
    ("ss", "iproute2"),   // tests: sockets and their marks
    ("curl", "curl"),     // demo
    ("sysctl", "procps"), // tests: the namespace's settings
];

/// Further programs that the test machines need, and their packages.
const PROGRAMS_OF_VM: &[(&str, &str)] = &[
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("cpio", "cpio"),   // initramfs
    ("xz", "xz-utils"), // modules
];

/// A compiler and a linker for the kernel programs.
pub(crate) struct Toolchain {
    pub(crate) compiler: Compiler,
    pub(crate) linker: PathBuf,
}

pub(crate) fn run(_options: &Options) -> Result<()> {
    ensure().map(|_| ())
}

/// Runs the chore, and returns the toolchain.
pub(crate) fn ensure() -> Result<Toolchain> {
    Setup::programs()?.toolchain()
}

/// A setup of which the programs that the host's compiler calls are there, and the kernel programs' toolchain may
/// be missing: the agent can be built while it comes.
pub(crate) struct Setup {
    steps: Steps,
    /// Packages of the kernel programs' toolchain.
    missing: Vec<&'static str>,
}

impl Setup {
    /// Runs the first half: looks at everything, and installs the missing programs.
    ///
    /// # Errors
    /// If the second half could not install what it has to, too.
    pub(crate) fn programs() -> Result<Self> {
        let mut steps = Steps::new(3);

        steps.begin("what is here");
        let programs = missing_programs(PROGRAMS);
        let missing = missing_of_toolchain();
        let all = [&programs[..], &missing[..]].concat();
        steps.end(&match all.len() {
            0 => "every package".to_owned(),
            _ => format!("not here: {}", all.join(" ")),
        });
        if !all.is_empty() {
            update(&all)?;
        }

        steps.begin("programs");
        if programs.is_empty() {
            steps.end("nothing to install");
        } else {
            install(&programs)?;
            steps.end("installed");
        }
        Ok(Self { steps, missing })
    }

    /// Runs the second half, the kernel programs' toolchain.
    pub(crate) fn toolchain(mut self) -> Result<Toolchain> {
        self.steps
            .begin("compiler and linker for the kernel programs");
        if !self.missing.is_empty() {
            install(&self.missing)?;
        }
        let toolchain = match find() {
            Some(found) => found,
            None => build_linker()?,
        };
        self.steps.end(&format!(
            "{}, {}",
            toolchain.compiler.name,
            toolchain.linker.display()
        ));
        Ok(toolchain)
    }
}

/// Finds a compiler with a linker that works with it, if both are installed.
pub(crate) fn find() -> Option<Toolchain> {
    [Compiler::nightly, Compiler::debian]
        .into_iter()
        .filter_map(|compiler| compiler())
        .find_map(|compiler| {
            let linker = linker::find(&compiler)?;
            Some(Toolchain { compiler, linker })
        })
}

fn build_linker() -> Result<Toolchain> {
    let Some(compiler) = Compiler::debian() else {
        bail!("Debian's compiler was installed and is not in /usr/bin with its library's sources");
    };
    let linker = linker::install(&compiler)?;
    Ok(Toolchain { compiler, linker })
}

/// Finds or installs the programs that the test machines need.
pub(crate) fn ensure_vm() -> Result<()> {
    let missing = missing_programs(PROGRAMS_OF_VM);
    if missing.is_empty() {
        return Ok(());
    }
    say(&format!("packages: {}", missing.join(" ")));
    update(&missing)?;
    install(&missing)
}

fn missing_programs(programs: &[(&str, &'static str)]) -> Vec<&'static str> {
    let mut missing: Vec<&str> = programs
        .iter()
        .filter(|(program, _)| find_program(program).is_none())
        .map(|(_, package)| *package)
        .collect();
    missing.dedup();
    missing
}

/// Returns the packages that are missing for a compiler and a linker of the kernel programs.
fn missing_of_toolchain() -> Vec<&'static str> {
    let mut missing = Vec::new();
    if find().is_some() {
        return missing;
    }
    let debian = Compiler::debian();
    if debian.is_none() {
        missing.extend(compiler::DEBIAN);
    }
    let linker = debian.and_then(|debian| linker::find(&debian));
    if linker.is_none() && !linker::can_build() {
        missing.extend(linker::DEBIAN);
    }
    missing
}

/// Updates the lists of Debian's packages: on a fresh machine they are empty, or name versions that are gone. Fails
/// with the reason and what to do if `packages` cannot be installed here.
fn update(packages: &[&str]) -> Result<()> {
    let list = packages.join(" ");
    if !Path::new("/etc/debian_version").exists() {
        bail!(
            "this is not Debian: install what brings these by other means: {list} (for the kernel \
             programs also: `rustup toolchain install nightly --component rust-src --component \
             clippy && cargo install bpf-linker@{}`)",
            linker::VERSION
        );
    }
    if !is_root() {
        bail!(
            "not root: run `sudo apt-get update && sudo apt-get install --no-install-recommends -y \
             {list}`, then this again"
        );
    }
    run_quietly("apt-get-update", apt().arg("update"))
}

/// Installs Debian packages, all in one go.
fn install(packages: &[&str]) -> Result<()> {
    run_quietly(
        "apt-get-install",
        apt()
            .args(["install", "--no-install-recommends", "-y"])
            .args(packages),
    )
}

/// Returns `apt-get`, set to wait for its lock.
pub(crate) fn apt() -> Command {
    let mut apt = Command::new("apt-get");
    apt.env("DEBIAN_FRONTEND", "noninteractive")
        // Another process may hold the lock, such as an automatic upgrade at boot.
        .args(["-q", "-o", "DPkg::Lock::Timeout=300"]);
    apt
}

//! Running other programs, and the folders that they work in.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use anyhow::{Context, Result, bail, ensure};

/// Runs `command`, naming it when it fails.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command
        .status()
        .with_context(|| format!("cannot start `{}`", shown(command)))?;
    ensure!(status.success(), "`{}`: {status}", shown(command));
    Ok(())
}

/// Returns the standard output of `command`; its standard error is only shown if it fails.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let done = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start `{}`", shown(command)))?;
    ensure!(
        done.status.success(),
        "`{}`: {}: {}",
        shown(command),
        done.status,
        String::from_utf8_lossy(&done.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&done.stdout).into_owned())
}

/// Returns all that `command` prints, also to standard error, and its exit status.
pub(crate) fn all_output(command: &mut Command) -> Result<(ExitStatus, String)> {
    let done = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start `{}`", shown(command)))?;
    let all = [done.stdout, done.stderr].concat();
    Ok((done.status, String::from_utf8_lossy(&all).into_owned()))
}

/// Returns the command as one would type it: with the variables that are set for it, without those that are removed.
pub(crate) fn shown(command: &Command) -> String {
    let set = command
        .get_envs()
        .filter_map(|(name, value)| Some((name, value?)))
        .map(|(name, value)| format!("{}={value:?}", name.display()));
    let words = std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| word.display().to_string());
    set.chain(words).collect::<Vec<_>>().join(" ")
}

/// Returns the cargo that runs this chore, in the workspace: for everything on the host.
pub(crate) fn cargo() -> Command {
    let mut cargo = Command::new(variable("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(workspace());
    // `cargo run` sets these for this process only; build scripts that read them would run again.
    for name in own_variables() {
        cargo.env_remove(name);
    }
    cargo
}

/// Returns a program of another toolchain, without the environment variables of this process' cargo and
/// rustup, which would make it use theirs.
pub(crate) fn foreign(program: &Path) -> Command {
    let mut command = Command::new(program);
    command.current_dir(workspace());
    for name in own_variables() {
        command.env_remove(name);
    }
    for name in [
        "CARGO",
        "CARGO_BUILD_TARGET",
        "CARGO_ENCODED_RUSTFLAGS",
        "CARGO_TARGET_DIR",
        "LD_LIBRARY_PATH",
        "RUSTC",
        "RUSTC_WORKSPACE_WRAPPER",
        "RUSTC_WRAPPER",
        "RUSTDOC",
        "RUSTFLAGS",
        "RUSTUP_TOOLCHAIN",
        "RUSTUP_TOOLCHAIN_SOURCE",
    ] {
        command.env_remove(name);
    }
    command
}

/// Returns the root folder of the repository.
pub(crate) fn workspace() -> PathBuf {
    // Read at run time: a target folder shared by two checkouts may hold the other one's xtask.
    let here = variable("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    here.parent().unwrap_or(&here).to_owned()
}

/// Returns the folder in which cargo builds for the host.
pub(crate) fn host_target() -> PathBuf {
    variable("CARGO_TARGET_DIR").map_or_else(target, |folder| workspace().join(folder))
}

/// Returns the folder for everything else that can be rebuilt: tools, kernel programs, logs.
pub(crate) fn target() -> PathBuf {
    workspace().join("target")
}

/// Returns the first executable file of that name on the path.
pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    use std::os::unix::fs::PermissionsExt;
    let path = variable("PATH")?;
    // The folders of root's programs are not on every user's path.
    env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|folder| folder.join(name))
        .find(|file| {
            file.metadata()
                .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
        })
}

/// Returns `true` if this process runs as root.
pub(crate) fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt;
    Path::new("/proc/self")
        .metadata()
        .is_ok_and(|own| own.uid() == 0)
}

/// Fails without root; `what` needs it, to do `why`.
pub(crate) fn require_root(what: &str, why: &str) -> Result<()> {
    if !is_root() {
        bail!("{what} needs root ({why}): run `sudo -E env \"PATH=$PATH\" cargo xtask …`");
    }
    Ok(())
}

/// Returns an environment variable that is set, and not empty.
#[expect(
    clippy::disallowed_methods,
    reason = "cargo and the shell speak to a chore by its environment"
)]
pub(crate) fn variable(name: &str) -> Option<PathBuf> {
    env::var_os(name)
        .filter(|value| !value.is_empty())
        .map(PathBuf::from)
}

/// Returns the names of the variables that cargo set for this process only.
fn own_variables() -> impl Iterator<Item = String> {
    env::vars_os()
        .filter_map(|(name, _)| name.into_string().ok())
        .filter(|name| {
            [
                "CARGO_PKG_",
                "CARGO_MANIFEST_",
                "CARGO_BIN_",
                "CARGO_CRATE_",
                "CARGO_PRIMARY_",
            ]
            .iter()
            .any(|prefix| name.starts_with(prefix))
        })
}

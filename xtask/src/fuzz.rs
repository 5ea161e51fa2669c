//! Fuzzes the parsers of bytes from outside.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::command::{self, cargo, find_program, foreign, output, target, variable, workspace};
use crate::progress::{Steps, run_quietly, say};

/// Fuzzes what reads bytes from outside: each target of tests/fuzz, or one of them.
///
/// Builds cargo-fuzz into target/tools when the machine has none (some minutes, once), and the
/// targets with the compiler that everything else is built with. Starts from the inputs in
/// tests/fuzz/corpus, which `cargo xtask check tests` replays, and keeps what it finds in
/// target/fuzz/corpus, to go on from there the next time. An input that breaks a target is told with
/// its path.
///
/// Examples: `cargo xtask fuzz --list`; `cargo xtask fuzz headers --for 10m`; `cargo xtask fuzz
/// headers --input target/fuzz/artifacts/headers/crash-…` runs one input again; `cargo xtask fuzz
/// headers --keep` adds to tests/fuzz/corpus the least of what was found that reaches more code.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// The target; all of them by default, which share the time.
    target: Option<String>,
    /// How long, such as 90s, 10m or 2h.
    #[arg(long = "for", value_name = "TIME", default_value = "1m", value_parser = time)]
    time: Duration,
    /// Runs the target once, on this file.
    #[arg(long, value_name = "FILE", requires = "target")]
    input: Option<PathBuf>,
    /// Adds to the corpus that is in the repository what reaches code that it does not.
    #[arg(long, conflicts_with = "input")]
    keep: bool,
    /// Lists the targets.
    #[arg(long)]
    list: bool,
}

/// The version of cargo-fuzz.
const VERSION: &str = "0.13.2";
/// Most bytes of an input. Larger ones find little more, and are slow.
const MAX_INPUT: u32 = 4096;
/// An input that takes longer counts as a crash.
const SECONDS_PER_INPUT: u32 = 10;

pub(crate) fn run(options: &Options) -> Result<()> {
    let all = targets()?;
    if options.list {
        all.iter().for_each(|name| say(name));
        return Ok(());
    }
    let chosen = match &options.target {
        None => all,
        Some(name) if all.contains(name) => vec![name.clone()],
        Some(name) => bail!("no target `{name}`; there are: {}", all.join(" ")),
    };
    let tool = match find()? {
        Some(tool) => tool,
        None => install()?,
    };
    let objects = objects()?;
    let mut steps = Steps::new(chosen.len());
    let share = options.time / u32::try_from(chosen.len())?;
    for name in &chosen {
        steps.begin(name);
        let fuzzed = Target {
            tool: &tool,
            name,
            objects: &objects,
        };
        run_quietly(&format!("fuzz-build-{name}"), &mut fuzzed.build())?;
        steps.end(&match (&options.input, options.keep) {
            (Some(input), _) => fuzzed.repeat(input)?,
            (None, true) => fuzzed.keep()?,
            (None, false) => fuzzed.search(share)?,
        });
    }
    Ok(())
}

/// A fuzz target.
struct Target<'a> {
    tool: &'a Path,
    name: &'a str,
    /// The folder of stand-ins for the kernel programs.
    objects: &'a Path,
}

impl Target<'_> {
    /// Generates inputs for this time.
    fn search(&self, time: Duration) -> Result<String> {
        let (found, crashes) = (self.found()?, self.crashes()?);
        let before = files(&crashes)?;
        let log = format!("fuzz-{}", self.name);
        let done = run_quietly(
            &log,
            self.built()?
                .args([&found, &self.kept()])
                .arg(format!("-max_total_time={}", time.as_secs().max(1)))
                .arg(format!("-max_len={MAX_INPUT}"))
                .arg(format!("-timeout={SECONDS_PER_INPUT}")),
        );
        let after = files(&crashes)?;
        match (after.difference(&before).next(), done) {
            (Some(input), done) => Err(self.broken(input, done.err())),
            (None, Err(error)) => Err(error),
            (None, Ok(())) => Ok(format!(
                "nothing found; {} inputs in {}",
                files(&found)?.len(),
                found.display()
            )),
        }
    }

    /// Runs the target on one input.
    fn repeat(&self, input: &Path) -> Result<String> {
        let input = std::path::absolute(input)?;
        ensure!(input.is_file(), "{} is no file", input.display());
        command::run(self.built()?.arg(&input))?;
        Ok("it holds".to_owned())
    }

    /// Adds inputs that were found to the repository.
    fn keep(&self) -> Result<String> {
        let (found, kept) = (self.found()?, self.kept());
        let before = files(&kept)?.len();
        run_quietly(
            &format!("fuzz-keep-{}", self.name),
            self.built()?
                .args([&kept, &found])
                .arg("-set_cover_merge=1")
                .arg(format!("-max_len={MAX_INPUT}")),
        )?;
        let more = files(&kept)?.len() - before;
        Ok(format!("{more} more in {}", kept.display()))
    }

    /// Builds the target, and returns its binary. It is run directly, since cargo-fuzz would leave folders of its
    /// own in the repository.
    fn built(&self) -> Result<Command> {
        let platforms = files(&builds())?;
        let mut programs = platforms
            .iter()
            .map(|platform| platform.join("release").join(self.name));
        let built = programs.find(|program| program.is_file());
        let missing = || format!("no {} in {}", self.name, builds().display());
        let mut built = Command::new(built.with_context(missing)?);
        built.arg(format!("-artifact_prefix={}/", self.crashes()?.display()));
        Ok(built)
    }

    /// Returns the cargo-fuzz command that builds it.
    fn build(&self) -> Command {
        let mut fuzz = Command::new(self.tool);
        fuzz.current_dir(folder())
            .env("CARGO", cargo().get_program())
            // Coverage needs unstable settings of the compiler, which this allows on stable.
            .env("RUSTC_BOOTSTRAP", "1")
            // The release profile has LTO; here that would take minutes for nothing.
            .env("CARGO_PROFILE_RELEASE_LTO", "off")
            .env("DATAPLANE_EBPF_OBJECTS", self.objects)
            .args(["fuzz", "build", "--fuzz-dir", "."])
            // Sanitizers need a standard library that is built with them, and this code is safe Rust.
            .args(["--sanitizer", "none", "--features", "libfuzzer", "--target-dir"])
            .arg(builds())
            .arg(self.name);
        fuzz
    }

    /// Returns the folder of the repository's inputs.
    fn kept(&self) -> PathBuf {
        folder().join("corpus").join(self.name)
    }

    /// Returns the folder of inputs that were found on this machine.
    fn found(&self) -> Result<PathBuf> {
        made(own().join("corpus").join(self.name))
    }

    /// Returns the folder of inputs that broke the target.
    fn crashes(&self) -> Result<PathBuf> {
        made(own().join("artifacts").join(self.name))
    }

    fn broken(&self, input: &Path, error: Option<anyhow::Error>) -> anyhow::Error {
        let (name, input) = (self.name, input.display());
        let error = error.map_or_else(String::new, |error| format!("{error:#}\n\n"));
        anyhow::anyhow!(
            "{error}target {name} breaks on {input}\n\
             again: cargo xtask fuzz {name} --input {input}\n\
             once it is mended: cp {input} tests/fuzz/corpus/{name}/, for all checks to replay it"
        )
    }
}

/// Returns a folder with empty kernel programs, which are not fuzzed. If there were none, or changed ones, the
/// agent would be rebuilt for each target.
fn objects() -> Result<PathBuf> {
    let folder = made(own().join("objects"))?;
    for name in ["node", "pod"] {
        let object = folder.join(name);
        if !object.exists() {
            fs::write(&object, "").with_context(|| format!("cannot write {}", object.display()))?;
        }
    }
    Ok(folder)
}

fn folder() -> PathBuf {
    workspace().join("tests/fuzz")
}

fn own() -> PathBuf {
    target().join("fuzz")
}

/// Returns the folder in which cargo-fuzz builds, with a subfolder for each platform.
fn builds() -> PathBuf {
    own().join("build")
}

fn made(folder: PathBuf) -> Result<PathBuf> {
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    Ok(folder)
}

/// Returns the names of the files in tests/fuzz/targets.
fn targets() -> Result<Vec<String>> {
    let files = files(&folder().join("targets"))?;
    let names = files.iter().filter_map(|path| path.file_stem()?.to_str());
    Ok(names.map(str::to_owned).collect())
}

fn files(folder: &Path) -> Result<BTreeSet<PathBuf>> {
    let entries =
        fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    entries.map(|entry| Ok(entry?.path())).collect()
}

/// Finds the project's own cargo-fuzz, or one of the same version that is on the machine.
fn find() -> Result<Option<PathBuf>> {
    let home = variable("CARGO_HOME").or_else(|| Some(variable("HOME")?.join(".cargo")));
    let places = [
        Some(target().join("tools/bin/cargo-fuzz")),
        find_program("cargo-fuzz"),
        home.map(|home| home.join("bin/cargo-fuzz")),
    ];
    for tool in places.into_iter().flatten().filter(|tool| tool.is_file()) {
        let version = output(foreign(&tool).args(["fuzz", "--version"]))?;
        if version.split_whitespace().nth(1) == Some(VERSION) {
            return Ok(Some(tool));
        }
    }
    Ok(None)
}

/// Builds cargo-fuzz into the project's cache.
fn install() -> Result<PathBuf> {
    say("cargo-fuzz");
    let tools = target().join("tools");
    let build = tools.join("build-cargo-fuzz");
    run_quietly(
        "cargo-fuzz",
        cargo()
            .args(["install", "--locked", "--force", "--root"])
            .arg(&tools)
            .arg(format!("cargo-fuzz@{VERSION}"))
            .env("CARGO_TARGET_DIR", &build),
    )?;
    fs::remove_dir_all(&build).with_context(|| format!("cannot remove {}", build.display()))?;
    Ok(tools.join("bin/cargo-fuzz"))
}

/// Parses a time such as `90s`, `10m` or `2h`.
fn time(text: &str) -> Result<Duration, String> {
    let wrong = || format!("`{text}` is no time: write it as 90s, 10m or 2h");
    let (number, unit) = text
        .split_at_checked(text.len().saturating_sub(1))
        .ok_or_else(wrong)?;
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let seconds = match unit {
        "s" => Some(1),
        "m" => Some(60),
        "h" => Some(3600),
        _ => None,
    };
    let seconds = seconds
        .and_then(|of| number.checked_mul(of))
        .ok_or_else(wrong)?;
    Ok(Duration::from_secs(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_has_a_number_and_a_unit() {
        for (text, seconds) in [("90s", 90), ("10m", 600), ("2h", 7200)] {
            assert_eq!(time(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
        for text in [
            "",
            "s",
            "10",
            "10 m",
            "-1s",
            "1d",
            "1é",
            "99999999999999999999s",
            "9999999999999999999h",
        ] {
            assert!(time(text).is_err(), "{text}");
        }
    }
}

//! Builds every test, runs them here, and counts.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::command::{require_root, shown};
use crate::progress::say;
use crate::{build, setup};

/// Runs all tests on this machine, as root: unit tests, then those on the real kernel.
///
/// Builds what they need first, all in one go. The tests of package dataplane-tests make nodes and
/// pods of network namespaces and cgroups, load the kernel programs, and take everything away
/// again; none is skipped for want of a right. Prints a table, and last `N passed, N failed`.
///
/// Examples: `cargo xtask test capture` runs what is in tests/cases/capture.rs; `cargo xtask test
/// held` runs the tests whose name contains `held`, wherever they are; `cargo xtask test --
/// --nocapture --test-threads=1` hands on what libtest takes.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Tests what is shipped: everything optimised.
    #[arg(long)]
    release: bool,
    /// Runs only the file of tests/cases of this name, or the tests whose name contains it.
    filter: Option<String>,
    /// For libtest, such as --nocapture.
    #[arg(last = true)]
    libtest: Vec<String>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    require_root(
        "testing",
        "network namespaces, cgroups, bpf(2); nothing is skipped",
    )?;
    build::kernel_programs(&setup::ensure()?)?;
    say("agent and tests");
    let built = Built::new(options.release)?;
    let (tests, filter) = built.chosen(options.filter.as_deref());

    let mut rows = Vec::new();
    for (index, test) in tests.iter().enumerate() {
        say(&format!("[{}/{}] {}", index + 1, tests.len(), test.name));
        let outcome = test.run(&built, filter, &options.libtest)?;
        rows.push((test.name.as_str(), outcome));
    }
    if !report(&rows) {
        // Without another word: the count is the last line.
        std::process::exit(1);
    }
    Ok(())
}

/// What the tests' build made.
struct Built {
    agent: PathBuf,
    /// What plays the pods' applications.
    app: Option<PathBuf>,
    tests: Vec<Executable>,
}

/// One test executable.
struct Executable {
    /// Its package and file, for people.
    name: String,
    /// Its file in tests/cases, if it is of one.
    case: Option<String>,
    path: PathBuf,
    /// The folder of its package, where it runs.
    folder: PathBuf,
}

/// What a test executable said at its end.
#[derive(Clone, Copy, Default)]
struct Outcome {
    passed: u64,
    failed: u64,
    seconds: f32,
}

impl Built {
    /// One build for all: asked for package by package, cargo would choose the features of shared
    /// dependencies anew, and build those twice.
    fn new(release: bool) -> Result<Self> {
        let mut cargo = build::host("build", release);
        cargo
            .args(["--workspace", "--lib", "--bins", "--tests"])
            .arg("--message-format=json-render-diagnostics")
            .stdout(Stdio::piped());
        let mut child = cargo
            .spawn()
            .with_context(|| format!("cannot start `{}`", shown(&cargo)))?;
        let messages = BufReader::new(child.stdout.take().context("no output of cargo")?);
        let mut programs = Vec::new();
        let mut tests = Vec::new();
        for line in messages.lines() {
            let Ok(message) = serde_json::from_str::<Value>(&line?) else {
                continue; // not cargo's own
            };
            let (Some(path), Some(target), Some(manifest)) = (
                message["executable"].as_str(),
                message["target"]["name"].as_str(),
                message["manifest_path"].as_str(),
            ) else {
                continue; // not an executable
            };
            if message["profile"]["test"] != true {
                programs.push((target.to_owned(), PathBuf::from(path)));
                continue;
            }
            let folder = Path::new(manifest)
                .parent()
                .context("a manifest in no folder")?;
            tests.push(Executable::new(
                target,
                &message["target"]["kind"][0],
                path,
                folder,
            ));
        }
        let status = child.wait()?;
        ensure!(status.success(), "`{}`: {status}", shown(&cargo));

        let program = |name: &str| {
            let found = programs.iter().find(|(target, _)| target == name);
            found.map(|(_, path)| path.clone())
        };
        // Unit tests first: they are quick, and what they find explains the rest.
        tests.sort_by(|a, b| (&a.case, &a.name).cmp(&(&b.case, &b.name)));
        Ok(Self {
            agent: program("dataplane").context("the build made no `dataplane`")?,
            app: program("dataplane-test-app"),
            tests,
        })
    }

    /// The executables that a filter is for, and what of it is left for them.
    fn chosen<'a>(&self, filter: Option<&'a str>) -> (Vec<&Executable>, Option<&'a str>) {
        let named = |test: &&Executable| test.case.is_some() && test.case.as_deref() == filter;
        let cases: Vec<_> = self.tests.iter().filter(named).collect();
        if cases.is_empty() {
            (self.tests.iter().collect(), filter)
        } else {
            (cases, None)
        }
    }
}

impl Executable {
    fn new(target: &str, kind: &Value, path: &str, folder: &Path) -> Self {
        let package = folder.file_name().unwrap_or_default().to_string_lossy();
        let name = match kind.as_str() {
            Some("test") => format!("{package}: {target}"),
            Some("bin") => format!("{package}: unit tests of binary {target}"),
            _ => format!("{package}: unit tests"),
        };
        Self {
            name,
            case: (kind == "test").then(|| target.to_owned()),
            path: path.into(),
            folder: folder.to_owned(),
        }
    }

    fn run(&self, built: &Built, filter: Option<&str>, libtest: &[String]) -> Result<Outcome> {
        let started = Instant::now();
        let mut command = Command::new(&self.path);
        command
            .args(filter)
            .args(libtest)
            .current_dir(&self.folder)
            .env("CARGO_MANIFEST_DIR", &self.folder)
            .env("DATAPLANE_BIN", &built.agent)
            .stdout(Stdio::piped());
        if let Some(app) = &built.app {
            command.env("DATAPLANE_TEST_APP", app);
        }
        let mut child = command
            .spawn()
            .with_context(|| format!("cannot start `{}`", shown(&command)))?;
        let lines = BufReader::new(child.stdout.take().context("no output of the test")?);
        let mut said = None;
        for line in lines.split(b'\n') {
            let line = line?;
            let line = String::from_utf8_lossy(&line);
            if let Some(outcome) = Outcome::of(&line) {
                said = Some(outcome);
            } else if !line.is_empty() && !line.starts_with("running ") {
                say(&line);
            }
        }
        let status = child.wait()?;
        let mut outcome = said.unwrap_or_default();
        if !status.success() && outcome.failed == 0 {
            // It died before it could count: that is a failure too.
            say(&format!("{}: {status}", self.name));
            outcome.failed = 1;
        }
        outcome.seconds = started.elapsed().as_secs_f32();
        Ok(outcome)
    }
}

impl Outcome {
    /// Reads `test result: ok. 3 passed; 0 failed; …`.
    fn of(line: &str) -> Option<Self> {
        let counts = line.strip_prefix("test result: ")?;
        let count = |word: &str| {
            counts
                .split(['.', ';'])
                .find_map(|part| part.trim().strip_suffix(word)?.trim().parse().ok())
        };
        Some(Self {
            passed: count("passed")?,
            failed: count("failed")?,
            seconds: 0.0,
        })
    }
}

/// Prints the table and the closing line; tells whether tests ran, and none failed.
fn report(rows: &[(&str, Outcome)]) -> bool {
    let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    say("");
    say(&format!("{:width$}  passed  failed  seconds", ""));
    let (mut passed, mut failed) = (0, 0);
    for (name, outcome) in rows {
        if outcome.passed + outcome.failed == 0 {
            continue; // a binary without tests of its own, or none that the filter names
        }
        say(&format!(
            "{name:width$}  {:6}  {:6}  {:7.1}",
            outcome.passed, outcome.failed, outcome.seconds
        ));
        passed += outcome.passed;
        failed += outcome.failed;
    }
    say("");
    if passed + failed == 0 {
        say("no test ran, which is a failure");
    }
    say(&format!("{passed} passed, {failed} failed"));
    passed > 0 && failed == 0
}

#[cfg(test)]
mod tests {
    use super::Outcome;

    #[test]
    fn counts_are_read_from_libtests_last_line() {
        let line = "test result: FAILED. 12 passed; 3 failed; 1 ignored; 0 measured; 2 filtered \
                    out; finished in 0.01s";
        let outcome = Outcome::of(line).unwrap();
        assert_eq!((outcome.passed, outcome.failed), (12, 3));
        assert!(Outcome::of("test decide::tests::steers ... ok").is_none());
    }
}

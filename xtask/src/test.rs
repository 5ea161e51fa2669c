//! Builds every test, runs them here, and counts.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::build;
use crate::command::{output, require_root, run as run_command, shown, variable};
use crate::progress::say;

/// The variable by which libtest takes the number of tests that run beside each other.
const THREADS: &str = "RUST_TEST_THREADS";
/// Tests of tests/cases that run beside each other, per processor: mostly they wait for what an agent, a timer of
/// the kernel or a peer does.
const CASES_PER_PROCESSOR: usize = 3;

/// Runs all tests on this machine, as root: unit tests, then those on the real kernel.
///
/// Builds what they need first, all in one go. The tests of package dataplane-tests make nodes and
/// pods of network namespaces and cgroups, load the kernel programs, and take everything away
/// again; none is skipped for want of a right. Prints a table, and last `N passed, N failed`.
///
/// Examples: `cargo xtask test capture` runs what is in tests/cases/capture.rs; `cargo xtask test
/// held` runs the tests whose name contains `held`, wherever they are; `cargo xtask test --
/// --nocapture --test-threads=1` hands on what libtest takes. Those of tests/cases run three per
/// processor beside each other, or as many as RUST_TEST_THREADS says.
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
    let built = Built::new(options.release)?;
    let (tests, filter) = built.chosen(options.filter.as_deref());

    let rows = run_all(&built, &tests, filter, &options.libtest)?;
    if !report(&rows) {
        // Without a further message: the count has to be the last line.
        std::process::exit(1);
    }
    Ok(())
}

/// Runs these executables here, one after another.
pub(crate) fn run_all(
    built: &Built,
    tests: &[&Executable],
    filter: Option<&str>,
    libtest: &[String],
) -> Result<Vec<(String, Outcome)>> {
    let mut rows = Vec::new();
    for (index, test) in tests.iter().enumerate() {
        say(&format!("[{}/{}] {}", index + 1, tests.len(), test.name));
        rows.push((test.name.clone(), test.run(built, filter, libtest)?));
    }
    Ok(rows)
}

/// The results of the tests' build.
pub(crate) struct Built {
    release: bool,
    programs: Vec<(String, PathBuf)>,
    tests: Vec<Executable>,
    /// The agent with the layout of maps that only tests have, once it is built.
    other_agent: OnceLock<PathBuf>,
}

/// A test executable.
pub(crate) struct Executable {
    /// Its package and file, for people.
    pub(crate) name: String,
    /// The name of its file in tests/cases, if it has one there.
    case: Option<String>,
    /// Its path.
    pub(crate) path: PathBuf,
    /// The folder of its package, where it runs.
    folder: PathBuf,
}

/// The outcome of a test executable.
#[derive(Clone, Default)]
pub(crate) struct Outcome {
    /// The names of the tests that passed.
    pub(crate) names: Vec<String>,
    /// Number of tests that passed.
    pub(crate) passed: u64,
    /// Number of tests that failed.
    pub(crate) failed: u64,
    /// `true` once it has printed its totals, which it does last.
    counted: bool,
    /// Its run time.
    pub(crate) seconds: f32,
}

impl Built {
    /// Builds everything in one go: package by package, cargo would choose the features of shared dependencies
    /// anew, and build them twice.
    pub(crate) fn new(release: bool) -> Result<Self> {
        build::with_kernel_programs(|| Self::build(release))
    }

    fn build(release: bool) -> Result<Self> {
        say("agent and tests");
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

        // Unit tests come first: they are quick, and their failures explain the rest.
        tests.sort_by(|a, b| (&a.case, &a.name).cmp(&(&b.case, &b.name)));
        Ok(Self {
            release,
            programs,
            tests,
            other_agent: OnceLock::new(),
        })
    }

    /// The agent with the layout of maps that only tests have. It is built once.
    ///
    /// # Errors
    /// It cannot be built.
    pub(crate) fn other_agent(&self) -> Result<&Path> {
        if let Some(built) = self.other_agent.get() {
            return Ok(built);
        }
        let built = self.build_other_agent()?;
        Ok(self.other_agent.get_or_init(|| built))
    }

    fn build_other_agent(&self) -> Result<PathBuf> {
        say("agent with another layout");
        let agent = self.program("dataplane")?;
        let (kept, other) = (
            agent.with_file_name("dataplane-kept"),
            agent.with_file_name("dataplane-other-layout"),
        );
        let rename = |from: &Path, to: &Path| {
            fs::rename(from, to).with_context(|| format!("cannot rename {}", from.display()))
        };
        // Cargo writes it in place of the real one.
        rename(agent, &kept)?;
        let mut cargo = build::host_bins(self.release);
        let features = ["--features", "dataplane-agent/other-layout"];
        cargo.args(["--package", "dataplane-agent"]).args(features);
        let built = run_command(&mut cargo).and_then(|()| rename(agent, &other));
        rename(&kept, agent)?;
        built.map(|()| other)
    }

    /// Returns the path of a program that was built.
    pub(crate) fn program(&self, name: &str) -> Result<&Path> {
        let mut programs = self.programs.iter();
        let found = programs.find(|(target, _)| target == name);
        let (_, path) = found.with_context(|| format!("the build made no `{name}`"))?;
        Ok(path)
    }

    /// Returns the executables of tests/cases, which need the real kernel, that a filter selects, and the filter to
    /// pass to them.
    pub(crate) fn chosen_cases<'a>(
        &self,
        filter: Option<&'a str>,
    ) -> (Vec<&Executable>, Option<&'a str>) {
        let (mut chosen, filter) = self.chosen(filter);
        chosen.retain(|test| test.case.is_some());
        (chosen, filter)
    }

    /// Returns the executables that a filter selects, and the filter to pass to them.
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

    /// Returns the names of its tests that a filter selects.
    pub(crate) fn list(&self, filter: Option<&str>) -> Result<Vec<String>> {
        let mut command = Command::new(&self.path);
        let listed = output(command.args(filter).args(["--list", "--format", "terse"]))?;
        let names = listed
            .lines()
            .filter_map(|line| line.strip_suffix(": test"));
        Ok(names.map(str::to_owned).collect())
    }

    /// Returns `true` if one of its tests that a filter selects starts an agent with another layout.
    pub(crate) fn wants_other_agent(&self, filter: Option<&str>) -> Result<bool> {
        Ok(self.case.as_deref() == Some("upgrade") && !self.list(filter)?.is_empty())
    }

    fn run(&self, built: &Built, filter: Option<&str>, libtest: &[String]) -> Result<Outcome> {
        let started = Instant::now();
        let mut command = Command::new(&self.path);
        command
            .args(filter)
            .args(libtest)
            .current_dir(&self.folder)
            .env("CARGO_MANIFEST_DIR", &self.folder)
            .env("DATAPLANE_BIN", built.program("dataplane")?)
            .env("DATAPLANE_TEST_APP", built.program("dataplane-test-app")?)
            .stdout(Stdio::piped());
        if self.case.is_some() && variable(THREADS).is_none() {
            let threads = thread::available_parallelism()?.get() * CASES_PER_PROCESSOR;
            command.env(THREADS, threads.to_string());
        }
        if self.wants_other_agent(filter)? {
            command.env("DATAPLANE_TEST_OTHER", built.other_agent()?);
        }
        let mut child = command
            .spawn()
            .with_context(|| format!("cannot start `{}`", shown(&command)))?;
        let lines = BufReader::new(child.stdout.take().context("no output of the test")?);
        let mut outcome = Outcome::default();
        for line in lines.split(b'\n') {
            let line = line?;
            let line = String::from_utf8_lossy(&line);
            if outcome.parse_line(&line) {
                say(&line);
            }
        }
        let status = child.wait()?;
        outcome.end(&self.name, status.success(), &status.to_string());
        outcome.seconds = started.elapsed().as_secs_f32();
        Ok(outcome)
    }
}

impl Outcome {
    /// Evaluates a line of libtest's output; returns `true` if the line is to be shown.
    pub(crate) fn parse_line(&mut self, line: &str) -> bool {
        if let Some(counts) = line.strip_prefix("test result: ") {
            // `test result: ok. 3 passed; 0 failed; …`
            let count = |word: &str| {
                let mut parts = counts.split(['.', ';']);
                parts.find_map(|part| part.trim().strip_suffix(word)?.trim().parse().ok())
            };
            self.counted = true;
            self.passed = count("passed").unwrap_or(0);
            self.failed = count("failed").unwrap_or(0);
            return false;
        }
        if let Some(name) = line
            .strip_prefix("test ")
            .and_then(|line| line.strip_suffix(" ... ok"))
        {
            self.names.push(name.to_owned());
        }
        !line.is_empty() && !line.starts_with("running ")
    }

    /// Counts a failure if the executable printed no totals, or failed although none of its tests did.
    pub(crate) fn end(&mut self, name: &str, good: bool, how: &str) {
        if !self.counted {
            say(&format!("{name}: no result: {how}"));
        } else if !good && self.failed == 0 {
            say(&format!("{name}: {how}"));
        } else {
            return;
        }
        self.failed = self.failed.max(1);
    }
}

/// Prints the table and the closing line; returns `true` if tests ran, and none failed.
pub(crate) fn report(rows: &[(String, Outcome)]) -> bool {
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
        let mut outcome = Outcome::default();
        assert!(!outcome.parse_line(line));
        assert_eq!((outcome.passed, outcome.failed), (12, 3));
        assert!(outcome.parse_line("test decide::tests::steers ... ok"));
        assert!(outcome.parse_line("test decide::tests::fails ... FAILED"));
        assert_eq!(outcome.names, ["decide::tests::steers"]);
    }

    #[test]
    fn an_end_without_a_result_is_a_failure() {
        let mut outcome = Outcome::default();
        outcome.parse_line("test decide::tests::steers ... ok");
        outcome.end("capture", true, "0");
        assert_eq!(outcome.failed, 1);
    }
}

//! What each kernel said, side by side.

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use super::kernel::Kernel;
use super::machine::{self, Accelerator};
use crate::command::{output, workspace};
use crate::progress::say;
use crate::test::{self, Built, Outcome};

/// Longer than any suite takes on a slow machine.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(60 * 60);

/// One kernel.
pub(crate) struct Column {
    /// What it was asked for by.
    pub(crate) kernel: String,
    release: String,
    /// What `dataplane check` said.
    check: String,
    /// What `dataplane load` said.
    load: String,
    tests: Vec<(String, Outcome)>,
    /// What of the agent did not end well, and how.
    refused: Vec<String>,
}

/// Rows by name, a cell for each column.
pub(crate) struct Table {
    rows: Vec<(String, Vec<String>)>,
}

impl Column {
    /// This machine.
    pub(crate) fn here(built: &Built) -> Result<Self> {
        say("this machine");
        let agent = built.program("dataplane")?;
        let check = output(Command::new(agent).arg("check"))?;
        let load = output(Command::new(agent).arg("load"))?;
        let tests = test::run_all(built, &built.cases(), None, &[])?;
        let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
        Ok(Self {
            kernel: "this machine".into(),
            release: release.trim().to_owned(),
            check,
            load,
            refused: Vec::new(),
            tests: tests
                .into_iter()
                .map(|(name, outcome)| (name.to_owned(), outcome))
                .collect(),
        })
    }

    /// A machine with this kernel.
    pub(crate) fn inside(
        kernel: &Kernel,
        built: &Built,
        accelerator: Accelerator,
        append: &str,
        tests: bool,
    ) -> Result<Self> {
        let mut image = machine::image(built.program("init")?)?;
        image.modules(&kernel.modules()?)?;
        let (agent, app) = ("/dataplane", "/dataplane-test-app");
        image.program(built.program("dataplane")?, agent)?;
        image.program(built.program("dataplane-test-app")?, app)?;
        let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
        let mut plan: Vec<Vec<String>> = vec![words(&[agent, "check"]), words(&[agent, "load"])];
        let cases = if tests { built.cases() } else { Vec::new() };
        for (number, case) in cases.iter().enumerate() {
            let place = format!("/case-{number}");
            image.program(&case.path, &place)?;
            plan.push(words(&[&place, "--color", "never"]));
        }
        let image = image.pack(&plan)?;

        let mut release = kernel.release.clone();
        let mut said = vec![String::new(); 2];
        let mut outcomes = vec![Outcome::default(); cases.len()];
        let mut refused = Vec::new();
        let (mut current, mut ended, mut started) = (None, 0, Instant::now());
        let append =
            format!("DATAPLANE_BIN={agent} DATAPLANE_TEST_APP={app} RUST_BACKTRACE=0 {append}");
        machine::boot(kernel, accelerator, &image, &append, PATIENCE, |line| {
            if let Some(number) = line.strip_prefix(">>> ") {
                current = number.parse::<usize>().ok();
                started = Instant::now();
                if let Some(case) = current.and_then(|number| cases.get(number.checked_sub(2)?)) {
                    say(&format!("{}: {}", kernel.name, case.name));
                }
            } else if let Some((number, how)) = line
                .strip_prefix("<<< ")
                .and_then(|end| end.split_once(": "))
            {
                ended += 1;
                let number: usize = number.parse().unwrap_or(0);
                if let Some(place) = number.checked_sub(2)
                    && let Some(outcome) = outcomes.get_mut(place)
                {
                    outcome.end(&cases[place].name, how == "0", how);
                    outcome.seconds = started.elapsed().as_secs_f32();
                } else if how != "0" {
                    refused.push(format!("`dataplane {}` ended with {how}", plan[number][1]));
                }
                current = None;
            } else {
                match current {
                    Some(number) if number < 2 => {
                        say(line);
                        said[number].push_str(line);
                        said[number].push('\n');
                    }
                    Some(number) => {
                        if outcomes[number - 2].hear(line) {
                            say(line);
                        }
                    }
                    None => {
                        say(line);
                        if let Some(own) = line.strip_prefix("Linux ") {
                            own.clone_into(&mut release);
                        }
                    }
                }
            }
        })?;
        ensure!(
            ended == plan.len(),
            "{}: the machine went off after {ended} of {} commands",
            kernel.name,
            plan.len()
        );
        let names = cases
            .iter()
            .map(|case| format!("{}, {}", kernel.name, case.name));
        let mut said = said.into_iter();
        Ok(Self {
            kernel: kernel.name.clone(),
            release,
            check: said.next().unwrap_or_default(),
            load: said.next().unwrap_or_default(),
            tests: names.zip(outcomes).collect(),
            refused,
        })
    }

    /// Says what the agent refuses on this kernel; whether that is nothing.
    pub(crate) fn accepted(&self) -> bool {
        for refusal in &self.refused {
            say(&format!("{}: {refusal}", self.kernel));
            for line in self.check.lines().filter(|line| line.starts_with("lacks")) {
                say(&format!("{}: {line}", self.kernel));
            }
        }
        self.refused.is_empty()
    }

    /// Those of these tests that did not pass.
    pub(crate) fn missing<'a>(&self, all: &'a [String]) -> Vec<&'a str> {
        let passed = |name: &&String| {
            self.tests
                .iter()
                .any(|(_, outcome)| outcome.names.contains(name))
        };
        all.iter()
            .filter(|name| !passed(name))
            .map(String::as_str)
            .collect()
    }

    /// Its tests, by executable.
    pub(crate) fn rows(&self) -> impl Iterator<Item = (&str, Outcome)> {
        self.tests
            .iter()
            .map(|(name, outcome)| (name.as_str(), outcome.clone()))
    }

    /// Its cells, by row.
    fn cells(&self) -> Vec<(String, String)> {
        let mut cells = vec![("Linux".to_owned(), self.release.clone())];
        // `connect4   CgroupSockAddr   1049   8181   128  maps…`
        let mut loaded = BTreeMap::new();
        for line in self.load.lines().skip(1) {
            let words: Vec<&str> = line.split_whitespace().collect();
            if let [name, _, _, verified, stack, ..] = words.as_slice()
                && verified.parse::<u32>().is_ok()
            {
                loaded.insert(
                    format!("`{name}`"),
                    format!("{verified} instructions, {stack} B of stack"),
                );
            }
        }
        cells.push(("programs loaded".into(), loaded.len().to_string()));
        cells.extend(loaded);
        // `ok     sockets        transparent and marked`
        for line in self.check.lines() {
            let mut words = line.splitn(2, ' ');
            let verdict = words.next().unwrap_or_default();
            let rest = words.next().unwrap_or_default().trim();
            let Some((what, detail)) = rest.split_once("  ").or_else(|| rest.split_once(' '))
            else {
                continue;
            };
            let what = what.trim();
            if ["kernel", "capabilities", "cgroup v2", "bpffs", "hooks"].contains(&what) {
                continue; // of the machine
            }
            let cell = match verdict {
                "ok" => "on".to_owned(),
                _ => format!("off: {}", detail.trim()),
            };
            cells.push((what.to_owned(), cell));
        }
        if !self.tests.is_empty() {
            let passed: u64 = self.tests.iter().map(|(_, outcome)| outcome.passed).sum();
            let failed: u64 = self.tests.iter().map(|(_, outcome)| outcome.failed).sum();
            cells.push((
                "tests passed".into(),
                format!("{passed} of {}", passed + failed),
            ));
        }
        cells
    }
}

/// Puts the columns side by side.
pub(crate) fn table(columns: &[Column]) -> Table {
    let mut rows: Vec<(String, Vec<String>)> = vec![("kernel".into(), Vec::new())];
    for (place, column) in columns.iter().enumerate() {
        rows[0].1.push(column.kernel.clone());
        for (name, cell) in column.cells() {
            let found = rows.iter().position(|(row, _)| *row == name);
            let row = found.unwrap_or_else(|| {
                rows.push((name, Vec::new()));
                rows.len() - 1
            });
            rows[row].1.resize(place, "-".into());
            rows[row].1.push(cell);
        }
    }
    for (_, cells) in &mut rows {
        cells.resize(columns.len(), "-".into());
    }
    Table { rows }
}

impl Table {
    /// As text, and as Markdown: both at once.
    pub(crate) fn text(&self) -> String {
        let width = |place: usize| {
            let cells = self.rows.iter().map(|(name, cells)| match place {
                0 => name.len(),
                _ => cells[place - 1].len(),
            });
            cells.max().unwrap_or(0)
        };
        let count = self.rows.first().map_or(0, |(_, cells)| cells.len()) + 1;
        let mut text = String::new();
        for (number, (name, cells)) in self.rows.iter().enumerate() {
            for (place, cell) in std::iter::once(name).chain(cells).enumerate() {
                text.push_str(&format!("| {cell:width$} ", width = width(place)));
            }
            text.push_str("|\n");
            if number == 0 {
                for place in 0..count {
                    text.push_str(&format!("|{}", "-".repeat(width(place) + 2)));
                }
                text.push_str("|\n");
            }
        }
        text
    }

    /// Writes docs/kernels.md.
    pub(crate) fn write(&self) -> Result<()> {
        let path = workspace().join("docs/kernels.md");
        let text = format!(
            "# Kernels\n\n\
             Linux 6.1 is the oldest that is tested, 5.17 the oldest that `dataplane check` lets pass.\n\
             This table is written by `cargo xtask vm … --write`, which runs the whole suite of\n\
             `tests/cases` on each of these kernels. `instructions` are those that the verifier walked\n\
             through, of the million that it allows; the stack is of 512 bytes. What is off is what the\n\
             agent does without, and why. Of modules only veth is loaded, for the tests: the agent\n\
             needs none, `tcp_diag` among them.\n\n\
             `tests/golden/verifier.txt` is what a program may grow to. The suite also runs the agent\n\
             on kernels that lack a kind of programs (it refuses, and names it) or IPv6 (it captures\n\
             IPv4 alone, and refuses the rest), by a seccomp filter.\n\n{}",
            self.text()
        );
        fs::create_dir_all(workspace().join("docs"))?;
        fs::write(&path, text).with_context(|| path.display().to_string())
    }
}

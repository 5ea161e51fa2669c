//! The results of all kernels, side by side.

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::kernel::{self, Kernel};
use super::machine::{self, Accelerator};
use crate::command::{all_output, output, workspace};
use crate::progress::say;
use crate::test::{self, Built, Executable, Outcome};

/// The time limit of a suite; longer than any takes on a slow machine.
const SUITE_TIMEOUT: Duration = Duration::from_secs(2 * 60 * 60);
/// The agent's commands before the tests, which only run if these succeed.
const QUESTIONS: [&str; 2] = ["check", "load"];

/// The results of one kernel.
pub(crate) struct Column {
    /// The version or path by which it was requested.
    pub(crate) kernel: String,
    release: String,
    machine: &'static str,
    /// The agent's output for each of `QUESTIONS`.
    said: [String; QUESTIONS.len()],
    /// The tests' outcomes, by executable.
    tests: Vec<(String, Outcome)>,
    /// The failures besides those of tests.
    wrong: Vec<String>,
    /// `true` if of the tests only those ran that are named after an invariant.
    pub(crate) invariants_alone: bool,
}

/// Rows by name, a cell for each column.
pub(crate) struct Table {
    rows: Vec<(String, Vec<String>)>,
}

impl Column {
    fn new(kernel: &str, release: &str, machine: &'static str, cases: &[&Executable]) -> Self {
        let tests = cases
            .iter()
            .map(|case| (case.name.clone(), Outcome::default()));
        Self {
            kernel: kernel.to_owned(),
            release: release.to_owned(),
            machine,
            said: Default::default(),
            tests: tests.collect(),
            wrong: Vec::new(),
            invariants_alone: false,
        }
    }

    /// Runs the tests on this machine.
    pub(crate) fn here(built: &Built, cases: &[&Executable]) -> Result<Self> {
        let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
        let release = release.trim();
        let version: Vec<&str> = release.split(['.', '-']).take(2).collect();
        let mut column = Self::new(&version.join("."), release, "the tester's own", cases);
        say(&format!("{}: this machine", column.kernel));
        let agent = built.program("dataplane")?;
        for (place, question) in QUESTIONS.iter().enumerate() {
            let (status, said) = all_output(Command::new(agent).arg(question))?;
            say(said.trim_end());
            column.said[place] = said;
            if !status.success() {
                column.refuses(place, &status.to_string());
            }
        }
        if column.wrong.is_empty() {
            column.tests = test::run_all(built, cases, None, &[])?;
        }
        Ok(column)
    }

    /// Runs the chosen tests of these executables in a machine with this kernel.
    ///
    /// # Errors
    /// No machine can be created. Failures in the machine are recorded in the column.
    pub(crate) fn inside(
        kernel: &Kernel,
        built: &Built,
        accelerator: Accelerator,
        append: &str,
        cases: &[&Executable],
        chosen: &BTreeMap<String, Vec<String>>,
    ) -> Result<Self> {
        let cases: Vec<_> = cases
            .iter()
            .copied()
            .filter(|case| !chosen[&case.name].is_empty())
            .collect();
        let mut image = machine::image(&kernel.name, built.program("init")?)?;
        image.modules(&kernel.modules()?)?;
        let (agent, app) = ("/dataplane", "/dataplane-test-app");
        image.program(built.program("dataplane")?, agent)?;
        image.program(built.program("dataplane-test-app")?, app)?;
        let mut other = String::new();
        for case in &cases {
            if case.wants_other_agent(None)? {
                image.program(built.other_agent()?, "/dataplane-other")?;
                other = "DATAPLANE_TEST_OTHER=/dataplane-other".into();
            }
        }
        let mut plan = Vec::new();
        for question in QUESTIONS {
            plan.push(format!("!{agent}\t{question}"));
        }
        for (number, case) in cases.iter().enumerate() {
            let place = format!("/case-{number}");
            image.program(&case.path, &place)?;
            let words = [place.as_str(), "--color", "never", "--exact"]
                .into_iter()
                .chain(chosen[&case.name].iter().map(String::as_str));
            plan.push(words.collect::<Vec<_>>().join("\t"));
        }
        let image = image.pack(&plan)?;
        let append = format!(
            "DATAPLANE_BIN={agent} DATAPLANE_TEST_APP={app} RUST_BACKTRACE=0 {other} {append}"
        );

        let mut column = Self::new(&kernel.name, &kernel.release, "virtual", &cases);
        let (mut current, mut ended, mut started) = (None, 0, Instant::now());
        let off = machine::boot(
            kernel,
            accelerator,
            &image,
            &append,
            SUITE_TIMEOUT,
            |line| {
                if let Some(number) = line.strip_prefix(">>> ") {
                    current = number.parse().ok();
                    started = Instant::now();
                    column.begins(current);
                } else if let Some((number, how)) = line
                    .strip_prefix("<<< ")
                    .and_then(|end| end.split_once(": "))
                {
                    ended += 1;
                    column.ends(number.parse().ok(), how, started.elapsed());
                    current = None;
                } else {
                    column.hears(current, line);
                }
            },
        );
        match off {
            Ok(complaints) => column.wrong.extend(complaints),
            Err(error) => column.wrong.push(format!("{error:#}")),
        }
        if column.wrong.is_empty() && ended != plan.len() {
            column.wrong.push(format!(
                "the machine went off after {ended} of {} commands; the kernel's own words are in {}",
                plan.len(),
                machine::log(&kernel.name).display()
            ));
        }
        Ok(column)
    }

    /// Notes that a command of the plan begins: the questions come first, then the tests.
    fn begins(&self, number: Option<usize>) {
        let place = number.and_then(|number| number.checked_sub(QUESTIONS.len()));
        if let Some((name, _)) = place.and_then(|place| self.tests.get(place)) {
            self.say(name);
        }
    }

    fn hears(&mut self, number: Option<usize>, line: &str) {
        let Some(number) = number else {
            if let Some(release) = line.strip_prefix("Linux ") {
                release.clone_into(&mut self.release);
            }
            return self.say(line);
        };
        if let Some(said) = self.said.get_mut(number) {
            said.push_str(line);
            said.push('\n');
            self.say(line);
        } else if let Some((_, outcome)) = self.tests.get_mut(number - QUESTIONS.len())
            && outcome.parse_line(line)
        {
            self.say(line);
        }
    }

    /// Prints a line with the kernel's name, as several machines may run in parallel.
    fn say(&self, line: &str) {
        say(&format!("{}: {line}", self.kernel));
    }

    fn ends(&mut self, number: Option<usize>, how: &str, took: Duration) {
        let Some(number) = number else { return };
        if number < QUESTIONS.len() {
            if how != "0" {
                self.refuses(number, how);
            }
        } else if let Some((name, outcome)) = self.tests.get_mut(number - QUESTIONS.len()) {
            outcome.end(name, how == "0", how);
            outcome.seconds = took.as_secs_f32();
        }
    }

    /// Records why the agent refuses: the lines of what it lacks, or its last line.
    fn refuses(&mut self, place: usize, how: &str) {
        let said = &self.said[place];
        let lacks = said.lines().filter(|line| line.starts_with("lacks"));
        let mut why: Vec<&str> = lacks.collect();
        if why.is_empty() {
            why.extend(said.lines().last());
        }
        let question = QUESTIONS[place];
        self.wrong.push(format!(
            "`dataplane {question}` ended with {how}: {}",
            why.join("; ")
        ));
    }

    /// Prints the failures besides those of tests; returns `true` if there are none.
    pub(crate) fn is_good(&self) -> bool {
        for what in &self.wrong {
            say(&format!("{}: {what}", self.kernel));
        }
        self.wrong.is_empty()
    }

    /// Counts the chosen tests that did not pass as failed, by executable.
    pub(crate) fn demand(&mut self, chosen: &BTreeMap<String, Vec<String>>) {
        for (case, outcome) in &mut self.tests {
            let names = &chosen[case.as_str()];
            let passed = |name: &&String| outcome.names.contains(name);
            let missing: Vec<&str> = names
                .iter()
                .filter(|name| !passed(name))
                .map(String::as_str)
                .collect();
            if missing.len() == names.len() && !names.is_empty() {
                say(&format!("{}: {case}: none passed", self.kernel));
            } else {
                for name in &missing {
                    say(&format!("{}: {case}: {name} did not pass", self.kernel));
                }
            }
            outcome.failed = outcome.failed.max(missing.len() as u64);
        }
    }

    /// Returns its tests' outcomes, named by kernel and executable.
    pub(crate) fn rows(&self) -> impl Iterator<Item = (String, Outcome)> {
        self.tests
            .iter()
            .map(|(name, outcome)| (format!("{}, {name}", self.kernel), outcome.clone()))
    }

    /// Returns its cells, by row.
    fn cells(&self) -> Vec<(String, String)> {
        let mut cells = vec![
            ("Linux".to_owned(), self.release.clone()),
            ("machine".to_owned(), self.machine.to_owned()),
            ("tested at".to_owned(), commit()),
        ];
        // `connect4   CgroupSockAddr   1049   8181   128  maps…`
        let mut loaded = BTreeMap::new();
        let [check, load] = &self.said;
        for line in load.lines() {
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
        for line in check.lines() {
            let Some((verdict, rest)) = line.split_once(' ') else {
                continue;
            };
            let rest = rest.trim();
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
                "note" | "lacks" => format!("off: {}", detail.trim()),
                _ => continue,
            };
            cells.push((what.to_owned(), cell));
        }
        if !self.tests.is_empty() {
            let passed: u64 = self.tests.iter().map(|(_, outcome)| outcome.passed).sum();
            let failed: u64 = self.tests.iter().map(|(_, outcome)| outcome.failed).sum();
            let which = if self.invariants_alone {
                "of the invariants"
            } else {
                "the whole suite"
            };
            cells.push((
                "tests passed".into(),
                format!("{passed} of {}, {which}", passed + failed),
            ));
        }
        cells
    }
}

/// Returns the commit that is checked out, with its date; `-` if git does not tell.
fn commit() -> String {
    let mut git = Command::new("git");
    git.args(["log", "-1", "--format=%h, %cs"])
        .current_dir(workspace());
    output(&mut git).map_or_else(|_| "-".into(), |said| said.trim().to_owned())
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
    /// Returns the table in a form that is both plain text and Markdown.
    pub(crate) fn text(&self) -> String {
        let width = |place: usize| {
            let cells = self.rows.iter().map(|(name, cells)| match place {
                0 => name.chars().count(),
                _ => cells[place - 1].chars().count(),
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

    /// Takes the columns of other kernels from this document, as their last whole runs left them.
    fn with_others(mut self, document: &str) -> Self {
        let lines = document.lines().filter(|line| line.starts_with("| "));
        let cells = |line: &str| -> Vec<String> {
            let cells = line.trim_matches('|').split('|');
            cells.map(|cell| cell.trim().to_owned()).collect()
        };
        let old: Vec<Vec<String>> = lines.map(cells).collect();
        let kernels = |rows: &[(String, Vec<String>)]| rows[0].1.clone();
        for place in 1..old.first().map_or(0, Vec::len) {
            if kernels(&self.rows).contains(&old[0][place]) {
                continue;
            }
            let count = self.rows[0].1.len();
            for row in &old {
                if !self.rows.iter().any(|(name, _)| *name == row[0]) {
                    self.rows.push((row[0].clone(), vec!["-".into(); count]));
                }
            }
            for (name, cells) in &mut self.rows {
                let row = old.iter().find(|row| row[0] == *name);
                let cell = row.and_then(|row| row.get(place)).map(String::as_str);
                cells.push(cell.unwrap_or("-").to_owned());
            }
        }
        self
    }

    /// Writes docs/kernels.md.
    pub(crate) fn write(self) -> Result<()> {
        let path = workspace().join("docs/kernels.md");
        let table = match fs::read_to_string(&path) {
            Ok(document) => self.with_others(&document),
            Err(_) => self,
        };
        let text = format!(
            "# Kernels\n\n\
             Linux {oldest} is the oldest that is tested. This table is written by `cargo xtask vm all\n\
             --write`, which runs the whole suite of `tests/cases` on each of these kernels, by `cargo xtask vm\n\
             --kernel 6.1 --write` for one of them, or, with `invariants`, by those of the tests that are named\n\
             after an invariant; only what passed is written, with the commit that was tested. `instructions` are\n\
             those that the verifier walked through, of the million that it allows; the stack is of 512 bytes.\n\
             What is off is what the agent does without, and why. A\n\
             virtual machine loads the modules that the tests of its commit need and its kernel has not built in,\n\
             now fuse and veth; the agent needs none, `tcp_diag` among them.\n\n\
             `tests/golden/verifier.txt` is what a program may cost on each. The suite also runs the\n\
             agent on kernels that lack a kind of programs (it refuses, and names it) or IPv6 (it\n\
             captures IPv4 alone, and refuses the rest), by a seccomp filter; and CI boots one\n\
             without IPv6.\n\n{table}",
            oldest = kernel::VERSIONS[0],
            table = table.text()
        );
        fs::write(&path, text).with_context(|| path.display().to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(name: &str, cells: &[&str]) -> (String, Vec<String>) {
        let cells = cells.iter().map(|cell| (*cell).to_owned());
        (name.to_owned(), cells.collect())
    }

    #[test]
    fn what_other_kernels_had_stays_in_the_document() {
        let old = Table {
            rows: vec![
                row("kernel", &["6.18", "6.1"]),
                row("gone", &["1", "2"]),
                row("tests passed", &["50 of 50", "51 of 51"]),
            ],
        };
        let new = Table {
            rows: vec![
                row("kernel", &["6.1"]),
                row("new", &["3"]),
                row("tests passed", &["60 of 60"]),
            ],
        };
        let merged = new.with_others(&format!("# Kernels\n\n{}", old.text()));
        let expected = [
            row("kernel", &["6.1", "6.18"]),
            row("new", &["3", "-"]),
            row("tests passed", &["60 of 60", "50 of 50"]),
            row("gone", &["-", "1"]),
        ];
        assert_eq!(merged.rows, expected);
    }
}

//! The progress of a chore: numbered steps, the time that each took, and regular messages in long ones. The
//! output of commands goes to a log under `target/logs`, and is shown if they fail.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::command::{self, shown};

const HEARTBEAT: Duration = Duration::from_secs(10);
const LINES_SHOWN: usize = 30;

/// The steps of a chore, `[1/3]` and on.
pub(crate) struct Steps {
    number: usize,
    total: usize,
    started: Instant,
}

impl Steps {
    pub(crate) fn new(total: usize) -> Self {
        Self {
            number: 0,
            total,
            started: Instant::now(),
        }
    }

    /// Prints that `what` begins.
    pub(crate) fn begin(&mut self, what: &str) {
        self.number += 1;
        self.started = Instant::now();
        say(&format!("[{}/{}] {what}", self.number, self.total));
    }

    /// Prints how the step ended.
    pub(crate) fn end(&self, how: &str) {
        let took = self.started.elapsed().as_secs_f32();
        say(&format!("      {how} ({took:.1} s)"));
    }
}

/// Prints a line at once, so that it is in order with the output of child processes.
pub(crate) fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    // An error means that the reader closed the pipe.
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

/// Runs `command` with its output in `target/logs/<name>.log`; prints every ten seconds that it still runs, and
/// the end of the log if it fails.
pub(crate) fn run_quietly(name: &str, command: &mut Command) -> Result<()> {
    let folder = command::target().join("logs");
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let path = folder.join(format!("{name}.log"));
    let log = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
    let mut child = command
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .with_context(|| format!("cannot start `{}`", shown(command)))?;

    let started = Instant::now();
    let mut said = started;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if said.elapsed() >= HEARTBEAT {
            said = Instant::now();
            let seconds = started.elapsed().as_secs();
            let now = last_lines(&path, 1);
            say(&format!("      {seconds:3} s  {name}: {}", now.trim()));
        }
        thread::sleep(Duration::from_millis(100));
    };
    if !status.success() {
        let end = last_lines(&path, LINES_SHOWN);
        bail!(
            "`{}`: {status}; its last words, all in {}:\n{end}",
            shown(command),
            path.display()
        );
    }
    Ok(())
}

fn last_lines(path: &Path, count: usize) -> String {
    let text = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text
        .lines()
        .filter(|line| !line.trim().is_empty())
        .collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

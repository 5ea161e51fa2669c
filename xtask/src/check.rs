//! The checks that need no privilege: format, doors, lints, documentation, unit tests.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};

use crate::command::{cargo, run as run_command, workspace};
use crate::progress::say;
use crate::{build, doors, setup, words};

/// Checks what needs no privilege: format, doors, lints, documentation, unit tests.
///
/// All of it without arguments; or only the parts named, such as `cargo xtask check fmt doors`,
/// which takes a second. Goes on after a part that fails, so that one run tells everything.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// The parts to check, all by default.
    #[arg(value_enum)]
    parts: Vec<Part>,
    /// Writes the words that are found into tests/golden/words.txt, for `words`.
    #[arg(long)]
    write: bool,
}

/// One thing that is checked.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// rustfmt would change nothing.
    Fmt,
    /// No room of the agent uses another but through its door (see ARCHITECTURE.md).
    Doors,
    /// The words that leave the agent are those of tests/golden/words.txt.
    Words,
    /// clippy has nothing to say about what runs on the host.
    Clippy,
    /// clippy has nothing to say about the kernel programs.
    ClippyEbpf,
    /// Documentation builds without a warning.
    Docs,
    /// Unit tests and examples in documentation pass.
    Tests,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let parts = match options.parts.as_slice() {
        [] => <Part as clap::ValueEnum>::value_variants(),
        parts => parts,
    };
    let mut failed = Vec::new();
    for (index, part) in parts.iter().enumerate() {
        let started = Instant::now();
        say(&format!("[{}/{}] {}", index + 1, parts.len(), part.name()));
        let done = part.check(options.write);
        let seconds = started.elapsed().as_secs_f32();
        match done {
            Ok(()) => say(&format!("      good ({seconds:.1} s)")),
            Err(error) => {
                say(&format!("      BAD ({seconds:.1} s): {error:#}"));
                failed.push(part.name());
            }
        }
    }
    ensure!(
        failed.is_empty(),
        "these checks failed: {}",
        failed.join(", ")
    );
    Ok(())
}

impl Part {
    fn name(self) -> &'static str {
        match self {
            Self::Fmt => "fmt",
            Self::Doors => "doors",
            Self::Words => "words",
            Self::Clippy => "clippy",
            Self::ClippyEbpf => "clippy-ebpf",
            Self::Docs => "docs",
            Self::Tests => "tests",
        }
    }

    fn check(self, write: bool) -> Result<()> {
        match self {
            Self::Fmt => run_command(cargo().args(["fmt", "--all", "--check"])),
            Self::Doors => doors(),
            Self::Words => words(write),
            Self::Clippy => run_command(
                build::host("clippy", false)
                    .args(["--quiet", "--workspace", "--all-targets"])
                    .args(["--", "-D", "warnings"]),
            ),
            Self::ClippyEbpf => clippy_ebpf(),
            Self::Docs => run_command(
                build::host("doc", false)
                    .args(["--quiet", "--workspace", "--no-deps", "--lib", "--bins"])
                    .arg(build::FEATURES_OF_TESTS)
                    .env("RUSTDOCFLAGS", "-D warnings"),
            ),
            Self::Tests => run_command(build::host("test", false).args([
                "--quiet",
                "--workspace",
                "--exclude",
                "dataplane-tests",
            ])),
        }
    }
}

fn clippy_ebpf() -> Result<()> {
    let Some(toolchain) = setup::find() else {
        bail!("no toolchain for the kernel programs: run `cargo xtask setup`");
    };
    let mut clippy = toolchain.compiler.clippy();
    let clippy = build::for_bpf(&mut clippy, &toolchain.linker);
    run_command(clippy.args(["--lib", "--bins", "--", "-D", "warnings"]))
}

fn doors() -> Result<()> {
    let source = workspace().join("dataplane-agent/src");
    let mut broken = 0;
    for (path, text) in sources(&source)? {
        for breach in doors::breaches(&path, &text) {
            say(&format!("dataplane-agent/src/{}:{breach}", path.display()));
            broken += 1;
        }
    }
    ensure!(
        broken == 0,
        "{broken} uses of a room that are not through its door; the table is in xtask/src/doors.rs"
    );
    Ok(())
}

/// The comment at the top of the golden file.
const ABOUT: &str = "\
# Words that leave the agent, by the kind of place that they are in: somebody's dashboard, script or alert may
# have each. Written by `cargo xtask check words --write`; a line that changes here is a decision.
";

fn words(write: bool) -> Result<()> {
    let path = workspace().join("tests/golden/words.txt");
    let mut found = BTreeSet::new();
    for of in ["dataplane-agent/src", "dataplane-ebpf/src"] {
        for (path, text) in sources(&workspace().join(of))? {
            let is_test = |part: &std::ffi::OsStr| part == "tests" || part == "tests.rs";
            if !path.iter().any(is_test) {
                found.extend(words::of(&path, &text)?);
            }
        }
    }
    if write {
        let lines = found.iter().map(|(kind, word)| format!("{kind}: {word}\n"));
        let text = ABOUT.to_owned() + &lines.collect::<String>();
        return fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()));
    }
    let text =
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let golden = words::golden(&text)?;
    let found: BTreeSet<(&str, &str)> = found.iter().map(|(kind, word)| (*kind, &**word)).collect();
    for (kind, word) in found.difference(&golden) {
        say(&format!("{kind}: {word} is new"));
    }
    for (kind, word) in golden.difference(&found) {
        say(&format!("{kind}: {word} is gone"));
    }
    ensure!(
        found == golden,
        "tests/golden/words.txt says others; `cargo xtask check words --write` writes it"
    );
    Ok(())
}

/// Returns every Rust file under `folder`: its path from there, and its text.
fn sources(folder: &Path) -> Result<Vec<(PathBuf, String)>> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in
            fs::read_dir(&next).with_context(|| format!("cannot read {}", next.display()))?
        {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path)
                    .with_context(|| format!("cannot read {}", path.display()))?;
                found.push((path.strip_prefix(folder)?.to_owned(), text));
            }
        }
    }
    found.sort();
    Ok(found)
}

//! Runs the tests on other kernels, in virtual machines.

mod initramfs;
mod kernel;
mod machine;
mod matrix;

use std::collections::BTreeMap;
use std::thread;
use std::time::Instant;

use anyhow::{Result, bail, ensure};

use crate::command::require_root;
use crate::progress::say;
use crate::setup;
use crate::test::{self, Built};
use kernel::Kernel;
use machine::Accelerator;
use matrix::Column;

/// Runs the tests of tests/cases on other kernels, in QEMU.
///
/// Builds what `cargo xtask test` builds, fetches Debian's cloud kernels into target/vm (once), and
/// boots each with a memory image of its modules, the same test executables, the agent, and an init
/// of ours. Prints what the tests print, then a table: the programs and what the verifier says of
/// them, what the agent finds of the kernel, the tests passed. Fails when a test does, or when one
/// that exists did not run.
///
/// `cargo xtask vm invariants` runs those tests that are named after an invariant of the design, such
/// as `c1_…`: what CI runs on the oldest kernel, where by emulation the whole suite takes more than an hour.
///
/// Examples: `cargo xtask vm` is the oldest kernel; `cargo xtask vm all` is this machine's and all;
/// `cargo xtask vm --kernel 6.12 --append ipv6.disable=1 check` boots one without IPv6, and only
/// asks what the agent says of it; `cargo xtask vm --only halves` runs what is in
/// tests/cases/halves.rs, and `--only captured` the tests of that name.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// What to run.
    #[arg(value_enum, default_value = "tests")]
    what: What,
    /// 6.1, 6.12, `here` for this machine's own, or a path: a kernel image with everything built in,
    /// a Debian package, or a folder as one unpacks into. May be given more than once. 6.1 if not
    /// given.
    #[arg(long, value_name = "VERSION|PATH")]
    kernel: Vec<String>,
    /// Words for the kernel's command line, such as `ipv6.disable=1`.
    #[arg(long, value_name = "WORDS", default_value = "")]
    append: String,
    /// Runs only the file of tests/cases of this name, or the tests whose name contains it.
    #[arg(long, value_name = "NAME")]
    only: Option<String>,
    /// Writes what the table says of these kernels into docs/kernels.md, if all passed.
    #[arg(long)]
    write: bool,
}

/// The name of the kernel that this machine runs.
const HERE: &str = "here";

/// What is run in a machine.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum What {
    /// The tests, on each kernel that is named.
    Tests,
    /// Of the tests those that are named after an invariant of the design.
    Invariants,
    /// The tests here and on every kernel.
    All,
    /// Only `dataplane check` and `dataplane load`, which takes seconds.
    Check,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let mut names: Vec<&str> = match options.what {
        What::All if !options.kernel.is_empty() => {
            bail!("`all` is every kernel: leave --kernel out")
        }
        What::All => [HERE].iter().chain(kernel::VERSIONS).copied().collect(),
        _ if options.kernel.is_empty() => vec![kernel::VERSIONS[0]],
        _ => options.kernel.iter().map(String::as_str).collect(),
    };
    let here = names.contains(&HERE);
    names.retain(|name| *name != HERE);
    let unchanged = options.append.is_empty() && options.only.is_none();
    let whole = unchanged && matches!(options.what, What::All | What::Tests);
    let told = whole || unchanged && options.what == What::Invariants;
    let known = names.iter().all(|name| kernel::VERSIONS.contains(name));
    ensure!(
        told && known || !options.write,
        "--write is for the whole suite or all invariants, on kernels {}: that is what the document tells",
        kernel::VERSIONS.join(" and ")
    );
    ensure!(
        options.only.is_none() || options.what == What::Tests,
        "--only is for tests on the kernels that are named"
    );
    ensure!(
        !here || whole,
        "only the whole suite runs here: for a part there is `cargo xtask test`"
    );
    if here {
        require_root("testing", "network namespaces, cgroups, bpf(2)")?;
    }
    let built = Built::new(false)?;
    if !names.is_empty() {
        setup::ensure_vm()?;
    }
    let kernels: Vec<Kernel> = names.into_iter().map(Kernel::find).collect::<Result<_>>()?;
    let accelerator = |first| Accelerator::find(first, built.program("init")?);
    let accelerator = kernels.first().map(accelerator).transpose()?;
    let (cases, filter) = match options.what {
        What::Check => (Vec::new(), None),
        What::Tests | What::Invariants | What::All => built.chosen_cases(options.only.as_deref()),
    };
    // The tests that have to run, by executable.
    let mut chosen = BTreeMap::new();
    for case in &cases {
        let mut names = case.list(filter)?;
        if options.what == What::Invariants {
            names.retain(|name| is_of_an_invariant(name));
        }
        chosen.insert(case.name.clone(), names);
    }

    // Before the machines share what was built: it takes the agent's place while it is built.
    for case in &cases {
        if case.wants_other_agent(None)? {
            built.other_agent()?;
        }
    }
    let mut columns = Vec::new();
    if here {
        columns.push(Column::here(&built, &cases)?);
    }
    let inside = |kernel: &Kernel, accelerator: Accelerator| {
        let started = Instant::now();
        let name = &kernel.name;
        say(&format!("{name}: Linux {}, {accelerator}", kernel.release));
        let append = &options.append;
        let column = Column::inside(kernel, &built, accelerator, append, &cases, &chosen);
        // Now, and not when the other machines are done.
        let column = column.inspect_err(|error| say(&format!("{name}: {error:#}")))?;
        say(&format!("{name}: {:.0} s", started.elapsed().as_secs_f32()));
        Ok(column)
    };
    // In parallel: an emulated machine uses one processor.
    let found: Vec<Result<Column>> = thread::scope(|scope| {
        let inside = &inside;
        let all = kernels.iter().zip(accelerator.into_iter().cycle());
        let all = all.map(|(kernel, by)| scope.spawn(move || inside(kernel, by)));
        let all: Vec<_> = all.collect();
        all.into_iter()
            .map(|one| {
                one.join()
                    .unwrap_or_else(|_| bail!("a machine's thread panicked"))
            })
            .collect()
    });
    for column in found {
        columns.push(column?);
    }
    for column in &mut columns {
        column.demand(&chosen);
        column.invariants_alone = options.what == What::Invariants;
    }
    let table = matrix::table(&columns);
    say(&format!("\n{}", table.text()));
    let mut good = true;
    for column in &columns {
        good &= column.is_good();
    }
    if options.what == What::Check {
        ensure!(good, "not every kernel is as it should be");
        return Ok(());
    }
    let rows: Vec<_> = columns.iter().flat_map(Column::rows).collect();
    if !(test::report(&rows) && good) {
        std::process::exit(1);
    }
    if options.write {
        table.write()?;
    }
    Ok(())
}

/// Returns `true` if a test is named after an invariant: a letter and a number, as `c10_a_port_…`.
fn is_of_an_invariant(name: &str) -> bool {
    let word = name.rsplit("::").next().unwrap_or(name);
    let number = word.strip_prefix(['c', 'd', 'h', 's']);
    let number = number.and_then(|rest| rest.split_once('_'));
    number.is_some_and(|(number, _)| number.parse::<u8>().is_ok())
}

#[cfg(test)]
mod tests {
    use super::is_of_an_invariant;

    #[test]
    fn invariants_are_told_by_a_letter_and_a_number() {
        for (name, is) in [
            ("c1_nothing_passes", true),
            ("module::c10_a_port", true),
            ("d2_destroyed", true),
            ("captured_1_time", false),
            ("c_nothing", false),
            ("c1", false),
            ("a_c1_thing", false),
        ] {
            assert_eq!(is_of_an_invariant(name), is, "{name}");
        }
    }
}

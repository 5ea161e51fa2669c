//! The tests of this machine's kernel on other kernels, in virtual machines.

mod initramfs;
mod kernel;
mod machine;
mod matrix;

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Result, bail, ensure};

use crate::command::require_root;
use crate::progress::say;
use crate::test::{self, Built};
use crate::{build, setup};
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
/// Examples: `cargo xtask vm` is the oldest kernel; `cargo xtask vm all` is this machine's and all;
/// `cargo xtask vm --kernel 6.12 --append ipv6.disable=1 check` boots one without IPv6, and only
/// asks what the agent says of it; `cargo xtask vm --only held` runs the tests of that name.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// What to run.
    #[arg(value_enum, default_value = "tests")]
    what: What,
    /// 6.1, 6.12, or a path: a kernel image with everything built in, a Debian package, or a folder
    /// as one unpacks into. May be given more than once. 6.1 if not given.
    #[arg(long, value_name = "VERSION|PATH")]
    kernel: Vec<String>,
    /// Words for the kernel's command line, such as `ipv6.disable=1`.
    #[arg(long, value_name = "WORDS", default_value = "")]
    append: String,
    /// Runs only the tests whose name contains this.
    #[arg(long, value_name = "NAME")]
    only: Option<String>,
    /// Writes docs/kernels.md from the table of `all`, if all passed.
    #[arg(long)]
    write: bool,
}

/// What is run in a machine.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum What {
    /// The tests, on each kernel that is named.
    Tests,
    /// The tests here and on every kernel.
    All,
    /// Only `dataplane check` and `dataplane load`, which takes seconds.
    Check,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let names: Vec<&str> = match options.what {
        What::All if !options.kernel.is_empty() => {
            bail!("`all` is every kernel: leave --kernel out")
        }
        What::All => kernel::VERSIONS.to_vec(),
        _ if options.kernel.is_empty() => vec![kernel::VERSIONS[0]],
        _ => options.kernel.iter().map(String::as_str).collect(),
    };
    let whole = options.what == What::All && options.append.is_empty() && options.only.is_none();
    ensure!(
        whole || !options.write,
        "--write is for `all` as it is: that is what the document tells"
    );
    ensure!(
        options.only.is_none() || options.what == What::Tests,
        "--only is for tests on the kernels that are named"
    );
    if options.what == What::All {
        require_root("testing", "network namespaces, cgroups, bpf(2)")?;
    }
    build::kernel_programs(&setup::ensure()?)?;
    setup::ensure_vm()?;
    say("agent and tests");
    let built = Built::new(false)?;
    let kernels: Vec<Kernel> = names.into_iter().map(Kernel::find).collect::<Result<_>>()?;
    let accelerator = Accelerator::find(&kernels[0], built.program("init")?)?;
    let cases = match options.what {
        What::Check => Vec::new(),
        What::Tests | What::All => built.cases(),
    };
    let filter = options.only.as_deref();

    let mut columns = Vec::new();
    if options.what == What::All {
        columns.push(Column::here(&built, &cases)?);
    }
    for kernel in &kernels {
        let started = Instant::now();
        say(&format!(
            "{}: Linux {}, {accelerator}",
            kernel.name, kernel.release
        ));
        let append = &options.append;
        let column = Column::inside(kernel, &built, accelerator, append, &cases, filter)?;
        say(&format!(
            "{}: {:.0} s",
            kernel.name,
            started.elapsed().as_secs_f32()
        ));
        columns.push(column);
    }
    // Each test that there is, on each kernel.
    let mut all = BTreeMap::new();
    for case in &cases {
        all.insert(case.name.clone(), case.list(filter)?);
    }
    for column in &mut columns {
        column.demand(&all);
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

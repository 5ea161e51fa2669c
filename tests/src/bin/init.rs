//! PID 1 of the test machine: sets up a bare kernel as the tests expect a node to be, runs its plan, and turns the
//! machine off.
//!
//! `/etc/modules` has the paths of the modules, one per line, in the order in which they are loaded. `/etc/plan`
//! has the commands, one per line, their words separated by tabs. Commands that begin with a `!` are always run,
//! the others only if all of those succeeded. All output goes to the second serial line, that of each command
//! between the lines `>>> N` and `<<< N: exit status`; the first serial line is the kernel's. Variables that the
//! kernel's command line sets for init are set for the commands too.

#![allow(missing_docs, reason = "a program of the tests")]

use std::error::Error;
use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, ExitStatus};

use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::resource::{Resource, setrlimit};

/// The mounts: file system type and path.
const MOUNTS: &[(&str, &str)] = &[
    ("proc", "/proc"),
    ("sysfs", "/sys"),
    ("devtmpfs", "/dev"),
    ("tmpfs", "/run"),
    ("tmpfs", "/tmp"),
    ("cgroup2", "/sys/fs/cgroup"),
    ("bpf", "/sys/fs/bpf"),
];
/// The limit of open files of a process: as many as a service manager sets; the kernel's default is 4096.
const FILES: u64 = 65_536;
/// The serial line that is read outside of the machine.
const LINE: &str = "/dev/ttyS1";

fn main() {
    if let Err(error) = run() {
        println!("init: {error}");
    }
    nix::unistd::sync();
    let error = reboot(RebootMode::RB_POWER_OFF);
    println!("init: cannot turn the machine off: {error:?}");
}

fn run() -> Result<(), Box<dyn Error>> {
    for (kind, folder) in MOUNTS {
        fs::create_dir_all(folder)?;
        let flags = MsFlags::empty();
        mount(Some(*kind), *folder, Some(*kind), flags, None::<&str>)
            .map_err(|error| format!("mount {kind} on {folder}: {error}"))?;
    }
    let line = OpenOptions::new().read(true).write(true).open(LINE)?;
    for own in 0..=2 {
        // SAFETY: takes no pointers; both are descriptors, the standard ones or one that is open.
        nix::errno::Errno::result(unsafe { libc::dup2(line.as_raw_fd(), own) })?;
    }
    setrlimit(Resource::RLIMIT_NOFILE, FILES, FILES)?;
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    println!("Linux {}", release.trim());
    for module in read("/etc/modules")?.lines() {
        load(Path::new(module)).map_err(|error| format!("{module}: {error}"))?;
    }
    let ip = ["link", "set", "lo", "up"];
    match Command::new("ip").args(ip).status() {
        Ok(status) if status.success() => {}
        Ok(status) => return Err(format!("ip {}: {status}", ip.join(" ")).into()),
        Err(error) => return Err(format!("ip: {error}").into()),
    }
    let mut well = true;
    for (number, line) in read("/etc/plan")?.lines().enumerate() {
        let needed = line.starts_with('!');
        if !(needed || well) {
            continue;
        }
        let mut words = line.trim_start_matches('!').split('\t');
        let program = words.next().unwrap_or_default();
        println!(">>> {number}");
        let status = Command::new(program).args(words).status();
        let end = status.map_or_else(|error| format!("{program}: {error}"), how);
        println!("<<< {number}: {end}");
        well &= !needed || end == "0";
    }
    Ok(())
}

fn read(path: &str) -> Result<String, String> {
    fs::read_to_string(path).map_err(|error| format!("{path}: {error}"))
}

fn load(module: &Path) -> Result<(), Box<dyn Error>> {
    let file = File::open(module)?;
    Ok(nix::kmod::finit_module(
        &file,
        c"",
        nix::kmod::ModuleInitFlags::empty(),
    )?)
}

/// Returns an exit status as text; only `0` is a success.
fn how(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => code.to_string(),
        (None, signal) => format!("signal {}", signal.unwrap_or_default()),
    }
}

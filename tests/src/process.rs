//! Processes that are in a namespace and a cgroup from their first instruction on.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};

use crate::netns::Netns;
use crate::{program, scaled};

/// The environment that a process is started in.
#[derive(Debug)]
pub struct Place {
    /// Its network namespace.
    pub netns: File,
    /// Its cgroup's folder.
    pub cgroup: PathBuf,
    /// The file that it sees as `/etc/hosts`.
    pub hosts: Option<PathBuf>,
    /// The numbers of the capabilities that it may have; `None` for all.
    pub capabilities: Option<Vec<u8>>,
}

/// A process whose output is read line by line; killed on drop.
#[derive(Debug)]
pub struct Process {
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Receiver<String>,
}

/// Returns the tests' app in a namespace and a cgroup that need not belong to the same pod.
pub fn app(netns: &Netns, cgroup: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(program("DATAPLANE_TEST_APP"));
    command.args(arguments);
    let of = Place {
        netns: netns.file(),
        cgroup: cgroup.to_owned(),
        hosts: None,
        capabilities: None,
    };
    place(&mut command, &of);
    command
}

/// Makes a command start in a place.
pub fn place(command: &mut Command, place: &Place) {
    let procs = place.cgroup.join("cgroup.procs");
    let cgroup = OpenOptions::new()
        .write(true)
        .open(&procs)
        .unwrap_or_else(|error| panic!("{}: {error}", procs.display()));
    let netns = place.netns.try_clone().expect("a descriptor");
    let hosts = place.hosts.clone();
    let capabilities = place.capabilities.clone();
    let prepare = move || {
        // This process may block signals to wait for them; the child must not inherit that.
        nix::sys::signal::SigSet::all().thread_unblock()?;
        // Ctrl-C in a terminal is for the parent, which then ends the child.
        nix::unistd::setpgid(nix::unistd::Pid::from_raw(0), nix::unistd::Pid::from_raw(0))?;
        (&cgroup).write_all(b"0")?;
        setns(netns.as_fd(), CloneFlags::CLONE_NEWNET)?;
        if let Some(hosts) = &hosts {
            unshare(CloneFlags::CLONE_NEWNS)?;
            let private = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
            mount(None::<&Path>, "/", None::<&Path>, private, None::<&Path>)?;
            let bind = MsFlags::MS_BIND;
            mount(
                Some(hosts.as_path()),
                "/etc/hosts",
                None::<&Path>,
                bind,
                None::<&Path>,
            )?;
        }
        if let Some(keep) = &capabilities {
            for capability in (0..64).filter(|capability| !keep.contains(capability)) {
                // SAFETY: takes no pointers. An error for a capability that this kernel lacks is ignored.
                unsafe {
                    libc::prctl(
                        libc::PR_CAPBSET_DROP,
                        libc::c_ulong::from(capability),
                        0,
                        0,
                        0,
                    )
                };
            }
        }
        Ok(())
    };
    // SAFETY: between fork and exec only system calls are made, on descriptors and paths that were
    // prepared before; nothing takes a lock or memory but the paths' short buffers on the stack.
    unsafe { command.pre_exec(prepare) };
}

impl Process {
    /// Starts a command, and reads its output.
    pub fn start(command: &mut Command) -> Self {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let output = child.stdout.take().expect("it was asked for");
        let (send, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines() {
                let Ok(line) = line else { return };
                if send.send(line).is_err() {
                    return;
                }
            }
        });
        Self {
            stdin: child.stdin.take(),
            child,
            lines,
        }
    }

    /// Returns its process ID.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Returns the next line that it prints.
    ///
    /// # Panics
    /// There is none within 20 seconds, scaled.
    pub fn line(&self) -> String {
        let patience = scaled(Duration::from_secs(20));
        match self.lines.recv_timeout(patience) {
            Ok(line) => line,
            Err(error) => panic!("no line from process {}: {error}", self.child.id()),
        }
    }

    /// Returns the next line, if it prints one within this time.
    pub fn line_within(&self, time: Duration) -> Option<String> {
        self.lines.recv_timeout(scaled(time)).ok()
    }

    /// Writes a line to it; has no effect if it has ended.
    pub fn say(&mut self, line: &str) {
        if let Some(stdin) = &mut self.stdin {
            let _ = writeln!(stdin, "{line}").and_then(|()| stdin.flush());
        }
    }

    /// Closes its standard input.
    pub fn close(&mut self) {
        self.stdin = None;
    }

    /// Waits for its end; returns its exit status, and the lines that were not read yet.
    pub fn end(mut self) -> (ExitStatus, Vec<String>) {
        self.stdin = None;
        let mut rest = Vec::new();
        while let Ok(line) = self.lines.recv_timeout(scaled(Duration::from_secs(60))) {
            rest.push(line);
        }
        (self.child.wait().expect("a child"), rest)
    }

    /// Returns `true` if it still runs.
    pub fn runs(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        let pid = nix::unistd::Pid::from_raw(self.child.id().try_into().expect("a pid"));
        let _ = nix::sys::signal::kill(pid, signal);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a command that ends by itself; returns its exit status, standard output and standard error.
pub fn output(command: &mut Command) -> (ExitStatus, String, String) {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let mut err = child.stderr.take().expect("it was asked for");
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        let _ = err.read_to_string(&mut text);
        text
    });
    let mut out = String::new();
    let _ = child
        .stdout
        .take()
        .expect("it was asked for")
        .read_to_string(&mut out);
    let status = child.wait().expect("a child");
    (status, out, reader.join().unwrap_or_default())
}

/// Returns the standard output of a command, or its error messages if it fails.
pub fn said(command: &mut Command) -> Result<String, String> {
    let (status, out, error) = output(command);
    match status.success() {
        true => Ok(out.trim().to_owned()),
        false => Err(error.trim().to_owned()),
    }
}

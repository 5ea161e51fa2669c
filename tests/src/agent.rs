//! The real daemon, with the privileges that it is shipped with and no others.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use serde_json::Value;

use crate::lacks::{Restriction, restrict};
use crate::process::{Place, output, place};
use crate::{eventually, program, scaled, within};

/// The daemon's capabilities, as listed in `deploy/capabilities.md`, with the kernel's numbers.
pub const CAPABILITIES: [(&str, u8); 3] = [
    ("CAP_SYS_ADMIN", 21),
    ("CAP_NET_ADMIN", 12),
    ("CAP_SYS_PTRACE", 19),
];

/// The numbers of the proxy half's capabilities.
pub const PROXY_CAPABILITIES: [u8; 2] = [21, 12];

/// The variable that names the daemon with another layout of maps.
pub const OTHER: &str = "DATAPLANE_TEST_OTHER";

/// How and where a daemon runs.
#[derive(Debug)]
pub struct Setup {
    /// The variable that names the daemon: `DATAPLANE_BIN`, or [`OTHER`].
    pub program: &'static str,
    /// The subcommand: `run` for both halves, or `node` or `proxy` for one.
    pub halves: &'static str,
    /// The node's name.
    pub node: String,
    /// Further arguments besides node and folders.
    pub arguments: Vec<String>,
    /// Environment variables.
    pub variables: Vec<(String, String)>,
    /// Its `--run-dir`.
    pub run_dir: PathBuf,
    /// The state folder that nodes share.
    pub state: PathBuf,
    /// The BPF file system for its pins.
    pub bpffs: PathBuf,
    /// The file that it logs to.
    pub log: PathBuf,
    /// Namespace, cgroup and privileges.
    pub place: Place,
    /// A feature that its kernel appears to lack.
    pub restriction: Option<Restriction>,
}

/// Threads that are stopped, until this is dropped.
#[derive(Debug)]
pub struct StoppedThreads(Vec<Pid>);

impl Drop for StoppedThreads {
    fn drop(&mut self) {
        for thread in &self.0 {
            let _ = ptrace::detach(*thread, None);
        }
    }
}

/// A running daemon. Dropping this kills it, and removes all that it left.
#[derive(Debug)]
pub struct Agent {
    setup: Setup,
    child: Option<std::process::Child>,
    /// How many bytes the log had when it was last started.
    logged: usize,
}

impl Agent {
    /// Starts it.
    pub fn start(setup: Setup) -> Self {
        let mut agent = Self {
            setup,
            child: None,
            logged: 0,
        };
        agent.restart();
        agent
    }

    /// Starts it again; the old one must have ended.
    pub fn restart(&mut self) {
        assert!(self.child.is_none(), "it still runs");
        let before = fs::metadata(&self.setup.log);
        self.logged = before.map_or(0, |log| log.len().try_into().expect("a length"));
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&self.setup.log);
        let mut command = self.command();
        command
            .stderr(log.expect("a log file"))
            .stdout(Stdio::null());
        self.child = Some(
            command
                .spawn()
                .unwrap_or_else(|error| panic!("{command:?}: {error}")),
        );
    }

    /// Returns the command that starts another one like it.
    pub fn command(&self) -> Command {
        self.setup.command()
    }
}

impl Setup {
    /// Returns the command that starts it.
    pub fn command(&self) -> Command {
        let setup = self;
        let mut command = Command::new(program(setup.program));
        command
            .arg(setup.halves)
            .args(["--node", &setup.node])
            .arg("--run-dir")
            .arg(&setup.run_dir)
            .arg("--bpffs")
            .arg(&setup.bpffs)
            .arg("--state")
            .arg(&setup.state)
            .args(&setup.arguments)
            .envs(setup.variables.iter().cloned())
            .stdin(Stdio::null());
        place(&mut command, &setup.place);
        if let Some(what) = setup.restriction {
            restrict(&mut command, what);
        }
        command
    }

    /// Has it configured by a file of LOCAL_XDS_PATH, and not by manifests.
    pub fn reads_local_xds(&mut self, file: &Path) {
        let words = &mut self.arguments;
        let manifests = words.iter().position(|word| word == "--manifests");
        let manifests = manifests.expect("it is set");
        words.drain(manifests..manifests + 2);
        let file = file.display().to_string();
        self.variables.push(("LOCAL_XDS_PATH".into(), file));
    }

    /// Sets how long connections may go on when it, or a pod, drains, as `60s`.
    pub fn drains_for(&mut self, long: &str) {
        let words = &mut self.arguments;
        let drain = words.iter().position(|word| word == "--drain");
        words[drain.expect("it is set") + 1] = long.into();
    }
}

impl Agent {
    /// Returns its setup, which may be changed before it is started again.
    pub fn setup(&mut self) -> &mut Setup {
        &mut self.setup
    }

    /// Returns its process ID.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("it runs").id()
    }

    /// Kills it by SIGKILL.
    pub fn kill(&mut self) {
        let mut child = self.child.take().expect("it runs");
        child.kill().expect("a child");
        child.wait().expect("a child");
    }

    /// Kills it, unless it has ended.
    pub fn end(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            child.wait().expect("a child");
        }
    }

    /// Sends it SIGTERM, and waits for its end.
    pub fn terminate(&mut self) -> std::process::ExitStatus {
        let mut child = self.child.take().expect("it runs");
        signal(&child, Signal::SIGTERM);
        child.wait().expect("a child")
    }

    /// Sends it SIGTERM, and does not wait.
    pub fn ask_to_end(&self) {
        self.signal(Signal::SIGTERM);
    }

    /// Sends it a signal.
    pub fn signal(&self, which: Signal) {
        signal(self.child.as_ref().expect("it runs"), which);
    }

    /// Returns `true` if it runs.
    pub fn runs(&self) -> bool {
        self.child.is_some() && !self.has_ended()
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> std::process::ExitStatus {
        self.child.take().expect("it runs").wait().expect("a child")
    }

    /// Returns `true` if it was started and has ended by itself.
    fn has_ended(&self) -> bool {
        use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
        let Some(child) = &self.child else {
            return false;
        };
        let pid = nix::unistd::Pid::from_raw(child.id().try_into().expect("a pid"));
        // WNOWAIT leaves the exit status for `wait`.
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        !matches!(waitid(Id::Pid(pid), flags), Ok(WaitStatus::StillAlive))
    }

    /// Waits until `holds` returns `true`; fails at once if the agent ends.
    fn eventually(&self, what: &str, mut holds: impl FnMut() -> bool) {
        let (mut ended, mut held) = (false, false);
        within(20, || {
            // Checked before `holds`, which sees the agent's last output then.
            ended = self.has_ended();
            held = holds();
            held || ended
        });
        let log = self.setup.log.display();
        let why = if ended {
            "it has ended"
        } else {
            "not within 20 s"
        };
        assert!(held, "{why}: {what}; log: {log}");
    }

    /// Returns the file that it logs to.
    pub fn log_file(&self) -> &Path {
        &self.setup.log
    }

    /// Returns all that it has logged, also before it was started again.
    pub fn log(&self) -> String {
        let log = &self.setup.log;
        fs::read_to_string(log).unwrap_or_else(|error| panic!("{}: {error}", log.display()))
    }

    /// Waits for a line that it logs since it was last started and that contains all of `parts`, and returns
    /// the line.
    pub fn logs(&self, parts: &[&str]) -> String {
        let mut found = None;
        self.eventually(&format!("a line with {parts:?}"), || {
            let log = self.log();
            found = log[self.logged..]
                .lines()
                .find(|line| parts.iter().all(|part| line.contains(part)))
                .map(str::to_owned);
            found.is_some()
        });
        found.expect("it was found")
    }

    /// Stops those of its threads whose names begin so, until what is returned is dropped, before the agent is.
    pub fn stop_threads(&self, name: &str) -> StoppedThreads {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.pid())).expect("it runs");
        let tasks = tasks.map(|task| task.expect("a thread").path());
        let named = tasks.filter(|task| {
            let own = fs::read_to_string(task.join("comm")).expect("a thread");
            own.starts_with(name)
        });
        let stopped = named.map(|task| {
            let number = task.file_name().and_then(OsStr::to_str).expect("a number");
            let thread = Pid::from_raw(number.parse().expect("a number"));
            ptrace::seize(thread, ptrace::Options::empty()).expect("it is not traced");
            ptrace::interrupt(thread).expect("it is traced");
            waitpid(thread, Some(WaitPidFlag::__WALL)).expect("it stops");
            thread
        });
        let stopped: Vec<Pid> = stopped.collect();
        assert!(!stopped.is_empty(), "there is none");
        StoppedThreads(stopped)
    }

    /// Limits its open files to `most`; returns the former limit.
    pub fn limit_files(&self, most: u64) -> u64 {
        let pid = self.pid().try_into().expect("a pid");
        let mut old = libc::rlimit {
            rlim_cur: 0,
            rlim_max: 0,
        };
        let resource = libc::RLIMIT_NOFILE;
        // SAFETY: the kernel fills the structure, which lives for the length of the call.
        let read = unsafe { libc::prlimit(pid, resource, std::ptr::null(), &raw mut old) };
        assert_eq!(read, 0, "{}", std::io::Error::last_os_error());
        let new = libc::rlimit {
            rlim_cur: most,
            ..old
        };
        // SAFETY: the kernel reads the structure, which lives for the length of the call.
        let set = unsafe { libc::prlimit(pid, resource, &raw const new, std::ptr::null_mut()) };
        assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
        old.rlim_cur
    }

    /// Runs a subcommand for its node; returns exit status, standard output and standard error.
    pub fn ask(&self, arguments: &[&str]) -> (std::process::ExitStatus, String, String) {
        output(&mut self.subcommand(arguments))
    }

    fn subcommand(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(program(self.setup.program));
        command
            .args(arguments)
            .args(["--node", &self.setup.node])
            .arg("--run-dir")
            .arg(&self.setup.run_dir);
        command
    }

    /// Returns `dataplane status` as JSON, if the daemon answers.
    pub fn status(&self) -> Option<Value> {
        let (status, text, _) = self.ask(&["status", "--json"]);
        status
            .success()
            .then(|| serde_json::from_str(&text).expect("JSON"))
    }

    /// Returns a pod's state and the reason for it.
    pub fn pod(&self, name: &str) -> (String, String) {
        let status = self.status().unwrap_or_default();
        let pods = status["pods"].as_array().cloned().unwrap_or_default();
        let pod = pods
            .iter()
            .find(|pod| pod["name"] == name)
            .cloned()
            .unwrap_or_default();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        (text(&pod["state"]), text(&pod["reason"]))
    }

    /// Waits until these pods are up.
    pub fn up(&self, names: &[&str]) {
        self.eventually(&format!("pods {names:?} up"), || {
            names.iter().all(|name| self.pod(name).0 == "up")
        });
    }

    /// Waits until a pod is in this state.
    pub fn is(&self, name: &str, state: &str) {
        self.eventually(&format!("pod {name} {state}"), || self.pod(name).0 == state);
    }

    /// Returns the value of a kernel counter.
    ///
    /// # Panics
    /// The agent does not answer, or has no such counter; neither means zero.
    pub fn counter(&self, word: &str) -> u64 {
        let status = self.status().expect("it answers");
        let counters = status["counters"].as_array().expect("counters");
        let of = counters.iter().find(|counter| counter[0] == word);
        let of = of.unwrap_or_else(|| panic!("no counter {word}: {counters:?}"));
        of[1].as_u64().expect("a number")
    }

    /// Runs `act`, and waits until a kernel counter has risen.
    pub fn counts<T>(&self, word: &str, what: &str, act: impl FnOnce() -> T) -> T {
        let before = self.counter(word);
        let done = act();
        eventually(&format!("{word}: {what}"), 5, || {
            self.counter(word) > before
        });
        done
    }

    /// Sends a POST to the admin socket, and returns the answer.
    pub fn post(&self, path: &str) -> String {
        http(&self.socket(), "POST", path)
    }

    /// Returns the number of workloads that it dials by HBONE.
    pub fn tunnelled(&self) -> usize {
        self.get("/config_dump")
            .matches("\"protocol\": \"HBONE\"")
            .count()
    }

    /// Sends a GET to the admin socket, and returns the answer.
    pub fn get(&self, path: &str) -> String {
        http(&self.socket(), "GET", path)
    }

    /// Returns the path of its admin socket.
    pub fn socket(&self) -> PathBuf {
        let Setup { run_dir, node, .. } = &self.setup;
        match self.setup.halves {
            "proxy" => run_dir.join(format!("{node}.proxy.sock")),
            _ => run_dir.join(node).join("admin.sock"),
        }
    }

    /// Removes all that it left. It must not run.
    pub fn uninstall(&self) -> (std::process::ExitStatus, String, String) {
        output(&mut self.uninstall_command())
    }

    /// Returns the command that does so.
    pub fn uninstall_command(&self) -> Command {
        let state = self.setup.state.display().to_string();
        let bpffs = self.setup.bpffs.display().to_string();
        self.subcommand(&["uninstall", "--state", &state, "--bpffs", &bpffs])
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            signal(&child, Signal::SIGTERM);
            let deadline = std::time::Instant::now() + scaled(Duration::from_secs(10));
            while matches!(child.try_wait(), Ok(None)) {
                if std::time::Instant::now() > deadline {
                    let _ = child.kill();
                }
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        if self.setup.halves != "proxy" {
            let (status, _, error) = self.uninstall();
            if !status.success() {
                eprintln!("uninstall {}: {error}", self.setup.node);
            }
        }
        if std::thread::panicking() {
            // A second panic would abort the process before the other guards have cleaned up.
            let log = fs::read_to_string(&self.setup.log).unwrap_or_default();
            eprintln!("--- log of {}:\n{}", self.setup.node, tail(&log, 40));
        }
    }
}

/// Returns the number of repairs of a part of capture.
pub fn repairs(agent: &Agent, part: &str) -> u64 {
    let series = format!("dataplane_repairs_total{{part=\"{part}\"}} ");
    let metrics = agent.get("/metrics");
    let line = metrics.lines().find_map(|line| line.strip_prefix(&series));
    line.and_then(|count| count.parse().ok()).unwrap_or(0)
}

fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

fn signal(child: &std::process::Child, signal: Signal) {
    let pid = nix::unistd::Pid::from_raw(child.id().try_into().expect("a pid"));
    let _ = nix::sys::signal::kill(pid, signal);
}

fn http(socket: &Path, method: &str, path: &str) -> String {
    use std::io::{Read, Write};
    let mut stream = std::os::unix::net::UnixStream::connect(socket).expect("the admin socket");
    let patience = scaled(Duration::from_secs(20));
    stream.set_read_timeout(Some(patience)).expect("a time");
    write!(
        stream,
        "{method} {path} HTTP/1.0\r\nhost: x\r\ncontent-length: 0\r\n\r\n"
    )
    .expect("it reads");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("it answers");
    answer
}

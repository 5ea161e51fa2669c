//! `dataplane check`: the requirements that this machine meets or lacks, one line each.
//!
//! The daemon makes the same checks of the kernel before it starts, and refuses rather than half-work.

use std::fmt;
use std::fs;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::Path;

use super::CheckOptions;
use crate::node::capture::pins::Pins;
use crate::node::capture::programs::{self, Loader};
use crate::node::capture::{CaptureError, enrol, routes};
use crate::seam::Listeners;
use crate::sys::netns::Netns;
use crate::sys::{bpffs, caps, cgroup, processes, socket};

/// The oldest kernel that has all features that are used.
const FLOOR: (u32, u32) = (5, 17);
/// The oldest kernel that is tested.
const TESTED: (u32, u32) = (6, 1);

/// The result of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The requirement is met.
    Good,
    /// Something to know; the daemon starts.
    Note,
    /// The daemon would refuse to start.
    Lacks,
}

/// A check with its result: one line of the output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// The result.
    pub verdict: Verdict,
    /// The subject of the check.
    pub what: &'static str,
    /// The findings, and what would help.
    pub detail: String,
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = match self.verdict {
            Verdict::Good => "ok",
            Verdict::Note => "note",
            Verdict::Lacks => "lacks",
        };
        write!(f, "{verdict:<6} {:<14} {}", self.what, self.detail)
    }
}

fn line(verdict: Verdict, what: &'static str, detail: impl Into<String>) -> Line {
    Line {
        verdict,
        what,
        detail: detail.into(),
    }
}

/// Returns all lines, and `true` if the daemon would start.
pub async fn run(options: &CheckOptions) -> (String, bool) {
    let lines = lines(options).await;
    let text = lines.iter().map(|line| format!("{line}\n")).collect();
    (
        text,
        lines.iter().all(|line| line.verdict != Verdict::Lacks),
    )
}

async fn lines(options: &CheckOptions) -> Vec<Line> {
    let mut lines = vec![version()];
    lines.extend(capabilities());
    lines.push(match processes::refuse_in_other_namespace() {
        Ok(()) => line(Verdict::Good, "processes", "those of the machine are seen"),
        Err(why) => line(Verdict::Lacks, "processes", why),
    });
    let root = cgroup::root();
    lines.push(match (&root, &options.cgroup) {
        (Err(error), _) => line(Verdict::Lacks, "cgroup v2", error.to_string()),
        (Ok(root), None) => line(Verdict::Good, "cgroup v2", root.display().to_string()),
        (Ok(root), Some(pods)) => {
            match fs::canonicalize(pods).and_then(|pods| cgroup::id(root, &pods)) {
                Ok(_) => line(Verdict::Good, "cgroup v2", pods.display().to_string()),
                Err(error) => line(
                    Verdict::Lacks,
                    "cgroup v2",
                    format!("{}: {error}", pods.display()),
                ),
            }
        }
    });
    let folder = &options.places.bpffs;
    let shown = folder.display();
    lines.push(match bpffs::look(folder) {
        Ok(bpffs::Folder::Mounted) => line(Verdict::Good, "bpffs", shown.to_string()),
        Ok(bpffs::Folder::Empty) => line(
            Verdict::Note,
            "bpffs",
            format!("{shown} is none; `run` mounts one"),
        ),
        Ok(bpffs::Folder::Occupied) => line(
            Verdict::Lacks,
            "bpffs",
            format!("{shown}: {}", bpffs::occupied()),
        ),
        Err(error) => line(Verdict::Lacks, "bpffs", format!("{shown}: {error}")),
    });
    if lines.iter().all(|line| line.verdict != Verdict::Lacks) {
        lines.extend(trial(folder).await);
    }
    if let Ok(root) = root {
        lines.extend(others(options.cgroup.as_deref().unwrap_or(&root)));
    }
    lines
}

/// Checks the kernel.
pub async fn kernel(bpffs: &Path) -> Vec<Line> {
    let mut lines = vec![version()];
    lines.extend(trial(bpffs).await);
    lines
}

fn version() -> Line {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let release = release.trim();
    let mut numbers = release
        .split(['.', '-'])
        .map_while(|part| part.parse().ok());
    let version: (u32, u32) = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version < FLOOR {
        line(
            Verdict::Lacks,
            "kernel",
            format!("{release}; {}.{} or newer is needed", FLOOR.0, FLOOR.1),
        )
    } else if version < TESTED {
        line(
            Verdict::Note,
            "kernel",
            format!("{release}; tested from {}.{} on", TESTED.0, TESTED.1),
        )
    } else {
        line(Verdict::Good, "kernel", release)
    }
}

fn capabilities() -> Vec<Line> {
    let missing = caps::missing(caps::NEEDED);
    if missing.is_empty() {
        let names: Vec<String> = caps::NEEDED
            .iter()
            .map(|(name, _)| name.to_string())
            .collect();
        return vec![line(Verdict::Good, "capabilities", names.join(" "))];
    }
    missing
        .into_iter()
        .map(|(capability, why)| {
            line(
                Verdict::Lacks,
                "capabilities",
                format!("{capability}: needed to {why}"),
            )
        })
        .collect()
}

/// Captures a trial namespace as the daemon captures each pod.
async fn trial(folder: &Path) -> Vec<Line> {
    let mut lines = Vec::new();
    let netns = match Netns::new() {
        Ok(netns) => netns,
        Err(error) => {
            return vec![line(
                Verdict::Lacks,
                "namespaces",
                format!("cannot make or enter one: {error}"),
            )];
        }
    };
    let listeners = match enrol::listen(&netns) {
        Ok(listeners) => {
            lines.push(line(
                Verdict::Good,
                "sockets",
                "transparent and marked, in a pod's namespace",
            ));
            listeners
        }
        Err(error) => {
            lines.push(line(Verdict::Lacks, "sockets", error.to_string()));
            return lines;
        }
    };
    lines.push(
        match routes::trial(&netns, Ipv4Addr::LOCALHOST.into()).await {
            Ok(()) => line(Verdict::Good, "routes", "by mark, in a pod's namespace"),
            Err(error) => line(Verdict::Lacks, "routes", error.to_string()),
        },
    );
    lines.push(ipv6(&netns).await);
    // Pins are on a private mount, so that nothing is left of them, however this ends.
    let loaded = bpffs::in_private(folder, || load(folder, &netns, &listeners))
        .map_err(CaptureError::file(folder))
        .and_then(|loaded| loaded);
    lines.push(match loaded {
        Ok(()) => line(
            Verdict::Good,
            "programs",
            format!(
                "{} and {} load",
                programs::NODE_PROGRAMS.join(", "),
                programs::POD_PROGRAM
            ),
        ),
        Err(error) => {
            // Only `dataplane load` prints the verifier's log.
            let text = error.to_string();
            let first = text.lines().next().unwrap_or_default().to_owned();
            line(Verdict::Lacks, "programs", first)
        }
    });
    lines
}

fn load(folder: &Path, netns: &Netns, listeners: &Listeners) -> Result<(), CaptureError> {
    let mut pins = Pins::trial(folder);
    let _lock = pins.make()?;
    let mut loader = Loader::new(&pins);
    let _node = loader.node()?;
    let cookie = netns.cookie().map_err(|error| CaptureError::Namespace {
        what: "read the cookie",
        why: error.to_string(),
    })?;
    let mut pod = loader.pod(cookie, None, Some(listeners))?;
    pod.attach(netns, &pins.pod(cookie))
}

/// Checks IPv6. Without it there is no listener for it: connections of pods by IPv6 are refused, not let pass.
async fn ipv6(netns: &Netns) -> Line {
    if !socket::has_ipv6() {
        return line(
            Verdict::Note,
            "IPv6",
            "this kernel has none: pods are captured by IPv4 alone, and refused by IPv6",
        );
    }
    match routes::trial(netns, Ipv6Addr::LOCALHOST.into()).await {
        Ok(()) => line(Verdict::Good, "IPv6", "pods are captured by both families"),
        Err(error) => line(Verdict::Lacks, "IPv6", error.to_string()),
    }
}

/// Lists other programs on the same hooks: they run as well, and our programs may see what they have rewritten.
fn others(pods: &Path) -> Vec<Line> {
    let mut lines = Vec::new();
    for (name, count) in crate::sys::hooks::attached(pods) {
        match count {
            Ok(0) => {}
            Ok(count) => lines.push(line(
                Verdict::Note,
                "hooks",
                format!(
                    "{count} programs on {name} of {} or above it",
                    pods.display()
                ),
            )),
            Err(error) => lines.push(line(Verdict::Note, "hooks", format!("{name}: {error}"))),
        }
    }
    if lines.is_empty() {
        lines.push(line(
            Verdict::Good,
            "hooks",
            format!("no programs on those of {}", pods.display()),
        ));
    }
    lines
}

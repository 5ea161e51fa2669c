//! `dataplane status`: queries a running daemon over its admin socket.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};

use super::StatusOptions;
use crate::node::capture::node_folder::{self, Holder};
use crate::observe::status::{PodStatus, StatusReport};

/// How long to wait for an answer of the daemon.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// No daemon runs for the node.
#[derive(Debug, thiserror::Error)]
pub enum NotRunning {
    /// No process holds the node's folder.
    #[error("no dataplane agent runs for {0} (start one with `dataplane run`)")]
    Nobody(String),
    /// `dataplane uninstall` is running for the node.
    #[error("no dataplane agent runs for node {0}: it is being uninstalled")]
    Uninstalled(String),
}

/// One runs, and is not to be reached.
#[derive(Debug, thiserror::Error)]
#[error(
    "the dataplane agent of node {node} runs, and its admin socket {socket} is gone, or not there yet; it \
     makes one within seconds"
)]
struct Unreachable {
    node: String,
    socket: String,
}

/// Returns the state of a node as text, or as JSON.
///
/// # Errors
/// No daemon runs, or it does not answer.
pub fn run(options: &StatusOptions) -> Result<String> {
    let socket = match &options.node {
        Some(node) => options.places.socket(node),
        None => only_socket(&options.places.run_dir)?,
    };
    let mut report = parse(&get(&socket, "/status")?)?;
    if let Ok(node) = report.node.parse() {
        let proxy = options.places.proxy_socket(&node);
        // The file is left behind by a proxy that was killed; the node reports that none serves.
        if UnixStream::connect(&proxy).is_ok() {
            add_proxy(&mut report, get(&proxy, "/status"));
        }
    }
    match options.json {
        true => Ok(serde_json::to_string(&report)? + "\n"),
        false => Ok(table(&report)),
    }
}

fn parse(body: &str) -> Result<StatusReport> {
    serde_json::from_str(body).context("the daemon is of another version")
}

/// Adds the problems that only the proxy half reports, where the halves are two processes.
fn add_proxy(report: &mut StatusReport, answer: Result<String>) {
    let problems = match answer.and_then(|body| parse(&body)) {
        Ok(proxy) => proxy.problems,
        Err(error) => vec![format!("{error:#}")],
    };
    for problem in problems {
        if !report.problems.contains(&problem) {
            report.problems.push(format!("proxy: {problem}"));
        }
    }
}

/// Returns the socket of the only daemon that runs here.
fn only_socket(run: &Path) -> Result<PathBuf> {
    let entries = std::fs::read_dir(run).into_iter().flatten().flatten();
    // A socket without a listener was left by a daemon that was killed.
    let nodes: Vec<String> = entries
        .filter(|entry| {
            let answers = UnixStream::connect(entry.path().join("admin.sock")).is_ok();
            answers || node_folder::holder(&entry.path()).is_some()
        })
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    match nodes.as_slice() {
        [node] => Ok(run.join(node).join("admin.sock")),
        [] => Err(NotRunning::Nobody(format!("any node (nothing in {})", run.display())).into()),
        nodes => bail!(
            "more than one daemon runs here: say which with --node ({})",
            nodes.join(", ")
        ),
    }
}

/// Returns the daemon's answer at a path.
///
/// # Errors
/// No daemon listens, or its answer is invalid or an error.
pub fn get(socket: &Path, path: &str) -> Result<String> {
    let mut stream = UnixStream::connect(socket).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => not_reached(socket),
        _ => anyhow::Error::new(error).context(socket.display().to_string()),
    })?;
    stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
    write!(stream, "GET {path} HTTP/1.0\r\nhost: dataplane\r\n\r\n")?;
    let mut answer = String::new();
    stream
        .read_to_string(&mut answer)
        .map_err(|error| match error.kind() {
            // This is the error of a socket's timeout.
            io::ErrorKind::WouldBlock => anyhow!("within {} s", ANSWER_TIMEOUT.as_secs()),
            _ => anyhow!("whole: {error}"),
        })
        .map_err(|how| anyhow!("{}: the daemon does not answer {how}", socket.display()))?;
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .context("not an HTTP answer")?;
    let status = head.lines().next().unwrap_or_default();
    ensure!(
        status.contains(" 200 "),
        "{path}: {status}: {}",
        body.trim()
    );
    Ok(body.to_owned())
}

/// Returns the error for a socket without a listener: the daemon does not run, or only its socket is gone.
fn not_reached(socket: &Path) -> anyhow::Error {
    let shown = socket.display().to_string();
    let folder = socket.parent().unwrap_or(socket);
    let node = folder.file_name().unwrap_or_default().display().to_string();
    match node_folder::holder(folder) {
        Some(Holder::Agent) => Unreachable {
            node,
            socket: shown,
        }
        .into(),
        Some(Holder::Uninstall) => NotRunning::Uninstalled(node).into(),
        None => NotRunning::Nobody(format!("this node ({shown})")).into(),
    }
}

fn table(report: &StatusReport) -> String {
    use std::fmt::Write as _;
    let mut text = format!(
        "node {} (dataplane {}), policies: {}\n\n",
        report.node, report.version, report.policies
    );
    let mut rows = vec![["NAMESPACE", "POD", "STATE", "ADDRESSES", "WHY"].map(str::to_owned)];
    for pod in &report.pods {
        let reason = pod.reason.clone();
        let forwards = pod.forwards.then(|| FORWARDS.to_owned());
        let why = reason.into_iter().chain(outside(pod)).chain(forwards);
        let why: Vec<String> = why.collect();
        rows.push([
            pod.namespace.clone(),
            pod.name.clone(),
            pod.state.clone(),
            pod.addresses.join(","),
            why.join("; "),
        ]);
    }
    let mut widths = [0; 5];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    for row in &rows {
        let cells = row
            .iter()
            .zip(widths)
            .map(|(cell, width)| format!("{cell:<width$}"));
        let line = cells.collect::<Vec<_>>().join("  ");
        let _ = writeln!(text, "{}", line.trim_end());
    }
    for problem in &report.problems {
        let _ = writeln!(text, "\nproblem: {problem}");
    }
    text
}

/// The note for a pod that may forward traffic of others.
const FORWARDS: &str = "forwards: what it does for others is not captured, and no policy holds";

/// Returns the note for processes outside of a pod's cgroup, if there are any.
fn outside(pod: &PodStatus) -> Option<String> {
    let PodStatus {
        outside, in_clear, ..
    } = pod;
    let told = format!("processes outside of its cgroup: {outside}");
    match (outside, in_clear) {
        (0, _) => None,
        (_, 0) => Some(told),
        _ => Some(format!(
            "{told}; connect in clear and without identity, as outside of --cgroup too: {in_clear}"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Places;
    use crate::node::capture::node_folder::{Mark, NodeFolder};
    use crate::node::capture::uninstall::StoppedNode;

    #[test]
    fn a_process_that_connects_in_clear_is_told_with_that() {
        let told = |outside, in_clear| {
            let pod = PodStatus {
                outside,
                in_clear,
                ..PodStatus::default()
            };
            super::outside(&pod).unwrap_or_default()
        };
        assert_eq!(told(0, 0), "");
        assert_eq!(told(1, 0), "processes outside of its cgroup: 1");
        assert_eq!(
            told(3, 2),
            "processes outside of its cgroup: 3; connect in clear and without identity, as outside of --cgroup too: 2"
        );
    }

    #[test]
    fn a_pod_that_waits_says_why() {
        let report = StatusReport {
            node: "one".into(),
            version: "1".into(),
            pods: vec![PodStatus {
                namespace: "ns".into(),
                name: "pod".into(),
                state: "waiting".into(),
                reason: Some("it has no address yet".into()),
                ..PodStatus::default()
            }],
            policies: 2,
            problems: vec!["a.yaml:3: spec: wrong".into()],
            counters: Vec::new(),
        };
        let text = table(&report);
        assert!(
            text.contains("ns         pod  waiting             it has no address yet"),
            "{text}"
        );
        assert!(
            text.starts_with("node one (dataplane 1), policies: 2\n"),
            "{text}"
        );
        assert!(text.contains("problem: a.yaml:3: spec: wrong"), "{text}");
    }

    #[test]
    fn a_node_that_is_uninstalled_has_no_daemon() {
        let run = tempfile::tempdir().expect("a folder");
        let mark = Mark {
            node: "one".parse().expect("a name"),
            bpffs: run.path().join("bpf"),
            cgroup: "/cgroup".into(),
            state: "/state".into(),
            cluster_id: "Kubernetes".into(),
            root: None,
        };
        let mut agent = NodeFolder::claim(run.path(), &mark).expect("free");
        agent.write_mark(&mark).expect("a mark");
        let said = || {
            let socket = only_socket(run.path()).expect("somebody has it");
            get(&socket, "/status")
                .expect_err("nobody answers")
                .to_string()
        };
        assert!(said().contains("agent of node one runs"), "{}", said());
        drop(agent);
        let places = Places {
            run_dir: run.path().to_owned(),
            bpffs: mark.bpffs.clone(),
        };
        let ended = StoppedNode::find(&places, &mark.state, &mark.node);
        let ended = ended.expect("it has ended");
        assert!(
            said().contains("node one: it is being uninstalled"),
            "{}",
            said()
        );
        drop(ended);
        let _agent = NodeFolder::claim(run.path(), &mark).expect("free");
        assert!(said().contains("agent of node one runs"), "{}", said());
    }

    #[test]
    fn without_a_daemon_that_is_said() {
        let run = tempfile::tempdir().expect("a folder");
        let error = only_socket(run.path()).expect_err("nobody").to_string();
        assert!(error.contains("no dataplane agent runs"), "{error}");
        let error = get(&run.path().join("admin.sock"), "/status").expect_err("nobody");
        assert!(
            error.to_string().contains("no dataplane agent runs"),
            "{error}"
        );
    }
}

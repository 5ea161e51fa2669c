//! `dataplane status`: queries a running daemon over its admin socket.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::StatusOptions;
use crate::node::capture::node_folder::{self, Holder};
use crate::observe::ask::{Answer, AskError, ask};
use crate::observe::status::{PodStatus, StatusReport};

/// How long to wait for an answer of the daemon.
const STATUS_TIMEOUT: Duration = Duration::from_secs(5);

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

/// One may run, and this user may not ask.
#[derive(Debug, thiserror::Error)]
#[error("{0}: this user may not ask whether a dataplane agent runs; root may")]
struct Forbidden(String);

/// Returns true if the permissions of a folder or a socket keep this user out. EPERM has other causes: a BPF file
/// system returns it for each name with a dot.
fn is_forbidden(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EACCES)
}

/// Returns the state of a node as text, or as JSON.
///
/// # Errors
/// No daemon runs, it does not answer, or this user may not ask.
pub async fn run(options: &StatusOptions) -> Result<String> {
    let socket = match &options.node {
        Some(node) => options.places.socket(node),
        None => only_socket(&options.places.run_dir).await?,
    };
    let mut report = of(&socket).await?;
    if let Ok(node) = report.node.parse() {
        let proxy = options.places.proxy_socket(&node);
        match ask(&proxy, "/status", STATUS_TIMEOUT).await {
            // A proxy that was killed leaves the file behind; the node reports that none serves.
            Err(AskError::Nobody(_)) => {}
            answer => add_proxy(&mut report, parse(&proxy, answer)),
        }
    }
    match options.json {
        true => Ok(serde_json::to_string(&report)? + "\n"),
        false => Ok(table(&report)),
    }
}

/// Returns what a daemon reports.
///
/// # Errors
/// No daemon listens, or its answer is invalid or an error.
pub async fn of(socket: &Path) -> Result<StatusReport> {
    match ask(socket, "/status", STATUS_TIMEOUT).await {
        Err(AskError::Nobody(error)) => Err(not_reached(socket, error)),
        answer => parse(socket, answer),
    }
}

fn parse(socket: &Path, answer: Result<Answer, AskError>) -> Result<StatusReport> {
    let Answer { status, body } = answer.with_context(|| socket.display().to_string())?;
    ensure!(status.contains(" 200 "), "{status}: {}", body.trim());
    serde_json::from_str(&body).context("the daemon is of another version")
}

/// Adds the problems that only the proxy half reports, where the halves are two processes.
fn add_proxy(report: &mut StatusReport, answer: Result<StatusReport>) {
    let problems = match answer {
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
async fn only_socket(run: &Path) -> Result<PathBuf> {
    let entries = match std::fs::read_dir(run) {
        Err(error) if is_forbidden(&error) => bail!(Forbidden(run.display().to_string())),
        entries => entries.into_iter().flatten().flatten(),
    };
    let (mut nodes, mut forbidden) = (Vec::new(), None);
    for folder in entries.map(|entry| entry.path()) {
        // A socket without a listener was left by a daemon that was killed.
        let socket = folder.join("admin.sock");
        let runs = node_folder::holder(&folder).is_some()
            || match ask(&socket, "/healthz/ready", STATUS_TIMEOUT).await {
                Err(AskError::Nobody(error)) => {
                    if is_forbidden(&error) {
                        forbidden = Some(Forbidden(folder.display().to_string()));
                    }
                    false
                }
                Ok(_) | Err(_) => true,
            };
        if runs && let Some(name) = folder.file_name() {
            nodes.push(name.to_string_lossy().into_owned());
        }
    }
    match nodes.as_slice() {
        [node] => Ok(run.join(node).join("admin.sock")),
        [] if let Some(forbidden) = forbidden => Err(forbidden.into()),
        [] => Err(NotRunning::Nobody(format!("any node (nothing in {})", run.display())).into()),
        nodes => bail!(
            "more than one daemon runs here: say which with --node ({})",
            nodes.join(", ")
        ),
    }
}

/// Returns the error for a socket without a listener: the daemon does not run, or only its socket is gone.
fn not_reached(socket: &Path, error: io::Error) -> anyhow::Error {
    let shown = socket.display().to_string();
    if is_forbidden(&error) {
        return Forbidden(shown).into();
    }
    if !matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
    ) {
        return anyhow::Error::new(error).context(shown);
    }
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
    let not_enforced = match report.policies_not_enforced {
        0 => String::new(),
        count => format!(", not enforced: {count}"),
    };
    let mut text = format!(
        "node {} (dataplane {}), policies: {}{not_enforced}\n\n",
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
            policies_not_enforced: 1,
            manifests_refused: 1,
            problems: vec!["a.yaml:3: spec: wrong".into()],
            counters: Vec::new(),
        };
        let text = table(&report);
        assert!(
            text.contains("ns         pod  waiting             it has no address yet"),
            "{text}"
        );
        assert!(
            text.starts_with("node one (dataplane 1), policies: 2, not enforced: 1\n"),
            "{text}"
        );
        assert!(text.contains("problem: a.yaml:3: spec: wrong"), "{text}");
    }

    #[tokio::test]
    async fn a_node_that_is_uninstalled_has_no_daemon() {
        let run = tempfile::tempdir().expect("a folder");
        let mark = Mark {
            node: "one".parse().expect("a name"),
            bpffs: run.path().join("bpf"),
            cgroup: "/cgroup".into(),
            state: "/state".into(),
            cluster_id: "Kubernetes".into(),
            root: None,
            boot: None,
            local_policies: false,
        };
        let mut agent = NodeFolder::claim(run.path(), &mark).expect("free");
        agent.write_mark(&mark).expect("a mark");
        let said = async || {
            let socket = only_socket(run.path()).await.expect("somebody has it");
            of(&socket).await.expect_err("nobody answers").to_string()
        };
        let told = said().await;
        assert!(told.contains("agent of node one runs"), "{told}");
        drop(agent);
        let places = Places {
            run_dir: run.path().to_owned(),
            bpffs: mark.bpffs.clone(),
        };
        let ended = StoppedNode::find(&places, &mark.state, &mark.node);
        let ended = ended.expect("it has ended");
        let told = said().await;
        assert!(told.contains("node one: it is being uninstalled"), "{told}");
        drop(ended);
        let _agent = NodeFolder::claim(run.path(), &mark).expect("free");
        let told = said().await;
        assert!(told.contains("agent of node one runs"), "{told}");
    }

    #[tokio::test]
    async fn without_a_daemon_that_is_said() {
        let run = tempfile::tempdir().expect("a folder");
        let error = only_socket(run.path()).await.expect_err("nobody");
        assert!(
            error.to_string().contains("no dataplane agent runs"),
            "{error}"
        );
        let error = of(&run.path().join("admin.sock"))
            .await
            .expect_err("nobody");
        assert!(
            error.to_string().contains("no dataplane agent runs"),
            "{error}"
        );
    }
}

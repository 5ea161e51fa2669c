//! The node process, as a proxy process finds it in the run folder: the places and the state of the node.
//! A proxy with other ones would dial pods of the mesh in clear. So it does not start with them; a node that is
//! started with others later says so when the proxy connects to it (`seam::borrow`).

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::config_source::{self, ConfigSource};
use super::{AgentError, ask_disk, state_error};
use crate::config::RunOptions;
use crate::control::state::SharedState;
use crate::node::capture::CaptureError;
use crate::node::capture::node_folder::{self, Holder, Mark};
use crate::node::capture::uninstall::canonical;
use crate::seam::{ProxyLock, SharedSettings};
use crate::sys::made::CreatedPaths;

/// How often a proxy checks whether the node has started.
const POLL: Duration = Duration::from_millis(200);

/// Keeps proxies away for as long as the lock lives: they would carry connections of which this process knows nothing.
///
/// # Errors
/// A proxy of the node runs.
pub(super) fn exclude_proxies(options: &RunOptions) -> Result<ProxyLock, AgentError> {
    let path = options.places.proxy_lock(&options.node);
    let lock = ProxyLock::exclude(&path).map_err(CaptureError::file(&path))?;
    Ok(lock.ok_or(CaptureError::Serves(path))?)
}

/// Takes the lock of a proxy, with the folder that was made for it.
///
/// # Errors
/// `dataplane run` serves the node, or it is being uninstalled.
fn share_proxy_lock(options: &RunOptions) -> Result<(ProxyLock, CreatedPaths), AgentError> {
    let (places, node) = (&options.places, &options.node);
    let path = places.proxy_lock(node);
    let locked = ProxyLock::share(&path).map_err(CaptureError::file(&path))?;
    locked.ok_or_else(|| {
        let lock = path.display();
        AgentError::Held(match node_folder::holder(&places.of_node(node)) {
            Some(Holder::Uninstall) => format!(
                "node {node} is being uninstalled: `dataplane uninstall` holds {lock}; start its halves when it has ended"
            ),
            Some(Holder::Agent) | None => format!(
                "another dataplane agent already runs for this node, and serves it alone (`dataplane run`): it \
                 holds {lock}; end it first, and start `dataplane node`"
            ),
        })
    })
}

/// Returns what a proxy says that has come before its node.
fn waiting(options: &RunOptions) -> String {
    let socket = options.places.seam(&options.node);
    format!(
        "waits for the node (`dataplane node`), at {}",
        socket.display()
    )
}

/// Returns the path of the state without links.
pub(super) async fn state_path(options: &RunOptions) -> PathBuf {
    let state = options.state.clone();
    ask_disk(&options.state, move || canonical(&state)).await
}

/// The settings that both halves must share, of a process with these options, this path of the state without links,
/// and this root.
pub(super) fn shared_settings(
    options: &RunOptions,
    state: &Path,
    root: Option<&str>,
) -> SharedSettings {
    SharedSettings {
        state: Some(state.to_owned()),
        configuration: config_source::place(options),
        cluster_id: Some(options.cluster_id.clone()),
        cluster_domain: Some(options.cluster_domain.clone()),
        network: Some(options.network.clone()),
        trust_domain: Some(options.trust_domain.clone()),
        root: root.map(str::to_owned),
    }
}

/// A node that a proxy serves. It cannot be uninstalled while this lives.
pub(super) struct PeerNode {
    options: RunOptions,
    /// The path of this proxy's state, without links.
    state: PathBuf,
    /// The node's mark at the start; none if the node had not started yet.
    mark: Option<Mark>,
    _lock: ProxyLock,
    made: CreatedPaths,
}

impl PeerNode {
    /// Refuses where the node itself would refuse to start. The folder that is made here is removed when this
    /// is dropped, unless [`PeerNode::keep`] is called.
    pub(super) async fn new(
        options: &RunOptions,
        config: &ConfigSource,
    ) -> Result<Self, AgentError> {
        let (places, node) = (&options.places, &options.node);
        places.socket_fits(node).map_err(AgentError::Settings)?;
        config.refuse_lost(&places.run_dir, node)?;
        let (lock, made) = share_proxy_lock(options)?;
        let mut peer = Self {
            options: options.clone(),
            state: state_path(options).await,
            mark: None,
            _lock: lock,
            made,
        };
        peer.mark = peer.read_mark()?;
        Ok(peer)
    }

    /// Returns the fingerprint of the root of the node's state, if it is known.
    pub(super) fn known_root(&self) -> Option<String> {
        self.mark.as_ref()?.root.clone()
    }

    /// Keeps the folder that was made. Returns the settings that the node must share, if this is the state's root.
    pub(super) async fn keep(&mut self, root: &str) -> SharedSettings {
        self.made.keep();
        self.state = state_path(&self.options).await;
        shared_settings(&self.options, &self.state, Some(root))
    }

    /// Waits until the node has started. It writes its mark before it accepts proxies.
    ///
    /// # Errors
    /// The node has other places, or another root than `state`.
    pub(super) async fn wait_until_started(&self, state: &SharedState) -> Result<(), AgentError> {
        let mut told = false;
        let mark = loop {
            if let Some(mark) = self.read_mark()? {
                break mark;
            }
            if !told {
                tracing::info!("{}", waiting(&self.options));
            }
            told = true;
            tokio::time::sleep(POLL).await;
        };
        match mark.root {
            Some(root) => state.is(&root).map_err(state_error),
            None => Ok(()),
        }
    }

    fn read_mark(&self) -> Result<Option<Mark>, AgentError> {
        let options = &self.options;
        let mark = node_folder::read_mark(&options.places.run_dir, &options.node)?;
        if let Some(mark) = &mark {
            let own = shared_settings(options, &self.state, None);
            if let Some(differ) = own.difference(&mark.shared_settings()) {
                return Err(CaptureError::OtherPlace(format!(
                    "node {} was started with {}, and this proxy with {}: start its proxy so, or the node anew",
                    options.node, differ.node, differ.proxy
                ))
                .into());
            }
        }
        Ok(mark)
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Command};
    use crate::exit::Exit;
    use crate::node::capture::uninstall::StoppedNode;

    /// The options of a proxy of node `one` with this run folder.
    fn options(run: &Path) -> RunOptions {
        let run = run.to_str().expect("UTF-8");
        let line = ["dataplane", "proxy", "--manifests", "m", "--node", "one"];
        let bpffs = ["--run-dir", run, "--bpffs", run];
        match Cli::parse_from(line.into_iter().chain(bpffs)).command {
            Command::Proxy(options) => *options,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_proxy_beside_a_run_of_its_node_says_so_as_another_agent_would() {
        let run = tempfile::tempdir().expect("a folder");
        let options = options(run.path());
        let lock = run.path().join("one.proxy.lock").display().to_string();
        let both = exclude_proxies(&options).expect("no proxy runs");
        let error = share_proxy_lock(&options).expect_err("a run serves the node");
        assert_eq!(error.exit(), Exit::Held);
        let told = error.to_string();
        assert!(told.contains(&lock) && told.contains("end it"), "{told}");
        assert!(!told.contains("uninstalled"), "{told}");
        drop(both);
        let (_proxy, _made) = share_proxy_lock(&options).expect("nobody serves the node");
    }

    #[test]
    fn a_proxy_of_a_node_that_is_being_uninstalled_says_so() {
        let run = tempfile::tempdir().expect("a folder");
        let options = options(run.path());
        let mark = Mark {
            node: options.node.clone(),
            bpffs: options.places.bpffs.clone(),
            cgroup: "/cgroup".into(),
            state: "/state".into(),
            cluster_id: "Kubernetes".into(),
            root: None,
            boot: None,
            local_policies: false,
        };
        let mut folder = node_folder::NodeFolder::claim(run.path(), &mark).expect("free");
        folder.write_mark(&mark).expect("a mark");
        drop(folder);
        let ended = StoppedNode::find(&options.places, &mark.state, &mark.node);
        let _ended = ended.expect("it has ended");
        let error = share_proxy_lock(&options).expect_err("it is being uninstalled");
        assert_eq!(error.exit(), Exit::Held);
        let told = error.to_string();
        assert!(told.contains("is being uninstalled"), "{told}");
        assert!(!told.contains("dataplane run"), "{told}");
    }

    #[test]
    fn a_proxy_that_waits_names_the_socket_of_its_node() {
        let options = options(Path::new("/mistyped"));
        let socket = options.places.seam(&options.node);
        let told = waiting(&options);
        assert!(told.contains(socket.to_str().expect("UTF-8")), "{told}");
    }
}

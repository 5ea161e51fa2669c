//! `dataplane uninstall`: removes all that the agent of a node has left.

use std::io;
use std::time::Duration;

use super::UninstallOptions;
use crate::agent::{self, AgentError};
use crate::config::NodeName;
use crate::control::disk;
use crate::control::enrolled::EnrolmentRecords;
use crate::control::state::SharedState;
use crate::node::capture::CaptureError;
use crate::node::capture::uninstall::{
    Outcome, StoppedNode, canonical, refuse_elsewhere, refuse_unless_clean,
};
use crate::observe::log;
use crate::sys::machine_id;

/// The time between the removal of the pods' records and the end of their capture, in which other nodes stop
/// dialling them by HBONE.
const NOTICE: Duration = Duration::from_secs(1);

/// Removes what can be removed; returns `None` if there is nothing of the node.
///
/// # Errors
/// A privilege is missing; nothing of the node is known, but something may be there; an agent or a proxy runs.
/// Nothing was changed then.
pub async fn run(options: &UninstallOptions) -> Result<Option<Outcome>, AgentError> {
    agent::privileges(agent::Halves::Node)?;
    let node = &options.node;
    let (run_dir, bpffs) = (&options.places.run_dir, &options.places.bpffs);
    let state = ask_state(options, |options| canonical(&options.state)).await;
    let ended = match StoppedNode::find(&options.places, &state, node) {
        Err(unknown @ CaptureError::UnknownNode { .. }) => {
            refuse_unless_clean(unknown, run_dir, bpffs, node)?;
            ask_state(options, refuse_records).await?;
            refuse_elsewhere(run_dir, bpffs, node)?;
            return Ok(None);
        }
        ended => ended?,
    };
    let root = ended.root().map(str::to_owned);
    let left = match ask_state(options, |options| withdraw(options, root)).await {
        Ok(0) => None,
        Ok(_) => {
            tokio::time::sleep(NOTICE).await;
            None
        }
        Err(error) => Some(format!(
            "{}: {error}; other nodes may go on dialling pods of this one by HBONE: uninstall again once \
             that is mended; if the state is lost for good, and nothing else is left, remove {}",
            options.state.display(),
            options.places.of_node(node).display(),
        )),
    };
    ended
        .uninstall(left.into_iter().collect())
        .await
        .map(Some)
        .map_err(Into::into)
}

/// Reads or changes what is in the state that nodes share. While its disk does not answer that is told.
async fn ask_state<T: Send + 'static>(
    options: &UninstallOptions,
    work: impl FnOnce(&UninstallOptions) -> T + Send + 'static,
) -> T {
    let tell = |line: &str| log::say(&format!("{line}; nothing goes on before that is done"));
    let of = options.clone();
    disk::answer(&options.state, tell, move || work(&of)).await
}

/// Fails if there are records of pods of this node, but nothing else of it: it may be a node of another machine,
/// whose agent runs.
fn refuse_records(options: &UninstallOptions) -> Result<(), AgentError> {
    let node = &options.node;
    let Some(state) = SharedState::found(&options.state).map_err(anyhow::Error::from)? else {
        return Ok(());
    };
    let records = records(state, node);
    let said = records.read().map_err(anyhow::Error::from)?;
    let count = said.own.len() + said.namesakes.len();
    if count == 0 {
        return Ok(());
    }
    Err(AgentError::Other(anyhow::anyhow!(
        "{} has {count} records of pods of node {node}, of which nothing is known in {}: other nodes dial \
         them by HBONE; remove them if no agent of that node runs on any machine, or start it; nothing is \
         changed",
        records.folder().display(),
        options.places.run_dir.display(),
    )))
}

/// Removes the records of this node's pods, which tells other nodes that they left the mesh; returns their
/// number.
///
/// # Errors
/// The state is not available; a record cannot be removed; the state has records of the node, but the node's mark,
/// as those of older agents, does not say which state it used.
fn withdraw(options: &UninstallOptions, root: Option<String>) -> io::Result<usize> {
    let is_known = root.is_some();
    let state = match root {
        Some(root) => SharedState::known(&options.state, root),
        None => SharedState::found(&options.state)?
            .ok_or_else(|| io::Error::other("it has no CA, as if it were not mounted"))?,
    };
    let records = records(state, &options.node);
    let (said, folder) = (records.read()?, records.folder().display());
    if !said.namesakes.is_empty() {
        log::say(&format!(
            "{} records in {folder} stay: a node {} of another machine wrote them",
            said.namesakes.len(),
            options.node,
        ));
    }
    if !is_known && !said.own.is_empty() {
        return Err(io::Error::other(format!(
            "{folder} has {} records of pods of this node, and it is not known whether the node had this \
             state: remove them",
            said.own.len(),
        )));
    }
    records.withdraw()
}

fn records(state: SharedState, node: &NodeName) -> EnrolmentRecords {
    EnrolmentRecords::new(state, node.as_str(), &machine_id::facts())
}

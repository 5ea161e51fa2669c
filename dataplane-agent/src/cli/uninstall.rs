//! `dataplane uninstall`: takes back what the agent of a node has left.

use std::time::Duration;

use super::UninstallOptions;
use crate::agent::{self, AgentError};
use crate::capture::uninstall::{Done, Ended};
use crate::control::enrolled::Records;
use crate::control::state::SharedState;

/// Between the removal of the pods' records and the end of their capture: other nodes stop dialling
/// them by HBONE.
const NOTICE: Duration = Duration::from_secs(1);

/// Takes back what can be taken back.
///
/// # Errors
/// A privilege is missing; nothing of the node is known; an agent runs. Nothing was changed then.
pub async fn run(options: &UninstallOptions) -> Result<Done, AgentError> {
    agent::privileges()?;
    let node = &options.node;
    let ended = Ended::find(
        &options.places.run_dir,
        &options.places.bpffs,
        &options.state,
        node,
    )?;
    let left = match withdraw(options, ended.root()) {
        Ok(0) => None,
        Ok(_) => {
            tokio::time::sleep(NOTICE).await;
            None
        }
        Err(error) => Some(format!(
            "{}: {error}; other nodes may go on dialling pods of this one by HBONE",
            options.state.display()
        )),
    };
    let mut done = ended.uninstall().await?;
    done.left.extend(left);
    Ok(done)
}

/// Tells other nodes that the pods of this one are in the mesh no more; how many there were.
fn withdraw(options: &UninstallOptions, root: Option<&str>) -> std::io::Result<usize> {
    let Some(root) = root else {
        return Ok(0); // It never had a state.
    };
    let state = SharedState::known(&options.state, root.to_owned());
    Records::new(state, options.node.as_str()).withdraw()
}

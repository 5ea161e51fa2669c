//! Where the configuration is, opened: a wrong file stops the start before anything is made or touched.

use std::path::{Path, absolute};

use anyhow::Context;

use super::{AgentError, ask_disk};
use crate::config::{self, NodeName, RunOptions};
use crate::control::configuration::Source;
use crate::control::enrolled;
use crate::control::local_xds::{self, Unchanged};
use crate::control::manifests::{ManifestFolder, MeshConfig, Translated, Translation, Watch};
use crate::control::recorded::RecordReader;
use crate::control::state::SharedState;
use crate::node::capture::node_folder;
use crate::sys::machine_id;

/// What is configured, read once.
#[expect(clippy::large_enum_variant, reason = "there is one")]
pub(super) enum ConfigSource {
    Manifests {
        folder: ManifestFolder,
        watch: Watch,
    },
    Local(Translation, Unchanged),
}

/// Returns the option that says where the configuration is, with its value.
pub(super) fn place(options: &RunOptions) -> Option<String> {
    let (option, path) = match (&options.local_xds_path, &options.manifests) {
        (Some(file), _) => ("LOCAL_XDS_PATH", file),
        (None, Some(folder)) => ("--manifests", folder),
        (None, None) => return None,
    };
    let path = absolute(path).unwrap_or_else(|_| path.clone());
    Some(format!("{option} {}", path.display()))
}

impl ConfigSource {
    pub(super) async fn new(options: &RunOptions) -> Result<Self, AgentError> {
        let read = match (&options.local_xds_path, &options.manifests) {
            (Some(file), _) => {
                let (of, options) = (file.clone(), options.clone());
                ask_disk(file, move || Self::local(&of, &options)).await
            }
            (None, Some(folder)) => {
                let of = folder.clone();
                ask_disk(folder, move || Self::manifests(&of)).await
            }
            (None, None) => Err("--manifests or LOCAL_XDS_PATH is wanted".into()),
        };
        read.map_err(AgentError::Settings)
    }

    fn local(file: &Path, options: &RunOptions) -> Result<Self, String> {
        let node = options.node.as_str();
        let read = local_xds::read(file, node, &options.network, &options.trust_domain);
        read.map(|(read, unchanged)| Self::Local(read, unchanged))
            .map_err(|error| error.to_string())
    }

    fn manifests(folder: &Path) -> Result<Self, String> {
        config::folder("--manifests", folder)?;
        // As it was given, and not what it leads to: another folder may take its place.
        let dir = absolute(folder).map_err(|error| format!("--manifests: {error}"))?;
        Ok(Self::Manifests {
            watch: Watch::new(&dir),
            folder: ManifestFolder::open(&dir).map_err(|error| error.to_string())?,
        })
    }

    /// Refuses to start with nothing, or without any of the policies that there were, while pods of the node are
    /// captured: so it looks where a folder is not mounted, and where a file is cut.
    pub(super) fn refuse_lost(&self, run_dir: &Path, node: &NodeName) -> Result<(), AgentError> {
        let captured = node_folder::captured(run_dir, node);
        if captured == 0 {
            return Ok(());
        }
        let before = node_folder::read_mark(run_dir, node)?;
        let had_policies = before.is_some_and(|mark| mark.local_policies);
        let lost = match self {
            Self::Manifests { folder, .. } if folder.is_empty() => {
                "--manifests: there are none, as if the folder were not mounted; to say that its pods shall be let \
                 go put a manifest in it, if only an empty List"
            }
            Self::Local(read, _) if read.workloads.is_empty() => {
                "LOCAL_XDS_PATH: the file has no workloads, as if it were cut; to let its pods go uninstall the node"
            }
            Self::Local(read, _) if had_policies && read.policies.is_empty() => {
                "LOCAL_XDS_PATH: the file has no policies any more, as if it were cut; to say that none shall hold \
                 leave one without rules in it, whose action is Deny, or uninstall the node first"
            }
            Self::Manifests { .. } | Self::Local(..) => return Ok(()),
        };
        Err(AgentError::Settings(format!(
            "{lost}; {captured} pods of this node are captured"
        )))
    }

    /// Whether LOCAL_XDS_PATH has policies.
    pub(super) fn has_local_policies(&self) -> bool {
        matches!(self, Self::Local(read, _) if !read.policies.is_empty())
    }

    /// Whether other nodes are told of pods by records in the state.
    pub(super) fn has_records(&self) -> bool {
        matches!(self, Self::Manifests { .. })
    }

    /// With the records in a state beside it, which tell what other nodes have enrolled; and those.
    pub(super) async fn into_source(
        self,
        options: &RunOptions,
        state: Option<SharedState>,
    ) -> Result<(Source, Option<enrolled::EnrolmentRecords>), AgentError> {
        let (folder, watch, state) = match (self, state) {
            (Self::Local(translation, unchanged), _) => {
                return Ok((Source::Local(Some(translation), unchanged), None));
            }
            (Self::Manifests { folder, watch }, Some(state)) => (folder, watch, state),
            (Self::Manifests { .. }, None) => {
                return Err(AgentError::Settings("--state: manifests want one".into()));
            }
        };
        let records =
            enrolled::EnrolmentRecords::new(state, options.node.as_str(), &machine_id::facts());
        let of = records.clone();
        let read = move || {
            let watch = Watch::without(of.folder(), enrolled::UNFINISHED);
            RecordReader::new(of).map(|reader| (watch, reader))
        };
        let (records_watch, reader) = ask_disk(records.folder(), read).await.context("--state")?;
        let source = Source::Manifests {
            watch,
            folder,
            records_watch,
            records: reader,
            translated: Translated::new(MeshConfig {
                cluster_id: options.cluster_id.clone(),
                cluster_domain: options.cluster_domain.clone(),
                trust_domain: options.trust_domain.clone(),
                network: options.network.clone(),
                ..MeshConfig::of_node(options.node.as_str())
            }),
        };
        Ok((source, Some(records)))
    }
}

//! The settings that the two halves of a node must share. With others a proxy would serve other pods than the node
//! has captured, or pods of another mesh.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use super::wire::Welcome;

/// The settings of one half; `None` means that one is not known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SharedSettings {
    /// The state folder, without links.
    pub state: Option<PathBuf>,
    /// The cluster of the pods.
    pub cluster_id: Option<String>,
    /// The trust domain of their identities.
    pub trust_domain: Option<String>,
    /// The SHA-256 fingerprint of the state's root.
    pub root: Option<String>,
}

/// How the settings of two halves differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// The node's, such as `--cluster-id one`.
    pub node: String,
    /// The proxy's.
    pub proxy: String,
}

impl SharedSettings {
    /// Returns how a proxy's settings differ from its `node`'s. What one of them does not know, as an older node
    /// does not say it, does not differ.
    pub fn difference(&self, node: &Self) -> Option<Difference> {
        let state = |of: &Self| Some(of.state.as_ref()?.display().to_string());
        let all = [
            ("--state", state(node), state(self)),
            (
                "--cluster-id",
                node.cluster_id.clone(),
                self.cluster_id.clone(),
            ),
            (
                "--trust-domain",
                node.trust_domain.clone(),
                self.trust_domain.clone(),
            ),
            (
                "a root with the SHA-256 fingerprint",
                node.root.clone(),
                self.root.clone(),
            ),
        ];
        let differ = all.into_iter().filter_map(|(setting, node, proxy)| {
            let (node, proxy) = (node?, proxy?);
            (node != proxy).then(|| (format!("{setting} {node}"), format!("{setting} {proxy}")))
        });
        let (node, proxy): (Vec<String>, Vec<String>) = differ.unzip();
        (!node.is_empty()).then(|| Difference {
            node: node.join(" and "),
            proxy: proxy.join(" and "),
        })
    }

    /// Writes them into the packet in which a node says them.
    pub(super) fn say(&self, welcome: Welcome) -> Welcome {
        Welcome {
            state: self
                .state
                .as_ref()
                .map(|state| state.as_os_str().as_bytes().to_vec()),
            cluster_id: self.cluster_id.clone(),
            trust_domain: self.trust_domain.clone(),
            root: self.root.clone(),
            ..welcome
        }
    }

    /// Returns those that a node says.
    pub(super) fn said(welcome: Welcome) -> Self {
        Self {
            state: welcome.state.map(|state| OsString::from_vec(state).into()),
            cluster_id: welcome.cluster_id,
            trust_domain: welcome.trust_domain,
            root: welcome.root,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_names_each_setting_that_differs_with_both_values() {
        let proxy = SharedSettings {
            state: Some("/state".into()),
            cluster_id: Some("Kubernetes".into()),
            trust_domain: Some("cluster.local".into()),
            root: Some("ab".into()),
        };
        assert_eq!(proxy.difference(&proxy), None);
        let unknown = SharedSettings::default();
        assert_eq!(proxy.difference(&unknown), None);
        assert_eq!(unknown.difference(&proxy), None);
        let node = SharedSettings {
            cluster_id: Some("other".into()),
            root: Some("cd".into()),
            ..proxy.clone()
        };
        let differ = proxy.difference(&node).expect("two differ");
        let root = "a root with the SHA-256 fingerprint";
        assert_eq!(differ.node, format!("--cluster-id other and {root} cd"));
        assert_eq!(
            differ.proxy,
            format!("--cluster-id Kubernetes and {root} ab")
        );
    }
}

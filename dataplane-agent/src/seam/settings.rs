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
    /// Where the configuration is: the option that says so, and its value.
    pub configuration: Option<String>,
    /// The cluster of the pods.
    pub cluster_id: Option<String>,
    /// The domain of the cluster's services.
    pub cluster_domain: Option<String>,
    /// The network of the node.
    pub network: Option<String>,
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
        let differ = node.named().into_iter().zip(self.named());
        let differ = differ.filter_map(|((setting, node), (_, proxy))| {
            let (node, proxy) = (node?, proxy?);
            (node != proxy).then(|| (format!("{setting}{node}"), format!("{setting}{proxy}")))
        });
        let (node, proxy): (Vec<String>, Vec<String>) = differ.unzip();
        (!node.is_empty()).then(|| Difference {
            node: node.join(" and "),
            proxy: proxy.join(" and "),
        })
    }

    /// Returns each with what stands before its value.
    fn named(&self) -> [(&'static str, Option<String>); 7] {
        let state = self.state.as_ref();
        [
            ("--state ", state.map(|state| state.display().to_string())),
            ("", self.configuration.clone()),
            ("--cluster-id ", self.cluster_id.clone()),
            ("--cluster-domain ", self.cluster_domain.clone()),
            ("--network ", self.network.clone()),
            ("--trust-domain ", self.trust_domain.clone()),
            ("a root with the SHA-256 fingerprint ", self.root.clone()),
        ]
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
            configuration: self.configuration.clone(),
            cluster_domain: self.cluster_domain.clone(),
            network: self.network.clone(),
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
            configuration: welcome.configuration,
            cluster_domain: welcome.cluster_domain,
            network: welcome.network,
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
            configuration: Some("--manifests /mesh".into()),
            cluster_domain: Some("cluster.local".into()),
            network: Some(String::new()),
            cluster_id: Some("Kubernetes".into()),
            trust_domain: Some("cluster.local".into()),
            root: Some("ab".into()),
        };
        assert_eq!(proxy.difference(&proxy), None);
        let unknown = SharedSettings::default();
        assert_eq!(proxy.difference(&unknown), None);
        assert_eq!(unknown.difference(&proxy), None);
        let node = SharedSettings {
            configuration: Some("LOCAL_XDS_PATH /mesh.json".into()),
            cluster_id: Some("other".into()),
            root: Some("cd".into()),
            ..proxy.clone()
        };
        let differ = proxy.difference(&node).expect("two differ");
        let root = "a root with the SHA-256 fingerprint";
        assert_eq!(
            differ.node,
            format!("LOCAL_XDS_PATH /mesh.json and --cluster-id other and {root} cd")
        );
        assert_eq!(
            differ.proxy,
            format!("--manifests /mesh and --cluster-id Kubernetes and {root} ab")
        );
    }
}

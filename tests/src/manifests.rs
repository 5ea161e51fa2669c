//! A folder of manifests. Files are written atomically, by rename, as a careful operator does.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

/// A folder of manifests.
#[derive(Debug)]
pub struct Manifests {
    /// Its path.
    pub folder: PathBuf,
}

/// The contents of a Pod object.
#[derive(Clone, Debug)]
pub struct PodObject<'a> {
    /// `true` if it is ready, so that services send to it.
    pub ready: bool,
    /// Its namespace.
    pub namespace: &'a str,
    /// Its name.
    pub name: &'a str,
    /// The node that it runs on.
    pub node: &'a str,
    /// Its service account.
    pub account: &'a str,
    /// Its labels.
    pub labels: Vec<(String, String)>,
    /// Its annotations.
    pub annotations: Vec<(String, String)>,
    /// Its uid; empty if its manifest has none.
    pub uid: &'a str,
    /// Its addresses.
    pub addresses: Vec<String>,
    /// The Deployment that owns it, if there is one.
    pub owner: Option<&'a str>,
}

impl Manifests {
    /// Returns the manifests of a folder.
    pub fn new(folder: &Path) -> Self {
        fs::create_dir(folder).expect("a folder");
        Self {
            folder: folder.to_owned(),
        }
    }

    /// Writes a file, or replaces it.
    pub fn write(&self, file: &str, text: &str) {
        let path = self.folder.join(file);
        let new = self.folder.join(format!(".{file}.new"));
        fs::write(&new, text).expect("a file");
        fs::rename(new, path).expect("a file");
    }

    /// Removes a file.
    pub fn remove(&self, file: &str) {
        fs::remove_file(self.folder.join(file)).expect("it is there");
    }

    /// Writes a Namespace, in the mesh or not.
    pub fn namespace(&self, name: &str, ambient: bool) {
        let label = if ambient {
            "{istio.io/dataplane-mode: ambient}"
        } else {
            "{}"
        };
        let text = format!(
            "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: {name}\n  labels: {label}\n"
        );
        self.write(&format!("namespace-{name}.yaml"), &text);
    }

    /// Writes a Pod.
    pub fn pod(&self, pod: &PodObject<'_>) {
        let pairs = |pairs: &[(String, String)]| {
            let pair = |(name, value): &(String, String)| format!("    {name}: {value:?}\n");
            pairs.iter().map(pair).collect::<String>()
        };
        let mut text = format!(
            "apiVersion: v1\nkind: Pod\nmetadata:\n  name: {}\n  namespace: {}\n",
            pod.name, pod.namespace
        );
        if !pod.uid.is_empty() {
            let _ = writeln!(text, "  uid: {}", pod.uid);
        }
        if !pod.labels.is_empty() {
            let _ = write!(text, "  labels:\n{}", pairs(&pod.labels));
        }
        if !pod.annotations.is_empty() {
            let _ = write!(text, "  annotations:\n{}", pairs(&pod.annotations));
        }
        if let Some(owner) = pod.owner {
            let _ = write!(
                text,
                "  ownerReferences:\n  - apiVersion: apps/v1\n    kind: ReplicaSet\n    name: {owner}-5d8b9c7f4\n    controller: true\n  generateName: {owner}-5d8b9c7f4-\n"
            );
        }
        let _ = write!(
            text,
            "spec:\n  nodeName: {}\n  serviceAccountName: {}\nstatus:\n  phase: Running\n",
            pod.node, pod.account
        );
        if !pod.addresses.is_empty() {
            let _ = writeln!(text, "  podIPs:");
            for address in &pod.addresses {
                let _ = writeln!(text, "  - ip: {address:?}");
            }
        }
        if !pod.ready {
            text.push_str("  conditions:\n  - type: Ready\n    status: \"False\"\n");
        }
        self.write(&format!("pod-{}-{}.yaml", pod.namespace, pod.name), &text);
    }

    /// Removes a Pod's object.
    pub fn remove_pod(&self, namespace: &str, name: &str) {
        self.remove(&format!("pod-{namespace}-{name}.yaml"));
    }

    /// Writes a Service of the pods with the label `app: <name>`.
    pub fn service(&self, namespace: &str, name: &str, vip: &str, port: u16, target: u16) {
        let text = format!(
            "apiVersion: v1\nkind: Service\nmetadata:\n  name: {name}\n  namespace: {namespace}\nspec:\n  clusterIP: {vip}\n  clusterIPs: [\"{vip}\"]\n  selector:\n    app: {name}\n  ports:\n  - port: {port}\n    targetPort: {target}\n"
        );
        self.write(&format!("service-{namespace}-{name}.yaml"), &text);
    }

    /// Writes the PeerAuthentication of a namespace: `STRICT` or `PERMISSIVE`.
    pub fn mtls(&self, namespace: &str, mode: &str) {
        let text = format!(
            "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata:\n  name: default\n  namespace: {namespace}\nspec:\n  mtls:\n    mode: {mode}\n"
        );
        self.write(&format!("mtls-{namespace}.yaml"), &text);
    }

    /// Writes an AuthorizationPolicy for the pods with the label `app: <app>`, with a rule for one principal.
    pub fn policy(&self, namespace: &str, name: &str, action: &str, app: &str, principal: &str) {
        let text = format!(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata:\n  name: {name}\n  namespace: {namespace}\nspec:\n  selector:\n    matchLabels:\n      app: {app}\n  action: {action}\n  rules:\n  - from:\n    - source:\n        principals: [\"{principal}\"]\n"
        );
        self.write(&format!("policy-{namespace}-{name}.yaml"), &text);
    }
}

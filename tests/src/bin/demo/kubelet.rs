//! Stands in for scheduler and kubelet: creates the pods of the manifests, and writes their objects.

use std::collections::BTreeMap;

use dataplane_tests::manifests::PodObject;
use dataplane_tests::{Node, Pod, Process, World, program};
use serde_json::Value;

/// An object of a manifest, as text and parsed.
#[derive(Clone, Debug)]
pub(crate) struct Object {
    pub(crate) text: String,
    pub(crate) value: Value,
}

/// A pod with its containers running.
pub(crate) struct Running {
    pub(crate) pod: Pod,
    pub(crate) app: String,
    _containers: Vec<Process>,
}

impl Object {
    /// Returns all objects of a file.
    pub(crate) fn all(text: &str) -> Vec<Self> {
        let documents = text.split("\n---\n").map(|document| {
            let value = serde_saphyr::from_str(document).expect("the demo's manifests are YAML");
            Self {
                text: document.to_owned(),
                value,
            }
        });
        documents.collect()
    }

    pub(crate) fn kind(&self) -> &str {
        text(&self.value["kind"])
    }

    pub(crate) fn name(&self) -> &str {
        text(&self.value["metadata"]["name"])
    }

    pub(crate) fn namespace(&self) -> &str {
        text(&self.value["metadata"]["namespace"])
    }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn pairs(value: &Value) -> Vec<(String, String)> {
    let pairs = value.as_object().into_iter().flatten();
    pairs
        .map(|(name, value)| (name.clone(), text(value).to_owned()))
        .collect()
}

/// Runs one pod of a Deployment, or a Pod. `suffix` tells a Deployment's pods apart. `enrolled` waits until it
/// is enrolled, as a CNI plugin does: services send to it only then.
pub(crate) fn run(
    world: &World,
    nodes: &BTreeMap<&str, Node>,
    object: &Object,
    suffix: &str,
    enrolled: impl FnOnce(),
) -> Running {
    let is_pod = object.kind() == "Pod";
    let template = if is_pod {
        &object.value
    } else {
        &object.value["spec"]["template"]
    };
    let spec = &template["spec"];
    let node = &nodes[text(&spec["nodeName"])];
    let name = match is_pod {
        true => object.name().to_owned(),
        false => format!("{}-5d8b9c7f4-{suffix}", object.name()),
    };
    let pod = node.bare(world, object.namespace(), &name);
    let labels = pairs(&template["metadata"]["labels"]);
    let app = labels
        .iter()
        .find(|(name, _)| name == "app")
        .map(|(_, app)| app.clone());
    let containers = spec["containers"].as_array().into_iter().flatten();
    let containers = containers
        .filter_map(|container| start(&pod, &container["command"]))
        .collect();
    let owner = (!is_pod).then(|| object.name());
    let mut status = PodObject {
        ready: false,
        namespace: object.namespace(),
        name: &name,
        node: &node.name,
        account: text(&spec["serviceAccountName"]),
        labels,
        annotations: pairs(&template["metadata"]["annotations"]),
        uid: "",
        addresses: vec![pod.v4.to_string(), pod.v6.to_string()],
        owner,
    };
    world.manifests.pod(&status);
    enrolled();
    status.ready = true;
    world.manifests.pod(&status);
    Running {
        app: app.unwrap_or_else(|| name.clone()),
        pod,
        _containers: containers,
    }
}

/// Starts a container; `sleep` is the pause process, which every pod has already.
fn start(pod: &Pod, command: &Value) -> Option<Process> {
    let words: Vec<&str> = command.as_array()?.iter().map(text).collect();
    let ["bookinfo", role] = words.as_slice() else {
        return None;
    };
    let bookinfo = program("DATAPLANE_TEST_APP").with_file_name("bookinfo");
    let process = Process::start(pod.command(bookinfo).arg(role));
    process.line(); // it listens
    Some(process)
}

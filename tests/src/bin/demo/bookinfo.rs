//! The mesh of the demo: two nodes, Bookinfo in two namespaces, and pods outside of the mesh.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Instant;

use dataplane_tests::{Node, Pod, Wire, World, within};

use crate::agents::NodeAgent;
use crate::kubelet::{self, Object, Running};

/// The manifests that the demo begins with.
const MANIFESTS: [(&str, &str); 5] = [
    (
        "namespaces",
        include_str!("../../../../deploy/demo/namespaces.yaml"),
    ),
    (
        "frontend",
        include_str!("../../../../deploy/demo/frontend.yaml"),
    ),
    (
        "backend",
        include_str!("../../../../deploy/demo/backend.yaml"),
    ),
    (
        "ingress",
        include_str!("../../../../deploy/demo/ingress.yaml"),
    ),
    (
        "outside",
        include_str!("../../../../deploy/demo/outside.yaml"),
    ),
];

/// The identifier in the names of the demo's namespaces and cgroups.
pub(crate) const WORLD: &str = "demo";

/// The marker in every request of one enrolled pod to another.
pub(crate) const ENROLLED: &str = "payload-of-an-enrolled-pair";
/// The marker in the requests between two pods outside of the mesh.
pub(crate) const UNMESHED: &str = "payload-of-the-unmeshed-pair";

/// Number of pods in the mesh.
pub(crate) const UP: usize = 9;

/// Everything that runs. Fields are dropped in this order.
pub(crate) struct Mesh {
    pub(crate) one: NodeAgent,
    pub(crate) two: NodeAgent,
    pub(crate) pods: Vec<Running>,
    pub(crate) nodes: BTreeMap<&'static str, Node>,
    pub(crate) deployments: Vec<Object>,
    pub(crate) world: World,
}

impl Mesh {
    /// Creates nodes and pods, and starts both agents, with `halves` each as two processes.
    pub(crate) fn start(halves: bool) -> Self {
        let started = Instant::now();
        println!("two nodes, with a wire between them");
        let world = World::named(WORLD);
        let (one, two) = world.two_nodes();
        let nodes = BTreeMap::from([("one", one), ("two", two)]);
        let (mut deployments, mut hosts) = (Vec::new(), String::from("127.0.0.1 localhost\n"));
        for (file, text) in MANIFESTS {
            let mut kept = Vec::new();
            for object in Object::all(text) {
                match object.kind() {
                    "Deployment" | "Pod" => deployments.push(object),
                    _ => {
                        host_names(&object, &mut hosts);
                        kept.push(object.text);
                    }
                }
            }
            if !kept.is_empty() {
                world
                    .manifests
                    .write(&format!("{file}.yaml"), &kept.join("\n---\n"));
            }
        }
        std::fs::write(&world.hosts, hosts).expect("a file");
        println!("{} pods", deployments.len());
        let pods = deployments
            .iter()
            .map(|object| kubelet::run(&world, &nodes, object, "x2x4q", || ()));
        let pods: Vec<Running> = pods.collect();
        let shape = if halves { ", in two halves" } else { "" };
        println!("an agent on each node{shape}");
        let start = |node| NodeAgent::start(&world, &nodes[node], halves);
        let agents = (start("one"), start("two"));
        let mesh = Self {
            one: agents.0,
            two: agents.1,
            pods,
            nodes,
            deployments,
            world,
        };
        let enrolled = within(20, || mesh.states("up") == UP && mesh.knows_all());
        println!(
            "{} pods up, {} ignored, in {:.1} s{}\n",
            mesh.states("up"),
            mesh.states("ignored"),
            started.elapsed().as_secs_f32(),
            if enrolled { "" } else { ": NOT ALL OF THEM" }
        );
        mesh
    }

    /// Returns the number of pods of both nodes in a state.
    pub(crate) fn states(&self, state: &str) -> usize {
        let of = |agent: &NodeAgent| {
            let status = agent.status().unwrap_or_default();
            let pods = status["pods"].as_array().cloned().unwrap_or_default();
            pods.iter().filter(|pod| pod["state"] == state).count()
        };
        of(&self.one) + of(&self.two)
    }

    /// Returns `true` if each node dials all pods of the mesh by HBONE.
    fn knows_all(&self) -> bool {
        self.one.tunnelled() == UP && self.two.tunnelled() == UP
    }

    /// Returns a pod by its namespace and its app.
    pub(crate) fn pod(&self, namespace: &str, app: &str) -> &Pod {
        let found = self
            .pods
            .iter()
            .find(|running| running.pod.namespace == namespace && running.app == app);
        &found
            .unwrap_or_else(|| panic!("no pod {namespace}/{app}"))
            .pod
    }

    /// Writes a policy of the demo to the folder of manifests.
    pub(crate) fn apply(&self, file: &str, text: &str) {
        self.world.manifests.write(file, text);
    }

    /// Starts captures of the wire, and of the veths of pods whose connections are tunnelled.
    pub(crate) fn watch(&self) -> Vec<(String, Wire)> {
        let markers = [ENROLLED, UNMESHED];
        let mut wires = vec![(
            "wire".to_owned(),
            Wire::watch(self.nodes["one"].netns.file(), "wire", &markers),
        )];
        for running in &self.pods {
            let pod = &running.pod;
            if pod.namespace == "outside" || ["legacy", "optout"].contains(&running.app.as_str()) {
                continue;
            }
            for node in self.nodes.values() {
                if node.cgroup.folder == pod.cgroup.folder.parent().unwrap_or(&pod.cgroup.folder) {
                    let wire = Wire::watch(node.netns.file(), &pod.veth, &markers);
                    wires.push((format!("veth of {}", pod.name), wire));
                }
            }
        }
        wires
    }

    /// Prints how to look around.
    pub(crate) fn explain(&self) {
        let folder = self.world.folder().display();
        let bin = dataplane_tests::program("DATAPLANE_BIN");
        let bin = bin.display();
        let gateway = self.pod("istio-ingress", "gateway");
        let sleep = self.pod("frontend", "sleep");
        let (mut logs, admin) = self.one.paths();
        logs.extend(self.two.paths().0);
        let logs = logs.join(" ");
        println!(
            "\nIt stays until Ctrl-C. To look around, in another shell:

  {bin} status --run-dir {folder}/run --node one
  curl --unix-socket {admin} http://x/config_dump
  curl --unix-socket {admin} http://x/metrics
  tail -f {logs}
  ls {folder}/manifests        edit or add files: they take effect within a second
  ip netns                     the nodes and pods

A pod is a cgroup and a network namespace: a process that has only the latter (`ip netns exec`) is
not the pod's, and not captured. Two of them, the ingress gateway and frontend's sleep:

  gateway() {{ sh -c 'echo $$ > {}/cgroup.procs; exec nsenter --net=/run/netns/{} \"$@\"' - \"$@\"; }}
  sleeper() {{ sh -c 'echo $$ > {}/cgroup.procs; exec nsenter --net=/run/netns/{} \"$@\"' - \"$@\"; }}
  gateway curl -s http://10.96.0.10:9080/productpage     # names are in {folder}/hosts
  sleeper curl -s http://10.96.0.10:9080/productpage     # the same, and as policy has it
  grep -h error= {logs} | tail",
            gateway.cgroup.folder.display(),
            gateway.netns.name,
            sleep.cgroup.folder.display(),
            sleep.netns.name,
        );
    }
}

/// Adds the names of a service to the hosts file, as DNS is not captured yet.
fn host_names(object: &Object, hosts: &mut String) {
    if object.kind() != "Service" {
        return;
    }
    let (name, namespace) = (object.name(), object.namespace());
    let addresses = object.value["spec"]["clusterIPs"]
        .as_array()
        .cloned()
        .unwrap_or_default();
    for address in addresses.iter().filter_map(|address| address.as_str()) {
        let _ = writeln!(
            hosts,
            "{address} {name} {name}.{namespace} {name}.{namespace}.svc {name}.{namespace}.svc.cluster.local"
        );
    }
}

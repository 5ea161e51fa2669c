//! The folder of manifests as people and machines treat it: no pod is released by accident, and mistakes are
//! reported.

#![allow(missing_docs, reason = "tests are named for what they show")]

use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::time::Duration;

use dataplane_tests::{Process, SingleNode, World, eventually, pause};

const PORT: u16 = 7000;

/// A manifest that says that the folder is empty on purpose.
const NOTHING: &str = "apiVersion: v1\nkind: List\nitems: []\n";

fn policy(one: &SingleNode) -> PathBuf {
    one.world.manifests.folder.join("policy-demo-nobody.yaml")
}

/// Returns a node whose server refuses everybody by policy.
fn closed() -> (SingleNode, Process) {
    let one = SingleNode::new();
    let app = one.server.serve(PORT);
    assert!(!one.denies(PORT), "nothing is said yet");
    let (manifests, nobody) = (&one.world.manifests, "cluster.local/ns/x/sa/y");
    manifests.policy("demo", "nobody", "ALLOW", "server", nobody);
    eventually("denied", 10, || one.denies(PORT));
    (one, app)
}

#[test]
fn a_policy_that_is_misspelt_or_commented_out_denies_still_and_that_is_told() {
    let (one, _app) = closed();
    let good = fs::read_to_string(policy(&one)).expect("a policy");
    let commented: String = good.lines().map(|line| format!("# {line}\n")).collect();
    for (bad, told) in [
        (
            good.replace("security.istio.io/v1", "security.istio/v1"),
            "did you mean `security.istio.io/v1`",
        ),
        (
            good.replace("security.istio.io/v1", "security.istio.io/v3"),
            "`security.istio.io/v3` is not read",
        ),
        (
            good.replace("AuthorizationPolicy", "AuthorisationPolicy"),
            "did you mean `AuthorizationPolicy`",
        ),
        (
            good.replace("namespace: demo", "namspace: demo"),
            "did you mean `namespace`",
        ),
        (commented, "has no objects in it"),
    ] {
        fs::write(policy(&one), &bad).expect("a file");
        eventually(told, 10, || one.problems().contains(told));
        assert!(one.denies(PORT), "{bad}");
        one.agent
            .logs(&["policy-demo-nobody.yaml", told, "what it said before holds"]);
    }
    let refused = |count: u8| {
        let metrics = one.agent.get("/metrics");
        metrics.contains(&format!("\ndataplane_manifests_refused {count}\n"))
    };
    assert!(refused(1));
    fs::write(policy(&one), good).expect("a file");
    eventually("good again", 10, || one.problems() == "[]");
    assert!(refused(0));
    let over = [
        "\tinfo\t",
        "over: ",
        "policy-demo-nobody.yaml",
        "has no objects in it",
    ];
    one.agent.logs(&over);
    assert_eq!(one.agent.log().matches(&over[1..=2].concat()).count(), 5);
    assert!(one.denies(PORT));
    one.world.manifests.remove("policy-demo-nobody.yaml");
    eventually("allowed, as its file was removed", 10, || !one.denies(PORT));
}

#[test]
fn c1_a_manifests_folder_that_is_emptied_lets_nobody_go() {
    let (mut one, _app) = closed();
    let folder = one.world.manifests.folder.clone();
    let away = folder.with_extension("away");
    let empty = |one: &SingleNode| {
        let told = || one.agent.log().matches("has no manifests any more").count();
        let before = told();
        // As after an unmount.
        fs::rename(&folder, &away).expect("a folder");
        fs::create_dir(&folder).expect("a folder");
        eventually("it is told", 10, || {
            one.problems().contains("has no manifests any more")
        });
        eventually("it is logged", 10, || told() > before);
        one.agent
            .logs(&["has no manifests any more", "what it said before holds"]);
        assert!(one.is_captured() && one.denies(PORT));
        assert_eq!(one.agent.pod("server").0, "up");
    };
    empty(&one);
    fs::remove_dir(&folder).expect("it is empty");
    fs::rename(&away, &folder).expect("a folder");
    eventually("it is there again", 10, || one.problems() == "[]");
    empty(&one);
    // Nor does a successor that has no former state.
    one.agent.kill();
    one.agent.restart();
    eventually("it ends by itself", 20, || !one.agent.runs());
    assert_eq!(one.agent.wait().code(), Some(2));
    let said = one.agent.log();
    assert!(said.contains("1 pods of this node are captured"), "{said}");
    assert!(one.is_captured());
    fs::write(folder.join("nothing.yaml"), NOTHING).expect("a file");
    one.agent.restart();
    eventually("it was said, and the pod is let go", 20, || {
        one.server.netns.show("rule show").lines().count() == 3
    });
}

#[test]
fn c1_a_captured_pod_that_nothing_says_at_a_start_stays_until_manifests_are_whole() {
    let mut one = SingleNode::new();
    let folder = &one.world.manifests.folder;
    let (object, team) = (folder.join("pod-demo-server.yaml"), folder.join("team"));
    one.agent.kill();
    // As if it were mounted later.
    fs::create_dir(&team).expect("a folder");
    fs::rename(&object, one.world.folder().join("pod.yaml")).expect("a file");
    one.agent.restart();
    one.agent.logs(&["demo/server", "stays so for now"]);
    pause(Duration::from_secs(8));
    assert!(one.is_captured());
    let record = one.world.state.join("enrolled/demo.server.json");
    assert!(record.exists());
    let team_is_empty = format!(
        "no manifest says it; it stays so as long as {} is empty",
        team.display()
    );
    assert!(
        one.problems().contains(&team_is_empty),
        "{}",
        one.problems()
    );
    let ready = one.agent.get("/healthz/ready");
    assert!(ready.contains("not ready, pending: enrolment"), "{ready}");
    fs::rename(one.world.folder().join("pod.yaml"), team.join("pod.yaml")).expect("a file");
    one.agent.up(&["server"]);
    assert_eq!(one.problems(), "[]");
    assert!(
        !one.agent.log().contains("left the mesh"),
        "{}",
        one.agent.log()
    );
    // A folder that does not change is complete.
    one.agent.kill();
    fs::remove_dir_all(&team).expect("a folder");
    one.agent.restart();
    one.agent.logs(&["demo/server", "stays so for now"]);
    assert!(one.is_captured());
    one.agent.logs(&["demo/server", "it is let go"]);
    eventually("it is let go", 20, || {
        !one.is_captured() && !record.exists()
    });
}

#[test]
fn c1_a_local_xds_file_that_is_cut_at_a_restart_lets_nobody_go() {
    let mut one = SingleNode::new();
    let file = one.world.folder().join("local.yaml");
    let workload = |name: &str, ip: IpAddr| {
        format!(
            "- {{name: {name}, namespace: demo, serviceAccount: {name}, workloadIps: [{ip}], node: one, protocol: HBONE, services: {{}}}}\n"
        )
    };
    let other = workload("other", "10.98.77.7".parse().expect("an address"));
    let server = workload("server", one.server.v4);
    let nobody = "policies:\n- {name: nobody, namespace: demo, scope: Namespace, action: Deny, dryRun: false, rules: [[[{notPrincipals: [!Presence []]}]]]}\n";
    let workloads = format!("workloads:\n{other}{server}");
    let whole = format!("{workloads}{nobody}");
    fs::write(&file, &whole).expect("a file");
    one.agent.kill();
    one.agent.setup().reads_local_xds(&file);
    let _app = one.server.serve(PORT);
    one.agent.restart();
    one.agent.up(&["server"]);
    assert!(one.denies(PORT));
    let refused = |one: &mut SingleNode, told: &str| {
        one.agent.restart();
        eventually("it ends by itself", 20, || !one.agent.runs());
        assert_eq!(one.agent.wait().code(), Some(2));
        let said = one.agent.log();
        assert!(said.contains(told), "{said}");
        assert!(one.is_captured());
    };
    one.agent.kill();
    fs::write(&file, "").expect("a file");
    refused(&mut one, "1 pods of this node are captured");
    // Somebody is writing it.
    fs::write(&file, &workloads).expect("a file");
    let writer = fs::File::options().append(true).open(&file);
    refused(&mut one, "is open for writing");
    drop(writer);
    refused(&mut one, "the file has no policies any more");
    // Cut before the pod.
    fs::write(&file, format!("{nobody}workloads:\n{other}")).expect("a file");
    one.agent.restart();
    one.agent.logs(&["demo/server", "stays so for now"]);
    assert!(one.is_captured());
    // What has changed since it was read was not finished.
    fs::write(&file, &whole).expect("a file");
    let changed = "it stays so as long as";
    eventually("it is told", 20, || {
        one.problems().contains("has changed since it was read")
    });
    assert!(one.problems().contains(changed), "{}", one.problems());
    assert!(one.is_captured());
    one.agent.kill();
    one.agent.restart();
    one.agent.up(&["server"]);
    assert!(one.denies(PORT));
    // A file that does not change is whole.
    one.agent.kill();
    fs::write(&file, format!("{nobody}workloads:\n{other}")).expect("a file");
    one.agent.restart();
    one.agent.logs(&["demo/server", "it is let go"]);
    eventually("it is let go", 20, || !one.is_captured());
}

#[test]
fn a_policy_is_read_wherever_a_link_leads_and_whichever_folder_is_there() {
    let mut one = SingleNode::new();
    let _app = one.server.serve(PORT);
    let revisions = one.world.folder().join("revisions");
    let first = revisions.join("first");
    fs::create_dir(&revisions).expect("a folder");
    fs::rename(&one.world.manifests.folder, &first).expect("a folder");
    symlink(&first, &one.world.manifests.folder).expect("a link");
    one.agent.kill();
    one.agent.restart();
    one.agent.up(&["server"]);
    assert!(!one.denies(PORT));
    // A file that is a link to one that is edited elsewhere.
    let elsewhere = one.world.folder().join("gate.yaml");
    let gate = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: gate, namespace: demo}\nspec: {action: DENY, rules: [{to: [{operation: {ports: [\"1\"]}}]}]}\n";
    fs::write(&elsewhere, gate).expect("a file");
    symlink(&elsewhere, first.join("gate.yaml")).expect("a link");
    eventually("it is read", 10, || {
        one.agent.get("/config_dump").contains("gate")
    });
    assert!(!one.denies(PORT));
    fs::write(&elsewhere, gate.replace("\"1\"", "\"7000\"")).expect("a file");
    eventually("what is edited behind a link holds", 10, || {
        one.denies(PORT)
    });
    // The whole folder is a link, to another revision.
    let second = revisions.join("second");
    fs::create_dir(&second).expect("a folder");
    for entry in fs::read_dir(&first).expect("a folder").flatten() {
        if entry.file_name() != "gate.yaml" {
            fs::copy(entry.path(), second.join(entry.file_name())).expect("a file");
        }
    }
    let new = one.world.folder().join("new");
    symlink(&second, &new).expect("a link");
    fs::rename(&new, &one.world.manifests.folder).expect("a link");
    eventually("another revision holds", 10, || !one.denies(PORT));
    // The folder is removed, and made again.
    fs::remove_dir_all(&second).expect("a folder");
    eventually("that is told", 10, || {
        one.problems().contains("No such file")
    });
    fs::rename(&first, &second).expect("a folder");
    eventually("what is there now holds", 10, || one.denies(PORT));
    assert_eq!(one.agent.pod("server").0, "up");
}

#[test]
fn a_node_that_no_pod_is_of_says_so() {
    let world = World::new();
    let (one, two) = world.two_nodes();
    let _pod = one.pod(&world, "pod");
    let agent = world.agent(&two);
    agent.logs(&["no pod is of this node", "nodes=\"one\""]);
}

#[test]
fn a_policy_that_comes_changes_or_goes_leaves_a_word() {
    let (one, _app) = closed();
    let told = |what: &str, namespace: &str| {
        let (what, which) = (
            format!("policy {what}"),
            format!("namespace={namespace} name=nobody kind=AuthorizationPolicy"),
        );
        one.agent.logs(&["info", &what, &which]);
    };
    let policies = || one.agent.status().expect("it answers")["policies"].clone();
    told("added", "demo");
    eventually("it is in the status", 5, || {
        policies() == 1 && one.problems() == "[]"
    });
    let good = fs::read_to_string(policy(&one)).expect("a policy");
    for (edit, problem) in [
        (
            good.replace("namespace: demo", "namespace: dmeo"),
            "AuthorizationPolicy dmeo/nobody: applies to no namespace that a manifest has; did you mean demo?",
        ),
        (
            good.replace("  namespace: demo\n", ""),
            "AuthorizationPolicy default/nobody: applies to no namespace that a manifest has; did you mean demo?",
        ),
        (
            good.replace("app: server", "app: sevrer"),
            "AuthorizationPolicy demo/nobody: selects no pod (app: sevrer)",
        ),
    ] {
        fs::write(policy(&one), &edit).expect("a file");
        eventually(problem, 10, || one.problems().contains(problem));
        one.agent.logs(&["warn", problem]);
        fs::write(policy(&one), &good).expect("a file");
        eventually("good again", 10, || one.problems() == "[]");
    }
    told("removed", "demo");
    told("added", "dmeo");
    told("changed", "demo");
    fs::write(policy(&one), good.replace("ALLOW", "AUDIT")).expect("a file");
    eventually("it is not enforced", 10, || policies() == 0);
    let status = one.agent.status().expect("it answers");
    assert_eq!(status["policies_not_enforced"], 1, "{status}");
    fs::rename(policy(&one), policy(&one).with_extension("YAML")).expect("a file");
    eventually("it is gone", 10, || {
        one.agent.status().expect("it answers")["policies_not_enforced"] == 0
    });
    one.agent.logs(&[
        "warn",
        "which is not read, and what it said is gone: AuthorizationPolicy demo/nobody",
    ]);
}

#[test]
fn a_pod_that_a_slip_takes_out_of_the_mesh_is_warned_of() {
    let one = SingleNode::new();
    let manifests = &one.world.manifests.folder;
    let replace = |file: &str, from: &str, to: &str| {
        let path = manifests.join(file);
        let text = fs::read_to_string(&path).expect("a manifest");
        assert!(text.contains(from), "{text}");
        fs::write(path, text.replace(from, to)).expect("a file");
    };
    let pod = "pod-demo-server.yaml";
    replace(pod, "nodeName: one", "nodeName: noe");
    one.agent
        .logs(&["warn", "spec.nodeName", "demo/server", "node=\"noe\""]);
    one.agent.is("server", "");
    replace(pod, "nodeName: noe", "nodeName: one");
    one.agent.up(&["server"]);
    // One that is removed says no other node.
    let text = fs::read_to_string(manifests.join(pod)).expect("a manifest");
    let told = |what: &str| one.agent.log().matches(what).count();
    let before = told("pod leaves the mesh");
    one.world.manifests.remove_pod("demo", "server");
    eventually("it leaves", 10, || told("pod leaves the mesh") > before);
    assert_eq!(told("its manifest says another node"), 1);
    fs::write(manifests.join(pod), text).expect("a file");
    one.agent.up(&["server"]);
    replace("namespace-demo.yaml", "name: demo", "name: dmeo");
    let problem = "Pod demo/server: is of namespace demo, of which no manifest is, and so not in the mesh; did you mean it by Namespace dmeo?";
    eventually(problem, 10, || one.problems().contains(problem));
    one.agent.logs(&["warn", problem]);
}

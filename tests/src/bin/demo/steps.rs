//! The steps: those of the paper that need L4 alone, and what a user asks next.

use std::time::{Duration, Instant};

use dataplane_tests::interrupt::interrupted;
use dataplane_tests::{Pod, within};

use crate::agents::NodeAgent;
use crate::bookinfo::{ENROLLED, Mesh, UNMESHED, UP};
use crate::kubelet;
use crate::table::Table;

const VIEWER: &str = include_str!("../../../../deploy/demo/productpage-viewer.yaml");
const RATINGS: &str = include_str!("../../../../deploy/demo/ratings-policy.yaml");
const DETAILS: &str = include_str!("../../../../deploy/demo/details-policy.yaml");
const STRICT: &str = include_str!("../../../../deploy/demo/strict.yaml");
const PAGE: &str = "http://productpage:9080/productpage";

/// Runs all steps, until interrupted.
pub(crate) fn walk(mesh: &Mesh, table: &mut Table) {
    let wires = mesh.watch();
    let steps: [fn(&Mesh, &mut Table); 9] = [
        left_alone,
        viewer_policy,
        l7_policies,
        own_address,
        strict,
        edited_policy,
        scaled,
        unmeshed_pair,
        enrolled_again,
    ];
    for step in steps {
        if interrupted() {
            return;
        }
        step(mesh, table);
    }
    let (mut clear, mut packets, mut seen) = (Vec::new(), 0, 0);
    for (name, wire) in wires {
        let (markers, count) = wire.count();
        packets += count;
        if markers[0].1 > 0 {
            clear.push(format!("{} on the {name}", markers[0].1));
        }
        if name == "wire" {
            seen = markers[1].1;
        }
    }
    let happened = match clear.is_empty() {
        true => format!("none among {packets} packets"),
        false => clear.join(", "),
    };
    table.row(
        "capture on the wire and on the pods' veths, all the while",
        "no payload of an enrolled pair in clear",
        &happened,
        clear.is_empty(),
    );
    table.row(
        "the same capture, for the unmeshed pair",
        "its payload is seen",
        &format!("in {seen} packets"),
        seen > 0,
    );
}

/// Requests a page by curl: returns its status, curl's exit code, and the content. Requests of enrolled pods
/// to enrolled pods contain the marker that must never be seen on a wire.
fn curl(pod: &Pod, url: &str) -> (String, i32, String) {
    let marker = match pod.namespace.as_str() {
        "outside" => "x-marker: none".to_owned(),
        _ => format!("x-marker: {ENROLLED}"),
    };
    let (code, out) = pod.curl(&["-s", "-m", "15", "-w", "\n%{http_code}", "-H", &marker, url]);
    let (content, status) = out.rsplit_once('\n').unwrap_or(("", "000"));
    (status.to_owned(), code, content.to_owned())
}

fn status(pod: &Pod, url: &str) -> String {
    match curl(pod, url) {
        (status, 0, _) => status,
        (status, code, _) => format!("{status}, curl exits {code}"),
    }
}

/// Requests the product page, and returns which parts of it were available.
fn page(pod: &Pod) -> String {
    let (status, _, content) = curl(pod, PAGE);
    let details = match content.contains("\"author\"") {
        true => "details",
        false if content.contains("Error fetching product details") => "no details",
        false => "?",
    };
    let reviews = match content.contains("\"reviewer\"") {
        true if content.contains("currently unavailable") => "reviews without stars",
        true => "reviews",
        false => "no reviews",
    };
    format!("{status}: {details}, {reviews}")
}

/// Requests the page with reviews of v2 or v3, the only ones that request ratings, until it is as wanted or a
/// limit is reached.
fn page_until(pod: &Pod, wanted: &str) -> String {
    let mut last = String::new();
    within(8, || {
        last = page(pod);
        last == wanted
    });
    last
}

fn left_alone(mesh: &Mesh, table: &mut Table) {
    table.same(
        "namespaces labelled istio.io/dataplane-mode=ambient",
        &format!("{UP} pods up, 4 ignored"),
        &format!(
            "{} pods up, {} ignored",
            mesh.states("up"),
            mesh.states("ignored")
        ),
    );
    for (app, what) in [
        ("legacy", "a pod with a sidecar's annotation"),
        ("optout", "a pod labelled dataplane-mode=none"),
    ] {
        let pod = mesh.pod("backend", app);
        let rules = pod
            .netns
            .show("rule show")
            .lines()
            .filter(|line| line.contains("fwmark"))
            .count();
        let reached = status(
            mesh.pod("outside", "client"),
            &format!("http://{}/details/0", pod.at(9080)),
        );
        table.same(
            what,
            "left alone: 0 rules, answers 200",
            &format!("left alone: {rules} rules, answers {reached}"),
        );
    }
    table.same(
        "gateway asks for the page",
        "200: details, reviews",
        &page_until(
            mesh.pod("istio-ingress", "gateway"),
            "200: details, reviews",
        ),
    );
}

fn viewer_policy(mesh: &Mesh, table: &mut Table) {
    let (gateway, sleep) = (
        mesh.pod("istio-ingress", "gateway"),
        mesh.pod("frontend", "sleep"),
    );
    mesh.apply("productpage-viewer.yaml", VIEWER);
    within(5, || curl(sleep, PAGE).1 == 56);
    table.same(
        "productpage-viewer applied; gateway asks",
        "200",
        &status(gateway, PAGE),
    );
    table.same(
        "frontend's sleep asks",
        "000, curl exits 56",
        &status(sleep, PAGE),
    );
    let source = [
        "src.workload=\"sleep\"",
        "src.identity=\"spiffe://cluster.local/ns/frontend/sa/default\"",
        "dst.service=\"productpage.frontend.svc.cluster.local\"",
        "direction=\"outbound\"",
        "error=\"http status: 401 Unauthorized\"",
    ];
    logged(table, "the source node's log", &mesh.two.log(), &source);
    let target = [
        "src.workload=\"sleep\"",
        "direction=\"inbound\"",
        "error=\"connection closed due to policy rejection: allow policies exist, but none allowed\"",
    ];
    logged(
        table,
        "the destination node's log",
        &mesh.one.log(),
        &target,
    );
}

fn logged(table: &mut Table, done: &str, log: &str, parts: &[&str]) {
    let line = log
        .lines()
        .rfind(|line| parts.iter().all(|part| line.contains(part)));
    let error = parts.last().copied().unwrap_or_default();
    table.row(
        done,
        "a line that says so",
        line.map_or("no such line", |_| error),
        line.is_some(),
    );
}

fn l7_policies(mesh: &Mesh, table: &mut Table) {
    let gateway = mesh.pod("istio-ingress", "gateway");
    mesh.apply("details-policy.yaml", DETAILS);
    mesh.apply("ratings-policy.yaml", RATINGS);
    let without = "200: no details, reviews without stars";
    table.same(
        "details-policy, ratings-policy: their rules need L7, so L4 denies",
        without,
        &page_until(gateway, without),
    );
    for file in ["details-policy.yaml", "ratings-policy.yaml"] {
        mesh.world.manifests.remove(file);
    }
    let whole = "200: details, reviews";
    let mut all = Vec::new();
    within(8, || {
        all = (0..6).map(|_| page(gateway)).collect();
        all.iter().all(|page| page == whole)
    });
    let odd = all.iter().find(|page| *page != whole);
    table.same(
        "both removed; six pages",
        whole,
        odd.unwrap_or(&whole.to_owned()),
    );
}

fn own_address(mesh: &Mesh, table: &mut Table) {
    let sleep = mesh.pod("frontend", "sleep");
    let (_, _, seen) = curl(sleep, "http://details.backend:9080/client");
    let good = [sleep.v4.to_string(), sleep.v6.to_string()].contains(&seen.trim().to_owned());
    table.row(
        "sleep asks details whom it sees",
        &format!("{}, or its IPv6 address", sleep.v4),
        seen.trim(),
        good,
    );
}

fn strict(mesh: &Mesh, table: &mut Table) {
    let (client, details) = (
        mesh.pod("outside", "client"),
        mesh.pod("backend", "details"),
    );
    let url = format!("http://{}/details/0", details.at(9080));
    table.same(
        "PERMISSIVE; a client outside of the mesh asks details",
        "200",
        &status(client, &url),
    );
    mesh.apply("strict.yaml", STRICT);
    within(5, || status(client, &url) != "200");
    // Refused at once: to curl the reset is one of the connect (7) or of what came after it (56).
    let refused = status(client, &url);
    table.row(
        "STRICT; the same client",
        "000: reset",
        &refused,
        ["000, curl exits 56", "000, curl exits 7"].contains(&refused.as_str()),
    );
    table.same(
        "STRICT; the gateway asks for the page",
        "200: details, reviews",
        &page_until(
            mesh.pod("istio-ingress", "gateway"),
            "200: details, reviews",
        ),
    );
    mesh.world.manifests.remove("strict.yaml");
    within(5, || status(client, &url) == "200");
    table.same(
        "PERMISSIVE again; the same client",
        "200",
        &status(client, &url),
    );
}

fn edited_policy(mesh: &Mesh, table: &mut Table) {
    let (gateway, page) = (
        mesh.pod("istio-ingress", "gateway"),
        mesh.pod("frontend", "productpage"),
    );
    let _app = page.serve(7000);
    let mut live = gateway.talk(page.at(7000));
    live.say(ENROLLED);
    let before = live.line();
    table.same(
        "the gateway holds a connection to productpage",
        &format!("{} {ENROLLED}", gateway.v4),
        &before,
    );
    let started = Instant::now();
    mesh.apply(
        "productpage-viewer.yaml",
        &VIEWER.replace("sa/gateway-istio", "sa/another"),
    );
    let cut = live.line_within(Duration::from_secs(5));
    let took = started.elapsed();
    let happened = format!(
        "{} after {} ms",
        cut.as_deref().unwrap_or("still open"),
        took.as_millis()
    );
    table.row(
        "the policy is edited to another identity",
        "closed: reset, within a second",
        &happened,
        cut.as_deref() == Some("closed: reset")
            && took < dataplane_tests::scaled(Duration::from_secs(1)),
    );
    mesh.apply("productpage-viewer.yaml", VIEWER);
    within(5, || status(gateway, PAGE) == "200");
    table.same("edited back; gateway asks", "200", &status(gateway, PAGE));
}

fn scaled(mesh: &Mesh, table: &mut Table) {
    let gateway = mesh.pod("istio-ingress", "gateway");
    let deployment = mesh
        .deployments
        .iter()
        .find(|object| object.name() == "productpage-v1");
    let mut is_up = false;
    let second = kubelet::run(
        &mesh.world,
        &mesh.nodes,
        deployment.expect("it is in the manifests"),
        "9k8mv",
        || is_up = within(10, || mesh.states("up") == UP + 1),
    );
    let first = &mesh.pod("frontend", "productpage").name;
    let mut served = (0, 0);
    within(10, || {
        for _ in 0..10 {
            let (_, _, content) = curl(gateway, PAGE);
            served.0 += usize::from(content.contains(&format!("served by {first}")));
            served.1 += usize::from(content.contains(&format!("served by {}", second.pod.name)));
        }
        served.0 > 0 && served.1 > 0
    });
    table.row(
        "productpage scaled to two pods",
        "both take requests",
        &format!("{} and {} requests", served.0, served.1),
        is_up && served.0 > 0 && served.1 > 0,
    );
    // As in Kubernetes: it is removed from the service first, and ended when no connections come any more.
    mesh.world
        .manifests
        .remove_pod("frontend", &second.pod.name);
    let known = |agent: &NodeAgent| agent.knows(&second.pod.name);
    within(10, || {
        !known(&mesh.one) && !known(&mesh.two) && mesh.states("up") == UP
    });
    drop(second);
    let good = (0..6).filter(|_| status(gateway, PAGE) == "200").count();
    table.same(
        "scaled back to one; six requests",
        "6 answered 200",
        &format!("{good} answered 200"),
    );
}

fn unmeshed_pair(mesh: &Mesh, table: &mut Table) {
    let (client, server) = (mesh.pod("outside", "client"), mesh.pod("outside", "server"));
    let marker = format!("x-marker: {UNMESHED}");
    let url = format!("http://{}/client", server.at(9080));
    let (_, seen) = client.curl(&["-s", "-m", "10", "-H", &marker, &url]);
    table.same(
        "two pods outside of the mesh",
        &client.v4.to_string(),
        seen.trim(),
    );
}

fn enrolled_again(mesh: &Mesh, table: &mut Table) {
    let (sleep, details) = (
        mesh.pod("frontend", "sleep"),
        mesh.pod("backend", "details"),
    );
    let _app = details.serve(7001);
    let mut live = sleep.talk(details.at(7001));
    live.say("before");
    live.line();
    let rate = sleep.app(&["rate", &details.at(7001).to_string(), "14", "200"]);
    std::thread::sleep(Duration::from_secs(2));
    let label = |on: bool| {
        let mode = if on {
            "istio.io/dataplane-mode: ambient"
        } else {
            "kept: 'yes'"
        };
        let text = format!(
            "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: backend\n  labels:\n    {mode}\n"
        );
        mesh.apply("namespace-backend.yaml", &text);
    };
    // The namespace moves to a file of its own first, as each object may be in one file only.
    let others = include_str!("../../../../deploy/demo/namespaces.yaml");
    let others: Vec<String> = kubelet::Object::all(others)
        .into_iter()
        .filter(|object| object.name() != "backend")
        .map(|object| object.text)
        .collect();
    mesh.apply("namespaces.yaml", &others.join("\n---\n"));
    label(false);
    let left = within(10, || mesh.states("up") == 3);
    live.say("while its pod leaves");
    let answer = live.line_within(Duration::from_secs(5)).unwrap_or_default();
    table.row(
        "namespace backend loses its label",
        "its 6 pods leave, a live connection goes on",
        &format!("{} pods up; {answer}", mesh.states("up")),
        left && answer.ends_with("while its pod leaves"),
    );
    std::thread::sleep(Duration::from_secs(2));
    label(true);
    let back = within(15, || mesh.states("up") == UP);
    table.row(
        "and gets it again",
        &format!("{UP} pods up"),
        &format!("{} pods up", mesh.states("up")),
        back,
    );
    drop(live);
    let (_, lines) = rate.end();
    let happened = lines.first().cloned().unwrap_or_default();
    table.row(
        "200 connections a second to details, all the while",
        "none fails",
        &happened,
        happened.ends_with(" 0 bad"),
    );
    table.same(
        "gateway asks for the page",
        "200: details, reviews",
        &page_until(
            mesh.pod("istio-ingress", "gateway"),
            "200: details, reviews",
        ),
    );
}

//! Tests of the harness itself, on which the other cases rely.

#![allow(missing_docs, reason = "tests are named for what they show")]

use std::fs::File;
use std::path::Path;

use dataplane_tests::cgroup::{self, Cgroup};
use dataplane_tests::claim::{Claim, NUMBERS};
use dataplane_tests::netns::Netns;
use dataplane_tests::{Wire, World, eventually, left};

#[test]
fn pods_of_two_nodes_reach_each_other_by_both_families_and_the_wire_shows_it() {
    let world = World::new();
    let (one, two) = world.two_nodes();
    let (client, server) = (one.pod(&world, "client"), two.pod(&world, "server"));
    let _app = server.serve(7000);
    let wire = Wire::watch(
        one.netns.file(),
        "wire",
        &["marker-of-v4", "marker-of-v6", "never-sent"],
    );
    let answer = client.ask(server.at(7000), "marker-of-v4");
    assert_eq!(answer, Ok(format!("{} marker-of-v4", client.v4)));
    let answer = client.ask(server.at6(7000), "marker-of-v6");
    assert_eq!(answer, Ok(format!("{} marker-of-v6", client.v6)));
    let (markers, _) = wire.count();
    assert!(markers[0].1 > 0 && markers[1].1 > 0, "{markers:?}");
    assert_eq!(markers[2].1, 0);
}

#[test]
fn a_capture_that_died_fails_its_test() {
    let world = World::new();
    let node = world.node("one");
    node.netns
        .ip("link add dead type veth peer name end\nlink set dead up\nlink set end up\n");
    let ends = |spoil: &str| {
        let wire = Wire::tap(node.netns.file(), "dead");
        node.netns.ip(spoil);
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| wire.end())).is_ok()
    };
    assert!(ends(""), "as long as nothing is wrong with it");
    assert!(!ends("link set dead down\n"), "its interface was down");
    node.netns.ip("link set dead up\n");
    assert!(!ends("link del dead\n"), "its interface is gone");
}

#[test]
fn a_process_of_a_pod_is_in_its_cgroup_and_namespace() {
    let world = World::new();
    let node = world.node("one");
    let pod = node.pod(&world, "pod");
    let (_, cgroup, _) =
        dataplane_tests::process::output(pod.command("cat").arg("/proc/self/cgroup"));
    let folder = pod
        .cgroup
        .folder
        .file_name()
        .expect("a name")
        .to_string_lossy()
        .into_owned();
    assert!(cgroup.contains(&folder), "{cgroup}");
    let (_, addresses, _) =
        dataplane_tests::process::output(pod.command("ip").args(["-o", "addr", "show", "eth0"]));
    assert!(addresses.contains(&pod.v4.to_string()), "{addresses}");
}

#[test]
fn no_two_test_processes_have_one_number_at_a_time() {
    // As for processes whose IDs differ by these numbers.
    let claims = [0, NUMBERS, 2 * NUMBERS].map(|apart| Claim::new(7 + apart));
    let numbers = claims.each_ref().map(|claim| claim.number);
    for number in numbers {
        assert!((1..=NUMBERS).contains(&number), "{numbers:?}");
        let same = numbers.iter().filter(|other| **other == number);
        assert_eq!(same.count(), 1, "{numbers:?}");
    }
}

#[test]
fn nothing_is_left_of_a_world() {
    let id = {
        let world = World::new();
        let node = world.node("one");
        let _pod = node.pod(&world, "pod");
        world.id
    };
    let names = std::fs::read_dir("/run/netns")
        .into_iter()
        .flatten()
        .flatten();
    let left: Vec<_> = names
        .map(|name| name.file_name().to_string_lossy().into_owned())
        .filter(|name| name.contains(&format!("dp-{id}-")))
        .collect();
    assert!(left.is_empty(), "{left:?}");
    assert!(
        !dataplane_tests::cgroup::root()
            .join(format!("dp-{id}"))
            .exists()
    );
}

#[test]
fn what_a_killed_test_left_is_cleared_whoever_has_its_processs_number() {
    let live = World::new();
    let node = live.node("one");
    // The process with this ID lives: it is ours.
    let id = format!("t{:x}n{}", std::process::id(), u32::MAX);
    let folder = tempfile::Builder::new()
        .prefix(&format!("dataplane-{id}-"))
        .tempdir()
        .expect("a folder");
    let lock = File::create(folder.path().join("lock")).expect("a file");
    lock.lock().expect("nobody else knows of it");
    let netns = Netns::new(&format!("dp-{id}-one"));
    let cgroup = Cgroup::new(&cgroup::root().join(format!("dp-{id}")));
    let there = || {
        let netns = Path::new("/run/netns").join(&netns.name);
        [folder.path(), &cgroup.folder, &netns].map(Path::exists)
    };
    left::sweep();
    assert_eq!(there(), [true; 3], "while it is locked, it lives");
    drop(lock);
    // Another test's child has a copy of the lock until it executes its program.
    eventually("it is cleared", 5, || {
        left::sweep();
        there() == [false; 3]
    });
    let netns = Path::new("/run/netns").join(&node.netns.name);
    assert!(netns.exists() && live.outside().exists() && live.folder().exists());
}

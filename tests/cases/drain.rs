//! The end of an agent: running connections may end, and those that are cut are logged.

#![allow(missing_docs, reason = "tests are named for what they show")]

use std::time::{Duration, Instant};

use dataplane_tests::{Agent, Node, World, scaled};

const PORT: u16 = 7000;

/// Starts an agent whose drain is longer than the test.
fn patient(world: &World, node: &Node) -> Agent {
    let mut setup = world.setup(node);
    setup.drains_for("120s");
    Agent::start(setup)
}

#[test]
fn what_begins_while_an_agent_drains_is_not_cut_when_what_ran_before_ends() {
    let world = World::new();
    let node = world.node("one");
    let (first, second) = (node.pod(&world, "first"), node.pod(&world, "second"));
    let server = node.bare(&world, "outside", "server");
    let _app = server.serve(PORT);
    let mut agent = patient(&world, &node);
    agent.up(&["first", "second"]);
    let before = first.live(server.at(PORT));
    agent.ask_to_end();
    agent.logs(&["draining; pods stay captured"]);
    let mut begun = second.live(server.at(PORT));
    drop(before);
    std::thread::sleep(Duration::from_secs(1));
    begun.say("still");
    assert_eq!(begun.line(), format!("{} still", second.v4));
    assert!(agent.runs(), "it drains");
    drop(begun);
    assert!(agent.wait().success(), "it ends when nothing runs");
}

#[test]
fn an_agent_that_is_told_twice_to_end_cuts_what_runs_and_tells_of_it() {
    let world = World::new();
    let node = world.node("one");
    let client = node.pod(&world, "client");
    let server = node.bare(&world, "outside", "server");
    let _app = server.serve(PORT);
    let mut agent = patient(&world, &node);
    agent.up(&["client"]);
    let live: Vec<_> = (0..20).map(|_| client.live(server.at(PORT))).collect();
    agent.ask_to_end();
    agent.logs(&["draining; pods stay captured"]);
    let told = Instant::now();
    agent.ask_to_end();
    assert!(agent.wait().success());
    let took = told.elapsed();
    assert!(took < scaled(Duration::from_secs(5)), "{took:?}");
    for talk in live {
        assert_eq!(talk.line(), "closed: reset");
    }
    let log = agent.log();
    let cut = log
        .lines()
        .filter(|line| line.contains("connection complete") && line.contains("reason=\"drain\""));
    assert_eq!(cut.count(), 20, "each is told of");
}

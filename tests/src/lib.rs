//! The test harness: nodes and pods as network namespaces and cgroups of this machine, the real agent on the
//! real kernel, and packet captures. Guards remove everything on drop.
//!
//! No test is skipped: if something that it needs is missing, it fails, and says so.

pub mod agent;
pub mod bpf;
pub mod cgroup;
pub mod claim;
pub mod command;
pub mod halves;
pub mod interrupt;
pub mod lacks;
pub mod left;
pub mod manifests;
pub mod netns;
pub mod one;
pub mod peer;
pub mod process;
pub mod script;
pub mod taps;
pub mod traces;
pub mod wire;
pub mod world;

use std::path::PathBuf;
use std::time::{Duration, Instant};

pub use agent::{Agent, repairs};
pub use halves::Halves;
pub use one::SingleNode;
pub use process::Process;
pub use taps::Taps;
pub use wire::Wire;
pub use world::{Node, Pair, Pod, World};

/// Panics if tests on the kernel cannot run here, and says what is missing.
pub fn require_root() {
    let root = nix::unistd::geteuid().is_root();
    assert!(
        root,
        "these tests need root: network namespaces, cgroups, bpf(2)"
    );
}

/// Returns the path of a program that `cargo xtask` names in the environment.
pub fn program(variable: &str) -> PathBuf {
    let Some(path) = std::env::var_os(variable) else {
        panic!("{variable} is not set: run this through `cargo xtask test` or `cargo xtask demo`");
    };
    PathBuf::from(path)
}

/// Scales a time limit for this machine by `DATAPLANE_TEST_SCALE`, which is set if it is slow.
pub fn scaled(limit: Duration) -> Duration {
    limit.mul_f64(scale())
}

/// Sleeps while an agent's timers of this time pass, and as long as it takes on this machine to do what they are
/// for: timers are as fast on a slow machine.
pub fn pause(time: Duration) {
    std::thread::sleep(time + Duration::from_millis(250).mul_f64(scale() - 1.0));
}

fn scale() -> f64 {
    let scale = std::env::var("DATAPLANE_TEST_SCALE").ok();
    scale.map_or(1.0, |scale| {
        let scale: f64 = scale
            .parse()
            .expect("DATAPLANE_TEST_SCALE is a number, as 1 or 2.5");
        scale.max(1.0)
    })
}

/// Waits until `holds` returns `true`.
///
/// # Panics
/// It does not within `seconds`, scaled.
pub fn eventually(what: &str, seconds: u64, holds: impl FnMut() -> bool) {
    assert!(within(seconds, holds), "not within {seconds} s: {what}");
}

/// Returns `true` if `holds` does within `seconds`, scaled.
pub fn within(seconds: u64, mut holds: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + scaled(Duration::from_secs(seconds));
    loop {
        // The last call begins when the time is over: one before may have taken all of it, or this process have
        // stood still since.
        let is_last = Instant::now() >= deadline;
        if holds() {
            return true;
        }
        if is_last {
            return false;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

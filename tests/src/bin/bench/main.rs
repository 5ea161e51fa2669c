//! The benchmark: what is compared is measured in turns, round by round.

#![allow(missing_docs, reason = "a program")]

mod changes;
mod rounds;

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::{env, fs, thread};

use nix::sys::signal::{SigSet, Signal};
use serde_json::json;

/// `true` once Ctrl-C was pressed: nothing further is measured, and everything is removed.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

fn main() -> ExitCode {
    let (mut quick, mut file) = (false, None);
    let mut arguments = env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--quick" => quick = true,
            "--json" => file = arguments.next(),
            _ => {
                eprintln!("usage: bench [--quick] [--json FILE]");
                return ExitCode::from(2);
            }
        }
    }
    let signals: SigSet = [Signal::SIGINT, Signal::SIGTERM].into_iter().collect();
    signals.thread_block().expect("signals can be blocked");
    thread::spawn(move || {
        while signals.wait().is_ok() {
            INTERRUPTED.store(true, Ordering::Relaxed);
        }
    });
    let Some(rounds) = changes::measure(quick) else {
        println!("interrupted, everything is taken away");
        return ExitCode::FAILURE;
    };
    println!("\n{}", rounds.table());
    if let Some(file) = file {
        let text = format!("{:#}\n", json!({ "changes": rounds.json() }));
        if let Err(error) = fs::write(&file, text) {
            eprintln!("error: {file}: {error}");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

/// Returns `true` if Ctrl-C was pressed.
fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

//! The benchmark: what is compared is measured in turns, round by round.

#![allow(missing_docs, reason = "a program")]

mod changes;
mod rounds;

use std::process::ExitCode;
use std::{env, fs};

use dataplane_tests::interrupt;
use serde_json::json;

use crate::changes::Measured;
use crate::rounds::spread;

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
    interrupt::watch();
    let Some(measured) = changes::measure(quick) else {
        println!("interrupted, everything is taken away");
        return ExitCode::FAILURE;
    };
    let Measured {
        rounds,
        reaction,
        for_each,
    } = measured;
    println!("\n{}\n", rounds.table());
    let (least, median, most) = reaction;
    println!(
        "p99 while the agent follows the changes, to that while they are only written: \
         × {median:.2} ({least:.2} to {most:.2})"
    );
    let (least, median, most) = spread(for_each.clone());
    println!(
        "processor time of the agent for each change: {median:.0} µs ({least:.0} to {most:.0})"
    );
    if let Some(file) = file {
        let text =
            json!({ "changes": rounds.json(), "processor time for each change, µs": for_each });
        let text = format!("{text:#}\n");
        if let Err(error) = fs::write(&file, text) {
            eprintln!("error: {file}: {error}");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

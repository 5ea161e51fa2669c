//! The benchmark: what is compared is measured in turns, round by round.

#![allow(missing_docs, reason = "a program")]

mod changes;
mod rounds;

use std::process::ExitCode;
use std::{env, fs};

use dataplane_tests::interrupt;
use serde_json::json;

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

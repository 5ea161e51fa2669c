//! The demo: two nodes of the dataplane on this machine, Bookinfo's pods on them, and the steps of a
//! migration to ambient mesh, each with what should happen and what did.

#![allow(missing_docs, reason = "a program")]

mod agents;
mod bookinfo;
mod kubelet;
mod only;
mod steps;
mod table;

use std::process::ExitCode;

use dataplane_tests::interrupt::{self, interrupted};

fn main() -> ExitCode {
    let (mut keep, mut halves) = (false, false);
    for argument in std::env::args().skip(1) {
        match argument.as_str() {
            "--keep" => keep = true,
            "--halves" => halves = true,
            _ => {
                eprintln!("usage: demo [--keep] [--halves]");
                return ExitCode::from(2);
            }
        }
    }
    interrupt::watch();
    let _only = match only::only() {
        Ok(lock) => lock,
        Err(why) => {
            eprintln!("error: {why}");
            return ExitCode::FAILURE;
        }
    };
    let mut table = table::Table::default();
    let mesh = bookinfo::Mesh::start(halves);
    steps::walk(&mesh, &mut table);
    if interrupted() {
        println!("\ninterrupted, taking everything away");
        drop(mesh);
        return ExitCode::FAILURE;
    }
    table.print();
    if keep && !interrupted() {
        mesh.explain();
        while !interrupted() {
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
    }
    println!("\ntaking everything away");
    drop(mesh);
    if table.all_good() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

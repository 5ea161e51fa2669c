//! Fuzz targets: each is a function that parses any bytes, and checks what must hold of the result. `cargo xtask
//! fuzz` generates inputs for them; a test replays the inputs in `corpus/`.

mod targets;

pub use targets::{
    certificate, cgroup, decide, headers, identity, local, manifests, records, seam,
};

/// A target: takes any bytes, and panics if something that must hold does not. It returns false if it rejected them, so
/// that there was little to check.
pub type Target = fn(&[u8]) -> bool;

/// The targets by name.
pub const TARGETS: &[(&str, Target)] = &[
    ("certificate", certificate),
    ("cgroup", cgroup),
    ("decide", decide),
    ("headers", headers),
    ("identity", identity),
    ("local", local),
    ("manifests", manifests),
    ("records", records),
    ("seam", seam),
];

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::{Path, PathBuf};

    use dataplane_agent::seam::wire::{NodeMessage, ProxyMessage};

    use super::*;

    fn inputs(target: &str) -> Vec<PathBuf> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("corpus")
            .join(target);
        let entries = fs::read_dir(&folder);
        let entries = entries.unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
        let mut inputs: Vec<_> = entries.map(|entry| entry.expect("a file").path()).collect();
        inputs.sort();
        inputs
    }

    #[test]
    fn what_must_hold_holds_for_every_input_that_is_kept() {
        for (name, target) in TARGETS {
            let inputs = inputs(name);
            assert!(!inputs.is_empty(), "corpus/{name} is empty");
            for path in inputs {
                // Printed before it is run, so that the path precedes a panic's message.
                eprintln!("{}", path.display());
                let _ = target(&fs::read(&path).expect("a file"));
            }
        }
    }

    /// What begins with inputs that are all rejected finds little behind the parser, however long it looks.
    #[test]
    fn every_target_takes_some_of_its_inputs() {
        for (name, target) in TARGETS {
            let mut inputs = inputs(name).into_iter();
            let takes = |path| target(&fs::read(path).expect("a file"));
            assert!(inputs.any(takes), "{name} rejects all of corpus/{name}");
        }
    }

    #[test]
    fn every_word_of_the_seam_is_an_input() {
        let (mut said, mut told) = ([false; 7], [false; 3]);
        for path in inputs("seam") {
            let packet = fs::read(path).expect("a file");
            if let Ok(word) = NodeMessage::read(&packet) {
                said[match word {
                    NodeMessage::Add(_) => 0,
                    NodeMessage::Del(_) => 1,
                    NodeMessage::SnapshotSent(_) => 2,
                    NodeMessage::Welcome(_) => 3,
                    NodeMessage::Addresses(_) => 4,
                    NodeMessage::Drain(_) => 5,
                    NodeMessage::Revive(_) => 6,
                }] = true;
            }
            if let Ok(word) = ProxyMessage::read(&packet) {
                told[match word {
                    ProxyMessage::Ack(_) => 0,
                    ProxyMessage::Idle(_) => 1,
                    ProxyMessage::Leaving(_) => 2,
                }] = true;
            }
        }
        assert_eq!((said, told), ([true; 7], [true; 3]));
    }

    #[test]
    fn every_target_can_be_fuzzed_and_every_corpus_is_replayed() {
        let manifest = include_str!("../Cargo.toml");
        for (name, _) in TARGETS {
            let path = format!("path = \"targets/{name}.rs\"");
            assert!(manifest.contains(&path), "{name} is no binary");
        }
        assert_eq!(manifest.matches("[[bin]]").count(), TARGETS.len());
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
        let kept: Vec<_> = fs::read_dir(corpus).expect("a folder").collect();
        assert_eq!(kept.len(), TARGETS.len(), "{kept:?}");
    }
}

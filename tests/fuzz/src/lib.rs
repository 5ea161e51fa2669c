//! Fuzz targets: each is a function that parses any bytes, and checks what must hold of the result. `cargo xtask
//! fuzz` generates inputs for them; a test replays the inputs in `corpus/`.

mod targets;

pub use targets::{
    certificate, cgroup, decide, headers, identity, local, manifests, records, seam,
};

/// A target: takes any bytes, and panics if something that must hold does not.
pub type Target = fn(&[u8]);

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
                target(&fs::read(&path).expect("a file"));
            }
        }
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

//! Takes the kernel programs that `cargo xtask build` made. Without them empty objects are built in,
//! so that all that needs no kernel still builds; the loader refuses those by name.
//!
//! While `cargo xtask` makes them it holds the lock beside them, and this waits: it may build the
//! agent's dependencies at the same time.

use std::path::{Path, PathBuf};
use std::{env, fs};

fn main() {
    println!("cargo::rerun-if-env-changed=DATAPLANE_EBPF_OBJECTS");
    let made = setting("DATAPLANE_EBPF_OBJECTS");
    let out = setting("OUT_DIR").expect("cargo sets OUT_DIR");
    // Without a lock nobody makes them now.
    let lock = made.as_ref().map(|folder| folder.join("lock"));
    let lock = lock.and_then(|lock| fs::File::open(lock).ok());
    if let Some(Err(error)) = lock.as_ref().map(fs::File::lock_shared) {
        panic!("cannot wait for the kernel programs: {error}");
    }
    let other = setting("CARGO_FEATURE_OTHER_LAYOUT").is_some();
    for name in ["node", "pod"] {
        let made_as = match other {
            true => format!("other-{name}"),
            false => name.into(),
        };
        let object = made.as_ref().map(|folder| folder.join(made_as));
        if let Some(object) = &object {
            // Cargo looks at the time of a file, and at whether it is there.
            println!("cargo::rerun-if-changed={}", object.display());
        }
        let bytes = object.and_then(|object| fs::read(object).ok());
        write(&out.join(name), &bytes.unwrap_or_default());
    }
}

fn setting(name: &str) -> Option<PathBuf> {
    #[expect(
        clippy::disallowed_methods,
        reason = "a build script has no other settings"
    )]
    env::var_os(name).map(PathBuf::from)
}

fn write(path: &Path, bytes: &[u8]) {
    if let Err(error) = fs::write(path, bytes) {
        panic!("cannot write {}: {error}", path.display());
    }
}

//! The compiler of the kernel programs. They need `core` for a BPF target, which nobody ships built: so the
//! compiler has to have the library's sources, and to be allowed to build them.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::command::{find_program, foreign, output};

/// Debian's packages of the compiler.
pub(crate) const DEBIAN: &[&str] = &["rustc-web", "cargo-web", "rust-web-src", "rust-web-clippy"];

/// A compiler that builds for a BPF target, given a linker.
#[derive(Clone, Debug)]
pub(crate) struct Compiler {
    /// Its description, for people.
    pub(crate) name: String,
    /// The folder of `rustc`, `cargo` and `cargo-clippy`; always named by path, since on most
    /// machines those of the host's toolchain come first.
    folder: PathBuf,
}

impl Compiler {
    /// Finds a nightly of rustup's.
    pub(crate) fn nightly() -> Option<Self> {
        let rustup = find_program("rustup")?;
        let list = output(foreign(&rustup).args(["toolchain", "list"])).ok()?;
        let name = list
            .split_whitespace()
            .find(|word| word.starts_with("nightly"))?;
        let rustc = output(foreign(&rustup).args(["which", "--toolchain", name, "rustc"])).ok()?;
        Self::at(Path::new(rustc.trim()).parent()?, "rustup's nightly")
    }

    /// Finds Debian's compiler.
    pub(crate) fn debian() -> Option<Self> {
        Self::at(Path::new("/usr/bin"), "Debian's")
    }

    fn at(folder: &Path, whose: &str) -> Option<Self> {
        let rustc = folder.join("rustc");
        let sysroot = output(foreign(&rustc).args(["--print", "sysroot"])).ok()?;
        let sources =
            Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core/src/lib.rs");
        let here = |name: &&str| folder.join(name).is_file();
        if !sources.is_file() || !["cargo", "cargo-clippy"].iter().all(here) {
            return None;
        }
        let version = output(foreign(&rustc).arg("--version")).ok()?;
        let version = version.split_whitespace().nth(1).unwrap_or("unknown");
        Some(Self {
            name: format!("{whose} rustc {version}"),
            folder: folder.to_owned(),
        })
    }

    /// Returns its `rustc`.
    pub(crate) fn rustc(&self) -> Command {
        let mut rustc = foreign(&self.folder.join("rustc"));
        rustc.env("RUSTC_BOOTSTRAP", "1");
        rustc
    }

    /// Returns its `cargo`.
    pub(crate) fn cargo(&self) -> Command {
        self.driven(&self.folder.join("cargo"))
    }

    /// Returns its `cargo-clippy`, called directly: its cargo would run the first one on the path.
    pub(crate) fn clippy(&self) -> Command {
        let mut clippy = self.driven(&self.folder.join("cargo-clippy"));
        clippy.env("CARGO", self.folder.join("cargo")).arg("clippy");
        clippy
    }

    fn driven(&self, program: &Path) -> Command {
        let mut command = foreign(program);
        command
            .env("RUSTC", self.folder.join("rustc"))
            .env("RUSTDOC", self.folder.join("rustdoc"))
            .env("RUSTC_BOOTSTRAP", "1");
        command
    }
}

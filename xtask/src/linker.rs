//! The linker of the kernel programs: bpf-linker, which turns bitcode into one object with BTF. It has to
//! support the bitcode of the compiler's LLVM, so it is tried out, not only found.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::command::{self, cargo, find_program, foreign, output, target, variable};
use crate::compiler::Compiler;
use crate::progress::run_quietly;

/// The version that the kernel programs are tested with.
pub(crate) const VERSION: &str = "0.13.0";
/// The LLVM of Debian's compiler, which the linker is built against.
const LLVM: &str = "/usr/lib/llvm-22";
/// The Debian packages that are needed to build it.
pub(crate) const DEBIAN: &[&str] = &["llvm-22-dev", "libpolly-22-dev", "zlib1g-dev"];

/// The smallest program that can be linked; it uses nothing of `core`.
const TRIAL: &str = r#"
#![feature(no_core, lang_items)]
#![no_core]
#![no_main]
#[lang = "pointee_sized"] trait PointeeSized {}
#[lang = "meta_sized"] trait MetaSized: PointeeSized {}
#[lang = "sized"] trait Sized: MetaSized {}
#[unsafe(no_mangle)]
extern "C" fn trial() {}
"#;

/// Finds a linker that can link the output of `compiler`: the project's own, or one of the same version that
/// is on the machine.
pub(crate) fn find(compiler: &Compiler) -> Option<PathBuf> {
    let home = variable("CARGO_HOME").or_else(|| Some(variable("HOME")?.join(".cargo")));
    [
        Some(own()),
        find_program("bpf-linker"),
        home.map(|home| home.join("bin/bpf-linker")),
    ]
    .into_iter()
    .flatten()
    .find(|linker| works(linker, compiler).unwrap_or(false))
}

/// Builds a linker into the project's cache; the user's own tools stay as they are.
pub(crate) fn install(compiler: &Compiler) -> Result<PathBuf> {
    let tools = target().join("tools");
    let build = tools.join("build");
    run_quietly(
        "bpf-linker",
        cargo()
            .args(["install", "--locked", "--force", "--root"])
            .arg(&tools)
            .arg(format!("bpf-linker@{VERSION}"))
            .args(["--no-default-features", "--features", "llvm-22"])
            .env("LLVM_PREFIX", LLVM)
            // LLVM does the work, and is optimised already. The code compiled here only calls it, and would take
            // five times as long to build with optimisation.
            .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "0")
            .env("CARGO_PROFILE_RELEASE_DEBUG", "false")
            // A fixed folder, so that an interrupted build continues.
            .env("CARGO_TARGET_DIR", &build),
    )?;
    let linker = own();
    ensure!(
        works(&linker, compiler)?,
        "{} cannot link what {} compiles",
        linker.display(),
        compiler.name
    );
    fs::remove_dir_all(&build).with_context(|| format!("cannot remove {}", build.display()))?;
    Ok(linker)
}

/// Returns `true` if LLVM is installed to build against.
pub(crate) fn can_build() -> bool {
    // `libLLVM` comes with llvm-22-dev; Polly, which LLVM's own list of libraries names, with libpolly-22-dev.
    ["bin/llvm-config", "lib/libLLVM.so", "lib/libPolly.a"]
        .iter()
        .all(|file| Path::new(LLVM).join(file).exists())
        && Path::new("/usr/include/zlib.h").exists()
}

fn own() -> PathBuf {
    target().join("tools/bin/bpf-linker")
}

fn works(linker: &Path, compiler: &Compiler) -> Result<bool> {
    if !linker.is_file() {
        return Ok(false);
    }
    let version = output(foreign(linker).arg("--version"))?;
    if version.split_whitespace().nth(1) != Some(VERSION) {
        return Ok(false);
    }
    let folder = command::target().join("tools/trial");
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let source = folder.join("trial.rs");
    fs::write(&source, TRIAL).with_context(|| format!("cannot write {}", source.display()))?;
    let mut flag = std::ffi::OsString::from("linker=");
    flag.push(linker);
    let trial = output(
        compiler
            .rustc()
            .args(["--edition", "2024", "--target", "bpfel-unknown-none", "-O"])
            .arg("-C")
            .arg(flag)
            .args(["-C", "link-arg=--btf", "-C", "debuginfo=2", "-o"])
            .arg(folder.join("trial.o"))
            .arg(&source),
    );
    Ok(trial.is_ok())
}

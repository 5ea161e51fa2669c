//! The initramfs that a test machine boots into: programs with their libraries, the kernel's modules, an init,
//! and the plan that init runs.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::kernel::Module;
use crate::command::{all_output, find_program, run as run_command};

/// Programs of this machine that the tests call.
const PROGRAMS: &[&str] = &[
    "ip", "ss", "cat", "flock", "mkdir", "timeout", "true", "unshare",
];

/// An initramfs that is being put together.
pub(crate) struct Initramfs {
    root: PathBuf,
    libraries: BTreeSet<PathBuf>,
}

impl Initramfs {
    /// Starts one in the folder `root`, with an init and the programs that tests call.
    pub(crate) fn new(root: &Path, init: &Path) -> Result<Self> {
        if root.exists() {
            fs::remove_dir_all(root)?;
        }
        for folder in ["usr/bin", "usr/sbin", "usr/lib", "usr/lib64", "etc", "var"] {
            fs::create_dir_all(root.join(folder))?;
        }
        for folder in ["bin", "sbin", "lib", "lib64"] {
            symlink(format!("usr/{folder}"), root.join(folder))?;
        }
        symlink("/run", root.join("var/run"))?;
        fs::write(root.join("etc/hosts"), "127.0.0.1 localhost\n")?;
        let mut image = Self {
            root: root.to_owned(),
            libraries: BTreeSet::new(),
        };
        image.program(init, "/init")?;
        for name in PROGRAMS {
            let program = find_program(name).with_context(|| format!("no program {name}"))?;
            image.program(&program, &format!("/usr/bin/{name}"))?;
        }
        Ok(image)
    }

    /// Adds a program of this machine, with the libraries that it needs.
    pub(crate) fn program(&mut self, from: &Path, to: &str) -> Result<()> {
        self.file(from, to)?;
        // `libc.so.6 => /lib/…/libc.so.6 (0x…)`, and the loader without a name before it.
        let mut ldd = Command::new("ldd");
        let (_, said) = all_output(ldd.env("LC_ALL", "C").arg(from))?;
        let is_static = ["not a dynamic executable", "statically linked"]
            .iter()
            .any(|words| said.contains(words));
        ensure!(
            is_static || !said.contains("not found") && said.contains('/'),
            "ldd {}: {said}",
            from.display()
        );
        for word in said.split_whitespace().filter(|word| word.starts_with('/')) {
            if self.libraries.insert(word.into()) {
                self.file(Path::new(word), word)?;
            }
        }
        Ok(())
    }

    /// Adds kernel modules, which init loads in this order.
    pub(crate) fn modules(&self, modules: &[Module]) -> Result<()> {
        let mut list = String::new();
        for module in modules {
            let to = format!("usr/lib/{}", module.name);
            fs::write(self.root.join(&to), &module.bytes)?;
            list.push_str(&format!("/{to}\n"));
        }
        Ok(fs::write(self.root.join("etc/modules"), list)?)
    }

    /// Packs it with this plan: the commands that init runs, one per line.
    pub(crate) fn pack(&self, plan: &[String]) -> Result<PathBuf> {
        fs::write(self.root.join("etc/plan"), plan.join("\n"))?;
        let packed = self.root.with_extension("cpio");
        run_command(
            Command::new("sh")
                .args([
                    "-c",
                    "find . | cpio --create --format newc --quiet > \"$0\"",
                ])
                .arg(&packed)
                .current_dir(&self.root),
        )?;
        Ok(packed)
    }

    fn file(&self, from: &Path, to: &str) -> Result<()> {
        let to = self.root.join(to.trim_start_matches('/'));
        if let Some(folder) = to.parent() {
            fs::create_dir_all(folder)?;
        }
        fs::copy(from, &to)
            .with_context(|| format!("copy {} to {}", from.display(), to.display()))?;
        Ok(())
    }
}

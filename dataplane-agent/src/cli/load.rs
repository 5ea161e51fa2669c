//! `dataplane load`: a test that this kernel accepts the programs.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use aya::Ebpf;
use aya::maps::MapInfo;
use aya::programs::ProgramInfo;

use crate::node::capture::pins::Pins;
use crate::node::capture::programs::{self, Loader};
use crate::node::capture::{enrol, maps};
use crate::sys::netns::Netns;
use crate::sys::{bpffs, cgroup, verifier};

/// Loads the programs, attaches them to a temporary cgroup and network namespace, lists them, and removes
/// everything again.
///
/// # Errors
/// The kernel refuses a program, with the reason.
pub fn run(folder: &Path) -> Result<String> {
    let trial = Trial::new(cgroup::root()?.join(format!("dataplane-load-{}", std::process::id())))?;
    let netns = Netns::new().context("cannot make a network namespace")?;
    bpffs::in_private(folder, || load(folder, &trial.0, &netns))
        .with_context(|| format!("mount a BPF file system at {}", folder.display()))?
}

fn load(folder: &Path, cgroup: &Path, netns: &Netns) -> Result<String> {
    let mut pins = Pins::trial(folder);
    let _lock = pins.make()?;
    let mut loader = Loader::new(&pins);
    let mut node = loader.node()?;
    let mut links = programs::Links::new();
    programs::restore(&mut node, cgroup, &pins, &mut links)?.whole?;
    let listeners = enrol::listen(netns)?;
    let mut pod = loader.pod(netns.cookie()?, None, Some(&listeners))?;
    pod.attach(netns, &pins.pod(netns.cookie()?))?;
    let mut text = format!(
        "{:<10} {:<18} {:>6} {:>9} {:>6}  maps\n",
        "program", "kind", "insns", "verified", "stack"
    );
    list(&mut text, &node, programs::NODE)?;
    list(&mut text, pod.ebpf(), programs::POD)?;
    writeln!(
        text,
        "\nloaded, attached and taken off again: {} programs, {} pinned maps",
        programs::NODE_PROGRAMS.len() + 1,
        maps::SHARED.len() + maps::NODE_MAPS.len()
    )?;
    Ok(text)
}

/// A temporary cgroup, removed when this is dropped.
struct Trial(PathBuf);

impl Trial {
    fn new(cgroup: PathBuf) -> Result<Self> {
        fs::create_dir(&cgroup).with_context(|| cgroup.display().to_string())?;
        Ok(Self(cgroup))
    }
}

impl Drop for Trial {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir(&self.0) {
            eprintln!("{}: {error}", self.0.display());
        }
    }
}

/// Writes a line for each program: the instructions loaded, the instructions that the verifier walked through,
/// and the bytes of stack.
fn list(text: &mut String, ebpf: &Ebpf, object: &[u8]) -> Result<()> {
    let mut programs = Vec::new();
    let mut maps = HashMap::new();
    for (name, program) in ebpf.programs() {
        let info = program.info().with_context(|| name.to_owned())?;
        let own = maps_of(&info);
        let names = own.keys().map(String::as_str).collect::<Vec<_>>().join(" ");
        programs.push((name, program.prog_type(), info, names));
        maps.extend(own);
    }
    programs.sort_unstable_by_key(|(name, ..)| *name);
    for (name, kind, info, names) in programs {
        let stack = verifier::stack(object, name, &maps)
            .with_context(|| format!("kernel program {name}"))?;
        writeln!(
            text,
            "{name:<10} {:<18} {:>6} {:>9} {stack:>6}  {names}",
            format!("{kind:?}"),
            info.size_translated().map_or(0, |bytes| bytes / 8),
            info.verified_instruction_count().unwrap_or(0),
        )?;
    }
    Ok(())
}

fn maps_of(info: &ProgramInfo) -> BTreeMap<String, OwnedFd> {
    let ids = info.map_ids().ok().flatten().unwrap_or_default();
    ids.into_iter()
        .filter_map(|id| {
            let map = MapInfo::from_id(id).ok()?;
            let descriptor = map.fd().ok()?.as_fd().try_clone_to_owned().ok()?;
            Some((map.name_as_str()?.to_owned(), descriptor))
        })
        .collect()
}

//! `dataplane load`: whether this kernel takes the programs.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use aya::Ebpf;
use aya::maps::MapInfo;
use aya::programs::ProgramInfo;

use crate::capture::pins::Pins;
use crate::capture::programs::{self, Loader};
use crate::capture::{enrol, maps};
use crate::sys::netns::Netns;
use crate::sys::{cgroup, verifier};

/// Loads the programs, attaches them to a cgroup and a network namespace made for this, lists them,
/// and takes everything off again.
///
/// # Errors
/// The kernel refuses a program, and why.
pub fn run(bpffs: &Path) -> Result<()> {
    let name = format!("load-{}", std::process::id());
    let trial = Trial {
        cgroup: cgroup::root()?.join(format!("dataplane-{name}")),
        pins: Pins::new(bpffs, &name),
    };
    fs::create_dir(&trial.cgroup).with_context(|| trial.cgroup.display().to_string())?;
    trial.pins.make()?;
    let mut loader = Loader::new(&trial.pins);
    let mut node = loader.node()?;
    programs::attach(&mut node.ebpf, &trial.cgroup, &trial.pins)?;
    let netns = Netns::new().context("cannot make a network namespace")?;
    let listeners = enrol::listen(&netns)?;
    let mut pod = loader.pod(&["192.0.2.1".parse()?, "2001:db8::1".parse()?], &listeners)?;
    pod.attach(&netns, &trial.pins.pod(netns.cookie()?))?;
    println!(
        "{:<10} {:<18} {:>6} {:>9} {:>6}  maps",
        "program", "kind", "insns", "verified", "stack"
    );
    list(&node.ebpf, programs::NODE)?;
    list(pod.ebpf(), programs::POD)?;
    println!(
        "\nloaded, attached and taken off again: {} programs, {} pinned maps",
        programs::OF_NODE.len() + 1,
        maps::SHARED.len() + maps::OF_NODE.len()
    );
    Ok(())
}

/// What the trial leaves, unless it is removed.
struct Trial {
    cgroup: PathBuf,
    pins: Pins,
}

impl Drop for Trial {
    fn drop(&mut self) {
        if let Err(error) = self.pins.remove_all() {
            eprintln!("{error}");
        }
        if let Err(error) = fs::remove_dir(&self.cgroup) {
            eprintln!("{}: {error}", self.cgroup.display());
        }
    }
}

/// A line for each program: instructions loaded, instructions that the verifier walked through, and
/// bytes of stack.
fn list(ebpf: &Ebpf, object: &[u8]) -> Result<()> {
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
        let verified = verifier::verify(object, name, &maps)
            .with_context(|| format!("kernel program {name}"))?;
        println!(
            "{name:<10} {:<18} {:>6} {:>9} {:>6}  {names}",
            format!("{kind:?}"),
            info.size_translated().map_or(0, |bytes| bytes / 8),
            verified.instructions,
            verified.stack,
        );
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

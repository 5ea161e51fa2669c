//! `dataplane load`: whether this kernel takes the programs.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use aya::Ebpf;
use aya::maps::MapInfo;
use aya::programs::ProgramInfo;

use crate::capture::pins::Pins;
use crate::capture::programs::{self, Loader};
use crate::capture::{Listeners, maps};
use crate::sys::netns::Netns;
use crate::sys::{cgroup, socket};

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
    let listeners = netns.enter(|| -> std::io::Result<_> {
        Ok(Listeners {
            outbound: socket::listener(15001, dataplane_ebpf::mark::CAPTURE)?,
            inbound: socket::listener(15006, dataplane_ebpf::mark::AGENT)?,
            hbone: socket::listener(15008, dataplane_ebpf::mark::AGENT)?,
        })
    })??;
    let mut pod = loader.pod(&["192.0.2.1".parse()?, "2001:db8::1".parse()?], &listeners)?;
    pod.attach(&netns, &trial.pins.pod(netns.cookie()?))?;
    println!(
        "{:<10} {:<18} {:>6} {:>12}  maps",
        "program", "kind", "insns", "verified"
    );
    list(&node.ebpf)?;
    list(pod.ebpf())?;
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

fn list(ebpf: &Ebpf) -> Result<()> {
    for (name, program) in ebpf.programs() {
        let info = program.info().with_context(|| name.to_owned())?;
        println!(
            "{name:<10} {:<18} {:>6} {:>12}  {}",
            format!("{:?}", program.prog_type()),
            info.size_translated().map_or(0, |bytes| bytes / 8),
            info.verified_instruction_count().unwrap_or_default(),
            maps_of(&info),
        );
    }
    Ok(())
}

fn maps_of(info: &ProgramInfo) -> String {
    let ids = info.map_ids().ok().flatten().unwrap_or_default();
    let mut names: Vec<String> = ids
        .into_iter()
        .filter_map(|id| Some(MapInfo::from_id(id).ok()?.name_as_str()?.to_owned()))
        .collect();
    names.sort_unstable();
    names.dedup();
    names.join(" ")
}

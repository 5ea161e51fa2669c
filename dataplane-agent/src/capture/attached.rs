//! Whose programs are attached. A node has one agent, whatever its arguments are: files and folders can
//! be others for another one, but the cgroup and the pods' namespaces are the same.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use aya::maps::MapInfo;
use aya::programs::links::LinkType;
use aya::programs::{ProgramInfo, loaded_links, loaded_programs};

use super::maps::chain;
use super::pins::Pins;
use super::{CaptureError, maps, programs};
use crate::sys::hooks;
use crate::sys::netns::Netns;

/// The kernel detaches what was unpinned a moment later: programs that are still there after this time
/// are somebody's.
const DETACHED: Duration = Duration::from_secs(2);
/// How often it is asked again until then.
const AGAIN: Duration = Duration::from_millis(20);

/// Refuses where an agent's programs are attached to the cgroup that are neither pinned here nor were:
/// another agent has it, or had it and was not uninstalled.
///
/// # Errors
/// There are such programs; the kernel does not tell.
pub fn refuse_on_cgroup(
    cgroup: &Path,
    pins: &Pins,
    were: &BTreeSet<u32>,
) -> Result<(), CaptureError> {
    let folder = File::open(cgroup).map_err(CaptureError::file(cgroup))?;
    let own = &pins.programs() | were;
    let deadline = Instant::now() + DETACHED;
    loop {
        let attached = hooks::of_cgroup(&folder).map_err(CaptureError::file(cgroup))?;
        match others(&attached, &own, is_of_a_node) {
            0 => return Ok(()),
            _ if Instant::now() < deadline => std::thread::sleep(AGAIN),
            count => {
                return Err(CaptureError::Attached {
                    to: format!("the cgroup {}", cgroup.display()),
                    count,
                    pins: pins.folder().to_owned(),
                });
            }
        }
    }
}

/// Refuses where another agent's program steers in a pod's network namespace.
///
/// # Errors
/// As [`refuse_on_cgroup`].
pub async fn refuse_in_pod(netns: &Netns, cookie: u64, pins: &Pins) -> Result<(), CaptureError> {
    let own = pins.programs_of(cookie);
    let deadline = Instant::now() + DETACHED;
    loop {
        let attached = hooks::of_netns(netns).map_err(|error| CaptureError::Namespace {
            what: "see which programs are attached",
            why: error.to_string(),
        })?;
        match others(&attached, &own, is_of_a_pod) {
            0 => return Ok(()),
            _ if Instant::now() < deadline => tokio::time::sleep(AGAIN).await,
            count => {
                return Err(CaptureError::Attached {
                    to: "the pod's network namespace".into(),
                    count,
                    pins: pins.folder().to_owned(),
                });
            }
        }
    }
}

/// How many links of any agent's programs there are on this machine.
///
/// # Errors
/// The kernel does not tell.
pub fn anywhere(pins: &Pins) -> Result<usize, CaptureError> {
    let deadline = Instant::now() + DETACHED;
    loop {
        let ours: BTreeSet<u32> = loaded_programs()
            .filter_map(Result::ok)
            .filter(|program| is_of_a_node(program) || is_of_a_pod(program))
            .map(|program| program.id())
            .collect();
        let mut links = 0;
        for link in loaded_links() {
            match link {
                Ok(link) => links += usize::from(ours.contains(&link.program_id())),
                Err(error) if is_gone(&error) => {}
                Err(error) => return Err(untold(pins)(error)),
            }
        }
        if links == 0 || Instant::now() >= deadline {
            return Ok(links);
        }
        std::thread::sleep(AGAIN);
    }
}

/// The ids of a node's programs, attached or not, of this agent and of those before it: they use the
/// maps that are pinned here.
///
/// # Errors
/// The kernel does not tell.
pub fn own(pins: &Pins) -> Result<BTreeSet<u32>, CaptureError> {
    let maps = pins.map_ids();
    let mut own = BTreeSet::new();
    for program in loaded_programs() {
        let program = match program {
            Ok(program) => program,
            Err(error) if is_gone(&error) => continue,
            Err(error) => return Err(untold(pins)(error)),
        };
        let ids = program.map_ids().ok().flatten().unwrap_or_default();
        if ids.iter().any(|id| maps.contains(id)) {
            own.insert(program.id());
        }
    }
    Ok(own)
}

/// Detaches programs, from cgroups alone or from all that they are attached to. That their pins are
/// removed does not do that: a process may have a link's descriptor, or another bpffs may be mounted
/// where it has its pin.
///
/// # Errors
/// The kernel refuses.
pub fn detach(
    programs: &BTreeSet<u32>,
    from: Option<LinkType>,
    pins: &Pins,
) -> Result<(), CaptureError> {
    for link in loaded_links() {
        let link = match link {
            Ok(link) => link,
            Err(error) if is_gone(&error) => continue,
            Err(error) => return Err(untold(pins)(error)),
        };
        let is_there = from.is_none_or(|kind| link.link_type().is_ok_and(|is| is == kind));
        if is_there && programs.contains(&link.program_id()) {
            hooks::detach(link.id()).map_err(untold(pins))?;
        }
    }
    Ok(())
}

/// Detaches this node's programs from a pod's network namespace.
///
/// # Errors
/// The kernel refuses.
pub fn detach_from_pod(netns: &Netns, pins: &Pins) -> Result<(), CaptureError> {
    let attached = hooks::of_netns(netns).map_err(untold(pins))?;
    if attached.is_empty() {
        return Ok(());
    }
    let mut of_pod = own(pins)?;
    of_pod.retain(|id| attached.contains(id));
    detach(&of_pod, None, pins)?;
    let attached = hooks::of_netns(netns).map_err(untold(pins))?;
    still(&attached, &of_pod).map_or(Ok(()), |why| Err(untold(pins)(why)))
}

/// What is told of those of these programs that are attached all the same.
pub fn still(attached: &[u32], own: &BTreeSet<u32>) -> Option<io::Error> {
    let left = attached.iter().filter(|id| own.contains(id)).count();
    (left > 0).then(|| io::Error::other(format!("{left} are still attached")))
}

/// Whether something has ended between two calls that look for it.
fn is_gone(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut error = Some(error);
    while let Some(is) = error {
        if let Some(is) = is.downcast_ref::<io::Error>() {
            return is.kind() == io::ErrorKind::NotFound;
        }
        error = is.source();
    }
    false
}

fn untold<E: std::error::Error>(pins: &Pins) -> impl FnOnce(E) -> CaptureError {
    let folder = pins.folder().to_owned();
    move |error| CaptureError::Detach {
        pins: folder,
        why: chain(&error),
    }
}

/// How many of the programs an agent loaded, those of `own` aside.
fn others(attached: &[u32], own: &BTreeSet<u32>, is_ours: fn(&ProgramInfo) -> bool) -> usize {
    let unknown: BTreeSet<u32> = attached
        .iter()
        .copied()
        .filter(|id| !own.contains(id))
        .collect();
    if unknown.is_empty() {
        return 0;
    }
    // There is no asking by number in this library; one that is gone meanwhile is not attached either.
    loaded_programs()
        .filter_map(Result::ok)
        .filter(|program| unknown.contains(&program.id()) && is_ours(program))
        .count()
}

fn is_of_a_node(program: &ProgramInfo) -> bool {
    let named = program
        .name_as_str()
        .is_some_and(|name| programs::OF_NODE.contains(&name));
    named && uses(program, &maps::OF_NODE)
}

fn is_of_a_pod(program: &ProgramInfo) -> bool {
    program.name_as_str() == Some(programs::OF_POD) && uses(program, &maps::OF_POD)
}

/// A program's name alone may be anybody's; with one of our maps it is ours, of whichever version.
fn uses(program: &ProgramInfo, names: &[&str]) -> bool {
    let ids = program.map_ids().ok().flatten().unwrap_or_default();
    ids.into_iter()
        .filter_map(|id| MapInfo::from_id(id).ok())
        .any(|map| map.name_as_str().is_some_and(|name| names.contains(&name)))
}

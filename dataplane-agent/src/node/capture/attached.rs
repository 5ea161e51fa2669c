//! Finds out whose programs are attached. A node has one agent, whatever its arguments are: another agent may
//! use other files and folders, but the cgroup and the pods' namespaces are the same.

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

/// How long the kernel may take to detach a program whose pin was removed. One that is still attached after
/// this time is in use.
const DETACH_TIMEOUT: Duration = Duration::from_secs(2);
/// Time between two checks until then.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Refuses if programs of an agent are attached to the cgroup that are neither pinned here nor among
/// `predecessors`: another agent runs there, or ran and was not uninstalled.
///
/// # Errors
/// There are such programs; the kernel does not list them.
pub fn refuse_on_cgroup(
    cgroup: &Path,
    pins: &Pins,
    predecessors: &BTreeSet<u32>,
) -> Result<(), CaptureError> {
    let folder = File::open(cgroup).map_err(CaptureError::file(cgroup))?;
    let own = &pins.programs() | predecessors;
    let deadline = Instant::now() + DETACH_TIMEOUT;
    loop {
        let attached = hooks::of_cgroup(&folder).map_err(CaptureError::file(cgroup))?;
        let others = count_foreign(&attached, &own, is_node_program);
        match others.map_err(CaptureError::file(cgroup))? {
            0 => return Ok(()),
            _ if Instant::now() < deadline => std::thread::sleep(POLL_INTERVAL),
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

/// Refuses if another agent's program is attached in a pod's network namespace.
///
/// # Errors
/// As [`refuse_on_cgroup`].
pub async fn refuse_in_pod(netns: &Netns, cookie: u64, pins: &Pins) -> Result<(), CaptureError> {
    let own = pins.programs_of(cookie);
    let deadline = Instant::now() + DETACH_TIMEOUT;
    let not_seen = |error: io::Error| CaptureError::Namespace {
        what: "see which programs are attached",
        why: chain(&error),
    };
    loop {
        let attached = hooks::of_netns(netns).map_err(not_seen)?;
        match count_foreign(&attached, &own, is_pod_program).map_err(not_seen)? {
            0 => return Ok(()),
            _ if Instant::now() < deadline => tokio::time::sleep(POLL_INTERVAL).await,
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

/// Counts the links of any agent's programs on this machine.
///
/// # Errors
/// The kernel does not list them.
pub fn count_links(pins: &Pins) -> Result<usize, CaptureError> {
    let deadline = Instant::now() + DETACH_TIMEOUT;
    loop {
        let mut ours = BTreeSet::new();
        for program in skip_gone(loaded_programs()) {
            let program = program.map_err(detach_error(pins))?;
            let of_a_node = is_node_program(&program).map_err(detach_error(pins))?;
            if of_a_node || is_pod_program(&program).map_err(detach_error(pins))? {
                ours.insert(program.id());
            }
        }
        let mut links = 0;
        for link in skip_gone(loaded_links()) {
            let link = link.map_err(detach_error(pins))?;
            links += usize::from(ours.contains(&link.program_id()));
        }
        if links == 0 || Instant::now() >= deadline {
            return Ok(links);
        }
        std::thread::sleep(POLL_INTERVAL);
    }
}

/// Returns the programs that are attached by links pinned here, each with the ids of its maps.
///
/// # Errors
/// The kernel does not list them.
pub fn pinned_programs(pins: &Pins) -> Result<Vec<(ProgramInfo, Vec<u32>)>, CaptureError> {
    let pinned = pins.programs();
    let not_told = || CaptureError::file(pins.folder());
    let mut all = Vec::new();
    for program in skip_gone(loaded_programs()) {
        let program = program.map_err(with_sources).map_err(not_told())?;
        if pinned.contains(&program.id()) {
            let maps = map_ids(&program).map_err(not_told())?;
            all.push((program, maps));
        }
    }
    Ok(all)
}

/// Returns the ids of the node's programs, attached or not, of this agent and its predecessors: all programs
/// that use a map pinned here.
///
/// # Errors
/// The kernel does not list them.
pub fn own_programs(pins: &Pins) -> Result<BTreeSet<u32>, CaptureError> {
    let maps = pins.map_ids();
    let mut own = BTreeSet::new();
    for program in skip_gone(loaded_programs()) {
        let program = program.map_err(detach_error(pins))?;
        let ids = map_ids(&program).map_err(detach_error(pins))?;
        if ids.iter().any(|id| maps.contains(id)) {
            own.insert(program.id());
        }
    }
    Ok(own)
}

/// Detaches programs, from what `from` says or from everything. Removing their pins would not be enough: a
/// process may have a link's descriptor, or the pin may be in a bpffs over which another one is mounted.
///
/// # Errors
/// The kernel refuses.
pub fn detach(
    programs: &BTreeSet<u32>,
    from: Option<LinkType>,
    pins: &Pins,
) -> Result<(), CaptureError> {
    for link in skip_gone(loaded_links()) {
        let link = link.map_err(detach_error(pins))?;
        let is_there = from.is_none_or(|kind| link.link_type().is_ok_and(|is| is == kind));
        if is_there && programs.contains(&link.program_id()) {
            hooks::detach(link.id()).map_err(detach_error(pins))?;
        }
    }
    Ok(())
}

/// Detaches this node's programs from a pod's network namespace.
///
/// # Errors
/// The kernel refuses.
pub fn detach_from_pod(netns: &Netns, pins: &Pins) -> Result<(), CaptureError> {
    let attached = hooks::of_netns(netns).map_err(detach_error(pins))?;
    if attached.is_empty() {
        return Ok(());
    }
    let mut of_pod = own_programs(pins)?;
    of_pod.retain(|id| attached.contains(id));
    detach(&of_pod, None, pins)?;
    let attached = hooks::of_netns(netns).map_err(detach_error(pins))?;
    still_attached(&attached, &of_pod).map_or(Ok(()), |why| Err(detach_error(pins)(why)))
}

/// Returns an error if some of these programs are still attached.
pub fn still_attached(attached: &[u32], own: &BTreeSet<u32>) -> Option<io::Error> {
    let left = attached.iter().filter(|id| own.contains(id)).count();
    (left > 0).then(|| io::Error::other(format!("{left} are still attached")))
}

/// Skips what the kernel lists and no longer has, or does not have yet.
fn skip_gone<T, E: std::error::Error + 'static>(
    all: impl Iterator<Item = Result<T, E>>,
) -> impl Iterator<Item = Result<T, E>> {
    all.filter(|one| !one.as_ref().is_err_and(|error| is_gone(error)))
}

/// Returns `true` for the error of an object that went away between two calls, or of a link that is being made.
fn is_gone(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut error = Some(error);
    while let Some(is) = error {
        if let Some(is) = is.downcast_ref::<io::Error>() {
            return [io::ErrorKind::NotFound, io::ErrorKind::WouldBlock].contains(&is.kind());
        }
        error = is.source();
    }
    false
}

/// Adds the sources to the error's text, which aya leaves out.
fn with_sources(error: impl std::error::Error) -> io::Error {
    io::Error::other(chain(&error))
}

fn detach_error<E: std::error::Error>(pins: &Pins) -> impl FnOnce(E) -> CaptureError {
    let folder = pins.folder().to_owned();
    move |error| CaptureError::Detach {
        pins: folder,
        why: chain(&error),
    }
}

/// Counts the attached programs that an agent loaded, except for those in `own`.
///
/// # Errors
/// The kernel does not list them: there may be any number.
fn count_foreign(
    attached: &[u32],
    own: &BTreeSet<u32>,
    is_ours: fn(&ProgramInfo) -> io::Result<bool>,
) -> io::Result<usize> {
    let unknown: BTreeSet<u32> = attached
        .iter()
        .copied()
        .filter(|id| !own.contains(id))
        .collect();
    if unknown.is_empty() {
        return Ok(0);
    }
    // aya has no lookup by id. A program that went away meanwhile is not attached either.
    let mut count = 0;
    for program in skip_gone(loaded_programs()) {
        let program = program.map_err(with_sources)?;
        if unknown.contains(&program.id()) && is_ours(&program)? {
            count += 1;
        }
    }
    Ok(count)
}

fn is_node_program(program: &ProgramInfo) -> io::Result<bool> {
    let named = program
        .name_as_str()
        .is_some_and(|name| programs::NODE_PROGRAMS.contains(&name));
    Ok(named && uses(program, &maps::NODE_MAPS)?)
}

fn is_pod_program(program: &ProgramInfo) -> io::Result<bool> {
    Ok(program.name_as_str() == Some(programs::POD_PROGRAM) && uses(program, &maps::POD_MAPS)?)
}

/// Anybody may use a program's name; one that also uses a map of ours is an agent's, of whichever version.
fn uses(program: &ProgramInfo, names: &[&str]) -> io::Result<bool> {
    let maps = map_ids(program)?.into_iter().map(MapInfo::from_id);
    for map in skip_gone(maps) {
        let map = map.map_err(with_sources)?;
        if map.name_as_str().is_some_and(|name| names.contains(&name)) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Returns the ids of a program's maps; none if it is gone.
fn map_ids(program: &ProgramInfo) -> io::Result<Vec<u32>> {
    match program.map_ids() {
        Err(error) if is_gone(&error) => Ok(Vec::new()),
        ids => Ok(ids.map_err(with_sources)?.unwrap_or_default()),
    }
}

#[cfg(test)]
mod tests {
    use aya::maps::MapError;
    use aya::programs::ProgramError;
    use aya::programs::links::LinkError;
    use aya::sys::SyscallError;

    use super::*;

    #[test]
    fn what_the_kernel_does_not_tell_is_not_taken_for_gone() {
        let syscall = |number| SyscallError {
            call: "bpf_something",
            io_error: io::Error::from_raw_os_error(number),
        };
        // The errors of programs, links and maps, as they are listed and looked up.
        let errors: [fn(SyscallError) -> Box<dyn std::error::Error>; 3] = [
            |error| Box::new(ProgramError::from(error)),
            |error| Box::new(LinkError::from(error)),
            |error| Box::new(MapError::from(error)),
        ];
        for of in errors {
            for (number, gone) in [
                (libc::ENOENT, true),
                (libc::EAGAIN, true),
                (libc::EPERM, false),
                (libc::EINVAL, false),
            ] {
                let error = of(syscall(number));
                assert_eq!(is_gone(&*error), gone, "{error:?}");
            }
        }
        let all = [libc::ENOENT, libc::EPERM]
            .map(|number| Err(ProgramError::from(syscall(number))))
            .into_iter()
            .chain([Ok(7)]);
        let told: Vec<Result<u32, ProgramError>> = skip_gone(all).collect();
        assert!(matches!(told[..], [Err(_), Ok(7)]), "{told:?}");
    }
}

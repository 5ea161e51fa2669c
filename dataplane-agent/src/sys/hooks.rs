//! Programs that are attached to a cgroup or a network namespace: they are queried (`BPF_PROG_QUERY`), detached
//! (`BPF_LINK_DETACH`), replaced (`BPF_LINK_UPDATE`) and pinned (`BPF_OBJ_PIN`). These are the commands of
//! bpf(2) that aya lacks, or has only for some types.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Our hooks, with the kernel's numbers of their kinds (`enum bpf_attach_type`).
const HOOKS: [(&str, u32); 4] = [
    ("connect4", 10),
    ("connect6", 11),
    ("egress", 1),
    ("sock_ops", 3),
];
/// `BPF_SK_LOOKUP` of `enum bpf_attach_type`.
const SK_LOOKUP: u32 = 36;
/// `BPF_OBJ_PIN` of `enum bpf_cmd`.
const PIN: libc::c_long = 6;
/// `BPF_PROG_QUERY` of `enum bpf_cmd`.
const QUERY: libc::c_long = 16;
/// `BPF_LINK_UPDATE` of `enum bpf_cmd`.
const LINK_UPDATE: libc::c_long = 29;
/// `BPF_LINK_GET_FD_BY_ID` of `enum bpf_cmd`.
const LINK_BY_ID: libc::c_long = 30;
/// `BPF_LINK_DETACH` of `enum bpf_cmd`.
const LINK_DETACH: libc::c_long = 34;
/// `BPF_F_QUERY_EFFECTIVE`: includes the programs of the cgroups above.
const EFFECTIVE: u32 = 1;

/// The part of `union bpf_attr` for a query.
#[repr(C)]
#[derive(Default)]
struct Query {
    target: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    program_ids: u64,
    program_count: u32,
    reserved: u32,
    rest: [u64; 4],
}

/// Returns the number of programs in effect on each of our hooks of a cgroup.
pub fn attached(cgroup: &Path) -> Vec<(&'static str, io::Result<u32>)> {
    let folder = File::open(cgroup);
    HOOKS
        .into_iter()
        .map(|(name, kind)| match &folder {
            Ok(folder) => (name, count(folder, kind)),
            Err(error) => (name, Err(io::Error::new(error.kind(), error.to_string()))),
        })
        .collect()
}

fn count(folder: &File, kind: u32) -> io::Result<u32> {
    query(folder, kind, EFFECTIVE, &mut [])
}

/// Returns the ids of the programs that are attached to this very cgroup, on all of our hooks.
///
/// # Errors
/// The kernel refuses.
pub fn of_cgroup(cgroup: &File) -> io::Result<Vec<u32>> {
    let mut all = Vec::new();
    for (_, kind) in HOOKS {
        all.extend(programs(cgroup, kind)?);
    }
    Ok(all)
}

/// Returns the ids of the `sk_lookup` programs of a network namespace.
///
/// # Errors
/// The kernel refuses.
pub fn of_netns(netns: impl AsFd) -> io::Result<Vec<u32>> {
    programs(netns, SK_LOOKUP)
}

fn programs(target: impl AsFd, kind: u32) -> io::Result<Vec<u32>> {
    // The kernel's limit of programs on one hook.
    let mut ids = vec![0; 64];
    let count = query(&target, kind, 0, &mut ids)?;
    ids.truncate(count as usize);
    Ok(ids)
}

/// Returns the number of programs, and writes their ids to `ids` as far as there is room.
fn query(target: impl AsFd, kind: u32, flags: u32, ids: &mut [u32]) -> io::Result<u32> {
    let mut query = Query {
        target: target.as_fd().as_raw_fd().cast_unsigned(),
        attach_type: kind,
        query_flags: flags,
        program_ids: if ids.is_empty() {
            0
        } else {
            ids.as_mut_ptr().expose_provenance() as u64
        },
        program_count: u32::try_from(ids.len()).unwrap_or(u32::MAX),
        ..Query::default()
    };
    // SAFETY: the kernel reads and writes within the structure, whose size is given, and writes at most
    // `program_count` numbers to `program_ids`: that is a slice of as many, borrowed for the call. None
    // are written where the count is 0.
    let done = unsafe { libc::syscall(libc::SYS_bpf, QUERY, &raw mut query, size_of::<Query>()) };
    match done {
        0 => Ok(query.program_count),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Detaches the program of a link at once, even if others hold the link. A link that is gone counts as
/// detached.
///
/// # Errors
/// The kernel refuses: CAP_SYS_ADMIN is missing.
pub fn detach(id: u32) -> io::Result<()> {
    match link(id) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        link => by_numbers(LINK_DETACH, [number(&link?), 0, 0, 0]).map(|_| ()),
    }
}

/// Opens a link by its id. Its program stays attached as long as the descriptor is open.
///
/// # Errors
/// It is gone; CAP_SYS_ADMIN is missing.
pub fn link(id: u32) -> io::Result<OwnedFd> {
    let opened = i32::try_from(by_numbers(LINK_BY_ID, [id, 0, 0, 0])?).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(opened) })
}

/// Replaces the program of a link atomically: there is no moment with neither or both. It succeeds if the
/// target of the link is gone.
///
/// # Errors
/// The kernel refuses: the program is of another type.
pub fn replace(link: &OwnedFd, program: impl AsFd) -> io::Result<()> {
    match by_numbers(LINK_UPDATE, [number(link), number(&program), 0, 0]) {
        Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => Ok(()),
        done => done.map(|_| ()),
    }
}

/// Pins a link at a path.
///
/// # Errors
/// The path is not on a BPF file system, or exists.
pub fn pin(link: &OwnedFd, path: &Path) -> io::Result<()> {
    /// The part of `union bpf_attr` for pins.
    #[repr(C)]
    struct Pin {
        path: u64,
        descriptor: u32,
        flags: u32,
    }
    let path = CString::new(path.as_os_str().as_bytes())?;
    let attributes = Pin {
        path: path.as_ptr().expose_provenance() as u64,
        descriptor: link.as_raw_fd().cast_unsigned(),
        flags: 0,
    };
    // SAFETY: the kernel reads within the structure, whose size is given, and a path that ends in a zero
    // and outlives the call; it writes nothing.
    let done =
        unsafe { libc::syscall(libc::SYS_bpf, PIN, &raw const attributes, size_of::<Pin>()) };
    match done {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn number(of: &impl AsFd) -> u32 {
    of.as_fd().as_raw_fd().cast_unsigned()
}

/// Runs a command that takes only numbers, the first ones of `union bpf_attr`.
fn by_numbers(command: libc::c_long, attributes: [u32; 4]) -> io::Result<libc::c_long> {
    // SAFETY: the kernel reads within the array, whose size is given, and writes nothing to it.
    let done = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            attributes.as_ptr(),
            size_of_val(&attributes),
        )
    };
    match done {
        0.. => Ok(done),
        _ => Err(io::Error::last_os_error()),
    }
}

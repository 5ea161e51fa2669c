//! Which programs are attached to a cgroup: `BPF_PROG_QUERY`, which aya does not have for all kinds.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

/// Our hooks, with the kernel's numbers of their kinds (`enum bpf_attach_type`).
const HOOKS: [(&str, u32); 4] = [
    ("connect4", 10),
    ("connect6", 11),
    ("egress", 1),
    ("sock_ops", 3),
];
/// `BPF_PROG_QUERY` of `enum bpf_cmd`.
const QUERY: libc::c_long = 16;
/// `BPF_F_QUERY_EFFECTIVE`: those of the cgroups above too.
const EFFECTIVE: u32 = 1;

/// The part of `union bpf_attr` that a query has.
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

/// How many programs are in effect on each of our hooks of a cgroup.
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
    let mut query = Query {
        target: folder.as_raw_fd().cast_unsigned(),
        attach_type: kind,
        query_flags: EFFECTIVE,
        ..Query::default()
    };
    // SAFETY: the kernel reads and writes within the structure, whose size is given; no list of
    // programs is asked for, only their number.
    let done = unsafe { libc::syscall(libc::SYS_bpf, QUERY, &raw mut query, size_of::<Query>()) };
    match done {
        0 => Ok(query.program_count),
        _ => Err(io::Error::last_os_error()),
    }
}

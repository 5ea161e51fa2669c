//! The kernel's verifier log: its verdict, and the statistics of accepted programs, for which aya does not ask.

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result, bail};
use aya_obj::generated::bpf_func_id::{self, *};
use aya_obj::generated::{bpf_attach_type, bpf_attr, bpf_cmd, bpf_prog_type};
use aya_obj::programs::{CgroupSkbAttachType, CgroupSockAddrAttachType};
use aya_obj::{Object, ProgramSection};

/// `BPF_LOG_STATS` of the kernel: only the totals.
const STATISTICS: u32 = 4;

/// All helpers that came after Linux 5.17. A kernel that is older than a helper knows only its number.
const NEWER_HELPERS: [bpf_func_id; 26] = [
    BPF_FUNC_get_retval,
    BPF_FUNC_set_retval,
    BPF_FUNC_xdp_get_buff_len,
    BPF_FUNC_xdp_load_bytes,
    BPF_FUNC_xdp_store_bytes,
    BPF_FUNC_copy_from_user_task,
    BPF_FUNC_skb_set_tstamp,
    BPF_FUNC_ima_file_hash,
    BPF_FUNC_kptr_xchg,
    BPF_FUNC_map_lookup_percpu_elem,
    BPF_FUNC_skc_to_mptcp_sock,
    BPF_FUNC_dynptr_from_mem,
    BPF_FUNC_ringbuf_reserve_dynptr,
    BPF_FUNC_ringbuf_submit_dynptr,
    BPF_FUNC_ringbuf_discard_dynptr,
    BPF_FUNC_dynptr_read,
    BPF_FUNC_dynptr_write,
    BPF_FUNC_dynptr_data,
    BPF_FUNC_tcp_raw_gen_syncookie_ipv4,
    BPF_FUNC_tcp_raw_gen_syncookie_ipv6,
    BPF_FUNC_tcp_raw_check_syncookie_ipv4,
    BPF_FUNC_tcp_raw_check_syncookie_ipv6,
    BPF_FUNC_ktime_get_tai_ns,
    BPF_FUNC_user_ringbuf_drain,
    BPF_FUNC_cgrp_storage_get,
    BPF_FUNC_cgrp_storage_delete,
];

/// Returns the verdict in a verifier's log: the last line before the totals. A helper that this kernel knows
/// only by number is named.
pub fn verdict(log: &str) -> Option<String> {
    let totals = ["processed ", "verification time ", "stack depth "];
    let last = log
        .lines()
        .rev()
        .map(str::trim)
        .find(|line| !line.is_empty() && !totals.iter().any(|total| line.starts_with(total)))?;
    let number = last.strip_prefix("invalid func unknown#");
    let helper = number.and_then(|number| {
        let number: u32 = number.parse().ok()?;
        let found = NEWER_HELPERS
            .iter()
            .find(|helper| **helper as u32 == number)?;
        Some(format!("{found:?}").replace("BPF_FUNC_", "bpf_"))
    });
    Some(match helper {
        Some(helper) => format!("{last}: this kernel is older than the helper {helper}"),
        None => last.to_owned(),
    })
}

/// Returns the bytes of stack that a program of an object uses, with the functions that it calls. The kernel
/// reports this only in the verifier's log, so the program is verified once more, with `maps` by their names.
///
/// # Errors
/// The object has no such program, or the kernel refuses it, with the reason.
pub fn stack(object: &[u8], name: &str, maps: &HashMap<String, OwnedFd>) -> Result<u32> {
    let mut object = Object::parse(object)?;
    let sections: HashSet<usize> = object
        .functions
        .keys()
        .map(|(section, _)| *section)
        .collect();
    let defined = std::mem::take(&mut object.maps);
    let known = defined.iter().filter_map(|(name, map)| {
        let descriptor = maps.get(name)?.as_raw_fd();
        Some((name.as_str(), descriptor, map))
    });
    object.relocate_maps(known, &sections)?;
    object.relocate_calls(&sections)?;
    let program = object.programs.get(name).context("is not in the object")?;
    let function = object
        .functions
        .get(&program.function_key())
        .context("has no code")?;
    let (kind, attach) = kind(&program.section).context("is of a kind that is not ours")?;

    let mut log = vec![0_u8; 64 * 1024];
    // SAFETY: a union of plain numbers, for which zero means "not set".
    let mut attr: bpf_attr = unsafe { std::mem::zeroed() };
    attr.__bindgen_anon_3.prog_type = kind as u32;
    attr.__bindgen_anon_3.expected_attach_type = attach as u32;
    attr.__bindgen_anon_3.insns = function.instructions.as_ptr() as u64;
    attr.__bindgen_anon_3.insn_cnt = u32::try_from(function.instructions.len())?;
    attr.__bindgen_anon_3.license = program.license.as_ptr() as u64;
    attr.__bindgen_anon_3.log_level = STATISTICS;
    attr.__bindgen_anon_3.log_buf = log.as_mut_ptr() as u64;
    attr.__bindgen_anon_3.log_size = 64 * 1024;
    let command = bpf_cmd::BPF_PROG_LOAD as libc::c_long;
    // SAFETY: the instructions, licence and log that the structure points to outlive the call, and
    // the lengths beside the pointers are theirs.
    let loaded =
        unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut attr, size_of::<bpf_attr>()) };
    let error = io::Error::last_os_error();
    let end = log.iter().position(|byte| *byte == 0).unwrap_or(log.len());
    let log = String::from_utf8_lossy(&log[..end]);
    if loaded < 0 {
        bail!("{error}: {log}");
    }
    let descriptor = i32::try_from(loaded)?;
    // SAFETY: the kernel has just made it for this caller alone.
    drop(unsafe { OwnedFd::from_raw_fd(descriptor) });
    read(&log).with_context(|| format!("the verifier's log is not as expected: {log}"))
}

/// Returns the sum of the numbers in a line like `stack depth 120+8`.
fn read(log: &str) -> Option<u32> {
    let mut lines = log.lines();
    let depth = lines.find_map(|line| line.strip_prefix("stack depth "))?;
    let each = depth.trim().split('+');
    each.map(|bytes| bytes.parse::<u32>().ok()).sum()
}

fn kind(section: &ProgramSection) -> Option<(bpf_prog_type, bpf_attach_type)> {
    use bpf_attach_type as attach;
    use bpf_prog_type as kind;
    Some(match section {
        ProgramSection::CgroupSockAddr { attach_type } => (
            kind::BPF_PROG_TYPE_CGROUP_SOCK_ADDR,
            match attach_type {
                CgroupSockAddrAttachType::Connect4 => attach::BPF_CGROUP_INET4_CONNECT,
                CgroupSockAddrAttachType::Connect6 => attach::BPF_CGROUP_INET6_CONNECT,
                _ => return None,
            },
        ),
        ProgramSection::CgroupSkb {
            attach_type: Some(CgroupSkbAttachType::Egress),
        } => (
            kind::BPF_PROG_TYPE_CGROUP_SKB,
            attach::BPF_CGROUP_INET_EGRESS,
        ),
        ProgramSection::SockOps => (kind::BPF_PROG_TYPE_SOCK_OPS, attach::BPF_CGROUP_SOCK_OPS),
        ProgramSection::SkLookup => (kind::BPF_PROG_TYPE_SK_LOOKUP, attach::BPF_SK_LOOKUP),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::{read, verdict};

    #[test]
    fn the_verdict_is_the_last_line_and_names_a_helper_that_is_too_new() {
        let log = "0: (85) call bpf_cgrp_storage_get#210\ninvalid func unknown#210\nprocessed 5 \
                   insns (limit 1000000)\nverification time 3 usec\n";
        let expected = "invalid func unknown#210: this kernel is older than the helper \
                        bpf_cgrp_storage_get";
        assert_eq!(verdict(log).as_deref(), Some(expected));
        assert_eq!(verdict("R1 is bad\n\n").as_deref(), Some("R1 is bad"));
        assert_eq!(verdict("processed 0 insns\n"), None);
    }

    #[test]
    fn the_stack_is_read_from_the_log() {
        let log = "verification time 93 usec\nstack depth 120+8\nprocessed 1024 insns (limit \
                   1000000) max_states_per_insn 4 total_states 71 peak_states 71 mark_read 12\n";
        assert_eq!(read(log), Some(128));
        assert_eq!(read("processed 1024 insns"), None);
    }
}

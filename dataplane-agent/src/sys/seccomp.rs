//! The system calls that the proxy half gives up, by a seccomp filter. It needs `CAP_SYS_ADMIN` to enter the
//! namespaces of pods, and that capability would let it do what only the node half does.

use seccompiler::{
    BpfProgram, Error, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule,
};

/// The calls of which all are refused.
const REFUSED: [libc::c_long; 25] = [
    // Mounts, and namespaces of its own.
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_open_tree,
    libc::SYS_move_mount,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_unshare,
    // Other processes, and files by handles.
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_kcmp,
    libc::SYS_perf_event_open,
    libc::SYS_open_by_handle_at,
    // The kernel and the machine.
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
];

/// The commands of `bpf(2)` that are left: to write to a map that is lent, and to ask what map it is.
/// `BPF_MAP_UPDATE_ELEM` and `BPF_OBJ_GET_INFO_BY_FD` of `enum bpf_cmd`.
const MAP_COMMANDS: [u64; 2] = [2, 15];

/// Gives these calls up for this thread, and for those that it makes: each ends with `EPERM`. It cannot be
/// taken back.
///
/// # Errors
/// The kernel has no seccomp filters.
pub fn give_up() -> Result<(), Error> {
    seccompiler::apply_filter(&filter()?)
}

fn filter() -> Result<BpfProgram, Error> {
    let other = |command: &u64| {
        SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Ne, *command)
    };
    let other_command = MAP_COMMANDS.iter().map(other).collect::<Result<_, _>>()?;
    let mut rules: std::collections::BTreeMap<_, _> =
        REFUSED.iter().map(|call| (*call, Vec::new())).collect();
    rules.insert(libc::SYS_bpf, vec![SeccompRule::new(other_command)?]);
    let refuse = SeccompAction::Errno(libc::EPERM.cast_unsigned());
    let machine = std::env::consts::ARCH.try_into()?;
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, refuse, machine)?;
    Ok(filter.try_into()?)
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    /// What `bpf(2)` says to a command of which all else is wrong.
    fn bpf(command: u64) -> Option<i32> {
        let attributes = [u64::MAX; 16];
        // SAFETY: the attributes live for the length of the call, which writes to none of them: no map or
        // object has this descriptor.
        let made = unsafe {
            libc::syscall(
                libc::SYS_bpf,
                command,
                attributes.as_ptr(),
                size_of_val(&attributes),
            )
        };
        assert_eq!(made, -1);
        io::Error::last_os_error().raw_os_error()
    }

    #[test]
    fn what_is_given_up_is_refused_and_lent_maps_are_not() {
        let thread = std::thread::spawn(|| {
            let before = MAP_COMMANDS.map(bpf);
            // SAFETY: without a flag it does nothing.
            assert_eq!(unsafe { libc::syscall(libc::SYS_unshare, 0) }, 0);
            give_up().expect("a kernel with seccomp filters");
            // SAFETY: as above.
            assert_eq!(unsafe { libc::syscall(libc::SYS_unshare, 0) }, -1);
            assert_eq!(io::Error::last_os_error().raw_os_error(), Some(libc::EPERM));
            assert_eq!(MAP_COMMANDS.map(bpf), before);
            // BPF_MAP_CREATE, BPF_PROG_LOAD, BPF_OBJ_GET, BPF_PROG_GET_FD_BY_ID, BPF_LINK_CREATE.
            assert_eq!([0, 5, 7, 13, 28].map(bpf), [Some(libc::EPERM); 5]);
        });
        thread.join().expect("it holds");
    }
}

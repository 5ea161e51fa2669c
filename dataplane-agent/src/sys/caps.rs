//! The capabilities that the daemon needs, each with its reason. What is not listed here it neither
//! asks for nor keeps.

use caps::{CapSet, Capability, CapsHashSet};

/// A capability, and what the daemon cannot do without it.
pub const NEEDED: &[(Capability, &str)] = &[
    (
        Capability::CAP_SYS_ADMIN,
        "enter pods' network namespaces, load kernel programs, mount a BPF file system",
    ),
    (
        Capability::CAP_NET_ADMIN,
        "attach programs to cgroups and namespaces, set marks, routes and rules in pods",
    ),
    (
        Capability::CAP_SYS_PTRACE,
        "see in which network namespace each process is",
    ),
];

/// Those that the process lacks.
pub fn missing() -> Vec<(Capability, &'static str)> {
    let have = caps::read(None, CapSet::Effective).unwrap_or_default();
    NEEDED
        .iter()
        .copied()
        .filter(|(capability, _)| !have.contains(capability))
        .collect()
}

/// Whether it may see which network namespace other processes are in.
pub fn may_see_processes() -> bool {
    caps::has_cap(None, CapSet::Effective, Capability::CAP_SYS_PTRACE).unwrap_or(false)
}

/// Gives up all that is not needed, for good.
///
/// # Errors
/// The kernel refuses.
pub fn drop_others() -> Result<(), caps::errors::CapsError> {
    let needed: CapsHashSet = NEEDED.iter().map(|&(capability, _)| capability).collect();
    let have = caps::read(None, CapSet::Permitted)?;
    let keep: CapsHashSet = have.intersection(&needed).copied().collect();
    caps::clear(None, CapSet::Ambient)?;
    caps::set(None, CapSet::Inheritable, &CapsHashSet::new())?;
    caps::set(None, CapSet::Effective, &keep)?;
    caps::set(None, CapSet::Permitted, &keep)
}

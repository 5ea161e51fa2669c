//! The capabilities that the daemon, or one half of it, needs, each with its reason. It keeps no others.

use caps::{CapSet, Capability, CapsHashSet};

/// The capabilities that the daemon needs, each with what it cannot do without it.
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

/// The capabilities that the proxy half needs in a process of its own.
pub const NEEDED_BY_PROXY: &[(Capability, &str)] = &[
    (
        Capability::CAP_SYS_ADMIN,
        "enter the network namespaces of pods that the node lends",
    ),
    (
        Capability::CAP_NET_ADMIN,
        "connect to pods in their clients' names, and mark what it connects",
    ),
];

/// Returns those of `needed` that the process lacks.
pub fn missing(needed: &[(Capability, &'static str)]) -> Vec<(Capability, &'static str)> {
    let have = caps::read(None, CapSet::Effective).unwrap_or_default();
    needed
        .iter()
        .copied()
        .filter(|(capability, _)| !have.contains(capability))
        .collect()
}

/// Returns `true` if the process may see which network namespaces other processes are in.
pub fn may_see_processes() -> bool {
    caps::has_cap(None, CapSet::Effective, Capability::CAP_SYS_PTRACE).unwrap_or(false)
}

/// Drops all capabilities but `needed`, irrevocably.
///
/// # Errors
/// The kernel refuses.
pub fn drop_others(needed: &[(Capability, &str)]) -> Result<(), caps::errors::CapsError> {
    let needed: CapsHashSet = needed.iter().map(|&(capability, _)| capability).collect();
    let have = caps::read(None, CapSet::Permitted)?;
    let keep: CapsHashSet = have.intersection(&needed).copied().collect();
    caps::clear(None, CapSet::Ambient)?;
    caps::set(None, CapSet::Inheritable, &CapsHashSet::new())?;
    caps::set(None, CapSet::Effective, &keep)?;
    caps::set(None, CapSet::Permitted, &keep)
}

//! The capabilities that the daemon needs, each with its reason. What is not listed here it neither
//! asks for nor keeps.

use caps::{CapSet, Capability, CapsHashSet};

/// A capability, and what the daemon cannot do without it.
pub const NEEDED: &[(Capability, &str)] = &[
    (
        Capability::CAP_BPF,
        "load the kernel programs and make their maps",
    ),
    (
        Capability::CAP_NET_ADMIN,
        "attach programs to cgroups and namespaces, set marks, routes and rules in pods",
    ),
    (
        Capability::CAP_PERFMON,
        "read a socket's fields in programs, and loop over addresses",
    ),
    (Capability::CAP_SYS_ADMIN, "enter a pod's network namespace"),
    (
        Capability::CAP_SYS_PTRACE,
        "see the network namespaces of other users' processes",
    ),
    (
        Capability::CAP_DAC_OVERRIDE,
        "read pods' processes, and write state that another user owns",
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

//! Whose a part of the state is, and what others may do with it.

/// What is wrong with a part that has this owner and mode, and how to mend it: it has to be root's or `own`,
/// and others may have no bit of `taboo`, which `mend` takes away.
pub(super) fn fault(
    (owner, mode): (u32, u32),
    own: u32,
    (taboo, mend): (u32, &str),
) -> Option<String> {
    if owner != 0 && owner != own {
        Some(format!("belongs to user {owner} (chown root)"))
    } else if mode & taboo != 0 {
        Some(format!("mode {mode:o} ({mend})"))
    } else {
        None
    }
}

//! Checks the owner and the mode of files.

/// Returns what is wrong with a file of this owner and mode, and how to mend it. The owner must be root or
/// `own`; the mode must have no bit of `taboo`, which the command `mend` clears.
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

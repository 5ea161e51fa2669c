//! Subcommands other than the daemon, a file each.
pub mod load;

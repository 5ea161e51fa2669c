//! The priority of threads.

/// How much nicer a thread gets. Where it competes for a processor with one that is not, it gets a third of what that
/// one gets: so it does not delay others for long, and on a machine where much else runs it is not starved.
const NICER: libc::c_int = 5;

/// Lowers the priority of this thread, and of those that it makes. Whoever it is, it may.
pub fn lower() {
    // SAFETY: takes no pointers. On Linux it is about the calling thread alone, and to be nicer cannot fail.
    unsafe { libc::nice(NICER) };
}

#[cfg(test)]
pub(crate) mod tests {
    use std::{fs, thread};

    use super::*;

    /// Returns the niceness of this thread.
    pub(crate) fn niceness() -> i32 {
        let stat = fs::read_to_string("/proc/thread-self/stat").expect("a thread");
        let after = stat.rsplit_once(')').expect("a name").1;
        let of = after.split_whitespace().nth(16).expect("a field");
        of.parse().expect("a number")
    }

    #[test]
    fn a_lower_priority_is_of_one_thread() {
        let before = niceness();
        let lowered = thread::spawn(|| {
            lower();
            niceness()
        });
        assert_eq!(lowered.join().expect("it ends"), (before + NICER).min(19));
        assert_eq!(niceness(), before);
    }
}

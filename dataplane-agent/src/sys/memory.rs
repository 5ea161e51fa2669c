//! Memory of the process.

/// Gives the kernel what the allocator keeps free.
///
/// glibc gives back by itself only what is free at the very end of a heap, and each thread has heaps of
/// its own: after a burst of connections one that lives on keeps all that was below it.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes no pointers; glibc locks its own heaps.
    unsafe {
        libc::malloc_trim(0);
    }
}

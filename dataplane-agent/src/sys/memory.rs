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

/// What unit tests count of the memory that they take.
#[cfg(test)]
pub(crate) mod counted {
    use std::alloc::{GlobalAlloc, Layout, System};
    use std::cell::Cell;

    struct Counted;

    #[global_allocator]
    static COUNTED: Counted = Counted;

    thread_local! {
        static TAKEN: Cell<(usize, usize)> = const { Cell::new((0, 0)) };
        static MOST: Cell<usize> = const { Cell::new(0) };
    }

    /// The bytes that this thread has taken and not given back, and how often it has taken some. What it
    /// gives back for another thread counts as its own.
    pub(crate) fn taken() -> (usize, usize) {
        TAKEN.get()
    }

    /// The most bytes that something takes at one time.
    pub(crate) fn most<T>(of: impl FnOnce() -> T) -> (usize, T) {
        let (before, _) = taken();
        MOST.set(before);
        let made = of();
        (MOST.get() - before, made)
    }

    fn count(more: usize, less: usize, times: usize) {
        let (bytes, often) = TAKEN.get();
        let bytes = bytes.wrapping_add(more).wrapping_sub(less);
        TAKEN.set((bytes, often + times));
        if more > less {
            MOST.set(MOST.get().max(bytes));
        }
    }

    // SAFETY: the system's allocator does it all; what is counted is not allocated.
    unsafe impl GlobalAlloc for Counted {
        unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
            count(layout.size(), 0, 1);
            // SAFETY: as the caller promises.
            unsafe { System.alloc(layout) }
        }

        unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
            count(0, layout.size(), 0);
            // SAFETY: as the caller promises.
            unsafe { System.dealloc(at, layout) }
        }

        unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
            count(size, layout.size(), 1);
            // SAFETY: as the caller promises.
            unsafe { System.realloc(at, layout, size) }
        }
    }
}

//! The memory allocator.

/// Returns the allocator's free memory to the kernel.
///
/// By itself glibc returns only free memory at the very end of a heap, and each thread has heaps of its own:
/// after a burst of connections, one that lives on would keep all memory below it.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes no pointers; glibc locks its own heaps.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Counts the memory that unit tests allocate.
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

    /// Returns the bytes that this thread has allocated and not freed, and the number of its allocations.
    /// Memory of another thread that it frees counts as its own.
    pub(crate) fn taken() -> (usize, usize) {
        TAKEN.get()
    }

    /// Returns the peak of the bytes that `of` has allocated, and its result.
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

    // SAFETY: the system's allocator does all the work; counting does not allocate.
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

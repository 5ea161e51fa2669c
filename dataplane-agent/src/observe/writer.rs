//! Standard error for the log, without ever waiting for who reads it.
//!
//! Lines wait in a buffer of bounded size for a thread that writes them. A line that does not fit is
//! lost and counted, and the log says how many were lost as soon as there is room again. So a reader
//! that has stopped cannot stop a worker. A library's queue would be bounded by lines, of any length;
//! this one is bounded by bytes, and writes what has gathered at once.

use std::fs::File;
use std::io::{self, Write};
use std::mem;
use std::os::fd::AsFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How many bytes of a daemon's log may wait to be written.
pub const BUFFER_LIMIT: usize = 1 << 20;
/// A buffer that has grown beyond this in a burst is given back.
const KEPT_CAPACITY: usize = 64 << 10;
/// Between two tries to write to what takes nothing now and does not block, as somebody else has set it.
const RETRY_PAUSE: Duration = Duration::from_millis(10);
/// How long whoever ends waits for what is still to be written.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

/// Takes lines. Clones write to the same place.
#[derive(Clone, Debug)]
pub struct Writer(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    /// How many bytes may wait.
    most: usize,
    queue: Mutex<Queue>,
    more: Condvar,
    written: Condvar,
}

#[derive(Debug, Default)]
struct Queue {
    bytes: Vec<u8>,
    /// The thread has taken what waited, and has not written all of it yet.
    writing: bool,
    /// Lines that did not fit, in all.
    lost: u64,
    /// Of these, those that the log has not told of yet.
    unreported: u64,
}

impl Writer {
    /// Writes to standard error, from a thread of its own; at most so many bytes wait for it.
    ///
    /// # Errors
    /// There are no descriptors left, or no threads.
    pub fn to_stderr(most: usize) -> io::Result<Self> {
        // A descriptor of its own: who waits for the reader must not hold the lock of `io::stderr`.
        let out = File::from(io::stderr().as_fd().try_clone_to_owned()?);
        Self::to(out, most)
    }

    fn to(out: impl Write + Send + 'static, most: usize) -> io::Result<Self> {
        let writer = Self(Arc::new(Shared {
            most,
            ..Shared::default()
        }));
        let shared = Arc::clone(&writer.0);
        let thread = std::thread::Builder::new().name("log".into());
        thread.spawn(move || shared.write_to(out))?;
        Ok(writer)
    }

    /// Leaves a line, or several, to be written.
    pub fn push(&self, line: &[u8]) {
        let mut queue = self.0.lock();
        if queue.bytes.len() + line.len() > self.0.most {
            queue.lost += 1;
            queue.unreported += 1;
            return;
        }
        queue.bytes.extend_from_slice(line);
        self.0.more.notify_one();
    }

    /// How many lines were lost.
    pub fn lost(&self) -> u64 {
        self.0.lock().lost
    }

    /// Waits until all is written, but not long for a reader that has stopped.
    pub fn flush(&self) {
        let pending = |queue: &mut Queue| queue.writing || !queue.bytes.is_empty();
        let queue = self.0.lock();
        // Whether it was in time makes no difference to who ends.
        let _ = self
            .0
            .written
            .wait_timeout_while(queue, FLUSH_TIMEOUT, pending);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_to(&self, mut out: impl Write) {
        let mut batch = Vec::new();
        loop {
            let unreported = {
                let mut queue = self.lock();
                queue.writing = false;
                self.written.notify_all();
                while queue.bytes.is_empty() {
                    queue = self
                        .more
                        .wait(queue)
                        .unwrap_or_else(PoisonError::into_inner);
                }
                mem::swap(&mut batch, &mut queue.bytes);
                queue.writing = true;
                mem::take(&mut queue.unreported)
            };
            let lost = write_all(&mut out, &batch);
            batch.clear();
            if batch.capacity() > KEPT_CAPACITY {
                batch = Vec::new();
            }
            if lost > 0 {
                // Told as soon as something can be written: a line about it now would be the next one.
                let mut queue = self.lock();
                queue.lost += lost;
                queue.unreported += lost + unreported;
            } else if unreported > 0 {
                tracing::warn!(
                    lines = unreported,
                    "log lines were lost: they came faster than they were read, or could not be written"
                );
            }
        }
    }
}

/// Writes it, whether or not `out` blocks. How many lines were not written in whole: none, unless the reader
/// is gone or the disk full.
fn write_all(out: &mut impl Write, batch: &[u8]) -> u64 {
    let mut left = batch;
    while !left.is_empty() {
        match out.write(left) {
            Ok(written) if written > 0 => left = &left[written..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // It is the description that does not block, which others share: it must stay as they want it.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                std::thread::sleep(RETRY_PAUSE)
            }
            Ok(_) | Err(_) => break,
        }
    }
    left.iter().filter(|byte| **byte == b'\n').count() as u64
}

impl Write for &Writer {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.push(line);
        Ok(line.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, channel};

    use super::*;

    /// A reader that takes what is written only when it is told to.
    struct Slow(Receiver<()>, Arc<Mutex<Vec<u8>>>);

    impl Write for Slow {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _ = self.0.recv();
            self.1
                .lock()
                .expect("not poisoned")
                .extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn who_writes_never_waits_for_the_reader_and_each_line_is_written_or_counted() {
        let (go, wait) = channel();
        let read = Arc::default();
        let writer = Writer::to(Slow(wait, Arc::clone(&read)), BUFFER_LIMIT).expect("a thread");
        let line = [b'x'; 1023]
            .iter()
            .chain(b"\n")
            .copied()
            .collect::<Vec<u8>>();
        let many = 3 * BUFFER_LIMIT / line.len();
        for _ in 0..many {
            writer.push(&line);
        }
        assert!(writer.lost() > 0 && writer.lost() < many as u64);
        writer.flush();
        drop(go);
        let all = || read.lock().expect("not poisoned").len() / line.len() + writer.lost() as usize;
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        while all() < many && std::time::Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(all(), many);
    }

    /// Takes seven bytes at a time, and each time but the first says first that it would block.
    struct Halting {
        read: Arc<Mutex<Vec<u8>>>,
        would_block: bool,
        left: usize,
    }

    impl Write for Halting {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.would_block = !self.would_block;
            if self.left == 0 {
                return Err(io::ErrorKind::StorageFull.into());
            }
            if !self.would_block {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            let some = bytes.len().min(7).min(self.left);
            self.left -= some;
            let mut read = self.read.lock().expect("not poisoned");
            read.extend_from_slice(&bytes[..some]);
            Ok(some)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_reader_that_does_not_block_gets_each_line() {
        let read = Arc::default();
        let halting = Halting {
            read: Arc::clone(&read),
            would_block: false,
            left: usize::MAX,
        };
        let writer = Writer::to(halting, BUFFER_LIMIT).expect("a thread");
        writer.push(b"one line\nanother one\n");
        writer.flush();
        assert_eq!(
            *read.lock().expect("not poisoned"),
            b"one line\nanother one\n"
        );
        assert_eq!(writer.lost(), 0);
    }

    #[test]
    fn lines_that_a_full_disk_does_not_take_are_counted() {
        let halting = Halting {
            read: Arc::default(),
            would_block: false,
            left: 10,
        };
        let writer = Writer::to(halting, BUFFER_LIMIT).expect("a thread");
        writer.push(b"one line\nanother one\nand one more\n");
        writer.flush();
        assert_eq!(writer.lost(), 2);
    }

    #[test]
    fn a_flush_returns_when_all_is_written() {
        let (go, wait) = channel::<()>();
        drop(go);
        let read = Arc::default();
        let writer = Writer::to(Slow(wait, Arc::clone(&read)), BUFFER_LIMIT).expect("a thread");
        writer.push(b"the last words\n");
        writer.flush();
        assert_eq!(*read.lock().expect("not poisoned"), b"the last words\n");
    }
}

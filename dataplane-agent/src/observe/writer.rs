//! A non-blocking writer of the log to standard error.
//!
//! Lines wait in a buffer of bounded size for a thread that writes them. A line that does not fit is
//! lost and counted, and the log says how many were lost as soon as there is room again. So a reader
//! that has stopped cannot stop a worker. The queues of libraries are bounded by the number of lines, which
//! may have any length; this one is bounded by bytes, and all that has gathered is written at once.

use std::fs::File;
use std::io::{self, Write};
use std::mem;
use std::os::fd::AsFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Most bytes of a daemon's log that wait to be written.
pub const BUFFER_LIMIT: usize = 1 << 20;
/// A buffer whose capacity has grown beyond this in a burst is freed.
const KEPT_CAPACITY: usize = 64 << 10;
/// The pause between two attempts to write if another process has made standard error non-blocking and it
/// takes nothing now.
const RETRY_PAUSE: Duration = Duration::from_millis(10);
/// How long [`Writer::flush`] waits.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

/// Queues lines to be written. Clones share the queue.
#[derive(Clone, Debug)]
pub struct Writer(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    /// Most bytes that wait.
    most: usize,
    queue: Mutex<Queue>,
    more: Condvar,
    written: Condvar,
}

#[derive(Debug, Default)]
struct Queue {
    bytes: Vec<u8>,
    /// `true` while the thread writes bytes that it has taken.
    writing: bool,
    /// Number of lines that were lost: they did not fit, or could not be written.
    lost: u64,
    /// Number of lost lines that the log has not reported yet.
    unreported: u64,
}

impl Writer {
    /// Starts a thread that writes to standard error; at most `most` bytes wait for it.
    ///
    /// # Errors
    /// The descriptor cannot be duplicated, or the thread not be started.
    pub fn to_stderr(most: usize) -> io::Result<Self> {
        // A descriptor of its own, so that the thread does not hold the lock of `io::stderr` as it waits.
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

    /// Queues a line, or several.
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

    /// Returns the number of lines that were lost.
    pub fn lost(&self) -> u64 {
        self.0.lock().lost
    }

    /// Waits until all is written, at most a second, as the reader may have stopped.
    pub fn flush(&self) {
        let pending = |queue: &mut Queue| queue.writing || !queue.bytes.is_empty();
        let queue = self.0.lock();
        // The caller goes on in either case.
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
                // They are reported once something can be written: a line about it now would be lost too.
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

/// Writes a batch, whether or not `out` blocks. Returns the number of lines that were not written in whole:
/// none, unless the reader is gone or the disk is full.
fn write_all(out: &mut impl Write, batch: &[u8]) -> u64 {
    let mut left = batch;
    while !left.is_empty() {
        match out.write(left) {
            Ok(written) if written > 0 => left = &left[written..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // The flag belongs to the open file description, which other processes share: it must stay set.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                std::thread::sleep(RETRY_PAUSE);
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

    /// A writer that waits for a signal at each write.
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

    /// Flushes until all is written. One flush waits for a second alone, for which the thread may stand still.
    fn flush(writer: &Writer) {
        loop {
            let begun = std::time::Instant::now();
            writer.flush();
            let queue = writer.0.lock();
            if !queue.writing && queue.bytes.is_empty() {
                return;
            }
            assert!(begun.elapsed() >= FLUSH_TIMEOUT, "all was to be written");
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

    /// A writer that takes seven bytes at a time, and would block at every second write.
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
        flush(&writer);
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
        flush(&writer);
        assert_eq!(writer.lost(), 2);
    }

    #[test]
    fn a_flush_returns_when_all_is_written() {
        let (go, wait) = channel::<()>();
        drop(go);
        let read = Arc::default();
        let writer = Writer::to(Slow(wait, Arc::clone(&read)), BUFFER_LIMIT).expect("a thread");
        writer.push(b"the last words\n");
        flush(&writer);
        assert_eq!(*read.lock().expect("not poisoned"), b"the last words\n");
    }
}

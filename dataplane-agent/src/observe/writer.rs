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
pub const WAITING: usize = 1 << 20;
/// A buffer that has grown beyond this in a burst is given back.
const KEPT: usize = 64 << 10;
/// How long whoever ends waits for what is still to be written.
const PATIENCE: Duration = Duration::from_secs(1);

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
    untold: u64,
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
            queue.untold += 1;
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
        let _ = self.0.written.wait_timeout_while(queue, PATIENCE, pending);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_to(&self, mut out: impl Write) {
        let mut batch = Vec::new();
        loop {
            let untold = {
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
                mem::take(&mut queue.untold)
            };
            // Fails where the reader is gone; nobody is left to tell.
            let _ = out.write_all(&batch);
            batch.clear();
            if batch.capacity() > KEPT {
                batch = Vec::new();
            }
            if untold > 0 {
                tracing::warn!(
                    lines = untold,
                    "log lines were lost: they came faster than they were read"
                );
            }
        }
    }
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
        let writer = Writer::to(Slow(wait, Arc::clone(&read)), WAITING).expect("a thread");
        let line = [b'x'; 1023]
            .iter()
            .chain(b"\n")
            .copied()
            .collect::<Vec<u8>>();
        let many = 3 * WAITING / line.len();
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

    #[test]
    fn a_flush_returns_when_all_is_written() {
        let (go, wait) = channel::<()>();
        drop(go);
        let read = Arc::default();
        let writer = Writer::to(Slow(wait, Arc::clone(&read)), WAITING).expect("a thread");
        writer.push(b"the last words\n");
        writer.flush();
        assert_eq!(*read.lock().expect("not poisoned"), b"the last words\n");
    }
}

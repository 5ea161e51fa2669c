//! Waits for disks. One that is another machine's may not answer for a long time, or ever. So what is read from it,
//! or written to it, is on a thread of its own: whoever waits for the answer still hears what else happens, and a
//! disk that is slow is reported by its path. One of which much is read is not slow: work calls [`answered`] for each
//! file.

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

use crate::drain;

/// Time after which a disk that has not answered is reported. What waits for it goes on to wait.
pub const SLOW_DISK: Duration = Duration::from_secs(5);
/// Interval at which that is repeated by who can do nothing else.
const REPEAT: Duration = Duration::from_secs(30);

thread_local! {
    /// When the disk has last answered the task that runs on this thread.
    static ANSWERED: RefCell<Option<LastAnswer>> = const { RefCell::new(None) };
}

/// When a disk has last answered a task; at first, when the task began.
#[derive(Clone, Debug)]
struct LastAnswer(Arc<Mutex<Instant>>);

impl LastAnswer {
    fn get(&self) -> Instant {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, at: Instant) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = at;
    }
}

/// Says that the disk has answered the task that runs on this thread, and that there may be more to read.
pub fn answered() {
    ANSWERED.with_borrow(|last| {
        if let Some(last) = last {
            last.set(Instant::now());
        }
    });
}

/// Work that waits for a disk, on a thread of its own.
#[derive(Debug)]
pub struct DiskTask<T> {
    path: PathBuf,
    since: Instant,
    answered: LastAnswer,
    done: JoinHandle<T>,
}

impl<T: Send + 'static> DiskTask<T> {
    /// Starts work on this file or folder, and what is below it.
    pub fn start(path: &Path, work: impl FnOnce() -> T + Send + 'static) -> Self {
        let since = Instant::now();
        let answered = LastAnswer(Arc::new(Mutex::new(since)));
        let of_thread = answered.clone();
        Self {
            path: path.to_owned(),
            since,
            answered,
            done: drain::spawn_blocking(move || {
                ANSWERED.set(Some(of_thread));
                let result = work();
                ANSWERED.set(None);
                result
            }),
        }
    }

    /// Waits for its result, which is there once. Cancelling the wait loses nothing.
    pub async fn done(&mut self) -> T {
        drain::finished(&mut self.done).await
    }

    /// Returns a problem if the disk has not answered for [`SLOW_DISK`].
    pub fn problem(&self) -> Option<String> {
        self.is_unanswered().then(|| unanswered(&self.path))
    }

    fn is_unanswered(&self) -> bool {
        self.answered.get().elapsed() >= SLOW_DISK
    }

    /// Waits for its result, and says from `first` on, and then at each interval of `repeat`, that there is none and
    /// why: the disk does not answer, or there is much to read. Logs when the wait is over.
    async fn done_or_told(
        mut self,
        (first, repeat): (Duration, Duration),
        tell: impl Fn(&str),
    ) -> T {
        let mut wait = first;
        loop {
            let result = timeout(wait, self.done()).await;
            let (path, long) = (self.path.display(), self.since.elapsed().as_secs());
            match result {
                Ok(result) => {
                    if self.since.elapsed() >= first {
                        tracing::info!("{path}: the disk has answered, after {long} s");
                    }
                    return result;
                }
                Err(_) if self.is_unanswered() => {
                    let long = self.answered.get().elapsed().as_secs();
                    tell(&format!("{path}: the disk has not answered for {long} s"));
                }
                Err(_) => tell(&format!("{path}: is being read, for {long} s so far")),
            }
            wait = repeat;
        }
    }

    /// Makes it look as if the disk had last answered [`SLOW_DISK`] ago.
    #[cfg(test)]
    pub(crate) fn make_slow(&self) {
        self.answered.set(self.answered.get() - SLOW_DISK);
    }
}

/// Does work on this file or folder, for which the caller can only wait. `tell` is called with a line, again and
/// again, as long as the disk does not answer.
pub async fn answer<T: Send + 'static>(
    path: &Path,
    tell: impl Fn(&str),
    work: impl FnOnce() -> T + Send + 'static,
) -> T {
    let task = DiskTask::start(path, work);
    task.done_or_told((SLOW_DISK, REPEAT), tell).await
}

/// Returns the problem with a disk that has not answered about this file or folder for [`SLOW_DISK`].
pub fn unanswered(path: &Path) -> String {
    let path = path.display();
    format!("{path}: the disk has not answered for longer than {SLOW_DISK:?}")
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[tokio::test]
    async fn a_disk_that_does_not_answer_is_told_again_and_again_until_it_does() {
        let (answer, waits) = std::sync::mpsc::channel();
        let task = DiskTask::start(Path::new("/disk"), move || waits.recv());
        task.make_slow();
        let told = Cell::new(0);
        let tell = |line: &str| {
            assert!(
                line.starts_with("/disk: the disk has not answered for "),
                "{line}"
            );
            told.set(told.get() + 1);
            if told.get() == 3 {
                answer.send("answer").expect("it waits");
            }
        };
        let often = Duration::from_millis(1);
        let result = task.done_or_told((often, often), tell).await;
        assert_eq!(result, Ok("answer"));
        assert!(told.get() >= 3);
    }

    #[tokio::test]
    async fn a_disk_of_which_much_is_read_is_not_told_to_be_silent() {
        let (sender, receiver) = std::sync::mpsc::channel::<()>();
        let (reads, has_read) = std::sync::mpsc::channel();
        let task = DiskTask::start(Path::new("/disk"), move || {
            while receiver.recv().is_ok() {
                answered();
                reads.send(()).expect("somebody waits");
            }
        });
        task.make_slow();
        let told = task.problem().expect("nothing was read for long");
        assert!(told.contains("/disk: the disk has not answered"), "{told}");
        sender.send(()).expect("it reads");
        has_read.recv().expect("it has read");
        assert_eq!(task.problem(), None);
        let (often, sender) = (Duration::from_millis(1), Cell::new(Some(sender)));
        let tell = |line: &str| {
            assert!(line.starts_with("/disk: is being read, for "), "{line}");
            sender.take();
        };
        task.done_or_told((often, often), tell).await;
    }
}

//! Waits for disks. One that is another machine's may not answer for a long time, or ever. So what is read from it,
//! or written to it, is on a thread of its own: whoever waits for the answer still hears what else happens, and a
//! disk that is slow is reported by its path.

use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

use crate::drain;

/// Time after which a disk that has not answered is reported. What waits for it goes on to wait.
pub const SLOW_DISK: Duration = Duration::from_secs(5);
/// Interval at which that is repeated by who can do nothing else.
const REPEAT: Duration = Duration::from_secs(30);

/// Work that waits for a disk, on a thread of its own.
#[derive(Debug)]
pub struct DiskTask<T> {
    path: PathBuf,
    since: Instant,
    done: JoinHandle<T>,
}

impl<T: Send + 'static> DiskTask<T> {
    /// Starts work on this file or folder, and what is below it.
    pub fn start(path: &Path, work: impl FnOnce() -> T + Send + 'static) -> Self {
        Self {
            path: path.to_owned(),
            since: Instant::now(),
            done: drain::spawn_blocking(work),
        }
    }

    /// Waits for its result, which is there once. Cancelling the wait loses nothing.
    pub async fn done(&mut self) -> T {
        drain::finished(&mut self.done).await
    }

    /// Returns a problem if the disk has not answered for [`SLOW_DISK`].
    pub fn problem(&self) -> Option<String> {
        (self.since.elapsed() >= SLOW_DISK).then(|| unanswered(&self.path))
    }

    /// Waits for its result, and says from `first` on, and then at each interval of `repeat`, that there is none.
    async fn done_or_told(
        mut self,
        (first, repeat): (Duration, Duration),
        tell: impl Fn(&str),
    ) -> T {
        let mut wait = first;
        loop {
            match timeout(wait, self.done()).await {
                Ok(result) => return result,
                Err(_) => {
                    let (path, long) = (self.path.display(), self.since.elapsed().as_secs());
                    tell(&format!("{path}: the disk has not answered for {long} s"));
                }
            }
            wait = repeat;
        }
    }

    /// Makes it look as if it had been started before [`SLOW_DISK`].
    #[cfg(test)]
    pub(crate) fn make_slow(&mut self) {
        self.since -= SLOW_DISK;
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
        let told = Cell::new(0);
        let tell = |line: &str| {
            assert_eq!(line, "/disk: the disk has not answered for 0 s");
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
}

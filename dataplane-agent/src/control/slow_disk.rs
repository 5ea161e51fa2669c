//! How long a disk may take to answer, such as one that is another machine's, before that is told.

use std::path::Path;
use std::time::Duration;

/// Time after which a disk that has not answered is told of. What waits for it goes on to wait.
pub const SLOW_DISK: Duration = Duration::from_secs(5);

/// Returns the problem with a disk that has not answered for that long about this file or folder.
pub fn unanswered(path: &Path) -> String {
    let path = path.display();
    format!("{path}: the disk has not answered for longer than {SLOW_DISK:?}")
}

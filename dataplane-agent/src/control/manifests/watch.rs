//! Says when to look at the folder again: shortly after the kernel reports a change in it, and every
//! few seconds in any case, since not every file system reports.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use notify::{RecursiveMode, Watcher};
use tokio::sync::Notify;
use tracing::warn;

/// What comes within this time of a change is one change.
const DEBOUNCE: Duration = Duration::from_millis(50);
/// How often to look without having been told.
const RESYNC: Duration = Duration::from_secs(3);

/// A watch on a folder and what is below it.
pub struct Watch {
    told: Arc<Notify>,
    /// Reports as long as it lives; none where the kernel has no more of them to give.
    _watcher: Option<notify::RecommendedWatcher>,
}

impl Watch {
    /// Watches `dir`. Where that is not possible the regular look has to do.
    pub fn new(dir: &Path) -> Self {
        let told = Arc::new(Notify::new());
        let teller = Arc::clone(&told);
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            // Reading the folder is reported too, and would keep us reading.
            if !event.is_ok_and(|event| event.kind.is_access()) {
                teller.notify_one();
            }
        })
        .and_then(|mut watcher| {
            watcher.watch(dir, RecursiveMode::Recursive)?;
            Ok(watcher)
        });
        let _watcher = watcher
            .inspect_err(
                |error| warn!(folder = %dir.display(), %error, "cannot watch, looking regularly"),
            )
            .ok();
        Self { told, _watcher }
    }

    /// Waits until it is worth looking. Cancelling it loses nothing: the next call returns at once.
    pub async fn changed(&mut self) {
        struct Again<'a>(Option<&'a Notify>);
        impl Drop for Again<'_> {
            fn drop(&mut self) {
                if let Some(told) = self.0 {
                    told.notify_one();
                }
            }
        }
        if tokio::time::timeout(RESYNC, self.told.notified())
            .await
            .is_ok()
        {
            let mut cancelled = Again(Some(&self.told));
            tokio::time::sleep(DEBOUNCE).await;
            cancelled.0 = None;
        }
    }
}

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watch").finish_non_exhaustive()
    }
}

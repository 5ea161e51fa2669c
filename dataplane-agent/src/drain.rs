//! Owns every task of the data plane, and is the only place that spawns one, or a thread for other work.
//!
//! A [`TaskGroup`] has the tasks that one worker runs for one pod. It first *drains* (it begins no new work;
//! tunnels send GOAWAY and finish what they have) and is *aborted* later. A drain can be cancelled. The tasks of a
//! pod are counted together on all workers: its listeners still accept meanwhile, so workers that are idle one
//! after the other do not mean that nothing runs.

use std::future::{Future, pending};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::rc::Rc;
use std::sync::Arc;

use tokio::runtime::Builder;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

use crate::load::Load;
use crate::sys::priority;

/// Sends an answer when its last clone is dropped. Everyone who has to do the same thing holds a clone.
#[derive(Clone, Debug)]
pub struct CompletionGuard(
    #[expect(dead_code, reason = "its destructor does the work")] Arc<NotifyOnDrop>,
);

#[derive(Debug)]
struct NotifyOnDrop(Option<oneshot::Sender<()>>);

impl CompletionGuard {
    /// Returns a guard that answers to `told`.
    pub fn new(told: oneshot::Sender<()>) -> Self {
        Self(Arc::new(NotifyOnDrop(Some(told))))
    }
}

impl Drop for NotifyOnDrop {
    fn drop(&mut self) {
        if let Some(told) = self.0.take() {
            // Whoever asked may have given up.
            let _ = told.send(());
        }
    }
}

/// The tasks of one pod on one worker. Clones share them.
#[derive(Clone, Debug)]
pub struct TaskGroup {
    tasks: TaskTracker,
    abort: CancellationToken,
    draining: Rc<watch::Sender<bool>>,
    load: Option<Load>,
}

impl TaskGroup {
    /// Returns an empty group. Each task that it spawns adds to `load`, which is that of the worker, if given.
    pub fn new(load: Option<Load>) -> Self {
        Self {
            tasks: task_tracker(),
            abort: CancellationToken::new(),
            draining: Rc::new(watch::Sender::new(false)),
            load,
        }
    }

    /// Counts its tasks in `tasks`, together with those that other workers run for the same pod.
    pub fn counted_in(self, tasks: &TaskTracker) -> Self {
        let tasks = tasks.clone();
        Self { tasks, ..self }
    }

    /// Returns a token that counts as a task until it is dropped: for work that is about to be spawned.
    pub fn token(&self) -> TaskTrackerToken {
        self.tasks.token()
    }

    /// Runs a task on this worker until it ends or the group is aborted.
    pub fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        let abort = self.abort.clone();
        let begun = self.load.as_ref().map(Load::begin);
        self.tasks.spawn_local(async move {
            let _begun = begun;
            tokio::select! {
                biased;
                () = abort.cancelled_owned() => {}
                () = task => {}
            }
        });
    }

    /// Announces that no new work shall begin.
    pub fn start_drain(&self) {
        self.draining.send_replace(true);
    }

    /// Allows new work again.
    pub fn cancel_drain(&self) {
        self.draining.send_replace(false);
    }

    /// Completes when the drain starts, or when the group is gone and aborted.
    pub fn draining(&self) -> impl Future<Output = ()> + 'static {
        let mut draining = self.draining.subscribe();
        let abort = self.abort.clone();
        async move {
            if draining.wait_for(|draining| *draining).await.is_err() {
                // The group is gone, so nothing can start its drain any more: wait for the abort.
                abort.cancelled().await;
            }
        }
    }

    /// Returns `true` if no new work shall begin.
    pub fn is_draining(&self) -> bool {
        *self.draining.borrow()
    }

    /// Completes when no task runs that is counted with this group.
    pub async fn idle(&self) {
        self.tasks.wait().await;
    }

    /// Ends all tasks. Completes when they have ended, and those that are counted with them. A task that is spawned
    /// later ends at once.
    pub async fn abort_and_wait(&self) {
        self.abort.cancel();
        self.tasks.wait().await;
    }
}

/// Runs work that may wait for a disk on a thread of its own. It can be neither cut nor waited for: the process
/// may end before it does.
#[expect(clippy::disallowed_methods, reason = "this is the one that is allowed")]
pub fn spawn_blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> JoinHandle<T> {
    tokio::task::spawn_blocking(work)
}

/// Runs a future on a thread of its own, with a runtime of its own. It is of lower priority than the others: they are
/// not to wait for a processor while it works. Dropping what is returned does not end it; its panic is that of who
/// waits for its end.
///
/// # Errors
/// The thread, or its runtime, cannot be made.
pub fn on_own_thread<F, W>(
    name: &str,
    work: W,
) -> io::Result<impl Future<Output = F::Output> + use<F, W>>
where
    F: Future<Output: Send + 'static>,
    W: FnOnce() -> F + Send + 'static,
{
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let (done, end) = oneshot::channel();
    std::thread::Builder::new()
        .name(name.into())
        .spawn(move || {
            priority::lower();
            let ended = catch_unwind(AssertUnwindSafe(|| runtime.block_on(work())));
            // Nobody may wait for it any more.
            let _ = done.send(ended);
            // Whoever waits for a disk on a thread of its own may do so for ever.
            runtime.shutdown_background();
        })?;
    Ok(async {
        match end.await {
            Ok(Ok(result)) => result,
            Ok(Err(panic)) => resume_unwind(panic),
            Err(_) => pending().await,
        }
    })
}

/// Waits for the result of such work. Cancelling the wait loses nothing. Never returns once the runtime ends.
pub async fn finished<T>(work: &mut JoinHandle<T>) -> T {
    match work.await {
        Ok(result) => result,
        Err(ended) => match ended.try_into_panic() {
            Ok(panic) => resume_unwind(panic),
            Err(_) => pending().await,
        },
    }
}

/// Returns a tracker whose `wait` completes whenever no task runs.
pub fn task_tracker() -> TaskTracker {
    let tasks = TaskTracker::new();
    tasks.close(); // only lets `wait` return; spawning goes on
    tasks
}

#[cfg(test)]
mod tests {
    use super::*;

    fn on_a_worker(test: impl Future<Output = ()>) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        tokio::task::LocalSet::new().block_on(&runtime.expect("a runtime"), test);
    }

    #[test]
    fn an_abort_ends_tasks_before_it_returns_and_refuses_later_ones() {
        on_a_worker(async {
            let group = TaskGroup::new(None);
            let held = Rc::new(());
            let in_task = Rc::clone(&held);
            group.spawn(async move {
                let _in_task = in_task;
                std::future::pending::<()>().await;
            });
            assert_eq!(Rc::strong_count(&held), 2);
            group.abort_and_wait().await;
            assert_eq!(Rc::strong_count(&held), 1);
            group.spawn(std::future::pending());
            group.idle().await;
        });
    }

    #[test]
    fn a_group_is_idle_when_nothing_that_is_counted_with_it_runs() {
        on_a_worker(async {
            let tasks = task_tracker();
            let (one, other) = (
                TaskGroup::new(None).counted_in(&tasks),
                TaskGroup::new(None).counted_in(&tasks),
            );
            let on_its_way = other.token();
            let idle = tokio::time::timeout(std::time::Duration::from_millis(5), one.idle());
            assert!(idle.await.is_err());
            other.spawn(tokio::task::yield_now());
            drop(on_its_way);
            assert!(!tasks.is_empty());
            one.idle().await;
        });
    }

    #[test]
    fn what_runs_on_a_thread_of_its_own_is_of_lower_priority_than_who_waits() {
        let niceness = priority::tests::niceness;
        on_a_worker(async {
            let own = on_own_thread("own", async move || niceness()).expect("a thread");
            let (own, waiting) = (own.await, niceness());
            // Nothing is nicer than 19.
            assert!(own > waiting || waiting == 19, "{own}, {waiting}");
        });
    }

    #[test]
    fn a_panic_on_a_thread_of_its_own_is_one_of_who_waits() {
        on_a_worker(async {
            let one = on_own_thread("one", || async { 1 }).expect("a thread");
            assert_eq!(one.await, 1);
        });
        let panicked = std::panic::catch_unwind(|| {
            on_a_worker(async {
                let two = on_own_thread("two", || async { panic!("two") }).expect("a thread");
                let () = two.await;
            });
        });
        let panic = panicked.expect_err("it panicked");
        assert_eq!(panic.downcast_ref(), Some(&"two"));
    }

    #[test]
    fn a_drain_can_be_cancelled() {
        on_a_worker(async {
            let group = TaskGroup::new(None);
            let draining = group.draining();
            group.start_drain();
            draining.await;
            assert!(group.is_draining());
            group.cancel_drain();
            let later = tokio::time::timeout(std::time::Duration::from_millis(5), group.draining());
            assert!(later.await.is_err());
        });
    }
}

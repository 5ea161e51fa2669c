//! Owns every task of the data plane, and is the only place that spawns one.
//!
//! A [`Scope`] is what one worker runs for one pod. It is first *closed* (no new work; tunnels say
//! GOAWAY and finish what they have) and then *cut*. Pods can be closed and opened again. A pod's tasks
//! are counted together, whichever worker runs them: while its listeners go on to accept, one worker
//! after the other being idle for a moment does not mean that nothing runs.

use std::future::Future;
use std::rc::Rc;
use std::sync::Arc;

use tokio::sync::{oneshot, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

use crate::load::Load;

/// Is shared by all that were told the same, and answers when the last of them lets go of it.
#[derive(Clone, Debug)]
pub struct Answer(#[expect(dead_code, reason = "it acts as it is dropped")] Arc<OnDrop>);

#[derive(Debug)]
struct OnDrop(Option<oneshot::Sender<()>>);

impl Answer {
    /// By which `told` hears.
    pub fn new(told: oneshot::Sender<()>) -> Self {
        Self(Arc::new(OnDrop(Some(told))))
    }
}

impl Drop for OnDrop {
    fn drop(&mut self) {
        if let Some(told) = self.0.take() {
            // Whoever asked may have given up.
            let _ = told.send(());
        }
    }
}

/// The tasks of one pod on one worker. Clones share them.
#[derive(Clone, Debug)]
pub struct Scope {
    tasks: TaskTracker,
    cut: CancellationToken,
    closed: Rc<watch::Sender<bool>>,
    load: Option<Load>,
}

impl Scope {
    /// Without a task; what it spawns is begun by the worker of this `load`.
    pub fn new(load: Option<Load>) -> Self {
        Self {
            tasks: tasks(),
            cut: CancellationToken::new(),
            closed: Rc::new(watch::Sender::new(false)),
            load,
        }
    }

    /// Counts what it spawns among these, with what other workers run for the same pod.
    pub fn among(self, tasks: &TaskTracker) -> Self {
        let tasks = tasks.clone();
        Self { tasks, ..self }
    }

    /// Counts as a task until it is dropped: what is on its way to be spawned.
    pub fn token(&self) -> TaskTrackerToken {
        self.tasks.token()
    }

    /// Runs a task on this worker until it ends or the scope is cut.
    pub fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        let cut = self.cut.clone();
        let begun = self.load.as_ref().map(Load::begin);
        self.tasks.spawn_local(async move {
            let _begun = begun;
            tokio::select! {
                biased;
                () = cut.cancelled_owned() => {}
                () = task => {}
            }
        });
    }

    /// No new work from now on, or again.
    pub fn close(&self, closed: bool) {
        self.closed.send_replace(closed);
    }

    /// Completes when there shall be no new work.
    pub fn closing(&self) -> impl Future<Output = ()> + 'static {
        let mut closed = self.closed.subscribe();
        let cut = self.cut.clone();
        async move {
            if closed.wait_for(|closed| *closed).await.is_err() {
                // The scope is gone, and with it all that could close it: as if cut.
                cut.cancelled().await;
            }
        }
    }

    /// Whether there shall be no new work.
    pub fn is_closing(&self) -> bool {
        *self.closed.borrow()
    }

    /// Completes when all tasks that are counted together have ended by themselves.
    pub async fn idle(&self) {
        self.tasks.wait().await;
    }

    /// Ends all tasks; completes when they, and those that are counted with them, have ended. What is
    /// spawned later ends at once.
    pub async fn cut(&self) {
        self.cut.cancel();
        self.tasks.wait().await;
    }
}

/// To count tasks in: it can be waited for until there are none.
pub fn tasks() -> TaskTracker {
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
    fn a_cut_ends_tasks_before_it_returns_and_refuses_later_ones() {
        on_a_worker(async {
            let scope = Scope::new(None);
            let held = Rc::new(());
            let in_task = Rc::clone(&held);
            scope.spawn(async move {
                let _in_task = in_task;
                std::future::pending::<()>().await;
            });
            assert_eq!(Rc::strong_count(&held), 2);
            scope.cut().await;
            assert_eq!(Rc::strong_count(&held), 1);
            scope.spawn(std::future::pending());
            scope.idle().await;
        });
    }

    #[test]
    fn a_scope_is_idle_when_nothing_that_is_counted_with_it_runs() {
        on_a_worker(async {
            let tasks = tasks();
            let (one, other) = (
                Scope::new(None).among(&tasks),
                Scope::new(None).among(&tasks),
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
    fn a_closed_scope_can_be_opened_again() {
        on_a_worker(async {
            let scope = Scope::new(None);
            let closing = scope.closing();
            scope.close(true);
            closing.await;
            assert!(scope.is_closing());
            scope.close(false);
            let later = tokio::time::timeout(std::time::Duration::from_millis(5), scope.closing());
            assert!(later.await.is_err());
        });
    }
}

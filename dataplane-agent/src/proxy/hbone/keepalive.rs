//! Notices a tunnel whose other end is gone without a word.

use std::time::Duration;

use h2::{Ping, PingPong};
use tokio::sync::{Notify, watch};
use tokio::time::{sleep, timeout};

/// Between the answer to one PING and the next.
const INTERVAL: Duration = Duration::from_secs(10);
/// A PING is answered within this, or the tunnel is late: it is left by what can be.
const LATE: Duration = Duration::from_secs(2);
/// A PING is answered within this, or the tunnel counts as dead.
const ANSWER: Duration = Duration::from_secs(20);

/// How a tunnel answers.
#[derive(Debug)]
pub struct Health {
    late: watch::Sender<bool>,
    doubt: Notify,
}

impl Default for Health {
    fn default() -> Self {
        Self {
            late: watch::Sender::new(false),
            doubt: Notify::new(),
        }
    }
}

impl Health {
    /// Whether a PING waits for its answer for long.
    pub fn is_late(&self) -> bool {
        *self.late.borrow()
    }

    /// Completes when the tunnel is late. Asks it now: whoever calls this waits for an answer.
    pub async fn late(&self) {
        self.doubt.notify_one();
        // The sender is ours.
        let _ = self.late.subscribe().wait_for(|late| *late).await;
    }
}

/// Pings until the other end does not answer; completes then. Never, if somebody else has the pings.
pub async fn lost(pings: Option<PingPong>, health: &Health) {
    let Some(mut pings) = pings else {
        return std::future::pending().await;
    };
    loop {
        tokio::select! {
            () = sleep(INTERVAL) => {}
            () = health.doubt.notified() => {}
        }
        let answer = timeout(ANSWER, pings.ping(Ping::opaque()));
        tokio::pin!(answer);
        let answered = tokio::select! {
            answered = &mut answer => answered,
            () = sleep(LATE) => {
                health.late.send_replace(true);
                answer.await
            }
        };
        match answered {
            Ok(Ok(_)) => health.late.send_replace(false),
            Ok(Err(_)) | Err(_) => return,
        };
    }
}

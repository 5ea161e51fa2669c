//! Detects tunnels whose other end is gone without having closed them.

use std::time::Duration;

use h2::{Ping, PingPong};
use tokio::sync::{Notify, watch};
use tokio::time::{sleep, timeout};

/// Time between the answer to one PING and the next PING.
const INTERVAL: Duration = Duration::from_secs(10);
/// Time after which an unanswered PING makes the tunnel late: no new streams are opened in it, and unanswered ones go
/// elsewhere.
const LATE: Duration = Duration::from_secs(2);
/// Time after which an unanswered PING means that the tunnel is dead.
const PING_TIMEOUT: Duration = Duration::from_secs(20);

/// State of a tunnel's PINGs.
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
    /// Returns true if a PING has waited for its answer for longer than 2 s.
    pub fn is_late(&self) -> bool {
        *self.late.borrow()
    }

    /// Completes when the tunnel is late. Sends a PING now, since the caller waits for the peer.
    pub async fn late(&self) {
        self.doubt.notify_one();
        // It fails only when the sender is gone, and we own the sender.
        let _ = self.late.subscribe().wait_for(|late| *late).await;
    }
}

/// Sends PINGs, and completes when one is not answered. Never completes if the PINGs are in use elsewhere.
pub async fn lost(pings: Option<PingPong>, health: &Health) {
    let Some(mut pings) = pings else {
        return std::future::pending().await;
    };
    loop {
        tokio::select! {
            () = sleep(INTERVAL) => {}
            () = health.doubt.notified() => {}
        }
        let answer = timeout(PING_TIMEOUT, pings.ping(Ping::opaque()));
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

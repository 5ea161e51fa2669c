//! Notices a tunnel whose other end is gone without a word.

use std::time::Duration;

use h2::{Ping, PingPong};
use tokio::time::{sleep, timeout};

/// Between the answer to one PING and the next.
const INTERVAL: Duration = Duration::from_secs(10);
/// A PING is answered within this, or the tunnel counts as dead.
const ANSWER: Duration = Duration::from_secs(20);

/// Pings until the other end does not answer; completes then. Never, if somebody else has the pings.
pub async fn lost(pings: Option<PingPong>) {
    let Some(mut pings) = pings else {
        return std::future::pending().await;
    };
    loop {
        sleep(INTERVAL).await;
        match timeout(ANSWER, pings.ping(Ping::opaque())).await {
            Ok(Ok(_)) => {}
            Ok(Err(_)) | Err(_) => return,
        }
    }
}

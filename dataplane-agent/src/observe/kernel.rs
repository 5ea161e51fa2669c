//! Reports of the kernel programs: events in the ring buffer, and their log.

use std::net::IpAddr;
use std::time::Duration;

use aya::maps::{MapData, RingBuf};
use aya_log::EbpfLogger;
use dataplane_ebpf::event::{Event, Reason};

use super::log_limit::LogLimiter;
use crate::sys::async_fd;

/// The pause between two reads of the programs' log while it is being written.
const LOG_INTERVAL: Duration = Duration::from_millis(100);

/// Number of events that are read before other tasks on this thread have their turn.
const EVENTS_PER_TURN: usize = 64;

/// Logs events as they come, at most one of each reason and pod per second. Runs until it is dropped.
pub async fn events(ring: RingBuf<MapData>) {
    let mut ring = match async_fd::readable(ring) {
        Ok(ring) => ring,
        Err(error) => {
            tracing::error!(%error, "the kernel programs' reports cannot be read");
            return std::future::pending().await;
        }
    };
    let limiter = LogLimiter::new(1, u32::MAX);
    loop {
        let Ok(mut ready) = ring.readable_mut().await else {
            return;
        };
        let ring = ready.get_inner_mut();
        let mut left = EVENTS_PER_TURN;
        while left > 0
            && let Some(item) = ring.next()
        {
            report(&limiter, &item);
            left -= 1;
        }
        if left > 0 {
            ready.clear_ready();
        } else {
            // A pod that causes events as fast as they are read must not keep others waiting.
            tokio::task::yield_now().await;
        }
    }
}

/// Forwards the programs' log. Runs until it is dropped.
pub async fn log(logger: Option<EbpfLogger<&'static dyn ::log::Log>>) {
    let Some(logger) = logger else {
        return std::future::pending().await;
    };
    let mut logger = match async_fd::readable(logger) {
        Ok(logger) => logger,
        Err(error) => {
            tracing::error!(%error, "the kernel programs' log cannot be read");
            return std::future::pending().await;
        }
    };
    loop {
        let Ok(mut ready) = logger.readable_mut().await else {
            return;
        };
        ready.get_inner_mut().flush();
        ready.clear_ready();
        // It is written in bursts; each line would wake this thread.
        tokio::time::sleep(LOG_INTERVAL).await;
    }
}

/// Logs an event, at most one of each reason and pod per second.
fn report(limiter: &LogLimiter<u32, u64>, bytes: &[u8]) {
    if let Some(event) = Event::from_bytes(bytes)
        && let Some(times) = limiter.admit(event.reason, event.netns)
    {
        say(&event, times);
    }
}

fn say(event: &Event, times: u64) {
    let reason = Reason::from_number(event.reason).map_or("unknown", Reason::word);
    tracing::warn!(
        target: "kernel",
        reason,
        times,
        netns = event.netns,
        pod = %IpAddr::from(event.pod),
        cgroup = event.cgroup,
        to = %std::net::SocketAddr::new(event.to.into(), u16::try_from(event.port).unwrap_or(0)),
        "connection refused or kept inside the pod"
    );
}

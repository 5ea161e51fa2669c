//! What the kernel programs report: events of the ring buffer, and their log.

use std::collections::HashMap;
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use aya::maps::{MapData, RingBuf};
use aya_log::EbpfLogger;
use dataplane_ebpf::event::{Event, Reason};

use crate::sys::readiness;

/// Between two looks at the programs' log; it is written in bursts.
const LOG_LOOK: Duration = Duration::from_millis(100);

/// How many events are read before others on this thread have their turn.
const AT_ONCE: usize = 64;
/// How often one kind of event of one pod is told of.
const OFTEN: Duration = Duration::from_secs(1);
/// How many kinds are remembered.
const KINDS: usize = 4096;

/// Tells of events as they come, of each kind of each pod once a second. Runs until it is dropped.
pub async fn events(ring: RingBuf<MapData>) {
    let mut ring = match readiness::readable(ring) {
        Ok(ring) => ring,
        Err(error) => {
            tracing::error!(%error, "the kernel programs' reports cannot be read");
            return std::future::pending().await;
        }
    };
    let mut told = Told::default();
    loop {
        let Ok(mut ready) = ring.readable_mut().await else {
            return;
        };
        let ring = ready.get_inner_mut();
        let mut left = AT_ONCE;
        while left > 0
            && let Some(item) = ring.next()
        {
            told.tell(&item);
            left -= 1;
        }
        if left > 0 {
            ready.clear_ready();
        } else {
            // A pod that makes events as fast as they are read keeps nobody else waiting.
            tokio::task::yield_now().await;
        }
    }
}

/// Passes the programs' log on. Runs until it is dropped.
pub async fn log(logger: Option<EbpfLogger<&'static dyn ::log::Log>>) {
    let Some(mut logger) = logger else {
        return std::future::pending().await;
    };
    debug_assert!(logger.as_raw_fd() >= 0);
    loop {
        logger.flush();
        tokio::time::sleep(LOG_LOOK).await;
    }
}

/// When each kind of event was told of last, and how many have come since.
#[derive(Default)]
struct Told(HashMap<(u32, u64), (Instant, u64)>);

impl Told {
    fn tell(&mut self, bytes: &[u8]) {
        let Some(event) = Event::from_bytes(bytes) else {
            return;
        };
        let now = Instant::now();
        if self.0.len() >= KINDS {
            self.0.clear();
        }
        let mut times = 1;
        if let Some((last, since)) = self.0.get_mut(&(event.reason, event.netns)) {
            *since += 1;
            if now < *last + OFTEN {
                return;
            }
            times = *since;
        }
        self.0.insert((event.reason, event.netns), (now, 0));
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

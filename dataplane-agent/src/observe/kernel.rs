//! What the kernel programs report: events of the ring buffer, and their log.

use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::time::Duration;

use aya::maps::{MapData, RingBuf};
use aya_log::EbpfLogger;
use dataplane_ebpf::event::{Event, Reason};

use crate::sys::readiness;

/// Between two looks at the programs' log; it is written in bursts.
const LOG_LOOK: Duration = Duration::from_millis(100);

/// Tells of events as they come. Runs until it is dropped.
pub async fn events(ring: RingBuf<MapData>) {
    let mut ring = match readiness::readable(ring) {
        Ok(ring) => ring,
        Err(error) => {
            tracing::error!(%error, "the kernel programs' reports cannot be read");
            return std::future::pending().await;
        }
    };
    loop {
        let Ok(mut ready) = ring.readable_mut().await else {
            return;
        };
        let ring = ready.get_inner_mut();
        while let Some(item) = ring.next() {
            tell(&item);
        }
        ready.clear_ready();
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

fn tell(bytes: &[u8]) {
    let Some(event) = Event::from_bytes(bytes) else {
        return;
    };
    let reason = Reason::from_number(event.reason).map_or("unknown", Reason::word);
    tracing::warn!(
        target: "kernel",
        reason,
        netns = event.netns,
        pod = %IpAddr::from(event.pod),
        cgroup = event.cgroup,
        to = %std::net::SocketAddr::new(event.to.into(), u16::try_from(event.port).unwrap_or(0)),
        "connection refused or kept inside the pod"
    );
}

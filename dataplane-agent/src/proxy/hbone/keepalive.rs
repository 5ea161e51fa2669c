//! Detects tunnels whose other end is gone without having closed them.
//!
//! A PING waits behind all that was written before it, on a slow link for minutes, and so does its answer. So a tunnel
//! whose PING is not answered lives as long as the peer takes what was written before, and as long as anything comes
//! from it.

use std::future::pending;
use std::time::Duration;

use h2::{Ping, PingPong};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep};

use crate::sys::socket::Moved;

/// Time between the answer to one PING and the next PING.
const INTERVAL: Duration = Duration::from_secs(10);
/// Time after which an unanswered PING makes the tunnel late: no new streams are opened in it, and unanswered ones go
/// elsewhere.
const LATE: Duration = Duration::from_secs(2);
/// Time after which an unanswered PING means that the tunnel is dead, if nothing else shows that it is not.
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

/// Sends PINGs, and completes when one is not answered and by what was `moved` the peer is gone. Never completes if the
/// PINGs are in use elsewhere.
pub async fn lost(pings: Option<PingPong>, health: &Health, moved: impl Fn() -> Moved) {
    let Some(mut pings) = pings else {
        return pending().await;
    };
    loop {
        tokio::select! {
            () = sleep(INTERVAL) => {}
            () = health.doubt.notified() => {}
        }
        tokio::select! {
            answered = pings.ping(Ping::opaque()) => match answered {
                Ok(_) => health.late.send_replace(false),
                Err(_) => return,
            },
            () = silent(health, &moved) => return,
        };
    }
}

/// Completes when by what was `moved` the peer has been silent for too long. Meanwhile the tunnel becomes late.
async fn silent(health: &Health, moved: impl Fn() -> Moved) {
    let mut silence = Silence::new(moved(), Instant::now());
    loop {
        sleep(LATE).await;
        health.late.send_replace(true);
        if silence.look(moved(), Instant::now()) {
            return;
        }
    }
}

/// The silence of a peer since a PING was sent to it.
struct Silence {
    seen: Moved,
    /// The time of the last look at which the peer was there.
    last: Instant,
    /// True as long as the PING may be on its way: once the peer's kernel has it, what that has besides says nothing of
    /// the peer.
    under_way: bool,
}

impl Silence {
    fn new(seen: Moved, now: Instant) -> Self {
        Self {
            seen,
            last: now,
            under_way: true,
        }
    }

    /// Looks at what has been moved; returns true if the silence has lasted too long.
    fn look(&mut self, moved: Moved, now: Instant) -> bool {
        self.under_way &= moved.unacknowledged > 0;
        let taken = self.under_way && moved.acknowledged != self.seen.acknowledged;
        if taken || moved.received != self.seen.received {
            self.last = now;
        }
        self.seen = moved;
        now - self.last >= PING_TIMEOUT
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpStream};
    use tokio::time::timeout;

    use super::*;
    use crate::proxy::hbone::readahead::ReadAhead;
    use crate::proxy::limits::memory::Share;

    /// Returns after which time a peer that answers no PING is taken for gone. Before that `next` changes every 14 s, 20
    /// times, what was moved, `first` at the beginning.
    fn lost_after(first: Moved, next: impl Fn(&mut Moved)) -> Duration {
        let (begin, mut moved) = (Instant::now(), first);
        let mut silence = Silence::new(moved, begin);
        for look in 1.. {
            if look % 7 == 0 && look <= 7 * 20 {
                next(&mut moved);
            }
            let after = LATE * look;
            if silence.look(moved, begin + after) {
                return after;
            }
        }
        unreachable!("it goes on for ever")
    }

    #[test]
    fn a_peer_that_answers_no_ping_is_there_as_long_as_it_takes_what_came_before_or_sends() {
        let last = LATE * 7 * 20;
        let none = Moved::default();
        let sends = lost_after(none, |moved| moved.received += 1);
        assert_eq!(sends, last + PING_TIMEOUT);
        let under_way = Moved {
            unacknowledged: 1,
            ..none
        };
        let takes = lost_after(under_way, |moved| moved.acknowledged += 1);
        assert_eq!(takes, last + PING_TIMEOUT);
    }

    #[test]
    fn a_peer_of_which_the_kernel_alone_is_there_is_lost() {
        let none = Moved::default();
        assert_eq!(lost_after(none, |_| {}), PING_TIMEOUT);
        // It has the PING, and each of a few bytes that come after it.
        let takes = lost_after(none, |moved| moved.acknowledged += 1);
        assert_eq!(takes, PING_TIMEOUT);
        // It takes nothing more.
        let full = Moved {
            unacknowledged: 1,
            ..none
        };
        assert_eq!(lost_after(full, |_| {}), PING_TIMEOUT);
    }

    #[tokio::test]
    async fn what_arrives_in_either_direction_is_traffic() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a listener");
        let to = listener.local_addr().expect("an address");
        let (far, near) = tokio::join!(TcpStream::connect(to), listener.accept());
        let (mut far, near) = (far.expect("connected"), near.expect("accepted").0);
        let mut near = ReadAhead::new(near, &Share::default());
        let traffic = near.traffic();
        let is = async |wanted: Moved| {
            while traffic.moved() != wanted {
                sleep(Duration::from_millis(1)).await;
            }
        };
        // The kernel counts the SYN.
        let begun = traffic.moved();
        near.write_all(b"to the peer").await.expect("written");
        let mut wanted = Moved {
            acknowledged: begun.acknowledged + 11,
            ..begun
        };
        let limit = Duration::from_secs(10);
        timeout(limit, is(wanted)).await.expect("acknowledged");
        far.write_all(b"from the peer").await.expect("written");
        wanted.received += 13;
        timeout(limit, is(wanted)).await.expect("received");
        near.read_exact(&mut [0; 13]).await.expect("bytes");
    }
}

//! The tunnels of one worker, shared by the connections that go the same way. No locks: nothing of
//! it leaves the worker, and no borrow lives across an await.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};

use super::hbone::{ClientTunnel, ConnectRequest, OpenError, StreamSlot, dial};
use super::{Connector, TransportError};
use crate::drain::TaskGroup;
use crate::mesh::Identity;
use crate::proxy::authorize::{Instance, LocalPod};
use crate::proxy::hbone::stream::Stream;
use crate::proxy::hbone::{CLIENT_STREAMS, MAX_TUNNELS};
use crate::proxy::limits::{Full, Place};

/// The most tunnels in which a connection is tried, if each of them fails before it was sent.
const TRIES: usize = 3;

/// The longest time that a connection waits for idle tunnels to be closed. A worker that takes longer hangs.
const GIVE_WAY: Duration = Duration::from_secs(1);

/// The properties that connections must have in common to share a tunnel. The destination's uid is in it so that
/// an address used again never gets another pod's tunnel. A uid is a name, which a pod that is made
/// anew has again: its predecessor's tunnels are ended by the agent that they go to, as it lets go of
/// that pod, and what was to be opened in one meanwhile is tried in another. The source is a pod and
/// not an identity, since two pods of one identity have two addresses.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TunnelKey {
    /// The source pod.
    pub source: Instance,
    /// The source address of the tunnel, if the pod's routes do not choose it. The destination sees it as the
    /// client's address.
    pub from: Option<IpAddr>,
    /// The destination workload.
    pub target: Arc<str>,
    /// The address that the tunnel connects to.
    pub to: SocketAddr,
    /// The identities that the peer may have.
    pub expected: Vec<Identity>,
}

/// The tunnels of one worker.
pub struct Pool {
    connector: Rc<dyn Connector>,
    by_key: RefCell<HashMap<TunnelKey, KeyedTunnels>>,
    idle: Duration,
}

#[derive(Default)]
struct KeyedTunnels {
    tunnels: Vec<Rc<ClientTunnel>>,
    pending: Vec<Rc<PendingTunnel>>,
}

type Outcome = Option<Result<Rc<ClientTunnel>, TransportError>>;

/// A tunnel that is being made, with the number of connections that wait for it.
struct PendingTunnel {
    waiting: Cell<usize>,
    outcome: watch::Sender<Outcome>,
}

impl Pool {
    /// Returns a pool without tunnels. A tunnel that carries nothing for `idle` is closed.
    pub fn new(connector: Rc<dyn Connector>, idle: Duration) -> Rc<Self> {
        Rc::new(Self {
            connector,
            by_key: RefCell::default(),
            idle,
        })
    }

    /// Opens a stream, with its place in a tunnel: one that is there, or a new one that lives in the
    /// pod's `group`.
    ///
    /// # Errors
    /// As [`dial`] and [`StreamSlot::connect`]. What met a tunnel that is no good, or closed at once,
    /// is tried again in another, a few times.
    pub async fn connect(
        self: &Rc<Self>,
        key: &TunnelKey,
        pod: &Arc<LocalPod>,
        group: &TaskGroup,
        connect: &ConnectRequest,
    ) -> Result<(Stream, StreamSlot), TransportError> {
        let mut tries = TRIES;
        loop {
            tries -= 1;
            let opened = async {
                let slot = self.checkout(key, pod, group).await?;
                Ok((slot.connect(connect, group).await?, slot))
            };
            match opened.await {
                Ok(opened) => return Ok(opened),
                Err(OpenError::Tunnel(_)) if tries > 0 => {}
                Err(OpenError::Tunnel(error) | OpenError::Final(error)) => return Err(error),
            }
        }
    }

    /// Closes tunnels that have carried nothing for the pool's idle time; never returns.
    pub async fn release_idle(self: Rc<Self>) {
        loop {
            tokio::time::sleep(self.idle / 4).await;
            self.release(self.idle, |_| true);
        }
    }

    /// Closes the tunnels that have carried nothing for `long`, of the pods for which `of` returns `true`.
    fn release(&self, long: Duration, of: impl Fn(Instance) -> bool) {
        self.by_key.borrow_mut().retain(|key, entry| {
            let of = of(key.source);
            entry.tunnels.retain(|tunnel| {
                let idle = of && tunnel.streams() == 0 && tunnel.idle_since.get().elapsed() >= long;
                !tunnel.closed.get() && !idle
            });
            !entry.tunnels.is_empty() || !entry.pending.is_empty()
        });
    }

    /// A place for one more connection from the pod, or a tunnel: where there is none, the pod's own idle
    /// tunnels give way, on whichever worker they are, and never another pod's, which would dial theirs
    /// anew for what this one does.
    ///
    /// # Errors
    /// There is none, and no tunnel of the pod is idle, or gives way in time.
    pub async fn place(&self, pod: &LocalPod) -> Result<Place, Full> {
        let tunnels = &pod.places.idle;
        let (mut idle, deadline) = (tunnels.count(), Instant::now() + GIVE_WAY);
        loop {
            // Before the place is asked for: one that gives way meanwhile is seen as a change.
            let some = *idle.borrow_and_update() > 0;
            match self.connector.place(pod) {
                Err(full) if some => {
                    tunnels.want();
                    if timeout_at(deadline, idle.changed()).await.is_err() {
                        return Err(full);
                    }
                }
                placed => return placed,
            }
        }
    }

    /// Closes the idle tunnels of the pod on this worker whenever its [places](Self::place) are wanted, also on
    /// another one; never returns.
    pub async fn close_idle_when_wanted(self: Rc<Self>, pod: Arc<LocalPod>) {
        loop {
            pod.places.idle.wanted().await;
            self.release(Duration::ZERO, |source| source == pod.instance);
        }
    }

    /// Removes a pod's tunnels from the pool; the pod's task group ends them.
    pub fn forget(&self, source: Instance) {
        self.by_key
            .borrow_mut()
            .retain(|key, _| key.source != source);
    }

    /// Returns the number of tunnels.
    pub fn tunnels(&self) -> usize {
        self.by_key
            .borrow()
            .values()
            .map(|entry| entry.tunnels.len())
            .sum()
    }

    async fn checkout(
        self: &Rc<Self>,
        key: &TunnelKey,
        pod: &Arc<LocalPod>,
        group: &TaskGroup,
    ) -> Result<StreamSlot, OpenError> {
        loop {
            let mut outcome = match self.find(key) {
                Found::Slot(slot) => return Ok(slot),
                Found::Pending(pending) => pending.outcome.subscribe(),
                Found::Nothing => self.start_dial(key, pod, group).outcome.subscribe(),
            };
            match outcome
                .wait_for(Option::is_some)
                .await
                .map(|outcome| outcome.clone())
            {
                Ok(Some(Ok(tunnel))) if tunnel.has_room() => return Ok(tunnel.reserve()),
                Ok(Some(Err(error))) => return Err(OpenError::Final(error)),
                Ok(Some(Ok(tunnel))) if tunnel.closed.get() => {
                    let error = "the peer closed the tunnel at once";
                    return Err(OpenError::Tunnel(TransportError::Handshake(error.into())));
                }
                // Others were quicker: look again.
                Ok(_) => {}
                // The pod is gone, and its task group has aborted the dial.
                Err(_) => {
                    let gone = std::io::Error::from(std::io::ErrorKind::ConnectionAborted);
                    return Err(OpenError::Final(TransportError::Connect(gone.into())));
                }
            }
        }
    }

    fn find(&self, key: &TunnelKey) -> Found {
        let mut by_key = self.by_key.borrow_mut();
        let Some(entry) = by_key.get_mut(key) else {
            return Found::Nothing;
        };
        entry.tunnels.retain(|tunnel| !tunnel.is_over());
        let least = entry.tunnels.iter().filter(|tunnel| tunnel.has_room());
        if let Some(tunnel) = least.min_by_key(|tunnel| tunnel.streams()) {
            return Found::Slot(Rc::clone(tunnel).reserve());
        }
        let pending = (entry.pending.iter()).find(|pending| pending.waiting.get() < CLIENT_STREAMS);
        if let Some(pending) = pending {
            pending.waiting.set(pending.waiting.get() + 1);
            return Found::Pending(Rc::clone(pending));
        }
        // Streams that a peer does not read must not lead to tunnels without end.
        if entry.tunnels.len() >= MAX_TUNNELS {
            let least = entry.tunnels.iter().filter(|tunnel| tunnel.may_carry());
            if let Some(tunnel) = least.min_by_key(|tunnel| tunnel.streams()) {
                return Found::Slot(Rc::clone(tunnel).reserve());
            }
        }
        Found::Nothing
    }

    /// Dials in a separate task: the connection that asked first may end while others wait.
    fn start_dial(
        self: &Rc<Self>,
        key: &TunnelKey,
        pod: &Arc<LocalPod>,
        group: &TaskGroup,
    ) -> Rc<PendingTunnel> {
        let pending = Rc::new(PendingTunnel {
            waiting: Cell::new(1),
            outcome: watch::Sender::new(None),
        });
        self.by_key
            .borrow_mut()
            .entry(key.clone())
            .or_default()
            .pending
            .push(Rc::clone(&pending));
        let guard = PendingTunnelGuard {
            pool: Rc::clone(self),
            key: key.clone(),
            pending: Rc::clone(&pending),
        };
        let (pod, in_group) = (Arc::clone(pod), group.clone());
        group.spawn(async move {
            let connector = &*guard.pool.connector;
            let end = match guard.pool.place(&pod).await {
                Ok(place) => dial(connector, &pod, &guard.key, place, &in_group).await,
                Err(full) => Err(full.into()),
            };
            if let Ok(tunnel) = &end
                && let Some(entry) = guard.pool.by_key.borrow_mut().get_mut(&guard.key)
            {
                entry.tunnels.push(Rc::clone(tunnel));
            }
            guard.pending.outcome.send_replace(Some(end));
        });
        pending
    }
}

enum Found {
    Slot(StreamSlot),
    Pending(Rc<PendingTunnel>),
    Nothing,
}

/// Removes the pending tunnel from the list when its dial has ended or was aborted.
struct PendingTunnelGuard {
    pool: Rc<Pool>,
    key: TunnelKey,
    pending: Rc<PendingTunnel>,
}

impl Drop for PendingTunnelGuard {
    fn drop(&mut self) {
        if let Some(entry) = self.pool.by_key.borrow_mut().get_mut(&self.key) {
            entry
                .pending
                .retain(|other| !Rc::ptr_eq(other, &self.pending));
        }
        if self.pending.outcome.borrow().is_none() {
            let gone = std::io::Error::from(std::io::ErrorKind::ConnectionAborted);
            let end = Some(Err(TransportError::Connect(gone.into())));
            self.pending.outcome.send_replace(end);
        }
    }
}

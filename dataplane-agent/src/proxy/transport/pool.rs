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

use super::hbone::{Connect, Failed, Lease, Tunnel, dial};
use super::{Means, TransportError};
use crate::drain::Scope;
use crate::mesh::Identity;
use crate::proxy::authorize::{Instance, LocalPod};
use crate::proxy::hbone::stream::Stream;
use crate::proxy::hbone::{CLIENT_STREAMS, TUNNELS};
use crate::proxy::limits::{Full, Place};

/// In how many tunnels a connection is tried, where one after the other turns out to be no good.
const TRIES: usize = 3;

/// How long a connection waits for idle tunnels to give way: a worker that takes so long hangs.
const GIVE_WAY: Duration = Duration::from_secs(1);

/// What connections must have in common to share a tunnel. The destination's uid is in it so that
/// an address used again never gets another pod's tunnel. A uid is a name, which a pod that is made
/// anew has again: its predecessor's tunnels are ended by the agent that they go to, as it lets go of
/// that pod, and what was to be opened in one meanwhile is tried in another. The source is a pod and
/// not an identity, since two pods of one identity have two addresses.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// The source pod.
    pub source: Instance,
    /// Which of its addresses the tunnel comes from, where its routes do not choose: it is what the
    /// destination sees as the client's.
    pub from: Option<IpAddr>,
    /// The destination workload.
    pub target: Arc<str>,
    /// Where the tunnel goes.
    pub to: SocketAddr,
    /// Who may answer.
    pub expected: Vec<Identity>,
}

/// The tunnels of one worker.
pub struct Pool {
    means: Rc<dyn Means>,
    ways: RefCell<HashMap<Key, Way>>,
    idle: Duration,
}

#[derive(Default)]
struct Way {
    tunnels: Vec<Rc<Tunnel>>,
    dials: Vec<Rc<Dial>>,
}

type Outcome = Option<Result<Rc<Tunnel>, TransportError>>;

/// A tunnel in the making, and how many wait for it.
struct Dial {
    waiting: Cell<usize>,
    outcome: watch::Sender<Outcome>,
}

impl Pool {
    /// Without tunnels; one that carries nothing for `idle` is closed.
    pub fn new(means: Rc<dyn Means>, idle: Duration) -> Rc<Self> {
        Rc::new(Self {
            means,
            ways: RefCell::default(),
            idle,
        })
    }

    /// Opens a stream, with its place in a tunnel: one that is there, or a new one that lives in the
    /// pod's `scope`.
    ///
    /// # Errors
    /// As [`dial`] and [`Lease::connect`]. What met a tunnel that is no good, or closed at once,
    /// is tried again in another, a few times.
    pub async fn connect(
        self: &Rc<Self>,
        key: &Key,
        pod: &Arc<LocalPod>,
        scope: &Scope,
        connect: &Connect,
    ) -> Result<(Stream, Lease), TransportError> {
        let mut tries = TRIES;
        loop {
            tries -= 1;
            let opened = async {
                let lease = self.lease(key, pod, scope).await?;
                Ok((lease.connect(connect, scope).await?, lease))
            };
            match opened.await {
                Ok(opened) => return Ok(opened),
                Err(Failed::Tunnel(_)) if tries > 0 => {}
                Err(Failed::Tunnel(error) | Failed::Final(error)) => return Err(error),
            }
        }
    }

    /// Closes what has carried nothing for long; never returns.
    pub async fn release_idle(self: Rc<Self>) {
        loop {
            tokio::time::sleep(self.idle / 4).await;
            self.release(self.idle, |_| true);
        }
    }

    /// Closes what has carried nothing for so long, of the pods of which this says so.
    fn release(&self, long: Duration, of: impl Fn(Instance) -> bool) {
        self.ways.borrow_mut().retain(|key, way| {
            let of = of(key.source);
            way.tunnels.retain(|tunnel| {
                let idle = of && tunnel.streams() == 0 && tunnel.idle_since.get().elapsed() >= long;
                !tunnel.closed.get() && !idle
            });
            !way.tunnels.is_empty() || !way.dials.is_empty()
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
            match self.means.place(pod) {
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

    /// Closes what is idle of the pod on this worker whenever its [places](Self::place) are wanted, also on
    /// another one; never returns.
    pub async fn give_way(self: Rc<Self>, pod: Arc<LocalPod>) {
        loop {
            pod.places.idle.wanted().await;
            self.release(Duration::ZERO, |source| source == pod.instance);
        }
    }

    /// Forgets a pod's tunnels; the pod's scope ends them.
    pub fn forget(&self, source: Instance) {
        self.ways.borrow_mut().retain(|key, _| key.source != source);
    }

    /// How many tunnels there are.
    pub fn tunnels(&self) -> usize {
        self.ways
            .borrow()
            .values()
            .map(|way| way.tunnels.len())
            .sum()
    }

    async fn lease(
        self: &Rc<Self>,
        key: &Key,
        pod: &Arc<LocalPod>,
        scope: &Scope,
    ) -> Result<Lease, Failed> {
        loop {
            let mut outcome = match self.look(key) {
                Found::Lease(lease) => return Ok(lease),
                Found::Dial(dial) => dial.outcome.subscribe(),
                Found::Nothing => self.start(key, pod, scope).outcome.subscribe(),
            };
            match outcome
                .wait_for(Option::is_some)
                .await
                .map(|outcome| outcome.clone())
            {
                Ok(Some(Ok(tunnel))) if tunnel.has_room() => return Ok(tunnel.lease()),
                Ok(Some(Err(error))) => return Err(Failed::Final(error)),
                Ok(Some(Ok(tunnel))) if tunnel.closed.get() => {
                    let error = "the peer closed the tunnel at once";
                    return Err(Failed::Tunnel(TransportError::Handshake(error.into())));
                }
                // Others were quicker: look again.
                Ok(_) => {}
                // The pod is gone, and its scope has cut the dial.
                Err(_) => {
                    let gone = std::io::Error::from(std::io::ErrorKind::ConnectionAborted);
                    return Err(Failed::Final(TransportError::Connect(gone.into())));
                }
            }
        }
    }

    fn look(&self, key: &Key) -> Found {
        let mut ways = self.ways.borrow_mut();
        let Some(way) = ways.get_mut(key) else {
            return Found::Nothing;
        };
        way.tunnels.retain(|tunnel| !tunnel.is_over());
        let least = way.tunnels.iter().filter(|tunnel| tunnel.has_room());
        if let Some(tunnel) = least.min_by_key(|tunnel| tunnel.streams()) {
            return Found::Lease(Rc::clone(tunnel).lease());
        }
        let dial = (way.dials.iter()).find(|dial| dial.waiting.get() < CLIENT_STREAMS);
        if let Some(dial) = dial {
            dial.waiting.set(dial.waiting.get() + 1);
            return Found::Dial(Rc::clone(dial));
        }
        // Streams that a peer does not read must not lead to tunnels without end.
        if way.tunnels.len() >= TUNNELS {
            let least = way.tunnels.iter().filter(|tunnel| tunnel.may_carry());
            if let Some(tunnel) = least.min_by_key(|tunnel| tunnel.streams()) {
                return Found::Lease(Rc::clone(tunnel).lease());
            }
        }
        Found::Nothing
    }

    /// Dials in a task of its own: the one that asked first may go away while others wait.
    fn start(self: &Rc<Self>, key: &Key, pod: &Arc<LocalPod>, scope: &Scope) -> Rc<Dial> {
        let entry = Rc::new(Dial {
            waiting: Cell::new(1),
            outcome: watch::Sender::new(None),
        });
        self.ways
            .borrow_mut()
            .entry(key.clone())
            .or_default()
            .dials
            .push(Rc::clone(&entry));
        let guard = Dialling {
            pool: Rc::clone(self),
            key: key.clone(),
            entry: Rc::clone(&entry),
        };
        let (pod, in_scope) = (Arc::clone(pod), scope.clone());
        scope.spawn(async move {
            let means = &*guard.pool.means;
            let end = match guard.pool.place(&pod).await {
                Ok(place) => dial(means, &pod, &guard.key, place, &in_scope).await,
                Err(full) => Err(full.into()),
            };
            if let Ok(tunnel) = &end
                && let Some(way) = guard.pool.ways.borrow_mut().get_mut(&guard.key)
            {
                way.tunnels.push(Rc::clone(tunnel));
            }
            guard.entry.outcome.send_replace(Some(end));
        });
        entry
    }
}

enum Found {
    Lease(Lease),
    Dial(Rc<Dial>),
    Nothing,
}

/// Takes the dial off the list when it has ended or was cut.
struct Dialling {
    pool: Rc<Pool>,
    key: Key,
    entry: Rc<Dial>,
}

impl Drop for Dialling {
    fn drop(&mut self) {
        if let Some(way) = self.pool.ways.borrow_mut().get_mut(&self.key) {
            way.dials.retain(|dial| !Rc::ptr_eq(dial, &self.entry));
        }
        if self.entry.outcome.borrow().is_none() {
            let gone = std::io::Error::from(std::io::ErrorKind::ConnectionAborted);
            let end = Some(Err(TransportError::Connect(gone.into())));
            self.entry.outcome.send_replace(end);
        }
    }
}

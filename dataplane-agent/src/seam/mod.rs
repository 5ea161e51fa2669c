//! What the two halves of the agent say to each other. The half that knows the node (which pods are here,
//! the kernel's programs and maps) leases each captured pod to the half that carries its connections, and
//! says what happens to it; all that is said could go to another process.

pub mod borrow;
mod leases;
mod ledger;
pub mod lend;
mod packets;
mod proxy_lock;
mod settings;
mod stamp;
#[cfg(test)]
mod tests;
pub mod wire;

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, TcpListener};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use dataplane_ebpf::listener::ListenerKind;
use socket2::SockRef;
use tokio::sync::oneshot;

pub use self::leases::Leases;
pub use self::packets::SeamListener;
pub use self::proxy_lock::ProxyLock;
pub use self::settings::SharedSettings;
pub use self::stamp::Stamp;
use crate::mesh::Identity;
use crate::sys::netns::Netns;

/// How long a proxy may take to cut the connections of a pod, before it is not waited for any longer.
pub const CUT_TIMEOUT: Duration = Duration::from_secs(5);

/// Who serves the pods that a node lends.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Serving {
    /// The number of proxies that serve: they answer, have been lent all there is, and are not about to end.
    pub proxies: usize,
    /// The uids of the pods that each of these has refused.
    pub refused: Vec<Arc<str>>,
}

/// One enrolment of one pod. A pod that comes back under its name and uid is another one, and so is one
/// that is enrolled anew in its namespace: what is kept of a pod is kept by this, never by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Instance(u64);

impl Instance {
    /// The next one; no other enrolment on this machine has it, by whichever process.
    pub fn next() -> Self {
        static NEXT: OnceLock<AtomicU64> = OnceLock::new();
        let next = NEXT.get_or_init(|| {
            // Fewer pods are enrolled than nanoseconds pass.
            let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
            let now = now.map_or(0, |now| now.as_nanos());
            AtomicU64::new(u64::try_from(now).unwrap_or_default())
        });
        Self(next.fetch_add(1, Ordering::Relaxed))
    }
}

/// An enrolled pod, and what is lent to serve it: its network namespace, its listeners, and the stamp.
#[derive(Debug)]
pub struct Lease {
    /// This enrolment of it.
    pub instance: Instance,
    /// The workload's uid in the mesh.
    pub uid: Arc<str>,
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
    /// Who it is.
    pub identity: Identity,
    /// Its addresses now: those that the mesh knows it by, and all else that its namespace has besides
    /// those of loopback and of one link.
    pub addresses: Arc<[IpAddr]>,
    /// Its network namespace; every connection made for it is made there.
    pub netns: Netns,
    /// That namespace's cookie: what earlier enrolments of the same namespace still run is found by it.
    pub cookie: u64,
    /// Its listeners; the node has them too.
    pub listeners: Listeners,
    /// What the agent's own sockets in it are known by.
    pub stamp: Arc<Stamp>,
}

/// The listeners in a pod's network namespace; non-blocking, listening. Where there is IPv6 they
/// take both families, and show IPv4 addresses as IPv6 ones (`::ffff:a.b.c.d`).
#[derive(Debug)]
pub struct Listeners([TcpListener; ListenerKind::COUNT]);

impl Listeners {
    /// Makes one of each kind.
    ///
    /// # Errors
    /// The first that cannot be made.
    pub fn make<E>(make: impl FnMut(ListenerKind) -> Result<TcpListener, E>) -> Result<Self, E> {
        let all: Vec<_> = ListenerKind::ALL
            .into_iter()
            .map(make)
            .collect::<Result<_, E>>()?;
        Ok(Self(all.try_into().expect("one of each kind")))
    }

    /// Returns that of a kind.
    pub fn of(&self, kind: ListenerKind) -> &TcpListener {
        &self.0[kind as usize]
    }

    /// Returns each with its kind, in the order of the kinds.
    pub fn iter(&self) -> impl Iterator<Item = (ListenerKind, &TcpListener)> {
        ListenerKind::ALL.into_iter().zip(&self.0)
    }

    /// Gives each away with its kind, in the order of the kinds.
    pub fn into_each(self) -> impl Iterator<Item = (ListenerKind, TcpListener)> {
        ListenerKind::ALL.into_iter().zip(self.0)
    }

    /// The same sockets, held by others too.
    ///
    /// # Errors
    /// There are no descriptors left.
    pub fn share(&self) -> io::Result<Self> {
        Self::make(|kind| self.of(kind).try_clone())
    }

    /// The ports that they listen on, in the order of the kinds.
    pub fn ports(&self) -> [u16; ListenerKind::COUNT] {
        self.0
            .each_ref()
            .map(|listener| listener.local_addr().map_or(0, |address| address.port()))
    }

    /// Whether all of them listen: who may administer the pod's network can end a socket in it.
    pub fn alive(&self) -> bool {
        self.0
            .iter()
            .all(|listener| SockRef::from(listener).is_listener().unwrap_or(false))
    }
}

/// What happens to the set of enrolled pods, in order. Two of one name may be among them: one drains,
/// and its successor is up.
#[derive(Debug)]
pub enum PodEvent {
    /// Serve this pod from now on.
    Up(Box<Lease>),
    /// It has these addresses now.
    Addresses(Instance, Arc<[IpAddr]>),
    /// No longer in the mesh: take what is still in the accept queues, open no new tunnel streams
    /// (GOAWAY), let what runs go on. Answered when nothing runs any more, and nothing is accepted until it is
    /// revived.
    Drain(Instance, oneshot::Sender<()>),
    /// The same of what still runs in the network namespace with this cookie, which an earlier node process has leased
    /// and this one has not.
    DrainUnleased(u64, oneshot::Sender<()>),
    /// It was draining and is enrolled again: the same listeners serve on.
    Revive(Instance),
    /// Cut what still runs, and drop everything of the pod; answered when that is done.
    Down(Instance, oneshot::Sender<()>),
    /// Cut what still runs in the network namespace with this cookie, which an earlier node process has leased
    /// and this one has not; answered when that is done.
    Clear(u64, oneshot::Sender<()>),
    /// Each pod that was captured when the node process began, and is to stay so, has been leased, or could not
    /// be enrolled; but for those in the network namespaces with these cookies, which are not decided yet, or drain.
    Snapshot(BTreeSet<u64>),
}

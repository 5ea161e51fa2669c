//! The node's end between two processes: lends each pod to whoever connects, and tells what happens to it.
//! The node keeps the listeners, so that nothing is refused while nobody serves: connections wait in them.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use prost::Message;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::packets::{Channel, Packet, SeamListener};
use super::wire::{
    self, Add, Addresses, Empty, Hello, NodeMessage, PodRef, ProxyMessage, Request, Response,
    VERSION, Welcome, WorkloadInfo,
};
use super::{Instance, Lease, PodEvent, Stamp};
use crate::drain::CompletionGuard;

/// The longest time that a proxy may take to send its hello, or to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// The pause after a proxy could not be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The pods that are lent, and the proxies that have them.
pub struct Lender {
    node: String,
    stamp: Arc<Stamp>,
    leased: BTreeMap<Instance, Leased>,
    proxies: Vec<Proxy>,
    /// The number of proxies that serve and are not leaving.
    serving: watch::Sender<usize>,
    /// Told when one is about to leave.
    leaving: Rc<Notify>,
}

struct Leased {
    lease: Lease,
    /// `true` if nothing new is to be opened for it.
    drains: bool,
}

/// A proxy, and the pods that it was lent.
struct Proxy {
    outbox: mpsc::UnboundedSender<QueuedMessage>,
    has: BTreeSet<Instance>,
    /// `true` if it accepts nothing any more.
    leaves: Rc<Cell<bool>>,
}

/// A message that waits to be sent to a proxy.
#[derive(Default)]
struct QueuedMessage {
    said: Option<NodeMessage>,
    descriptors: Vec<OwnedFd>,
    /// Dropped when the request has been done, or cannot be any more.
    done: Option<CompletionGuard>,
    /// Dropped when no connection of the draining pod runs any more.
    idle: Option<(Instance, CompletionGuard)>,
}

impl Lender {
    /// Returns a lender without pods, and a receiver of the number of proxies that serve.
    pub fn new(node: &str, stamp: Arc<Stamp>) -> (Self, watch::Receiver<usize>) {
        let (serving, told) = watch::channel(0);
        let new = Self {
            node: node.to_owned(),
            stamp,
            leased: BTreeMap::new(),
            proxies: Vec::new(),
            serving,
            leaving: Rc::default(),
        };
        (new, told)
    }

    /// Lends what `events` say to all that connect, until there are no more events.
    pub async fn run(mut self, entry: SeamListener, mut events: mpsc::Receiver<PodEvent>) {
        let mut conversations = FuturesUnordered::new();
        loop {
            tokio::select! {
                event = events.recv() => match event {
                    Some(event) => self.apply(event),
                    None => return,
                },
                came = entry.accept() => match came.and_then(|channel| Ok((channel, self.welcome()?))) {
                    Ok((channel, (outbox, leaves))) => {
                        let leaving = Rc::clone(&self.leaving);
                        let leave = move || {
                            leaves.set(true);
                            leaving.notify_one();
                        };
                        conversations.push(converse(channel, outbox, leave));
                    }
                    Err(error) => {
                        tracing::warn!(%error, "who came to serve pods is not let in");
                        sleep(ACCEPT_PAUSE).await;
                    }
                },
                Some(()) = conversations.next() => {
                    self.proxies.retain(|proxy| !proxy.outbox.is_closed());
                }
                () = self.leaving.notified() => {}
            }
            let serve = self.proxies.iter().filter(|proxy| !proxy.leaves.get());
            let serve = serve.count();
            self.serving.send_if_modified(|old| {
                let changed = *old != serve;
                *old = serve;
                changed
            });
        }
    }

    /// Queues the welcome and all pods that do not drain for a new proxy.
    fn welcome(&mut self) -> io::Result<(mpsc::UnboundedReceiver<QueuedMessage>, Rc<Cell<bool>>)> {
        let (outbox, inbox) = mpsc::unbounded_channel();
        let mut proxy = Proxy {
            outbox,
            has: BTreeSet::new(),
            leaves: Rc::default(),
        };
        let welcome = Welcome {
            lease: VERSION,
            node: self.node.clone(),
        };
        proxy.send(QueuedMessage {
            said: Some(NodeMessage::Welcome(welcome)),
            descriptors: copies(self.stamp.descriptor())?,
            ..QueuedMessage::default()
        });
        for leased in self.leased.values().filter(|leased| !leased.drains) {
            proxy.add(&leased.lease)?;
        }
        proxy.say(NodeMessage::SnapshotSent(Empty {}));
        let leaves = Rc::clone(&proxy.leaves);
        self.proxies.push(proxy);
        Ok((inbox, leaves))
    }

    fn apply(&mut self, event: PodEvent) {
        match event {
            PodEvent::Up(lease) => {
                self.add(&lease);
                let leased = Leased {
                    lease: *lease,
                    drains: false,
                };
                self.leased.insert(leased.lease.instance, leased);
            }
            PodEvent::Addresses(instance, addresses) => {
                let said = NodeMessage::Addresses(Addresses {
                    instance: instance.0,
                    addresses: addresses.iter().map(wire::bytes).collect(),
                });
                for proxy in self.holders(instance) {
                    proxy.say(said.clone());
                }
                if let Some(leased) = self.leased.get_mut(&instance) {
                    leased.lease.addresses = addresses;
                }
            }
            PodEvent::Drain(instance, told) => {
                let (guard, of) = (CompletionGuard::new(told), self.of(instance));
                if let Some(leased) = self.leased.get_mut(&instance) {
                    leased.drains = true;
                }
                for proxy in self.holders(instance) {
                    proxy.send(QueuedMessage {
                        said: Some(NodeMessage::Drain(of.clone())),
                        idle: Some((instance, guard.clone())),
                        ..QueuedMessage::default()
                    });
                }
            }
            PodEvent::Revive(instance) => {
                let of = self.of(instance);
                for proxy in self.holders(instance) {
                    proxy.say(NodeMessage::Revive(of.clone()));
                }
                // Who has come meanwhile was not lent it.
                if let Some(mut leased) = self.leased.remove(&instance) {
                    leased.drains = false;
                    self.add(&leased.lease);
                    self.leased.insert(instance, leased);
                }
            }
            PodEvent::Down(instance, told) => self.take_back(instance, told),
        }
    }

    /// Takes a pod back from all that have it; `told` hears when they have given it.
    fn take_back(&mut self, instance: Instance, told: oneshot::Sender<()>) {
        let (guard, of) = (CompletionGuard::new(told), self.of(instance));
        for proxy in self.holders(instance) {
            proxy.has.remove(&instance);
            proxy.send(QueuedMessage {
                said: Some(NodeMessage::Del(of.clone())),
                done: Some(guard.clone()),
                ..QueuedMessage::default()
            });
        }
        self.leased.remove(&instance);
    }

    /// Lends a pod to all that do not have it.
    fn add(&mut self, lease: &Lease) {
        // To which it cannot be lent is let go, and comes again.
        self.proxies.retain_mut(|proxy| match proxy.add(lease) {
            Ok(()) => true,
            Err(error) => {
                tracing::error!(pod = %lease.name, %error, "a pod cannot be lent");
                false
            }
        });
    }

    fn holders(&mut self, instance: Instance) -> impl Iterator<Item = &mut Proxy> {
        let proxies = self.proxies.iter_mut();
        proxies.filter(move |proxy| proxy.has.contains(&instance))
    }

    fn of(&self, instance: Instance) -> PodRef {
        let leased = self.leased.get(&instance);
        PodRef {
            uid: leased.map_or_else(String::new, |leased| leased.lease.uid.to_string()),
            instance: instance.0,
        }
    }
}

impl Proxy {
    fn send(&self, message: QueuedMessage) {
        // One that is gone is noticed as its conversation ends.
        let _ = self.outbox.send(message);
    }

    fn say(&self, said: NodeMessage) {
        self.send(QueuedMessage {
            said: Some(said),
            ..QueuedMessage::default()
        });
    }

    /// Lends it a pod, unless it has it.
    fn add(&mut self, lease: &Lease) -> io::Result<()> {
        if self.leaves.get() || self.has.contains(&lease.instance) {
            return Ok(());
        }
        let add = Add {
            uid: lease.uid.to_string(),
            workload_info: Some(WorkloadInfo {
                name: lease.name.to_string(),
                namespace: lease.namespace.to_string(),
                service_account: lease.identity.service_account().to_owned(),
            }),
            instance: lease.instance.0,
            addresses: lease.addresses.iter().map(wire::bytes).collect(),
            trust_domain: lease.identity.trust_domain().to_owned(),
        };
        let listeners = &lease.listeners;
        let lent = [
            lease.netns.as_fd(),
            listeners.outbound.as_fd(),
            listeners.inbound.as_fd(),
            listeners.hbone.as_fd(),
        ];
        self.send(QueuedMessage {
            said: Some(NodeMessage::Add(add)),
            descriptors: copies(lent)?,
            ..QueuedMessage::default()
        });
        self.has.insert(lease.instance);
        Ok(())
    }
}

fn copies<'a>(of: impl IntoIterator<Item = BorrowedFd<'a>>) -> io::Result<Vec<OwnedFd>> {
    let copies = of.into_iter().map(|one| one.try_clone_to_owned());
    copies.collect()
}

/// Sends queued messages to a proxy, each after the last was answered, until it is gone.
async fn converse(
    channel: Channel,
    outbox: mpsc::UnboundedReceiver<QueuedMessage>,
    leave: impl Fn(),
) {
    match talk(&channel, outbox, leave).await {
        Ok(()) => tracing::info!("a proxy has gone"),
        Err(error) => tracing::warn!(%error, "a proxy is let go; it may come again"),
    }
}

async fn talk(
    channel: &Channel,
    mut outbox: mpsc::UnboundedReceiver<QueuedMessage>,
    leave: impl Fn(),
) -> io::Result<()> {
    let hello = timeout(ANSWER_TIMEOUT, channel.receive()).await;
    let hello = hello.map_err(|_| late("it does not say hello"))??;
    let hello = match hello {
        Some(packet) => Hello::decode(&*packet.bytes).map_err(io::Error::other)?,
        None => return Ok(()),
    };
    if hello.lease != VERSION {
        let what = format!(
            "it speaks version {} of the seam, and this node version {VERSION}: run both of one release",
            hello.lease
        );
        return Err(io::Error::new(io::ErrorKind::Unsupported, what));
    }
    tracing::info!("a proxy serves");
    // The deadline for the answer to the last message, and the guard that is dropped then.
    let mut waits: Option<(Instant, Option<CompletionGuard>)> = None;
    let mut idle: BTreeMap<u64, CompletionGuard> = BTreeMap::new();
    loop {
        let until = waits.as_ref().map(|(until, _)| *until);
        tokio::select! {
            message = outbox.recv(), if waits.is_none() => {
                let Some(message) = message else { return Ok(()) };
                if let Some(NodeMessage::Revive(of)) = &message.said {
                    idle.remove(&of.instance);
                }
                idle.extend(message.idle.map(|(instance, guard)| (instance.0, guard)));
                let lent: Vec<BorrowedFd<'_>> = message.descriptors.iter().map(AsFd::as_fd).collect();
                channel.send(&Request { said: message.said }.encode_to_vec(), &lent)?;
                waits = Some((Instant::now() + ANSWER_TIMEOUT, message.done));
            }
            packet = channel.receive() => {
                let Some(Packet { bytes, .. }) = packet? else { return Ok(()) };
                match Response::decode(&*bytes).map_err(io::Error::other)?.told {
                    Some(ProxyMessage::Ack(ack)) => {
                        if waits.take().is_none() {
                            return Err(io::Error::other("it answers what was not asked"));
                        }
                        if !ack.error.is_empty() {
                            return Err(io::Error::other(ack.error));
                        }
                    }
                    Some(ProxyMessage::Idle(of)) => {
                        idle.remove(&of.instance);
                    }
                    Some(ProxyMessage::Leaving(_)) => leave(),
                    None => return Err(io::Error::other("it says a word that is not known")),
                }
            }
            () = at(until) => return Err(late("it does not answer")),
        }
    }
}

fn late(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, what)
}

async fn at(until: Option<Instant>) {
    match until {
        Some(until) => sleep_until(until).await,
        None => std::future::pending().await,
    }
}

//! The end of who serves pods, between two processes: connects to the node, and hands on what it says of the
//! pods that it lends. Where the node is gone what is served goes on, and who serves comes again; a pod that
//! is not lent any more then is let go once nothing runs of it.

use std::collections::BTreeSet;
use std::io;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::LocalBoxFuture;
use futures_util::stream::FuturesUnordered;
use prost::Message;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::packets::{Channel, Packet};
use super::wire::{
    self, Ack, Add, Empty, Hello, NodeMessage, PodRef, ProxyMessage, Request, Response, VERSION,
};
use super::{Instance, Lease, Listeners, PodEvent, Stamp};
use crate::mesh::Identity;
use crate::sys::netns::Netns;

/// How long after the first failure the node is tried again,
const FIRST_RETRY: Duration = Duration::from_millis(10);
/// and after twice as long each time that it fails again, up to this.
const LONGEST_RETRY: Duration = Duration::from_secs(1);

/// What is borrowed.
pub struct Borrower {
    path: PathBuf,
    events: mpsc::Sender<PodEvent>,
    /// Says that nothing new is accepted any more.
    leaving: CancellationToken,
    held: BTreeSet<Instance>,
    /// Whether a node has lent all its pods.
    lent: watch::Sender<bool>,
    draining: FuturesUnordered<LocalBoxFuture<'static, Drained>>,
}

/// Nothing runs of a pod any more.
struct Drained {
    instance: Instance,
    /// Whether no node lends it any more.
    lost: bool,
}

/// What one node has said since it was connected to.
#[derive(Default)]
struct Conversation {
    stamp: Option<Arc<Stamp>>,
    /// What it has lent before it had lent all; none once it has.
    listed: Option<BTreeSet<Instance>>,
}

impl Borrower {
    /// From the node that listens there; `events` hears of its pods. `leaving`: nothing new is accepted any
    /// more.
    pub fn new(path: PathBuf, events: mpsc::Sender<PodEvent>, leaving: CancellationToken) -> Self {
        Self {
            path,
            events,
            leaving,
            held: BTreeSet::new(),
            lent: watch::Sender::default(),
            draining: FuturesUnordered::new(),
        }
    }

    /// Returns whether a node has lent all its pods since the start.
    pub fn lent(&self) -> watch::Receiver<bool> {
        self.lent.subscribe()
    }

    /// Serves what the node lends, and comes again when it is gone. Returns when nobody hears of it any more.
    pub async fn run(mut self) {
        let (mut wait, mut told) = (FIRST_RETRY, false);
        while !self.events.is_closed() {
            match Channel::connect(&self.path) {
                Ok(channel) => {
                    let end = self.converse(&channel).await;
                    let error = end.err().map(|error| error.to_string());
                    tracing::warn!(error, "the node is gone; what runs goes on");
                    (wait, told) = (FIRST_RETRY, false);
                }
                Err(error) => {
                    if !told {
                        tracing::warn!(path = %self.path.display(), %error, "the node cannot be reached; it is tried again");
                    }
                    told = true;
                }
            }
            tokio::select! {
                () = sleep(wait) => {}
                Some(drained) = self.draining.next() => self.after_drain(&drained).await,
            }
            wait = LONGEST_RETRY.min(wait * 2);
        }
    }

    async fn converse(&mut self, channel: &Channel) -> io::Result<()> {
        let hello = Hello {
            version: 1,
            lease: VERSION,
        };
        channel.send(&hello.encode_to_vec(), &[])?;
        let mut conversation = Conversation {
            listed: Some(BTreeSet::new()),
            ..Conversation::default()
        };
        let mut leaves = false;
        loop {
            let told = tokio::select! {
                () = self.leaving.cancelled(), if !leaves => {
                    leaves = true;
                    ProxyMessage::Leaving(Empty {})
                }
                packet = channel.receive() => {
                    let Some(packet) = packet? else { return Ok(()) };
                    let done = self.handle(packet, &mut conversation).await;
                    let error = done.err().map_or_else(String::new, |error| error.to_string());
                    ProxyMessage::Ack(Ack { error })
                }
                Some(drained) = self.draining.next() => {
                    self.after_drain(&drained).await;
                    let (uid, instance) = (String::new(), drained.instance.0);
                    ProxyMessage::Idle(PodRef { uid, instance })
                }
            };
            let failed = match &told {
                ProxyMessage::Ack(ack) if !ack.error.is_empty() => {
                    Some(io::Error::other(ack.error.clone()))
                }
                _ => None,
            };
            channel.send(&Response { told: Some(told) }.encode_to_vec(), &[])?;
            if let Some(error) = failed {
                return Err(error);
            }
        }
    }

    /// Does what a node says.
    ///
    /// # Errors
    /// It cannot be: it says what no node of this version does.
    async fn handle(&mut self, packet: Packet, conversation: &mut Conversation) -> io::Result<()> {
        let Packet { bytes, descriptors } = packet;
        let said = Request::decode(&*bytes).map_err(io::Error::other)?.said;
        match said.ok_or_else(|| wrong("a word that is not known"))? {
            NodeMessage::Welcome(welcome) => {
                if welcome.lease != VERSION {
                    return Err(wrong("another version of the seam"));
                }
                let mut lent = descriptors.into_iter();
                let stamp = lent.next().map(Stamp::of).transpose()?;
                conversation.stamp = Some(Arc::new(stamp.unwrap_or_default()));
                tracing::info!(node = welcome.node, "serves the pods of the node");
            }
            NodeMessage::Add(add) => {
                let stamp = conversation.stamp.clone();
                let stamp = stamp.ok_or_else(|| wrong("a pod before its welcome"))?;
                let lease = lease(add, descriptors, stamp)?;
                let instance = lease.instance;
                conversation
                    .listed
                    .as_mut()
                    .map(|listed| listed.insert(instance));
                if self.leaving.is_cancelled() {
                    return Ok(()); // it is another's to serve
                }
                match self.held.insert(instance) {
                    true => self.tell(PodEvent::Up(Box::new(lease))).await,
                    false => {
                        self.tell(PodEvent::Addresses(instance, lease.addresses))
                            .await;
                    }
                }
            }
            NodeMessage::SnapshotSent(_) => {
                let listed = conversation.listed.take();
                let listed = listed.ok_or_else(|| wrong("its snapshot twice"))?;
                let lost: Vec<Instance> = self.held.difference(&listed).copied().collect();
                for instance in lost {
                    self.drain(instance, true).await;
                }
                self.lent.send_replace(true);
                tracing::info!(pods = self.held.len(), "all pods of the node are lent");
            }
            NodeMessage::Addresses(of) => {
                let instance = Instance(of.instance);
                if self.held.contains(&instance) {
                    let addresses = addresses(&of.addresses)?;
                    self.tell(PodEvent::Addresses(instance, addresses)).await;
                }
            }
            NodeMessage::Drain(of) => self.drain(Instance(of.instance), false).await,
            NodeMessage::Revive(of) => {
                if self.held.contains(&Instance(of.instance)) {
                    self.tell(PodEvent::Revive(Instance(of.instance))).await;
                }
            }
            NodeMessage::Del(of) => self.give_back(Instance(of.instance)).await,
        }
        Ok(())
    }

    async fn drain(&mut self, instance: Instance, lost: bool) {
        let (told, idle) = oneshot::channel();
        if self.held.contains(&instance) {
            self.tell(PodEvent::Drain(instance, told)).await;
        }
        self.draining.push(Box::pin(async move {
            // Who hears of nothing runs nothing.
            let _ = idle.await;
            Drained { instance, lost }
        }));
    }

    async fn after_drain(&mut self, drained: &Drained) {
        if drained.lost {
            self.give_back(drained.instance).await;
        }
    }

    /// Cuts what runs of a pod, and keeps nothing of it.
    async fn give_back(&mut self, instance: Instance) {
        if self.held.remove(&instance) {
            let (told, done) = oneshot::channel();
            self.tell(PodEvent::Down(instance, told)).await;
            let _ = done.await;
        }
    }

    async fn tell(&self, event: PodEvent) {
        // Who does not hear any more ends, and all of this with it.
        let _ = self.events.send(event).await;
    }
}

/// A pod, as it was lent.
fn lease(add: Add, descriptors: Vec<OwnedFd>, stamp: Arc<Stamp>) -> io::Result<Lease> {
    let who = add
        .workload_info
        .ok_or_else(|| wrong("a pod that is nobody"))?;
    let lent = <[OwnedFd; 4]>::try_from(descriptors);
    let [netns, outbound, inbound, hbone] = lent.map_err(|_| wrong("a pod with too little"))?;
    let listeners = Listeners {
        outbound: TcpListener::from(outbound),
        inbound: TcpListener::from(inbound),
        hbone: TcpListener::from(hbone),
    };
    if !listeners.alive() {
        return Err(wrong("a pod without listeners"));
    }
    let identity = Identity::new(&add.trust_domain, &who.namespace, &who.service_account);
    Ok(Lease {
        instance: Instance(add.instance),
        uid: add.uid.into(),
        namespace: who.namespace.into(),
        name: who.name.into(),
        identity,
        addresses: addresses(&add.addresses)?,
        netns: Netns::of(netns)?.ok_or_else(|| wrong("a pod without its namespace"))?,
        listeners,
        stamp,
    })
}

fn addresses(all: &[Vec<u8>]) -> io::Result<Arc<[std::net::IpAddr]>> {
    let one = |bytes: &Vec<u8>| wire::address(bytes).ok_or_else(|| wrong("no address"));
    all.iter().map(one).collect()
}

fn wrong(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the node says {what}"))
}

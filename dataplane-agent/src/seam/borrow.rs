//! The proxy's end between two processes: connects to the node, and hands on what it says of the pods that it
//! lends.
//!
//! While the node is gone, its pods are served as before. What the next node process lends replaces what its
//! predecessor lent in the same network namespace: the old connections go on, and then the old listeners are
//! closed. If the pod is another one now, or has another identity, its old connections are cut first. Pods that
//! the next node process does not lend are cut: they may no longer be captured, and then no packet of theirs
//! arrives here.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use dataplane_ebpf::listener::ListenerKind;
use futures_util::StreamExt;
use futures_util::future::LocalBoxFuture;
use futures_util::stream::FuturesUnordered;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::packets::{Channel, Packet};
use super::wire::{self, Ack, Add, Empty, Hello, NodeMessage, PodRef, ProxyMessage, VERSION};
use super::{Instance, Lease, Listeners, PodEvent, SharedSettings, Stamp};
use crate::mesh::Identity;
use crate::mesh::workload::named;
use crate::sys::netns::Netns;

/// How long after the first failure the node is tried again,
const FIRST_RETRY: Duration = Duration::from_millis(10);
/// and after twice as long each time that it fails again, up to this.
pub(super) const LONGEST_RETRY: Duration = Duration::from_secs(1);
/// How long replaced listeners are served as before, so that handshakes in progress can finish.
const LINGER: Duration = Duration::from_secs(1);

/// For how long at most pods wait, all together, for the configuration of this proxy to say what the node's does.
const CATCH_UP: Duration = Duration::from_secs(2);
/// How often it is looked whether it does.
const LOOK: Duration = Duration::from_millis(20);

/// Why a pod is refused of which this proxy may not know the policies.
const NOT_KNOWN: &str = "what this proxy has read of the configuration does not have it in the mesh, or as somebody else";
/// Why a pod is refused whose descriptors have not come.
const NO_ROOM: &str = "this process may not have more open files";

/// What the node has lent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Lent {
    /// Not all of its pods yet.
    #[default]
    NotAll,
    /// All of its pods.
    All,
    /// All of its pods, of which this proxy cannot serve some: which, and why.
    AllBut(Vec<String>),
    /// Nothing, for this reason: the node and this proxy cannot work together.
    Refused(String),
}

/// Tells whether a pod, by its uid and identity, is known.
pub type Knows = dyn Fn(&str, &Identity) -> bool;

/// What is borrowed.
pub struct Borrower {
    path: PathBuf,
    /// This proxy's own settings.
    settings: SharedSettings,
    /// Whether the configuration, as this proxy has read it, has the pod of this uid in the mesh with this identity.
    knows: Box<Knows>,
    events: mpsc::Sender<PodEvent>,
    /// Says that nothing new is accepted any more.
    leaving: CancellationToken,
    held: BTreeMap<Instance, Held>,
    lent: watch::Sender<Lent>,
    /// The pods that it cannot serve, by their network namespaces, and why.
    refused: BTreeMap<u64, String>,
    later: FuturesUnordered<LocalBoxFuture<'static, Later>>,
    /// The number of drains that were begun.
    drains: u64,
}

/// An enrolment that is served, of this or an earlier node process.
struct Held {
    /// The cookie of its network namespace.
    netns: u64,
    uid: Arc<str>,
    identity: Identity,
    /// Whether a later enrolment has replaced it: it is given back when it has no connections left.
    replaced: bool,
    stage: Stage,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Serving,
    /// With the number of its drain: one that was cancelled says nothing about the next.
    Draining(u64),
    /// Draining, with no connections left. None is accepted until it is revived, so it stays idle.
    Idle,
}

/// Something that is due for an enrolment.
enum Later {
    /// It was replaced, and its listeners have lingered.
    Lingered(Instance),
    /// The drain of this number has found no connections left.
    Idle(Instance, u64),
}

/// What one node process has said since it was connected to.
struct Conversation {
    /// Its process ID.
    pid: i32,
    stamp: Option<Arc<Stamp>>,
    /// The network namespaces that it has named before [`NodeMessage::SnapshotSent`]; none after it.
    named: Option<BTreeSet<u64>>,
    /// The network namespaces for which it waits for [`ProxyMessage::Idle`].
    awaited: BTreeSet<u64>,
    /// For how long pods may wait until they are known.
    patience: Duration,
}

impl Borrower {
    /// From the node that listens there and has the same `settings`; `events` hears of its pods. `knows`: whether the
    /// configuration has a pod as the node has it. `leaving`: nothing new is accepted any more.
    pub fn new(
        path: PathBuf,
        settings: SharedSettings,
        knows: Box<Knows>,
        events: mpsc::Sender<PodEvent>,
        leaving: CancellationToken,
    ) -> Self {
        Self {
            path,
            settings,
            knows,
            events,
            leaving,
            held: BTreeMap::new(),
            lent: watch::Sender::default(),
            refused: BTreeMap::new(),
            later: FuturesUnordered::new(),
            drains: 0,
        }
    }

    /// Returns what the node has lent. Where it is gone, that is what it had lent.
    pub fn lent(&self) -> watch::Receiver<Lent> {
        self.lent.subscribe()
    }

    /// Serves what the node lends, and comes again when it is gone. Returns when nobody hears of it any more.
    pub async fn run(mut self) {
        let (mut wait, mut told) = (FIRST_RETRY, None::<String>);
        let path = self.path.display().to_string();
        while !self.events.is_closed() {
            match Channel::connect(&self.path) {
                Ok(channel) => {
                    let pid = channel.pid();
                    let mut conversation = Conversation::with(pid);
                    let end = self.converse(&channel, &mut conversation).await;
                    let error = end.err().map(|error| error.to_string());
                    if conversation.stamp.is_some() {
                        tracing::warn!(pid, error, "the node is gone; what runs goes on");
                        (wait, told) = (FIRST_RETRY, None);
                    } else {
                        if let Some(error) = &error {
                            self.lent.send_replace(Lent::Refused(error.clone()));
                        }
                        let error = error.unwrap_or_default();
                        if told.as_ref() != Some(&error) {
                            tracing::warn!(
                                path,
                                pid,
                                error,
                                "nothing is borrowed of the node; it is tried again"
                            );
                        }
                        told = Some(error);
                    }
                }
                Err(error) => {
                    self.lent.send_if_modified(|lent| {
                        let refused = matches!(lent, Lent::Refused(_));
                        if refused {
                            *lent = Lent::NotAll;
                        }
                        refused
                    });
                    let error = error.to_string();
                    if told.as_ref() != Some(&error) {
                        tracing::warn!(
                            path,
                            error,
                            "the node cannot be reached; it is tried again"
                        );
                    }
                    told = Some(error);
                }
            }
            tokio::select! {
                () = sleep(wait) => {}
                Some(later) = self.later.next() => self.do_later(later).await,
            }
            wait = LONGEST_RETRY.min(wait * 2);
        }
    }

    async fn converse(
        &mut self,
        channel: &Channel,
        conversation: &mut Conversation,
    ) -> io::Result<()> {
        let hello = Hello {
            version: 1,
            lease: VERSION,
        };
        channel.send(&hello.packet(), &[])?;
        let say = |told: ProxyMessage| channel.send(&told.packet(), &[]);
        let mut leaves = false;
        loop {
            tokio::select! {
                () = self.leaving.cancelled(), if !leaves => {
                    leaves = true;
                    say(ProxyMessage::Leaving(Empty {}))?;
                }
                packet = channel.receive() => {
                    let Some(packet) = packet? else { return Ok(()) };
                    match self.handle(packet, conversation).await {
                        Ok(ack) => say(ProxyMessage::Ack(ack))?,
                        Err(error) => {
                            say(ProxyMessage::Ack(Ack { error: error.to_string() }))?;
                            return Err(error);
                        }
                    }
                }
                Some(later) = self.later.next() => self.do_later(later).await,
            }
            for netns in self.take_idle(&mut conversation.awaited) {
                let uid = String::new();
                say(ProxyMessage::Idle(PodRef { uid, netns }))?;
            }
        }
    }

    /// Does what the node says; the answer may be that one pod cannot be served.
    ///
    /// # Errors
    /// It says what no node of this version does.
    async fn handle(&mut self, packet: Packet, conversation: &mut Conversation) -> io::Result<Ack> {
        let pid = conversation.pid;
        let Packet { bytes, descriptors } = packet;
        match NodeMessage::read(&bytes)? {
            NodeMessage::Welcome(welcome) => {
                if welcome.lease != VERSION {
                    self.retire();
                    let what = format!(
                        "the node speaks version {} of the seam, and this proxy version {VERSION}: run both of one release",
                        welcome.lease
                    );
                    return Err(io::Error::new(io::ErrorKind::Unsupported, what));
                }
                let node = welcome.node.clone();
                let theirs = SharedSettings::said(welcome);
                if let Some(differ) = self.settings.difference(&theirs) {
                    self.retire();
                    let what = format!(
                        "node {node} (pid {pid}) was started with {}, and its proxy (pid {}) with {}: start one of them anew",
                        differ.node,
                        std::process::id(),
                        differ.proxy
                    );
                    return Err(io::Error::new(io::ErrorKind::Unsupported, what));
                }
                let lent = descriptors.ok_or_else(|| io::Error::other(NO_ROOM))?;
                let mut lent = lent.into_iter();
                let stamp = lent.next().map(Stamp::of).transpose()?;
                conversation.stamp = Some(Arc::new(stamp.unwrap_or_default()));
                self.refused.clear();
                tracing::info!(pid, node, "serves the pods of the node");
            }
            NodeMessage::Add(add) => {
                let stamp = conversation.stamp.clone();
                let stamp = stamp.ok_or_else(|| wrong("a pod before its welcome"))?;
                let (netns, identity) = (add.netns, add.identity()?);
                conversation.name(netns);
                conversation.awaited.remove(&netns);
                let whose = named(&add.uid).to_owned();
                // No connection goes on under an identity that the pod no longer has.
                let is_other = |held: &Held| *held.uid != *add.uid || held.identity != identity;
                self.give_back(|held| held.netns == netns && is_other(held))
                    .await;
                let taken = match descriptors {
                    Some(descriptors) => {
                        let lease = lease(add, identity, descriptors, stamp)?;
                        self.take(Box::new(lease), &mut conversation.patience).await
                    }
                    None => Err(NO_ROOM),
                };
                let error = taken.err().unwrap_or_default();
                match error.is_empty() {
                    true => self.refused.remove(&netns),
                    false => self.refused.insert(netns, format!("Pod {whose}: {error}")),
                };
                self.tell_lent(conversation);
                let error = error.to_owned();
                return Ok(Ack { error });
            }
            NodeMessage::SnapshotSent(of) => {
                let named = conversation.named.take();
                let mut named = named.ok_or_else(|| wrong("its snapshot twice"))?;
                let (pods, undecided) = (named.len(), of.undecided.len());
                named.extend(of.undecided);
                self.give_back(|held| !named.contains(&held.netns)).await;
                self.tell_lent(conversation);
                tracing::info!(pid, pods, undecided, "all pods of the node are lent");
            }
            NodeMessage::Addresses(of) => {
                let addresses = wire::addresses(&of.addresses)?;
                if let Some(instance) = self.current(of.netns) {
                    self.tell(PodEvent::Addresses(instance, addresses)).await;
                }
            }
            NodeMessage::Drain(of) => {
                conversation.name(of.netns);
                conversation.awaited.insert(of.netns);
                for instance in self.instances(|held| held.netns == of.netns) {
                    self.drain(instance).await;
                }
            }
            NodeMessage::Revive(of) => {
                conversation.awaited.remove(&of.netns);
                if let Some(instance) = self.current(of.netns) {
                    self.revive(instance).await;
                }
            }
            NodeMessage::Del(of) => {
                conversation.awaited.remove(&of.netns);
                self.give_back(|held| held.netns == of.netns).await;
                self.refused.remove(&of.netns);
                self.tell_lent(conversation);
            }
        }
        Ok(Ack::default())
    }

    /// Tells what the node has lent, once it has said that this is all.
    fn tell_lent(&self, conversation: &Conversation) {
        if conversation.named.is_none() {
            let refused: Vec<String> = self.refused.values().cloned().collect();
            self.lent.send_replace(match refused.is_empty() {
                true => Lent::All,
                false => Lent::AllBut(refused),
            });
        }
    }

    /// Serves a pod that is lent.
    ///
    /// # Errors
    /// It cannot be served.
    async fn take(
        &mut self,
        lease: Box<Lease>,
        patience: &mut Duration,
    ) -> Result<(), &'static str> {
        let (instance, netns) = (lease.instance, lease.cookie);
        let (uid, identity) = (Arc::clone(&lease.uid), lease.identity.clone());
        if self.leaving.is_cancelled() {
            return Ok(()); // another proxy serves it; connections go on here
        }
        if self.held.contains_key(&instance) {
            self.revive(instance).await;
            self.tell(PodEvent::Addresses(instance, lease.addresses))
                .await;
            return Ok(());
        }
        if !self.waits_until_known(&lease, patience).await {
            return Err(NOT_KNOWN);
        }
        if !lease.listeners.alive() {
            // Whoever may administer the pod's network can end a socket in it. The node makes others.
            return Err("a listener of it does not listen any more");
        }
        let before = self.current(netns);
        self.tell(PodEvent::Up(lease)).await;
        let held = Held {
            netns,
            uid,
            identity,
            replaced: false,
            stage: Stage::Serving,
        };
        self.held.insert(instance, held);
        if let Some(before) = before {
            self.replace(before);
        }
        Ok(())
    }

    /// Waits a little until the configuration has a pod as the node has it; returns whether it does. The node may
    /// have read it earlier, and before this proxy has, it may lack policies of the pod.
    async fn waits_until_known(&self, lease: &Lease, patience: &mut Duration) -> bool {
        // One that was refused is lent again: it keeps no other one waiting.
        let again = self.refused.contains_key(&lease.cookie);
        let mut waited = again;
        while !(self.knows)(&lease.uid, &lease.identity) {
            if again || patience.is_zero() {
                return false;
            }
            sleep(LOOK).await;
            *patience = patience.saturating_sub(LOOK);
            waited = true;
        }
        if waited {
            *patience = CATCH_UP;
        }
        true
    }

    /// Has the connections of an enrolment end by themselves, and then gives it back.
    fn replace(&mut self, before: Instance) {
        if let Some(held) = self.held.get_mut(&before) {
            held.replaced = true;
        }
        self.later.push(Box::pin(async move {
            sleep(LINGER).await;
            Later::Lingered(before)
        }));
    }

    /// Has nothing new begin that an earlier node process has lent: the one that runs now is to say who a pod is.
    fn retire(&mut self) {
        for instance in self.instances(|held| !held.replaced) {
            self.replace(instance);
        }
    }

    /// Returns the enrolment in a network namespace that no other one has replaced.
    fn current(&self, netns: u64) -> Option<Instance> {
        let current = |(_, held): &(&Instance, &Held)| held.netns == netns && !held.replaced;
        self.held
            .iter()
            .find(current)
            .map(|(instance, _)| *instance)
    }

    fn instances(&self, which: impl Fn(&Held) -> bool) -> Vec<Instance> {
        let those = self.held.iter().filter(|(_, held)| which(held));
        those.map(|(instance, _)| *instance).collect()
    }

    async fn drain(&mut self, instance: Instance) {
        let Some(held) = self.held.get_mut(&instance) else {
            return;
        };
        if held.stage != Stage::Serving {
            return;
        }
        self.drains += 1;
        let number = self.drains;
        held.stage = Stage::Draining(number);
        let (told, idle) = oneshot::channel();
        self.tell(PodEvent::Drain(instance, told)).await;
        self.later.push(Box::pin(async move {
            // Who hears of nothing runs nothing.
            let _ = idle.await;
            Later::Idle(instance, number)
        }));
    }

    async fn revive(&mut self, instance: Instance) {
        if let Some(held) = self.held.get_mut(&instance)
            && held.stage != Stage::Serving
        {
            held.stage = Stage::Serving;
            self.tell(PodEvent::Revive(instance)).await;
        }
    }

    async fn do_later(&mut self, later: Later) {
        match later {
            Later::Lingered(instance) => self.drain(instance).await,
            Later::Idle(instance, number) => {
                if let Some(held) = self.held.get_mut(&instance)
                    && held.stage == Stage::Draining(number)
                {
                    held.stage = Stage::Idle;
                }
            }
        }
        self.give_back(|held| held.replaced && held.stage == Stage::Idle)
            .await;
    }

    /// Takes the network namespaces without connections out of those that the node waits for.
    fn take_idle(&self, awaited: &mut BTreeSet<u64>) -> Vec<u64> {
        if awaited.is_empty() {
            return Vec::new();
        }
        let busy = self.held.values().filter(|held| held.stage != Stage::Idle);
        let busy: BTreeSet<u64> = busy.map(|held| held.netns).collect();
        let idle: Vec<u64> = awaited.difference(&busy).copied().collect();
        awaited.retain(|netns| busy.contains(netns));
        idle
    }

    /// Cuts the connections of these enrolments, and keeps nothing of them.
    async fn give_back(&mut self, which: impl Fn(&Held) -> bool) {
        let mut cut = Vec::new();
        for instance in self.instances(which) {
            self.held.remove(&instance);
            let (told, done) = oneshot::channel();
            self.tell(PodEvent::Down(instance, told)).await;
            cut.push(done);
        }
        for done in cut {
            let _ = done.await;
        }
    }

    async fn tell(&self, event: PodEvent) {
        // Who does not hear any more ends, and all of this with it.
        let _ = self.events.send(event).await;
    }
}

impl Conversation {
    fn with(pid: i32) -> Self {
        Self {
            pid,
            stamp: None,
            named: Some(BTreeSet::new()),
            awaited: BTreeSet::new(),
            patience: CATCH_UP,
        }
    }

    fn name(&mut self, netns: u64) {
        if let Some(named) = &mut self.named {
            named.insert(netns);
        }
    }
}

/// A pod, as it was lent.
fn lease(
    add: Add,
    identity: Identity,
    descriptors: Vec<OwnedFd>,
    stamp: Arc<Stamp>,
) -> io::Result<Lease> {
    let lent = <[OwnedFd; 1 + ListenerKind::COUNT]>::try_from(descriptors);
    let mut lent = lent
        .map_err(|_| wrong("a pod with too little"))?
        .into_iter();
    let mut next = || lent.next().ok_or_else(|| wrong("a pod with too little"));
    let netns = next()?;
    let listeners = Listeners::make(|_| next().map(TcpListener::from))?;
    let who = add.workload_info.unwrap_or_default();
    Ok(Lease {
        instance: Instance(add.instance),
        uid: add.uid.into(),
        namespace: who.namespace.into(),
        name: who.name.into(),
        identity,
        addresses: wire::addresses(&add.addresses)?,
        netns: Netns::of(netns)?.ok_or_else(|| wrong("a pod without its namespace"))?,
        cookie: add.netns,
        listeners,
        stamp,
    })
}

fn wrong(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the node says {what}"))
}

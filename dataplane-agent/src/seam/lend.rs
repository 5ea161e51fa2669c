//! The node's end between two processes: lends each pod to whoever connects, and tells what happens to it.
//! The node keeps the listeners, so that nothing is refused while nobody serves: connections wait in them.

use std::cell::{RefCell, RefMut};
use std::io;
use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::borrow::LONGEST_RETRY;
use super::ledger::{Ledger, ProxyId};
use super::packets::{Channel, Packet, SeamListener};
use super::wire::{Ack, Hello, NodeMessage, ProxyMessage, VERSION, Welcome};
use super::{CUT_TIMEOUT, PodEvent, Serving, SharedSettings, Stamp};
use crate::mesh::workload::named;

/// How long a proxy may take to say hello; and to answer, before it no longer counts as serving, and what it is to give
/// back is not waited for.
const ANSWER_TIMEOUT: Duration = CUT_TIMEOUT;
/// How long a proxy is waited for that served the node before it started, or whose conversation has ended. A pod
/// that it may have is not undone meanwhile: no packet of its connections would arrive at the proxy any more.
const RETURN_TIMEOUT: Duration = LONGEST_RETRY.saturating_mul(2);
/// How long after a proxy has refused a pod it is lent that again.
const LEND_AGAIN: Duration = Duration::from_secs(5);
/// Delay after a failed accept.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Lends pods to proxies.
pub struct Lender {
    ledger: RefCell<Ledger>,
    /// Notifies the conversations that there may be something to say.
    changed: watch::Sender<()>,
    /// Who serves.
    serving: watch::Sender<Serving>,
    /// The last proxy that was let go for an error, and the error.
    let_go: RefCell<Option<(i32, String)>>,
}

/// A request that a proxy has not answered.
struct Unanswered {
    /// When the answer is late; `None` if it is.
    until: Option<Instant>,
    /// The pod that was lent with it, if one was: its network namespace and its uid.
    pod: Option<(u64, String)>,
}

impl Lender {
    /// Lends nothing yet. The receiver has who serves.
    pub fn new(
        node: &str,
        settings: &SharedSettings,
        stamp: Arc<Stamp>,
    ) -> (Self, watch::Receiver<Serving>) {
        let (serving, told) = watch::channel(Serving::default());
        let new = Self {
            ledger: RefCell::new(Ledger::new(node, settings, stamp)),
            changed: watch::Sender::new(()),
            serving,
            let_go: RefCell::default(),
        };
        (new, told)
    }

    /// Lends what `events` say to all that connect, until there are no more events.
    pub async fn run(self, entry: SeamListener, mut events: mpsc::Receiver<PodEvent>) {
        let mut conversations = FuturesUnordered::new();
        let before = self.ledger.borrow_mut().expect();
        conversations.push(self.wait_for(before).boxed_local());
        // Accepting pauses after an error; the proxies that are connected do not.
        let mut paused = None;
        loop {
            tokio::select! {
                event = events.recv() => match event {
                    Some(event) => {
                        self.ledger.borrow_mut().apply(event);
                        self.changed.send_replace(());
                    }
                    None => return,
                },
                came = entry.accept(), if paused.is_none() => match came {
                    Ok(channel) => conversations.push(self.converse(channel).boxed_local()),
                    Err(error) => {
                        tracing::warn!(%error, "who came to serve pods is not let in");
                        paused = Some(Instant::now() + ACCEPT_PAUSE);
                    }
                },
                () = at(paused) => paused = None,
                Some(()) = conversations.next() => {}
            }
        }
    }

    /// Waits for proxies that have not connected, for a while.
    async fn wait_for(&self, id: ProxyId) {
        sleep(RETURN_TIMEOUT).await;
        self.ledger.borrow_mut().forget(id);
    }

    /// Lends to a proxy that has connected, until it is gone; and waits for a while, since it may come again.
    async fn converse(&self, channel: Channel) {
        let (pid, mut met) = (channel.pid(), None);
        let end = self.talk(&channel, &mut met).await;
        drop(channel);
        match end {
            Ok(()) => tracing::info!(pid, "a proxy has gone"),
            Err(error) => {
                // One that is not let in comes again each second.
                let last = (pid, error.to_string());
                if self.let_go.replace(Some(last.clone())) != Some(last) {
                    tracing::warn!(pid, %error, "a proxy is let go; it may come again");
                }
            }
        }
        if let Some(id) = met {
            let since = Instant::now() - ANSWER_TIMEOUT;
            self.ledger.borrow_mut().lose(id, since);
            self.count();
            self.wait_for(id).await;
        }
    }

    async fn talk(&self, channel: &Channel, met: &mut Option<ProxyId>) -> io::Result<()> {
        channel.refuse_stranger()?;
        if !is_welcome(channel).await? {
            return Ok(());
        }
        let id = self.ledger.borrow_mut().meet();
        *met = Some(id);
        Conversation::new(self, channel, id).run().await
    }

    fn count(&self) {
        let serve = self.ledger.borrow().serving();
        self.serving.send_if_modified(|old| {
            let changed = *old != serve;
            *old = serve;
            changed
        });
    }
}

/// The conversation with a proxy that has said hello. It is sent one request after the other, each when the one before
/// has been answered. A proxy whose answer is late is kept: as long as it lives, so do the connections that it carries.
/// What it is to give back is waited for as long as it answers, however much is asked before.
struct Conversation<'a> {
    lender: &'a Lender,
    channel: &'a Channel,
    id: ProxyId,
    unanswered: Option<Unanswered>,
    /// When it is lent again what it has refused.
    lend_again: Option<Instant>,
    /// Whether it has answered its welcome.
    serves: bool,
}

impl<'a> Conversation<'a> {
    fn new(lender: &'a Lender, channel: &'a Channel, id: ProxyId) -> Self {
        Self {
            lender,
            channel,
            id,
            unanswered: None,
            lend_again: None,
            serves: false,
        }
    }

    fn ledger(&self) -> RefMut<'a, Ledger> {
        self.lender.ledger.borrow_mut()
    }

    /// Returns when the proxy has gone.
    ///
    /// # Errors
    /// The connection fails; the proxy says what none does, or that it does not serve this node.
    async fn run(mut self) -> io::Result<()> {
        let mut changed = self.lender.changed.subscribe();
        loop {
            changed.borrow_and_update();
            if self.unanswered.is_none() {
                self.unanswered = self.tell()?;
            }
            self.lender.count();
            tokio::select! {
                _ = changed.changed() => {}
                packet = self.channel.receive() => match packet? {
                    Some(Packet { bytes, .. }) => self.hear(ProxyMessage::read(&bytes)?)?,
                    None => return Ok(()),
                },
                () = at(self.lend_again) => {
                    self.lend_again = None;
                    self.ledger().lend_again(self.id);
                }
                () = at(self.overdue()) => self.wait_no_longer(),
            }
        }
    }

    /// Sends the next request, if there is one.
    fn tell(&self) -> io::Result<Option<Unanswered>> {
        let mut ledger = self.ledger();
        let Some(order) = ledger.next(self.id) else {
            return Ok(None);
        };
        let pod = match &order.said {
            NodeMessage::Add(add) => Some((add.netns, add.uid.clone())),
            _ => None,
        };
        self.channel.send(&order.said.packet(), &order.lent)?;
        Ok(Some(Unanswered {
            until: Some(Instant::now() + ANSWER_TIMEOUT),
            pod,
        }))
    }

    fn hear(&mut self, message: ProxyMessage) -> io::Result<()> {
        match message {
            ProxyMessage::Ack(ack) => return self.hear_answer(ack),
            ProxyMessage::Idle(of) => self.ledger().idle(self.id, of.netns),
            ProxyMessage::Leaving(_) => self.ledger().leaves(self.id),
        }
        Ok(())
    }

    fn hear_answer(&mut self, ack: Ack) -> io::Result<()> {
        let Some(answered) = self.unanswered.take() else {
            return Err(io::Error::other("it answers what was not asked"));
        };
        let pid = self.channel.pid();
        match answered.pod {
            Some((netns, pod)) => self.hear_of_pod(netns, &pod, &ack.error),
            None if !ack.error.is_empty() => return Err(io::Error::other(ack.error)),
            // The first that it answers is its welcome.
            None => {
                if !std::mem::replace(&mut self.serves, true) {
                    tracing::info!(pid, "a proxy serves");
                }
            }
        }
        if self.ledger().set_late(self.id, false) {
            tracing::info!(pid, "a proxy answers again");
        }
        Ok(())
    }

    /// Takes in whether the proxy serves a pod that it was lent: why not, or nothing.
    fn hear_of_pod(&mut self, netns: u64, pod: &str, reason: &str) {
        let (pid, refused) = (self.channel.pid(), !reason.is_empty());
        let news = self.ledger().set_refused(self.id, netns, refused);
        if refused {
            self.lend_again
                .get_or_insert_with(|| Instant::now() + LEND_AGAIN);
        }
        match refused {
            true if news => {
                tracing::warn!(
                    pid,
                    pod,
                    reason,
                    "a proxy cannot serve a pod; it is lent it again"
                );
            }
            false if news => {
                tracing::info!(pid, pod, "a proxy serves a pod that it could not serve");
            }
            _ => {}
        }
    }

    /// Returns when its answer is late; once it is, when it is to have given back what it has not been told of yet.
    fn overdue(&self) -> Option<Instant> {
        let until = self.unanswered.as_ref()?.until;
        until.or_else(|| {
            let said = self.ledger().oldest_give_back(self.id)?;
            Some(said + ANSWER_TIMEOUT)
        })
    }

    fn wait_no_longer(&mut self) {
        let pid = self.channel.pid();
        let first = self.unanswered.as_mut().and_then(|of| of.until.take());
        if first.is_some() {
            tracing::warn!(
                pid,
                "a proxy does not answer; it does not count as serving until it does"
            );
            self.ledger().set_late(self.id, true);
        }
        let since = Instant::now() - ANSWER_TIMEOUT;
        let given_up = self.ledger().give_up(self.id, since);
        for uid in given_up {
            tracing::warn!(pid, pod = %named(&uid), "a proxy has not confirmed that the pod's connections are cut; it is not waited for any longer");
        }
    }
}

/// Whether a peer says hello as a proxy of this version does; false if it closes instead.
///
/// # Errors
/// It does not.
async fn is_welcome(channel: &Channel) -> io::Result<bool> {
    let late = || io::Error::new(io::ErrorKind::TimedOut, "it does not say hello");
    let hello = timeout(ANSWER_TIMEOUT, channel.receive()).await;
    let Some(packet) = hello.map_err(|_| late())?? else {
        return Ok(false);
    };
    let hello = Hello::read(&packet.bytes)?;
    if hello.lease == VERSION {
        return Ok(true);
    }
    // It learns why it is not let in.
    let said = NodeMessage::Welcome(Welcome {
        lease: VERSION,
        ..Welcome::default()
    });
    channel.send(&said.packet(), &[])?;
    let what = format!(
        "it speaks version {} of the seam, and this node version {VERSION}: run both of one release",
        hello.lease
    );
    Err(io::Error::new(io::ErrorKind::Unsupported, what))
}

async fn at(until: Option<Instant>) {
    match until {
        Some(until) => sleep_until(until).await,
        None => std::future::pending().await,
    }
}

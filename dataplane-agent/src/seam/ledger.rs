//! Which pods the node lends, what each proxy has been told of them, and what it is to be told next. It only
//! decides; `lend` has the conversations.
//!
//! The next message follows from what the proxy was told last and from what is lent now. So what waits for a slow
//! proxy is bounded by the number of pods, however often they change, and a pod that is to be given back does not
//! wait for others.

use std::collections::{BTreeMap, BTreeSet};
use std::iter;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::wire::{
    self, Add, Addresses, NodeMessage, PodRef, Snapshot, VERSION, Welcome, WorkloadInfo,
};
use super::{Instance, Lease, PodEvent, Serving, SharedSettings, Stamp};
use crate::drain::CompletionGuard;

/// A proxy that is connected, or waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct ProxyId(u64);

/// A message to a proxy.
#[derive(Debug)]
pub(super) struct Order<'a> {
    /// What it says.
    pub(super) said: NodeMessage,
    /// The descriptors that are lent with it.
    pub(super) lent: Vec<BorrowedFd<'a>>,
}

/// What is lent, and to whom. Pods are keyed by the cookies of their network namespaces: each has one pod.
#[derive(Debug)]
pub(super) struct Ledger {
    welcome: Welcome,
    stamp: Arc<Stamp>,
    leased: BTreeMap<u64, Leased>,
    /// What drains and is not leased: a proxy may have something of it of an earlier node process.
    unleased: BTreeSet<u64>,
    proxies: BTreeMap<ProxyId, Proxy>,
    /// The uids of the pods that were taken back before the snapshot. A proxy that connects before it may still
    /// have something of them.
    taken_back: BTreeMap<u64, Arc<str>>,
    /// Set when [`PodEvent::Snapshot`] has come: the pods that are not decided yet, or drain without having been leased.
    /// A proxy may have something of them.
    undecided: Option<BTreeSet<u64>>,
    /// The number of proxies so far.
    met: u64,
}

#[derive(Debug)]
struct Leased {
    lease: Lease,
    /// Whether nothing new is to be opened for it.
    drains: bool,
}

#[derive(Debug, Default)]
struct Proxy {
    /// Whether it is not connected, and is waited for.
    absent: bool,
    welcomed: bool,
    /// Whether it has answered that: it serves this node.
    accepted: bool,
    /// Whether it was told [`NodeMessage::SnapshotSent`]. Until then it may have pods of an earlier node process.
    snapshot: bool,
    /// What it was last told of each pod.
    told: BTreeMap<u64, LastTold>,
    /// Those of them that it could not serve when it was lent them last. It may have something of them of an earlier
    /// node process.
    refused: BTreeSet<u64>,
    /// Pods of which there may be something to say.
    changed: BTreeSet<u64>,
    /// Pods that it is to give back, and has not been told of yet.
    give_back: BTreeMap<u64, GiveBack>,
    /// The pod that it was told to give back, until it answers.
    giving_back: Option<(u64, GiveBack)>,
    /// Who waits until a draining pod has no connections left.
    idle: BTreeMap<u64, CompletionGuard>,
    /// Whether it has been told all that there was to say since it connected, and has answered.
    caught_up: bool,
    /// Whether its answer is overdue.
    late: bool,
    /// Whether it accepts nothing any more.
    leaves: bool,
}

#[derive(Debug)]
struct GiveBack {
    uid: Arc<str>,
    /// When the node has said so first, to whichever proxy.
    said: Instant,
    /// Who waits for it.
    waiting: Vec<CompletionGuard>,
}

#[derive(Debug, Default)]
struct LastTold {
    /// The enrolment that it was lent; `None` if it may have something of an earlier node process alone.
    instance: Option<Instance>,
    addresses: Arc<[IpAddr]>,
    drains: bool,
    /// Whether it is to be told to drain once more, since it may have answered the last time already.
    drain_again: bool,
}

impl Ledger {
    /// Lends nothing yet.
    pub(super) fn new(node: &str, settings: &SharedSettings, stamp: Arc<Stamp>) -> Self {
        let welcome = Welcome {
            lease: VERSION,
            node: node.to_owned(),
            ..Welcome::default()
        };
        Self {
            welcome: settings.say(welcome),
            stamp,
            leased: BTreeMap::new(),
            unleased: BTreeSet::new(),
            proxies: BTreeMap::new(),
            taken_back: BTreeMap::new(),
            undecided: None,
            met: 0,
        }
    }

    /// Takes in what the node says of a pod.
    pub(super) fn apply(&mut self, event: PodEvent) {
        match event {
            PodEvent::Up(lease) => {
                let netns = lease.cookie;
                let (lease, drains) = (*lease, false);
                self.leased.insert(netns, Leased { lease, drains });
                self.unleased.remove(&netns);
                self.has_decided(netns);
                self.has_changed(netns);
            }
            PodEvent::Addresses(instance, addresses) => {
                if let Some(netns) =
                    self.change(instance, |leased| leased.lease.addresses = addresses)
                {
                    self.has_changed(netns);
                }
            }
            PodEvent::Drain(instance, told) => {
                if let Some(netns) = self.change(instance, |leased| leased.drains = true) {
                    self.drain(netns, told);
                }
            }
            PodEvent::DrainUnleased(netns, told) => {
                self.unleased.insert(netns);
                self.drain(netns, told);
            }
            PodEvent::Revive(instance) => {
                if let Some(netns) = self.change(instance, |leased| leased.drains = false) {
                    for proxy in self.proxies.values_mut() {
                        proxy.idle.remove(&netns);
                    }
                    self.has_changed(netns);
                }
            }
            PodEvent::Down(instance, told) => {
                if let Some(netns) = self.change(instance, |_| ()) {
                    self.take_back(netns, told);
                }
            }
            PodEvent::Clear(netns, told) => self.take_back(netns, told),
            PodEvent::Snapshot(undecided) => {
                self.undecided = Some(undecided);
                self.taken_back.clear();
            }
        }
    }

    /// Adds a proxy that has connected. It is to be lent all that there is. It may be one that was waited for: what
    /// that one was to give back, or to answer, it has to as well.
    pub(super) fn meet(&mut self) -> ProxyId {
        let taken_back = self.taken_back.iter().map(|(netns, uid)| {
            let of = GiveBack {
                uid: Arc::clone(uid),
                said: Instant::now(),
                waiting: Vec::new(),
            };
            (*netns, of)
        });
        let mut proxy = Proxy {
            changed: self.leased.keys().chain(&self.unleased).copied().collect(),
            give_back: taken_back.collect(),
            ..Proxy::default()
        };
        for absent in self.proxies.values().filter(|proxy| proxy.absent) {
            for (netns, of) in &absent.give_back {
                proxy.gives_back(*netns, of);
            }
            let idle = absent.idle.iter();
            proxy
                .idle
                .extend(idle.map(|(netns, waiting)| (*netns, waiting.clone())));
        }
        self.add(proxy)
    }

    /// Waits for proxies that an earlier node process has lent something to, until they are forgotten.
    pub(super) fn expect(&mut self) -> ProxyId {
        self.add(Proxy {
            absent: true,
            ..Proxy::default()
        })
    }

    fn add(&mut self, proxy: Proxy) -> ProxyId {
        self.met += 1;
        let id = ProxyId(self.met);
        self.proxies.insert(id, proxy);
        id
    }

    /// Takes in that a proxy's conversation has ended. It may live, and come again: it is waited for until it is
    /// forgotten, but for what the node has said before `since` that it is to give back. So one that ends again and
    /// again keeps nobody waiting for ever, and one that does not accept this node keeps nobody waiting at all.
    pub(super) fn lose(&mut self, id: ProxyId, since: Instant) {
        let Some(proxy) = self.proxies.get_mut(&id) else {
            return;
        };
        if !proxy.accepted {
            self.proxies.remove(&id);
            return;
        }
        proxy.absent = true;
        if let Some((netns, of)) = proxy.giving_back.take() {
            proxy.gives_back(netns, &of);
        }
        proxy.give_back.retain(|_, of| of.said > since);
    }

    /// Removes a proxy that is gone, and its connections with it: nobody waits for it any more.
    pub(super) fn forget(&mut self, id: ProxyId) {
        self.proxies.remove(&id);
    }

    /// Returns what a proxy that has answered all before is to be told next, and takes it as told.
    pub(super) fn next(&mut self, id: ProxyId) -> Option<Order<'_>> {
        let proxy = self.proxies.get_mut(&id)?;
        proxy.giving_back = None;
        proxy.accepted = proxy.welcomed;
        if !proxy.welcomed {
            proxy.welcomed = true;
            return Some(Order {
                lent: self.stamp.descriptor().into_iter().collect(),
                ..Order::of(NodeMessage::Welcome(self.welcome.clone()))
            });
        }
        if let Some((netns, of)) = proxy.give_back.pop_first() {
            proxy.told.remove(&netns);
            proxy.refused.remove(&netns);
            let uid = of.uid.to_string();
            proxy.giving_back = Some((netns, of));
            return Some(Order::of(NodeMessage::Del(PodRef { uid, netns })));
        }
        while let Some(&netns) = proxy.changed.first() {
            let order = match self.leased.get(&netns) {
                Some(Leased {
                    lease,
                    drains: true,
                }) => proxy.drain(netns, &lease.uid),
                Some(Leased { lease, .. }) => proxy.lend(netns, lease),
                None if self.unleased.contains(&netns) => proxy.drain(netns, ""),
                None => None,
            };
            if order.is_some() {
                return order;
            }
            proxy.changed.remove(&netns);
        }
        if let Some(undecided) = &self.undecided
            && !proxy.snapshot
        {
            proxy.snapshot = true;
            for netns in undecided {
                proxy.told.entry(*netns).or_default();
            }
            let undecided = undecided.iter().copied().collect();
            return Some(Order::of(NodeMessage::SnapshotSent(Snapshot { undecided })));
        }
        proxy.caught_up = true;
        None
    }

    /// Takes in [`ProxyMessage::Idle`](super::wire::ProxyMessage::Idle).
    pub(super) fn idle(&mut self, id: ProxyId, netns: u64) {
        let Some(proxy) = self.proxies.get_mut(&id) else {
            return;
        };
        // If the drain was cancelled meanwhile, or is to begin anew, this is no answer to it.
        let last = proxy.told.get(&netns);
        if last.is_some_and(|last| last.drains && !last.drain_again) {
            proxy.idle.remove(&netns);
        }
    }

    /// Takes in [`ProxyMessage::Leaving`](super::wire::ProxyMessage::Leaving).
    pub(super) fn leaves(&mut self, id: ProxyId) {
        if let Some(proxy) = self.proxies.get_mut(&id) {
            proxy.leaves = true;
        }
    }

    /// Sets whether a proxy's answer is overdue; returns whether it was.
    pub(super) fn set_late(&mut self, id: ProxyId, late: bool) -> bool {
        let proxy = self.proxies.get_mut(&id);
        proxy.is_some_and(|proxy| std::mem::replace(&mut proxy.late, late))
    }

    /// Returns when the node has said what a proxy has waited for longest of all that it is to give back and has not
    /// been told of.
    pub(super) fn oldest_give_back(&self, id: ProxyId) -> Option<Instant> {
        let waiting = self.proxies.get(&id)?.give_back.values();
        let waiting = waiting.filter(|of| !of.waiting.is_empty());
        waiting.map(|of| of.said).min()
    }

    /// Has nobody wait any longer for what a proxy that does not answer was told to give back, nor for what it was to
    /// give back since this time and has not been told of. It is told all the same. Returns the uids.
    pub(super) fn give_up(&mut self, id: ProxyId, since: Instant) -> Vec<Arc<str>> {
        let Some(proxy) = self.proxies.get_mut(&id) else {
            return Vec::new();
        };
        let late = proxy.give_back.values_mut();
        let told = proxy.giving_back.iter_mut().map(|(_, of)| of);
        let late = told.chain(late.filter(|of| of.said <= since));
        let late = late.filter(|of| !of.waiting.is_empty());
        late.map(|of| {
            of.waiting.clear();
            Arc::clone(&of.uid)
        })
        .collect()
    }

    /// Takes in whether a proxy has refused the pod that it was lent last; returns whether that is news.
    pub(super) fn set_refused(&mut self, id: ProxyId, netns: u64, refused: bool) -> bool {
        let proxy = self.proxies.get_mut(&id);
        proxy.is_some_and(|proxy| match refused {
            true => proxy.refused.insert(netns),
            false => proxy.refused.remove(&netns),
        })
    }

    /// Has a proxy be lent once more what it has refused.
    pub(super) fn lend_again(&mut self, id: ProxyId) {
        let Some(proxy) = self.proxies.get_mut(&id) else {
            return;
        };
        for netns in &proxy.refused {
            if let Some(last) = proxy.told.get_mut(netns) {
                last.instance = None;
                proxy.changed.insert(*netns);
            }
        }
    }

    /// Returns who serves the pods. One that drains is to be served by nobody.
    pub(super) fn serving(&self) -> Serving {
        let mut serve = self
            .proxies
            .values()
            .filter(|proxy| proxy.caught_up && !proxy.absent && !proxy.late && !proxy.leaves);
        let Some(first) = serve.next() else {
            return Serving::default();
        };
        let (mut proxies, mut refused) = (1, first.refused.clone());
        for proxy in serve {
            proxies += 1;
            refused.retain(|netns| proxy.refused.contains(netns));
        }
        let refused = refused.iter().filter_map(|netns| self.leased.get(netns));
        let refused = refused.filter(|leased| !leased.drains);
        let refused = refused
            .map(|leased| Arc::clone(&leased.lease.uid))
            .collect();
        Serving { proxies, refused }
    }

    /// Has all proxies drain that may have something of a network namespace; `told` hears when they have nothing that
    /// runs.
    fn drain(&mut self, netns: u64, told: oneshot::Sender<()>) {
        let answer = CompletionGuard::new(told);
        for proxy in self.having(netns) {
            if let Some(last) = proxy.told.get_mut(&netns) {
                last.drain_again = true;
            }
            proxy.idle.insert(netns, answer.clone());
        }
        self.has_changed(netns);
    }

    /// Takes a network namespace back from all proxies that may have something of it; `told` hears when they have
    /// given it back.
    fn take_back(&mut self, netns: u64, told: oneshot::Sender<()>) {
        let answer = CompletionGuard::new(told);
        let leased = self.leased.remove(&netns);
        self.unleased.remove(&netns);
        let of = GiveBack {
            uid: leased.map_or_else(Arc::default, |leased| leased.lease.uid),
            said: Instant::now(),
            waiting: vec![answer],
        };
        for proxy in self.having(netns) {
            proxy.gives_back(netns, &of);
        }
        self.has_decided(netns);
        if self.undecided.is_none() {
            self.taken_back.insert(netns, of.uid);
        }
        for proxy in self.proxies.values_mut() {
            proxy.idle.remove(&netns);
        }
    }

    /// The proxies that may have something of a network namespace.
    fn having(&mut self, netns: u64) -> impl Iterator<Item = &mut Proxy> {
        let proxies = self.proxies.values_mut();
        proxies.filter(move |proxy| !proxy.snapshot || proxy.told.contains_key(&netns))
    }

    /// Changes a leased pod; returns its network namespace, or `None` if the enrolment is not leased.
    fn change(&mut self, instance: Instance, change: impl FnOnce(&mut Leased)) -> Option<u64> {
        let mut leased = self.leased.iter_mut();
        let (netns, leased) = leased.find(|(_, leased)| leased.lease.instance == instance)?;
        change(leased);
        Some(*netns)
    }

    fn has_decided(&mut self, netns: u64) {
        if let Some(undecided) = &mut self.undecided {
            undecided.remove(&netns);
        }
    }

    fn has_changed(&mut self, netns: u64) {
        for proxy in self.proxies.values_mut() {
            proxy.changed.insert(netns);
        }
    }
}

impl Proxy {
    /// Has it give a pod back, too.
    fn gives_back(&mut self, netns: u64, of: &GiveBack) {
        let entry = self.give_back.entry(netns).or_insert_with(|| GiveBack {
            uid: Arc::clone(&of.uid),
            said: of.said,
            waiting: Vec::new(),
        });
        entry.waiting.extend_from_slice(&of.waiting);
    }

    /// Returns what it is to be told of a pod that drains, if anything.
    fn drain(&mut self, netns: u64, uid: &str) -> Option<Order<'static>> {
        match self.told.get_mut(&netns) {
            Some(last) if last.drains && !last.drain_again => return None,
            Some(last) => (last.drains, last.drain_again) = (true, false),
            None if self.snapshot => return None, // it has nothing of it
            None => {
                let last = LastTold {
                    drains: true,
                    ..LastTold::default()
                };
                self.told.insert(netns, last);
            }
        }
        let uid = uid.to_owned();
        Some(Order::of(NodeMessage::Drain(PodRef { uid, netns })))
    }

    /// Returns what it is to be told of a leased pod that does not drain, if anything.
    fn lend<'a>(&mut self, netns: u64, lease: &'a Lease) -> Option<Order<'a>> {
        match self.told.get_mut(&netns) {
            Some(last) if last.instance == Some(lease.instance) => {
                last.drain_again = false;
                if last.drains {
                    last.drains = false;
                    let uid = lease.uid.to_string();
                    Some(Order::of(NodeMessage::Revive(PodRef { uid, netns })))
                } else if last.addresses != lease.addresses {
                    last.addresses = Arc::clone(&lease.addresses);
                    let addresses = lease.addresses.iter().map(wire::bytes).collect();
                    let said = Addresses { netns, addresses };
                    Some(Order::of(NodeMessage::Addresses(said)))
                } else {
                    None
                }
            }
            _ => {
                let last = LastTold {
                    instance: Some(lease.instance),
                    addresses: Arc::clone(&lease.addresses),
                    ..LastTold::default()
                };
                self.told.insert(netns, last);
                Some(Order::lending(lease))
            }
        }
    }
}

impl<'a> Order<'a> {
    fn of(said: NodeMessage) -> Self {
        Self {
            said,
            lent: Vec::new(),
        }
    }

    /// Lends a pod.
    fn lending(lease: &'a Lease) -> Self {
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
            netns: lease.cookie,
        };
        let listeners = lease.listeners.iter();
        let listeners = listeners.map(|(_, listener)| listener.as_fd());
        let lent = iter::once(lease.netns.as_fd()).chain(listeners).collect();
        Self {
            lent,
            ..Self::of(NodeMessage::Add(add))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::lease;
    use super::*;

    fn ledger() -> Ledger {
        Ledger::new("one", &SharedSettings::default(), Arc::default())
    }

    fn drain(ledger: &mut Ledger, instance: Instance) -> oneshot::Receiver<()> {
        let (told, idle) = oneshot::channel();
        ledger.apply(PodEvent::Drain(instance, told));
        idle
    }

    /// All that a proxy is to be told, in short.
    fn told(ledger: &mut Ledger, id: ProxyId) -> Vec<&'static str> {
        let mut told = Vec::new();
        while let Some(order) = ledger.next(id) {
            told.push(match order.said {
                NodeMessage::Welcome(_) => "welcome",
                NodeMessage::Add(_) => "add",
                NodeMessage::Addresses(_) => "addresses",
                NodeMessage::Drain(_) => "drain",
                NodeMessage::Revive(_) => "revive",
                NodeMessage::Del(_) => "del",
                NodeMessage::SnapshotSent(_) => "snapshot",
            });
        }
        told
    }

    #[test]
    fn what_waits_for_a_slow_proxy_does_not_grow_with_what_happens() {
        let mut ledger = ledger();
        let (own, id) = (lease(), ledger.meet());
        let instance = own.instance;
        ledger.apply(PodEvent::Up(own));
        assert_eq!(told(&mut ledger, id), ["welcome", "add"]);
        for number in 0..100 {
            let addresses = [IpAddr::from([10, 0, 1, number])].into();
            ledger.apply(PodEvent::Addresses(instance, addresses));
            drop(drain(&mut ledger, instance));
            ledger.apply(PodEvent::Revive(instance));
        }
        ledger.apply(PodEvent::Snapshot(BTreeSet::new()));
        assert_eq!(told(&mut ledger, id), ["addresses", "snapshot"]);
        assert_eq!(told(&mut ledger, id), [""; 0]);
    }

    #[test]
    fn what_is_given_back_waits_for_no_other_pod() {
        let mut ledger = ledger();
        let (own, id) = (lease(), ledger.meet());
        let (instance, netns) = (own.instance, own.cookie);
        ledger.apply(PodEvent::Up(own));
        assert_eq!(told(&mut ledger, id), ["welcome", "add"]);
        for _ in 0..100 {
            ledger.apply(PodEvent::Up(lease()));
        }
        let (told, mut down) = oneshot::channel();
        ledger.apply(PodEvent::Down(instance, told));
        let order = ledger.next(id).expect("there is much to tell");
        assert!(matches!(&order.said, NodeMessage::Del(of) if of.netns == netns));
        assert!(down.try_recv().is_err(), "it has not been done");
        ledger.next(id).expect("there is more to tell");
        down.try_recv().expect("it has");
    }

    #[test]
    fn an_answer_to_what_was_asked_before_is_none_to_what_is_asked_now() {
        let mut ledger = ledger();
        let (own, id) = (lease(), ledger.meet());
        let (instance, netns) = (own.instance, own.cookie);
        ledger.apply(PodEvent::Up(own));
        drop(drain(&mut ledger, instance));
        assert_eq!(told(&mut ledger, id), ["welcome", "drain"]);
        ledger.apply(PodEvent::Revive(instance));
        let mut idle = drain(&mut ledger, instance);
        ledger.idle(id, netns);
        assert!(idle.try_recv().is_err(), "it has not been asked");
        assert_eq!(told(&mut ledger, id), ["drain"]);
        ledger.idle(id, netns);
        idle.try_recv().expect("it has been, and has answered");
    }

    #[test]
    fn who_has_been_lent_all_is_asked_for_what_it_has_alone() {
        let mut ledger = ledger();
        let (own, early) = (lease(), ledger.meet());
        let netns = own.cookie;
        ledger.apply(PodEvent::Snapshot(BTreeSet::new()));
        assert_eq!(told(&mut ledger, early), ["welcome", "snapshot"]);
        // This one may have what an earlier node process has lent it.
        let late = ledger.meet();
        let (told_of, mut clear) = oneshot::channel();
        ledger.apply(PodEvent::Clear(netns, told_of));
        assert_eq!(told(&mut ledger, early), [""; 0]);
        assert!(clear.try_recv().is_err(), "another one may have it");
        assert_eq!(told(&mut ledger, late), ["welcome", "del", "snapshot"]);
        clear.try_recv().expect("it has answered");
        assert_eq!(ledger.serving().proxies, 2);
    }

    #[test]
    fn a_proxy_that_has_not_come_back_yet_is_waited_for_and_told_what_it_is_to_give_back() {
        let mut ledger = ledger();
        let before = ledger.expect();
        let (own, again) = (lease(), lease());
        let (instance, drains, netns) = (own.instance, own.cookie, again.cookie);
        ledger.apply(PodEvent::Up(own));
        let mut idle = drain(&mut ledger, instance);
        let (told_of, mut clear) = oneshot::channel();
        ledger.apply(PodEvent::Clear(netns, told_of));
        // What it has of a pod that is enrolled anew is cut all the same.
        ledger.apply(PodEvent::Up(again));
        ledger.apply(PodEvent::Snapshot(BTreeSet::new()));
        let all = ["welcome", "del", "drain", "add", "snapshot"];
        let of = |ledger: &mut Ledger| {
            let id = ledger.meet();
            assert_eq!(told(ledger, id), all);
            id
        };
        // More than one may have been there.
        let proxies = [of(&mut ledger), of(&mut ledger)];
        assert_eq!(ledger.serving().proxies, 2);
        ledger.forget(before);
        clear.try_recv().expect("they have answered");
        assert!(idle.try_recv().is_err(), "something runs");
        for id in proxies {
            ledger.idle(id, drains);
        }
        idle.try_recv().expect("they have answered");
    }

    #[test]
    fn what_is_not_decided_at_the_snapshot_is_lent_or_taken_back_later() {
        let mut ledger = ledger();
        let early = ledger.meet();
        let (own, other) = (lease(), lease().cookie);
        let instance = own.instance;
        ledger.apply(PodEvent::Snapshot([own.cookie, other].into()));
        let welcome = ledger.next(early).expect("a welcome").said;
        assert!(matches!(welcome, NodeMessage::Welcome(_)));
        let undecided = vec![own.cookie, other];
        let said = ledger.next(early).expect("the snapshot").said;
        assert_eq!(said, NodeMessage::SnapshotSent(Snapshot { undecided }));
        assert_eq!(told(&mut ledger, early), [""; 0]);
        assert_eq!(ledger.serving().proxies, 1);
        // It may have something of both.
        ledger.apply(PodEvent::Up(own));
        let mut idle = drain(&mut ledger, instance);
        assert!(idle.try_recv().is_err(), "something may run");
        let (told_of, mut clear) = oneshot::channel();
        ledger.apply(PodEvent::Clear(other, told_of));
        assert!(clear.try_recv().is_err(), "something may run");
        assert_eq!(told(&mut ledger, early), ["del", "drain"]);
        clear.try_recv().expect("it has answered");
        let late = ledger.meet();
        ledger.next(late).expect("a welcome");
        ledger.next(late).expect("a drain");
        let said = ledger.next(late).expect("the snapshot").said;
        assert_eq!(said, NodeMessage::SnapshotSent(Snapshot::default()));
    }

    #[test]
    fn what_is_not_leased_drains_until_it_is_leased_or_taken_back() {
        let mut ledger = ledger();
        let (own, other, early) = (lease(), lease().cookie, ledger.meet());
        let netns = own.cookie;
        ledger.apply(PodEvent::Snapshot([netns, other].into()));
        let (told_of, mut idle) = oneshot::channel();
        ledger.apply(PodEvent::DrainUnleased(netns, told_of));
        let (told_of, mut other_idle) = oneshot::channel();
        ledger.apply(PodEvent::DrainUnleased(other, told_of));
        let both = ["welcome", "drain", "drain", "snapshot"];
        assert_eq!(told(&mut ledger, early), both);
        // One that comes while it drains may have something of it.
        let late = ledger.meet();
        assert_eq!(told(&mut ledger, late), both);
        ledger.idle(early, netns);
        idle.try_recv().expect("it is idle");
        assert!(other_idle.try_recv().is_err(), "something may run");
        ledger.apply(PodEvent::Up(own));
        let (told_of, mut clear) = oneshot::channel();
        ledger.apply(PodEvent::Clear(other, told_of));
        other_idle.try_recv().expect("nobody waits any more");
        for id in [early, late] {
            assert_eq!(told(&mut ledger, id), ["del", "add"]);
        }
        clear.try_recv().expect("both have answered");
        let later = ledger.meet();
        assert_eq!(told(&mut ledger, later), ["welcome", "add", "snapshot"]);
    }

    #[test]
    fn a_pod_that_was_refused_is_lent_again_and_taken_back_like_others() {
        let mut ledger = ledger();
        let (own, other, id) = (lease(), lease(), ledger.meet());
        let (netns, instance, gone) = (own.cookie, own.instance, other.instance);
        ledger.apply(PodEvent::Up(own));
        ledger.apply(PodEvent::Snapshot(BTreeSet::new()));
        assert_eq!(told(&mut ledger, id), ["welcome", "add", "snapshot"]);
        assert!(ledger.set_refused(id, netns, true));
        assert_eq!(told(&mut ledger, id), [""; 0], "that is for later");
        let nobody = Serving {
            proxies: 1,
            refused: vec!["c//Pod/ns/p".into()],
        };
        assert_eq!(ledger.serving(), nobody);
        let second = ledger.meet();
        assert_eq!(told(&mut ledger, second).len(), 3);
        let both = Serving {
            proxies: 2,
            refused: Vec::new(),
        };
        assert_eq!(ledger.serving(), both, "the other one serves it");
        ledger.leaves(second);
        assert_eq!(ledger.serving(), nobody);
        ledger.forget(second);
        ledger.lend_again(id);
        assert_eq!(told(&mut ledger, id), ["add"]);
        assert!(!ledger.set_refused(id, netns, true), "that is known");
        // It may have connections of an earlier node process.
        let mut idle = drain(&mut ledger, instance);
        assert!(idle.try_recv().is_err());
        assert_eq!(told(&mut ledger, id), ["drain"]);
        assert!(ledger.serving().refused.is_empty(), "nobody is to");
        ledger.apply(PodEvent::Revive(instance));
        assert_eq!(told(&mut ledger, id), ["revive"]);
        ledger.lend_again(id);
        assert_eq!(told(&mut ledger, id), ["add"]);
        assert!(ledger.set_refused(id, netns, false));
        ledger.lend_again(id);
        assert_eq!(told(&mut ledger, id), [""; 0], "it serves it");
        let netns = other.cookie;
        ledger.apply(PodEvent::Up(other));
        assert_eq!(told(&mut ledger, id), ["add"]);
        assert!(ledger.set_refused(id, netns, true));
        let (told_of, mut down) = oneshot::channel();
        ledger.apply(PodEvent::Down(gone, told_of));
        assert_eq!(told(&mut ledger, id), ["del"]);
        down.try_recv().expect("it has answered");
        ledger.lend_again(id);
        assert_eq!(told(&mut ledger, id), [""; 0]);
    }

    #[test]
    fn a_proxy_whose_conversation_has_ended_is_asked_again_when_it_comes_again() {
        let mut ledger = ledger();
        ledger.apply(PodEvent::Snapshot(BTreeSet::new()));
        let long_ago = Instant::now();
        let (own, other, first) = (lease(), lease(), ledger.meet());
        let (netns, instance, gone) = (own.cookie, own.instance, other.instance);
        ledger.apply(PodEvent::Up(own));
        ledger.apply(PodEvent::Up(other));
        assert_eq!(
            told(&mut ledger, first),
            ["welcome", "add", "add", "snapshot"]
        );
        let (told_of, mut down) = oneshot::channel();
        ledger.apply(PodEvent::Down(gone, told_of));
        let order = ledger.next(first).expect("it is taken back");
        assert!(matches!(order.said, NodeMessage::Del(_)));
        ledger.lose(first, long_ago);
        assert_eq!(ledger.serving().proxies, 0);
        // What is said meanwhile is asked of it too.
        let mut idle = drain(&mut ledger, instance);
        let again = ledger.meet();
        assert_eq!(
            told(&mut ledger, again),
            ["welcome", "del", "drain", "snapshot"]
        );
        ledger.idle(again, netns);
        assert!(
            idle.try_recv().is_err() && down.try_recv().is_err(),
            "it may be another"
        );
        ledger.forget(first);
        down.try_recv().expect("it has answered");
        idle.try_recv().expect("it has answered");
    }

    #[test]
    fn a_proxy_that_ends_again_and_again_or_does_not_accept_the_node_keeps_nobody_waiting() {
        let mut ledger = ledger();
        ledger.apply(PodEvent::Snapshot(BTreeSet::new()));
        let (own, other, first) = (lease(), lease(), ledger.meet());
        let (instance, gone) = (own.instance, other.instance);
        ledger.apply(PodEvent::Up(own));
        ledger.apply(PodEvent::Up(other));
        assert_eq!(told(&mut ledger, first).len(), 4);
        let (told_of, mut down) = oneshot::channel();
        let long_ago = Instant::now();
        ledger.apply(PodEvent::Down(instance, told_of));
        ledger.next(first).expect("it is taken back");
        ledger.lose(first, long_ago);
        let second = ledger.meet();
        ledger.forget(first);
        ledger.next(second).expect("a welcome");
        ledger.next(second).expect("it is taken back");
        assert!(down.try_recv().is_err(), "it has not answered");
        ledger.lose(second, Instant::now());
        down.try_recv().expect("it had its time");
        // One that is of a node with other settings.
        let (third, (told_of, mut down)) = (ledger.meet(), oneshot::channel());
        ledger.next(third).expect("a welcome");
        ledger.forget(second);
        ledger.apply(PodEvent::Down(gone, told_of));
        assert!(down.try_recv().is_err(), "it may have something");
        ledger.lose(third, long_ago);
        down.try_recv()
            .expect("it has nothing that it would give back");
    }

    #[test]
    fn nobody_waits_for_ever_for_a_proxy_that_does_not_come() {
        let mut ledger = ledger();
        let before = ledger.expect();
        let (told_of, mut clear) = oneshot::channel();
        ledger.apply(PodEvent::Clear(lease().cookie, told_of));
        assert!(clear.try_recv().is_err(), "one may come");
        ledger.forget(before);
        clear.try_recv().expect("none has come");
        // If one comes later all the same, it may have to wait for the snapshot.
        let late = ledger.meet();
        assert_eq!(told(&mut ledger, late), ["welcome", "del"]);
        ledger.apply(PodEvent::Snapshot(BTreeSet::new()));
        assert_eq!(told(&mut ledger, late), ["snapshot"]);
        let later = ledger.meet();
        assert_eq!(told(&mut ledger, later), ["welcome", "snapshot"]);
    }
}

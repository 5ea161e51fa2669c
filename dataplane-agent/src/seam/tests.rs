//! Both ends of the seam, over a socket.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::net::{IpAddr, Shutdown, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use dataplane_ebpf::listener::ListenerKind;
use tempfile::TempDir;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::borrow::{Borrower, Lent};
use super::lend::Lender;
use super::packets::{Channel, SeamListener};
use super::wire::{
    Ack, Add, Hello, NodeMessage, PodRef, ProxyMessage, Snapshot, VERSION, Welcome, WorkloadInfo,
};
use super::{Instance, Lease, Listeners, PodEvent, Serving, SharedSettings, Stamp};
use crate::mesh::Identity;
use crate::sys::netns::Netns;

/// A pod in a network namespace of its own, as far as its cookie goes.
pub(super) fn lease() -> Box<Lease> {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    lease_in(NEXT.fetch_add(1, Ordering::Relaxed))
}

fn lease_in(netns: u64) -> Box<Lease> {
    Box::new(Lease {
        instance: Instance::next(),
        uid: "c//Pod/ns/p".into(),
        namespace: "ns".into(),
        name: "p".into(),
        identity: Identity::new("td", "ns", "sa"),
        addresses: [IpAddr::from([10, 0, 0, 1])].into(),
        netns: Netns::own().expect("/proc is there"),
        cookie: netns,
        listeners: Listeners::make(|_| TcpListener::bind("127.0.0.1:0")).expect("ports"),
        stamp: Arc::default(),
    })
}

fn of_cluster(name: &str) -> SharedSettings {
    SharedSettings {
        cluster_id: Some(name.into()),
        ..SharedSettings::default()
    }
}

/// A node, in a task that ends with it.
struct Node {
    events: mpsc::Sender<PodEvent>,
    task: tokio::task::JoinHandle<()>,
    serving: tokio::sync::watch::Receiver<Serving>,
}

/// Who serves, in a task that ends with it.
struct Proxy {
    events: mpsc::Receiver<PodEvent>,
    leaving: CancellationToken,
    /// Whether its configuration has the pods as the node has them.
    known: Rc<Cell<bool>>,
    lent: tokio::sync::watch::Receiver<Lent>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Node {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Node {
    fn at(path: &Path) -> Self {
        Self::with(path, &of_cluster("own"))
    }

    #[expect(clippy::disallowed_methods, reason = "a test stands for its process")]
    fn with(path: &Path, settings: &SharedSettings) -> Self {
        let entry = SeamListener::open(path).expect("a socket");
        let (events, inbox) = mpsc::channel(8);
        let (lender, serving) = Lender::new("one", settings, Arc::<Stamp>::default());
        let task = tokio::task::spawn_local(lender.run(entry, inbox));
        Self {
            events,
            task,
            serving,
        }
    }

    async fn say(&self, event: PodEvent) {
        self.events.send(event).await.expect("the node runs");
    }

    async fn drain(&self, instance: Instance) -> oneshot::Receiver<()> {
        let (told, idle) = oneshot::channel();
        self.say(PodEvent::Drain(instance, told)).await;
        idle
    }

    async fn serves(&mut self, count: usize) {
        let serving = self.serving.wait_for(|serving| serving.proxies == count);
        soon(serving).await.expect("the node runs");
    }
}

impl Proxy {
    #[expect(clippy::disallowed_methods, reason = "a test stands for its process")]
    fn of(path: &Path) -> Self {
        let (events, inbox) = mpsc::channel(8);
        let leaving = CancellationToken::new();
        let settings = of_cluster("own");
        let known = Rc::new(Cell::new(true));
        let knows = {
            let known = Rc::clone(&known);
            Box::new(move |_: &str, _: &Identity| known.get())
        };
        let borrower = Borrower::new(path.to_owned(), settings, knows, events, leaving.clone());
        let lent = borrower.lent();
        let task = tokio::task::spawn_local(borrower.run());
        Self {
            events: inbox,
            leaving,
            known,
            lent,
            task,
        }
    }

    async fn hears(&mut self) -> PodEvent {
        soon(self.events.recv()).await.expect("the proxy runs")
    }

    /// Hears that a pod drains: how to answer.
    async fn drains(&mut self, instance: Instance) -> oneshot::Sender<()> {
        match self.hears().await {
            PodEvent::Drain(of, told) if of == instance => told,
            event => panic!("{event:?}"),
        }
    }

    /// Hears that a pod is taken back, and gives it.
    async fn gives_back(&mut self, instance: Instance) {
        match self.hears().await {
            PodEvent::Down(of, told) if of == instance => told.send(()).expect("somebody waits"),
            event => panic!("{event:?}"),
        }
    }

    async fn lent(&mut self, what: fn(&Lent) -> bool) -> Lent {
        let lent = self.lent.wait_for(what);
        soon(lent).await.expect("the proxy runs").clone()
    }

    async fn is_lent(&mut self) -> Box<Lease> {
        match self.hears().await {
            PodEvent::Up(lease) => lease,
            event => panic!("{event:?}"),
        }
    }
}

async fn soon<T>(what: impl Future<Output = T>) -> T {
    let soon = timeout(Duration::from_secs(30), what).await;
    soon.expect("it comes soon")
}

/// Runs a test in one thread, with a path for the socket.
async fn with_a_path<F: Future<Output = ()>>(test: impl FnOnce(PathBuf) -> F) {
    let folder = TempDir::new().expect("a folder");
    let path = folder.path().join("socket");
    tokio::task::LocalSet::new().run_until(test(path)).await;
}

#[tokio::test]
async fn a_pod_is_lent_with_all_that_it_takes_to_serve_it_and_taken_back() {
    with_a_path(async |path| {
        let (node, mut proxy) = (Node::at(&path), Proxy::of(&path));
        let own = lease();
        let (instance, port) = (own.instance, own.listeners.ports()[0]);
        node.say(PodEvent::Up(own)).await;
        let lent = proxy.is_lent().await;
        assert_eq!(lent.instance, instance);
        assert_eq!(
            (&*lent.uid, &*lent.namespace, &*lent.name),
            ("c//Pod/ns/p", "ns", "p")
        );
        assert_eq!(lent.identity, Identity::new("td", "ns", "sa"));
        assert_eq!(*lent.addresses, [IpAddr::from([10, 0, 0, 1])]);
        let own = Netns::own().expect("/proc is there");
        assert_eq!(lent.netns.inode(), own.inode());
        let client = TcpStream::connect(("127.0.0.1", port)).expect("somebody listens");
        let (_, from) = lent
            .listeners
            .of(ListenerKind::Outbound)
            .accept()
            .expect("it was lent");
        assert_eq!(from, client.local_addr().expect("it is connected"));

        let other: Arc<[IpAddr]> = ["fd00::1".parse().expect("an address")].into();
        node.say(PodEvent::Addresses(instance, Arc::clone(&other)))
            .await;
        let heard = proxy.hears().await;
        assert!(
            matches!(&heard, PodEvent::Addresses(of, now) if *of == instance && *now == other),
            "{heard:?}"
        );

        let mut idle = node.drain(instance).await;
        let PodEvent::Drain(of, told) = proxy.hears().await else {
            panic!("it drains");
        };
        assert_eq!(of, instance);
        assert!(idle.try_recv().is_err(), "something runs");
        told.send(()).expect("somebody waits");
        soon(idle).await.expect("it is told");

        let (told, mut down) = oneshot::channel();
        node.say(PodEvent::Down(instance, told)).await;
        let PodEvent::Down(of, told) = proxy.hears().await else {
            panic!("it is taken back");
        };
        assert_eq!(of, instance);
        assert!(down.try_recv().is_err(), "it is not cut yet");
        told.send(()).expect("somebody waits");
        soon(down).await.expect("it is told");
    })
    .await;
}

#[tokio::test]
async fn who_comes_later_is_lent_all_but_what_drains_and_that_when_it_goes_on() {
    with_a_path(async |path| {
        let mut node = Node::at(&path);
        let (first, second) = (lease(), lease());
        let (one, two) = (first.instance, second.instance);
        node.say(PodEvent::Up(first)).await;
        node.say(PodEvent::Up(second)).await;
        let mut early = Proxy::of(&path);
        for instance in [one, two] {
            assert_eq!(early.is_lent().await.instance, instance);
        }
        let _idle = node.drain(one).await;
        assert!(matches!(early.hears().await, PodEvent::Drain(of, _) if of == one));
        let mut late = Proxy::of(&path);
        assert_eq!(late.is_lent().await.instance, two);
        node.serves(2).await;
        node.say(PodEvent::Revive(one)).await;
        assert!(matches!(early.hears().await, PodEvent::Revive(of) if of == one));
        assert_eq!(late.is_lent().await.instance, one);
    })
    .await;
}

#[tokio::test]
async fn who_leaves_is_lent_nothing_new_and_is_heard_out() {
    with_a_path(async |path| {
        let (mut node, mut old) = (Node::at(&path), Proxy::of(&path));
        let own = lease();
        let before = own.instance;
        node.say(PodEvent::Up(own)).await;
        old.is_lent().await;
        let mut new = Proxy::of(&path);
        new.is_lent().await;
        node.serves(2).await;
        old.leaving.cancel();
        node.serves(1).await;
        node.say(PodEvent::Up(lease())).await;
        new.is_lent().await;
        let idle = node.drain(before).await;
        assert!(matches!(new.hears().await, PodEvent::Drain(of, _) if of == before));
        let PodEvent::Drain(of, running) = old.hears().await else {
            panic!("it drains, and nothing was lent besides");
        };
        assert_eq!(of, before);
        running.send(()).expect("somebody waits");
        soon(idle).await.expect("it is told");
    })
    .await;
}

#[tokio::test]
async fn of_who_is_gone_nothing_runs() {
    with_a_path(async |path| {
        let (mut node, mut proxy) = (Node::at(&path), Proxy::of(&path));
        let own = lease();
        let instance = own.instance;
        node.say(PodEvent::Up(own)).await;
        proxy.is_lent().await;
        let idle = node.drain(instance).await;
        let PodEvent::Drain(_, _running) = proxy.hears().await else {
            panic!("it drains");
        };
        drop(proxy);
        soon(idle).await.expect("it is told");
        node.serves(0).await;
        // Nobody has it, so that nobody is waited for.
        let (told, down) = oneshot::channel();
        node.say(PodEvent::Down(instance, told)).await;
        let _ = soon(down).await;
    })
    .await;
}

/// One node process has lent a pod and is gone; the next one runs, and a proxy has both.
async fn after_a_restart(path: &Path) -> (Node, Proxy, Instance, u64) {
    let (first, mut proxy) = (Node::at(path), Proxy::of(path));
    let own = lease();
    let (before, netns) = (own.instance, own.cookie);
    first.say(PodEvent::Up(own)).await;
    proxy.is_lent().await;
    drop(first);
    let mut second = Node::at(path);
    second.serves(1).await;
    (second, proxy, before, netns)
}

#[tokio::test]
async fn what_the_next_node_process_lends_takes_the_place_of_what_its_predecessor_did() {
    with_a_path(async |path| {
        let (second, mut proxy, before, netns) = after_a_restart(&path).await;
        let own = lease_in(netns);
        let after = own.instance;
        second.say(PodEvent::Up(own)).await;
        second.say(PodEvent::Snapshot(BTreeSet::new())).await;
        assert_eq!(proxy.is_lent().await.instance, after);
        // What runs goes on, and then the old listeners go.
        let running = proxy.drains(before).await;
        running.send(()).expect("somebody waits");
        proxy.gives_back(before).await;
    })
    .await;
}

#[tokio::test]
async fn what_runs_of_a_pod_is_cut_before_it_is_served_as_another_one() {
    with_a_path(async |path| {
        let (second, mut proxy, before, netns) = after_a_restart(&path).await;
        let mut own = lease_in(netns);
        own.identity = Identity::new("td", "ns", "another");
        let after = own.instance;
        second.say(PodEvent::Up(own)).await;
        proxy.gives_back(before).await;
        assert_eq!(proxy.is_lent().await.instance, after);
    })
    .await;
}

#[tokio::test]
async fn what_no_node_lends_any_more_is_cut_once_all_is_lent_and_not_before() {
    with_a_path(async |path| {
        let (second, mut proxy, before, _) = after_a_restart(&path).await;
        let own = lease();
        let after = own.instance;
        second.say(PodEvent::Up(own)).await;
        assert_eq!(proxy.is_lent().await.instance, after);
        let early = timeout(Duration::from_millis(100), proxy.events.recv()).await;
        assert!(early.is_err(), "{early:?}");
        second.say(PodEvent::Snapshot(BTreeSet::new())).await;
        proxy.gives_back(before).await;
    })
    .await;
}

#[tokio::test]
async fn what_is_not_decided_goes_on_until_it_is() {
    with_a_path(async |path| {
        let (second, mut proxy, before, netns) = after_a_restart(&path).await;
        // As many as a node may have.
        let undecided = (netns..netns + 1024).collect();
        second.say(PodEvent::Snapshot(undecided)).await;
        let early = timeout(Duration::from_millis(100), proxy.events.recv()).await;
        assert!(early.is_err(), "{early:?}");
        proxy.lent(|lent| *lent == Lent::All).await;
        let (told, clear) = oneshot::channel();
        second.say(PodEvent::Clear(netns, told)).await;
        proxy.gives_back(before).await;
        soon(clear).await.expect("it is told");
    })
    .await;
}

#[tokio::test]
async fn what_leaves_is_drained_and_cut_whichever_node_process_has_lent_it() {
    with_a_path(async |path| {
        let (second, mut proxy, before, netns) = after_a_restart(&path).await;
        let own = lease_in(netns);
        let after = own.instance;
        second.say(PodEvent::Up(own)).await;
        proxy.is_lent().await;
        let mut idle = second.drain(after).await;
        let running = [proxy.drains(before).await, proxy.drains(after).await];
        let [old, new] = running;
        new.send(()).expect("somebody waits");
        let early = timeout(Duration::from_millis(100), &mut idle).await;
        assert!(early.is_err(), "the old one still runs");
        old.send(()).expect("somebody waits");
        proxy.gives_back(before).await;
        soon(idle).await.expect("it is told");
        let (told, down) = oneshot::channel();
        second.say(PodEvent::Down(after, told)).await;
        proxy.gives_back(after).await;
        soon(down).await.expect("it is told");
    })
    .await;
}

#[tokio::test]
async fn what_a_node_process_has_never_lent_drains_before_it_is_taken_back() {
    with_a_path(async |path| {
        let (second, mut proxy, before, netns) = after_a_restart(&path).await;
        second.say(PodEvent::Snapshot([netns].into())).await;
        let (told, mut idle) = oneshot::channel();
        second.say(PodEvent::DrainUnleased(netns, told)).await;
        let running = proxy.drains(before).await;
        let early = timeout(Duration::from_millis(100), &mut idle).await;
        assert!(early.is_err(), "it still runs");
        running.send(()).expect("somebody waits");
        soon(idle).await.expect("it is told");
        let (told, clear) = oneshot::channel();
        second.say(PodEvent::Clear(netns, told)).await;
        proxy.gives_back(before).await;
        soon(clear).await.expect("it is told");
    })
    .await;
}

#[tokio::test]
async fn what_a_node_process_has_never_lent_is_taken_back_as_well() {
    with_a_path(async |path| {
        let (second, mut proxy, before, netns) = after_a_restart(&path).await;
        let (told, mut clear) = oneshot::channel();
        second.say(PodEvent::Clear(netns, told)).await;
        let PodEvent::Down(of, told) = proxy.hears().await else {
            panic!("it is taken back");
        };
        assert_eq!(of, before);
        assert!(clear.try_recv().is_err(), "it is not cut yet");
        told.send(()).expect("somebody waits");
        soon(clear).await.expect("it is told");
    })
    .await;
}

#[tokio::test]
async fn what_a_node_process_takes_back_at_its_start_waits_for_the_proxy_that_is_about_to_come() {
    with_a_path(async |path| {
        let node = Node::at(&path);
        let netns = lease().cookie;
        let (told, mut clear) = oneshot::channel();
        node.say(PodEvent::Clear(netns, told)).await;
        node.say(PodEvent::Snapshot(BTreeSet::new())).await;
        let early = timeout(Duration::from_millis(100), &mut clear).await;
        assert!(early.is_err(), "a proxy may come");
        let proxy = ByHand::at(&path);
        let said = proxy.hears().await;
        assert!(matches!(said, Some(NodeMessage::Welcome(_))), "{said:?}");
        proxy.acks();
        let said = proxy.hears().await;
        assert!(
            matches!(&said, Some(NodeMessage::Del(of)) if of.netns == netns),
            "{said:?}"
        );
        let early = timeout(Duration::from_secs(3), &mut clear).await;
        assert!(early.is_err(), "it is not cut yet");
        proxy.acks();
        soon(clear).await.expect("it is told");
    })
    .await;
}

#[tokio::test]
async fn what_a_node_process_takes_back_at_its_start_waits_for_nobody_for_long() {
    with_a_path(async |path| {
        let node = Node::at(&path);
        let (told, clear) = oneshot::channel();
        node.say(PodEvent::Clear(lease().cookie, told)).await;
        let end = timeout(Duration::from_secs(10), clear).await;
        end.expect("no proxy comes").expect("it is told");
    })
    .await;
}

#[tokio::test]
async fn a_pod_that_is_lent_while_it_drains_goes_on() {
    with_a_path(async |path| {
        let (first, mut proxy) = (Node::at(&path), Proxy::of(&path));
        let own = lease();
        let (instance, netns) = (own.instance, own.cookie);
        first.say(PodEvent::Up(own)).await;
        proxy.is_lent().await;
        let _idle = first.drain(instance).await;
        let before = proxy.drains(instance).await;
        drop(first);
        let second = Node::at(&path);
        let mut again = lease_in(netns);
        again.instance = instance;
        second.say(PodEvent::Up(again)).await;
        let heard = proxy.hears().await;
        assert!(
            matches!(heard, PodEvent::Revive(of) if of == instance),
            "{heard:?}"
        );
        assert!(matches!(proxy.hears().await, PodEvent::Addresses(..)));
        // That nothing ran before is no answer to what is asked now.
        before.send(()).expect("somebody waits");
        let mut idle = second.drain(instance).await;
        let running = proxy.drains(instance).await;
        let early = timeout(Duration::from_millis(100), &mut idle).await;
        assert!(early.is_err(), "something runs");
        running.send(()).expect("somebody waits");
        soon(idle).await.expect("it is told");
    })
    .await;
}

#[tokio::test]
async fn a_pod_that_cannot_be_served_is_refused_alone_and_lent_again() {
    with_a_path(async |path| {
        let (mut node, mut proxy) = (Node::at(&path), Proxy::of(&path));
        let (ended, own) = (lease(), lease());
        let listener = ended
            .listeners
            .of(ListenerKind::Inbound)
            .try_clone()
            .expect("a descriptor");
        let listener = socket2::Socket::from(listener);
        listener.shutdown(Shutdown::Both).expect("it listens");
        let refused = ended.instance;
        let next = own.instance;
        node.say(PodEvent::Up(ended)).await;
        node.say(PodEvent::Up(own)).await;
        assert_eq!(proxy.is_lent().await.instance, next);
        node.serves(1).await;
        assert_eq!(node.serving.borrow().refused.len(), 1);
        node.say(PodEvent::Snapshot(BTreeSet::new())).await;
        let lent = proxy.lent(|lent| matches!(lent, Lent::AllBut(_))).await;
        let why = "Pod ns/p: a listener of it does not listen any more";
        assert_eq!(lent, Lent::AllBut(vec![why.into()]));
        let idle = node.drain(next).await;
        let running = proxy.drains(next).await;
        running.send(()).expect("somebody waits");
        soon(idle).await.expect("it is told");
        listener.listen(1).expect("it may again");
        assert_eq!(proxy.is_lent().await.instance, refused);
        proxy.lent(|lent| *lent == Lent::All).await;
        let refused = node.serving.wait_for(|serving| serving.refused.is_empty());
        assert_eq!(soon(refused).await.expect("the node runs").proxies, 1);
    })
    .await;
}

#[tokio::test]
async fn a_pod_whose_descriptors_find_no_room_is_refused_alone_and_what_runs_goes_on() {
    with_a_path(async |path| {
        let (first, mut proxy) = (Node::at(&path), Proxy::of(&path));
        let own = lease();
        let (before, netns) = (own.instance, own.cookie);
        first.say(PodEvent::Up(own)).await;
        proxy.is_lent().await;
        drop(first);
        let listener = SeamListener::open(&path).expect("a socket");
        let node = soon(listener.accept()).await.expect("a proxy");
        soon(node.receive()).await.expect("a hello");
        let asks = async |said: NodeMessage, without_room: bool| {
            let request = said.packet();
            match without_room {
                true => node.send_without_room(&request, std::io::stdin().as_fd()),
                false => node.send(&request, &[]).expect("there is room"),
            }
            let packet = soon(node.receive()).await.expect("a packet");
            let packet = packet.expect("it does not let go");
            match ProxyMessage::read(&packet.bytes).expect("an answer") {
                ProxyMessage::Ack(ack) => ack.error,
                told => panic!("{told:?}"),
            }
        };
        let welcome = NodeMessage::Welcome(Welcome {
            lease: VERSION,
            ..Welcome::default()
        });
        assert_eq!(asks(welcome, false).await, "");
        let add = |service_account: &str| {
            NodeMessage::Add(Add {
                uid: "c//Pod/ns/p".into(),
                workload_info: Some(WorkloadInfo {
                    name: "p".into(),
                    namespace: "ns".into(),
                    service_account: service_account.into(),
                }),
                trust_domain: "td".into(),
                netns,
                ..Add::default()
            })
        };
        let error = asks(add("sa"), true).await;
        assert!(error.contains("open files"), "{error}");
        let snapshot = NodeMessage::SnapshotSent(Snapshot::default());
        assert_eq!(asks(snapshot, false).await, "");
        let early = timeout(Duration::from_millis(100), proxy.events.recv()).await;
        assert!(early.is_err(), "{early:?}");
        // What is another's is cut all the same.
        let (error, ()) = tokio::join!(asks(add("other"), true), proxy.gives_back(before));
        assert!(error.contains("open files"), "{error}");
    })
    .await;
}

#[tokio::test]
async fn a_pod_is_served_once_the_configuration_has_it_as_the_node_does_and_keeps_no_other_waiting()
{
    with_a_path(async |path| {
        let (mut node, mut proxy) = (Node::at(&path), Proxy::of(&path));
        proxy.known.set(false);
        let pods = [lease(), lease(), lease()];
        let instances = pods.each_ref().map(|pod| pod.instance);
        let [first, second, third] = pods;
        node.say(PodEvent::Up(first)).await;
        node.say(PodEvent::Snapshot(BTreeSet::new())).await;
        let early = timeout(Duration::from_secs(1), proxy.events.recv()).await;
        assert!(early.is_err(), "{early:?}");
        proxy.known.set(true);
        let begun = Instant::now();
        assert_eq!(proxy.is_lent().await.instance, instances[0]);
        assert!(begun.elapsed() < Duration::from_secs(1), "at once");
        proxy.known.set(false);
        node.say(PodEvent::Up(second)).await;
        node.say(PodEvent::Up(third)).await;
        let lent = proxy.lent(|lent| matches!(lent, Lent::AllBut(all) if all.len() == 2));
        let why = "Pod ns/p: what this proxy has read of the configuration";
        assert!(matches!(lent.await, Lent::AllBut(all) if all[0].starts_with(why)));
        let refused = node.serving.wait_for(|serving| serving.refused.len() == 2);
        soon(refused).await.expect("the node runs");
        let (told, down) = oneshot::channel();
        node.say(PodEvent::Down(instances[0], told)).await;
        proxy.gives_back(instances[0]).await;
        soon(down).await.expect("it is told");
        proxy.known.set(true);
        for _ in 0..2 {
            proxy.is_lent().await;
        }
        proxy.lent(|lent| *lent == Lent::All).await;
    })
    .await;
}

#[tokio::test]
async fn who_speaks_another_version_is_not_let_in() {
    with_a_path(async |path| {
        let node = Node::at(&path);
        node.say(PodEvent::Up(lease())).await;
        for lease in [0, VERSION + 1] {
            let channel = Channel::connect(&path).expect("somebody listens");
            let hello = Hello { version: 1, lease };
            channel.send(&hello.packet(), &[]).expect("there is room");
            let said = soon(channel.receive()).await.expect("an answer");
            let said = said.expect("an answer").bytes;
            let said = NodeMessage::read(&said).expect("a request");
            let welcome = Welcome {
                lease: VERSION,
                ..Welcome::default()
            };
            assert_eq!(said, NodeMessage::Welcome(welcome));
            let said = soon(channel.receive()).await.expect("an end");
            assert!(said.is_none(), "{said:?}");
        }
    })
    .await;
}

#[tokio::test]
async fn a_proxy_takes_nothing_of_a_node_that_comes_back_with_other_settings() {
    with_a_path(async |path| {
        let (first, mut proxy) = (Node::at(&path), Proxy::of(&path));
        let own = lease();
        let (before, netns) = (own.instance, own.cookie);
        first.say(PodEvent::Up(own)).await;
        first.say(PodEvent::Snapshot(BTreeSet::new())).await;
        proxy.is_lent().await;
        proxy.lent(|lent| *lent == Lent::All).await;
        drop(first);
        let second = Node::with(&path, &of_cluster("other"));
        second.say(PodEvent::Up(lease_in(netns))).await;
        second.say(PodEvent::Snapshot(BTreeSet::new())).await;
        let refused = proxy.lent(|lent| matches!(lent, Lent::Refused(_))).await;
        let own = std::process::id();
        let why = format!(
            "node one (pid {own}) was started with --cluster-id other, and its proxy (pid {own}) with \
             --cluster-id own: start one of them anew"
        );
        assert_eq!(refused, Lent::Refused(why));
        assert_eq!(second.serving.borrow().proxies, 0);
        // What runs goes on without anything new, and is given back when it has ended.
        let running = proxy.drains(before).await;
        let early = timeout(Duration::from_millis(100), proxy.events.recv()).await;
        assert!(early.is_err(), "{early:?}");
        running.send(()).expect("somebody waits");
        proxy.gives_back(before).await;
        drop(second);
        let third = Node::at(&path);
        third.say(PodEvent::Up(lease_in(netns))).await;
        third.say(PodEvent::Snapshot(BTreeSet::new())).await;
        proxy.is_lent().await;
        proxy.lent(|lent| *lent == Lent::All).await;
    })
    .await;
}

#[tokio::test]
async fn a_proxy_takes_nothing_new_once_its_node_comes_back_in_another_version() {
    with_a_path(async |path| {
        let (first, mut proxy) = (Node::at(&path), Proxy::of(&path));
        let own = lease();
        let before = own.instance;
        first.say(PodEvent::Up(own)).await;
        proxy.is_lent().await;
        drop(first);
        let listener = SeamListener::open(&path).expect("a socket");
        let second = soon(listener.accept()).await.expect("a proxy");
        let welcome = NodeMessage::Welcome(Welcome {
            lease: VERSION + 1,
            ..Welcome::default()
        });
        let said = second.send(&welcome.packet(), &[]);
        said.expect("there is room");
        let running = proxy.drains(before).await;
        running.send(()).expect("somebody waits");
        proxy.gives_back(before).await;
    })
    .await;
}

#[tokio::test]
async fn a_proxy_that_is_not_let_in_comes_again_less_and_less_often() {
    with_a_path(async |path| {
        let listener = SeamListener::open(&path).expect("a socket");
        let started = Instant::now();
        let refuses = async {
            for _ in 0..6 {
                let channel = listener.accept().await.expect("a proxy");
                let hello = channel.receive().await.expect("a hello");
                drop((hello, channel));
            }
        };
        let (events, _told) = mpsc::channel(1);
        let settings = SharedSettings::default();
        let (knows, leaving) = (
            Box::new(|_: &str, _: &Identity| true),
            CancellationToken::new(),
        );
        let borrower = Borrower::new(path.clone(), settings, knows, events, leaving);
        tokio::select! {
            () = borrower.run() => panic!("it comes again"),
            () = refuses => {}
        }
        // Of 10, 20, 40, 80 and 160 ms.
        assert!(started.elapsed() >= Duration::from_millis(310));
    })
    .await;
}

/// A proxy of which each word is said by hand.
struct ByHand(Channel);

impl ByHand {
    fn at(path: &Path) -> Self {
        let new = Self(Channel::connect(path).expect("somebody listens"));
        let hello = Hello {
            version: 1,
            lease: VERSION,
        };
        new.0.send(&hello.packet(), &[]).expect("there is room");
        new
    }

    fn say(&self, told: ProxyMessage) {
        self.0.send(&told.packet(), &[]).expect("there is room");
    }

    fn acks(&self) {
        self.say(ProxyMessage::Ack(Ack::default()));
    }

    /// What the node says next, if it has not let go.
    async fn hears(&self) -> Option<NodeMessage> {
        let packet = soon(self.0.receive()).await.expect("a packet, or the end");
        packet.map(|packet| NodeMessage::read(&packet.bytes).expect("a request"))
    }

    /// Answers until it has heard this.
    async fn answers_until(&self, what: fn(&NodeMessage) -> bool) {
        loop {
            let said = self.hears().await.expect("it is not let go");
            if what(&said) {
                return;
            }
            self.acks();
        }
    }
}

#[tokio::test]
async fn who_does_not_answer_does_not_count_and_what_it_carries_is_waited_for() {
    with_a_path(async |path| {
        let mut node = Node::at(&path);
        let proxy = ByHand::at(&path);
        proxy
            .answers_until(|said| matches!(said, NodeMessage::Welcome(_)))
            .await;
        let early = timeout(Duration::from_millis(100), node.serving.changed()).await;
        assert!(early.is_err(), "it has answered nothing");
        proxy.acks();
        node.serves(1).await;
        let own = lease();
        let (instance, netns) = (own.instance, own.cookie);
        node.say(PodEvent::Up(own)).await;
        let mut idle = node.drain(instance).await;
        proxy
            .answers_until(|said| matches!(said, NodeMessage::Drain(_)))
            .await;
        node.serves(0).await;
        assert!(
            idle.try_recv().is_err(),
            "what it carries is not known to have ended"
        );
        proxy.acks();
        node.serves(1).await;
        let uid = String::new();
        proxy.say(ProxyMessage::Idle(PodRef { uid, netns }));
        soon(idle).await.expect("it is told");
    })
    .await;
}

#[tokio::test]
async fn a_cut_is_waited_for_from_when_the_proxy_is_told_as_long_as_it_answers() {
    with_a_path(async |path| {
        let node = Node::at(&path);
        let proxy = ByHand::at(&path);
        let pods = [lease(), lease()];
        let instances = pods.each_ref().map(|pod| pod.instance);
        for pod in pods {
            node.say(PodEvent::Up(pod)).await;
        }
        node.say(PodEvent::Snapshot(BTreeSet::new())).await;
        proxy
            .answers_until(|said| matches!(said, NodeMessage::SnapshotSent(_)))
            .await;
        proxy.acks();
        let mut cuts = Vec::new();
        for instance in instances {
            let (told, done) = oneshot::channel();
            node.say(PodEvent::Down(instance, told)).await;
            cuts.push(done);
        }
        // It takes four seconds for the first one, and stands still at the second.
        let (busy, mut cuts) = (Duration::from_secs(4), cuts.into_iter());
        let (mut first, mut second) = (cuts.next().expect("two"), cuts.next().expect("two"));
        let said = proxy.hears().await;
        assert!(matches!(said, Some(NodeMessage::Del(_))), "{said:?}");
        sleep(busy).await;
        assert!(first.try_recv().is_err(), "it has not answered");
        proxy.acks();
        soon(first).await.expect("it is told");
        let said = proxy.hears().await;
        assert!(matches!(said, Some(NodeMessage::Del(_))), "{said:?}");
        sleep(busy).await;
        assert!(second.try_recv().is_err(), "it has 5 s");
        soon(second).await.expect("it is not waited for any longer");
    })
    .await;
}

#[tokio::test]
async fn what_a_proxy_that_does_not_answer_is_to_give_back_is_waited_for_for_5_s() {
    with_a_path(async |path| {
        let mut node = Node::at(&path);
        let proxy = ByHand::at(&path);
        let own = lease();
        let instance = own.instance;
        node.say(PodEvent::Up(own)).await;
        node.say(PodEvent::Snapshot(BTreeSet::new())).await;
        proxy
            .answers_until(|said| matches!(said, NodeMessage::SnapshotSent(_)))
            .await;
        proxy.acks();
        node.serves(1).await;
        node.say(PodEvent::Up(lease())).await;
        // It stands still from here on.
        node.serves(0).await;
        let (told, mut cut) = oneshot::channel();
        node.say(PodEvent::Down(instance, told)).await;
        sleep(Duration::from_secs(4)).await;
        assert!(cut.try_recv().is_err(), "it has 5 s");
        soon(cut).await.expect("it is not waited for any longer");
    })
    .await;
}

#[tokio::test]
async fn what_drains_of_a_proxy_that_comes_again_has_not_ended() {
    with_a_path(async |path| {
        let mut node = Node::at(&path);
        let own = lease();
        let (instance, netns) = (own.instance, own.cookie);
        node.say(PodEvent::Up(own)).await;
        node.say(PodEvent::Snapshot(BTreeSet::new())).await;
        let is_drain = |said: &NodeMessage| matches!(said, NodeMessage::Drain(_));
        let first = ByHand::at(&path);
        let is_lent = |said: &NodeMessage| matches!(said, NodeMessage::SnapshotSent(_));
        first.answers_until(is_lent).await;
        first.acks();
        // Until it waits no longer for proxies of an earlier node process.
        tokio::time::sleep(Duration::from_secs(3)).await;
        let mut idle = node.drain(instance).await;
        first.answers_until(is_drain).await;
        first.acks();
        drop(first);
        node.serves(0).await;
        let again = ByHand::at(&path);
        again.answers_until(is_drain).await;
        again.acks();
        let early = timeout(Duration::from_secs(3), &mut idle).await;
        assert!(early.is_err(), "something runs");
        let uid = String::new();
        again.say(ProxyMessage::Idle(PodRef { uid, netns }));
        soon(idle).await.expect("it is told");
    })
    .await;
}

#[tokio::test]
async fn who_answers_what_it_was_not_asked_is_let_go() {
    with_a_path(async |path| {
        let _node = Node::at(&path);
        let proxy = ByHand::at(&path);
        proxy
            .answers_until(|said| matches!(said, NodeMessage::Welcome(_)))
            .await;
        proxy.acks();
        proxy.acks();
        assert_eq!(proxy.hears().await, None);
    })
    .await;
}

//! Both ends of the seam, over a socket.

use std::net::{IpAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use prost::Message;
use tempfile::TempDir;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::borrow::Borrower;
use super::lend::Lender;
use super::packets::{Channel, SeamListener};
use super::wire::{Hello, ProxyMessage, Response, VERSION};
use super::{Instance, Lease, Listeners, PodEvent, Stamp};
use crate::mesh::Identity;
use crate::sys::netns::Netns;

fn lease() -> Box<Lease> {
    let listener = || TcpListener::bind("127.0.0.1:0").expect("a port");
    Box::new(Lease {
        instance: Instance::next(),
        uid: "c//Pod/ns/p".into(),
        namespace: "ns".into(),
        name: "p".into(),
        identity: Identity::new("td", "ns", "sa"),
        addresses: [IpAddr::from([10, 0, 0, 1])].into(),
        netns: Netns::own().expect("/proc is there"),
        listeners: Listeners {
            outbound: listener(),
            inbound: listener(),
            hbone: listener(),
        },
        stamp: Arc::default(),
    })
}

/// A node, in a task that ends with it.
struct Node {
    events: mpsc::Sender<PodEvent>,
    task: tokio::task::JoinHandle<()>,
    serving: tokio::sync::watch::Receiver<usize>,
}

/// Who serves, in a task that ends with it.
struct Proxy {
    events: mpsc::Receiver<PodEvent>,
    leaving: CancellationToken,
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
    #[expect(clippy::disallowed_methods, reason = "a test stands for its process")]
    fn at(path: &Path) -> Self {
        let entry = SeamListener::open(path).expect("a socket");
        let (events, inbox) = mpsc::channel(8);
        let (lender, serving) = Lender::new("one", Arc::<Stamp>::default());
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
        let serving = self.serving.wait_for(|serving| *serving == count);
        soon(serving).await.expect("the node runs");
    }
}

impl Proxy {
    #[expect(clippy::disallowed_methods, reason = "a test stands for its process")]
    fn of(path: &Path) -> Self {
        let (events, inbox) = mpsc::channel(8);
        let leaving = CancellationToken::new();
        let borrower = Borrower::new(path.to_owned(), events, leaving.clone());
        let task = tokio::task::spawn_local(borrower.run());
        Self {
            events: inbox,
            leaving,
            task,
        }
    }

    async fn hears(&mut self) -> PodEvent {
        soon(self.events.recv()).await.expect("the proxy runs")
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
        let (_, from) = lent.listeners.outbound.accept().expect("it was lent");
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

#[tokio::test]
async fn what_another_node_process_does_not_lend_any_more_goes_once_nothing_runs_of_it() {
    with_a_path(async |path| {
        let (first, mut proxy) = (Node::at(&path), Proxy::of(&path));
        let own = lease();
        let before = own.instance;
        first.say(PodEvent::Up(own)).await;
        proxy.is_lent().await;
        drop(first);
        let second = Node::at(&path);
        let own = lease();
        let after = own.instance;
        second.say(PodEvent::Up(own)).await;
        // In whichever order: it may have come before the second node was told of its pod.
        let mut running = None;
        for _ in 0..2 {
            match proxy.hears().await {
                PodEvent::Up(lease) => assert_eq!(lease.instance, after),
                PodEvent::Drain(of, told) => {
                    assert_eq!(of, before);
                    running = Some(told);
                }
                event => panic!("{event:?}"),
            }
        }
        running
            .expect("it drains")
            .send(())
            .expect("somebody waits");
        let PodEvent::Down(of, told) = proxy.hears().await else {
            panic!("it goes");
        };
        assert_eq!(of, before);
        told.send(()).expect("somebody waits");
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
            channel
                .send(&hello.encode_to_vec(), &[])
                .expect("there is room");
            let said = soon(channel.receive()).await.expect("an end");
            assert!(said.is_none(), "{said:?}");
        }
    })
    .await;
}

#[tokio::test]
async fn who_does_not_answer_is_let_go_and_keeps_nobody_waiting() {
    with_a_path(async |path| {
        let mut node = Node::at(&path);
        let channel = Channel::connect(&path).expect("somebody listens");
        let hello = Hello {
            version: 1,
            lease: VERSION,
        };
        channel
            .send(&hello.encode_to_vec(), &[])
            .expect("there is room");
        node.serves(1).await;
        let welcome = channel.receive().await.expect("a welcome");
        assert!(welcome.is_some());
        node.serves(0).await;
        // Nor is one that answers what it was not asked.
        let channel = Channel::connect(&path).expect("somebody listens");
        channel
            .send(&hello.encode_to_vec(), &[])
            .expect("there is room");
        let ack = Response {
            told: Some(ProxyMessage::Ack(super::wire::Ack::default())),
        };
        for _ in 0..3 {
            channel
                .send(&ack.encode_to_vec(), &[])
                .expect("there is room");
        }
        node.serves(1).await;
        node.serves(0).await;
    })
    .await;
}

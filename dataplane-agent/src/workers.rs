//! The workers: a thread each, with a runtime of its own, on which a connection lives and dies.
//!
//! A pod has a home worker, which accepts for it and hands a connection to another one only if that
//! has much less to do. What workers share is immutable or counts.

use std::collections::HashMap;
use std::io;
use std::net::TcpStream;
use std::rc::Rc;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::runtime::Builder;
use tokio::sync::{mpsc, oneshot};
use tokio::task::LocalSet;

use crate::accept::listener::Listener;
use crate::authorize::Authorizer;
use crate::capture::{Instance, Listeners, LocalPod, PodEvent, named};
use crate::drain::{Load, Scope};
use crate::identity::Certs;
use crate::journey::{Corridor, Entrance, walk};
use crate::observe::Observer;
use crate::resolve::MeshReader;
use crate::transport::means::OfNode;
use crate::transport::{Carrier, Pool};

/// How much less another worker must have to do before a connection is handed to it.
const MUCH: usize = 8;
/// A tunnel that carries nothing for this long is closed.
const IDLE: Duration = Duration::from_secs(300);

/// What all workers are given.
#[derive(Clone, Debug)]
pub struct Shared {
    /// The mesh.
    pub mesh: MeshReader,
    /// Policy.
    pub authorizer: Authorizer,
    /// Certificates.
    pub certs: Certs,
    /// Who watches.
    pub observer: Observer,
}

/// The workers.
#[derive(Debug)]
pub struct Workers {
    doors: Vec<Door>,
    threads: Vec<JoinHandle<()>>,
    homes: HashMap<Instance, usize>,
}

/// The way to a worker.
#[derive(Clone, Debug)]
struct Door {
    orders: mpsc::UnboundedSender<Order>,
    load: Load,
}

#[derive(Debug)]
enum Order {
    /// A pod is here; its listeners too, if this is its home.
    Up(Arc<LocalPod>, Option<Listeners>),
    /// A connection from another worker.
    Take(Arc<LocalPod>, Entrance, TcpStream),
    /// Nothing new; the answer goes when nothing of the pod runs any more.
    Drain(Instance, Answer),
    /// It goes on after all.
    Revive(Instance),
    /// The answer goes when nothing of the pod is left.
    Down(Instance, Answer),
    /// No more orders.
    Stop,
}

/// Shared by all workers that were ordered the same: it is given when the last one lets go of it.
type Answer = Arc<OnDrop>;

#[derive(Debug)]
struct OnDrop(Option<oneshot::Sender<()>>);

impl OnDrop {
    fn answer(told: oneshot::Sender<()>) -> Answer {
        Arc::new(Self(Some(told)))
    }
}

impl Drop for OnDrop {
    fn drop(&mut self) {
        if let Some(told) = self.0.take() {
            // Whoever asked may have given up.
            let _ = told.send(());
        }
    }
}

impl Door {
    fn order(&self, order: Order) {
        if self.orders.send(order).is_err() {
            tracing::error!("a worker is gone");
        }
    }
}

impl Workers {
    /// Starts as many.
    ///
    /// # Errors
    /// A thread or its runtime cannot be made.
    pub fn start(count: usize, shared: &Shared) -> io::Result<Self> {
        let (doors, inboxes): (Vec<Door>, Vec<_>) = (0..count.max(1))
            .map(|_| {
                let (orders, inbox) = mpsc::unbounded_channel();
                (
                    Door {
                        orders,
                        load: Load::default(),
                    },
                    inbox,
                )
            })
            .unzip();
        let mut threads = Vec::new();
        for (number, inbox) in inboxes.into_iter().enumerate() {
            let (shared, doors) = (shared.clone(), doors.clone());
            let runtime = Builder::new_current_thread().enable_all().build()?;
            let thread = std::thread::Builder::new().name(format!("worker-{number}"));
            threads.push(thread.spawn(move || {
                let _whole = AllOrNothing;
                let work = Worker::new(number, doors, shared).work(inbox);
                LocalSet::new().block_on(&runtime, work);
            })?);
        }
        Ok(Self {
            doors,
            threads,
            homes: HashMap::new(),
        })
    }

    /// Does what capture says of a pod.
    pub fn apply(&mut self, event: PodEvent) {
        match event {
            PodEvent::Up(pod, listeners) => {
                let home = self.home();
                self.homes.insert(pod.instance, home);
                // Who accepts comes last: it hands connections to the others.
                for (number, door) in self.doors.iter().enumerate() {
                    if number != home {
                        door.order(Order::Up(Arc::clone(&pod), None));
                    }
                }
                self.doors[home].order(Order::Up(pod, Some(listeners)));
            }
            PodEvent::Drain(instance, told) => self.all(instance, told, Order::Drain),
            PodEvent::Revive(instance) => {
                for door in &self.doors {
                    door.order(Order::Revive(instance));
                }
            }
            PodEvent::Down(instance, told) => {
                self.homes.remove(&instance);
                self.all(instance, told, Order::Down);
            }
        }
    }

    /// Lets what runs go on until it ends, or for as long as `drain`; then cuts it and ends.
    pub async fn stop(mut self, drain: Duration) {
        let instances: Vec<Instance> = self.homes.keys().copied().collect();
        let idle = instances.iter().map(|instance| {
            let (told, idle) = oneshot::channel();
            self.all(*instance, told, Order::Drain);
            idle
        });
        let idle = futures_util::future::join_all(idle.collect::<Vec<_>>());
        if tokio::time::timeout(drain, idle).await.is_err() {
            tracing::warn!("connection failed to drain within the timeout");
        }
        let down = instances.iter().map(|instance| {
            let (told, down) = oneshot::channel();
            self.all(*instance, told, Order::Down);
            down
        });
        futures_util::future::join_all(down.collect::<Vec<_>>()).await;
        for door in &self.doors {
            door.order(Order::Stop);
        }
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a worker panicked");
            }
        }
    }

    /// The worker that is home to the fewest pods.
    fn home(&self) -> usize {
        let pods = |number: &usize| self.homes.values().filter(|home| *home == number).count();
        (0..self.doors.len()).min_by_key(pods).unwrap_or(0)
    }

    /// Orders it from all workers; `told` hears when all have done it.
    fn all(&self, pod: Instance, told: oneshot::Sender<()>, order: fn(Instance, Answer) -> Order) {
        let answer = OnDrop::answer(told);
        for door in &self.doors {
            door.order(order(pod, Arc::clone(&answer)));
        }
    }
}

/// A connection that panics ends alone. A worker that does takes the process with it: pods stay
/// captured and the next agent serves them, which one with a worker less would not.
struct AllOrNothing;

impl Drop for AllOrNothing {
    fn drop(&mut self) {
        if std::thread::panicking() {
            tracing::error!("a worker panicked");
            std::process::abort();
        }
    }
}

/// One worker, on its thread.
struct Worker {
    number: usize,
    doors: Vec<Door>,
    corridor: Corridor,
    pods: HashMap<Instance, Here>,
    /// What the worker itself does.
    chores: Scope,
}

/// A pod on a worker.
struct Here {
    pod: Arc<LocalPod>,
    /// Its connections and tunnels.
    scope: Scope,
    /// What accepts for it, if this is its home.
    entrances: Scope,
}

impl Worker {
    fn new(number: usize, doors: Vec<Door>, shared: Shared) -> Self {
        let means = Rc::new(OfNode {
            certs: shared.certs.clone(),
        });
        let pool = Pool::new(means.clone(), IDLE);
        Self {
            number,
            doors,
            corridor: Corridor {
                mesh: shared.mesh,
                authorizer: shared.authorizer,
                carrier: Carrier { means, pool },
                certs: shared.certs,
                observer: shared.observer,
            },
            pods: HashMap::new(),
            chores: Scope::new(Load::default()),
        }
    }

    async fn work(mut self, mut inbox: mpsc::UnboundedReceiver<Order>) {
        self.chores
            .spawn(Rc::clone(&self.corridor.carrier.pool).release_idle());
        while let Some(order) = inbox.recv().await {
            match order {
                Order::Up(pod, listeners) => self.up(&pod, listeners),
                Order::Take(pod, entrance, tcp) => match self.pods.get(&pod.instance) {
                    Some(here) => take(&self.corridor, &here.scope, &pod, entrance, tcp),
                    // It went down meanwhile.
                    None => _ = socket2::SockRef::from(&tcp).set_linger(Some(Duration::ZERO)),
                },
                Order::Drain(instance, answer) => self.drain(instance, answer),
                Order::Revive(instance) => {
                    if let Some(here) = self.pods.get(&instance) {
                        here.scope.close(false);
                    }
                }
                Order::Down(instance, answer) => self.down(instance, answer),
                Order::Stop => break,
            }
        }
        self.chores.cut().await;
    }

    fn up(&mut self, pod: &Arc<LocalPod>, listeners: Option<Listeners>) {
        let here = Here {
            pod: Arc::clone(pod),
            scope: Scope::new(self.doors[self.number].load.clone()),
            entrances: Scope::new(Load::default()),
        };
        if let Some(listeners) = listeners {
            for (entrance, listener) in [
                (Entrance::Outbound, listeners.outbound),
                (Entrance::Inbound, listeners.inbound),
                (Entrance::Hbone, listeners.hbone),
            ] {
                match Listener::new(listener) {
                    Ok(listener) => self.open(&here, entrance, listener),
                    Err(error) => tracing::error!(pod = %named(&pod.uid), %error, "cannot listen"),
                }
            }
        }
        self.pods.insert(pod.instance, here);
    }

    /// Accepts for a pod, and gives each connection to a worker.
    fn open(&self, here: &Here, entrance: Entrance, listener: Listener) {
        let (corridor, scope) = (self.corridor.clone(), here.scope.clone());
        let (pod, doors, number) = (Arc::clone(&here.pod), self.doors.clone(), self.number);
        here.entrances.spawn(async move {
            loop {
                let tcp = listener.accept().await;
                match elsewhere(&doors, number) {
                    Some(door) => door.order(Order::Take(Arc::clone(&pod), entrance, tcp)),
                    None => take(&corridor, &scope, &pod, entrance, tcp),
                }
            }
        });
    }

    fn drain(&self, instance: Instance, answer: Answer) {
        let Some(here) = self.pods.get(&instance) else {
            return;
        };
        here.scope.close(true);
        self.corridor.carrier.pool.forget(instance);
        let scope = here.scope.clone();
        self.chores.spawn(async move {
            scope.idle().await;
            drop(answer);
        });
    }

    fn down(&mut self, instance: Instance, answer: Answer) {
        let Some(here) = self.pods.remove(&instance) else {
            return;
        };
        self.corridor.carrier.pool.forget(instance);
        self.chores.spawn(async move {
            here.entrances.cut().await;
            here.scope.cut().await;
            drop(answer);
        });
    }
}

/// A worker that has much less to do than this one.
fn elsewhere(doors: &[Door], here: usize) -> Option<&Door> {
    let least = doors.iter().min_by_key(|door| door.load.get())?;
    (least.load.get() + MUCH < doors[here].load.get()).then_some(least)
}

/// Begins a connection on this worker.
fn take(
    corridor: &Corridor,
    scope: &Scope,
    pod: &Arc<LocalPod>,
    entrance: Entrance,
    tcp: TcpStream,
) {
    match tokio::net::TcpStream::from_std(tcp) {
        Ok(tcp) => {
            let (corridor, pod, in_scope) = (corridor.clone(), Arc::clone(pod), scope.clone());
            scope.spawn(async move { walk(corridor, in_scope, pod, entrance, tcp).await });
        }
        Err(error) => tracing::warn!(pod = %named(&pod.uid), %error, "cannot take a connection"),
    }
}

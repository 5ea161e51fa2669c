//! The workers: a thread each, with a runtime of its own, on which a connection lives and dies.
//!
//! A pod has a home worker, which accepts for it and hands a connection to another one if that has much
//! less to do; when it is busy itself it looks at two others, in turn. What a worker has to do is how much of the last second it was busy, and what it has begun
//! since: a connection that is new may turn out to be busy, one that is idle costs nothing. What workers
//! share is immutable or counts.

use std::collections::HashMap;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::runtime::{Builder, Runtime};
use tokio::sync::{mpsc, oneshot};
use tokio::task::LocalSet;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

use crate::drain::{Answer, Scope, tasks};
use crate::load::{BUSY, Begun, Load};
use crate::mesh::MeshReader;
use crate::mesh::workload::named;
use crate::observe::Observer;
use crate::proxy::accept::LocalPod;
use crate::proxy::accept::listener::Listener;
use crate::proxy::authorize::Authorizer;
use crate::proxy::connection::{Admitted, Corridor, Entrance, admit, walk};
use crate::proxy::identity::Certs;
use crate::proxy::limits::NodePlaces;
use crate::proxy::transport::means::OfNode;
use crate::proxy::transport::{Carrier, Pool};
use crate::seam::{Instance, Listeners, PodEvent};

/// How much less another worker must have to do before a connection is handed to it: that costs a wake
/// of another thread, and that worker may have no tunnel to where the connection goes.
const MUCH: u32 = BUSY / 2;
/// How often workers are looked at while nothing is accepted.
const LOOK: Duration = Duration::from_secs(1);
/// A tunnel that carries nothing for this long is closed.
const IDLE: Duration = Duration::from_secs(300);
/// How long whoever ends the workers waits until what they have cut is told of.
const CUT: Duration = Duration::from_secs(2);

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
    /// How many connections there may be.
    pub places: NodePlaces,
}

/// The workers.
#[derive(Debug)]
pub struct Workers {
    doors: Vec<Door>,
    threads: Vec<JoinHandle<()>>,
    homes: HashMap<Instance, Home>,
}

/// Where a pod is at home.
#[derive(Debug)]
struct Home {
    pod: Arc<LocalPod>,
    worker: usize,
    /// What all workers run for it.
    tasks: TaskTracker,
}

/// The way to a worker.
#[derive(Clone, Debug)]
struct Door {
    orders: mpsc::UnboundedSender<Order>,
    load: Load,
}

#[derive(Debug)]
enum Order {
    /// A pod is here, of which tasks are counted in this; its listeners too, if this is its home.
    Up(Arc<LocalPod>, TaskTracker, Option<Listeners>),
    /// A connection from another worker. It weighs on this one already, and is one of the pod's tasks.
    Take(Arc<LocalPod>, Box<Admitted>, (Begun, TaskTrackerToken)),
    /// Nothing new; the answer goes when nothing of the pod runs any more, on any worker.
    Drain(Instance, Answer),
    /// It goes on after all.
    Revive(Instance),
    /// The answer goes when nothing of the pod is left.
    Down(Instance, Answer),
    /// Accept nothing any more.
    Rest,
    /// No more orders.
    Stop,
}

impl Door {
    fn order(&self, order: Order) {
        if self.orders.send(order).is_err() {
            tracing::error!("a worker is gone");
        }
    }
}

/// Workers in the making: who counts what they do is among what they are given.
#[derive(Debug)]
pub struct Threads(Vec<(Runtime, Door, mpsc::UnboundedReceiver<Order>)>);

impl Threads {
    /// Of so many.
    ///
    /// # Errors
    /// A runtime cannot be made.
    pub fn new(count: usize) -> io::Result<Self> {
        let one = |_| {
            let runtime = Builder::new_current_thread().enable_all().build()?;
            // Not more than events of pods, and connections that have a place.
            let (orders, inbox) = mpsc::unbounded_channel();
            let load = Load::of(runtime.metrics());
            Ok((runtime, Door { orders, load }, inbox))
        };
        (0..count.max(1))
            .map(one)
            .collect::<io::Result<_>>()
            .map(Self)
    }

    /// Their loads.
    pub fn loads(&self) -> Vec<Load> {
        self.0
            .iter()
            .map(|(_, door, _)| door.load.clone())
            .collect()
    }

    /// Starts them.
    ///
    /// # Errors
    /// A thread cannot be made.
    pub fn start(self, shared: &Shared) -> io::Result<Workers> {
        let doors: Vec<Door> = self.0.iter().map(|(_, door, _)| door.clone()).collect();
        let mut threads = Vec::new();
        for (number, (runtime, _, inbox)) in self.0.into_iter().enumerate() {
            let (shared, doors) = (shared.clone(), doors.clone());
            let thread = std::thread::Builder::new().name(format!("worker-{number}"));
            threads.push(thread.spawn(move || {
                let _whole = AllOrNothing;
                let work = Worker::new(number, doors, shared).work(inbox);
                LocalSet::new().block_on(&runtime, work);
            })?);
        }
        Ok(Workers {
            doors,
            threads,
            homes: HashMap::new(),
        })
    }
}

impl Workers {
    /// Does what capture says of a pod.
    pub fn apply(&mut self, event: PodEvent) {
        match event {
            PodEvent::Up(lease) => {
                let (pod, listeners) = LocalPod::of(*lease);
                let (home, tasks) = (self.home(), tasks());
                // Who accepts comes last: it hands connections to the others.
                for (number, door) in self.doors.iter().enumerate() {
                    if number != home {
                        door.order(Order::Up(Arc::clone(&pod), tasks.clone(), None));
                    }
                }
                let order = Order::Up(Arc::clone(&pod), tasks.clone(), Some(listeners));
                self.doors[home].order(order);
                let worker = home;
                self.homes.insert(pod.instance, Home { pod, worker, tasks });
            }
            PodEvent::Addresses(instance, addresses) => {
                if let Some(home) = self.homes.get(&instance) {
                    home.pod.set_addresses(addresses);
                }
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

    /// Accepts nothing any more, of any pod.
    pub fn rest(&self) {
        for door in &self.doors {
            door.order(Order::Rest);
        }
    }

    /// Lets what runs go on, and what begins meanwhile, until nothing runs of any pod, or for as long as
    /// this.
    pub fn drain(&self, long: Duration) -> impl Future<Output = ()> + use<> {
        for instance in self.homes.keys() {
            // It is of no use that this one was idle while others were not.
            let (told, _) = oneshot::channel();
            self.all(*instance, told, Order::Drain);
        }
        let homes = self.homes.values().map(|home| home.tasks.clone());
        let homes: Vec<TaskTracker> = homes.collect();
        async move {
            let idle = async {
                while let Some(busy) = homes.iter().find(|tasks| !tasks.is_empty()) {
                    busy.wait().await;
                }
            };
            if tokio::time::timeout(long, idle).await.is_err() {
                tracing::warn!("connection failed to drain within the timeout");
            }
        }
    }

    /// Cuts what runs, and ends. All that was cut has been told of then, if it does not take longer than
    /// two seconds.
    pub async fn end(mut self) {
        let down = self.homes.keys().map(|instance| {
            let (told, down) = oneshot::channel();
            self.all(*instance, told, Order::Down);
            down
        });
        let down = futures_util::future::join_all(down.collect::<Vec<_>>());
        if tokio::time::timeout(CUT, down).await.is_err() {
            tracing::error!("a worker does not end");
            return;
        }
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
        let at = |number: usize| move |home: &&Home| home.worker == number;
        let pods = |number: &usize| self.homes.values().filter(at(*number)).count();
        (0..self.doors.len()).min_by_key(pods).unwrap_or(0)
    }

    /// Orders it from all workers; `told` hears when all have done it.
    fn all(&self, pod: Instance, told: oneshot::Sender<()>, order: fn(Instance, Answer) -> Order) {
        let answer = Answer::new(told);
        for door in &self.doors {
            door.order(order(pod, answer.clone()));
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
            crate::observe::log::flush();
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
    /// What accepts for it, if this is its home, and what makes room for that.
    entrances: Scope,
}

impl Worker {
    fn new(number: usize, doors: Vec<Door>, shared: Shared) -> Self {
        let means = Rc::new(OfNode {
            certs: shared.certs.clone(),
            places: shared.places.clone(),
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
                places: shared.places,
            },
            pods: HashMap::new(),
            chores: Scope::new(None),
        }
    }

    async fn work(mut self, mut inbox: mpsc::UnboundedReceiver<Order>) {
        self.chores
            .spawn(Rc::clone(&self.corridor.carrier.pool).release_idle());
        let load = self.doors[self.number].load.clone();
        self.chores.spawn(async move {
            loop {
                // A second that was busy would be lost in the hour before it.
                load.now();
                tokio::time::sleep(LOOK).await;
            }
        });
        while let Some(order) = inbox.recv().await {
            match order {
                Order::Up(pod, tasks, listeners) => self.up(&pod, &tasks, listeners),
                Order::Take(pod, admitted, _counted) => match self.pods.get(&pod.instance) {
                    Some(here) => take(&self.corridor, &here.scope, &pod, *admitted),
                    // It went down meanwhile; dropping it resets it, and tells.
                    None => drop(admitted),
                },
                Order::Drain(instance, answer) => self.drain(instance, answer),
                Order::Revive(instance) => {
                    if let Some(here) = self.pods.get(&instance) {
                        here.scope.close(false);
                    }
                }
                Order::Down(instance, answer) => self.down(instance, answer),
                Order::Rest => {
                    for here in self.pods.values() {
                        here.entrances.cut().await;
                    }
                }
                Order::Stop => break,
            }
        }
        self.chores.cut().await;
    }

    fn up(&mut self, pod: &Arc<LocalPod>, tasks: &TaskTracker, listeners: Option<Listeners>) {
        let load = self.doors[self.number].load.clone();
        let here = Here {
            pod: Arc::clone(pod),
            scope: Scope::new(Some(load)).among(tasks),
            entrances: Scope::new(None),
        };
        let pool = Rc::clone(&self.corridor.carrier.pool);
        here.entrances.spawn(pool.give_way(Arc::clone(pod)));
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
            let mut turn = number;
            loop {
                let tcp = listener.accept().await;
                let Some(admitted) = admit(&corridor, &pod, entrance, tcp).await else {
                    continue;
                };
                match elsewhere(&doors, number, &mut turn) {
                    Some(door) => {
                        let counted = (door.load.begin(), scope.token());
                        door.order(Order::Take(Arc::clone(&pod), Box::new(admitted), counted));
                    }
                    None => take(&corridor, &scope, &pod, admitted),
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

/// A worker that has much less to do than this one, of two others that have their `turn`: to look at all
/// would take the longer the more there are.
fn elsewhere<'a>(doors: &'a [Door], here: usize, turn: &mut usize) -> Option<&'a Door> {
    let own = doors[here].load.now();
    if own < MUCH {
        return None;
    }
    let mut other = || {
        *turn = (*turn + 1) % doors.len();
        if *turn == here {
            *turn = (*turn + 1) % doors.len();
        }
        &doors[*turn]
    };
    let two = [other(), other()].map(|door| (door.load.now(), door));
    let (least, door) = two.into_iter().min_by_key(|(load, _)| *load)?;
    (least + MUCH <= own).then_some(door)
}

/// Begins a connection on this worker.
fn take(corridor: &Corridor, scope: &Scope, pod: &Arc<LocalPod>, admitted: Admitted) {
    let walk = walk(corridor.clone(), scope.clone(), Arc::clone(pod), admitted);
    scope.spawn(walk);
}

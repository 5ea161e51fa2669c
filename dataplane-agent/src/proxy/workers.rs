//! The workers. Each is a thread with a runtime of its own; a connection stays on one worker.
//!
//! Each pod has a home worker, which accepts for it. A home worker that is busy compares its load with two other
//! workers, which it takes in turn, and hands the connection to one that has much less to do (see
//! [`load`](crate::load)). Workers share snapshots, counters, and locked tables with an entry per connection.

use std::collections::HashMap;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use dataplane_ebpf::listener::ListenerKind;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::{mpsc, oneshot};
use tokio::task::LocalSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

use crate::drain::{CompletionGuard, TaskGroup, task_tracker};
use crate::load::{BUSY, Begun, Load};
use crate::mesh::MeshReader;
use crate::mesh::workload::named;
use crate::observe::Observer;
use crate::proxy::accept::LocalPod;
use crate::proxy::accept::listener::Listener;
use crate::proxy::authorize::Authorizer;
use crate::proxy::connection::{Admitted, ProxyInputs, admit, serve_connection};
use crate::proxy::identity::Certs;
use crate::proxy::limits::NodePlaces;
use crate::proxy::transport::connector::NodeConnector;
use crate::proxy::transport::{Carrier, Pool};
use crate::seam::{Instance, Listeners, PodEvent};

/// The difference in load from which a connection is handed to another worker. A handoff wakes another thread, and
/// that worker may have no tunnel to the destination.
const HANDOFF_THRESHOLD: u32 = BUSY / 2;
/// The interval at which each worker measures its load while nothing is accepted.
const LOAD_INTERVAL: Duration = Duration::from_secs(1);
/// The time after which a tunnel that carries nothing is closed.
const TUNNEL_IDLE_TIMEOUT: Duration = Duration::from_secs(300);
/// The longest time that [`Workers::end`] waits for aborted connections to be recorded.
const END_TIMEOUT: Duration = Duration::from_secs(2);

/// The inputs that all workers share.
#[derive(Clone, Debug)]
pub struct WorkerContext {
    /// The mesh.
    pub mesh: MeshReader,
    /// Policy.
    pub authorizer: Authorizer,
    /// Certificates.
    pub certs: Certs,
    /// The observer, which makes metrics and access logs.
    pub observer: Observer,
    /// The node's connection limit.
    pub places: NodePlaces,
}

/// The workers.
#[derive(Debug)]
pub struct Workers {
    handles: Vec<WorkerHandle>,
    threads: Vec<JoinHandle<()>>,
    homes: HashMap<Instance, Home>,
}

/// A pod with its home worker.
#[derive(Debug)]
struct Home {
    pod: Arc<LocalPod>,
    worker: usize,
    /// The tasks that all workers run for it.
    tasks: TaskTracker,
}

/// The channel to a worker, and the worker's load.
#[derive(Clone, Debug)]
struct WorkerHandle {
    commands: mpsc::UnboundedSender<Command>,
    load: Load,
}

#[derive(Debug)]
enum Command {
    /// Serve a pod, and count its tasks in the tracker. Only the home worker gets the listeners.
    Up(Arc<LocalPod>, TaskTracker, Option<Listeners>),
    /// Serve a connection that another worker has accepted. It already counts in this worker's load and among the
    /// pod's tasks.
    Handoff(Arc<LocalPod>, Box<Admitted>, (Begun, TaskTrackerToken)),
    /// Begin no new work for the pod. The guard, if there is one, is dropped when no task of the pod runs on any worker,
    /// and nothing is accepted for it any more.
    Drain(Instance, Option<CompletionGuard>),
    /// Cancel the pod's drain.
    Revive(Instance),
    /// Abort the pod's tasks. The guard is dropped when they have ended.
    Down(Instance, CompletionGuard),
    /// Stop accepting for all pods. The guard is dropped when every connection that was accepted is started or refused.
    StopAccepting(CompletionGuard),
    /// End the worker.
    Stop,
}

impl WorkerHandle {
    fn send(&self, command: Command) {
        if self.commands.send(command).is_err() {
            tracing::error!("a worker is gone");
        }
    }
}

/// Workers that are not started yet. The metrics need their loads, and the workers need the metrics.
#[derive(Debug)]
pub struct WorkersBuilder(Vec<(Runtime, WorkerHandle, mpsc::UnboundedReceiver<Command>)>);

impl WorkersBuilder {
    /// Makes the runtimes of `count` workers, at least one.
    ///
    /// # Errors
    /// A runtime cannot be made.
    pub fn new(count: usize) -> io::Result<Self> {
        let one = |_| {
            let runtime = Builder::new_current_thread().enable_all().build()?;
            // Bounded by what is sent: events of pods, and connections that have a place.
            let (commands, inbox) = mpsc::unbounded_channel();
            let load = Load::of(runtime.metrics());
            Ok((runtime, WorkerHandle { commands, load }, inbox))
        };
        (0..count.max(1))
            .map(one)
            .collect::<io::Result<_>>()
            .map(Self)
    }

    /// Returns the load of each worker.
    pub fn loads(&self) -> Vec<Load> {
        self.0
            .iter()
            .map(|(_, handle, _)| handle.load.clone())
            .collect()
    }

    /// Starts the threads.
    ///
    /// # Errors
    /// A thread cannot be made.
    pub fn start(self, context: &WorkerContext) -> io::Result<Workers> {
        let handles: Vec<WorkerHandle> =
            self.0.iter().map(|(_, handle, _)| handle.clone()).collect();
        let mut threads = Vec::new();
        for (number, (runtime, _, inbox)) in self.0.into_iter().enumerate() {
            let (context, handles) = (context.clone(), handles.clone());
            let thread = std::thread::Builder::new().name(format!("worker-{number}"));
            threads.push(thread.spawn(move || {
                let _abort_on_panic = AbortOnPanic;
                let work = Worker::new(number, handles, context).work(inbox);
                LocalSet::new().block_on(&runtime, work);
            })?);
        }
        Ok(Workers {
            handles,
            threads,
            homes: HashMap::new(),
        })
    }
}

impl Workers {
    /// Applies an event of a pod on all workers.
    pub fn apply(&mut self, event: PodEvent) {
        match event {
            PodEvent::Up(lease) => {
                let homes = self.homes.values();
                let before = homes
                    .map(|home| &*home.pod)
                    .find(|pod| pod.cookie == lease.cookie);
                let (pod, listeners) = LocalPod::of(*lease, before);
                let (home, tasks) = (self.home(), task_tracker());
                // The home worker is last: it hands connections to the others, which must know the pod.
                for (number, handle) in self.handles.iter().enumerate() {
                    if number != home {
                        handle.send(Command::Up(Arc::clone(&pod), tasks.clone(), None));
                    }
                }
                let command = Command::Up(Arc::clone(&pod), tasks.clone(), Some(listeners));
                self.handles[home].send(command);
                let worker = home;
                self.homes.insert(pod.instance, Home { pod, worker, tasks });
            }
            PodEvent::Addresses(instance, addresses) => {
                if let Some(home) = self.homes.get(&instance) {
                    home.pod.set_addresses(addresses);
                }
            }
            PodEvent::Drain(instance, told) => {
                self.all(instance, told, |pod, guard| {
                    Command::Drain(pod, Some(guard))
                });
            }
            PodEvent::Revive(instance) => {
                for handle in &self.handles {
                    handle.send(Command::Revive(instance));
                }
            }
            PodEvent::Down(instance, told) => {
                self.homes.remove(&instance);
                self.all(instance, told, Command::Down);
            }
            // What earlier node processes have leased is known to who outlives them: `seam::borrow`.
            PodEvent::DrainUnleased(..) | PodEvent::Clear(..) | PodEvent::Snapshot(_) => {}
        }
    }

    /// Stops accepting connections of all pods. Completes when every connection that was accepted is started or
    /// refused.
    pub fn stop_accepting(&self) -> impl Future<Output = ()> + use<> {
        let (told, stopped) = oneshot::channel();
        let guard = CompletionGuard::new(told);
        for handle in &self.handles {
            handle.send(Command::StopAccepting(guard.clone()));
        }
        async move {
            // An error means that a worker has ended, with all that it accepted.
            let _ = stopped.await;
        }
    }

    /// Drains all pods. Completes when none of their tasks runs, including those that begin meanwhile, or after
    /// `long`.
    pub fn drain(&self, long: Duration) -> impl Future<Output = ()> + use<> {
        for instance in self.homes.keys() {
            for handle in &self.handles {
                // Without a guard: an idle pod is accepted for while others drain.
                handle.send(Command::Drain(*instance, None));
            }
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

    /// Aborts all connections and ends the workers. The access log has the aborted connections by then, unless that
    /// takes longer than two seconds.
    pub async fn end(mut self) {
        let down = self.homes.keys().map(|instance| {
            let (told, down) = oneshot::channel();
            self.all(*instance, told, Command::Down);
            down
        });
        let down = futures_util::future::join_all(down.collect::<Vec<_>>());
        if tokio::time::timeout(END_TIMEOUT, down).await.is_err() {
            tracing::error!("a worker does not end");
            return;
        }
        for handle in &self.handles {
            handle.send(Command::Stop);
        }
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a worker panicked");
            }
        }
    }

    /// Returns the worker that is home to the fewest pods.
    fn home(&self) -> usize {
        let at = |number: usize| move |home: &&Home| home.worker == number;
        let pods = |number: &usize| self.homes.values().filter(at(*number)).count();
        (0..self.handles.len()).min_by_key(pods).unwrap_or(0)
    }

    /// Orders it from all workers; `told` hears when all have done it.
    fn all(
        &self,
        pod: Instance,
        told: oneshot::Sender<()>,
        command: fn(Instance, CompletionGuard) -> Command,
    ) {
        let guard = CompletionGuard::new(told);
        for handle in &self.handles {
            handle.send(command(pod, guard.clone()));
        }
    }
}

/// Aborts the process when a worker panics; a connection that panics ends alone. Pods stay captured and the next
/// agent serves them. A process with a missing worker would not serve the pods of that worker.
struct AbortOnPanic;

impl Drop for AbortOnPanic {
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
    handles: Vec<WorkerHandle>,
    inputs: ProxyInputs,
    pods: HashMap<Instance, PodState>,
    /// Tasks of the worker that belong to no pod.
    background_tasks: TaskGroup,
    /// Cancelled when the worker accepts nothing any more.
    stop_accepting: CancellationToken,
}

/// The state of a pod on a worker.
struct PodState {
    pod: Arc<LocalPod>,
    /// The tasks of its connections and tunnels.
    group: TaskGroup,
    /// Its listeners, if this is its home worker.
    listeners: Vec<(ListenerKind, Rc<Listener>)>,
    /// The tasks that accept for it.
    accept_tasks: TaskGroup,
    /// Cancelled when they are to end.
    stop_accepting: CancellationToken,
    /// The task that closes its idle tunnels when their places are wanted.
    close_idle_task: TaskGroup,
}

impl Worker {
    fn new(number: usize, handles: Vec<WorkerHandle>, context: WorkerContext) -> Self {
        let connector = Rc::new(NodeConnector {
            certs: context.certs.clone(),
            places: context.places.clone(),
        });
        let pool = Pool::new(connector.clone(), TUNNEL_IDLE_TIMEOUT);
        Self {
            number,
            handles,
            inputs: ProxyInputs {
                mesh: context.mesh,
                authorizer: context.authorizer,
                carrier: Carrier { connector, pool },
                certs: context.certs,
                observer: context.observer,
                places: context.places,
            },
            pods: HashMap::new(),
            background_tasks: TaskGroup::new(None),
            stop_accepting: CancellationToken::new(),
        }
    }

    async fn work(mut self, mut inbox: mpsc::UnboundedReceiver<Command>) {
        self.background_tasks
            .spawn(Rc::clone(&self.inputs.carrier.pool).release_idle());
        let load = self.handles[self.number].load.clone();
        self.background_tasks.spawn(async move {
            loop {
                // Without regular samples a busy second would vanish in the average of a long idle interval.
                load.now();
                tokio::time::sleep(LOAD_INTERVAL).await;
            }
        });
        while let Some(command) = inbox.recv().await {
            match command {
                Command::Up(pod, tasks, listeners) => self.up(&pod, &tasks, listeners),
                Command::Handoff(pod, admitted, _counted) => match self.pods.get(&pod.instance) {
                    Some(state) => start_connection(&self.inputs, &state.group, &pod, *admitted),
                    // The pod is gone. Dropping the connection resets it and records that.
                    None => drop(admitted),
                },
                Command::Drain(instance, guard) => self.drain(instance, guard),
                Command::Revive(instance) => self.revive(instance),
                Command::Down(instance, guard) => self.down(instance, guard),
                Command::StopAccepting(guard) => self.stop_accepting(guard),
                Command::Stop => break,
            }
        }
        self.background_tasks.abort_and_wait().await;
    }

    fn up(&mut self, pod: &Arc<LocalPod>, tasks: &TaskTracker, listeners: Option<Listeners>) {
        let load = self.handles[self.number].load.clone();
        let mut state = PodState {
            pod: Arc::clone(pod),
            group: TaskGroup::new(Some(load)).counted_in(tasks),
            listeners: Vec::new(),
            accept_tasks: TaskGroup::new(None),
            stop_accepting: self.stop_accepting.child_token(),
            close_idle_task: TaskGroup::new(None),
        };
        let pool = Rc::clone(&self.inputs.carrier.pool);
        state
            .close_idle_task
            .spawn(pool.close_idle_when_wanted(Arc::clone(pod)));
        if let Some(listeners) = listeners {
            for (kind, listener) in listeners.into_each() {
                match Listener::new(listener) {
                    Ok(listener) => state.listeners.push((kind, Rc::new(listener))),
                    Err(error) => tracing::error!(pod = %named(&pod.uid), %error, "cannot listen"),
                }
            }
        }
        self.accept(&state);
        self.pods.insert(pod.instance, state);
    }

    /// Accepts from the listeners of a pod.
    fn accept(&self, state: &PodState) {
        for (kind, listener) in &state.listeners {
            self.open(state, *kind, Rc::clone(listener));
        }
    }

    /// Accepts for a pod, and gives each connection to this worker or to a less loaded one.
    fn open(&self, state: &PodState, kind: ListenerKind, listener: Rc<Listener>) {
        let (inputs, group) = (self.inputs.clone(), state.group.clone());
        let (pod, handles, number) = (Arc::clone(&state.pod), self.handles.clone(), self.number);
        let stop_accepting = state.stop_accepting.clone();
        state.accept_tasks.spawn(async move {
            let mut turn = number;
            loop {
                // An accepted connection cannot go back to the queue, so only the wait for one is given up.
                let tcp = tokio::select! {
                    biased;
                    () = stop_accepting.cancelled() => return,
                    tcp = listener.accept() => tcp,
                };
                let Some(admitted) = admit(&inputs, &pod, kind, tcp).await else {
                    continue;
                };
                match less_loaded_worker(&handles, number, &mut turn) {
                    Some(handle) => {
                        let counted = (handle.load.begin(), group.token());
                        handle.send(Command::Handoff(
                            Arc::clone(&pod),
                            Box::new(admitted),
                            counted,
                        ));
                    }
                    None => start_connection(&inputs, &group, &pod, admitted),
                }
            }
        });
    }

    fn stop_accepting(&self, guard: CompletionGuard) {
        self.stop_accepting.cancel();
        let pods = self.pods.values();
        let accept_tasks: Vec<TaskGroup> = pods.map(|state| state.accept_tasks.clone()).collect();
        self.background_tasks.spawn(async move {
            for tasks in accept_tasks {
                tasks.idle().await;
            }
            drop(guard);
        });
    }

    fn drain(&self, instance: Instance, guard: Option<CompletionGuard>) {
        let Some(state) = self.pods.get(&instance) else {
            return;
        };
        state.group.start_drain();
        self.inputs.carrier.pool.forget(instance);
        let Some(guard) = guard else {
            return;
        };
        let (group, accept_tasks) = (state.group.clone(), state.accept_tasks.clone());
        let stop_accepting = state.stop_accepting.clone();
        self.background_tasks.spawn(async move {
            group.idle().await;
            // Others may have the listeners, and still accept: once nothing runs here, nothing is to begin here.
            if group.is_draining() {
                stop_accepting.cancel();
                accept_tasks.idle().await;
                group.idle().await;
            }
            drop(guard);
        });
    }

    fn revive(&mut self, instance: Instance) {
        let Some(mut state) = self.pods.remove(&instance) else {
            return;
        };
        state.group.cancel_drain();
        if state.stop_accepting.is_cancelled() {
            state.stop_accepting = self.stop_accepting.child_token();
            self.accept(&state);
        }
        self.pods.insert(instance, state);
    }

    fn down(&mut self, instance: Instance, guard: CompletionGuard) {
        let Some(state) = self.pods.remove(&instance) else {
            return;
        };
        self.inputs.carrier.pool.forget(instance);
        self.background_tasks.spawn(async move {
            state.accept_tasks.abort_and_wait().await;
            state.close_idle_task.abort_and_wait().await;
            state.group.abort_and_wait().await;
            // The listeners are closed by then.
            drop(state);
            drop(guard);
        });
    }
}

/// Returns a worker with much less load than worker `number`, if one of the next two in `turn` is. Comparing all would
/// take longer with more workers.
fn less_loaded_worker<'a>(
    handles: &'a [WorkerHandle],
    number: usize,
    turn: &mut usize,
) -> Option<&'a WorkerHandle> {
    let own = handles[number].load.now();
    if own < HANDOFF_THRESHOLD {
        return None;
    }
    let mut other = || {
        *turn = (*turn + 1) % handles.len();
        if *turn == number {
            *turn = (*turn + 1) % handles.len();
        }
        &handles[*turn]
    };
    let two = [other(), other()].map(|handle| (handle.load.now(), handle));
    let (least, handle) = two.into_iter().min_by_key(|(load, _)| *load)?;
    (least + HANDOFF_THRESHOLD <= own).then_some(handle)
}

/// Serves a connection on this worker.
fn start_connection(
    inputs: &ProxyInputs,
    group: &TaskGroup,
    pod: &Arc<LocalPod>,
    admitted: Admitted,
) {
    let connection = serve_connection(inputs.clone(), group.clone(), Arc::clone(pod), admitted);
    group.spawn(connection);
}

#[cfg(test)]
mod tests;

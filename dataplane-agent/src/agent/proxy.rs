//! The half that carries the connections of pods: it has their certificates, the mesh and its policies, and
//! what the node leases to it. Of Kubernetes and of the kernel's programs it knows nothing.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;

use super::AgentError;
use crate::config::RunOptions;
use crate::control::ca::{EmbeddedCa, RootEnd};
use crate::mesh::{Identity, MeshReader};
use crate::observe::metrics::{self, ReadCounters};
use crate::observe::{Metrics, Observer};
use crate::proxy::authorize::Authorizer;
use crate::proxy::identity::Certs;
use crate::proxy::limits::NodePlaces;
use crate::proxy::workers::{WorkerContext, Workers, WorkersBuilder};
use crate::seam::{Instance, PodEvent};
use crate::sys::{limits, memory};

/// How often it is looked whether memory can be given back.
const TIDY: Duration = Duration::from_secs(10);
/// How many connections must have ended for that.
const MANY: usize = 100;

/// Who serves pods.
pub(super) struct Proxy {
    pub(super) certs: Certs,
    pub(super) root_end: RootEnd,
    pub(super) metrics: Arc<Metrics>,
    pub(super) places: NodePlaces,
    /// How many threads carry connections.
    pub(super) threads: usize,
    authorizer: Authorizer,
    workers: Workers,
    /// Whose certificates are held.
    held: HashMap<Instance, Identity>,
}

impl Proxy {
    /// Starts the workers; they serve nobody yet. `kernel`, `repairs`: what capture counts, for the metrics.
    pub(super) fn start(
        options: &RunOptions,
        ca: EmbeddedCa,
        mesh: &MeshReader,
        (kernel, repairs): (Box<ReadCounters>, Box<ReadCounters>),
    ) -> Result<Self, AgentError> {
        let root_end = ca.root_end().clone();
        let certs = Certs::new(Arc::new(ca));
        let authorizer = Authorizer::new(mesh.clone());
        let count = options.workers.map_or_else(processors, usize::from);
        let builder = WorkersBuilder::new(count).context("cannot start workers")?;
        let places = places(options)?;
        places.leave_room(0);
        let metrics = Arc::new(Metrics::new(metrics::Sources {
            kernel,
            repairs,
            places: places.clone(),
            workers: builder.loads(),
            root_ends: root_end.unix(),
        }));
        let context = WorkerContext {
            mesh: mesh.clone(),
            authorizer: authorizer.clone(),
            certs: certs.clone(),
            observer: Observer::new(Arc::clone(&metrics)),
            places: places.clone(),
        };
        let workers = builder.start(&context).context("cannot start workers")?;
        Ok(Self {
            certs,
            root_end,
            metrics,
            places,
            threads: count,
            authorizer,
            workers,
            held: HashMap::new(),
        })
    }

    /// What it does besides; never returns.
    pub(super) fn background(&self) -> impl Future<Output = ()> + use<> {
        let (certs, authorizer) = (self.certs.clone(), self.authorizer.clone());
        let (metrics, places) = (Arc::clone(&self.metrics), self.places.clone());
        async move {
            tokio::select! {
                () = certs.rotate() => {}
                () = authorizer.watch() => {}
                () = tidy(&metrics, &places) => {}
            }
        }
    }

    /// Does what the node says of a pod. The certificate of one is held for as long as it is served.
    pub(super) fn apply(&mut self, event: PodEvent) {
        match &event {
            PodEvent::Up(lease) => {
                self.certs.retain(&lease.identity);
                self.held.insert(lease.instance, lease.identity.clone());
            }
            PodEvent::Down(instance, _) => {
                if let Some(identity) = self.held.remove(instance) {
                    self.certs.release(&identity);
                }
            }
            PodEvent::Addresses(..)
            | PodEvent::Drain(..)
            | PodEvent::Revive(_)
            | PodEvent::DrainUnleased(..)
            | PodEvent::Clear(..)
            | PodEvent::Snapshot(_) => {}
        }
        self.places.leave_room(self.held.len());
        self.workers.apply(event);
    }

    /// Lets what runs go on for as long as this, or until nothing does.
    pub(super) fn drain(&self, long: Duration) -> impl Future<Output = ()> + use<> {
        self.workers.drain(long)
    }

    /// Stops accepting: others who have the listeners accept. Completes when nothing that was accepted runs any
    /// more, or after `long`.
    pub(super) fn stop_accepting(&self, long: Duration) -> impl Future<Output = ()> + use<> {
        let (stopped, idle) = (self.workers.stop_accepting(), self.workers.drain(long));
        async move {
            stopped.await;
            idle.await;
        }
    }

    /// Cuts what runs, and tells of it.
    pub(super) async fn end(self) {
        self.workers.end().await;
    }
}

fn places(options: &RunOptions) -> Result<NodePlaces, AgentError> {
    let files = limits::files().map_err(|error| AgentError::Machine(error.to_string()))?;
    let wanted = options
        .connections
        .and_then(|wanted| wanted.try_into().ok());
    Ok(NodePlaces::fitting(wanted, limits::memory(), files))
}

/// Gives back what connections took that have ended; never returns.
async fn tidy(metrics: &Metrics, places: &NodePlaces) {
    loop {
        tokio::time::sleep(TIDY).await;
        metrics.expire();
        if places.peak() > places.taken() + MANY {
            memory::give_back();
        }
    }
}

fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

//! Whether a pod's listeners are accepted from while it drains.

use std::io::{ErrorKind, Read};
use std::net::{IpAddr, TcpListener, TcpStream};

use super::*;
use crate::mesh::{self, Identity};
use crate::observe::metrics::{Metrics, Sources};
use crate::proxy::accept::Clients;
use crate::proxy::identity::test_ca::Ca;
use crate::seam::Lease;
use crate::sys::netns::Netns;

/// A pod that a worker serves, of which the mesh knows nothing: what is accepted for it is reset.
struct Served {
    workers: Workers,
    instance: Instance,
    /// The same listeners, as others have them.
    listeners: Listeners,
}

/// Enrols a pod in the network namespace with this cookie.
fn enrol(workers: &mut Workers, cookie: u64, listeners: &Listeners) -> Instance {
    let instance = Instance::next();
    workers.apply(PodEvent::Up(Box::new(Lease {
        instance,
        uid: "c//Pod/ns/p".into(),
        namespace: "ns".into(),
        name: "p".into(),
        identity: Identity::new("td", "ns", "sa"),
        addresses: [IpAddr::from([127, 0, 0, 1])].into(),
        netns: Netns::own().expect("/proc is there"),
        cookie,
        listeners: listeners.share().expect("descriptors"),
        stamp: Arc::default(),
    })));
    instance
}

impl Served {
    fn new() -> Self {
        let builder = WorkersBuilder::new(1).expect("a runtime");
        let (_, mesh) = mesh::store();
        let places = NodePlaces::new(100);
        let metrics = Metrics::new(Sources {
            kernel: Box::new(Vec::new),
            repairs: Box::new(Vec::new),
            places: places.clone(),
            workers: Vec::new(),
            root_ends: 0,
        });
        let context = WorkerContext {
            mesh: mesh.clone(),
            authorizer: Authorizer::new(mesh),
            certs: Certs::new(Arc::new(Ca::new())),
            observer: Observer::new(Arc::new(metrics)),
            places,
        };
        let mut workers = builder.start(&context).expect("a thread");
        let listeners = Listeners::make(|_| -> std::io::Result<_> {
            let listener = TcpListener::bind("127.0.0.1:0")?;
            listener.set_nonblocking(true)?;
            Ok(listener)
        });
        let listeners = listeners.expect("ports");
        let instance = enrol(&mut workers, 1, &listeners);
        Self {
            workers,
            instance,
            listeners,
        }
    }

    /// The clients of an enrolment.
    fn clients(&self, of: Instance) -> &Arc<Clients> {
        &self.workers.homes[&of].pod.clients
    }

    /// Whether a connection that is made now is accepted within half a second.
    fn accepts(&self) -> bool {
        let to = self
            .listeners
            .of(ListenerKind::Inbound)
            .local_addr()
            .expect("it is bound");
        let mut client = TcpStream::connect(to).expect("somebody listens");
        let soon = Some(Duration::from_millis(500));
        client.set_read_timeout(soon).expect("a socket");
        let end = client.read(&mut [0]);
        !end.is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
    }

    fn accepts_soon(&self) -> bool {
        (0..40).any(|_| self.accepts())
    }
}

#[tokio::test]
async fn a_pod_of_which_it_was_said_that_nothing_runs_is_not_accepted_for_until_it_goes_on() {
    let mut served = Served::new();
    assert!(served.accepts_soon());
    let (told, idle) = oneshot::channel();
    let drain = PodEvent::Drain(served.instance, told);
    served.workers.apply(drain);
    let idle = tokio::time::timeout(Duration::from_secs(30), idle).await;
    idle.expect("nothing runs").expect("it is told");
    assert!(!served.accepts());
    served.workers.apply(PodEvent::Revive(served.instance));
    assert!(served.accepts_soon());
    served.workers.end().await;
}

#[tokio::test]
async fn c10_enrolments_of_one_network_namespace_know_each_others_clients() {
    let mut served = Served::new();
    let after = enrol(&mut served.workers, 1, &served.listeners);
    let other = enrol(&mut served.workers, 2, &served.listeners);
    let own = served.clients(served.instance);
    assert!(Arc::ptr_eq(own, served.clients(after)));
    assert!(!Arc::ptr_eq(own, served.clients(other)));
    served.workers.end().await;
}

#[tokio::test]
async fn what_comes_while_all_pods_drain_at_the_end_is_accepted() {
    let served = Served::new();
    assert!(served.accepts_soon());
    let _idle = served.workers.drain(Duration::from_secs(30));
    std::thread::sleep(Duration::from_millis(100));
    assert!(served.accepts_soon());
    served.workers.end().await;
}

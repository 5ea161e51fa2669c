//! Enrolled pods, as they are served: what the lease says of each, and what is counted and remembered for it.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use dataplane_ebpf::listener::ListenerKind;

use super::ports::{self, Ports, SPOOFED_PORTS};
use crate::mesh::Identity;
use crate::proxy::limits::{Handshakes, PodPlaces};
use crate::seam::{Instance, Lease, Listeners, Stamp};
use crate::sys::netns::Netns;
use crate::sys::socket;

/// An enrolled pod of this node, shared by all that serves it.
#[derive(Debug)]
pub struct LocalPod {
    /// The number of this enrolment.
    pub instance: Instance,
    /// The workload's uid in the mesh.
    pub uid: Arc<str>,
    /// Its Kubernetes namespace.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
    /// Its identity, fixed at enrolment and never derived from an address.
    pub identity: Identity,
    /// Its addresses: those of the mesh, and all others of its network namespace but loopback and link-local ones.
    /// They change as its interfaces do.
    pub addresses: RwLock<Arc<[IpAddr]>>,
    /// Its network namespace, in which every connection for it is made.
    pub netns: Netns,
    /// The ports of its listeners: 15001, 15006 and 15008, unless an app had one of them first.
    pub ports: [u16; ListenerKind::COUNT],
    /// Places for handshakes of tunnels to it. They are its own, so that an attack on one pod does not take
    /// another's.
    pub handshakes: Handshakes,
    /// Places for its connections and tunnels.
    pub places: PodPlaces,
    /// The cookie of that network namespace.
    pub cookie: u64,
    /// Clients that are connected in clear from a port that the agent might use in their name: to whichever enrolment
    /// of the network namespace, since connections outlive one.
    pub clients: Arc<Clients>,
    /// The next port to use in each client's name.
    pub spoofed: Ports,
    /// The stamp by which the kernel programs know the agent's own sockets in it.
    pub stamp: Arc<Stamp>,
}

/// Clients of a pod by address and port, with their numbers of connections.
///
/// The kernel finds an established socket before any program runs: if a client and the agent in its name use the same
/// port, the later connection would hang.
#[derive(Debug, Default)]
pub struct Clients(Mutex<HashMap<SocketAddr, usize>>);

/// A connected client; it is forgotten when this is dropped.
#[derive(Debug)]
pub struct Connected(Arc<LocalPod>, SocketAddr);

impl Clients {
    fn has(&self, client: SocketAddr) -> bool {
        self.lock().contains_key(&client)
    }
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<SocketAddr, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        let mut clients = self.0.clients.lock();
        if let Some(count) = clients.get_mut(&self.1) {
            *count -= 1;
            if *count == 0 {
                clients.remove(&self.1);
            }
        }
    }
}

impl LocalPod {
    /// Number of ports that are tried for one connection in a client's name.
    pub const PORT_TRIES: usize = ports::TRIES;

    /// Creates a leased pod. Its listeners are for whoever accepts from them. `before`: another enrolment of its
    /// network namespace, if there is one still.
    pub fn of(lease: Lease, before: Option<&Self>) -> (Arc<Self>, Listeners) {
        let clients = before.map(|before| Arc::clone(&before.clients));
        let pod = Self {
            instance: lease.instance,
            uid: lease.uid,
            namespace: lease.namespace,
            name: lease.name,
            identity: lease.identity,
            addresses: RwLock::new(lease.addresses),
            netns: lease.netns,
            cookie: lease.cookie,
            ports: lease.listeners.ports(),
            handshakes: Handshakes::default(),
            places: PodPlaces::default(),
            clients: clients.unwrap_or_default(),
            spoofed: Ports::default(),
            stamp: lease.stamp,
        };
        (Arc::new(pod), lease.listeners)
    }

    /// Creates a pod in the network namespace of the test.
    #[cfg(test)]
    pub fn example(uid: &str, identity: Identity, addresses: Vec<IpAddr>) -> Arc<Self> {
        Arc::new(Self {
            instance: Instance::next(),
            ports: ListenerKind::ALL.map(ListenerKind::port),
            handshakes: Handshakes::default(),
            places: PodPlaces::default(),
            uid: uid.into(),
            namespace: identity.namespace().into(),
            name: "pod".into(),
            identity,
            addresses: RwLock::new(addresses.into()),
            netns: Netns::own().expect("/proc is there"),
            cookie: 0,
            clients: Arc::default(),
            spoofed: Ports::default(),
            stamp: Arc::default(),
        })
    }

    /// Returns true if the address is one of the pod's own.
    pub fn owns(&self, address: IpAddr) -> bool {
        self.addresses().contains(&address)
    }

    /// Returns the pod's current addresses.
    pub fn addresses(&self) -> Arc<[IpAddr]> {
        let addresses = self.addresses.read();
        Arc::clone(&addresses.unwrap_or_else(PoisonError::into_inner))
    }

    /// Replaces the pod's addresses.
    pub fn set_addresses(&self, new: Arc<[IpAddr]>) {
        let addresses = self.addresses.write();
        *addresses.unwrap_or_else(PoisonError::into_inner) = new;
    }

    /// Remembers a client that is connected in clear, as long as the returned value lives. Returns `None` if the
    /// agent would never use the client's port.
    pub fn connected(self: &Arc<Self>, client: SocketAddr) -> Option<Connected> {
        SPOOFED_PORTS.contains(&client.port()).then(|| {
            *self.clients.lock().entry(client).or_default() += 1;
            Connected(Arc::clone(self), client)
        })
    }

    /// Returns the address from which to connect to `to` for a connection that the pod made from `client`: the
    /// address that its app has bound its socket to, or has by the interface that it is bound to. Returns `None` if
    /// the pod's routes are to choose, as for an app that has bound nothing: its connection is captured from the
    /// pod's first address.
    pub fn source_of(&self, client: IpAddr, to: SocketAddr) -> Option<IpAddr> {
        let addresses = self.addresses();
        let mut same = addresses
            .iter()
            .filter(|own| own.is_ipv4() == client.is_ipv4());
        let chosen = same.next() != Some(&client) && same.any(|own| *own == client);
        (chosen && to.is_ipv4() == client.is_ipv4()).then_some(client)
    }

    /// Makes a stream socket in the pod's network namespace for a connection to `to`: bound to `from` if that is
    /// given, non-blocking, Nagle off, keepalive on, mark AGENT. Connect it with
    /// `tokio::net::TcpSocket::from_std_stream`.
    ///
    /// # Errors
    /// The namespace cannot be entered, the socket cannot be made, or the pod no longer has `from`.
    pub fn socket(&self, from: Option<IpAddr>, to: SocketAddr) -> io::Result<TcpStream> {
        self.stamped(self.netns.enter(|| socket::client(from, to))?)
    }

    /// Makes a socket as [`LocalPod::socket`] does, for the pod's app at `to`: bound to the client's own address
    /// `from` (transparent, a port of a range that clients do not use), to `lo`, and marked RETURN, so that the app
    /// sees its client. If `from` is the pod's own address, loopback, or not of the family of `to`, it is a socket
    /// from `to` itself. That one is not bound to `lo`: the app's answers to an own address come by the interface that
    /// has it.
    ///
    /// # Errors
    /// It fails as [`LocalPod::socket`] does, or no port is free, or `to` is not the pod's: its packets would come
    /// back to the agent for ever.
    pub fn socket_as(&self, from: IpAddr, to: SocketAddr) -> io::Result<TcpStream> {
        if !self.owns(to.ip()) {
            let what = format!("{} is not an address of the pod", to.ip());
            return Err(io::Error::new(io::ErrorKind::AddrNotAvailable, what));
        }
        let is_own = self.owns(from) || from.is_loopback() || from.is_ipv4() != to.is_ipv4();
        let made = self.netns.enter(|| {
            if is_own {
                // From another own address it would be steered to the agent again, and from there for ever.
                return socket::client(Some(to.ip()), to);
            }
            for _ in 0..Self::PORT_TRIES {
                let client = SocketAddr::new(from, self.spoofed.next(from, to));
                // The kernel finds a live connection of the client's own before any program runs.
                if !self.clients.has(client) {
                    match socket::client_as(client) {
                        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
                        made => return made,
                    }
                }
                self.spoofed.jump(from, to);
            }
            Err(io::ErrorKind::AddrInUse.into())
        })?;
        self.stamped(made)
    }

    /// Stamps a socket, so that the kernel programs know it as the agent's own.
    fn stamped(&self, made: io::Result<TcpStream>) -> io::Result<TcpStream> {
        let socket = made?;
        self.stamp.put(&socket)?;
        Ok(socket)
    }

    /// Continues at a random port: the kernel already had a connection from the port of the last socket.
    pub fn port_was_taken(&self, from: IpAddr, to: SocketAddr) {
        self.spoofed.jump(from, to);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn c10_a_port_that_a_client_has_is_not_taken_in_its_name() {
        let identity = Identity::new("td", "ns", "sa");
        let pod = LocalPod::example("uid", identity, Vec::new());
        let client: SocketAddr = "192.0.2.1:10001".parse().expect("an address");
        let (first, second) = (pod.connected(client), pod.connected(client));
        assert!(pod.clients.has(client));
        drop(first);
        assert!(
            pod.clients.has(client),
            "another connection to another port has it still"
        );
        drop(second);
        assert!(!pod.clients.has(client));
        let usual: SocketAddr = "192.0.2.1:40000".parse().expect("an address");
        assert!(pod.connected(usual).is_none(), "the agent never takes it");
    }
}

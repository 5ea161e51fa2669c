//! Enrolled pods: what the corridor is told of them.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;

use tokio::sync::oneshot;

use crate::identity::Identity;
use crate::sys::netns::Netns;
use crate::sys::socket;

/// A pod of this node that is enrolled. Shared by all that serves it.
#[derive(Debug)]
pub struct LocalPod {
    /// The workload's uid in the mesh.
    pub uid: Arc<str>,
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
    /// Who it is; stamped at enrolment, never derived from an address.
    pub identity: Identity,
    /// Its addresses: all that its namespace has, besides those of loopback and of one link.
    pub addresses: Vec<IpAddr>,
    /// Its network namespace; every connection made for it is made there.
    pub netns: Netns,
}

/// The listeners in a pod's network namespace; non-blocking, listening. Where there is IPv6 they
/// take both families, and show IPv4 addresses as IPv6 ones (`::ffff:a.b.c.d`).
#[derive(Debug)]
pub struct Listeners {
    /// What the pod connects to (15001); carries mark CAPTURE.
    pub outbound: TcpListener,
    /// What comes to the pod in clear (15006).
    pub inbound: TcpListener,
    /// What comes to the pod in HBONE (15008).
    pub hbone: TcpListener,
}

/// What happens to the set of enrolled pods, in order.
#[derive(Debug)]
pub enum PodEvent {
    /// Serve this pod from now on.
    Up(Arc<LocalPod>, Listeners),
    /// No longer in the mesh: take what is still in the accept queues, open no new tunnel streams
    /// (GOAWAY), let what runs go on. Answered when nothing runs any more.
    Drain(Arc<str>, oneshot::Sender<()>),
    /// It was draining and is enrolled again: the same listeners serve on.
    Revive(Arc<str>),
    /// Cut what still runs, and drop everything of the pod; answered when that is done.
    Down(Arc<str>, oneshot::Sender<()>),
}

impl LocalPod {
    /// Whether the address is one of the pod's own.
    pub fn owns(&self, address: IpAddr) -> bool {
        self.addresses.contains(&address)
    }

    /// A new stream socket in the pod's namespace: non-blocking, Nagle off, keepalive on, mark AGENT.
    /// Connect it with `tokio::net::TcpSocket::from_std_stream`.
    ///
    /// # Errors
    /// The namespace cannot be entered, or the socket cannot be made.
    pub fn socket(&self, to: SocketAddr) -> io::Result<TcpStream> {
        self.netns.enter(|| socket::client(to))?
    }

    /// As [`LocalPod::socket`], for the pod's app at `to`: bound to the client's own address `from`
    /// (transparent, a random port of a range that clients do not use), to `lo`, and marked RETURN,
    /// so that the app sees its client. Where `from` is the pod's own address it is a plain socket.
    ///
    /// # Errors
    /// As [`LocalPod::socket`]; no port is free; `to` is not the pod's: the packets would come back
    /// to the agent for ever.
    pub fn socket_as(&self, from: IpAddr, to: SocketAddr) -> io::Result<TcpStream> {
        if !self.owns(to.ip()) {
            let what = format!("{} is not an address of the pod", to.ip());
            return Err(io::Error::new(io::ErrorKind::AddrNotAvailable, what));
        }
        let plain = self.owns(from) || from.is_loopback() || from.is_ipv4() != to.is_ipv4();
        self.netns.enter(|| {
            if plain {
                socket::client(to)
            } else {
                socket::client_as(from)
            }
        })?
    }
}

//! The messages of the seam between two processes: ztunnel's node protocol (ZDS) with our own additions.
//! The node lends a pod with its listeners, where istio-cni hands its namespace over alone, and says
//! what happens to it by its network namespace: a proxy outlives node processes, and may have been lent the
//! same namespace by several of them.
//!
//! Field numbers up to 99 are ZDS's, as istio-cni and ztunnel have them; ours begin at 100.

use std::io;
use std::net::IpAddr;
use std::sync::Arc;

use prost::Message;

use crate::mesh::Identity;

/// The version of our additions that this agent speaks.
pub const VERSION: u32 = 2;

/// The first packet of a proxy.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Hello {
    /// ZDS's own version: 1.
    #[prost(int32, tag = "1")]
    pub version: i32,
    /// The version of our additions that it speaks; 0 if none.
    #[prost(uint32, tag = "100")]
    pub lease: u32,
}

/// A message of the node; each is answered by a [`Response`].
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Request {
    /// What.
    #[prost(oneof = "NodeMessage", tags = "1, 2, 3, 100, 101, 102, 103")]
    pub said: Option<NodeMessage>,
}

/// The content of a [`Request`].
#[derive(Clone, PartialEq, Eq, prost::Oneof)]
pub enum NodeMessage {
    /// Serve this pod; with its network namespace and its three listeners.
    #[prost(message, tag = "1")]
    Add(Add),
    /// Abort all connections in the pod's network namespace, and give back all that was lent of it.
    #[prost(message, tag = "2")]
    Del(PodRef),
    /// All current pods have been added, and those that drain have been named: give back all others.
    #[prost(message, tag = "3")]
    SnapshotSent(Snapshot),
    /// The node's first packet, with the descriptor of the map that stamps the proxy's sockets.
    #[prost(message, tag = "100")]
    Welcome(Welcome),
    /// A pod has these addresses now.
    #[prost(message, tag = "101")]
    Addresses(Addresses),
    /// Open nothing new in the pod's network namespace, and send [`ProxyMessage::Idle`] when no connection in
    /// it runs. Each one is answered, also if nothing of the pod was lent.
    #[prost(message, tag = "102")]
    Drain(PodRef),
    /// Cancel the pod's drain.
    #[prost(message, tag = "103")]
    Revive(PodRef),
}

/// What is left open when all current pods have been added.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Snapshot {
    /// The cookies of network namespaces of which it is not decided yet whether the node lends them: what runs in
    /// them goes on. A proxy that does not know this field gives them back.
    #[prost(fixed64, repeated, tag = "100")]
    pub undecided: Vec<u64>,
}

/// A message without content.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Empty {}

/// The node's name and version, and the settings that a proxy must share; see [`SharedSettings`](super::SharedSettings).
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Welcome {
    /// The version of our additions that the node speaks.
    #[prost(uint32, tag = "1")]
    pub lease: u32,
    /// The node's name.
    #[prost(string, tag = "2")]
    pub node: String,
    /// The path of its state folder. This and what follows is absent in the words of older nodes.
    #[prost(bytes = "vec", optional, tag = "3")]
    pub state: Option<Vec<u8>>,
    /// The cluster of its pods.
    #[prost(string, optional, tag = "4")]
    pub cluster_id: Option<String>,
    /// The trust domain of their identities.
    #[prost(string, optional, tag = "5")]
    pub trust_domain: Option<String>,
    /// The SHA-256 fingerprint of the state's root.
    #[prost(string, optional, tag = "6")]
    pub root: Option<String>,
    /// Where its configuration is.
    #[prost(string, optional, tag = "7")]
    pub configuration: Option<String>,
    /// The domain of the cluster's services.
    #[prost(string, optional, tag = "8")]
    pub cluster_domain: Option<String>,
    /// Its network.
    #[prost(string, optional, tag = "9")]
    pub network: Option<String>,
}

/// A pod.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Add {
    /// The workload's uid.
    #[prost(string, tag = "1")]
    pub uid: String,
    /// Its name, namespace and service account.
    #[prost(message, optional, tag = "2")]
    pub workload_info: Option<WorkloadInfo>,
    /// This enrolment of it.
    #[prost(fixed64, tag = "100")]
    pub instance: u64,
    /// Its addresses, of 4 or 16 bytes each.
    #[prost(bytes = "vec", repeated, tag = "101")]
    pub addresses: Vec<Vec<u8>>,
    /// The trust domain of its identity.
    #[prost(string, tag = "102")]
    pub trust_domain: String,
    /// The cookie of its network namespace.
    #[prost(fixed64, tag = "103")]
    pub netns: u64,
}

/// The name, namespace and service account of a pod.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct WorkloadInfo {
    /// Its name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Its namespace.
    #[prost(string, tag = "2")]
    pub namespace: String,
    /// Its service account.
    #[prost(string, tag = "3")]
    pub service_account: String,
}

/// A reference to all enrolments of a network namespace, by whichever node process.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct PodRef {
    /// The workload's uid, for ZDS.
    #[prost(string, tag = "2")]
    pub uid: String,
    /// The namespace's cookie.
    #[prost(fixed64, tag = "100")]
    pub netns: u64,
}

/// A pod's addresses.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Addresses {
    /// The cookie of its network namespace.
    #[prost(fixed64, tag = "1")]
    pub netns: u64,
    /// Of 4 or 16 bytes each.
    #[prost(bytes = "vec", repeated, tag = "2")]
    pub addresses: Vec<Vec<u8>>,
}

/// A message of a proxy.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Response {
    /// What.
    #[prost(oneof = "ProxyMessage", tags = "1, 100, 101")]
    pub told: Option<ProxyMessage>,
}

/// The content of a [`Response`].
#[derive(Clone, PartialEq, Eq, prost::Oneof)]
pub enum ProxyMessage {
    /// The answer to the last request.
    #[prost(message, tag = "1")]
    Ack(Ack),
    /// No connection in a draining network namespace runs any more; not an answer to a request.
    #[prost(message, tag = "100")]
    Idle(PodRef),
    /// The proxy is about to end: it accepts nothing any more, and ignores pods that it is lent. Not an answer
    /// either.
    #[prost(message, tag = "101")]
    Leaving(Empty),
}

/// The result of a request.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Ack {
    /// The error, or empty if the request was done. An error of an [`Add`] concerns that pod alone; any other
    /// ends the conversation.
    #[prost(string, tag = "1")]
    pub error: String,
}

impl Hello {
    /// Reads it from a packet.
    ///
    /// # Errors
    /// It is no message of this protocol.
    pub fn read(packet: &[u8]) -> io::Result<Self> {
        Ok(Self::decode(packet)?)
    }

    /// Returns the packet that says it.
    pub fn packet(&self) -> Vec<u8> {
        self.encode_to_vec()
    }
}

impl NodeMessage {
    /// Reads it from a packet of a node.
    ///
    /// # Errors
    /// It is no message of this protocol.
    pub fn read(packet: &[u8]) -> io::Result<Self> {
        let said = Request::decode(packet)?.said;
        said.ok_or_else(|| wrong("the node says a word that is not known"))
    }

    /// Returns the packet that says it.
    pub fn packet(self) -> Vec<u8> {
        Request { said: Some(self) }.encode_to_vec()
    }
}

impl ProxyMessage {
    /// Reads it from a packet of a proxy.
    ///
    /// # Errors
    /// It is no message of this protocol.
    pub fn read(packet: &[u8]) -> io::Result<Self> {
        let told = Response::decode(packet)?.told;
        told.ok_or_else(|| wrong("the proxy says a word that is not known"))
    }

    /// Returns the packet that says it.
    pub fn packet(self) -> Vec<u8> {
        Response { told: Some(self) }.encode_to_vec()
    }
}

impl Add {
    /// Returns who the pod is.
    ///
    /// # Errors
    /// It is nobody, or its parts are those of no identity.
    pub fn identity(&self) -> io::Result<Identity> {
        let who = self.workload_info.clone().unwrap_or_default();
        let (namespace, account) = (&who.namespace, &who.service_account);
        let identity = Identity::new(&self.trust_domain, namespace, account);
        match identity.to_string().parse() {
            Ok(parsed) if identity == parsed => Ok(identity),
            _ => Err(wrong(&format!(
                "pod {}: {identity} is no identity",
                self.uid
            ))),
        }
    }
}

/// Returns the addresses of these bytes.
///
/// # Errors
/// One is none.
pub fn addresses(all: &[Vec<u8>]) -> io::Result<Arc<[IpAddr]>> {
    let one = |bytes: &Vec<u8>| address(bytes).ok_or_else(|| wrong("an address has 4 or 16 bytes"));
    all.iter().map(one).collect()
}

fn wrong(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// Returns the 4 or 16 bytes of an address.
pub fn bytes(address: &IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// Returns the address of these bytes, or `None` unless they are 4 or 16.
fn address(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
        16 => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
        _ => None,
    }
}

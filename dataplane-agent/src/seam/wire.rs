//! The words of the seam, as they go between two processes: ztunnel's node protocol (ZDS) with our own
//! besides. The node lends a pod with its listeners, where istio-cni hands its namespace over alone, and says
//! what happens to it by its instance.
//!
//! Field numbers up to 99 are ZDS's, as istio-cni and ztunnel have them; ours begin at 100.

use std::net::IpAddr;

/// Which version of our own words an end speaks.
pub const VERSION: u32 = 1;

/// The first packet, of who serves pods.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Hello {
    /// ZDS's own version: 1.
    #[prost(int32, tag = "1")]
    pub version: i32,
    /// Which of ours it speaks; 0 if none.
    #[prost(uint32, tag = "100")]
    pub lease: u32,
}

/// What the node says; each is answered by a [`Response`].
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Request {
    /// What.
    #[prost(oneof = "NodeMessage", tags = "1, 2, 3, 100, 101, 102, 103")]
    pub said: Option<NodeMessage>,
}

/// One thing that the node says.
#[derive(Clone, PartialEq, Eq, prost::Oneof)]
pub enum NodeMessage {
    /// Serve this pod; with its network namespace and its three listeners.
    #[prost(message, tag = "1")]
    Add(Add),
    /// Cut what runs of it, and give it back.
    #[prost(message, tag = "2")]
    Del(PodRef),
    /// All pods that there are have been added.
    #[prost(message, tag = "3")]
    SnapshotSent(Empty),
    /// The node's own first packet; with what stamps the sockets of who serves.
    #[prost(message, tag = "100")]
    Welcome(Welcome),
    /// A pod has these addresses now.
    #[prost(message, tag = "101")]
    Addresses(Addresses),
    /// Open nothing new for it, and say when nothing runs any more.
    #[prost(message, tag = "102")]
    Drain(PodRef),
    /// It goes on after all.
    #[prost(message, tag = "103")]
    Revive(PodRef),
}

/// Says nothing more.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Empty {}

/// What both ends go by.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Welcome {
    /// Which of our own words the node speaks.
    #[prost(uint32, tag = "1")]
    pub lease: u32,
    /// The node's name.
    #[prost(string, tag = "2")]
    pub node: String,
}

/// A pod.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Add {
    /// The workload's uid.
    #[prost(string, tag = "1")]
    pub uid: String,
    /// Who it is.
    #[prost(message, optional, tag = "2")]
    pub workload_info: Option<WorkloadInfo>,
    /// This enrolment of it.
    #[prost(fixed64, tag = "100")]
    pub instance: u64,
    /// Its addresses, of 4 or 16 bytes each.
    #[prost(bytes = "vec", repeated, tag = "101")]
    pub addresses: Vec<Vec<u8>>,
    /// Who vouches for its identity.
    #[prost(string, tag = "102")]
    pub trust_domain: String,
}

/// Who a pod is.
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

/// A pod that was added.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct PodRef {
    /// The workload's uid, for ZDS.
    #[prost(string, tag = "2")]
    pub uid: String,
    /// Which enrolment of it.
    #[prost(fixed64, tag = "100")]
    pub instance: u64,
}

/// A pod's addresses.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Addresses {
    /// Which enrolment of it.
    #[prost(fixed64, tag = "1")]
    pub instance: u64,
    /// Of 4 or 16 bytes each.
    #[prost(bytes = "vec", repeated, tag = "2")]
    pub addresses: Vec<Vec<u8>>,
}

/// What who serves pods says.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Response {
    /// What.
    #[prost(oneof = "ProxyMessage", tags = "1, 100, 101")]
    pub told: Option<ProxyMessage>,
}

/// One thing that who serves pods says.
#[derive(Clone, PartialEq, Eq, prost::Oneof)]
pub enum ProxyMessage {
    /// The request before has been done.
    #[prost(message, tag = "1")]
    Ack(Ack),
    /// Nothing runs any more of a pod that drains; it is no answer to a request.
    #[prost(message, tag = "100")]
    Idle(PodRef),
    /// It is to end: it accepts nothing any more, and is lent nothing new. Nor is this an answer.
    #[prost(message, tag = "101")]
    Leaving(Empty),
}

/// How a request went.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Ack {
    /// Why it could not be done; empty if it was.
    #[prost(string, tag = "1")]
    pub error: String,
}

/// An address as bytes.
pub fn bytes(address: &IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// The address that these bytes are; none if they are none.
pub fn address(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
        16 => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
        _ => None,
    }
}

//! Connections in clear: to the app of an inbound connection, and to peers outside the mesh.

use std::io;
use std::net::{IpAddr, SocketAddr};

use tokio::net::TcpStream;
use tokio::time::timeout;

use super::{Connector, TransportError};
use crate::proxy::authorize::LocalPod;
use crate::proxy::hbone::CONNECT_TIMEOUT;

/// Connects from the pod to a peer, from the address `from` or, without one, from the address that the pod's routes
/// choose.
///
/// # Errors
/// The peer refuses, cannot be reached or does not answer in time.
pub async fn to_peer(
    connector: &dyn Connector,
    pod: &LocalPod,
    from: Option<IpAddr>,
    to: SocketAddr,
) -> Result<TcpStream, TransportError> {
    in_time(connector.connect(pod, from, to)).await
}

/// Connects to the pod's app, from the client's own address.
///
/// # Errors
/// It fails as [`to_peer`] does.
pub async fn to_app(
    connector: &dyn Connector,
    pod: &LocalPod,
    from: IpAddr,
    to: SocketAddr,
) -> Result<TcpStream, TransportError> {
    // The port is from our range, but a live connection of the client may have the same.
    let mut end = in_time(connector.connect_as(pod, from, to)).await;
    for _ in 1..LocalPod::PORT_TRIES {
        match &end {
            Err(TransportError::Connect(error))
                if error.kind() == io::ErrorKind::AddrNotAvailable && pod.owns(to.ip()) => {}
            _ => break,
        }
        pod.port_was_taken(from, to);
        end = in_time(connector.connect_as(pod, from, to)).await;
    }
    end
}

async fn in_time(
    connect: impl Future<Output = io::Result<TcpStream>>,
) -> Result<TcpStream, TransportError> {
    timeout(CONNECT_TIMEOUT, connect)
        .await
        .map_err(|_| TransportError::Connect(io::Error::from(io::ErrorKind::TimedOut).into()))?
        .map_err(|error| TransportError::Connect(error.into()))
}

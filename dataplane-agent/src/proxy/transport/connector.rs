//! The production connector: it makes sockets in the pods' network namespaces, with the pods' certificates.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::SystemTime;

use futures_util::future::LocalBoxFuture;
use tokio::net::{TcpSocket, TcpStream};

use super::Connector;
use crate::mesh::Identity;
use crate::proxy::authorize::LocalPod;
use crate::proxy::identity::Certs;
use crate::proxy::limits::memory::Share;
use crate::proxy::limits::{Full, NodePlaces, Place};

/// The connector of this node.
#[derive(Clone, Debug)]
pub struct NodeConnector {
    /// The pods' certificates.
    pub certs: Certs,
    /// The places for connections.
    pub places: NodePlaces,
}

impl Connector for NodeConnector {
    fn connect<'a>(
        &'a self,
        pod: &'a LocalPod,
        from: Option<IpAddr>,
        to: SocketAddr,
    ) -> LocalBoxFuture<'a, io::Result<TcpStream>> {
        Box::pin(async move {
            TcpSocket::from_std_stream(pod.socket(from, to)?)
                .connect(to)
                .await
        })
    }

    fn connect_as<'a>(
        &'a self,
        pod: &'a LocalPod,
        from: IpAddr,
        to: SocketAddr,
    ) -> LocalBoxFuture<'a, io::Result<TcpStream>> {
        Box::pin(async move {
            TcpSocket::from_std_stream(pod.socket_as(from, to)?)
                .connect(to)
                .await
        })
    }

    fn client_tls<'a>(
        &'a self,
        pod: &'a LocalPod,
        expected: &'a [Identity],
    ) -> LocalBoxFuture<'a, Result<(Arc<rustls::ClientConfig>, SystemTime), String>> {
        Box::pin(async move {
            let client = self.certs.client(&pod.identity, expected).await;
            client.map_err(|error| error.to_string())
        })
    }
    fn place(&self, pod: &LocalPod) -> Result<Place, Full> {
        self.places.take(&pod.places)
    }
    fn unsent(&self, pod: &LocalPod) -> Share {
        self.places.unsent(&pod.places)
    }
    fn undelivered(&self, pod: &LocalPod) -> Share {
        self.places.undelivered(&pod.places)
    }
}

//! A peer that speaks HBONE by the plain use of other libraries, with any identity.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request};
use rcgen::{CertificateParams, Issuer, KeyPair, SanType};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};

use crate::{Pod, scaled};

/// A peer, by its credentials.
#[derive(Debug)]
pub struct Peer {
    /// Its certificate chain and its key, if it has any.
    pub shows: Option<(Vec<CertificateDer<'static>>, Vec<u8>)>,
}

impl Peer {
    /// Returns a peer with a certificate for `identity` of the CA with this root and key, in PEM.
    pub fn signed(root: &str, key: &str, identity: &str) -> Self {
        let root = CertificateDer::from_pem_slice(root.as_bytes()).expect("PEM");
        let signer =
            Issuer::from_ca_cert_der(&root, KeyPair::from_pem(key).expect("a key")).expect("a CA");
        let own = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(identity.try_into().expect("a URI"))];
        let leaf = params.signed_by(&own, &signer).expect("a certificate");
        Self {
            shows: Some((vec![leaf.der().clone()], own.serialize_der())),
        }
    }

    /// Returns a peer with a certificate of an unknown CA.
    pub fn stranger() -> Self {
        let key = KeyPair::generate().expect("a key");
        let mut root = CertificateParams::default();
        root.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let root = root.self_signed(&key).expect("a certificate");
        Self::signed(
            &root.pem(),
            &key.serialize_pem(),
            "spiffe://cluster.local/ns/demo/sa/peer",
        )
    }

    /// Sends a request in a new tunnel to a pod; returns the status.
    ///
    /// # Errors
    /// The failure, if it came before a status.
    pub fn request(
        &self,
        from: &Pod,
        to: SocketAddr,
        method: &Method,
        authority: &str,
    ) -> Result<u16, String> {
        self.tunnel(from, to)?.request(method, authority)
    }

    /// Opens a tunnel to a pod.
    ///
    /// # Errors
    /// The tunnel cannot be opened, with the reason.
    pub fn tunnel(&self, from: &Pod, to: SocketAddr) -> Result<Tunnel, String> {
        let tcp = from
            .netns
            .run(|| std::net::TcpStream::connect_timeout(&to, scaled(Duration::from_secs(5))));
        let tcp = tcp.map_err(|error| error.to_string())?;
        tcp.set_nonblocking(true).expect("a socket");
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        let (send, connection) = runtime.block_on(patient(self.handshake(tcp)))?;
        Ok(Tunnel {
            runtime,
            send,
            connection,
            streams: Vec::new(),
        })
    }

    async fn handshake(&self, tcp: std::net::TcpStream) -> Result<(Sender, Connection), String> {
        let text = |error: &dyn std::fmt::Display| error.to_string();
        let tcp = tokio::net::TcpStream::from_std(tcp).map_err(|error| text(&error))?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("TLS 1.3")
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(AcceptAnyServer));
        let mut config = match &self.shows {
            Some((chain, key)) => {
                let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.clone()));
                let config = config.with_client_auth_cert(chain.clone(), key);
                config.expect("a certificate")
            }
            None => config.with_no_client_auth(),
        };
        config.alpn_protocols = vec![b"h2".to_vec()];
        let name = ServerName::try_from("0.0.0.0").expect("a name");
        let tls = tokio_rustls::TlsConnector::from(Arc::new(config))
            .connect(name, tcp)
            .await;
        h2::client::Builder::new()
            .handshake(tls.map_err(|error| text(&error))?)
            .await
            .map_err(|error| text(&error))
    }
}

type Sender = h2::client::SendRequest<Bytes>;
type Connection = h2::client::Connection<tokio_rustls::client::TlsStream<tokio::net::TcpStream>>;

/// A peer's tunnel, which only makes progress during calls.
#[derive(Debug)]
pub struct Tunnel {
    runtime: tokio::runtime::Runtime,
    send: Sender,
    connection: Connection,
    /// The streams, which stay open until the tunnel ends.
    streams: Vec<h2::SendStream<Bytes>>,
}

impl Tunnel {
    /// Sends a request; returns the status.
    ///
    /// # Errors
    /// The failure, if it came before a status.
    pub fn request(&mut self, method: &Method, authority: &str) -> Result<u16, String> {
        let text = |error: &dyn std::fmt::Display| error.to_string();
        let uri = match *method {
            Method::CONNECT => http::Uri::builder().authority(authority).build(),
            _ => http::Uri::builder()
                .scheme("http")
                .authority(authority)
                .path_and_query("/")
                .build(),
        };
        let request = Request::builder()
            .method(method)
            .uri(uri.map_err(|error| text(&error))?);
        let (response, body) = self
            .send
            .send_request(request.body(()).expect("a request"), false)
            .map_err(|error| text(&error))?;
        self.streams.push(body);
        let connection = &mut self.connection;
        self.runtime.block_on(patient(async {
            tokio::select! {
                end = connection => Err(format!("closed: {end:?}")),
                response = response => response.map(|response| response.status().as_u16()).map_err(|error| text(&error)),
            }
        }))
    }

    /// Sends a line in the last stream that was requested, and runs the tunnel for this time.
    ///
    /// # Panics
    /// That stream has ended.
    pub fn say(&mut self, line: &'static str, time: Duration) {
        let stream = self.streams.last_mut().expect("one was asked for");
        stream
            .send_data(Bytes::from_static(line.as_bytes()), false)
            .expect("it is open");
        let connection = &mut self.connection;
        let _ = self
            .runtime
            .block_on(async { tokio::time::timeout(time, connection).await });
    }
}

/// Runs `work` with a time limit.
async fn patient<T>(work: impl Future<Output = Result<T, String>>) -> Result<T, String> {
    let done = tokio::time::timeout(scaled(Duration::from_secs(10)), work).await;
    done.unwrap_or_else(|_| Err("no answer".to_owned()))
}

/// Accepts any server's certificate: the tests are about the agent's verdict on the client.
#[derive(Debug)]
struct AcceptAnyServer;

impl rustls::client::danger::ServerCertVerifier for AcceptAnyServer {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: rustls_pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.3 alone".into()))
    }
    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }
    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        let provider = rustls::crypto::aws_lc_rs::default_provider();
        provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}

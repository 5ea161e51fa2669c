//! A pod and its tunnels to a peer with a real certificate, over loopback.

use super::*;

/// Issues certificates under a root of its own.
pub(super) struct Ca {
    signer: rcgen::Issuer<'static, KeyPair>,
    root: rustls_pki_types::CertificateDer<'static>,
}

impl Ca {
    pub(super) fn new() -> Self {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::default();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let root = params.self_signed(&key).expect("a root").der().clone();
        let signer = rcgen::Issuer::from_ca_cert_der(&root, key).expect("a CA");
        Self { signer, root }
    }
}

impl Issuer for Ca {
    fn issue<'a>(&'a self, identity: &'a Identity) -> BoxFuture<'a, Result<Issued, IdentityError>> {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::default();
        let uri = identity.to_string().try_into().expect("a URI");
        params.subject_alt_names = vec![SanType::URI(uri)];
        let leaf = params.signed_by(&key, &self.signer).expect("a certificate");
        let issued = Issued {
            chain: vec![leaf.der().clone()],
            key: key.serialize_der().into(),
            roots: vec![self.root.clone()],
        };
        Box::pin(std::future::ready(Ok(issued)))
    }
}

/// Connects by loopback, whatever address is asked for.
pub(super) struct Loopback {
    pub(super) certs: Certs,
    pub(super) peer: SocketAddr,
    pub(super) dials: Cell<usize>,
    pub(super) places: NodePlaces,
}

impl Means for Loopback {
    fn connect<'a>(
        &'a self,
        _: &'a LocalPod,
        _: Option<IpAddr>,
        _: SocketAddr,
    ) -> LocalBoxFuture<'a, std::io::Result<TcpStream>> {
        self.dials.set(self.dials.get() + 1);
        Box::pin(TcpStream::connect(self.peer))
    }
    fn connect_as<'a>(
        &'a self,
        pod: &'a LocalPod,
        _: IpAddr,
        to: SocketAddr,
    ) -> LocalBoxFuture<'a, std::io::Result<TcpStream>> {
        self.connect(pod, None, to)
    }
    fn client<'a>(
        &'a self,
        pod: &'a LocalPod,
        expected: &'a [Identity],
    ) -> LocalBoxFuture<'a, Result<Arc<rustls::ClientConfig>, String>> {
        Box::pin(async move {
            let certificate = self.certs.current(&pod.identity).await;
            certificate
                .and_then(|own| own.client(expected))
                .map_err(|error| error.to_string())
        })
    }
    fn place(&self, pod: &LocalPod) -> Result<Place, Full> {
        self.places.take(&pod.places, Kind::Outbound)
    }
    fn unsent(&self, pod: &LocalPod) -> Share {
        self.places.unsent(&pod.places)
    }
    fn undelivered(&self, pod: &LocalPod) -> Share {
        self.places.undelivered(&pod.places)
    }
}

pub(super) fn who(account: &str) -> Identity {
    Identity::new("td", "ns", account)
}

pub(super) fn pod() -> Arc<LocalPod> {
    LocalPod::example("c//Pod/ns/client", who("client"), Vec::new())
}

pub(super) fn key(pod: &LocalPod, expected: &str) -> Key {
    Key {
        source: pod.instance,
        from: None,
        target: "c//Pod/ns/server".into(),
        to: "192.0.2.1:15008".parse().expect("an address"),
        expected: vec![who(expected)],
    }
}

pub(super) fn connect() -> Connect {
    Connect {
        authority: "192.0.2.1:80".parse().expect("an address"),
        client: "192.0.2.9:4000".parse().expect("an address"),
        host: None,
        baggage: None,
    }
}

/// A peer that answers CONNECTs with `status`, as many per tunnel as `each`, then says GOAWAY; or with
/// status 0 is dead in its first tunnel.
pub(super) async fn peer(listener: TcpListener, certs: Certs, status: u16, each: usize) {
    let scope = Scope::new(None);
    let mut dead = status == 0;
    scope.spawn(certs.clone().rotate());
    loop {
        let Ok((tcp, _)) = listener.accept().await else {
            return;
        };
        let server = certs
            .current(&who("server"))
            .await
            .expect("a certificate")
            .server
            .clone();
        let dies = std::mem::take(&mut dead);
        let status = if status == 0 { 200 } else { status };
        scope.spawn(async move {
            let acceptor = tokio_rustls::TlsAcceptor::from(server);
            let Ok(tls) = acceptor.accept(ReadAhead::new(tcp)).await else {
                return;
            };
            let Ok(mut connection) = crate::hbone::server().handshake::<_, Payload>(tls).await
            else {
                return;
            };
            if dies {
                std::future::pending::<()>().await;
            }
            let mut streams = Vec::new();
            while let Some(Ok((request, mut respond))) = connection.accept().await {
                let mut answer = http::Response::new(());
                *answer.status_mut() = http::StatusCode::from_u16(status).expect("a status");
                let end = status != 200;
                streams.push((respond.send_response(answer, end), request));
                if streams.len() == each {
                    connection.graceful_shutdown();
                }
            }
        });
    }
}

pub(super) async fn pool(
    status: u16,
    each: usize,
) -> (Rc<Pool>, Rc<Loopback>, Scope, impl Future<Output = ()>) {
    let certs = Certs::new(Arc::new(Ca::new()));
    certs.hold(&who("client"));
    certs.hold(&who("server"));
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a listener");
    let means = Rc::new(Loopback {
        certs: certs.clone(),
        peer: listener.local_addr().expect("an address"),
        dials: Cell::new(0),
        places: NodePlaces::new(100),
    });
    let pool = Pool::new(means.clone(), Duration::from_secs(60));
    (
        pool,
        means,
        Scope::new(None),
        peer(listener, certs, status, each),
    )
}

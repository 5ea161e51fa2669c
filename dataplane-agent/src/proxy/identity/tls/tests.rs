//! Real handshakes with peers that are not who they claim to be. One end is ours, and the other accepts anybody, so
//! it is our end that refuses.

use std::sync::Mutex;

use rcgen::SanType;
use rustls::client::ResolvesClientCert;
use rustls::crypto::aws_lc_rs::cipher_suite;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{HandshakeKind, ProtocolVersion, ServerConnection, SupportedCipherSuite};
use rustls_pki_types::PrivatePkcs8KeyDer;
use time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::super::Issued;
use super::super::test_ca::{Ca, uri};
use super::*;

fn alice() -> Identity {
    Identity::new("td", "a", "alice")
}

fn bob() -> Identity {
    Identity::new("td", "b", "bob")
}

impl Ca {
    fn roots(&self) -> Arc<RootCertStore> {
        let mut roots = RootCertStore::empty();
        roots.add(self.root.clone()).expect("a root");
        Arc::new(roots)
    }

    fn shown(&self, names: Vec<SanType>, until: Duration) -> Shown {
        let Issued { chain, key, .. } = self.sign(names, until);
        let key = key.to_vec();
        Shown { chain, key }
    }

    fn of(&self, identity: &Identity) -> Shown {
        self.shown(vec![uri(&identity.to_string())], Duration::DAY)
    }

    /// Returns our settings of a server with a certificate of this identity.
    fn server(&self, identity: &Identity) -> ServerConfig {
        let shown = self.of(identity);
        server(identity, shown.chain.clone(), shown.key(), self.roots()).expect("settings")
    }

    /// Returns our settings of a client that expects one of these identities.
    fn client(&self, identity: &Identity, expected: &[Identity]) -> ClientConfig {
        let shown = self.of(identity);
        client(expected, shown.chain.clone(), shown.key(), self.roots()).expect("settings")
    }
}

/// Returns a crypto provider with this suite alone.
fn with(suite: SupportedCipherSuite) -> Arc<CryptoProvider> {
    Arc::new(CryptoProvider {
        cipher_suites: vec![suite],
        ..aws_lc_rs::default_provider()
    })
}

/// The certificate that a peer shows, and its key, which may be another's.
#[derive(Debug)]
struct Shown {
    chain: Vec<CertificateDer<'static>>,
    key: Vec<u8>,
}

impl Shown {
    fn key(&self) -> PrivateKeyDer<'static> {
        PrivatePkcs8KeyDer::from(self.key.clone()).into()
    }

    fn certified(&self) -> Arc<CertifiedKey> {
        let key = provider().key_provider.load_private_key(self.key());
        Arc::new(CertifiedKey::new(self.chain.clone(), key.expect("a key")))
    }

    /// Returns settings of a server that authenticates nobody, and resumes sessions.
    fn server(&self, suite: SupportedCipherSuite) -> ServerConfig {
        let mut config = ServerConfig::builder_with_provider(with(suite))
            .with_safe_default_protocol_versions()
            .expect("the suite's version")
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(SingleCertAndKey::from(self.certified())));
        config.ticketer = aws_lc_rs::Ticketer::new().expect("a ticketer");
        config
    }

    /// Returns settings of a client that accepts any server, and resumes sessions.
    fn client(&self, suite: SupportedCipherSuite) -> ClientConfig {
        self.client_by(suite, Arc::new(SingleCertAndKey::from(self.certified())))
    }

    fn client_by(
        &self,
        suite: SupportedCipherSuite,
        resolver: Arc<dyn ResolvesClientCert>,
    ) -> ClientConfig {
        ClientConfig::builder_with_provider(with(suite))
            .with_safe_default_protocol_versions()
            .expect("the suite's version")
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Anybody))
            .with_client_cert_resolver(resolver)
    }
}

/// Accepts any server.
#[derive(Debug)]
struct Anybody;

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        let provider = aws_lc_rs::default_provider();
        let algorithms = provider.signature_verification_algorithms;
        algorithms.supported_schemes()
    }
}

/// The parameters that two ends agreed on.
#[derive(Debug)]
struct Agreed {
    version: ProtocolVersion,
    suite: SupportedCipherSuite,
    alpn: Option<Vec<u8>>,
    sni: Option<String>,
    kind: HandshakeKind,
}

impl Agreed {
    fn of(session: &ServerConnection) -> Self {
        Self {
            version: session.protocol_version().expect("a version"),
            suite: session.negotiated_cipher_suite().expect("a suite"),
            alpn: session.alpn_protocol().map(<[u8]>::to_vec),
            sni: session.server_name().map(str::to_owned),
            kind: session.handshake_kind().expect("a handshake"),
        }
    }
}

/// The results of the client and the server.
type Told = (Result<(), String>, Result<Agreed, String>);

/// Connects the two and sends a byte each way.
async fn shake(client: &Arc<ClientConfig>, server: &Arc<ServerConfig>) -> Told {
    let (near, far) = tokio::io::duplex(64 << 10);
    let connect = async {
        let name = ServerName::try_from("a.name").expect("a name");
        let connector = TlsConnector::from(Arc::clone(client));
        let mut tls = connector.connect(name, near).await?;
        tls.write_all(b"?").await?;
        tls.read_exact(&mut [0]).await.map(|_| ())
    };
    let accept = async {
        let acceptor = TlsAcceptor::from(Arc::clone(server));
        let mut tls = acceptor.accept(far).await?;
        tls.read_exact(&mut [0]).await?;
        tls.write_all(b"!").await?;
        tls.flush().await?;
        std::io::Result::Ok(Agreed::of(tls.get_ref().1))
    };
    let (connected, accepted) = tokio::join!(connect, accept);
    (
        connected.map_err(|error| error.to_string()),
        accepted.map_err(|error| error.to_string()),
    )
}

/// A suite of TLS 1.3.
static TLS13: SupportedCipherSuite = cipher_suite::TLS13_AES_256_GCM_SHA384;
/// A suite of TLS 1.2.
static TLS12: SupportedCipherSuite = cipher_suite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384;

/// Returns the result of our client with a server.
async fn client_of(ca: &Ca, server: ServerConfig) -> Result<(), String> {
    let client = ca.client(&alice(), &[bob()]);
    shake(&client.into(), &server.into()).await.0
}

/// Returns the result of our server with a client.
async fn server_of(ca: &Ca, client: ClientConfig) -> Result<Agreed, String> {
    let server = ca.server(&bob());
    shake(&client.into(), &server.into()).await.1
}

/// Returns peers that must be refused, each with a part of the error.
fn impostors(ca: &Ca, who: &Identity) -> Vec<(Shown, &'static str)> {
    let name = || uri(&who.to_string());
    let stolen = Shown {
        key: ca.of(who).key,
        ..ca.of(who)
    };
    // The second certificate is only there for the first one's issuer; it does not identify the peer.
    let other = ca.of(&Identity::new("other", "c", "c"));
    let beside = Shown {
        chain: [other.chain, ca.of(who).chain].concat(),
        key: other.key,
    };
    vec![
        (beside, "did not present the expected"),
        (stolen, "BadSignature"),
        // It is signed by a root that has the name of ours.
        (Ca::new().of(who), "BadSignature"),
        (ca.shown(vec![name()], -Duration::HOUR), "xpired"),
        (
            ca.shown(vec![name(), uri("spiffe://td/ns/c/sa/c")], Duration::DAY),
            "more than one URI SAN",
        ),
        (
            ca.shown(vec![uri("https://td/ns/c/sa/c")], Duration::DAY),
            "invalid spiffe identity",
        ),
    ]
}

#[tokio::test]
async fn a_server_is_any_of_those_that_are_expected_and_nobody_else() {
    let ca = Ca::new();
    for (expected, taken) in [
        (vec![], false),
        (vec![alice()], false),
        (vec![bob()], true),
        (vec![alice(), bob()], true),
    ] {
        let client = ca.client(&alice(), &expected);
        let server = ca.of(&bob()).server(TLS13);
        let (told, _) = shake(&client.into(), &server.into()).await;
        assert_eq!(told.is_ok(), taken, "{expected:?}: {told:?}");
    }
}

#[tokio::test]
async fn a_client_that_shows_no_certificate_is_refused() {
    let ca = Ca::new();
    let nobody = Shown {
        chain: Vec::new(),
        ..ca.of(&alice())
    };
    let error = server_of(&ca, nobody.client(TLS13)).await;
    assert_eq!(error.expect_err("nobody"), "peer sent no certificates");
}

#[tokio::test]
async fn a_server_that_is_not_who_it_says_is_refused_by_the_client_alone() {
    let ca = Ca::new();
    client_of(&ca, ca.of(&bob()).server(TLS13))
        .await
        .expect("who it is");
    for (shown, word) in impostors(&ca, &bob()) {
        let error = client_of(&ca, shown.server(TLS13)).await;
        let error = error.expect_err(word);
        assert!(error.contains(word), "{word}: {error}");
    }
}

#[tokio::test]
async fn a_client_that_is_not_who_it_says_is_refused_by_the_server_alone() {
    let ca = Ca::new();
    server_of(&ca, ca.of(&alice()).client(TLS13))
        .await
        .expect("who it is");
    for (shown, word) in impostors(&ca, &alice()) {
        let error = server_of(&ca, shown.client(TLS13)).await;
        let error = error.expect_err(word);
        assert!(error.contains(word), "{word}: {error}");
    }
}

#[tokio::test]
async fn neither_end_speaks_anything_but_tls_1_3_in_the_two_suites() {
    let ca = Ca::new();
    for (suite, spoken) in [
        (TLS13, true),
        (cipher_suite::TLS13_AES_128_GCM_SHA256, true),
        (cipher_suite::TLS13_CHACHA20_POLY1305_SHA256, false),
        (TLS12, false),
    ] {
        let told = client_of(&ca, ca.of(&bob()).server(suite)).await;
        assert_eq!(told.is_ok(), spoken, "server: {suite:?}: {told:?}");
        let told = server_of(&ca, ca.of(&alice()).client(suite)).await;
        assert_eq!(told.is_ok(), spoken, "client: {suite:?}: {told:?}");
    }
}

#[tokio::test]
async fn both_ends_choose_h2_and_the_first_suite_and_name_no_server() {
    let ca = Ca::new();
    let (client, server) = (ca.client(&alice(), &[bob()]), ca.server(&bob()));
    let (_, agreed) = shake(&client.into(), &server.into()).await;
    let agreed = agreed.expect("a connection");
    assert_eq!(agreed.version, ProtocolVersion::TLSv1_3);
    assert_eq!(agreed.suite, cipher_suite::TLS13_AES_256_GCM_SHA384);
    assert_eq!(agreed.alpn.as_deref(), Some(ALPN));
    assert_eq!(agreed.sni, None);
}

#[tokio::test]
async fn a_client_that_speaks_another_protocol_is_refused() {
    let ca = Ca::new();
    for (protocol, taken) in [("h2", true), ("http/1.1", false)] {
        let mut client = ca.of(&alice()).client(TLS13);
        client.alpn_protocols = vec![protocol.into()];
        let told = server_of(&ca, client).await;
        assert_eq!(told.is_ok(), taken, "{protocol}: {told:?}");
    }
}

#[tokio::test]
async fn no_session_is_resumed_by_a_client_or_a_server_that_would() {
    let ca = Ca::new();
    let mut kinds = Vec::new();
    for (client, server) in [
        (ca.of(&alice()).client(TLS13), ca.of(&bob()).server(TLS13)),
        (ca.of(&alice()).client(TLS13), ca.server(&bob())),
        (ca.client(&alice(), &[bob()]), ca.of(&bob()).server(TLS13)),
    ] {
        let (client, server) = (client.into(), server.into());
        let _ = shake(&client, &server).await;
        let (_, agreed) = shake(&client, &server).await;
        kinds.push(agreed.expect("a connection").kind);
    }
    use HandshakeKind::{Full, Resumed};
    assert_eq!(kinds, [Resumed, Full, Full], "others do");
}

/// Stores the roots that the server says it accepts.
#[derive(Debug)]
struct Hinted(Arc<CertifiedKey>, Mutex<Vec<Vec<u8>>>);

impl ResolvesClientCert for Hinted {
    fn resolve(&self, roots: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        *self.1.lock().expect("a lock") = roots.iter().map(|root| root.to_vec()).collect();
        Some(Arc::clone(&self.0))
    }

    fn has_certs(&self) -> bool {
        true
    }
}

#[tokio::test]
async fn a_client_that_has_several_certificates_is_told_which_root_counts() {
    let ca = Ca::new();
    let shown = ca.of(&alice());
    let hinted = Arc::new(Hinted(shown.certified(), Mutex::default()));
    let resolver: Arc<dyn ResolvesClientCert> = hinted.clone();
    let client = shown.client_by(TLS13, resolver);
    server_of(&ca, client).await.expect("a connection");
    let (_, root) = X509Certificate::from_der(&ca.root).expect("a root");
    let told = hinted.1.lock().expect("a lock");
    assert_eq!(*told, [root.subject().as_raw().to_vec()]);
}

#[test]
fn a_peer_is_who_the_one_uri_of_its_leaf_says() {
    let ca = Ca::new();
    let of = |names| ca.shown(names, Duration::DAY).chain.remove(0);
    let dns = || SanType::DnsName("td.example".try_into().expect("a name"));
    let (alice, bob) = (alice(), bob());
    let (one, other) = (|| uri(&alice.to_string()), || uri(&bob.to_string()));
    for chain in [
        vec![of(vec![one()])],
        vec![of(vec![dns(), one()])],
        vec![of(vec![one()]), of(vec![other()])],
    ] {
        assert_eq!(peer_identity(&chain).expect("an identity"), alice);
    }
    for (chain, word) in [
        (vec![], "no certificate"),
        (vec![of(vec![])], "no SAN"),
        (vec![of(vec![dns()])], "no URI SAN"),
        (vec![of(vec![dns()]), of(vec![one()])], "no URI SAN"),
        (vec![of(vec![one(), other()])], "more than one URI SAN"),
        (vec![of(vec![one(), one()])], "more than one URI SAN"),
        (
            vec![of(vec![uri("spiffe://td")])],
            "invalid spiffe identity",
        ),
    ] {
        let error = peer_identity(&chain).expect_err(word).to_string();
        assert!(error.contains(word), "{word}: {error}");
    }
    assert!(peer_identity(&[b"no certificate".as_slice().into()]).is_err());
}

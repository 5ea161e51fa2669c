//! TLS settings of HBONE: 1.3 only, `h2`, a certificate on both sides. Peers are identified by the one SPIFFE URI in
//! their certificate and not by a name.
//!
//! Sessions are not resumed: a peer's rights depend on the certificate that it shows now.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, WebPkiServerVerifier, verify_server_cert_signed_by_trust_anchor};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, RootCertStore,
    ServerConfig, SignatureScheme,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::IdentityError;
use crate::mesh::Identity;

/// ALPN protocol of both ends.
const ALPN: &[u8] = b"h2";

/// Returns the crypto provider, with ztunnel's two cipher suites in its order.
pub(super) fn provider() -> Arc<CryptoProvider> {
    let mut provider = aws_lc_rs::default_provider();
    provider.cipher_suites = vec![
        aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384,
        aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256,
    ];
    Arc::new(provider)
}

/// Returns the TLS settings of a pod's tunnel server.
///
/// # Errors
/// The certificate, its key or the roots cannot be used.
pub(super) fn server(
    identity: &Identity,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    roots: Arc<RootCertStore>,
) -> Result<ServerConfig, IdentityError> {
    let provider = provider();
    let inner = WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(&provider))
        .build()
        .map_err(|error| IdentityError::Unusable(error.to_string().into()))?;
    let verifier = OfTrustDomain {
        inner,
        trust_domain: identity.trust_domain().into(),
    };
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(unusable)?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_single_cert(chain, key)
        .map_err(unusable)?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// Returns the TLS settings of a pod that connects to any of `expected`.
///
/// # Errors
/// It fails as [`server`] does.
pub(super) fn client(
    expected: &[Identity],
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    roots: Arc<RootCertStore>,
) -> Result<ClientConfig, IdentityError> {
    let provider = provider();
    let verifier = OfIdentity {
        inner: WebPkiServerVerifier::builder_with_provider(
            Arc::clone(&roots),
            Arc::clone(&provider),
        )
        .build()
        .map_err(|error| IdentityError::Unusable(error.to_string().into()))?,
        roots,
        provider: Arc::clone(&provider),
        expected: expected.to_vec(),
    };
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(unusable)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_auth_cert(chain, key)
        .map_err(unusable)?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.enable_sni = false;
    config.resumption = Resumption::disabled();
    Ok(config)
}

#[expect(clippy::needless_pass_by_value, reason = "for `map_err`")]
fn unusable(error: rustls::Error) -> IdentityError {
    IdentityError::Unusable(error.to_string().into())
}

/// Returns a peer's identity from the certificates that it showed. The leaf must have exactly one URI, an identity.
///
/// # Errors
/// There is no certificate, or it has no such URI, or more than one.
pub fn peer_identity(chain: &[CertificateDer<'_>]) -> Result<Identity, IdentityError> {
    let peer = |why: String| IdentityError::Peer(why.into());
    let leaf = chain
        .first()
        .ok_or_else(|| peer("peer presented no certificate".into()))?;
    let (_, leaf) = X509Certificate::from_der(leaf).map_err(|error| peer(error.to_string()))?;
    let names = leaf
        .subject_alternative_name()
        .map_err(|error| peer(error.to_string()))?
        .ok_or_else(|| peer("peer certificate has no SAN".into()))?;
    let mut uris = names
        .value
        .general_names
        .iter()
        .filter_map(|name| match name {
            GeneralName::URI(uri) => Some(*uri),
            _ => None,
        });
    match (uris.next(), uris.next()) {
        (Some(uri), None) => uri
            .parse()
            .map_err(|error: crate::mesh::NotAnIdentity| peer(error.to_string())),
        (None, _) => Err(peer("peer certificate has no URI SAN".into())),
        (Some(_), Some(_)) => Err(peer("peer certificate has more than one URI SAN".into())),
    }
}

/// Accepts a server whose identity is one of those expected.
#[derive(Debug)]
struct OfIdentity {
    inner: Arc<WebPkiServerVerifier>,
    roots: Arc<RootCertStore>,
    provider: Arc<CryptoProvider>,
    expected: Vec<Identity>,
}

impl ServerCertVerifier for OfIdentity {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        verify_server_cert_signed_by_trust_anchor(
            &ParsedCertificate::try_from(end_entity)?,
            &self.roots,
            intermediates,
            now,
            self.provider.signature_verification_algorithms.all,
        )?;
        let got = peer_identity(std::slice::from_ref(end_entity)).map_err(refuse)?;
        if self.expected.contains(&got) {
            return Ok(ServerCertVerified::assertion());
        }
        let want: Vec<String> = self.expected.iter().map(ToString::to_string).collect();
        Err(refuse(IdentityError::Peer(
            format!(
                "peer did not present the expected SAN ({}), got {got}",
                want.join(",")
            )
            .into(),
        )))
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

/// Accepts a client of our trust domain.
#[derive(Debug)]
struct OfTrustDomain {
    inner: Arc<dyn ClientCertVerifier>,
    trust_domain: Arc<str>,
}

impl ClientCertVerifier for OfTrustDomain {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.inner.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let verified = self
            .inner
            .verify_client_cert(end_entity, intermediates, now)?;
        let got = peer_identity(std::slice::from_ref(end_entity)).map_err(refuse)?;
        if got.trust_domain() == &*self.trust_domain {
            return Ok(verified);
        }
        Err(refuse(IdentityError::Peer(
            format!(
                "peer did not present the expected trustdomain ({}), got {got}",
                self.trust_domain
            )
            .into(),
        )))
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

fn refuse(error: IdentityError) -> rustls::Error {
    rustls::Error::InvalidCertificate(CertificateError::Other(rustls::OtherError(Arc::new(error))))
}

#[cfg(test)]
mod tests;

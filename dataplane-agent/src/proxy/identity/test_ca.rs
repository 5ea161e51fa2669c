//! A certificate authority for tests.

use futures_util::future::BoxFuture;
use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair, SanType};
use rustls_pki_types::CertificateDer;
use time::{Duration, OffsetDateTime};

use super::{IdentityError, Issued, Issuer};
use crate::mesh::Identity;

/// A root certificate and its signing key.
pub(crate) struct Ca {
    signer: rcgen::Issuer<'static, KeyPair>,
    pub(super) root: CertificateDer<'static>,
    /// Life of the certificates that it issues.
    life: Duration,
    /// An identity whose certificates have another life, and that life.
    except: Option<(Identity, Duration)>,
}

impl Ca {
    /// Creates one whose certificates live for a day.
    pub(crate) fn new() -> Self {
        Self::for_seconds(86400)
    }

    /// Creates one whose certificates live for `life` seconds.
    pub(crate) fn for_seconds(life: i64) -> Self {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let root = params.self_signed(&key).expect("a root").der().clone();
        let signer = rcgen::Issuer::from_ca_cert_der(&root, key).expect("a CA");
        let life = Duration::seconds(life);
        Self {
            signer,
            root,
            life,
            except: None,
        }
    }

    /// Sets the life, in seconds, of the certificates of one identity.
    pub(crate) fn for_seconds_of(self, identity: Identity, life: i64) -> Self {
        let except = Some((identity, Duration::seconds(life)));
        Self { except, ..self }
    }

    /// Issues a certificate with these names, valid from yesterday until `life` from now.
    pub(super) fn sign(&self, names: Vec<SanType>, life: Duration) -> Issued {
        self.sign_at(OffsetDateTime::now_utc(), names, life)
    }

    /// Does what [`Ca::sign`] does, as if at another time.
    pub(super) fn sign_at(
        &self,
        now: OffsetDateTime,
        names: Vec<SanType>,
        life: Duration,
    ) -> Issued {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::default();
        params.subject_alt_names = names;
        params.not_before = now - Duration::DAY;
        params.not_after = now + life;
        let leaf = params.signed_by(&key, &self.signer).expect("a certificate");
        Issued {
            chain: vec![leaf.der().clone()],
            key: key.serialize_der().into(),
            roots: vec![self.root.clone()],
        }
    }
}

/// Issues for every identity.
impl Issuer for Ca {
    fn issue<'a>(&'a self, identity: &'a Identity) -> BoxFuture<'a, Result<Issued, IdentityError>> {
        let life = match &self.except {
            Some((who, life)) if who == identity => *life,
            _ => self.life,
        };
        let issued = self.sign(vec![uri(&identity.to_string())], life);
        Box::pin(std::future::ready(Ok(issued)))
    }
}

pub(super) fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().expect("a URI"))
}

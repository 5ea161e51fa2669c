//! A certificate authority of tests.

use futures_util::future::BoxFuture;
use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair, SanType};
use rustls_pki_types::CertificateDer;
use time::{Duration, OffsetDateTime};

use super::{Identity, IdentityError, Issued, Issuer};

/// A root, and who signs with it.
pub(crate) struct Ca {
    signer: rcgen::Issuer<'static, KeyPair>,
    pub(super) root: CertificateDer<'static>,
}

impl Ca {
    pub(crate) fn new() -> Self {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let root = params.self_signed(&key).expect("a root").der().clone();
        let signer = rcgen::Issuer::from_ca_cert_der(&root, key).expect("a CA");
        Self { signer, root }
    }

    /// A certificate with these names, from yesterday on, which ends so long from now.
    pub(super) fn sign(&self, names: Vec<SanType>, life: Duration) -> Issued {
        self.sign_at(OffsetDateTime::now_utc(), names, life)
    }

    /// As [`Ca::sign`], at another time.
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

/// Signs for everybody, for a day.
impl Issuer for Ca {
    fn issue<'a>(&'a self, identity: &'a Identity) -> BoxFuture<'a, Result<Issued, IdentityError>> {
        let issued = self.sign(vec![uri(&identity.to_string())], Duration::DAY);
        Box::pin(std::future::ready(Ok(issued)))
    }
}

pub(super) fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().expect("a URI"))
}

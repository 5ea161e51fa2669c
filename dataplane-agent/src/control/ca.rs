//! The embedded CA: issues certificates to the pods of all nodes that share a state folder.
//!
//! `<state>/ca/root.pem` is the root that everybody trusts, `<state>/ca/key.pem` its key (0600).
//! They are made once, by whoever comes first, and never replaced: others may trust them already.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures_util::future::BoxFuture;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer as Signer,
    KeyPair, KeyUsagePurpose, SanType,
};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use time::OffsetDateTime;
use zeroize::Zeroizing;

use crate::identity::{Identity, IdentityError, Issued, Issuer};

/// How long the root lives.
const ROOT_LIFE: time::Duration = time::Duration::days(3650);
/// Clocks of nodes may differ by this much.
const SKEW: time::Duration = time::Duration::minutes(2);

/// Why the CA cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// A file or folder.
    #[error("{path}: {error}")]
    File {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        error: io::Error,
    },
    /// Others could read the key.
    #[error("{path}: mode {mode:o}: the CA's key must be readable by its owner alone (chmod 600)")]
    Open {
        /// The key.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// One of the two files is there and the other is not.
    #[error(
        "{missing} is missing, and {there} is there: bring it back, or remove both (pods trust the new root only after a restart of their agents)"
    )]
    Half {
        /// What is not there.
        missing: PathBuf,
        /// What is.
        there: PathBuf,
    },
    /// The root is another mesh's.
    #[error("{path}: is the root of trust domain {found}, not {wanted}")]
    TrustDomain {
        /// The root.
        path: PathBuf,
        /// What it says.
        found: String,
        /// What is configured.
        wanted: String,
    },
    /// A file is not what it should be.
    #[error("{path}: {why}")]
    Wrong {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
}

/// The CA.
pub struct EmbeddedCa {
    signer: Signer<'static, KeyPair>,
    root: CertificateDer<'static>,
    ttl: Duration,
}

impl std::fmt::Debug for EmbeddedCa {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EmbeddedCa")
            .field("ttl", &self.ttl)
            .finish_non_exhaustive()
    }
}

impl EmbeddedCa {
    /// Opens the CA of a state folder, or makes it. Certificates live for `ttl`.
    ///
    /// # Errors
    /// See [`CaError`].
    pub fn open(state: &Path, trust_domain: &str, ttl: Duration) -> Result<Self, CaError> {
        let folder = state.join("ca");
        let file = |path: &Path| {
            let path = path.to_owned();
            move |error| CaError::File { path, error }
        };
        fs::create_dir_all(&folder).map_err(file(&folder))?;
        // Of nodes that start together one makes the CA, and the others find it.
        let lock = folder.join("lock");
        let locked = File::create(&lock).map_err(file(&lock))?;
        locked.lock().map_err(file(&lock))?;
        let (root_path, key_path) = (folder.join("root.pem"), folder.join("key.pem"));
        match (root_path.exists(), key_path.exists()) {
            (true, true) => {}
            (false, false) => make(&root_path, &key_path, trust_domain)?,
            (true, false) => {
                return Err(CaError::Half {
                    missing: key_path,
                    there: root_path,
                });
            }
            // The root is written last: the key alone is what an interrupted start leaves.
            (false, true) => make(&root_path, &key_path, trust_domain)?,
        }
        let mode = fs::metadata(&key_path)
            .map_err(file(&key_path))?
            .permissions()
            .mode()
            & 0o777;
        if mode & 0o077 != 0 {
            return Err(CaError::Open {
                path: key_path,
                mode,
            });
        }
        let root_pem = fs::read_to_string(&root_path).map_err(file(&root_path))?;
        let key_pem = Zeroizing::new(fs::read_to_string(&key_path).map_err(file(&key_path))?);
        drop(locked);
        let wrong = |path: &Path, why: String| CaError::Wrong {
            path: path.to_owned(),
            why,
        };
        let root = CertificateDer::from_pem_slice(root_pem.as_bytes())
            .map_err(|error| wrong(&root_path, error.to_string()))?;
        let found = organisation(&root).map_err(|why| wrong(&root_path, why))?;
        if found != trust_domain {
            return Err(CaError::TrustDomain {
                path: root_path,
                found,
                wanted: trust_domain.to_owned(),
            });
        }
        let key =
            KeyPair::from_pem(&key_pem).map_err(|error| wrong(&key_path, error.to_string()))?;
        if !is_key_of(&root, &key) {
            return Err(wrong(
                &key_path,
                format!("is not the key of {}", root_path.display()),
            ));
        }
        let signer = Signer::from_ca_cert_der(&root, key)
            .map_err(|error| wrong(&root_path, error.to_string()))?;
        Ok(Self { signer, root, ttl })
    }

    fn sign(&self, identity: &Identity) -> Result<Issued, rcgen::Error> {
        let key = KeyPair::generate()?;
        let now = OffsetDateTime::now_utc();
        let mut leaf = CertificateParams::default();
        leaf.distinguished_name = rcgen::DistinguishedName::new();
        leaf.not_before = now - SKEW;
        leaf.not_after = now + self.ttl;
        // Critical, since there is no subject besides (RFC 5280, 4.2.1.6); rcgen sees to it.
        leaf.subject_alt_names = vec![SanType::URI(identity.to_string().try_into()?)];
        leaf.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        leaf.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        leaf.is_ca = IsCa::ExplicitNoCa;
        let leaf = leaf.signed_by(&key, &self.signer)?;
        Ok(Issued {
            chain: vec![leaf.der().clone()],
            key: Zeroizing::new(key.serialize_der()),
            roots: vec![self.root.clone()],
        })
    }
}

impl Issuer for EmbeddedCa {
    fn issue<'a>(&'a self, identity: &'a Identity) -> BoxFuture<'a, Result<Issued, IdentityError>> {
        let issued = self.sign(identity);
        let issued = issued.map_err(|error| IdentityError::Signing(error.to_string().into()));
        Box::pin(std::future::ready(issued))
    }
}

fn make(root_path: &Path, key_path: &Path, trust_domain: &str) -> Result<(), CaError> {
    let wrong = |error: rcgen::Error| CaError::Wrong {
        path: root_path.to_owned(),
        why: error.to_string(),
    };
    let key = KeyPair::generate().map_err(wrong)?;
    let mut root = CertificateParams::default();
    let now = OffsetDateTime::now_utc();
    root.not_before = now - SKEW;
    root.not_after = now + ROOT_LIFE;
    root.distinguished_name = rcgen::DistinguishedName::new();
    root.distinguished_name
        .push(DnType::OrganizationName, trust_domain);
    root.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    root.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let root = root.self_signed(&key).map_err(wrong)?;
    let key_pem = Zeroizing::new(key.serialize_pem());
    write(key_path, key_pem.as_bytes(), 0o600)?;
    write(root_path, root.pem().as_bytes(), 0o644)?;
    tracing::info!(root = %root_path.display(), trust_domain, "made a new root certificate");
    Ok(())
}

/// Writes a file whole or not at all, to the disk.
fn write(path: &Path, bytes: &[u8], mode: u32) -> Result<(), CaError> {
    let write = || {
        let new = path.with_extension("new");
        let mut options = OpenOptions::new();
        let mut file = options
            .write(true)
            .create(true)
            .truncate(true)
            .mode(mode)
            .open(&new)?;
        file.set_permissions(Permissions::from_mode(mode))?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&new, path)?;
        File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()
    };
    write().map_err(|error| CaError::File {
        path: path.to_owned(),
        error,
    })
}

fn organisation(root: &CertificateDer<'_>) -> Result<String, String> {
    use x509_parser::prelude::{FromDer, X509Certificate};
    let (_, root) = X509Certificate::from_der(root).map_err(|error| error.to_string())?;
    if !root.is_ca() {
        return Err("is not a CA's certificate".into());
    }
    let organisation = root.subject().iter_organization().next();
    let name = organisation
        .and_then(|name| name.as_str().ok())
        .map(str::to_owned);
    name.ok_or_else(|| "does not say its trust domain (its subject has no organisation)".into())
}

fn is_key_of(root: &CertificateDer<'_>, key: &KeyPair) -> bool {
    use x509_parser::prelude::{FromDer, X509Certificate};
    let parsed = X509Certificate::from_der(root);
    parsed.is_ok_and(|(_, root)| {
        *root.public_key().subject_public_key.data == *rcgen::PublicKeyData::der_bytes(key)
    })
}

#[cfg(test)]
mod tests;

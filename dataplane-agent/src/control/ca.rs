//! The embedded CA: issues certificates to the pods of all nodes that share a state folder.
//!
//! `<state>/ca/root.pem` is the root that everybody trusts, `<state>/ca/key.pem` its key (0600). The first
//! node makes them, once; they are never replaced, since others may trust the root already. The folder appears
//! whole, by one rename. So if one file is missing, an interrupted start is not the cause: it was lost, and
//! the agent refuses to start.

use std::fs::{self, DirBuilder, DirEntry, File, Metadata, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures_util::future::BoxFuture;
use nix::unistd::geteuid;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer as Signer,
    KeyPair, KeyUsagePurpose, SanType,
};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use x509_parser::prelude::{FromDer, X509Certificate};
use zeroize::Zeroizing;

use super::ownership;
use crate::mesh::Identity;
use crate::proxy::identity::{IdentityError, Issued, Issuer, sha256};
use crate::sys::regular_file;

/// Lifetime of the root.
const ROOT_LIFE: time::Duration = time::Duration::days(3650);
/// Allowed difference between the clocks of nodes.
const SKEW: time::Duration = time::Duration::minutes(2);
/// Shortest certificate lifetime; a shorter one is not renewed in time.
const MIN_TTL: Duration = Duration::from_secs(10);
/// The agent warns of a root that ends within this time.
const EXPIRY_WARNING: time::Duration = time::Duration::days(30);
/// Prefix of the name of a folder in which a CA is being made.
const TEMP_PREFIX: &str = ".ca-";
/// Longest time that making a CA takes.
const CREATION_TIMEOUT: Duration = Duration::from_secs(60);

/// Why the CA cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// A file or folder cannot be read or written.
    #[error("{path}: {error}")]
    File {
        /// The file or folder.
        path: PathBuf,
        /// The error.
        error: io::Error,
    },
    /// Others could read the key.
    #[error(
        "{path}: {what}: the CA's key must be root's or this user's, and readable by its owner alone"
    )]
    Open {
        /// The key.
        path: PathBuf,
        /// The fault, and how to mend it.
        what: String,
    },
    /// One of the two files is missing.
    #[error(
        "{missing} is missing, and {there} is there: bring it back, or, for a new CA, uninstall all nodes and remove {folder}"
    )]
    Half {
        /// The missing file.
        missing: PathBuf,
        /// The other file.
        there: PathBuf,
        /// The folder of both.
        folder: PathBuf,
    },
    /// The folder has neither of the two files, and is not empty.
    #[error(
        "{folder}: has neither root.pem nor key.pem, and {other} is there: bring them back, or, for a new CA, uninstall all nodes and remove the folder"
    )]
    Other {
        /// The folder.
        folder: PathBuf,
        /// An entry of the folder.
        other: PathBuf,
    },
    /// The root is another mesh's.
    #[error("{path}: is the root of trust domain {found}, not {wanted}")]
    TrustDomain {
        /// The root.
        path: PathBuf,
        /// The trust domain in the root.
        found: String,
        /// The configured trust domain.
        wanted: String,
    },
    /// The root is not valid now.
    #[error("{path}: is valid from {from} to {until}, and it is {now}")]
    Expired {
        /// The root.
        path: PathBuf,
        /// Start of its validity.
        from: String,
        /// End of its validity.
        until: String,
        /// The time by this machine's clock.
        now: String,
    },
    /// Certificates could not be renewed before they end.
    #[error("--secret-ttl: {0:?} is too short, {MIN_TTL:?} is the least")]
    Ttl(Duration),
    /// The content of a file is wrong.
    #[error("{path}: {why}")]
    Wrong {
        /// The file.
        path: PathBuf,
        /// The fault.
        why: String,
    },
}

/// The embedded CA.
pub struct EmbeddedCa {
    trust_domain: String,
    signer: Signer<'static, KeyPair>,
    root: CertificateDer<'static>,
    root_end: RootEnd,
    ttl: Duration,
}

/// The end of the root's validity, with which all other certificates end.
#[derive(Clone, Debug)]
pub struct RootEnd {
    path: PathBuf,
    at: OffsetDateTime,
    /// Time before the end from which on it is reported.
    soon: time::Duration,
}

impl RootEnd {
    /// Returns the end, in Unix time in seconds.
    pub fn unix(&self) -> i64 {
        self.at.unix_timestamp()
    }

    /// Returns a message if the root ends soon or has ended.
    pub fn problem(&self) -> Option<String> {
        self.problem_at(OffsetDateTime::now_utc())
    }

    fn problem_at(&self, now: OffsetDateTime) -> Option<String> {
        let how = match self.at - now {
            left if left <= time::Duration::ZERO => "has ended",
            left if left < self.soon => "ends",
            _ => return None,
        };
        let (path, at) = (self.path.display(), told(self.at));
        Some(format!(
            "{path}: the root certificate {how} at {at}, and all others with it: all nodes need a new CA"
        ))
    }
}

impl std::fmt::Debug for EmbeddedCa {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EmbeddedCa")
            .field("ttl", &self.ttl)
            .finish_non_exhaustive()
    }
}

impl EmbeddedCa {
    /// Opens the CA of a state folder; makes it if there is none. Certificates live for `ttl`, but no longer
    /// than the root.
    ///
    /// # Errors
    /// See [`CaError`].
    pub fn open(state: &Path, trust_domain: &str, ttl: Duration) -> Result<Self, CaError> {
        Self::open_after(&|| Ok(()), state, trust_domain, ttl)
    }

    /// Like [`Self::open`], and calls `first` before a new CA can be seen by others, once it is on the disk.
    /// Whoever finds the CA also finds what `first` makes.
    ///
    /// # Errors
    /// See [`CaError`]; `first` fails.
    pub fn open_after(
        first: &dyn Fn() -> Result<(), CaError>,
        state: &Path,
        trust_domain: &str,
        ttl: Duration,
    ) -> Result<Self, CaError> {
        if ttl < MIN_TTL {
            return Err(CaError::Ttl(ttl));
        }
        let folder = state.join("ca");
        let (root_path, key_path) = (root_of(state), key_of(state));
        let there = match read_both(&root_path, &key_path)? {
            (Some(root), Some(key)) => (Some(root), Some(key)),
            (None, None) => {
                make(&folder, trust_domain, first)?;
                read_both(&root_path, &key_path)?
            }
            // Another node may have made it between the two reads.
            _ => read_both(&root_path, &key_path)?,
        };
        let half = |missing: &Path, there: &Path| CaError::Half {
            missing: missing.to_owned(),
            there: there.to_owned(),
            folder: folder.clone(),
        };
        let (root_pem, key_pem) = match there {
            (Some(root), Some(key)) => (root, key),
            (Some(_), None) => return Err(half(&key_path, &root_path)),
            (None, Some(_)) => return Err(half(&root_path, &key_path)),
            (None, None) => return Err(of_file(&root_path)(io::ErrorKind::NotFound.into())),
        };
        let wrong = |path: &Path, why: String| CaError::Wrong {
            path: path.to_owned(),
            why,
        };
        let (root, said) = read_root(&root_path, &root_pem, trust_domain)?;
        let now = OffsetDateTime::now_utc();
        if now + SKEW < said.begins || said.ends <= now {
            return Err(CaError::Expired {
                path: root_path,
                from: told(said.begins),
                until: told(said.ends),
                now: told(now),
            });
        }
        let key =
            KeyPair::from_pem(&key_pem).map_err(|error| wrong(&key_path, error.to_string()))?;
        if said.public_key != rcgen::PublicKeyData::der_bytes(&key) {
            let why = format!("is not the key of {}", root_path.display());
            return Err(wrong(&key_path, why));
        }
        let root_end = RootEnd {
            path: root_path.clone(),
            at: said.ends,
            soon: EXPIRY_WARNING.max(ttl.try_into().unwrap_or(EXPIRY_WARNING)),
        };
        if let Some(problem) = root_end.problem_at(now) {
            tracing::warn!("{problem}");
        }
        let signer = Signer::from_ca_cert_der(&root, key)
            .map_err(|error| wrong(&root_path, error.to_string()))?;
        clear(state);
        Ok(Self {
            trust_domain: said.trust_domain,
            signer,
            root,
            root_end,
            ttl,
        })
    }

    /// Returns the end of its root.
    pub fn root_end(&self) -> &RootEnd {
        &self.root_end
    }

    /// Returns the SHA-256 fingerprint of its root.
    pub fn fingerprint(&self) -> String {
        sha256(&self.root)
    }

    fn sign(&self, identity: &Identity) -> Result<Issued, IdentityError> {
        let signing = |error: rcgen::Error| IdentityError::Signing(error.to_string().into());
        if identity.trust_domain() != self.trust_domain {
            let own = &self.trust_domain;
            let why = format!("{identity} is not of the trust domain of this mesh, {own}");
            return Err(IdentityError::Signing(why.into()));
        }
        let now = OffsetDateTime::now_utc();
        let root_ends = self.root_end.at;
        if root_ends <= now {
            let why = format!("the root certificate has ended at {}", told(root_ends));
            return Err(IdentityError::Signing(why.into()));
        }
        let key = KeyPair::generate().map_err(signing)?;
        let mut leaf = CertificateParams::default();
        leaf.distinguished_name = rcgen::DistinguishedName::new();
        leaf.not_before = now - SKEW;
        leaf.not_after = root_ends.min(now + self.ttl);
        // The extension is critical since there is no subject (RFC 5280, 4.2.1.6); rcgen marks it so.
        let uri = identity.to_string().try_into().map_err(signing)?;
        leaf.subject_alt_names = vec![SanType::URI(uri)];
        leaf.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        leaf.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        leaf.is_ca = IsCa::ExplicitNoCa;
        let leaf = leaf.signed_by(&key, &self.signer).map_err(signing)?;
        Ok(Issued {
            chain: vec![leaf.der().clone()],
            key: Zeroizing::new(key.serialize_der()),
            roots: vec![self.root.clone()],
        })
    }
}

impl Issuer for EmbeddedCa {
    fn issue<'a>(&'a self, identity: &'a Identity) -> BoxFuture<'a, Result<Issued, IdentityError>> {
        Box::pin(std::future::ready(self.sign(identity)))
    }
}

/// Returns the path of the root.
pub fn root_of(state: &Path) -> PathBuf {
    state.join("ca/root.pem")
}

fn key_of(state: &Path) -> PathBuf {
    state.join("ca/key.pem")
}

/// Returns `true` if a state has a CA, or a part of one.
///
/// # Errors
/// A file's metadata cannot be read.
pub fn is_there(state: &Path) -> io::Result<bool> {
    for path in [root_of(state), key_of(state)] {
        match fs::symlink_metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            found => return found.map(|_| true),
        }
    }
    Ok(false)
}

/// Returns the SHA-256 fingerprint of the root in a file.
///
/// # Errors
/// The file cannot be read, or has no certificate.
pub fn fingerprint_of(root: &Path) -> io::Result<String> {
    let root =
        CertificateDer::from_pem_slice(&regular_file::read(root)?).map_err(io::Error::other)?;
    Ok(sha256(&root))
}

/// Checks that the root of a state is of this trust domain, if it is there, for a process that has no key.
///
/// # Errors
/// It is of another one; it cannot be read.
pub fn refuse_other_trust_domain(state: &Path, trust_domain: &str) -> Result<(), CaError> {
    let path = root_of(state);
    match read(&path, |_| Ok(()))? {
        Some(pem) => read_root(&path, &pem, trust_domain).map(drop),
        None => Ok(()),
    }
}

/// Returns the root, and its fields; it is of this trust domain.
fn read_root(
    path: &Path,
    pem: &str,
    trust_domain: &str,
) -> Result<(CertificateDer<'static>, RootContents), CaError> {
    let wrong = |why| CaError::Wrong {
        path: path.to_owned(),
        why,
    };
    let root =
        CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|error| wrong(error.to_string()))?;
    let said = RootContents::read(&root).map_err(wrong)?;
    match said.trust_domain == trust_domain {
        true => Ok((root, said)),
        false => Err(CaError::TrustDomain {
            path: path.to_owned(),
            found: said.trust_domain,
            wanted: trust_domain.to_owned(),
        }),
    }
}

/// The root and its key; `None` if a file is missing.
type RootAndKey = (Option<String>, Option<Zeroizing<String>>);

fn read_both(root: &Path, key: &Path) -> Result<RootAndKey, CaError> {
    let root_pem = read(root, |_| Ok(()))?;
    let own = geteuid().as_raw();
    let key_pem = read(key, |found| match exposed(found.uid(), found.mode(), own) {
        None => Ok(()),
        Some(what) => Err(CaError::Open {
            path: key.to_owned(),
            what,
        }),
    })?;
    Ok((root_pem, key_pem.map(Zeroizing::new)))
}

/// Returns a message if others than root and this user could read or replace a key.
fn exposed(owner: u32, mode: u32, own: u32) -> Option<String> {
    ownership::fault((owner, mode & 0o777), own, (0o077, "chmod 600"))
}

fn read(
    path: &Path,
    fits: impl Fn(&Metadata) -> Result<(), CaError>,
) -> Result<Option<String>, CaError> {
    let file = match regular_file::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(of_file(path)(error)),
    };
    fits(&file.metadata().map_err(of_file(path))?)?;
    let text = io::read_to_string(file).map_err(of_file(path))?;
    Ok(Some(text))
}

fn of_file(path: &Path) -> impl Fn(io::Error) -> CaError + use<> {
    let path = path.to_owned();
    move |error| CaError::File {
        path: path.clone(),
        error,
    }
}

/// Makes a CA in a folder that is empty or missing. If several nodes do so at once, one is first, and the
/// others find its CA.
fn make(
    folder: &Path,
    trust_domain: &str,
    first: &dyn Fn() -> Result<(), CaError>,
) -> Result<(), CaError> {
    if let Some(other) = unknown_entry(folder).map_err(of_file(folder))? {
        return Err(CaError::Other {
            folder: folder.to_owned(),
            other,
        });
    }
    let new = folder.with_file_name(format!("{TEMP_PREFIX}{:016x}", rand::random::<u64>()));
    let mut builder = DirBuilder::new();
    builder
        .recursive(true)
        .mode(0o755)
        .create(&new)
        .map_err(of_file(&new))?;
    let filled = fill(&new, trust_domain).and_then(|()| first());
    let made = filled.and_then(|()| match fs::rename(&new, folder) {
        Ok(()) => {
            let parent = folder.parent().unwrap_or(Path::new("/"));
            let synced = File::open(parent).and_then(|parent| parent.sync_all());
            synced.map_err(of_file(parent))?;
            tracing::info!(folder = %folder.display(), trust_domain, "made a new root certificate");
            Ok(())
        }
        // A folder that is not empty cannot be renamed over: another node was first.
        Err(error) if is_taken(&error) => Ok(()),
        Err(error) => Err(of_file(folder)(error)),
    });
    let _ = fs::remove_dir_all(&new); // There only if it was not taken.
    made
}

/// Removes what interrupted starts have left: keys of CAs that nobody has seen. A new one may belong to a node
/// that is starting now, and stays. Failures are logged.
fn clear(state: &Path) {
    let entries = fs::read_dir(state).into_iter().flatten().flatten();
    for entry in entries {
        let name = entry.file_name();
        let random = name
            .to_str()
            .and_then(|name| name.strip_prefix(TEMP_PREFIX));
        if random.is_none_or(|random| random.len() != 16) || !is_abandoned(&entry) {
            continue;
        }
        let path = entry.path();
        let files = ["key.pem", "root.pem"].map(|file| match fs::remove_file(path.join(file)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        });
        let removed = files.into_iter().collect::<io::Result<()>>();
        match removed.and_then(|()| fs::remove_dir(&path)) {
            Ok(()) => {
                tracing::info!(folder = %path.display(), "removed a CA that was never finished");
            }
            Err(error) => {
                tracing::warn!(folder = %path.display(), %error, "a CA that was never finished cannot be removed");
            }
        }
    }
}

/// Returns `true` for a folder that has not changed for longer than it takes to make a CA.
fn is_abandoned(entry: &DirEntry) -> bool {
    let Ok(found) = entry.metadata() else {
        return false;
    };
    let age = found.modified().map(|at| at.elapsed().unwrap_or_default());
    found.is_dir() && age.is_ok_and(|age| age > CREATION_TIMEOUT)
}

fn is_taken(error: &io::Error) -> bool {
    use io::ErrorKind::{AlreadyExists, DirectoryNotEmpty};
    [AlreadyExists, DirectoryNotEmpty].contains(&error.kind())
}

/// Returns an entry of a folder that is not one of the CA's files.
fn unknown_entry(folder: &Path) -> io::Result<Option<PathBuf>> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        entries => entries?,
    };
    for entry in entries {
        let name = entry?.file_name();
        // If the CA's files are here, another node was first, after we looked.
        if name != "root.pem" && name != "key.pem" {
            return Ok(Some(folder.join(name)));
        }
    }
    Ok(None)
}

fn fill(folder: &Path, trust_domain: &str) -> Result<(), CaError> {
    let root_path = folder.join("root.pem");
    let wrong = |error: rcgen::Error| CaError::Wrong {
        path: root_path.clone(),
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
    write(&folder.join("key.pem"), key_pem.as_bytes(), 0o600)?;
    write(&root_path, root.pem().as_bytes(), 0o644)?;
    let synced = File::open(folder).and_then(|folder| folder.sync_all());
    synced.map_err(of_file(folder))
}

/// Writes a new file and syncs it to the disk.
fn write(path: &Path, bytes: &[u8], mode: u32) -> Result<(), CaError> {
    let write = || {
        let mut options = OpenOptions::new();
        let mut file = options.write(true).create_new(true).mode(mode).open(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(of_file(path))
}

/// The fields of a root certificate.
struct RootContents {
    trust_domain: String,
    public_key: Vec<u8>,
    begins: OffsetDateTime,
    ends: OffsetDateTime,
}

impl RootContents {
    fn read(root: &CertificateDer<'_>) -> Result<Self, String> {
        let (_, root) = X509Certificate::from_der(root).map_err(|error| error.to_string())?;
        if !root.is_ca() {
            return Err("is not a CA's certificate".into());
        }
        let organisation = root.subject().iter_organization().next();
        let trust_domain = organisation
            .and_then(|name| name.as_str().ok())
            .map(str::to_owned)
            .ok_or("does not say its trust domain (its subject has no organisation)")?;
        Ok(Self {
            trust_domain,
            public_key: root.public_key().subject_public_key.data.to_vec(),
            begins: root.validity().not_before.to_datetime(),
            ends: root.validity().not_after.to_datetime(),
        })
    }
}

fn told(time: OffsetDateTime) -> String {
    time.format(&Rfc3339).unwrap_or_else(|_| time.to_string())
}

#[cfg(test)]
mod tests;

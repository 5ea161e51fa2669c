//! The current certificate of each pod's identity, renewed at half of its life.
//!
//! Only identities that a pod of this node holds have one. Keys are in memory alone, and overwritten
//! when they go.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use futures_util::future::BoxFuture;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::sync::Notify;
use x509_parser::prelude::{FromDer, X509Certificate};
use zeroize::Zeroizing;

use super::{Identity, IdentityError, tls};

/// How many sets of expected peers a certificate remembers the settings for.
const CLIENTS: usize = 256;
/// The first pause after a failure; doubled up to [`LAST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// The longest pause.
const LAST_PAUSE: Duration = Duration::from_secs(150);

/// Where certificates come from.
pub trait Issuer: Send + Sync + 'static {
    /// A new certificate, with a new key.
    fn issue<'a>(&'a self, identity: &'a Identity) -> BoxFuture<'a, Result<Issued, IdentityError>>;
}

/// What was issued.
pub struct Issued {
    /// The leaf first.
    pub chain: Vec<CertificateDer<'static>>,
    /// The leaf's key, PKCS #8.
    pub key: Zeroizing<Vec<u8>>,
    /// Who is trusted.
    pub roots: Vec<CertificateDer<'static>>,
}

/// A certificate of a workload, ready to be used.
pub struct WorkloadCertificate {
    identity: Identity,
    /// Settings of its tunnel server.
    pub server: Arc<ServerConfig>,
    clients: Mutex<HashMap<Vec<Identity>, Arc<ClientConfig>>>,
    chain: Vec<CertificateDer<'static>>,
    key: Zeroizing<Vec<u8>>,
    roots: Vec<CertificateDer<'static>>,
    store: Arc<RootCertStore>,
    not_after: SystemTime,
}

impl fmt::Debug for WorkloadCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkloadCertificate")
            .field("identity", &self.identity)
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

impl WorkloadCertificate {
    fn new(identity: &Identity, issued: Issued) -> Result<Self, IdentityError> {
        let found = tls::peer_identity(&issued.chain)?;
        if found != *identity {
            let why = format!("did not find expected SAN: {identity}");
            return Err(IdentityError::Unusable(why.into()));
        }
        let mut store = RootCertStore::empty();
        for root in &issued.roots {
            store
                .add(root.clone())
                .map_err(|error| IdentityError::Unusable(error.to_string().into()))?;
        }
        let store = Arc::new(store);
        let not_after = not_after(&issued.chain)?;
        let key = copy_of(&issued.key);
        let server = tls::server(identity, issued.chain.clone(), key, Arc::clone(&store))?;
        Ok(Self {
            identity: identity.clone(),
            server: Arc::new(server),
            clients: Mutex::default(),
            chain: issued.chain,
            key: issued.key,
            roots: issued.roots,
            store,
            not_after,
        })
    }

    /// Settings for connecting to any of `expected`; made once for each such set.
    ///
    /// # Errors
    /// The certificate cannot be used.
    pub fn client(&self, expected: &[Identity]) -> Result<Arc<ClientConfig>, IdentityError> {
        let mut clients = lock(&self.clients);
        if let Some(client) = clients.get(expected) {
            return Ok(Arc::clone(client));
        }
        let key = copy_of(&self.key);
        let client = tls::client(expected, self.chain.clone(), key, Arc::clone(&self.store))?;
        let client = Arc::new(client);
        if clients.len() >= CLIENTS {
            clients.clear();
        }
        clients.insert(expected.to_vec(), Arc::clone(&client));
        Ok(client)
    }

    /// Whose it is.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }
    /// The leaf first.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.chain
    }
    /// Who is trusted.
    pub fn roots(&self) -> &[CertificateDer<'static>] {
        &self.roots
    }
    /// When it expires.
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    fn is_valid(&self) -> bool {
        SystemTime::now() < self.not_after
    }
    /// Half of the life that is left.
    fn renew_at(&self) -> SystemTime {
        let now = SystemTime::now();
        now + self.not_after.duration_since(now).unwrap_or_default() / 2
    }
}

fn copy_of(key: &[u8]) -> PrivateKeyDer<'static> {
    // rustls overwrites its own copy.
    PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.to_vec()))
}

fn not_after(chain: &[CertificateDer<'_>]) -> Result<SystemTime, IdentityError> {
    let leaf = chain.first().map_or(&[][..], |leaf| leaf.as_ref());
    let (_, leaf) = X509Certificate::from_der(leaf)
        .map_err(|error| IdentityError::Unusable(error.to_string().into()))?;
    let seconds = leaf.validity().not_after.timestamp();
    Ok(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds.try_into().unwrap_or_default()))
}

/// Certificates of this node. Clones are the same ones.
#[derive(Clone)]
pub struct Certs {
    issuer: Arc<dyn Issuer>,
    held: Arc<Mutex<HashMap<Identity, Held>>>,
    /// Something was held or forgotten.
    changed: Arc<Notify>,
}

struct Held {
    pods: usize,
    slot: Arc<Slot>,
}

/// One identity's certificate; who renews it has the slot's turn.
#[derive(Default)]
struct Slot {
    now: Mutex<State>,
    turn: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct State {
    certificate: Option<Arc<WorkloadCertificate>>,
    failed: Option<IdentityError>,
    pause: Duration,
    again: Option<SystemTime>,
}

/// What is told of an identity.
#[derive(Clone, Debug)]
pub struct Listed {
    /// Whose.
    pub identity: Identity,
    /// The certificate, if there is one.
    pub certificate: Option<Arc<WorkloadCertificate>>,
    /// Why there is none, or no new one.
    pub failed: Option<IdentityError>,
}

impl fmt::Debug for Certs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Certs").finish_non_exhaustive()
    }
}

impl Certs {
    /// From an issuer.
    pub fn new(issuer: Arc<dyn Issuer>) -> Self {
        Self {
            issuer,
            held: Arc::default(),
            changed: Arc::default(),
        }
    }

    /// One more pod of this node has the identity.
    pub fn hold(&self, identity: &Identity) {
        let mut held = lock(&self.held);
        let entry = held.entry(identity.clone());
        entry
            .or_insert_with(|| Held {
                pods: 0,
                slot: Arc::default(),
            })
            .pods += 1;
        self.changed.notify_one();
    }

    /// One pod less has it. When none does the certificate goes.
    pub fn forget(&self, identity: &Identity) {
        let mut held = lock(&self.held);
        if let Some(entry) = held.get_mut(identity) {
            entry.pods = entry.pods.saturating_sub(1);
            if entry.pods == 0 {
                held.remove(identity);
            }
        }
    }

    /// The certificate of an identity; waits for the first one.
    ///
    /// # Errors
    /// No pod of this node has the identity; there is none, and why.
    pub async fn current(
        &self,
        identity: &Identity,
    ) -> Result<Arc<WorkloadCertificate>, IdentityError> {
        let slot = self.slot(identity)?;
        if let Some(certificate) = slot.valid() {
            return Ok(certificate);
        }
        let _turn = slot.turn.lock().await;
        if let Some(certificate) = slot.valid() {
            return Ok(certificate); // somebody else's turn has brought it
        }
        {
            let state = lock(&slot.now);
            if let (Some(error), Some(again)) = (&state.failed, state.again)
                && SystemTime::now() < again
            {
                return Err(error.clone());
            }
        }
        self.renew(identity, &slot).await;
        slot.valid().ok_or_else(|| {
            let failed = lock(&slot.now).failed.clone();
            failed.unwrap_or_else(|| IdentityError::Expired(identity.clone()))
        })
    }

    /// Renews certificates when it is time, and makes those of pods that have come. Runs until it is
    /// dropped.
    pub async fn rotate(self) {
        loop {
            let due = self.due();
            for identity in &due {
                if let Ok(slot) = self.slot(identity) {
                    let _turn = slot.turn.lock().await;
                    self.renew(identity, &slot).await;
                }
            }
            let pause = self.until_next();
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.changed.notified() => {}
            }
        }
    }

    /// All identities of this node, in order.
    pub fn list(&self) -> Vec<Listed> {
        let held = lock(&self.held);
        let mut all: Vec<Listed> = held
            .iter()
            .map(|(identity, held)| {
                let state = lock(&held.slot.now);
                Listed {
                    identity: identity.clone(),
                    certificate: state.certificate.clone(),
                    failed: state.failed.clone(),
                }
            })
            .collect();
        all.sort_by(|one, other| one.identity.cmp(&other.identity));
        all
    }

    fn slot(&self, identity: &Identity) -> Result<Arc<Slot>, IdentityError> {
        let held = lock(&self.held);
        let entry = held.get(identity);
        entry
            .map(|entry| Arc::clone(&entry.slot))
            .ok_or_else(|| IdentityError::Unknown(identity.clone()))
    }

    async fn renew(&self, identity: &Identity, slot: &Slot) {
        let issued = self.issuer.issue(identity).await;
        let made = issued.and_then(|issued| WorkloadCertificate::new(identity, issued));
        let mut state = lock(&slot.now);
        match made {
            Ok(certificate) => {
                tracing::debug!(%identity, "certificate issued");
                *state = State {
                    again: Some(certificate.renew_at().max(SystemTime::now() + FIRST_PAUSE)),
                    certificate: Some(Arc::new(certificate)),
                    ..State::default()
                };
            }
            Err(error) => {
                tracing::warn!(%identity, %error, "no certificate; trying again");
                state.pause = (state.pause * 2).clamp(FIRST_PAUSE, LAST_PAUSE);
                state.again = Some(SystemTime::now() + state.pause);
                state.failed = Some(error);
            }
        }
    }

    fn due(&self) -> Vec<Identity> {
        let now = SystemTime::now();
        let held = lock(&self.held);
        let is_due = |held: &Held| lock(&held.slot.now).again.is_none_or(|again| again <= now);
        held.iter()
            .filter(|(_, held)| is_due(held))
            .map(|(identity, _)| identity.clone())
            .collect()
    }

    fn until_next(&self) -> Duration {
        let now = SystemTime::now();
        let held = lock(&self.held);
        let next = held
            .values()
            .filter_map(|held| lock(&held.slot.now).again)
            .min();
        let hour = Duration::from_secs(3600);
        // The clock may be set meanwhile: look now and then.
        next.map_or(hour, |next| next.duration_since(now).unwrap_or_default())
            .min(hour)
    }
}

impl Slot {
    fn valid(&self) -> Option<Arc<WorkloadCertificate>> {
        let state = lock(&self.now);
        state
            .certificate
            .as_ref()
            .filter(|certificate| certificate.is_valid())
            .cloned()
    }
}

fn lock<T>(of: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

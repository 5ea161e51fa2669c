//! The current certificate of each pod's identity, renewed at half of its life.
//!
//! Only identities that a pod of this node holds have one. [`Certs::rotate`] alone issues, one
//! certificate of an identity at a time, and whoever needs one waits for it: who waits no longer
//! stops nothing. Keys are in memory alone, and overwritten when they go.
//!
//! The clock may be wrong, and set in either direction. What it says is asked of certificates alone: one
//! that is not valid by it, also since its time has not begun, is issued anew. Pauses go by the time
//! since the machine has started.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use rand::Rng;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, timeout};
use x509_parser::prelude::{FromDer, X509Certificate};
use zeroize::Zeroizing;

use super::{IdentityError, tls};
use crate::mesh::Identity;

/// How many sets of expected peers a certificate remembers the settings for.
const CLIENTS: usize = 256;
/// The first pause after a failure; doubled up to [`LAST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// The longest pause.
const LAST_PAUSE: Duration = Duration::from_secs(150);
/// How many certificates are issued at once.
const ISSUING: usize = 8;
/// An issuer that takes longer has failed.
const ISSUE: Duration = Duration::from_secs(30);
/// How often the clock is looked at for the end of a peer's certificate.
const LOOK: Duration = Duration::from_secs(600);
/// How long a connection waits for the first certificate.
const WAIT: Duration = Duration::from_secs(10);

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
    not_before: SystemTime,
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
        let (not_before, not_after) = validity(&issued.chain)?;
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
            not_before,
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

    /// Whether others take it.
    pub fn is_valid(&self, now: SystemTime) -> bool {
        self.not_before <= now && now < self.not_after
    }
    /// In half of the life that is left, more or less: not all pods of a node at one moment.
    fn renew_in(&self, now: SystemTime) -> Duration {
        let left = self.not_after.duration_since(now).unwrap_or_default();
        jitter(left / 2).max(FIRST_PAUSE)
    }
}

fn copy_of(key: &[u8]) -> PrivateKeyDer<'static> {
    // rustls overwrites its own copy.
    PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.to_vec()))
}

/// When the leaf's life begins, and when it ends.
fn validity(chain: &[CertificateDer<'_>]) -> Result<(SystemTime, SystemTime), IdentityError> {
    let leaf = chain.first().map_or(&[][..], |leaf| leaf.as_ref());
    let (_, leaf) = X509Certificate::from_der(leaf)
        .map_err(|error| IdentityError::Unusable(error.to_string().into()))?;
    let time = |seconds: i64| {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds.try_into().unwrap_or_default())
    };
    let of = leaf.validity();
    Ok((
        time(of.not_before.timestamp()),
        time(of.not_after.timestamp()),
    ))
}

/// When the leaf of a chain ends.
///
/// # Errors
/// It cannot be read.
pub fn end_of(chain: &[CertificateDer<'_>]) -> Result<SystemTime, IdentityError> {
    validity(chain).map(|(_, end)| end)
}

/// Waits until a certificate has ended. The clock may be set meanwhile: it is looked at now and then.
pub async fn ended(at: SystemTime) {
    while let Ok(left) = at.duration_since(SystemTime::now())
        && !left.is_zero()
    {
        tokio::time::sleep(left.min(LOOK)).await;
    }
}

/// A time, and up to a fifth more or less.
fn jitter(time: Duration) -> Duration {
    time.mul_f64(rand::rng().random_range(0.8..1.2))
}

/// Certificates of this node. Clones are the same ones.
#[derive(Clone)]
pub struct Certs {
    issuer: Arc<dyn Issuer>,
    held: Arc<Mutex<HashMap<Identity, Entry>>>,
    /// Something was held, or somebody waits.
    changed: Arc<Notify>,
    /// How long one waits for a certificate.
    wait: Duration,
    /// What the time of day is.
    clock: fn() -> SystemTime,
}

struct Entry {
    pods: usize,
    slot: Arc<Slot>,
}

/// What is known of one identity's certificate; who waits for it is told of each change.
type Slot = watch::Sender<State>;

#[derive(Default)]
struct State {
    certificate: Option<Arc<WorkloadCertificate>>,
    failed: Option<IdentityError>,
    /// Whether one is being issued.
    issuing: bool,
    pause: Duration,
    /// When it is due, if it is not so at once.
    again: Option<Instant>,
}

impl State {
    fn valid(&self, now: SystemTime) -> Option<&Arc<WorkloadCertificate>> {
        self.certificate
            .as_ref()
            .filter(|certificate| certificate.is_valid(now))
    }

    fn is_due(&self, now: SystemTime) -> bool {
        let wanting = self.failed.is_none() && self.valid(now).is_none();
        !self.issuing && (wanting || self.again.is_none_or(|again| again <= Instant::now()))
    }

    fn issued(
        &mut self,
        made: Result<WorkloadCertificate, IdentityError>,
        identity: &Identity,
        now: SystemTime,
    ) {
        self.issuing = false;
        match made {
            Ok(certificate) => {
                tracing::debug!(%identity, "certificate issued");
                *self = Self {
                    again: Some(Instant::now() + certificate.renew_in(now)),
                    certificate: Some(Arc::new(certificate)),
                    ..Self::default()
                };
            }
            Err(error) => {
                if self.valid(now).is_some() {
                    tracing::warn!(%identity, %error, "certificate not renewed, the old one holds until it ends; trying again");
                } else {
                    tracing::warn!(%identity, %error, "no certificate; trying again");
                }
                self.pause = (self.pause * 2).clamp(FIRST_PAUSE, LAST_PAUSE);
                self.again = Some(Instant::now() + jitter(self.pause));
                self.failed = Some(error);
            }
        }
    }
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
    /// From an issuer, which is asked once [`Certs::rotate`] runs.
    pub fn new(issuer: Arc<dyn Issuer>) -> Self {
        Self {
            issuer,
            held: Arc::default(),
            changed: Arc::default(),
            wait: WAIT,
            clock: SystemTime::now,
        }
    }

    /// One more pod of this node has the identity.
    pub fn retain(&self, identity: &Identity) {
        let mut held = lock(&self.held);
        let entry = held.entry(identity.clone());
        entry
            .or_insert_with(|| Entry {
                pods: 0,
                slot: Arc::new(watch::Sender::default()),
            })
            .pods += 1;
        self.changed.notify_one();
    }

    /// One pod less has it. When none does the certificate goes.
    pub fn release(&self, identity: &Identity) {
        let mut held = lock(&self.held);
        let Some(entry) = held.get_mut(identity) else {
            return;
        };
        entry.pods = entry.pods.saturating_sub(1);
        if entry.pods == 0
            && let Some(entry) = held.remove(identity)
        {
            // Who waits for it is told.
            entry.slot.send_replace(State {
                failed: Some(IdentityError::Unknown(identity.clone())),
                ..State::default()
            });
        }
    }

    /// An identity's settings as a client of any of `expected`, and when its certificate ends.
    ///
    /// # Errors
    /// As of [`Certs::current`]; the certificate cannot be used.
    pub async fn client(
        &self,
        identity: &Identity,
        expected: &[Identity],
    ) -> Result<(Arc<ClientConfig>, SystemTime), IdentityError> {
        let own = self.current(identity).await?;
        Ok((own.client(expected)?, own.not_after()))
    }

    /// The certificate of an identity; waits for the first one, for some time.
    ///
    /// # Errors
    /// No pod of this node has the identity; there is none, and why.
    pub async fn current(
        &self,
        identity: &Identity,
    ) -> Result<Arc<WorkloadCertificate>, IdentityError> {
        let slot = {
            let held = lock(&self.held);
            let entry = held.get(identity);
            let entry = entry.ok_or_else(|| IdentityError::Unknown(identity.clone()))?;
            Arc::clone(&entry.slot)
        };
        if let Some(certificate) = slot.borrow().valid((self.clock)()) {
            return Ok(Arc::clone(certificate));
        }
        self.changed.notify_one();
        let mut told = slot.subscribe();
        let known =
            told.wait_for(|state| state.valid((self.clock)()).is_some() || state.failed.is_some());
        match timeout(self.wait, known).await {
            Ok(Ok(state)) => match (state.valid((self.clock)()), &state.failed) {
                (Some(certificate), _) => Ok(Arc::clone(certificate)),
                (None, Some(error)) => Err(error.clone()),
                (None, None) => Err(IdentityError::NotValid(identity.clone())),
            },
            Ok(Err(_)) => Err(IdentityError::Unknown(identity.clone())),
            Err(_) => Err(IdentityError::Slow(identity.clone())),
        }
    }

    /// Renews certificates when it is time, and makes those of pods that have come. Runs until it is
    /// dropped; without it there are none.
    pub async fn rotate(self) {
        let mut issuing = FuturesUnordered::new();
        loop {
            while issuing.len() < ISSUING
                && let Some((identity, slot)) = self.next_due()
            {
                issuing.push(self.issue(identity, slot));
            }
            let full = issuing.len() == ISSUING;
            tokio::select! {
                Some(()) = issuing.next() => {}
                () = tokio::time::sleep(self.until_next()), if !full => {}
                () = self.changed.notified(), if !full => {}
            }
        }
    }

    async fn issue(&self, identity: Identity, slot: Arc<Slot>) {
        let issued = timeout(ISSUE, self.issuer.issue(&identity)).await;
        let issued = issued.unwrap_or_else(|_| {
            let why = format!("no answer in {ISSUE:?}");
            Err(IdentityError::Signing(why.into()))
        });
        let made = issued
            .and_then(|issued| WorkloadCertificate::new(&identity, issued))
            .and_then(|made| match made.is_valid((self.clock)()) {
                true => Ok(made),
                false => Err(IdentityError::NotValid(identity.clone())),
            });
        // Under the lock, by which an identity that was forgotten meanwhile stays so.
        let held = lock(&self.held);
        if held
            .get(&identity)
            .is_some_and(|held| Arc::ptr_eq(&held.slot, &slot))
        {
            slot.send_modify(|state| state.issued(made, &identity, (self.clock)()));
        }
    }

    /// All identities of this node, in order.
    pub fn list(&self) -> Vec<Listed> {
        let held = lock(&self.held);
        let mut all: Vec<Listed> = held
            .iter()
            .map(|(identity, held)| {
                let state = held.slot.borrow();
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

    /// What is to be issued next; from now on it is being issued. Those that have none are first.
    fn next_due(&self) -> Option<(Identity, Arc<Slot>)> {
        let now = (self.clock)();
        let held = lock(&self.held);
        let due = held
            .iter()
            .filter(|(_, held)| held.slot.borrow().is_due(now));
        let (identity, held) = due.min_by_key(|(_, held)| {
            let state = held.slot.borrow();
            (state.valid(now).is_some(), state.again)
        })?;
        held.slot.send_if_modified(|state| {
            state.issuing = true;
            false // Nobody waits for that.
        });
        Some((identity.clone(), Arc::clone(&held.slot)))
    }

    fn until_next(&self) -> Duration {
        let held = lock(&self.held);
        let next = held
            .values()
            .map(|held| held.slot.borrow())
            .filter(|state| !state.issuing)
            .filter_map(|state| state.again)
            .min();
        let hour = Duration::from_secs(3600);
        // The clock may be set meanwhile: look now and then.
        next.map_or(hour, |next| next.saturating_duration_since(Instant::now()))
            .min(hour)
    }
}

fn lock<T>(of: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;

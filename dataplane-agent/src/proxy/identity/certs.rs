//! The current certificate of each pod's identity, renewed at half of its life.
//!
//! Only identities that a pod of this node has get a certificate. [`Certs::rotate`] alone issues them, one at a time
//! for each identity. Whoever needs one waits for it, and stops nothing by giving up. Keys are only in memory, and
//! overwritten when they go.
//!
//! The clock may be wrong, and may be set in either direction. It is used only for the validity of certificates: one
//! that is not valid by it, also one whose time has not begun, is issued anew. Pauses are measured by the monotonic
//! clock.

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

/// Number of sets of expected peers for which a certificate remembers the settings.
const CLIENTS: usize = 256;
/// First pause after a failure; doubled up to [`LAST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// Longest pause after a failure.
const LAST_PAUSE: Duration = Duration::from_secs(150);
/// Number of certificates that are issued at once.
const ISSUING: usize = 8;
/// Time after which an issuer has failed.
const ISSUE: Duration = Duration::from_secs(30);
/// Interval at which the clock is read while waiting for the end of a certificate.
const LOOK: Duration = Duration::from_secs(600);
/// Time for which a connection waits for the first certificate.
const WAIT: Duration = Duration::from_secs(10);

/// A source of certificates.
pub trait Issuer: Send + Sync + 'static {
    /// Issues a new certificate, with a new key.
    fn issue<'a>(&'a self, identity: &'a Identity) -> BoxFuture<'a, Result<Issued, IdentityError>>;
}

/// A certificate as it was issued.
pub struct Issued {
    /// The certificate chain, the leaf first.
    pub chain: Vec<CertificateDer<'static>>,
    /// The leaf's key, PKCS #8.
    pub key: Zeroizing<Vec<u8>>,
    /// The trusted root certificates.
    pub roots: Vec<CertificateDer<'static>>,
}

/// A certificate of a workload, ready to be used.
pub struct WorkloadCertificate {
    identity: Identity,
    /// TLS settings of the workload's tunnel server.
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

    /// Returns the TLS settings for connecting to any of `expected`. They are made once for each such set.
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

    /// The identity that it is for.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }
    /// The certificate chain, the leaf first.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.chain
    }
    /// The trusted root certificates.
    pub fn roots(&self) -> &[CertificateDer<'static>] {
        &self.roots
    }
    /// The time at which it expires.
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// Returns true if `now` is in its validity period.
    pub fn is_valid(&self, now: SystemTime) -> bool {
        self.not_before <= now && now < self.not_after
    }
    /// Returns the time until renewal: about half of the life that is left, so that the pods of a node do not all
    /// renew at one moment.
    fn renew_in(&self, now: SystemTime) -> Duration {
        let left = self.not_after.duration_since(now).unwrap_or_default();
        jitter(left / 2).max(FIRST_PAUSE)
    }
}

fn copy_of(key: &[u8]) -> PrivateKeyDer<'static> {
    // rustls overwrites its own copy.
    PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.to_vec()))
}

/// Returns when the leaf becomes valid, and when it expires.
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

/// Returns when the leaf of a chain expires.
///
/// # Errors
/// The leaf cannot be parsed.
pub fn end_of(chain: &[CertificateDer<'_>]) -> Result<SystemTime, IdentityError> {
    validity(chain).map(|(_, end)| end)
}

/// Waits until a certificate has expired. The clock may be set meanwhile, so it is read now and then.
pub async fn ended(at: SystemTime) {
    while let Ok(left) = at.duration_since(SystemTime::now())
        && !left.is_zero()
    {
        tokio::time::sleep(left.min(LOOK)).await;
    }
}

/// Returns a time that is up to a fifth longer or shorter.
fn jitter(time: Duration) -> Duration {
    time.mul_f64(rand::rng().random_range(0.8..1.2))
}

/// The certificates of this node. Clones share them.
#[derive(Clone)]
pub struct Certs {
    issuer: Arc<dyn Issuer>,
    held: Arc<Mutex<HashMap<Identity, Entry>>>,
    /// Notified when an identity is retained, and when somebody waits for a certificate.
    changed: Arc<Notify>,
    /// Time for which a connection waits for a certificate.
    wait: Duration,
    /// Returns the time of day.
    clock: fn() -> SystemTime,
}

struct Entry {
    pods: usize,
    slot: Arc<Slot>,
}

/// The state of one identity's certificate; tasks that wait for it are notified of changes.
type Slot = watch::Sender<State>;

#[derive(Default)]
struct State {
    certificate: Option<Arc<WorkloadCertificate>>,
    failed: Option<IdentityError>,
    /// True while one is being issued.
    issuing: bool,
    pause: Duration,
    /// The time at which the next one is due; `None` means at once.
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
                match self.failed {
                    Some(_) => {
                        tracing::info!(%identity, "certificate issued, after that had failed");
                    }
                    None => tracing::debug!(%identity, "certificate issued"),
                }
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

/// An identity and the state of its certificate.
#[derive(Clone, Debug)]
pub struct Listed {
    /// The identity.
    pub identity: Identity,
    /// The certificate, if there is one.
    pub certificate: Option<Arc<WorkloadCertificate>>,
    /// Why there is no certificate, or no new one.
    pub failed: Option<IdentityError>,
}

impl fmt::Debug for Certs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Certs").finish_non_exhaustive()
    }
}

impl Certs {
    /// Creates an empty set. The issuer is asked once [`Certs::rotate`] runs.
    pub fn new(issuer: Arc<dyn Issuer>) -> Self {
        Self {
            issuer,
            held: Arc::default(),
            changed: Arc::default(),
            wait: WAIT,
            clock: SystemTime::now,
        }
    }

    /// Counts one more pod of this node that has the identity.
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

    /// Counts one pod less that has the identity. When none has it the certificate is dropped.
    pub fn release(&self, identity: &Identity) {
        let mut held = lock(&self.held);
        let Some(entry) = held.get_mut(identity) else {
            return;
        };
        entry.pods = entry.pods.saturating_sub(1);
        if entry.pods == 0
            && let Some(entry) = held.remove(identity)
        {
            // Waiting tasks get this error.
            entry.slot.send_replace(State {
                failed: Some(IdentityError::Unknown(identity.clone())),
                ..State::default()
            });
        }
    }

    /// Returns an identity's TLS settings as a client of any of `expected`, and when its certificate expires.
    ///
    /// # Errors
    /// It fails as [`Certs::current`] does, or the certificate cannot be used.
    pub async fn client(
        &self,
        identity: &Identity,
        expected: &[Identity],
    ) -> Result<(Arc<ClientConfig>, SystemTime), IdentityError> {
        let own = self.current(identity).await?;
        Ok((own.client(expected)?, own.not_after()))
    }

    /// Returns the certificate of an identity. Waits up to 10 s for the first one.
    ///
    /// # Errors
    /// No pod of this node has the identity, or there is no valid certificate; the error says why.
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

    /// Renews certificates when it is time, and issues those of new pods. Runs until it is dropped; without it there
    /// are none.
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
        // The lock is held so that an identity that was released meanwhile stays released.
        let held = lock(&self.held);
        if held
            .get(&identity)
            .is_some_and(|held| Arc::ptr_eq(&held.slot, &slot))
        {
            slot.send_modify(|state| state.issued(made, &identity, (self.clock)()));
        }
    }

    /// Returns all identities of this node, in order.
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

    /// Picks the certificate that is to be issued next, and marks it as being issued. Identities that have none are
    /// first.
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
        // The clock may be set meanwhile, so look now and then.
        next.map_or(hour, |next| next.saturating_duration_since(Instant::now()))
            .min(hour)
    }
}

fn lock<T>(of: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;

//! The access-log record of a connection: each connection leaves exactly one line and one count, however it
//! ends. Until it is known where a connection goes it is an [`Arrival`], then an [`AccessRecord`].

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use super::labels::Labels;
use super::log_limit::LogLimiter;
use super::metrics::Metrics;
use super::series::Series;
use super::{Failure, Flag};
use crate::mesh::{Identity, Service, Workload};
use crate::proxy::limits::source;

#[cfg(test)]
pub(crate) mod tests;

/// Refusals of one reason and source that are logged each second; more than one, as their texts may differ.
const REFUSALS: u32 = 10;
/// Refusals of one reason and pod that are logged each second: a sender may have any number of addresses.
const REFUSALS_OF_POD: u32 = 100;

/// The end of a connection that reports it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reporter {
    /// The client's node.
    Source,
    /// The server's node.
    Destination,
}

impl Reporter {
    /// Returns its name in metrics.
    pub fn word(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
        }
    }
    /// Returns its `direction` in the log.
    pub fn direction(self) -> &'static str {
        match self {
            Self::Source => "outbound",
            Self::Destination => "inbound",
        }
    }
}

/// The facts about a connection that are known once its destination is.
#[derive(Clone, Debug)]
pub struct ConnectionInfo {
    /// Our end of the connection.
    pub reporter: Reporter,
    /// The client's address.
    pub src_addr: SocketAddr,
    /// The client's workload.
    pub source: Option<Arc<Workload>>,
    /// The identity in the client's certificate, which is our pod's if it is the client.
    pub source_identity: Option<Identity>,
    /// The next hop; for an inbound connection the address that was connected to.
    pub dst_addr: SocketAddr,
    /// The destination that was requested of a tunnel.
    pub hbone_addr: Option<SocketAddr>,
    /// The requested service.
    pub service: Option<Arc<Service>>,
    /// The server's workload.
    pub target: Option<Arc<Workload>>,
    /// `true` if it is carried over mutual TLS.
    pub mutual_tls: bool,
}

/// Logs and counts connections. Clones share their state.
#[derive(Clone, Debug)]
pub struct Observer {
    metrics: Arc<Metrics>,
    /// Limits the log of refusals by reason and pod, and within these by source: anybody can repeat them.
    refusals: Arc<LogLimiter<(Reporter, &'static str, IpAddr), IpAddr>>,
}

/// Byte counts of a connection, in the client's view. They are added to its series at the same time.
#[derive(Debug)]
pub struct Bytes {
    up: AtomicU64,
    down: AtomicU64,
    /// The time at which both directions had ended.
    ended: OnceLock<Instant>,
    series: Arc<Series>,
}

impl Bytes {
    /// Says that these are all: both directions have ended, and the kernel has what it still has to deliver.
    pub fn all(&self) {
        // Only the first call counts.
        let _ = self.ended.set(Instant::now());
    }
    /// Counts bytes from the client to the server.
    pub fn add_up(&self, bytes: u64) {
        self.up.fetch_add(bytes, Ordering::Relaxed);
        self.series.add_up(bytes);
    }
    /// Counts bytes from the server to the client.
    pub fn add_down(&self, bytes: u64) {
        self.down.fetch_add(bytes, Ordering::Relaxed);
        self.series.add_down(bytes);
    }
}

/// A connection whose client or destination is not known yet. If it is dropped unfinished, it is logged as cut.
#[derive(Debug)]
pub struct Arrival {
    observer: Observer,
    /// The client's address.
    pub src: SocketAddr,
    /// The address that was connected to, or that a tunnel's request names.
    pub dst: SocketAddr,
    /// Our end of the connection.
    pub reporter: Reporter,
    /// Our pod's address by the connection, not by a request in it, which may name any.
    pod: IpAddr,
    told: bool,
}

/// The record of a connection. If it is dropped open, the connection is logged as cut.
#[derive(Debug)]
pub struct AccessRecord {
    info: ConnectionInfo,
    metrics: Arc<Metrics>,
    bytes: Arc<Bytes>,
    opened: Instant,
    closed: bool,
}

/// The failure of a connection that was dropped before its end.
struct Drained;

impl fmt::Display for Drained {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("connection closed due to connection drain")
    }
}

impl Failure for Drained {
    fn flag(&self) -> Flag {
        Flag::Connect
    }
    fn reason(&self) -> &'static str {
        "drain"
    }
}

impl Observer {
    /// Returns an observer that counts in `metrics`.
    pub fn new(metrics: Arc<Metrics>) -> Self {
        Self {
            metrics,
            refusals: Arc::new(LogLimiter::new(REFUSALS, REFUSALS_OF_POD)),
        }
    }

    /// Starts to observe a connection from `src` to `dst`.
    pub fn arrived(&self, src: SocketAddr, dst: SocketAddr, reporter: Reporter) -> Arrival {
        Arrival {
            observer: self.clone(),
            src,
            dst,
            reporter,
            pod: match reporter {
                Reporter::Source => src.ip(),
                Reporter::Destination => dst.ip(),
            },
            told: false,
        }
    }

    fn open(&self, info: ConnectionInfo) -> AccessRecord {
        let series = self.metrics.series(Labels::of(&info));
        series.open();
        let record = AccessRecord {
            info,
            metrics: Arc::clone(&self.metrics),
            bytes: Arc::new(Bytes {
                up: AtomicU64::default(),
                down: AtomicU64::default(),
                ended: OnceLock::new(),
                series,
            }),
            opened: Instant::now(),
            closed: false,
        };
        record.log_opened();
        record
    }

    /// Counts a refusal, and logs it within the limits, with the number of those that were not logged before it.
    fn refused(&self, arrival: &Arrival, failure: &dyn Failure) {
        let Arrival {
            src, dst, reporter, ..
        } = arrival;
        self.metrics.failed(*reporter, failure);
        let group = (*reporter, failure.reason(), arrival.pod);
        let Some(times) = self.refusals.admit(group, source(src.ip())) else {
            return;
        };
        tracing::event!(
            target: "access",
            tracing::Level::WARN,
            src.addr = %src,
            dst.addr = %dst,
            direction = reporter.direction(),
            error = failure.to_string().as_str(),
            reason = failure.reason(),
            times = (times > 1).then_some(times),
            "connection failed"
        );
    }
}

impl Arrival {
    /// Ends it as refused.
    pub fn refuse(mut self, failure: &dyn Failure) {
        self.told = true;
        self.observer.refused(&self, failure);
    }

    /// Opens its record, now that its destination is known.
    pub fn open(mut self, info: ConnectionInfo) -> AccessRecord {
        self.told = true;
        self.observer.open(info)
    }

    /// Ends it without a line or count: it is a tunnel, whose requests are observed as connections.
    pub fn is_tunnel(mut self) {
        self.told = true;
    }
}

impl Drop for Arrival {
    fn drop(&mut self) {
        if !self.told {
            self.observer.refused(self, &Drained);
        }
    }
}

/// The end of a connection.
#[derive(Clone, Copy)]
enum End<'a> {
    Clean,
    /// Its client left before it was connected.
    GivenUp,
    Failed(&'a dyn Failure),
}

impl<'a> End<'a> {
    fn failure(self) -> Option<&'a dyn Failure> {
        match self {
            Self::Failed(failure) => Some(failure),
            Self::Clean | Self::GivenUp => None,
        }
    }

    fn reason(self) -> Option<&'static str> {
        match self {
            Self::Clean => None,
            Self::GivenUp => Some("client_gone"),
            Self::Failed(failure) => Some(failure.reason()),
        }
    }
}

impl AccessRecord {
    /// Returns its byte counts, to be added to.
    pub fn bytes(&self) -> Arc<Bytes> {
        Arc::clone(&self.bytes)
    }

    /// Closes it with the end of the connection.
    pub fn close(mut self, end: Result<(), &dyn Failure>) {
        self.end(end.map_or_else(End::Failed, |()| End::Clean));
    }

    /// Closes it for a client that left before it was connected: that is no failure, and says nothing about the
    /// server.
    pub fn give_up(mut self) {
        self.end(End::GivenUp);
    }

    fn end(&mut self, end: End<'_>) {
        if std::mem::replace(&mut self.closed, true) {
            return;
        }
        let (up, down) = (
            self.bytes.up.load(Ordering::Relaxed),
            self.bytes.down.load(Ordering::Relaxed),
        );
        let failure = end.failure();
        self.bytes.series.end(failure.map(Failure::flag));
        if let Some(failure) = failure {
            self.metrics.failed(self.info.reporter, failure);
        }
        self.log_complete(failure, end.reason(), up, down);
    }

    fn log_opened(&self) {
        if !tracing::enabled!(target: "access", tracing::Level::DEBUG) {
            return;
        }
        let line = LogFields::of(&self.info);
        tracing::event!(
            target: "access",
            tracing::Level::DEBUG,
            src.addr = %line.src_addr,
            src.workload = line.src_workload,
            src.namespace = line.src_namespace,
            src.identity = line.src_identity.as_deref(),
            dst.addr = %line.dst_addr,
            dst.hbone_addr = line.hbone_addr.map(tracing::field::display),
            dst.service = line.service,
            dst.workload = line.dst_workload,
            dst.namespace = line.dst_namespace,
            dst.identity = line.dst_identity.as_deref(),
            direction = line.direction,
            "connection opened"
        );
    }

    fn log_complete(
        &self,
        failure: Option<&dyn Failure>,
        reason: Option<&'static str>,
        up: u64,
        down: u64,
    ) {
        let error = failure.map(ToString::to_string);
        let line = LogFields::of(&self.info);
        // Bytes that this agent sent to, and received from, the far end of its leg.
        let (sent, received) = match self.info.reporter {
            Reporter::Source => (up, down),
            Reporter::Destination => (down, up),
        };
        // What the kernel takes to deliver the rest is not the connection's, unless it is cut meanwhile.
        let ended = self.bytes.ended.get().filter(|_| failure.is_none());
        let duration = ended.map_or_else(Instant::now, |ended| *ended) - self.opened;
        let duration = format!("{}ms", duration.as_millis());
        macro_rules! tell {
            ($level:expr) => {
                tracing::event!(
                    target: "access",
                    $level,
                    src.addr = %line.src_addr,
                    src.workload = line.src_workload,
                    src.namespace = line.src_namespace,
                    src.identity = line.src_identity.as_deref(),
                    dst.addr = %line.dst_addr,
                    dst.hbone_addr = line.hbone_addr.map(tracing::field::display),
                    dst.service = line.service,
                    dst.workload = line.dst_workload,
                    dst.namespace = line.dst_namespace,
                    dst.identity = line.dst_identity.as_deref(),
                    direction = line.direction,
                    bytes_sent = sent,
                    bytes_recv = received,
                    duration = duration.as_str(),
                    error = error.as_deref(),
                    reason,
                    "connection complete"
                )
            };
        }
        match failure {
            None => tell!(tracing::Level::INFO),
            Some(_) => tell!(tracing::Level::ERROR),
        }
    }
}

impl Drop for AccessRecord {
    fn drop(&mut self) {
        self.end(End::Failed(&Drained));
    }
}

/// The fields of an access-log line, in the order in which they are written.
struct LogFields<'a> {
    src_addr: SocketAddr,
    src_workload: Option<&'a str>,
    src_namespace: Option<&'a str>,
    src_identity: Option<String>,
    dst_addr: SocketAddr,
    hbone_addr: Option<SocketAddr>,
    service: Option<&'a str>,
    dst_workload: Option<&'a str>,
    dst_namespace: Option<&'a str>,
    dst_identity: Option<String>,
    direction: &'static str,
}

impl<'a> LogFields<'a> {
    fn of(info: &'a ConnectionInfo) -> Self {
        let name = |workload: &'a Arc<Workload>| {
            let name = if workload.name.is_empty() {
                &workload.canonical_name
            } else {
                &workload.name
            };
            &**name
        };
        let identity = |identity: Option<&Identity>| {
            identity
                .filter(|_| info.mutual_tls)
                .map(ToString::to_string)
        };
        let target = info.target.as_ref().map(|target| target.identity());
        Self {
            src_addr: info.src_addr,
            src_workload: info.source.as_ref().map(name),
            src_namespace: info.source.as_ref().map(|source| &*source.namespace),
            src_identity: identity(info.source_identity.as_ref()),
            dst_addr: info.dst_addr,
            hbone_addr: info.hbone_addr,
            service: info.service.as_ref().map(|service| &*service.hostname),
            dst_workload: info.target.as_ref().map(name),
            dst_namespace: info.target.as_ref().map(|target| &*target.namespace),
            dst_identity: identity(target.as_ref()),
            direction: info.reporter.direction(),
        }
    }
}

//! The admin socket: HTTP over a Unix socket of mode 0600.
//!
//! Of several processes one has it. One that is about to end keeps it until another one wants it: that one asks
//! whether its owner is ready.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Json, Response};
use axum::routing::{get, post};
use serde::Deserialize;
use tokio::net::UnixListener;
use tokio::time::sleep;

use super::ask::{AskError, ask};
use super::log::Level;
use super::metrics::Metrics;
use super::status::StatusReport;
use crate::sys::bound::BoundPath;

/// The content type of OpenMetrics. With another one Prometheus reads its own older format, which has no `info`.
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// What a process waits for that serves nothing new: its end. See [`Sources::ready`].
pub const END: &str = "end";
/// How often a process without the socket checks whether it can have it; tests do not wait so long.
const RETRY: Duration = Duration::from_millis(if cfg!(test) { 30 } else { 500 });
/// How long the owner of the socket may take to say whether it is ready.
const ASK_TIMEOUT: Duration = Duration::from_millis(500);

/// The values that the socket serves, and the settings that it changes.
#[derive(Clone)]
pub struct Sources {
    /// The state of the node.
    pub status: Arc<dyn Fn() -> StatusReport + Send + Sync>,
    /// The agent's configuration and state.
    pub config_dump: Arc<dyn Fn() -> serde_json::Value + Send + Sync>,
    /// Returns `Ok` if the daemon is ready, or else what it waits for.
    pub ready: Arc<dyn Fn() -> Result<(), String> + Send + Sync>,
    /// Turns the kernel programs' log on or off.
    pub kernel_log: Arc<dyn Fn(bool) -> Result<(), String> + Send + Sync>,
    /// Reads and sets the log's level.
    pub level: Level,
    /// The metrics.
    pub metrics: Arc<Metrics>,
}

impl Sources {
    /// Whether this process serves nothing new.
    fn leaves(&self) -> bool {
        (self.ready)().is_err_and(|pending| pending == END)
    }
}

/// The process that accepts connections at a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owner {
    Nobody,
    Leaving,
    Staying,
}

/// The admin socket, and where it is.
pub struct Socket {
    path: PathBuf,
    /// None while another process has it.
    open: Option<(UnixListener, BoundPath)>,
}

impl Socket {
    /// Opens it, in place of one that a predecessor left, or of one whose process is about to end. While another
    /// process accepts connections there, that one keeps it.
    ///
    /// # Errors
    /// It cannot be made.
    pub async fn open(path: &Path) -> io::Result<Self> {
        let open = match owner(path).await {
            Owner::Staying => None,
            Owner::Nobody | Owner::Leaving => bind(path)?,
        };
        if open.is_none() {
            tracing::info!(path = %path.display(), "another process has the admin socket, until it ends");
        }
        Ok(Self {
            path: path.to_owned(),
            open,
        })
    }
}

/// Opens the socket as soon as its path is free. `bound` is the path of the socket that is open now, if one is: it is
/// given up if another process has the path. `leaves`: whether this process is about to end; then it takes the path
/// from nobody.
async fn again(path: &Path, bound: Option<&BoundPath>, leaves: impl Fn() -> bool) -> Socket {
    let mut told = false;
    loop {
        match bound {
            Some(bound) => bound.removed().await,
            None => sleep(RETRY).await,
        }
        match owner(path).await {
            Owner::Nobody => {}
            Owner::Leaving if !leaves() => {}
            Owner::Leaving | Owner::Staying if bound.is_none() => continue,
            Owner::Leaving | Owner::Staying => {
                tracing::info!(path = %path.display(), "another process has taken the admin socket over");
                return Socket {
                    path: path.to_owned(),
                    open: None,
                };
            }
        }
        match bind(path) {
            Ok(Some(open)) => {
                match bound {
                    Some(_) => {
                        tracing::warn!(path = %path.display(), "the admin socket was gone, and is made again");
                    }
                    None => tracing::info!(path = %path.display(), "has the admin socket now"),
                }
                return Socket {
                    path: path.to_owned(),
                    open: Some(open),
                };
            }
            Err(error) if !told => {
                tracing::error!(path = %path.display(), %error, "the admin socket is gone, and cannot be made again");
                told = true;
            }
            Ok(None) | Err(_) => {}
        }
    }
}

/// Binds the path, in place of a dead socket. Returns none if another process has been quicker.
fn bind(path: &Path) -> io::Result<Option<(UnixListener, BoundPath)>> {
    match BoundPath::bind(path, || UnixListener::bind(path)) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => Ok(None),
        bound => bound.map(Some),
    }
}

/// Returns who has the path. One that does not answer in time stays.
async fn owner(path: &Path) -> Owner {
    match ask(path, "/healthz/ready", ASK_TIMEOUT).await {
        Err(AskError::Nobody(_)) => Owner::Nobody,
        Ok(answer) if answer.body == not_ready(END) => Owner::Leaving,
        Ok(_) | Err(AskError::Slow(_) | AskError::Broken(_)) => Owner::Staying,
    }
}

fn not_ready(pending: &str) -> String {
    format!("not ready, pending: {pending}\n")
}

/// Serves requests. Runs until it is dropped.
pub async fn serve(mut socket: Socket, sources: Sources) {
    let router = Router::new()
        .route("/status", get(status))
        .route("/config_dump", get(config_dump))
        .route("/metrics", get(metrics))
        .route("/stats/prometheus", get(metrics))
        .route("/healthz/ready", get(ready))
        .route("/logging", post(logging))
        .with_state(sources.clone());
    loop {
        let Socket { path, open } = socket;
        let (listener, bound) = open.unzip();
        let answers = async {
            if let Some(listener) = listener
                && let Err(error) = axum::serve(listener, router.clone()).await
            {
                tracing::error!(%error, "the admin socket is closed");
            }
            std::future::pending::<()>().await;
        };
        socket = tokio::select! {
            () = answers => return,
            again = again(&path, bound.as_ref(), || sources.leaves()) => again,
        };
    }
}

async fn status(State(sources): State<Sources>) -> Json<StatusReport> {
    Json((sources.status)())
}

async fn config_dump(State(sources): State<Sources>) -> Response {
    let text = serde_json::to_string_pretty(&(sources.config_dump)()).unwrap_or_default();
    ([("content-type", "application/json")], text).into_response()
}

async fn metrics(State(sources): State<Sources>) -> Response {
    open_metrics(sources.metrics.text(&(sources.status)()))
}

fn open_metrics(text: String) -> Response {
    ([("content-type", OPEN_METRICS)], text).into_response()
}

async fn ready(State(sources): State<Sources>) -> Response {
    match (sources.ready)() {
        Ok(()) => "ready\n".into_response(),
        Err(pending) => (StatusCode::INTERNAL_SERVER_ERROR, not_ready(&pending)).into_response(),
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Logging {
    level: Option<String>,
    kernel: Option<String>,
}

async fn logging(State(sources): State<Sources>, Query(asked): Query<Logging>) -> Response {
    let set = || {
        if let Some(level) = asked.level.as_deref().filter(|level| !level.is_empty()) {
            sources
                .level
                .set(level)
                .map_err(|error| format!("Invalid level provided: {error}"))?;
        }
        match asked.kernel.as_deref() {
            None => Ok(()),
            Some("on") => (sources.kernel_log)(true),
            Some("off") => (sources.kernel_log)(false),
            Some(other) => Err(format!("kernel is on or off, not `{other}`")),
        }
    };
    match set() {
        Ok(()) => format!("current log level is {}\n", sources.level.now()).into_response(),
        Err(error) => (StatusCode::BAD_REQUEST, format!("{error}\n")).into_response(),
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::timeout;

    use super::*;
    use crate::sys::bound;

    #[test]
    fn metrics_are_served_as_open_metrics() {
        let served = open_metrics("# EOF\n".into());
        assert_eq!(
            served.headers()["content-type"],
            "application/openmetrics-text; version=1.0.0; charset=utf-8"
        );
    }

    async fn waits(path: &Path, bound: Option<&BoundPath>, leaves: bool) -> bool {
        let long = bound::POLL * 10 + ASK_TIMEOUT;
        timeout(long, again(path, bound, || leaves)).await.is_err()
    }

    #[tokio::test]
    async fn a_socket_of_another_process_stays_until_that_ends() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("socket");
        let open = async || Socket::open(&path).await.expect("a folder");
        let first = open().await;
        assert!(first.open.is_some());
        let second = open().await;
        assert!(second.open.is_none());
        assert!(waits(&path, None, false).await);
        assert_eq!(owner(&path).await, Owner::Staying);
        drop(first);
        assert!(!path.exists());
        let second = again(&path, None, || false).await;
        assert!(second.open.is_some());
        assert_eq!(owner(&path).await, Owner::Staying);
        // A third one has replaced it.
        let third = bind(&path).expect("a folder");
        let bound = second.open.as_ref().map(|(_, bound)| bound);
        let given_up = again(&path, bound, || false).await;
        assert!(given_up.open.is_none());
        drop(second);
        assert_eq!(
            owner(&path).await,
            Owner::Staying,
            "it is another's to remove"
        );
        drop(third);
        // A process that was killed has left its socket.
        drop(std::os::unix::net::UnixListener::bind(&path).expect("a socket"));
        assert!(open().await.open.is_some());
    }

    #[tokio::test]
    async fn a_process_that_is_about_to_end_has_the_socket_until_another_one_that_is_not_wants_it()
    {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("socket");
        let first = Socket::open(&path).await.expect("a folder");
        let (listener, bound) = first.open.expect("it is free");
        let leaves = async {
            let router = Router::new().route("/healthz/ready", get(async || not_ready(END)));
            axum::serve(listener, router).await
        };
        let takes = async {
            assert_eq!(owner(&path).await, Owner::Leaving);
            assert!(waits(&path, None, true).await, "it is about to end as well");
            let second = again(&path, None, || false).await;
            assert!(second.open.is_some());
            // Nor does the first one take it back.
            let first = again(&path, Some(&bound), || true).await;
            assert!(first.open.is_none());
            drop(bound);
            assert!(path.exists());
            drop(second);
            assert!(again(&path, None, || true).await.open.is_some());
        };
        tokio::select! {
            end = leaves => panic!("{end:?}"),
            () = takes => {}
        }
    }
}

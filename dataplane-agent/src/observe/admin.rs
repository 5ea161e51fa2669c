//! The admin socket: HTTP over a Unix socket of mode 0600.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::Router;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Json, Response};
use axum::routing::{get, post};
use serde::Deserialize;
use tokio::net::{UnixListener, UnixStream};
use tokio::time::sleep;

use super::log::Level;
use super::metrics::Metrics;
use super::status::StatusReport;
use crate::sys::bound::{self, BoundPath};

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

/// The admin socket, and where it is.
pub struct Socket {
    path: PathBuf,
    /// None while another process has it.
    open: Option<(UnixListener, BoundPath)>,
}

impl Socket {
    /// Opens it, in place of one that a predecessor left. While another process accepts connections there,
    /// that one keeps it.
    ///
    /// # Errors
    /// It cannot be made.
    pub async fn open(path: &Path) -> io::Result<Self> {
        let open = match answers(path).await {
            true => None,
            false => bind(path)?,
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

/// Opens the socket as soon as its path is free. `bound` is the path of the socket that is open now, if one is.
async fn again(path: &Path, bound: Option<&BoundPath>) -> Socket {
    let mut told = false;
    loop {
        match bound {
            Some(bound) => bound.removed().await,
            None => sleep(bound::POLL).await,
        }
        if answers(path).await {
            continue;
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

/// Returns whether a process listens there, also one whose queue is full.
async fn answers(path: &Path) -> bool {
    match UnixStream::connect(path).await {
        Ok(_) => true,
        Err(error) => error.kind() == io::ErrorKind::WouldBlock,
    }
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
        .with_state(sources);
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
            again = again(&path, bound.as_ref()) => again,
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
    (
        [("content-type", "text/plain; charset=utf-8")],
        sources.metrics.text(),
    )
        .into_response()
}

async fn ready(State(sources): State<Sources>) -> Response {
    match (sources.ready)() {
        Ok(()) => "ready\n".into_response(),
        Err(pending) => {
            let text = format!("not ready, pending: {pending}\n");
            (StatusCode::INTERNAL_SERVER_ERROR, text).into_response()
        }
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
    use super::*;

    #[tokio::test]
    async fn a_socket_of_another_process_stays_until_that_ends() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("socket");
        let open = async || Socket::open(&path).await.expect("a folder");
        let first = open().await;
        assert!(first.open.is_some());
        let second = open().await;
        assert!(second.open.is_none());
        let long = bound::POLL * 10;
        let waits = tokio::time::timeout(long, again(&path, None)).await;
        assert!(waits.is_err() && answers(&path).await);
        drop(first);
        assert!(!path.exists());
        let second = again(&path, None).await;
        assert!(second.open.is_some() && answers(&path).await);
        // A third one has replaced it.
        let third = bind(&path).expect("a folder");
        let bound = second.open.as_ref().map(|(_, bound)| bound);
        let waits = tokio::time::timeout(long, again(&path, bound)).await;
        assert!(waits.is_err());
        drop(second);
        assert!(answers(&path).await, "it is another's to remove");
        drop(third);
        // A process that was killed has left its socket.
        drop(std::os::unix::net::UnixListener::bind(&path).expect("a socket"));
        assert!(open().await.open.is_some());
    }
}

//! The admin socket: HTTP over a Unix socket of mode 0600.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
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

use super::log::Level;
use super::metrics::Metrics;
use super::status::StatusReport;

/// The interval between checks that the socket is still at its path.
const CHECK_INTERVAL: Duration = Duration::from_secs(3);

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
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the socket file, to notice its removal.
    inode: (u64, u64),
}

impl Socket {
    /// Opens it, in place of a predecessor's.
    ///
    /// # Errors
    /// The socket cannot be created.
    pub fn open(path: &Path) -> io::Result<Self> {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(path)?;
        fs::set_permissions(path, Permissions::from_mode(0o600))?;
        Ok(Self {
            listener,
            path: path.to_owned(),
            inode: inode(path)?,
        })
    }

    /// Waits until the socket is gone from its path, and creates it again there.
    async fn reopened(path: &Path, expected: (u64, u64)) -> Self {
        let mut told = false;
        loop {
            tokio::time::sleep(CHECK_INTERVAL).await;
            if inode(path).is_ok_and(|there| there == expected) {
                continue;
            }
            match Self::open(path) {
                Ok(again) => {
                    tracing::warn!(path = %path.display(), "the admin socket was gone, and is made again");
                    return again;
                }
                Err(error) if !told => {
                    tracing::error!(path = %path.display(), %error, "the admin socket is gone, and cannot be made again");
                    told = true;
                }
                Err(_) => {}
            }
        }
    }
}

fn inode(path: &Path) -> io::Result<(u64, u64)> {
    let found = fs::symlink_metadata(path)?;
    Ok((found.dev(), found.ino()))
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
        let Socket {
            listener,
            path,
            inode,
        } = socket;
        let answers = async {
            if let Err(error) = axum::serve(listener, router.clone()).await {
                tracing::error!(%error, "the admin socket is closed");
            }
            std::future::pending::<()>().await;
        };
        socket = tokio::select! {
            () = answers => return,
            again = Socket::reopened(&path, inode) => again,
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

//! A listener in a pod's network namespace.

use std::io;
use std::net::{TcpListener, TcpStream};
use std::sync::LazyLock;
use std::time::Duration;

use tokio::io::unix::AsyncFd;

use crate::observe::log_limit::LogLimiter;
use crate::sys::{async_fd, socket};

/// Pause after an error: one that lasts (no descriptors are left) would make the loop spin.
const PAUSE: Duration = Duration::from_millis(100);

/// Limits the log for all pods together, since a lack of resources affects all listeners.
static LACKS: LazyLock<LogLimiter<(), io::ErrorKind>> =
    LazyLock::new(|| LogLimiter::new(1, u32::MAX));

/// A listener on one worker. The connections that it accepts are bound to no worker yet.
#[derive(Debug)]
pub struct Listener(AsyncFd<TcpListener>);

impl Listener {
    /// Watches a listening, non-blocking socket.
    ///
    /// # Errors
    /// The worker cannot watch it.
    pub fn new(listener: TcpListener) -> io::Result<Self> {
        async_fd::readable(listener).map(Self)
    }

    /// Returns the next connection. No connection is lost when it is dropped while waiting.
    pub async fn accept(&self) -> TcpStream {
        loop {
            // Other tasks on this worker have their turn even if clients come as fast as they are accepted.
            tokio::task::coop::consume_budget().await;
            let accepted = match self.0.readable().await {
                Ok(mut ready) => {
                    match ready.try_io(|listener| socket::accept(listener.get_ref())) {
                        Ok(accepted) => accepted,
                        Err(_) => continue, // somebody was quicker
                    }
                }
                Err(error) => Err(error),
            };
            match accepted {
                Ok(tcp) => return tcp,
                // The client is gone already.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => {
                    if let Some(times) = LACKS.admit((), error.kind()) {
                        tracing::warn!(%error, times, "cannot accept");
                    }
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }
}

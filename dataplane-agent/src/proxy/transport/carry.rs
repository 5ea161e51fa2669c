//! Carries a permitted connection to its next hop.

use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;

use futures_util::FutureExt;

use super::hbone::ConnectRequest;
use super::pool::{Pool, TunnelKey};
use super::relay::{End, Meter, RelayError, relay};
use super::{Connector, TransportError, plain};
use crate::drain::TaskGroup;
use crate::observe::{self, Failure};
use crate::proxy::authorize::{Hop, Io, Permit};
use crate::proxy::hbone::headers;

/// The means by which one worker carries connections.
#[derive(Clone)]
pub struct Carrier {
    /// Makes connections from pods' network namespaces.
    pub connector: Rc<dyn Connector>,
    /// The tunnels to other pods.
    pub pool: Rc<Pool>,
}

impl std::fmt::Debug for Carrier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Carrier").finish_non_exhaustive()
    }
}

impl Meter for Arc<observe::Bytes> {
    fn upward(&self, bytes: u64) {
        self.add_up(bytes);
    }
    fn downward(&self, bytes: u64) {
        self.add_down(bytes);
    }
}

/// The end of a connection that did not fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carried {
    /// It was connected, and both ends have finished or one was reset.
    Whole,
    /// The client went before it was connected, which is no failure.
    ClientGone,
}

/// Connects to the next hop and carries bytes until both ends have finished, one breaks, or policy no longer allows
/// it. If nothing could be carried the client gets a status or a reset.
///
/// # Errors
/// The connection did not come to its end; the error says why.
pub async fn carry(
    permit: Permit<Io>,
    carrier: &Carrier,
    group: &TaskGroup,
    bytes: &Arc<observe::Bytes>,
) -> Result<Carried, TransportError> {
    let Permit {
        resolved,
        mut revoked,
        ..
    } = permit;
    let mut accepted = resolved.accepted;
    let peer = accepted.peer;
    let pod = Arc::clone(&accepted.pod);
    let share = carrier.connector.unsent(&pod);
    let upstream = async {
        match &resolved.hop {
            Hop::App(to) => {
                let from = peer.ip();
                let tcp = plain::to_app(&*carrier.connector, &pod, from, *to).await?;
                Ok((End::Tcp(tcp), None))
            }
            Hop::Plain(to) => {
                let from = pod.source_of(peer.ip(), *to);
                let tcp = plain::to_peer(&*carrier.connector, &pod, from, *to).await?;
                Ok((End::Tcp(tcp), None))
            }
            Hop::Hbone {
                to,
                authority,
                target,
                expected,
            } => {
                let key = TunnelKey {
                    source: pod.instance,
                    from: pod.source_of(peer.ip(), *to),
                    target: target.uid.clone(),
                    to: *to,
                    expected: expected.clone(),
                };
                let connect = ConnectRequest {
                    authority: *authority,
                    client: peer,
                    host: resolved
                        .service
                        .as_ref()
                        .map(|service| service.hostname.clone()),
                    baggage: resolved.source.as_deref().map(headers::baggage),
                };
                let (stream, slot) = carrier.pool.connect(&key, &pod, group, &connect).await?;
                Ok((End::Stream(stream), Some(slot)))
            }
        }
    };
    let (upstream, slot) = match wait(revoked.wait(), accepted.io.gone(), upstream).await {
        Ok(Some(upstream)) => upstream,
        Ok(None) => return Ok(Carried::ClientGone),
        Err(error) => {
            accepted.io.refuse(error.status());
            return Err(error);
        }
    };
    let client = match accepted.io {
        Io::Tcp(tcp) => End::Tcp(tcp),
        Io::Stream(waiting) => {
            let baggage = resolved.target.as_deref().map(headers::baggage);
            match waiting.connected(baggage.as_deref()) {
                Ok(stream) => End::Stream(stream),
                // The client has gone just now.
                Err(_) => return Ok(Carried::ClientGone),
            }
        }
    };
    let carried = async {
        let rest = relay(client, upstream, &share, bytes).await?;
        bytes.all();
        // The stream has ended; what is left is between a socket and the kernel.
        drop(slot);
        rest.acknowledged().await;
        Ok(Carried::Whole)
    };
    tokio::select! {
        biased;
        () = revoked.wait() => Err(TransportError::Revoked),
        end = carried => end.map_err(|error: RelayError| TransportError::Relay(error.into())),
    }
}

/// Waits for the upstream while policy allows it and the client waits; `None` when the client has gone. For one that has
/// gone before, the upstream is not begun. After that its result comes first if both are there: a client that gives up
/// must not hide its failure.
async fn wait<T>(
    revoked: impl Future<Output = ()>,
    gone: impl Future<Output = ()>,
    upstream: impl Future<Output = Result<T, TransportError>>,
) -> Result<Option<T>, TransportError> {
    let mut gone = pin!(gone);
    if gone.as_mut().now_or_never().is_some() {
        return Ok(None);
    }
    tokio::select! {
        biased;
        () = revoked => Err(TransportError::Revoked),
        upstream = upstream => upstream.map(Some),
        () = gone => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use std::future::{pending, ready};

    use tokio::task::yield_now;

    use http::StatusCode;

    use super::*;

    #[tokio::test]
    async fn an_upstream_that_fails_is_told_of_though_its_client_has_just_gone() {
        let failed = || {
            ready(Err::<(), _>(TransportError::Status(
                StatusCode::BAD_GATEWAY,
            )))
        };
        let end = wait(pending(), yield_now(), failed()).await;
        assert!(matches!(end, Err(TransportError::Status(_))), "{end:?}");
        let end = wait::<()>(pending(), yield_now(), pending()).await;
        assert!(matches!(end, Ok(None)), "{end:?}");
        let end = wait(ready(()), yield_now(), failed()).await;
        assert!(matches!(end, Err(TransportError::Revoked)), "{end:?}");
    }

    #[tokio::test]
    async fn nobody_is_dialled_for_a_client_that_has_gone_already() {
        let dialled = async { panic!("it is dialled") };
        let end = wait::<()>(pending(), ready(()), dialled).await;
        assert!(matches!(end, Ok(None)), "{end:?}");
    }
}

//! Carries a permitted connection to its next hop.

use std::rc::Rc;
use std::sync::Arc;

use bytes::Bytes;
use h2::server::SendResponse;
use http::{Response, StatusCode};

use super::hbone::Connect;
use super::pool::{Key, Pool};
use super::relay::{End, Meter, RelayError, relay};
use super::{Means, TransportError, plain};
use crate::authorize::{Hop, Io, Permit, Revoked};
use crate::drain::Scope;
use crate::hbone::headers;
use crate::observe;

/// What connections of one worker are carried with.
#[derive(Clone)]
pub struct Carrier {
    /// Connections from pods' network namespaces.
    pub means: Rc<dyn Means>,
    /// Tunnels to other pods.
    pub pool: Rc<Pool>,
}

impl std::fmt::Debug for Carrier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Carrier").finish_non_exhaustive()
    }
}

impl Meter for observe::Bytes {
    fn upward(&self, bytes: u64) {
        self.add_up(bytes);
    }
    fn downward(&self, bytes: u64) {
        self.add_down(bytes);
    }
}

/// Connects to the next hop and carries bytes until both ends have finished, one breaks, or policy
/// no longer allows it. Where nothing could be carried the client is told so: by a status, or by a
/// reset.
///
/// # Errors
/// Why it did not come to its end.
pub async fn carry(
    permit: Permit<Io>,
    carrier: &Carrier,
    scope: &Scope,
    bytes: &observe::Bytes,
) -> Result<(), TransportError> {
    let Permit {
        resolved,
        mut revoked,
        ..
    } = permit;
    let mut accepted = resolved.accepted;
    let peer = accepted.peer;
    let pod = Arc::clone(&accepted.pod);
    let upstream = async {
        match &resolved.hop {
            Hop::App(to) => {
                let from = peer.ip();
                let tcp = plain::to_app(&*carrier.means, &pod, from, *to).await?;
                Ok((End::Tcp(tcp), None))
            }
            Hop::Plain(to) => {
                let tcp = plain::to_peer(&*carrier.means, &pod, *to).await?;
                Ok((End::Tcp(tcp), None))
            }
            Hop::Hbone {
                to,
                authority,
                target,
                expected,
            } => {
                let key = Key {
                    source: pod.instance,
                    target: target.uid.clone(),
                    to: *to,
                    expected: expected.clone(),
                };
                let connect = Connect {
                    authority: *authority,
                    client: peer,
                    host: resolved
                        .service
                        .as_ref()
                        .map(|service| service.hostname.clone()),
                    baggage: resolved.source.as_deref().map(headers::baggage),
                };
                let (send, receive, lease) =
                    carrier.pool.connect(&key, &pod, scope, &connect).await?;
                Ok((End::Stream(send, receive), Some(lease)))
            }
        }
    };
    let upstream = tokio::select! {
        biased;
        () = revoked.wait() => Err(TransportError::Revoked),
        // Nobody waits for it any more.
        gone = accepted.io.reset() => Err(TransportError::H2(gone.into())),
        upstream = upstream => upstream,
    };
    let (upstream, _lease) = match upstream {
        Ok(upstream) => upstream,
        Err(error) => {
            let status = match error {
                TransportError::Revoked => StatusCode::UNAUTHORIZED,
                _ => StatusCode::SERVICE_UNAVAILABLE,
            };
            accepted.io.refuse(status);
            return Err(error);
        }
    };
    let client = match accepted.io {
        Io::Tcp(tcp) => End::Tcp(tcp),
        Io::Stream(respond, body) => {
            let baggage = resolved.target.as_deref().map(headers::baggage);
            End::Stream(answer(respond, baggage.as_deref())?, body)
        }
    };
    relay_while_allowed(client, upstream, bytes, &mut revoked).await
}

async fn relay_while_allowed(
    client: End,
    upstream: End,
    bytes: &observe::Bytes,
    revoked: &mut Revoked,
) -> Result<(), TransportError> {
    tokio::select! {
        biased;
        () = revoked.wait() => Err(TransportError::Revoked),
        end = relay(client, upstream, bytes) => {
            end.map_err(|error: RelayError| TransportError::Relay(error.into()))
        }
    }
}

/// Tells the peer that it is connected.
fn answer(
    mut respond: SendResponse<Bytes>,
    baggage: Option<&str>,
) -> Result<h2::SendStream<Bytes>, TransportError> {
    let mut response = Response::new(());
    // What the mesh says of a workload need not be fit for a header; then it is not told.
    if let Some(baggage) = baggage.and_then(|baggage| baggage.parse().ok()) {
        response.headers_mut().insert("baggage", baggage);
    }
    respond
        .send_response(response, false)
        .map_err(|error| TransportError::H2(error.into()))
}

//! HBONE on the wire: what both ends of a tunnel share, lent to `accept` (server side) and
//! `transport` (client side) as `identity` is. Numbers are ztunnel's, since it is our peer; where
//! it leaves a limit to its library, ours is said here.

pub mod batch;
pub mod headers;
pub mod keepalive;
pub mod payload;
pub mod readahead;
pub mod stream;
pub mod window;

use std::time::Duration;

/// Where a pod takes tunnels.
pub const PORT: u16 = 15008;
/// Where a pod's outbound connections are taken.
pub const OUTBOUND_PORT: u16 = 15001;
/// Where a pod's inbound connections in clear are taken.
pub const INBOUND_PORT: u16 = 15006;

/// The protocol that both ends must choose in the TLS handshake.
pub const ALPN: &[u8] = b"h2";

/// What a stream's receiver lets be in flight, while little is not delivered: see [`window`].
pub const STREAM_WINDOW: u32 = 4 << 20;
/// What a tunnel's receiver lets be in flight, besides what is not delivered.
pub const CONNECTION_WINDOW: u32 = 16 << 20;
/// The largest DATA frame that we take.
pub const FRAME: u32 = 1 << 20;
/// Small DATA frames of a tunnel may cost so much memory, besides their bytes, until the connections that
/// they are for have taken them; more end the tunnel. These take them each time that the tunnel has been
/// read, and put them together, so that it says nothing about what an app reads.
pub const FRAME_BUDGET: usize = 64 << 20;
/// What one stream may have waiting to be written to the tunnel, beyond which it takes no more; bounds
/// memory, not speed.
pub const SEND_BUFFER: usize = 512 << 10;
/// The same, while its pod has little memory left.
pub const SEND_LESS: usize = 64 << 10;
/// The same, while its pod has none left.
pub const SEND_LEAST: usize = 16 << 10;
/// What rustls may have sealed and not yet written.
pub const TLS_BUFFER: usize = 256 << 10;
/// Streams that a peer may have open in one tunnel to us.
pub const SERVER_STREAMS: u32 = 200;
/// Streams that we open in one tunnel before we make another.
pub const CLIENT_STREAMS: usize = 100;
/// Request headers, decoded.
pub const SERVER_HEADERS: u32 = 64 << 10;
/// Response headers, decoded.
pub const CLIENT_HEADERS: u32 = 16 << 10;
/// For so long a stream that we reset is remembered: what its peer sent before it heard of that is no
/// error. A peer that hears of it later answers no PING either, and its tunnel has ended.
pub const RESET_MEMORY: Duration = Duration::from_secs(30);
/// Streams that we reset and still remember; each costs about half a KiB.
pub const RESET_STREAMS: usize = 8192;
/// Streams that the peer reset before we looked at them (rapid reset); more end the tunnel. All of a
/// tunnel's may be given up at once, and others after them, while we are busy: several times as many
/// as there may be.
pub const PENDING_RESETS: usize = 1024;
/// Streams that we had to reset for the peer's errors in a tunnel's life, and forgotten ones that more
/// came for; more end the tunnel. A peer that does not read lets as many resets wait in memory.
pub const LOCAL_ERROR_RESETS: usize = 4096;
/// A CONNECT that nobody waits for any more is reset when it is answered, or after this. A peer that
/// has not looked at it might count the reset as one of a flood, and end the tunnel; one that has not
/// looked for so long has not answered a PING either.
pub const ABANDONED: Duration = Duration::from_secs(40);
/// A peer that connects says its first message of TLS sooner: one that is silent holds a place.
pub const HELLO: Duration = Duration::from_secs(3);
/// A stream that could send nothing for so long counts as stalled.
pub const STALLED: Duration = Duration::from_millis(500);
/// A tunnel with as many stalled streams takes no new ones: a peer that gives credit for the tunnel only
/// as bytes are delivered has none left for them after one more.
pub const MOST_STALLED: usize = 3;
/// Tunnels between two pods, of one worker, that stalled streams may lead to.
pub const TUNNELS: usize = 32;
/// TCP connect, and TLS with HTTP/2, take no longer, each.
pub const TIMEOUT: Duration = Duration::from_secs(10);
/// So long after its pod has begun to drain a tunnel that carries nothing is closed.
pub const LEAVE: Duration = Duration::from_secs(1);
/// A tunnel of a peer that carries nothing for as long, or at most twice, is closed: it holds a place. Peers
/// close theirs sooner, ztunnel as we do after five minutes.
pub const UNUSED: Duration = Duration::from_secs(15 * 60);
/// A tunnel that we have ended waits for its peer's end; of one that takes nothing any more, no longer.
pub const LINGER: Duration = Duration::from_secs(2);
/// A CONNECT that is not answered for so long asks whether its tunnel is alive.
pub const DOUBT: Duration = Duration::from_secs(1);
/// The answer to CONNECT takes no longer: the peer has [`TIMEOUT`] to reach its app, and says so.
pub const ANSWER: Duration = Duration::from_secs(15);

/// The server side's settings.
pub fn server() -> h2::server::Builder {
    let mut builder = h2::server::Builder::new();
    builder
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME)
        .max_concurrent_streams(SERVER_STREAMS)
        .max_header_list_size(SERVER_HEADERS)
        .max_send_buffer_size(SEND_BUFFER)
        .data_frame_budget(FRAME_BUDGET)
        .max_concurrent_reset_streams(RESET_STREAMS)
        .reset_stream_duration(RESET_MEMORY)
        .max_pending_accept_reset_streams(PENDING_RESETS)
        .max_local_error_reset_streams(Some(LOCAL_ERROR_RESETS));
    builder
}

/// The client side's settings.
pub fn client() -> h2::client::Builder {
    let mut builder = h2::client::Builder::new();
    builder
        .enable_push(false)
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME)
        .initial_max_send_streams(CLIENT_STREAMS)
        .max_header_list_size(CLIENT_HEADERS)
        .max_send_buffer_size(SEND_BUFFER)
        .data_frame_budget(FRAME_BUDGET)
        .max_concurrent_reset_streams(RESET_STREAMS)
        .reset_stream_duration(RESET_MEMORY)
        .max_pending_accept_reset_streams(PENDING_RESETS)
        .max_local_error_reset_streams(Some(LOCAL_ERROR_RESETS));
    builder
}

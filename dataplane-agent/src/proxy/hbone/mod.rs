//! HBONE on the wire: code and limits that both ends of a tunnel share, `accept` (server side) and `transport`
//! (client side). Numbers are ztunnel's, since it is our peer; limits that ztunnel leaves to its library are set
//! here.

pub mod batch;
pub mod given_up;
pub mod headers;
pub mod keepalive;
pub mod pace;
pub mod payload;
pub mod readahead;
pub mod stream;
pub mod window;

use std::time::Duration;

use bytes::Buf;
use dataplane_ebpf::listener::ListenerKind;
use tokio::io::{AsyncRead, AsyncWrite};

use pace::Paced;
use stream::TunnelState;

/// Port at which a pod takes tunnels.
pub const PORT: u16 = ListenerKind::Hbone.port();

/// ALPN protocol that both ends must choose in the TLS handshake.
pub const ALPN: &[u8] = b"h2";

/// Receive window of a stream, in bytes, while little is undelivered: see [`window`].
pub const STREAM_WINDOW: u32 = 4 << 20;
/// Receive window of a tunnel, in bytes, besides what is undelivered.
pub const CONNECTION_WINDOW: u32 = 16 << 20;
/// Largest DATA frame that we take, in bytes. A part of one waits in the engine, where no share of memory counts it, so
/// it must fit into what is planned for a tunnel.
pub const FRAME: u32 = 64 << 10;
/// Largest frame of another type that we take, in bytes: what every peer may send before it knows our limits. The
/// engine puts together the parts of up to six, and peers in order have no use for larger ones.
pub const OTHER_FRAME: usize = 16 << 10;
/// Memory, in bytes, that small DATA frames of a tunnel may cost besides their content, until the connections that
/// they are for have taken them; more end the tunnel. Connections take them each time that the tunnel has been read,
/// and put them together, so the limit does not depend on how fast an app reads.
pub const FRAME_BUDGET: usize = 64 << 20;
/// Bytes of one stream that may wait to be written to the tunnel before it takes no more. It bounds memory, not
/// speed.
pub const SEND_BUFFER: usize = 512 << 10;
/// [`SEND_BUFFER`] while the pod has little memory left.
pub const SEND_LESS: usize = 64 << 10;
/// [`SEND_BUFFER`] while the pod has no memory left.
pub const SEND_LEAST: usize = 16 << 10;
/// Bytes that rustls may have encrypted and not yet written.
pub const TLS_BUFFER: usize = 256 << 10;
/// Streams that a peer may have open in one tunnel to us.
pub const SERVER_STREAMS: u32 = 200;
/// Streams that we open in one tunnel before we make another.
pub const CLIENT_STREAMS: usize = 100;
/// Largest request headers, in decoded bytes.
pub const SERVER_HEADERS: u32 = 64 << 10;
/// Largest response headers, in decoded bytes.
pub const CLIENT_HEADERS: u32 = 16 << 10;
/// Time for which a stream that we reset is remembered: what its peer sent before it learned of the reset is no
/// error.
pub const RESET_MEMORY: Duration = Duration::from_secs(10);
/// Number of reset streams that are remembered, all that a tunnel may have at once and as many after them. Each costs
/// about half a KiB, which no share of memory counts, and time at each of the peer's SETTINGS: see [`pace`]. What
/// comes for others counts in [`LOCAL_ERROR_RESETS`].
pub const RESET_STREAMS: usize = 2 * SERVER_STREAMS as usize;
/// Streams that the peer may reset before we looked at them (rapid reset); more end the tunnel. All streams of a
/// tunnel may be given up at once, and others after them, while we are busy, so this is several times
/// [`SERVER_STREAMS`].
pub const PENDING_RESETS: usize = 1024;
/// Streams that the peer may give up before they are answered, in ten seconds: somewhat more than all streams of a
/// tunnel each second, as when nobody answers and clients wait for no longer. After more the tunnel takes
/// no new stream.
pub const GIVEN_UP: usize = 2048;
/// Streams that we may have to reset for the peer's errors in a tunnel's life, with frames for forgotten streams;
/// more end the tunnel. A peer that does not read makes as many resets wait in memory, at about half a KiB each, which
/// no share of memory counts; so it is no more than ztunnel's.
pub const LOCAL_ERROR_RESETS: usize = 1024;
/// Time after which a CONNECT that nobody waits for any more is reset, if it is not answered before. A peer that has
/// not looked at it might count the reset as part of a flood, and end the tunnel; one that has not looked for so long
/// has not answered a PING either.
pub const ABANDONED_TIMEOUT: Duration = Duration::from_secs(40);
/// Time within which a peer must send its first TLS message: a silent one holds a place.
pub const CLIENT_HELLO_TIMEOUT: Duration = Duration::from_secs(3);
/// Time without progress after which a stream counts as stalled.
pub const STALLED_AFTER: Duration = Duration::from_millis(500);
/// Number of stalled streams from which a tunnel takes no new ones: a peer that gives credit for the tunnel only as
/// bytes are delivered has none left after one more.
pub const MAX_STALLED: usize = 3;
/// Most tunnels between two pods, on one worker, that stalled streams may lead to.
pub const MAX_TUNNELS: usize = 32;
/// Time limit of a TCP connect, and of TLS with HTTP/2, each.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Time after the start of a pod's drain at which its tunnels that carry nothing are closed.
pub const DRAIN_IDLE_TIMEOUT: Duration = Duration::from_secs(1);
/// Time after which a peer's tunnel that carries nothing is closed, since it holds a place; it may take twice as
/// long. Peers close theirs sooner, ztunnel as we do after five minutes.
pub const INBOUND_IDLE_TIMEOUT: Duration = Duration::from_secs(15 * 60);
/// Time for which a tunnel that we have ended waits for its peer's end while the peer takes nothing.
pub const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
/// Time after which an unanswered CONNECT makes us check by PING whether its tunnel is alive.
pub const PING_AFTER: Duration = Duration::from_secs(1);
/// Time limit of the answer to CONNECT. The peer has [`CONNECT_TIMEOUT`] to reach its app, and reports a failure.
pub const CONNECT_ANSWER_TIMEOUT: Duration = Duration::from_secs(15);

/// Length of what a client sends before its first frame (RFC 9113, 3.4), in bytes.
const PREFACE: usize = 24;

/// Begins HTTP/2 in a tunnel that a peer has opened. Windows are small if its pod has little memory left.
///
/// # Errors
/// The peer does not speak HTTP/2, or the tunnel has ended.
pub async fn server<T, B>(
    io: T,
    shared: &TunnelState,
) -> Result<h2::server::Connection<Paced<T>, B>, h2::Error>
where
    T: AsyncRead + AsyncWrite + Unpin,
    B: Buf,
{
    let mut builder = h2::server::Builder::new();
    builder
        .initial_window_size(shared.undelivered.first_window())
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
    builder.handshake(Paced::new(io, PREFACE)).await
}

/// Begins HTTP/2 in a tunnel that we have opened.
///
/// # Errors
/// As for [`server`].
pub async fn client<T, B>(
    io: T,
    shared: &TunnelState,
) -> Result<
    (
        h2::client::SendRequest<B>,
        h2::client::Connection<Paced<T>, B>,
    ),
    h2::Error,
>
where
    T: AsyncRead + AsyncWrite + Unpin,
    B: Buf,
{
    let mut builder = h2::client::Builder::new();
    builder
        .enable_push(false)
        .initial_window_size(shared.undelivered.first_window())
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
    builder.handshake(Paced::new(io, 0)).await
}

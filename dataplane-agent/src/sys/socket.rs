//! Sockets in a pod's network namespace, with the options that capture needs.

use std::io;
use std::mem::MaybeUninit;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, FromRawFd};
use std::time::Duration;

use bytes::{BufMut, BytesMut};
use socket2::{Domain, MaybeUninitSlice, Protocol, SockAddr, SockRef, Socket, TcpKeepalive, Type};

use dataplane_ebpf::mark;
use tokio::io::Interest;
use tokio::net::TcpStream;

/// Most connections that wait to be accepted; the kernel limits it to `net.core.somaxconn`.
const BACKLOG: i32 = 4096;
/// `SO_NETNS_COOKIE` of `asm-generic/socket.h`.
const SO_NETNS_COOKIE: libc::c_int = 71;

/// Returns a non-blocking listener on all addresses of both families, or of IPv4 if there is no IPv6. It accepts
/// connections to any address at all. If an app has the port already it gets another one: connections are
/// steered to the socket, whatever its port is.
///
/// # Errors
/// CAP_NET_ADMIN is missing.
pub fn listener(port: u16, mark: u32) -> io::Result<std::net::TcpListener> {
    let (socket, any) = match Socket::new(Domain::IPV6, Type::STREAM, Some(Protocol::TCP)) {
        Ok(socket) => {
            socket.set_only_v6(false)?;
            transparent_v6(&socket)?;
            (socket, IpAddr::V6(Ipv6Addr::UNSPECIFIED))
        }
        Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
            (socket, IpAddr::from([0, 0, 0, 0]))
        }
        Err(error) => return Err(error),
    };
    transparent_v4(&socket)?;
    socket.set_reuse_address(true)?;
    socket.set_mark(mark)?;
    socket.set_nonblocking(true)?;
    // Accepted sockets inherit these options.
    relayed(&socket)?;
    match socket.bind(&SocketAddr::new(any, port).into()) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            socket.bind(&SocketAddr::new(any, 0).into())?;
        }
        bound => bound?,
    }
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Returns `true` if this kernel has IPv6.
pub fn has_ipv6() -> bool {
    let socket = Socket::new(Domain::IPV6, Type::STREAM, Some(Protocol::TCP));
    !socket.is_err_and(|error| error.raw_os_error() == Some(libc::EAFNOSUPPORT))
}

/// Returns a socket for one of the agent's own connections to `to`: with mark AGENT, bound to the address `from`
/// if that is given. It is non-blocking and not connected.
///
/// # Errors
/// No socket can be created; CAP_NET_ADMIN is missing; the namespace does not have `from`.
pub fn client(from: Option<IpAddr>, to: SocketAddr) -> io::Result<std::net::TcpStream> {
    let socket = stream(to.ip(), mark::AGENT)?;
    if let Some(from) = from {
        // The port is chosen on connect: chosen now, it would be in use for all destinations.
        set(&socket, libc::SOL_IP, libc::IP_BIND_ADDRESS_NO_PORT)?;
        socket.bind(&SocketAddr::new(from, 0).into())?;
    }
    Ok(socket.into())
}

/// Returns a socket that connects to an app of this namespace with the source `from`: bound to that address and
/// port, and to `lo`, with mark RETURN. It is non-blocking and not connected.
///
/// # Errors
/// As [`client`]; an app has the port (`AddrInUse`).
pub fn client_as(from: SocketAddr) -> io::Result<std::net::TcpStream> {
    let socket = stream(from.ip(), mark::RETURN)?;
    match from {
        SocketAddr::V4(_) => transparent_v4(&socket)?,
        SocketAddr::V6(_) => transparent_v6(&socket)?,
    }
    socket.set_reuse_address(true)?;
    socket.bind_device(Some(b"lo"))?;
    socket.bind(&from.into())?;
    Ok(socket.into())
}

/// Accepts a connection, as a non-blocking socket.
///
/// # Errors
/// No connection waits (`WouldBlock`); there are no descriptors left.
pub fn accept(listener: &std::net::TcpListener) -> io::Result<std::net::TcpStream> {
    let flags = libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: the descriptor is open; no address is asked for.
    let accepted = unsafe {
        libc::accept4(
            listener.as_raw_fd(),
            std::ptr::null_mut(),
            std::ptr::null_mut(),
            flags,
        )
    };
    if accepted < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { std::net::TcpStream::from_raw_fd(accepted) })
}

/// Reads at most `size` bytes to the end of `buffer`. If the kernel reports that no more are there, the next
/// read waits for readiness instead of trying in vain. Less than `size` does not mean that no more are there: a
/// read ends before a byte that was sent as urgent.
///
/// # Errors
/// There is nothing yet (`WouldBlock`); the connection is broken.
pub fn read(tcp: &TcpStream, buffer: &mut BytesMut, size: usize) -> io::Result<usize> {
    buffer.reserve(size);
    let mut read = 0;
    let done = tcp.try_io(Interest::READABLE, || {
        let (bytes, more) = receive(tcp, &mut buffer.spare_capacity_mut()[..size])?;
        read = bytes;
        if read > 0 && !more {
            // This clears tokio's readiness, but only for the event that `try_io` has seen.
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(())
    });
    match done {
        Err(error) if error.kind() != io::ErrorKind::WouldBlock || read == 0 => return Err(error),
        _ => {}
    }
    // SAFETY: the kernel has written that many bytes, from the end of the buffer on.
    unsafe { buffer.advance_mut(read) };
    Ok(read)
}

/// Reads once; returns the number of bytes, and `true` if there may be more (by `TCP_INQ`; always `true` on a
/// socket without that option).
fn receive(tcp: &impl AsFd, into: &mut [MaybeUninit<u8>]) -> io::Result<(usize, bool)> {
    let mut pieces = [MaybeUninitSlice::new(into)];
    // Of whole words, for the alignment of the header. There is room for one int.
    let mut words = [0_u64; 4];
    // SAFETY: all zeroes are a message without parts.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = pieces.as_mut_ptr().cast();
    message.msg_iovlen = 1;
    message.msg_control = words.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&words) as _;
    // SAFETY: the descriptor is open; the piece has the layout of an iovec, which socket2 promises, and
    // it and the words have the given lengths, and outlive the call.
    let read = unsafe { libc::recvmsg(tcp.as_fd().as_raw_fd(), &raw mut message, 0) };
    let Ok(read) = usize::try_from(read) else {
        return Err(io::Error::last_os_error());
    };
    // SAFETY: the kernel has filled the message, and its words still live.
    let told = unsafe { libc::CMSG_FIRSTHDR(&raw const message).as_ref() };
    let more = match told {
        Some(told) if (told.cmsg_level, told.cmsg_type) == (libc::SOL_TCP, libc::TCP_CM_INQ) => {
            // SAFETY: what follows a header of this type is one int, which need not be aligned.
            let left = unsafe { libc::CMSG_DATA(told).cast::<libc::c_int>().read_unaligned() };
            left > 0
        }
        _ => true,
    };
    Ok((read, more))
}

/// Makes any later close of the socket a reset, also the kernel's when the process dies. Unsent bytes are
/// discarded then.
///
/// # Errors
/// It is no socket.
pub fn close_by_reset(tcp: &impl AsFd) -> io::Result<()> {
    SockRef::from(tcp).set_linger(Some(Duration::ZERO))
}

/// Makes a later close of the socket an orderly end (FIN) after all that was written.
///
/// # Errors
/// It is no socket.
pub fn close_by_end(tcp: &impl AsFd) -> io::Result<()> {
    SockRef::from(tcp).set_linger(None)
}

/// Returns the number of written bytes that the peer's kernel has not acknowledged.
///
/// # Errors
/// The socket is not connected.
pub fn unacknowledged(tcp: &impl AsFd) -> io::Result<usize> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the descriptor is open; the value is ours, and the call writes no more than it.
    let done = unsafe { libc::ioctl(tcp.as_fd().as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    if done == 0 {
        Ok(usize::try_from(bytes).unwrap_or(0))
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Numbers of bytes of a connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moved {
    /// Bytes that have come from the peer.
    pub received: u64,
    /// Bytes that the peer's kernel has acknowledged.
    pub acknowledged: u64,
    /// Written bytes that it has not acknowledged yet.
    pub unacknowledged: u64,
}

/// Returns how many bytes a connection has moved so far.
///
/// # Errors
/// The socket is not connected.
pub fn moved(tcp: &impl AsFd) -> io::Result<Moved> {
    /// `tcpi_bytes_acked` and `tcpi_bytes_received` of `struct tcp_info`, in words of 8 bytes.
    const ACKNOWLEDGED: usize = 15;
    const RECEIVED: usize = 16;
    let mut info = [0_u64; RECEIVED + 1];
    let mut length = size_of_val(&info) as libc::socklen_t;
    // SAFETY: the descriptor is open; value and length are ours and agree.
    let done = unsafe {
        libc::getsockopt(
            tcp.as_fd().as_raw_fd(),
            libc::SOL_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(Moved {
        received: info[RECEIVED],
        acknowledged: info[ACKNOWLEDGED],
        unacknowledged: unacknowledged(tcp)? as u64,
    })
}

/// Returns the cookie of a socket's network namespace, by which the kernel programs identify it.
///
/// # Errors
/// The kernel is older than 5.14.
pub fn netns_cookie(socket: &impl AsFd) -> io::Result<u64> {
    let mut cookie = 0_u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the descriptor is open; value and length are ours and agree.
    let done = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if done == 0 {
        Ok(cookie)
    } else {
        Err(io::Error::last_os_error())
    }
}

fn stream(family: IpAddr, mark: u32) -> io::Result<Socket> {
    let domain = Domain::for_address(SocketAddr::new(family, 0));
    let socket = Socket::new(domain, Type::STREAM, Some(Protocol::TCP))?;
    socket.set_mark(mark)?;
    socket.set_nonblocking(true)?;
    relayed(&socket)?;
    Ok(socket)
}

/// Sets the options of a relayed socket.
///
/// Keepalive notices within half a minute that a peer is gone, as PINGs do in a tunnel: the app's own keepalive
/// only reaches us. It also notices that the kernel of a peer that has sent its FIN has forgotten the connection.
///
/// There is no limit for unacknowledged bytes (`TCP_USER_TIMEOUT`): Linux applies it to a peer that does not
/// read as well, and such a connection may live as long as it would without us.
///
/// The socket is closed by a reset until its peer's end is known, whatever closes it: an app must not take
/// half of a download for the whole.
fn relayed(socket: &Socket) -> io::Result<()> {
    close_by_reset(socket)?;
    socket.set_tcp_nodelay(true)?;
    let keepalive = TcpKeepalive::new()
        .with_time(Duration::from_secs(10))
        .with_interval(Duration::from_secs(5))
        .with_retries(4);
    socket.set_tcp_keepalive(&keepalive)?;
    // A tunnel has no urgent data, so the byte would be lost outside of the stream.
    socket.set_out_of_band_inline(true)?;
    set(socket, libc::SOL_TCP, libc::TCP_INQ)
}

fn transparent_v4(socket: &Socket) -> io::Result<()> {
    set(socket, libc::SOL_IP, libc::IP_TRANSPARENT)
}

fn transparent_v6(socket: &Socket) -> io::Result<()> {
    set(socket, libc::SOL_IPV6, libc::IPV6_TRANSPARENT)
}

fn set(socket: &Socket, level: libc::c_int, option: libc::c_int) -> io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: the descriptor is open; the value is ours, and its length is given.
    let done = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            (&raw const on).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if done == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Returns an address with IPv4-mapped IPv6 addresses, as of a socket of both families, turned into IPv4.
pub fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Converts an address of socket2.
///
/// # Errors
/// It is neither IPv4 nor IPv6.
pub fn address(of: &SockAddr) -> io::Result<SocketAddr> {
    of.as_socket()
        .map(canonical)
        .ok_or_else(|| io::ErrorKind::AddrNotAvailable.into())
}

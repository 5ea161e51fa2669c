//! Sockets in a pod's network namespace, with the options that capture needs.

use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, FromRawFd};

use bytes::{BufMut, BytesMut};
use rand::Rng;
use socket2::{Domain, Protocol, SockAddr, SockRef, Socket, TcpKeepalive, Type};

use dataplane_ebpf::mark;
use tokio::io::Interest;
use tokio::net::TcpStream;

/// Ports that the agent takes when it connects in a client's name: none that clients take
/// themselves, since an established socket is found before any program runs.
pub const SPOOFED_PORTS: std::ops::RangeInclusive<u16> = 10000..=32767;
/// How often another port is tried.
const PORT_TRIES: usize = 16;
/// How many connections wait to be accepted; the kernel cuts it to `net.core.somaxconn`.
const BACKLOG: i32 = 4096;
/// `SO_NETNS_COOKIE` of `asm-generic/socket.h`.
const SO_NETNS_COOKIE: libc::c_int = 71;

/// A listener on all addresses of both families, which takes connections to any address at all;
/// of IPv4 alone where there is no IPv6. Non-blocking. Where an app has the port already it gets
/// another one: connections are steered to the socket, whatever its port is.
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
    // Accepted sockets inherit both.
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_keepalive(&keepalive())?;
    match socket.bind(&SocketAddr::new(any, port).into()) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            socket.bind(&SocketAddr::new(any, 0).into())?;
        }
        bound => bound?,
    }
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Whether this kernel has IPv6.
pub fn has_ipv6() -> bool {
    let socket = Socket::new(Domain::IPV6, Type::STREAM, Some(Protocol::TCP));
    !socket.is_err_and(|error| error.raw_os_error() == Some(libc::EAFNOSUPPORT))
}

/// A socket for a connection of the agent's own to `to`: mark AGENT. Non-blocking, not connected.
///
/// # Errors
/// No socket can be made; CAP_NET_ADMIN is missing.
pub fn client(to: SocketAddr) -> io::Result<std::net::TcpStream> {
    Ok(stream(to.ip(), mark::AGENT)?.into())
}

/// A socket that connects in the name of `from` to an app of this namespace: bound to that address
/// and to `lo`, mark RETURN, on none of the ports that are `taken`. Non-blocking, not connected.
///
/// # Errors
/// As [`client`]; no port is free for `from`.
pub fn client_as(from: IpAddr, taken: impl Fn(u16) -> bool) -> io::Result<std::net::TcpStream> {
    let mut last = io::Error::from(io::ErrorKind::AddrInUse);
    for _ in 0..PORT_TRIES {
        let port = rand::rng().random_range(SPOOFED_PORTS);
        if taken(port) {
            continue;
        }
        let socket = stream(from, mark::RETURN)?;
        match from {
            IpAddr::V4(_) => transparent_v4(&socket)?,
            IpAddr::V6(_) => transparent_v6(&socket)?,
        }
        socket.set_reuse_address(true)?;
        socket.bind_device(Some(b"lo"))?;
        match socket.bind(&SocketAddr::new(from, port).into()) {
            Ok(()) => return Ok(socket.into()),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => last = error,
            Err(error) => return Err(error),
        }
    }
    Err(last)
}

/// Takes a connection that waits; it is non-blocking.
///
/// # Errors
/// None waits (`WouldBlock`); there are no descriptors left.
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

/// Reads what there is, at most `size` bytes, to the end of `buffer`. A read that comes back short has
/// emptied the socket, and is taken as such: the next one waits, where it would only hear that there
/// is nothing.
///
/// # Errors
/// There is nothing yet (`WouldBlock`); the connection is broken.
pub fn read(tcp: &TcpStream, buffer: &mut BytesMut, size: usize) -> io::Result<usize> {
    buffer.reserve(size);
    let mut read = 0;
    let done = tcp.try_io(Interest::READABLE, || {
        read = SockRef::from(tcp).recv(&mut buffer.spare_capacity_mut()[..size])?;
        if (1..size).contains(&read) {
            // Told to tokio inside of its call, which knows by which event the socket was readable.
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

/// What the kernel programs call the network namespace of a socket.
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
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_keepalive(&keepalive())?;
    Ok(socket)
}

/// As ztunnel has it: a peer that is gone is noticed after some minutes.
fn keepalive() -> TcpKeepalive {
    use std::time::Duration;
    TcpKeepalive::new()
        .with_time(Duration::from_secs(180))
        .with_interval(Duration::from_secs(180))
        .with_retries(9)
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

/// The address as the corridor knows it: an IPv4 one of a socket of both families is IPv4.
pub fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// From what socket2 tells.
///
/// # Errors
/// It is neither IPv4 nor IPv6.
pub fn address(of: &SockAddr) -> io::Result<SocketAddr> {
    of.as_socket()
        .map(canonical)
        .ok_or_else(|| io::ErrorKind::AddrNotAvailable.into())
}

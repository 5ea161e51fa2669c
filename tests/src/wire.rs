//! Packet captures of one interface.
//!
//! A capture that saw nothing only proves something if it would have seen it. So each capture has to see, at its
//! end, a frame that it sends itself; a capture that lost a packet, or died, fails its test.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns};
use socket2::{Domain, Socket, Type};

use crate::scaled;

/// `ETH_P_ALL`, in network byte order.
const ALL: i32 = 0x0003_u16.to_be() as i32;

/// The EtherType of a probe: one that is reserved for experiments.
const PROBE: [u8; 2] = [0x88, 0xb5];
/// Size of the socket's receive buffer.
static BUFFER: libc::c_int = 32 << 20;
/// After a pause of this length everything that was sent before has arrived.
const PAUSE: Duration = Duration::from_millis(200);
/// A busy wire has no pause; its capture ends after this time.
const BUSY: Duration = Duration::from_secs(2);

/// A TCP segment that was seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Its source.
    pub from: (IpAddr, u16),
    /// Its destination.
    pub to: (IpAddr, u16),
    /// Its flags: 1 FIN, 2 SYN, 4 RST, 16 ACK.
    pub flags: u8,
    /// Its payload.
    pub payload: Vec<u8>,
}

/// A running capture of one interface.
#[derive(Debug)]
#[must_use = "nobody judges what it sees"]
pub struct Wire {
    seen: Arc<Mutex<Seen>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Seen {
    segments: Vec<Segment>,
    markers: Vec<(String, usize)>,
    packets: usize,
    keep: bool,
}

impl Wire {
    /// Starts a capture that keeps every segment.
    pub fn tap(netns: File, interface: &str) -> Self {
        Self::start(netns, interface, &[], true)
    }

    /// Starts a capture that counts packets with one of these texts, and keeps none: for long captures.
    pub fn watch(netns: File, interface: &str, markers: &[&str]) -> Self {
        Self::start(netns, interface, markers, false)
    }

    fn start(netns: File, interface: &str, markers: &[&str], keep: bool) -> Self {
        let seen = Arc::new(Mutex::new(Seen {
            markers: markers
                .iter()
                .map(|marker| ((*marker).to_owned(), 0))
                .collect(),
            keep,
            ..Seen::default()
        }));
        let stop = Arc::new(AtomicBool::new(false));
        let (ready, is_ready) = std::sync::mpsc::channel();
        let (interface, told, until) = (interface.to_owned(), Arc::clone(&seen), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            setns(&netns, CloneFlags::CLONE_NEWNET).expect("enter a namespace");
            let socket = open(&interface);
            ready.send(()).expect("somebody waits");
            let mut buffer = vec![0_u8; 1 << 17];
            let mut stopped = None;
            // It runs until it is told to stop, and then until a pause.
            loop {
                if until.load(Ordering::Acquire) {
                    stopped.get_or_insert_with(Instant::now);
                }
                let frame = next(&socket, &mut buffer, &interface);
                if let Some(frame) = frame {
                    told.lock().expect("not poisoned").take(frame);
                }
                let busy = stopped.is_some_and(|at| at.elapsed() > BUSY);
                if stopped.is_some() && (frame.is_none() || busy) {
                    break;
                }
            }
            let probe = probe(&interface);
            let deadline = Instant::now() + scaled(Duration::from_secs(5));
            loop {
                match next(&socket, &mut buffer, &interface) {
                    Some(frame) if frame == probe => break,
                    Some(frame) => told.lock().expect("not poisoned").take(frame),
                    None => assert!(
                        Instant::now() < deadline,
                        "the capture of {interface} does not see what is sent there"
                    ),
                }
            }
            let lost = lost(&socket);
            assert_eq!(lost, 0, "packets that the capture of {interface} lost");
        });
        is_ready.recv().expect("the capture starts");
        Self {
            seen,
            stop,
            thread: Some(thread),
        }
    }

    /// Ends it; returns the segments that were seen.
    pub fn end(mut self) -> Vec<Segment> {
        self.finish();
        std::mem::take(&mut self.seen.lock().expect("not poisoned").segments)
    }

    /// Ends it; returns the number of packets with each of the texts, and of all packets.
    pub fn count(mut self) -> (Vec<(String, usize)>, usize) {
        self.finish();
        let mut seen = self.seen.lock().expect("not poisoned");
        (std::mem::take(&mut seen.markers), seen.packets)
    }

    fn finish(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take()
            && let Err(why) = thread.join()
        {
            std::panic::resume_unwind(why);
        }
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
    }
}

impl Seen {
    fn take(&mut self, frame: &[u8]) {
        if frame.get(12..14) == Some(&PROBE) {
            return; // another capture's
        }
        self.packets += 1;
        for (marker, count) in &mut self.markers {
            *count += usize::from(contains(frame, marker.as_bytes()));
        }
        if self.keep
            && let Some(segment) = parse(frame)
        {
            self.segments.push(segment);
        }
    }
}

/// Returns `true` if `bytes` contain a text.
pub fn contains(bytes: &[u8], text: &[u8]) -> bool {
    bytes.windows(text.len()).any(|window| window == text)
}

/// Returns the next frame; `None` after a pause.
///
/// # Panics
/// The capture has died, as it does when its interface is removed.
fn next<'a>(mut socket: &Socket, buffer: &'a mut [u8], interface: &str) -> Option<&'a [u8]> {
    match socket.read(buffer) {
        Ok(length) => Some(&buffer[..length]),
        Err(error) => match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted => None,
            _ => panic!("the capture of {interface} has died: {error}"),
        },
    }
}

/// Sends a unique frame, and returns it. It is sent from another socket, as a socket does not see its own frames.
fn probe(interface: &str) -> Vec<u8> {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let own = [u64::from(std::process::id()), number].map(u64::to_be_bytes);
    // From address zero to the broadcast address.
    let frame = [&[0xff; 6], &[0; 6], &PROBE[..], &own.concat(), &[0; 44]].concat();
    let sent = open(interface).send(&frame);
    assert_eq!(sent.expect("send a frame"), frame.len());
    frame
}

/// Returns the number of packets that the kernel dropped for lack of room.
fn lost(socket: &Socket) -> u32 {
    let mut counts = [0_u32; 2]; // taken, lost
    let mut length = size_of_val(&counts) as libc::socklen_t;
    // SAFETY: the descriptor is open; the kernel writes as much as the length says.
    let done = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_STATISTICS,
            counts.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
    counts[1]
}

fn open(interface: &str) -> Socket {
    let socket = Socket::new(Domain::PACKET, Type::RAW, None).expect("a packet socket needs root");
    let index = nix::net::if_::if_nametoindex(interface)
        .unwrap_or_else(|error| panic!("interface {interface}: {error}"));
    // With the privileged option, as the usual limit is less than a burst.
    // SAFETY: the descriptor is open, and the value is of the length that is given.
    let done = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVBUFFORCE,
            (&raw const BUFFER).cast(),
            size_of_val(&BUFFER) as libc::socklen_t,
        )
    };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
    socket.set_read_timeout(Some(PAUSE)).expect("a timeout");
    // SAFETY: all zeros are an address of this kind.
    let mut storage: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: ALL as u16,
        sll_ifindex: index as i32,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    // SAFETY: the storage is larger than any address, and aligned for all of them.
    unsafe {
        (&raw mut storage)
            .cast::<libc::sockaddr_ll>()
            .write(address);
    };
    // SAFETY: its beginning is a whole address of the length that is given, and aya's storage type
    // is this one's.
    let address = unsafe {
        socket2::SockAddr::new(
            std::mem::transmute::<libc::sockaddr_storage, socket2::SockAddrStorage>(storage),
            size_of::<libc::sockaddr_ll>() as libc::socklen_t,
        )
    };
    socket.bind(&address).expect("bind to an interface");
    socket
}

fn parse(frame: &[u8]) -> Option<Segment> {
    let kind = u16::from_be_bytes(frame.get(12..14)?.try_into().ok()?);
    let packet = frame.get(14..)?;
    let (from, to, tcp): (IpAddr, IpAddr, &[u8]) = match kind {
        0x0800 => {
            let header = usize::from(packet.first()? & 15) * 4;
            let total = usize::from(u16::from_be_bytes(packet.get(2..4)?.try_into().ok()?));
            if packet.get(9)? != &6 {
                return None;
            }
            let from: [u8; 4] = packet.get(12..16)?.try_into().ok()?;
            let to: [u8; 4] = packet.get(16..20)?.try_into().ok()?;
            (
                from.into(),
                to.into(),
                packet.get(header..total.min(packet.len()).max(header))?,
            )
        }
        0x86dd => {
            if packet.get(6)? != &6 {
                return None;
            }
            let from: [u8; 16] = packet.get(8..24)?.try_into().ok()?;
            let to: [u8; 16] = packet.get(24..40)?.try_into().ok()?;
            (from.into(), to.into(), packet.get(40..)?)
        }
        _ => return None,
    };
    let port = |at: usize| Some(u16::from_be_bytes(tcp.get(at..at + 2)?.try_into().ok()?));
    let header = usize::from(tcp.get(12)? >> 4) * 4;
    Some(Segment {
        from: (from, port(0)?),
        to: (to, port(2)?),
        flags: *tcp.get(13)?,
        payload: tcp.get(header..)?.to_vec(),
    })
}

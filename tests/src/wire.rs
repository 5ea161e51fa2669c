//! What is on a wire: every packet of one interface, as it is there.

use std::fs::File;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sched::{CloneFlags, setns};
use socket2::{Domain, Socket, Type};

/// `ETH_P_ALL`, in network byte order.
const ALL: i32 = 0x0003_u16.to_be() as i32;

/// A TCP segment that was seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Who sent it.
    pub from: (IpAddr, u16),
    /// To whom.
    pub to: (IpAddr, u16),
    /// Its flags: 1 FIN, 2 SYN, 4 RST, 16 ACK.
    pub flags: u8,
    /// Its payload.
    pub payload: Vec<u8>,
}

/// A running capture of one interface.
#[derive(Debug)]
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
    /// Keeps every segment that crosses the interface.
    pub fn tap(netns: File, interface: &str) -> Self {
        Self::start(netns, interface, &[], true)
    }

    /// Counts packets that have one of these texts in them, and keeps none: for long captures.
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
            loop {
                use std::io::Read;
                match (&socket).read(&mut buffer) {
                    Ok(length) => told.lock().expect("not poisoned").take(&buffer[..length]),
                    // A pause in which nothing came: everything that was sent before is read.
                    Err(_) if until.load(Ordering::Acquire) => return,
                    Err(_) => {}
                }
            }
        });
        is_ready.recv().expect("the capture starts");
        Self {
            seen,
            stop,
            thread: Some(thread),
        }
    }

    /// Ends it; the segments that were seen.
    pub fn end(mut self) -> Vec<Segment> {
        self.finish();
        std::mem::take(&mut self.seen.lock().expect("not poisoned").segments)
    }

    /// Ends it; how many packets had each of the texts, and how many there were in all.
    pub fn count(mut self) -> (Vec<(String, usize)>, usize) {
        self.finish();
        let mut seen = self.seen.lock().expect("not poisoned");
        (std::mem::take(&mut seen.markers), seen.packets)
    }

    fn finish(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the capture ends");
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

/// Whether a text is in these bytes.
pub fn contains(bytes: &[u8], text: &[u8]) -> bool {
    bytes.windows(text.len()).any(|window| window == text)
}

fn open(interface: &str) -> Socket {
    let socket = Socket::new(Domain::PACKET, Type::RAW, None).expect("a packet socket needs root");
    let index = nix::net::if_::if_nametoindex(interface)
        .unwrap_or_else(|error| panic!("interface {interface}: {error}"));
    socket.set_recv_buffer_size(16 << 20).expect("a size");
    socket
        .set_read_timeout(Some(Duration::from_millis(200)))
        .expect("a timeout");
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

//! Packets between the two halves: a Unix socket of sequenced packets, each with the descriptors that belong
//! to it. Only the user of the agent, and root, may connect.

use std::cell::RefCell;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::rc::Rc;

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
    accept_with, bind, connect, listen, recvmsg, sendmsg, socket_with,
};
use tokio::io::unix::AsyncFd;

use crate::sys::async_fd;
use crate::sys::bound::BoundPath;
use crate::sys::peer::Peer;

/// The longest packet, in bytes: the cookies of as many pods as a node may have take half, the longest path of a state a
/// quarter, and a pod with the longest names and as many addresses as are known an eighth.
const LONGEST: usize = 16384;
/// The most descriptors of one packet.
const MAX_DESCRIPTORS: usize = 8;
/// The number of connections that may wait to be accepted.
const BACKLOG: i32 = 8;
const FLAGS: SocketFlags = SocketFlags::CLOEXEC.union(SocketFlags::NONBLOCK);

/// A received packet.
#[derive(Debug)]
pub struct Packet {
    /// Its content.
    pub bytes: Vec<u8>,
    /// The descriptors that came with it; `None` if this process has no room for all of them, or no packet has as many.
    pub descriptors: Option<Vec<OwnedFd>>,
}

/// One end of a connection between the halves.
#[derive(Debug)]
pub struct Channel {
    socket: AsyncFd<OwnedFd>,
    peer: Peer,
}

/// The socket that proxies connect to.
#[derive(Debug)]
pub struct SeamListener(RefCell<Rc<Open>>);

/// The socket, until somebody removes its path.
#[derive(Debug)]
struct Open {
    socket: AsyncFd<OwnedFd>,
    bound: BoundPath,
}

impl Open {
    fn new(path: &Path) -> io::Result<Rc<Self>> {
        let (socket, bound) = BoundPath::bind(path, || {
            let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, FLAGS, None)?;
            bind(&socket, &SocketAddrUnix::new(path)?)?;
            Ok(socket)
        })?;
        listen(&socket, BACKLOG)?;
        let socket = async_fd::readable(socket)?;
        Ok(Rc::new(Self { socket, bound }))
    }
}

impl SeamListener {
    /// Makes it, in place of one that a predecessor left.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn open(path: &Path) -> io::Result<Self> {
        Open::new(path).map(|open| Self(RefCell::new(open)))
    }

    /// Accepts the next connection. Makes the socket again if somebody has removed its path.
    async fn connection(&self) -> io::Result<OwnedFd> {
        let mut told = false;
        loop {
            let open = Rc::clone(&self.0.borrow());
            tokio::select! {
                came = ready(&open.socket, |socket| Ok(accept_with(socket, FLAGS)?)) => return came,
                () = open.bound.removed() => {}
            }
            let path = open.bound.path();
            match Open::new(path) {
                Ok(again) => {
                    tracing::warn!(path = %path.display(), "the socket for proxies was gone, and is made again");
                    *self.0.borrow_mut() = again;
                }
                Err(error) if !told => {
                    tracing::error!(path = %path.display(), %error, "the socket for proxies is gone, and cannot be made again");
                    told = true;
                }
                Err(_) => {}
            }
        }
    }

    /// Accepts the next connection.
    ///
    /// # Errors
    /// There are no descriptors left.
    pub async fn accept(&self) -> io::Result<Channel> {
        Channel::of(self.connection().await?)
    }
}

impl Channel {
    /// Connects to the socket at a path.
    ///
    /// # Errors
    /// Nobody does, or too many wait.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, FLAGS, None)?;
        connect(&socket, &SocketAddrUnix::new(path)?)?;
        Self::of(socket)
    }

    fn of(socket: OwnedFd) -> io::Result<Self> {
        Ok(Self {
            peer: Peer::of(&socket)?,
            socket: async_fd::readable(socket)?,
        })
    }

    /// Returns the process ID of the other end; 0 if this process cannot see it, as from another PID namespace.
    pub fn pid(&self) -> i32 {
        self.peer.pid
    }

    /// Refuses the process of a user who may not be a half of the agent.
    ///
    /// # Errors
    /// It is neither root's nor this process's own user's.
    pub fn refuse_stranger(&self) -> io::Result<()> {
        let uid = self.peer.uid;
        if uid == 0 || uid == rustix::process::geteuid().as_raw() {
            return Ok(());
        }
        let what = format!("user {uid} may not be a half of the agent");
        Err(io::Error::new(io::ErrorKind::PermissionDenied, what))
    }

    /// Sends a packet. What was sent before is answered, so that there is room for it.
    ///
    /// # Errors
    /// The other end is gone, or does not read.
    pub fn send(&self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut beside = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() && !beside.push(SendAncillaryMessage::ScmRights(descriptors)) {
            return Err(io::Error::other(format!(
                "more than {MAX_DESCRIPTORS} descriptors"
            )));
        }
        sendmsg(
            self.socket.get_ref(),
            &[IoSlice::new(bytes)],
            &mut beside,
            SendFlags::NOSIGNAL,
        )?;
        Ok(())
    }

    /// Waits for a packet; none comes any more if the other end is gone.
    ///
    /// # Errors
    /// It is longer than any should be; none of its descriptors stays open.
    pub async fn receive(&self) -> io::Result<Option<Packet>> {
        ready(&self.socket, receive).await
    }
}

async fn ready<T>(
    socket: &AsyncFd<OwnedFd>,
    act: impl Fn(BorrowedFd<'_>) -> io::Result<T>,
) -> io::Result<T> {
    loop {
        let mut ready = socket.readable().await?;
        if let Ok(done) = ready.try_io(|socket| act(socket.get_ref().as_fd())) {
            return done;
        }
    }
}

fn receive(socket: BorrowedFd<'_>) -> io::Result<Option<Packet>> {
    let mut bytes = vec![0; LONGEST];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut beside = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC;
    let came = recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut bytes)],
        &mut beside,
        flags,
    )?;
    let mut descriptors = Vec::new();
    for message in beside.drain() {
        if let RecvAncillaryMessage::ScmRights(all) = message {
            descriptors.extend(all);
        }
    }
    if came.flags.contains(ReturnFlags::TRUNC) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "a packet is longer than any",
        ));
    }
    bytes.truncate(came.bytes);
    let whole = !came.flags.contains(ReturnFlags::CTRUNC);
    let descriptors = whole.then_some(descriptors);
    Ok((came.bytes > 0).then_some(Packet { bytes, descriptors }))
}

#[cfg(test)]
impl Channel {
    /// Sends a packet with more descriptors than are received, as if there were no room for them.
    pub(super) fn send_without_room(&self, bytes: &[u8], one: BorrowedFd<'_>) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut beside = SendAncillaryBuffer::new(&mut space);
        let many = [one; 64];
        assert!(beside.push(SendAncillaryMessage::ScmRights(&many)));
        let bytes = [IoSlice::new(bytes)];
        sendmsg(
            self.socket.get_ref(),
            &bytes,
            &mut beside,
            SendFlags::NOSIGNAL,
        )
        .expect("there is room");
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::io::Read;
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::sys::bound;

    fn pair() -> (Channel, Channel) {
        let (one, other) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, FLAGS, None)
                .expect("a pair");
        let channel = |socket| Channel::of(socket).expect("a runtime");
        (channel(one), channel(other))
    }

    #[tokio::test]
    async fn packets_come_one_by_one_with_their_descriptors() {
        let (one, other) = pair();
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("file");
        fs::write(&path, "lent").expect("a file");
        let file = File::open(&path).expect("the file");
        one.send(b"first", &[file.as_fd()]).expect("there is room");
        one.send(b"second", &[]).expect("there is room");
        let first = other.receive().await.expect("a packet").expect("one");
        assert_eq!(first.bytes, b"first");
        let mut said = String::new();
        let lent = first.descriptors.expect("there is room");
        let [lent] = <[OwnedFd; 1]>::try_from(lent).expect("one");
        File::from(lent).read_to_string(&mut said).expect("a file");
        assert_eq!(said, "lent");
        let second = other.receive().await.expect("a packet").expect("one");
        assert_eq!(
            (&*second.bytes, second.descriptors.map(|none| none.len())),
            (&b"second"[..], Some(0))
        );
        drop(one);
        assert!(other.receive().await.expect("an end").is_none());
    }

    #[tokio::test]
    async fn a_packet_that_is_too_long_is_an_error_and_leaves_nothing_open() {
        let (one, other) = pair();
        let (near, far) = io::pipe().expect("a pipe");
        one.send(&[7; LONGEST + 1], &[far.as_fd()])
            .expect("there is room");
        drop(far);
        assert!(other.receive().await.is_err());
        let mut end = Vec::new();
        let mut near = near;
        near.read_to_end(&mut end)
            .expect("nobody has its other end");
    }

    #[tokio::test]
    async fn a_packet_without_room_for_its_descriptors_comes_and_leaves_none_open() {
        let (one, other) = pair();
        let (mut near, far) = io::pipe().expect("a pipe");
        one.send_without_room(b"many", far.as_fd());
        drop(far);
        let packet = other.receive().await.expect("a packet").expect("one");
        assert_eq!(packet.bytes, b"many");
        assert!(packet.descriptors.is_none());
        let end = near.read_to_end(&mut Vec::new());
        assert_eq!(end.expect("nobody has its other end"), 0);
    }

    #[tokio::test]
    async fn who_connects_is_heard_and_a_socket_that_was_left_is_replaced() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("socket");
        drop(SeamListener::open(&path).expect("a socket"));
        assert!(Channel::connect(&path).is_err(), "nobody listens");
        let entry = SeamListener::open(&path).expect("in its place");
        let mode = fs::metadata(&path).expect("it is there").permissions();
        assert_eq!(mode.mode() & 0o777, 0o600);
        let one = Channel::connect(&path).expect("somebody listens");
        let other = entry.accept().await.expect("who has connected");
        let own = i32::try_from(std::process::id()).expect("a number");
        assert_eq!((one.pid(), other.pid()), (own, own));
        other.refuse_stranger().expect("it is our own");
        one.send(b"hello", &[]).expect("there is room");
        let hello = other.receive().await.expect("a packet").expect("one");
        assert_eq!(hello.bytes, b"hello");
    }

    #[tokio::test]
    async fn a_socket_that_is_removed_is_made_again_however_busy_its_owner_is() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("socket");
        let entry = SeamListener::open(&path).expect("a socket");
        fs::remove_file(&path).expect("a socket");
        for _ in 0..20 {
            // As where something else comes first each time.
            let other = tokio::time::timeout(bound::POLL / 4, entry.accept()).await;
            assert!(other.is_err(), "nobody has come");
        }
        let _one = Channel::connect(&path).expect("somebody listens");
        entry.accept().await.expect("who has connected");
        drop(entry);
        assert!(!path.exists());
    }
}

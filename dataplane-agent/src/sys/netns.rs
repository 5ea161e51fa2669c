//! Network namespaces: held by descriptor, entered by a thread for the length of a call.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};

use nix::errno::Errno;
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};
use nix::sys::statfs::{FsType, fstatfs};
use tokio::io::unix::AsyncFd;

/// The initial user namespace has this inode number on every machine (`PROC_USER_INIT_INO`).
const INIT_USER_NS: u64 = 0xEFFF_FFFD;

/// `NSFS_MAGIC` of `linux/magic.h`, the file system of namespaces.
const MAGIC: FsType = FsType(0x6e73_6673);

/// A network namespace, held open.
#[derive(Clone, Debug)]
pub struct Netns {
    file: Arc<File>,
    inode: u64,
}

impl Netns {
    /// Opens the namespace at a path: a named one, or `/proc/<pid>/ns/net`.
    ///
    /// # Errors
    /// It does not exist, or is not a network namespace.
    pub fn open(path: &Path) -> io::Result<Self> {
        let other = || {
            let what = format!("{} is not a network namespace", path.display());
            io::Error::new(io::ErrorKind::InvalidInput, what)
        };
        // With O_PATH first, as anything may be there: opening a device or a FIFO may block, or have effects.
        let found = File::options()
            .read(true)
            .custom_flags(libc::O_PATH)
            .open(path)?;
        if fstatfs(&found)?.filesystem_type() != MAGIC {
            return Err(other());
        }
        let file = File::open(format!("/proc/self/fd/{}", found.as_raw_fd()))?;
        Self::of(file.into())?.ok_or_else(other)
    }

    /// Returns the namespace of a descriptor; `None` if it is not one of a network namespace.
    ///
    /// # Errors
    /// The descriptor cannot be inspected.
    pub fn of(descriptor: OwnedFd) -> io::Result<Option<Self>> {
        if fstatfs(&descriptor)?.filesystem_type() != MAGIC {
            return Ok(None);
        }
        let file = File::from(descriptor);
        // SAFETY: the descriptor is open; this request takes no argument.
        let kind = unsafe { libc::ioctl(file.as_raw_fd(), NS_GET_NSTYPE) };
        let inode = file.metadata()?.ino();
        Ok((kind == libc::CLONE_NEWNET).then(|| Self {
            file: Arc::new(file),
            inode,
        }))
    }

    /// Opens the agent's own namespace.
    ///
    /// # Errors
    /// `/proc` cannot be read.
    pub fn own() -> io::Result<Self> {
        static OWN: OnceLock<Netns> = OnceLock::new();
        if let Some(own) = OWN.get() {
            return Ok(own.clone());
        }
        let own = Self::open(Path::new("/proc/self/ns/net"))?;
        Ok(OWN.get_or_init(|| own).clone())
    }

    /// Opens the host's namespaces: the agent's own, and the first process' if that is visible.
    ///
    /// # Errors
    /// As [`Netns::own`]; the other one cannot be opened for another reason than a lack of rights.
    pub fn of_host() -> io::Result<Vec<Self>> {
        let own = Self::own()?;
        match Self::open(Path::new("/proc/1/ns/net")) {
            Ok(first) => Ok(vec![own, first]),
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::PermissionDenied | io::ErrorKind::NotFound
                ) =>
            {
                Ok(vec![own])
            }
            Err(error) => Err(error),
        }
    }

    /// Returns the cookies of [`Netns::of_host`]; 0 means none.
    ///
    /// # Errors
    /// As [`Netns::cookie`].
    pub fn host_cookies() -> io::Result<[u64; 2]> {
        let mut cookies = [0; 2];
        for (place, netns) in cookies.iter_mut().zip(Self::of_host()?) {
            *place = netns.cookie()?;
        }
        Ok(cookies)
    }

    /// Creates an empty namespace, which is gone when it is dropped.
    ///
    /// # Errors
    /// CAP_SYS_ADMIN is missing.
    pub fn new() -> io::Result<Self> {
        // On a thread that ends, so that it need not return to its namespace.
        let make = || {
            nix::sched::unshare(CloneFlags::CLONE_NEWNET)?;
            Self::open(Path::new("/proc/thread-self/ns/net"))
        };
        let made = std::thread::spawn(make).join();
        made.unwrap_or_else(|_| Err(io::Error::other("the thread ended early")))
    }

    /// Returns its inode number, which identifies it on this machine as long as it exists. Of one that nobody holds
    /// any more the next namespace may have it: see [`Netns::cookie`].
    pub fn inode(&self) -> u64 {
        self.inode
    }

    /// Runs `work` in it, on this thread.
    ///
    /// # Errors
    /// It cannot be entered: CAP_SYS_ADMIN is missing.
    ///
    /// # Panics
    /// Aborts the process if the thread cannot return: a thread in the wrong namespace would send one pod's
    /// traffic from another.
    pub fn enter<T>(&self, work: impl FnOnce() -> T) -> io::Result<T> {
        struct Back(Netns);
        impl Drop for Back {
            fn drop(&mut self) {
                if let Err(error) = setns(&self.0.file, CloneFlags::CLONE_NEWNET) {
                    tracing::error!(%error, "cannot leave a pod's network namespace");
                    std::process::abort();
                }
            }
        }
        let own = Self::own()?;
        setns(&self.file, CloneFlags::CLONE_NEWNET)?;
        let back = Back(own);
        let result = work();
        drop(back);
        Ok(result)
    }

    /// Returns its cookie, which no other namespace gets until the machine reboots.
    ///
    /// # Errors
    /// As [`Netns::enter`]; the kernel is older than 5.14.
    pub fn cookie(&self) -> io::Result<u64> {
        self.enter(|| {
            // The socket is not bound, as apps may have taken all ports.
            let flags = SockFlag::SOCK_CLOEXEC;
            let socket = socket(AddressFamily::Inet, SockType::Datagram, flags, None)?;
            super::socket::netns_cookie(&socket)
        })?
    }

    /// Returns `true` if the initial user namespace owns it. Any user can create one in a user namespace of
    /// their own, and give it any address.
    ///
    /// # Errors
    /// The kernel does not report the owner.
    pub fn is_the_hosts(&self) -> io::Result<bool> {
        // SAFETY: the descriptor is open; this request takes no argument and returns a new one.
        let owner = unsafe { libc::ioctl(self.file.as_raw_fd(), NS_GET_USERNS) };
        if owner < 0 {
            let error = io::Error::last_os_error();
            // The owner is outside of what we may see: not the initial one, unless we are ourselves
            // in another, where none is ours.
            return match error.raw_os_error() {
                Some(libc::EPERM) => Ok(false),
                _ => Err(error),
            };
        }
        // SAFETY: the kernel has just made this descriptor for us.
        let owner = unsafe { OwnedFd::from_raw_fd(owner) };
        Ok(File::from(owner).metadata()?.ino() == INIT_USER_NS)
    }
}

/// Reports changes of a namespace's interfaces, addresses, rules and routes.
#[derive(Debug)]
pub struct Changes(AsyncFd<OwnedFd>);

/// `RTMGRP_LINK`, `_IPV4_IFADDR`, `_IPV4_ROUTE`, `_IPV4_RULE`, `_IPV6_IFADDR`, `_IPV6_ROUTE`, and the
/// one of `RTNLGRP_IPV6_RULE`, which has no name as a bit.
const MULTICAST_GROUPS: u32 = 0x1 | 0x10 | 0x40 | 0x80 | 0x100 | 0x400 | 1 << 18;

/// Most messages that are read in a row: a pod that causes them as fast as they are read must not keep others
/// waiting.
const MESSAGES_PER_POLL: usize = 64;

impl Changes {
    /// Starts to watch a namespace, on this thread's runtime.
    ///
    /// # Errors
    /// The namespace cannot be entered; no socket can be created.
    pub fn of(netns: &Netns) -> io::Result<Self> {
        let socket = netns.enter(|| {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            let protocol = SockProtocol::NetlinkRoute;
            let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, protocol)?;
            bind(socket.as_raw_fd(), &NetlinkAddr::new(0, MULTICAST_GROUPS))?;
            io::Result::Ok(socket)
        })??;
        super::async_fd::readable(socket).map(Self)
    }

    /// Ready if something has changed since the last time; it does not tell what.
    pub fn poll(&self, context: &mut Context<'_>) -> Poll<()> {
        let Poll::Ready(ready) = self.0.poll_read_ready(context) else {
            return Poll::Pending;
        };
        let mut told = false;
        for _ in 0..MESSAGES_PER_POLL {
            // Messages are truncated, as their contents do not matter. A lost one is reported once, as an error.
            let received = recv(self.0.as_raw_fd(), &mut [0; 16], MsgFlags::empty());
            if received != Err(Errno::EAGAIN) {
                told = true;
                continue;
            }
            if let Ok(mut ready) = ready {
                ready.clear_ready();
            }
            break;
        }
        if told {
            return Poll::Ready(());
        }
        // Registers for the next message.
        self.0.poll_read_ready(context).map(|_| ())
    }
}

/// `NS_GET_USERNS`, `_IO(0xb7, 1)` of `linux/nsfs.h`.
const NS_GET_USERNS: libc::c_ulong = 0xb701;
/// `NS_GET_NSTYPE`, `_IO(0xb7, 3)`.
const NS_GET_NSTYPE: libc::c_ulong = 0xb703;

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_namespace_is_refused_and_not_opened() {
        let folder = tempfile::tempdir().expect("a folder");
        let fifo = folder.path().join("fifo");
        let mode = nix::sys::stat::Mode::S_IRWXU;
        nix::unistd::mkfifo(&fifo, mode).expect("a fifo");
        let writer = {
            let fifo = fifo.clone();
            // This waits for a reader.
            std::thread::spawn(move || File::options().write(true).open(fifo))
        };
        for path in [folder.path(), Path::new("/proc/self/ns/user"), &fifo] {
            // Long enough for the writer to wait, and then to go on if it could.
            let moment = || std::thread::sleep(std::time::Duration::from_millis(50));
            moment();
            let refused = Netns::open(path).expect_err("no network namespace");
            assert!(refused.to_string().contains("is not a network namespace"));
            moment();
            assert!(!writer.is_finished(), "{} was opened", path.display());
        }
        File::open(&fifo).expect("the writer goes on");
        writer.join().expect("it ends").expect("it was opened");
    }
}

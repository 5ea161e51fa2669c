//! Network namespaces: held by descriptor, entered by a thread for the length of a call.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};

use nix::errno::Errno;
use nix::ifaddrs::getifaddrs;
use nix::net::if_::{InterfaceFlags, if_nametoindex};
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, SockaddrStorage, bind,
    recv, socket,
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

/// The interfaces of a namespace, and their addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Interfaces {
    /// Addresses that can be reached from outside: neither loopback nor link-local ones. Those on `lo` come last,
    /// and only of families that another interface has too.
    pub addresses: Vec<IpAddr>,
    /// The interfaces except `lo`, by index, each with those of `addresses` that it has and that are in use.
    pub links: BTreeMap<u32, Vec<IpAddr>>,
    /// Those of `addresses` that no interface may use: duplicate address detection has not ended, or has found
    /// a duplicate.
    pub tentative: BTreeSet<IpAddr>,
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

    /// Returns its interfaces and their addresses.
    ///
    /// # Errors
    /// As [`Netns::enter`].
    pub fn interfaces(&self) -> io::Result<Interfaces> {
        self.enter(interfaces)?
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

fn interfaces() -> io::Result<Interfaces> {
    let mut found = Interfaces::default();
    // A pod may have many thousands of addresses: the cost of one must not grow with their number.
    let mut numbers: HashMap<String, u32> = HashMap::new();
    let mut seen = HashSet::new();
    let mut of_lo = Vec::new();
    // This is read first: an address that comes into use after it is reported as a change.
    let tentative = tentative()?;
    // The kernel lists links first, and then their addresses.
    for entry in getifaddrs()? {
        let is_of_lo = entry.flags.contains(InterfaceFlags::IFF_LOOPBACK);
        let link = entry.address.as_ref().map(SockaddrStorage::as_link_addr);
        if let None | Some(Some(_)) = link {
            let index = match link.flatten() {
                Some(link) => u32::try_from(link.ifindex()).map_err(io::Error::other)?,
                // A link without a link-layer address, such as a tunnel.
                None => match if_nametoindex(entry.interface_name.as_str()) {
                    Ok(index) => index,
                    // The interface is gone by now.
                    Err(Errno::ENODEV | Errno::ENXIO) => continue,
                    Err(error) => return Err(error.into()),
                },
            };
            if !is_of_lo {
                found.links.entry(index).or_default();
            }
            numbers.insert(entry.interface_name, index);
            continue;
        }
        // An address may have a label in place of its link's name, `<link>:<word>`.
        let name = entry.interface_name.as_str();
        let name = name.split_once(':').map_or(name, |(link, _)| link);
        let (Some(index), Some(address)) = (numbers.get(name), entry.address) else {
            continue;
        };
        let address = if let Some(v4) = address.as_sockaddr_in() {
            IpAddr::V4(v4.ip())
        } else if let Some(v6) = address.as_sockaddr_in6() {
            IpAddr::V6(v6.ip())
        } else {
            continue;
        };
        let of_one_link = matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local());
        if of_one_link || address.is_loopback() {
            continue;
        }
        if is_of_lo {
            of_lo.push(address);
            continue;
        }
        if tentative.contains(&(*index, address)) {
            found.tentative.insert(address);
        } else {
            found.links.entry(*index).or_default().push(address);
        }
        if seen.insert(address) {
            found.addresses.push(address);
        }
    }
    if !found.tentative.is_empty() {
        // An address that is tentative on one interface may be in use on another.
        for used in found.links.values().flatten().chain(&of_lo) {
            found.tentative.remove(used);
        }
    }
    // Addresses on `lo` alone cannot be reached: they count only if the pod has another one of their family.
    let has = |v4| found.addresses.iter().any(|of| of.is_ipv4() == v4);
    let (has_v4, has_v6) = (has(true), has(false));
    of_lo.retain(|of| (if of.is_ipv4() { has_v4 } else { has_v6 }) && seen.insert(*of));
    found.addresses.extend(of_lo);
    Ok(found)
}

/// `IFA_F_TENTATIVE` and `IFA_F_OPTIMISTIC` of `linux/if_addr.h`: duplicate address detection has not ended or
/// has found a duplicate; and the address is used all the same.
const TENTATIVE: u8 = 0x40;
const OPTIMISTIC: u8 = 0x04;

/// Returns the addresses of this thread's namespace that the kernel does not use, with their interfaces.
fn tentative() -> io::Result<HashSet<(u32, IpAddr)>> {
    match std::fs::read_to_string("/proc/thread-self/net/if_inet6") {
        Ok(lines) => Ok(lines.lines().filter_map(unused).collect()),
        // There is no IPv6, and the kernel uses all IPv4 addresses.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(HashSet::new()),
        Err(error) => Err(error),
    }
}

/// Parses a line `<address> <interface> <prefix> <scope> <flags> <name>`, whose numbers are hexadecimal;
/// returns the address if the kernel does not use it.
fn unused(line: &str) -> Option<(u32, IpAddr)> {
    let mut words = line.split_whitespace();
    let address = u128::from_str_radix(words.next()?, 16).ok()?;
    let index = u32::from_str_radix(words.next()?, 16).ok()?;
    let flags = u8::from_str_radix(words.nth(2)?, 16).ok()?;
    let used = flags & TENTATIVE == 0 || flags & OPTIMISTIC != 0;
    (!used).then(|| (index, Ipv6Addr::from_bits(address).into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_not_used_until_it_is_known_to_be_nobody_elses() {
        let line = |flags| {
            unused(&format!(
                "fd000000000000000000000000000005 0b 80 00 {flags}     eth0"
            ))
        };
        let own: IpAddr = "fd00::5".parse().expect("an address");
        assert_eq!(line("40"), Some((11, own)), "being looked for");
        assert_eq!(line("c8"), Some((11, own)), "somebody has it");
        assert_eq!(line("c4"), None, "optimistic");
        assert_eq!(line("80"), None);
    }

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

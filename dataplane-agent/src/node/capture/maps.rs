//! Typed handles on the kernel's maps; the only file that knows their names.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd};

use aya::Ebpf;
use aya::maps::{Array, HashMap, Map, MapData, MapError, MapInfo, PerCpuArray, RingBuf, SockMap};
use dataplane_ebpf::address::Ip;
use dataplane_ebpf::counter::Counter;
use dataplane_ebpf::pod::{Node, Owned, Steered, There};

use super::CaptureError;
use super::pins::{self, Pins};
use crate::seam::{Listeners, Stamp};
use crate::sys::cgroup::CgroupId;

/// Maps that all programs of a node share; pinned.
pub const SHARED: [&str; 7] = [
    "NODE",
    "ADDRESSES",
    "BEGUN",
    "LEAVING",
    "COUNTERS",
    "EVENTS",
    "AYA_LOGS",
];
/// Maps of the programs that are attached to the cgroup; pinned.
pub const NODE_MAPS: [&str; 4] = ["PODS", "CGROUPS", "INSIDE", "AGENT"];
/// Maps of one pod's program.
pub const POD_MAPS: [&str; 2] = ["POD", LISTENERS];
/// The map of a pod's listeners.
pub const LISTENERS: &str = "LISTENERS";

/// The contents of a map, as far as taking it over is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapContents {
    /// What keeps pods captured: must be copied.
    Pods,
    /// Sockets, which only the kernel can list: those that stay inside, and those of the agent, of which a proxy
    /// process that goes on has some.
    Sockets,
    /// Counts, and connections that are beginning: copied if possible.
    Transient,
    /// Entries that the agent writes again, or whose writer is gone: begins empty.
    Rewritten,
}

/// Returns the contents of a pinned map.
pub fn contents(map: &str) -> MapContents {
    match map {
        "PODS" | "LEAVING" | "CGROUPS" | "ADDRESSES" => MapContents::Pods,
        "INSIDE" | "AGENT" => MapContents::Sockets,
        "COUNTERS" | "BEGUN" => MapContents::Transient,
        _ => MapContents::Rewritten,
    }
}

/// The maps of the node's programs.
///
/// A correct entry is never written again: the kernel would give the old element to the next entry while a
/// program still reads it (see [`dataplane_ebpf::pod`]).
pub struct NodeMaps {
    node: Array<MapData, Node>,
    counters: PerCpuArray<MapData, u64>,
    pods: HashMap<MapData, u64, Ip>,
    leaving: HashMap<MapData, u64, There>,
    cgroups: HashMap<MapData, u64, u64>,
    addresses: HashMap<MapData, Owned, u32>,
    /// The entries of `addresses`, by pod.
    owned: BTreeMap<u64, BTreeSet<Ip>>,
}

impl NodeMaps {
    /// Takes the maps out of a loaded object.
    ///
    /// # Errors
    /// A map is missing, or of another kind.
    pub fn take(ebpf: &mut Ebpf) -> Result<Self, CaptureError> {
        let addresses: HashMap<_, Owned, u32> = take(ebpf, "ADDRESSES")?;
        let mut owned: BTreeMap<u64, BTreeSet<Ip>> = BTreeMap::new();
        for key in addresses.keys() {
            let Owned { netns, ip } = key.map_err(map_error("ADDRESSES"))?;
            owned.entry(netns).or_default().insert(ip);
        }
        Ok(Self {
            node: take(ebpf, "NODE")?,
            counters: take(ebpf, "COUNTERS")?,
            pods: take(ebpf, "PODS")?,
            leaving: take(ebpf, "LEAVING")?,
            cgroups: take(ebpf, "CGROUPS")?,
            addresses,
            owned,
        })
    }

    /// Returns the first address that a pod had when it was enrolled.
    pub fn first_address(&self, cookie: u64) -> Option<IpAddr> {
        let first = self.pods.get(&cookie, 0).ok()?;
        (first != Ip::NONE).then(|| first.into())
    }

    /// Writes what holds for the whole node.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn set_node(&mut self, node: Node) -> Result<(), CaptureError> {
        self.node.set(0, node, 0).map_err(map_error("NODE"))
    }

    /// Turns the programs' logging on or off.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn set_log(&mut self, on: bool) -> Result<(), CaptureError> {
        let node = self.node.get(&0, 0).map_err(map_error("NODE"))?;
        self.set_node(Node {
            log: on.into(),
            ..node
        })
    }

    /// Makes room for a pod that is not captured yet, so that a full map fails here. Until the pod is
    /// [enrolled](Self::enrol) it counts as leaving: what comes to it reaches its app.
    ///
    /// # Errors
    /// The kernel refuses; the maps are full.
    pub fn reserve(
        &mut self,
        cookie: u64,
        first: Option<IpAddr>,
        groups: &[CgroupId],
    ) -> Result<(), CaptureError> {
        if !has(&self.pods, "PODS", cookie)? {
            ensure(&mut self.leaving, "LEAVING", cookie, 1)?;
            let first = first.map_or(Ip::NONE, Ip::from);
            self.pods
                .insert(cookie, first, 0)
                .map_err(map_error("PODS"))?;
        }
        // A predecessor may have written cgroups that are gone since.
        self.set_cgroups(cookie, groups)
    }

    /// Captures the pod's connections from now on; its [addresses](Self::set_addresses) are written before. A
    /// process in one of its cgroups that is neither in its namespace nor in the host's is refused.
    ///
    /// # Errors
    /// The kernel refuses; the maps are full.
    pub fn enrol(
        &mut self,
        cookie: u64,
        first: Option<IpAddr>,
        groups: &[CgroupId],
    ) -> Result<(), CaptureError> {
        let added = self.add_cgroups(cookie, groups);
        self.capture(cookie, first).and(added)
    }

    /// Captures the pod's connections from now on, whatever else is known of it. If nobody serves it they fail.
    ///
    /// # Errors
    /// The kernel refuses; the map is full.
    pub fn capture(&mut self, cookie: u64, first: Option<IpAddr>) -> Result<(), CaptureError> {
        // The address is for reports only: an entry with another one is not written again.
        if !has(&self.pods, "PODS", cookie)? {
            let first = first.map_or(Ip::NONE, Ip::from);
            self.pods
                .insert(cookie, first, 0)
                .map_err(map_error("PODS"))?;
        }
        ignore_missing(self.leaving.remove(&cookie)).map_err(map_error("LEAVING"))
    }

    /// Returns `true` if the pod's new connections are captured.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn captures(&self, cookie: u64) -> Result<bool, CaptureError> {
        Ok(has(&self.pods, "PODS", cookie)? && !has(&self.leaving, "LEAVING", cookie)?)
    }

    /// Makes these cgroups the pod's, and no others.
    ///
    /// # Errors
    /// The kernel refuses; the map is full.
    pub fn set_cgroups(&mut self, cookie: u64, groups: &[CgroupId]) -> Result<(), CaptureError> {
        self.remove_cgroups(cookie, groups)?;
        self.add_cgroups(cookie, groups)
    }

    fn add_cgroups(&mut self, cookie: u64, groups: &[CgroupId]) -> Result<(), CaptureError> {
        let mut done = Ok(());
        for group in groups {
            done = done.and(ensure(&mut self.cgroups, "CGROUPS", group.id, cookie));
        }
        done
    }

    /// Restores lost entries of an enrolled pod. Returns `true` if there were any.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn restore(
        &mut self,
        cookie: u64,
        first: Option<IpAddr>,
        groups: &[CgroupId],
    ) -> Result<bool, CaptureError> {
        let mut lost = !self.captures(cookie)?;
        for group in groups {
            lost |= !has(&self.cgroups, "CGROUPS", group.id)?;
        }
        let done = self.enrol(cookie, first, groups);
        let own = self.restore_addresses(cookie);
        done.and(own).map(|own| lost || own)
    }

    /// Restores lost entries of a pod's own addresses. Returns `true` if there were any.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn restore_addresses(&mut self, cookie: u64) -> Result<bool, CaptureError> {
        let (mut lost, mut done) = (false, Ok(()));
        for ip in self.owned.get(&cookie).into_iter().flatten() {
            let key = Owned {
                netns: cookie,
                ip: *ip,
            };
            if !has(&self.addresses, "ADDRESSES", key)? {
                let put = self.addresses.insert(key, 1, 0);
                done = done.and(put.map_err(map_error("ADDRESSES")));
                lost = true;
            }
        }
        done.map(|()| lost)
    }

    /// Sets the pod's own addresses, at most [`dataplane_ebpf::pod::ADDRESSES`], and the interfaces by which
    /// it is captured.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn set_addresses(
        &mut self,
        cookie: u64,
        addresses: &[IpAddr],
        interfaces: impl IntoIterator<Item = Ip>,
    ) -> Result<(), CaptureError> {
        let mut want: BTreeSet<Ip> = interfaces.into_iter().collect();
        for ip in addresses.iter().copied().map(Ip::from) {
            want.extend([ip, ip.family()]);
        }
        let owned = self.owned.entry(cookie).or_default();
        let key = |ip: &Ip| Owned {
            netns: cookie,
            ip: *ip,
        };
        // First removes what the pod no longer has, which may be somebody else's by now: that must not fail
        // for want of room for the new addresses.
        for ip in owned.clone().difference(&want) {
            ignore_missing(self.addresses.remove(&key(ip))).map_err(map_error("ADDRESSES"))?;
            owned.remove(ip);
        }
        for ip in want.difference(&owned.clone()) {
            let done = self.addresses.insert(key(ip), 1, 0);
            done.map_err(map_error("ADDRESSES"))?;
            owned.insert(*ip);
        }
        Ok(())
    }

    /// Stops capturing the pod's new connections; those that run stay inside.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn stop_capture(&mut self, cookie: u64) -> Result<(), CaptureError> {
        ensure(&mut self.leaving, "LEAVING", cookie, 1)?;
        self.remove_cgroups(cookie, &[])
    }

    /// Removes all cgroups of a pod but these.
    fn remove_cgroups(&mut self, cookie: u64, but: &[CgroupId]) -> Result<(), CaptureError> {
        let owned: Vec<u64> = self
            .cgroups
            .iter()
            .filter_map(|entry| entry.ok())
            .filter(|(_, owner)| *owner == cookie)
            .map(|(cgroup, _)| cgroup)
            .filter(|cgroup| but.iter().all(|group| group.id != *cgroup))
            .collect();
        for cgroup in owned {
            ignore_missing(self.cgroups.remove(&cgroup)).map_err(map_error("CGROUPS"))?;
        }
        Ok(())
    }

    /// Removes all entries of a pod, in the last step of leaving.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn forget(&mut self, cookie: u64) -> Result<(), CaptureError> {
        ignore_missing(self.pods.remove(&cookie)).map_err(map_error("PODS"))?;
        ignore_missing(self.leaving.remove(&cookie)).map_err(map_error("LEAVING"))?;
        self.set_addresses(cookie, &[], [])?;
        self.owned.remove(&cookie);
        self.remove_cgroups(cookie, &[])
    }

    /// Returns the cookies of all pods that have an entry.
    pub fn enrolled(&self) -> BTreeSet<u64> {
        let owners = self.cgroups.iter().filter_map(|entry| Some(entry.ok()?.1));
        let pods = self.pods.keys().chain(self.leaving.keys());
        let pods = pods.filter_map(Result::ok);
        let owned = self.owned.keys().copied();
        pods.chain(owners).chain(owned).collect()
    }

    /// Returns the counts over all CPUs, since the programs were first loaded.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        let sum = |slot: Counter| {
            let values = self.counters.get(&(slot as u32), 0);
            values.map_or(0, |values| values.iter().sum())
        };
        Counter::ALL
            .into_iter()
            .map(|slot| (slot.word(), sum(slot)))
            .collect()
    }
}

/// Descriptors of the pinned maps, so that they can be pinned again.
pub struct PinnedMaps(Vec<(&'static str, MapData)>);

impl PinnedMaps {
    /// Opens the maps at their pins.
    ///
    /// # Errors
    /// A map is not pinned.
    pub fn open(pins: &Pins) -> Result<Self, CaptureError> {
        let open = |name: &'static str| {
            let map = MapData::from_pin(pins.maps().join(name)).map_err(map_error(name))?;
            Ok((name, map))
        };
        let names = SHARED.into_iter().chain(NODE_MAPS);
        names.map(open).collect::<Result<_, _>>().map(Self)
    }

    /// Pins maps again whose pins are gone or were replaced. Returns `true` if there were any.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn restore(&self, pins: &Pins) -> Result<bool, CaptureError> {
        let mut lost = false;
        for (name, map) in &self.0 {
            let path = pins.maps().join(name);
            let own = map.info().map_err(map_error(name))?.id();
            if !MapInfo::from_pin(&path).is_ok_and(|pinned| pinned.id() == own) {
                pins::remove(&path)?;
                map.pin(&path)
                    .map_err(|error| CaptureError::file(&path)(std::io::Error::other(error)))?;
                lost = true;
            }
        }
        Ok(lost)
    }
}

/// Takes the ring buffer of events.
///
/// # Errors
/// The map is missing.
pub fn events(ebpf: &mut Ebpf) -> Result<RingBuf<MapData>, CaptureError> {
    take(ebpf, "EVENTS")
}

/// Returns the map by which the agent's own sockets are known.
///
/// # Errors
/// The map is missing.
pub fn stamp(ebpf: &mut Ebpf) -> Result<Stamp, CaptureError> {
    let error = |why: String| CaptureError::Map { map: "AGENT", why };
    let Some(Map::SkStorage(map)) = ebpf.map("AGENT") else {
        return Err(error("it is not there".into()));
    };
    let descriptor = map.fd().as_fd().try_clone_to_owned();
    let stamp = descriptor.and_then(Stamp::of);
    stamp.map_err(|why| error(why.to_string()))
}

/// Writes to a pod's program whose it is, and its listeners if there are any.
///
/// # Errors
/// The kernel refuses.
pub fn fill_pod(
    ebpf: &mut Ebpf,
    cookie: u64,
    first: Option<IpAddr>,
    listeners: Option<&Listeners>,
) -> Result<(), CaptureError> {
    let mut pod: Array<_, Steered> = take(ebpf, "POD")?;
    let steered = Steered {
        netns: cookie,
        first: first.map_or(Ip::NONE, Ip::from),
    };
    pod.set(0, steered, 0).map_err(map_error("POD"))?;
    let mut sockets: SockMap<MapData> = take(ebpf, LISTENERS)?;
    let Some(listeners) = listeners else {
        return Ok(());
    };
    for (kind, socket) in listeners.iter() {
        sockets
            .set(kind.place(), &socket.as_raw_fd(), 0)
            .map_err(map_error(LISTENERS))?;
    }
    Ok(())
}

/// Returns `true` if the map has the key.
fn has<K: aya::Pod, V: aya::Pod>(
    map: &HashMap<MapData, K, V>,
    name: &'static str,
    key: K,
) -> Result<bool, CaptureError> {
    match map.get(&key, 0) {
        Ok(_) => Ok(true),
        Err(MapError::KeyNotFound) => Ok(false),
        Err(error) => Err(map_error(name)(error)),
    }
}

/// Writes an entry unless it is there with this value.
fn ensure<V: aya::Pod + PartialEq>(
    map: &mut HashMap<MapData, u64, V>,
    name: &'static str,
    key: u64,
    value: V,
) -> Result<(), CaptureError> {
    match map.get(&key, 0) {
        Ok(is) if is == value => Ok(()),
        Ok(_) | Err(MapError::KeyNotFound) => map.insert(key, value, 0).map_err(map_error(name)),
        Err(error) => Err(map_error(name)(error)),
    }
}

fn take<T: TryFrom<Map, Error = MapError>>(
    ebpf: &mut Ebpf,
    map: &'static str,
) -> Result<T, CaptureError> {
    let found = ebpf.take_map(map).ok_or(CaptureError::Map {
        map,
        why: "is not in the object".into(),
    })?;
    T::try_from(found).map_err(map_error(map))
}

/// Returns a function that adds the map's name to an error.
pub(super) fn map_error(map: &'static str) -> impl FnOnce(MapError) -> CaptureError {
    move |error| CaptureError::Map {
        map,
        why: chain(&error),
    }
}

/// Counts a missing entry as removed.
fn ignore_missing(done: Result<(), MapError>) -> Result<(), MapError> {
    match done {
        Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(error))
            if error.io_error.kind() == std::io::ErrorKind::NotFound =>
        {
            Ok(())
        }
        done => done,
    }
}

/// Returns an error with its sources, in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let more = error.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        source = error.source();
    }
    text
}

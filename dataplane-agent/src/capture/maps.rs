//! Typed handles on the kernel's maps; the only place that knows their names.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::os::fd::AsRawFd;

use aya::Ebpf;
use aya::maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray, RingBuf, SockMap};
use dataplane_ebpf::address::Ip;
use dataplane_ebpf::counter::Counter;
use dataplane_ebpf::pod::{ADDRESSES, Addresses, Node, Pod, listener};

use super::{CaptureError, Listeners};
use crate::sys::cgroup::CgroupId;

/// Maps that all programs of a node share; pinned.
pub const SHARED: [&str; 4] = ["NODE", "COUNTERS", "EVENTS", "AYA_LOGS"];
/// Maps of the programs that are attached to the cgroup; pinned.
pub const OF_NODE: [&str; 3] = ["PODS", "CGROUPS", "INSIDE"];
/// Maps of one pod's program.
pub const OF_POD: [&str; 2] = ["POD", "LISTENERS"];

/// The maps of the node's programs.
pub struct NodeMaps {
    node: Array<MapData, Node>,
    counters: PerCpuArray<MapData, u64>,
    pods: HashMap<MapData, u64, Pod>,
    cgroups: HashMap<MapData, u64, u64>,
}

impl NodeMaps {
    /// Of what was loaded.
    ///
    /// # Errors
    /// A map is not there, or is not of its kind.
    pub fn take(ebpf: &mut Ebpf) -> Result<Self, CaptureError> {
        Ok(Self {
            node: take(ebpf, "NODE")?,
            counters: take(ebpf, "COUNTERS")?,
            pods: take(ebpf, "PODS")?,
            cgroups: take(ebpf, "CGROUPS")?,
        })
    }

    /// Says what is the agent's own and the host's.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn declare(&mut self, node: Node) -> Result<(), CaptureError> {
        self.node.set(0, node, 0).map_err(failed("NODE"))
    }

    /// Turns the programs' logging on or off.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn set_log(&mut self, on: bool) -> Result<(), CaptureError> {
        let node = self.node.get(&0, 0).map_err(failed("NODE"))?;
        self.declare(Node {
            log: on.into(),
            ..node
        })
    }

    /// From now on the pod's connections are captured. If its cgroup is its `alone`, who is in it and
    /// neither in the pod's namespace nor in the host's is refused.
    ///
    /// # Errors
    /// The kernel refuses; the maps are full.
    pub fn enrol(
        &mut self,
        cookie: u64,
        addresses: &[IpAddr],
        cgroup: CgroupId,
        alone: bool,
    ) -> Result<(), CaptureError> {
        let pod = Pod {
            addresses: pack(addresses)?,
            cgroup: cgroup.id,
            cgroup_level: cgroup.level,
            leaving: 0,
        };
        if alone {
            self.cgroups
                .insert(cgroup.id, cookie, 0)
                .map_err(failed("CGROUPS"))?;
        }
        self.pods.insert(cookie, pod, 0).map_err(failed("PODS"))
    }

    /// From now on its new connections are not captured any more; what runs stays inside.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn release(&mut self, cookie: u64) -> Result<(), CaptureError> {
        match self.pods.get(&cookie, 0) {
            Ok(pod) => {
                let pod = Pod { leaving: 1, ..pod };
                self.pods.insert(cookie, pod, 0).map_err(failed("PODS"))?;
            }
            Err(MapError::KeyNotFound) => {}
            Err(error) => return Err(failed("PODS")(error)),
        }
        self.disown(cookie)
    }

    fn disown(&mut self, cookie: u64) -> Result<(), CaptureError> {
        let owned: Vec<u64> = self
            .cgroups
            .iter()
            .filter_map(|entry| entry.ok())
            .filter_map(|(cgroup, owner)| (owner == cookie).then_some(cgroup))
            .collect();
        for cgroup in owned {
            absent(self.cgroups.remove(&cgroup)).map_err(failed("CGROUPS"))?;
        }
        Ok(())
    }

    /// The last step out: nothing of it runs any more.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn forget(&mut self, cookie: u64) -> Result<(), CaptureError> {
        absent(self.pods.remove(&cookie)).map_err(failed("PODS"))?;
        self.disown(cookie)
    }

    /// The cookies of all pods that the kernel knows.
    pub fn enrolled(&self) -> BTreeSet<u64> {
        let owners = self.cgroups.iter().filter_map(|entry| Some(entry.ok()?.1));
        let pods = self.pods.keys().filter_map(Result::ok);
        pods.chain(owners).collect()
    }

    /// What was counted, over all CPUs, since the programs were first loaded.
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

/// The ring buffer of reports.
///
/// # Errors
/// It is not there.
pub fn events(ebpf: &mut Ebpf) -> Result<RingBuf<MapData>, CaptureError> {
    take(ebpf, "EVENTS")
}

/// Tells a pod's program its addresses and listeners.
///
/// # Errors
/// The kernel refuses; there are too many addresses.
pub fn fill_pod(
    ebpf: &mut Ebpf,
    addresses: &[IpAddr],
    listeners: &Listeners,
) -> Result<(), CaptureError> {
    let mut pod: Array<_, Addresses> = take(ebpf, "POD")?;
    pod.set(0, pack(addresses)?, 0).map_err(failed("POD"))?;
    let mut sockets: SockMap<MapData> = take(ebpf, "LISTENERS")?;
    for (place, socket) in [
        (listener::OUTBOUND, &listeners.outbound),
        (listener::INBOUND, &listeners.inbound),
        (listener::HBONE, &listeners.hbone),
    ] {
        sockets
            .set(place, &socket.as_raw_fd(), 0)
            .map_err(failed("LISTENERS"))?;
    }
    Ok(())
}

fn pack(addresses: &[IpAddr]) -> Result<Addresses, CaptureError> {
    if addresses.len() > ADDRESSES {
        return Err(CaptureError::TooManyAddresses(addresses.len()));
    }
    let mut packed = Addresses::default();
    for (place, address) in packed.all.iter_mut().zip(addresses) {
        *place = Ip::from(*address);
    }
    Ok(packed)
}

fn take<T: TryFrom<Map, Error = MapError>>(
    ebpf: &mut Ebpf,
    map: &'static str,
) -> Result<T, CaptureError> {
    let found = ebpf.take_map(map).ok_or(CaptureError::Map {
        map,
        why: "is not in the object".into(),
    })?;
    T::try_from(found).map_err(failed(map))
}

fn failed(map: &'static str) -> impl FnOnce(MapError) -> CaptureError {
    move |error| CaptureError::Map {
        map,
        why: chain(&error),
    }
}

/// What is not there is as good as removed.
fn absent(done: Result<(), MapError>) -> Result<(), MapError> {
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

/// An error with what caused it, in one line.
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

//! One pod's way in, and its way out. Each step is safe to be the last one before a crash.
//!
//! In: record, settings, room in the kernel's maps, listeners, program, routes; and last what makes of
//! one that leaves one that is captured: until then all that comes reaches the pod's app, and so nothing
//! is lost by a step that fails. Out: the same, backwards. So there is no route to `lo` without the program
//! that takes what comes by it: the pod's own app would get it, if it listens on that port.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use dataplane_ebpf::mark;
use dataplane_ebpf::pod::ADDRESSES;

use super::pins::{self, Pins};
use super::programs::{Loader, PodProgram};
use super::room::CaptureHandle;
use super::routing::Routing;
use super::undo::{UndoRecord, UndoRecords};
use super::wanted::Desired;
use super::{CaptureError, attached, routes};
use crate::mesh::workload::named;
use crate::seam::Listeners;
use crate::sys::netns::{Interfaces, Netns};
use crate::sys::socket;

/// Ports of the listeners in a pod: outbound, inbound in clear, HBONE.
pub const PORTS: [u16; 3] = [15001, 15006, 15008];

/// A pod that was entered.
pub struct PreparedPod {
    /// What the pod's own addresses are.
    pub addresses: Arc<[IpAddr]>,
    /// Its listeners.
    pub listeners: Listeners,
    /// Its program, attached.
    pub program: PodProgram,
    /// What it has on its interfaces.
    pub interfaces: Interfaces,
    /// What was put in place for them.
    pub routing: Routing,
}

/// Prepares the namespace, makes the listeners, and attaches the pod's program. Of a pod that was not
/// captured before nothing goes to the agent yet.
///
/// # Errors
/// The step that failed; what was done is undone by [`undo`].
pub async fn prepare(
    desired: &Desired,
    loader: &mut Loader,
    records: &UndoRecords,
    pins: &Pins,
    handle: &CaptureHandle,
) -> Result<PreparedPod, CaptureError> {
    let netns = &desired.netns;
    attached::refuse_in_pod(netns, desired.cookie, pins).await?;
    let interfaces = interfaces(netns)?;
    let found = routes::read_sysctls(netns)?;
    // A predecessor's record tells what was there before *it* came.
    let before = records.read(desired.cookie)?;
    let (sysctls, rest) = match before {
        Some(record) => (record.sysctls, record.rest),
        None => (found, BTreeMap::new()),
    };
    let record = UndoRecord {
        uid: desired.uid.clone(),
        cookie: desired.cookie,
        inode: netns.inode(),
        cgroup: desired.groups.first().map_or(0, |group| group.id),
        sysctls,
        rest,
    };
    records.write(&record)?;
    routes::set_sysctls(netns, record.sysctls.keys().map(|name| (name, "1")))?;
    // Before the program is there: it takes what is not known to be the pod's for somebody else's.
    let (addresses, routing) = update_addresses(desired.address_owner(), &interfaces, handle)?;
    let first = addresses.first().copied();
    handle
        .maps()
        .reserve(desired.cookie, first, &desired.groups)?;
    let listeners = listen(netns)?;
    let mut program = loader.pod(desired.cookie, first, Some(&listeners))?;
    program.attach(netns, &pins.pod(desired.cookie))?;
    routes::put(netns, &routing).await?;
    Ok(PreparedPod {
        addresses,
        listeners,
        program,
        interfaces,
        routing,
    })
}

/// Whose addresses are told to the kernel.
#[derive(Clone, Copy, Debug)]
pub struct AddressOwner<'a> {
    /// The workload's uid.
    pub uid: &'a str,
    /// The cookie of its network namespace.
    pub cookie: u64,
    /// The addresses that the mesh knows it by.
    pub known: &'a [IpAddr],
}

impl Desired {
    /// It, as far as its addresses go.
    pub fn address_owner(&self) -> AddressOwner<'_> {
        AddressOwner {
            uid: &self.uid,
            cookie: self.cookie,
            known: &self.addresses,
        }
    }
}

/// What the pod has on its interfaces now.
///
/// # Errors
/// Its namespace cannot be entered: that is no empty namespace.
pub fn interfaces(netns: &Netns) -> Result<Interfaces, CaptureError> {
    let interfaces = netns.interfaces();
    interfaces.map_err(|error| CaptureError::Namespace {
        what: "read addresses",
        why: error.to_string(),
    })
}

/// The addresses that the pod has on its interfaces, as many as are known to be its own: `known`, by which
/// the mesh knows it, first, since connections come from the first one of their family. One that it has
/// no more is not its own, whatever its object says, nor is one that the kernel does not use: somebody
/// else may have it.
pub fn addresses(known: &[IpAddr], interfaces: &Interfaces) -> Arc<[IpAddr]> {
    let others = interfaces.addresses.iter();
    let others = others.filter(|address| !known.contains(address));
    let known = known.iter();
    let known = known.filter(|address| interfaces.addresses.contains(address));
    let used = known
        .chain(others)
        .filter(|address| !interfaces.tentative.contains(address));
    used.copied().take(ADDRESSES).collect()
}

/// Whether the pod has the addresses that the mesh knows it by.
///
/// # Errors
/// One is on none of its interfaces.
pub fn check_known(desired: &Desired, interfaces: &Interfaces) -> Result<(), CaptureError> {
    let mut known = desired.addresses.iter();
    match known.find(|address| !interfaces.addresses.contains(address)) {
        None => Ok(()),
        Some(address) => Err(CaptureError::NoAddress(*address)),
    }
}

/// Tells the kernel what is the pod's own.
///
/// # Errors
/// The kernel refuses.
pub fn update_addresses(
    pod: AddressOwner<'_>,
    interfaces: &Interfaces,
    handle: &CaptureHandle,
) -> Result<(Arc<[IpAddr]>, Routing), CaptureError> {
    let addresses = addresses(pod.known, interfaces);
    let routing = Routing::of(&addresses, interfaces);
    let has = interfaces.addresses.len() - interfaces.tentative.len();
    if has > addresses.len() {
        tracing::warn!(
            pod = %named(pod.uid),
            has,
            known = addresses.len(),
            "pod has more addresses than are known to be its own; connections to the others are refused"
        );
    }
    if !interfaces.tentative.is_empty() {
        tracing::info!(
            pod = %named(pod.uid),
            addresses = ?interfaces.tentative,
            "pod has addresses that are not used: their duplicate address detection goes on, or has failed"
        );
    }
    let mut maps = handle.maps();
    maps.set_addresses(pod.cookie, &addresses, routing.interfaces())?;
    Ok((addresses, routing))
}

/// Listens in a namespace, for a pod.
///
/// # Errors
/// The namespace cannot be entered; no port is free; capabilities are missing.
pub fn listen(netns: &Netns) -> Result<Listeners, CaptureError> {
    let listen = || {
        let [outbound, inbound, hbone] = PORTS;
        Ok(Listeners {
            outbound: socket::listener(outbound, mark::CAPTURE)?,
            inbound: socket::listener(inbound, mark::AGENT)?,
            hbone: socket::listener(hbone, mark::AGENT)?,
        })
    };
    netns
        .enter(listen)
        .and_then(|result| result)
        .map_err(|error: std::io::Error| CaptureError::Namespace {
            what: "listen on 15001, 15006 and 15008",
            why: error.to_string(),
        })
}

/// Puts back what a record speaks of, in the namespace that is held of the pod, or in the one that
/// is found. Nothing of the pod may be captured any more.
///
/// # Errors
/// The step that failed, such as looking for the namespace; the record stays, and it can be tried again.
pub async fn undo(
    record: &UndoRecord,
    held: Option<&Netns>,
    records: &UndoRecords,
    pins: &Pins,
) -> Result<(), CaptureError> {
    let netns = match held {
        Some(netns) => Some(netns.clone()),
        None => record.netns()?,
    };
    if let Some(netns) = netns {
        routes::remove(&netns).await?;
        let values = record.sysctls.iter();
        routes::set_sysctls(&netns, values.map(|(name, value)| (name, value.as_str())))?;
        attached::detach_from_pod(&netns, pins)?;
    }
    pins::remove(&pins.pod(record.cookie))?;
    records.remove(record.cookie)
}

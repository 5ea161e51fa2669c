//! How one pod is enrolled, and how that is undone. An agent may crash after any step.
//!
//! Enrolment: record, settings, room in the kernel's maps, listeners, program, routes; the last step turns
//! the pod from leaving to captured. Until then all that comes reaches the pod's app, so a step that fails
//! costs no connection. Undoing goes backwards. So there is no route to `lo` without the program that takes
//! what comes by it: otherwise the pod's own app would get it, if it listens on that port.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use dataplane_ebpf::listener::ListenerKind;
use dataplane_ebpf::mark;
use dataplane_ebpf::pod::ADDRESSES;

use super::pins::{self, Pins};
use super::programs::{Loader, PodProgram};
use super::reconciler::CaptureHandle;
use super::routing::Routing;
use super::undo::{UndoRecord, UndoRecords};
use super::wanted::Desired;
use super::{CaptureError, attached, routes};
use crate::mesh::workload::named;
use crate::seam::Listeners;
use crate::sys::interfaces::Interfaces;
use crate::sys::limits;
use crate::sys::netns::Netns;
use crate::sys::{machine_id, socket};

/// The files that are open while a pod is enrolled; 19 of them stay so.
const FILES: u64 = 32;

/// A pod that is ready to be captured.
pub struct PreparedPod {
    /// The pod's own addresses.
    pub addresses: Arc<[IpAddr]>,
    /// The pod's listeners.
    pub listeners: Listeners,
    /// The pod's program, attached.
    pub program: PodProgram,
    /// The pod's interfaces and their addresses.
    pub interfaces: Interfaces,
    /// The rules and routes that were put in place for them.
    pub routing: Routing,
}

/// Refuses if the process may not open the files of one more pod: each step would fail in another way.
fn refuse_without_files() -> Result<(), CaptureError> {
    let (Ok(limit), Ok(open)) = (limits::files(), limits::open_files()) else {
        return Ok(()); // the steps fail if there are too few
    };
    has_room(open, limit)
}

fn has_room(open: u64, limit: u64) -> Result<(), CaptureError> {
    match open.saturating_add(FILES) <= limit {
        true => Ok(()),
        false => Err(CaptureError::Files {
            needed: FILES,
            limit,
        }),
    }
}

/// Prepares the namespace, makes the listeners, attaches the pod's program and sets its routes. A pod that
/// was not captured before still sends nothing to the agent.
///
/// # Errors
/// The step that failed; [`undo`] undoes what was done.
pub async fn prepare(
    desired: &Desired,
    loader: &mut Loader,
    records: &UndoRecords,
    pins: &Pins,
    handle: &CaptureHandle,
) -> Result<PreparedPod, CaptureError> {
    refuse_without_files()?;
    let netns = &desired.netns;
    attached::refuse_in_pod(netns, desired.cookie, pins).await?;
    let interfaces = interfaces(netns)?;
    let found = routes::read_sysctls(netns)?;
    // A predecessor's record says what was there before *it* changed it.
    let before = records.read(desired.cookie)?;
    let (identity, enrolled, sysctls, rest) = match before {
        Some(record) => (
            record.identity,
            record.enrolled,
            record.sysctls,
            record.rest,
        ),
        None => {
            let identity = Some(desired.identity_text());
            (identity, machine_id::uptime(), found, BTreeMap::new())
        }
    };
    let record = UndoRecord {
        uid: desired.uid.clone(),
        cookie: desired.cookie,
        inode: netns.inode(),
        identity,
        cgroup: desired.groups.first().map_or(0, |group| group.id),
        enrolled,
        sysctls,
        rest,
    };
    records.write(&record)?;
    routes::set_sysctls(netns, record.sysctls.keys().map(|name| (name, "1")))?;
    // Addresses must come before the program, which takes unknown ones for somebody else's.
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

/// A pod, as far as its addresses are concerned.
#[derive(Clone, Copy, Debug)]
pub struct AddressOwner<'a> {
    /// The workload's uid.
    pub uid: &'a str,
    /// The cookie of the pod's network namespace.
    pub cookie: u64,
    /// The addresses by which the mesh knows the pod.
    pub known: &'a [IpAddr],
}

impl Desired {
    /// Returns what [`update_addresses`] needs of the pod.
    pub fn address_owner(&self) -> AddressOwner<'_> {
        AddressOwner {
            uid: &self.uid,
            cookie: self.cookie,
            known: &self.addresses,
        }
    }
}

/// Reads the pod's interfaces and their addresses.
///
/// # Errors
/// The pod's namespace cannot be entered, which does not mean that it has none; or it has more than are read.
pub fn interfaces(netns: &Netns) -> Result<Interfaces, CaptureError> {
    let interfaces = Interfaces::of(netns);
    interfaces.map_err(|error| CaptureError::Namespace {
        what: "read addresses",
        why: error.to_string(),
    })
}

/// Returns the pod's own addresses, at most [`ADDRESSES`]: those on its interfaces, those of `known` first,
/// since connections come from the first one of their family. An address that is on no interface is not the
/// pod's, whatever its object says, nor is a tentative one: somebody else may have it.
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

/// Checks that the pod has the addresses by which the mesh knows it.
///
/// # Errors
/// One of them is on none of its interfaces.
pub fn check_known(desired: &Desired, interfaces: &Interfaces) -> Result<(), CaptureError> {
    let mut known = desired.addresses.iter();
    match known.find(|address| !interfaces.addresses.contains(address)) {
        None => Ok(()),
        Some(address) => Err(CaptureError::NoAddress(*address)),
    }
}

/// Writes the pod's own addresses and captured interfaces to the kernel. Returns the addresses, and the
/// routing for them.
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

/// Makes a pod's listeners in its namespace.
///
/// # Errors
/// The namespace cannot be entered; a port is taken; capabilities are missing.
pub fn listen(netns: &Netns) -> Result<Listeners, CaptureError> {
    let listen = || {
        Listeners::make(|kind| {
            let mark = match kind {
                ListenerKind::Outbound => mark::CAPTURE,
                ListenerKind::Inbound | ListenerKind::Hbone => mark::AGENT,
            };
            socket::listener(kind.port(), mark)
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

/// Undoes what a record describes, in the pod's held namespace, or else in the one that is found. The pod
/// must no longer be captured.
///
/// # Errors
/// The step that failed, such as finding the namespace; the record stays, and undoing can be tried again.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_finds_no_room_for_a_pods_files_is_told_the_limit() {
        assert!(has_room(100, 132).is_ok());
        let why = has_room(101, 132).expect_err("one is missing").to_string();
        assert!(
            why.starts_with("fewer than 32 of the 132 files that this process may open are left"),
            "{why}"
        );
    }
}

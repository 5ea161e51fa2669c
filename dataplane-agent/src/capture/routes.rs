//! Policy routes and settings in a pod's network namespace: what keeps marked packets inside.
//!
//! | mark | rule and table | route |
//! |---|---|---|
//! | CAPTURE | 15001 | `local default dev lo src <pod address>`, and the same for each interface |
//! | RETURN | 15006 | `local default dev lo` |
//!
//! The rules are masked: the application may set bits of its own.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

use dataplane_ebpf::mark;
use futures_util::TryStreamExt;
use netlink_packet_route::route::{RouteAttribute, RouteMessage, RouteScope, RouteType};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use rtnetlink::{Handle, IpVersion, LinkUnspec, RouteMessageBuilder};

use super::CaptureError;
use crate::sys::netns::{Interfaces, Netns};

/// Rule and table of captured connections.
const CAPTURE: u32 = 15001;
/// Rule and table of the agent's connections to the app.
const RETURN: u32 = 15006;
/// `lo`, in every namespace.
const LO: u32 = 1;

/// Settings that make what answers without a socket carry the mark of what it answers, and so stay
/// inside. Below `/proc/sys`.
const SYSCTLS: [&str; 3] = [
    "net/ipv4/tcp_fwmark_accept",
    "net/ipv4/fwmark_reflect",
    "net/ipv6/fwmark_reflect",
];

/// What [`set_sysctls`] will change, as it is now. Settings of a family that is not there are left out.
///
/// # Errors
/// The namespace cannot be entered; one cannot be read.
pub fn sysctls(netns: &Netns) -> Result<BTreeMap<String, String>, CaptureError> {
    let read = || {
        let mut found = BTreeMap::new();
        for name in SYSCTLS {
            match fs::read_to_string(Path::new("/proc/sys").join(name)) {
                Ok(value) => _ = found.insert(name.to_owned(), value.trim().to_owned()),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(found)
    };
    netns
        .enter(read)
        .and_then(|result| result)
        .map_err(namespace("read settings"))
}

/// Writes settings.
///
/// # Errors
/// The namespace cannot be entered; one cannot be written.
pub fn set_sysctls<'a>(
    netns: &Netns,
    values: impl IntoIterator<Item = (&'a String, &'a str)>,
) -> Result<(), CaptureError> {
    let write = || {
        for (name, value) in values {
            fs::write(Path::new("/proc/sys").join(name), value)?;
        }
        Ok(())
    };
    netns
        .enter(write)
        .and_then(|result| result)
        .map_err(namespace("write settings"))
}

/// Puts rules and routes in place; those that are there stay. `addresses` begin with those that
/// connections shall come from.
///
/// # Errors
/// The namespace cannot be entered; the kernel refuses.
pub async fn add(
    netns: &Netns,
    addresses: &[IpAddr],
    interfaces: &Interfaces,
) -> Result<(), CaptureError> {
    let v4 = addresses.iter().find_map(|address| match address {
        IpAddr::V4(v4) => Some(*v4),
        IpAddr::V6(_) => None,
    });
    let v6 = addresses.iter().find_map(|address| match address {
        IpAddr::V6(v6) => Some(*v6),
        IpAddr::V4(_) => None,
    });
    with(netns, "set routes", async |handle| {
        if let Some(source) = v4 {
            for (place, index) in outputs(interfaces) {
                ensure(handle, capture_v4(source, index, place)).await?;
            }
            ensure(handle, return_v4()).await?;
            rules(handle, IpVersion::V4).await?;
        }
        if let Some(source) = v6 {
            for (place, index) in outputs(interfaces) {
                ensure(handle, capture_v6(source, index, place)).await?;
            }
            ensure(handle, return_v6()).await?;
            rules(handle, IpVersion::V6).await?;
        }
        Ok(())
    })
    .await
}

/// Does in an empty namespace what is done in a pod's, for a loopback address: a kernel may have its
/// family, and not that one's policy routing.
///
/// # Errors
/// The namespace cannot be entered; what the kernel refuses.
pub async fn trial(netns: &Netns, address: IpAddr) -> Result<(), CaptureError> {
    let names = sysctls(netns)?;
    set_sysctls(netns, names.keys().map(|name| (name, "1")))?;
    if address.is_ipv6() {
        // The machine's default may be that namespaces begin without it; what a pod has is the pod's.
        let disabled = "net/ipv6/conf/all/disable_ipv6".to_owned();
        set_sysctls(netns, [(&disabled, "0")])?;
    }
    with(netns, "set lo up", async |handle| {
        let up = LinkUnspec::new_with_index(LO).up().build();
        handle.link().set(up).execute().await
    })
    .await?;
    add(netns, &[address], &Interfaces::default()).await
}

/// Takes rules and routes away, however far [`add`] came.
///
/// # Errors
/// The namespace cannot be entered; the kernel refuses.
pub async fn remove(netns: &Netns) -> Result<(), CaptureError> {
    with(netns, "remove routes", async |handle| {
        for version in [IpVersion::V4, IpVersion::V6] {
            let rules: Vec<RuleMessage> = match handle
                .rule()
                .get(version.clone())
                .execute()
                .try_collect()
                .await
            {
                Ok(rules) => rules,
                Err(error) if is(&error, libc::EAFNOSUPPORT) || is(&error, libc::EOPNOTSUPP) => {
                    continue;
                }
                Err(error) => return Err(error),
            };
            for rule in rules.into_iter().filter(is_ours) {
                handle.rule().del(rule).execute().await?;
            }
            let all = match version {
                IpVersion::V4 => RouteMessageBuilder::<Ipv4Addr>::new().build(),
                IpVersion::V6 => RouteMessageBuilder::<Ipv6Addr>::new().build(),
            };
            let routes: Vec<RouteMessage> = handle.route().get(all).execute().try_collect().await?;
            for route in routes.into_iter().filter(|route| table_of(route).is_some()) {
                match handle.route().del(route).execute().await {
                    // Gone with its interface.
                    Err(error) if is(&error, libc::ESRCH) => {}
                    done => done?,
                }
            }
        }
        Ok(())
    })
    .await
}

/// `lo` first, then the pod's interfaces: a socket that is bound to one is captured as well.
fn outputs(interfaces: &Interfaces) -> impl Iterator<Item = (u32, u32)> + '_ {
    let all = std::iter::once(LO).chain(interfaces.indices.iter().copied());
    (1..).zip(all)
}

fn capture_v4(source: Ipv4Addr, output: u32, metric: u32) -> RouteMessage {
    RouteMessageBuilder::<Ipv4Addr>::new()
        .table_id(CAPTURE)
        .kind(RouteType::Local)
        .scope(RouteScope::Host)
        .output_interface(output)
        .pref_source(source)
        .priority(metric)
        .build()
}

fn capture_v6(source: Ipv6Addr, output: u32, metric: u32) -> RouteMessage {
    RouteMessageBuilder::<Ipv6Addr>::new()
        .table_id(CAPTURE)
        .kind(RouteType::Local)
        .output_interface(output)
        .pref_source(source)
        .priority(metric)
        .build()
}

fn return_v4() -> RouteMessage {
    RouteMessageBuilder::<Ipv4Addr>::new()
        .table_id(RETURN)
        .kind(RouteType::Local)
        .scope(RouteScope::Host)
        .output_interface(LO)
        .build()
}

fn return_v6() -> RouteMessage {
    RouteMessageBuilder::<Ipv6Addr>::new()
        .table_id(RETURN)
        .kind(RouteType::Local)
        .output_interface(LO)
        .build()
}

async fn ensure(handle: &Handle, route: RouteMessage) -> Result<(), rtnetlink::Error> {
    there(handle.route().add(route).execute().await)
}

async fn rules(handle: &Handle, version: IpVersion) -> Result<(), rtnetlink::Error> {
    for (number, mark) in [(CAPTURE, mark::CAPTURE), (RETURN, mark::RETURN)] {
        let rule = handle
            .rule()
            .add()
            .table_id(number)
            .priority(number)
            .fw_mark(mark)
            .action(RuleAction::ToTable);
        let done = match version {
            IpVersion::V4 => {
                let mut rule = rule.v4();
                rule.message_mut()
                    .attributes
                    .push(RuleAttribute::FwMask(mark::MASK));
                rule.execute().await
            }
            IpVersion::V6 => {
                let mut rule = rule.v6();
                rule.message_mut()
                    .attributes
                    .push(RuleAttribute::FwMask(mark::MASK));
                rule.execute().await
            }
        };
        there(done)?;
    }
    Ok(())
}

fn is_ours(rule: &RuleMessage) -> bool {
    [(CAPTURE, mark::CAPTURE), (RETURN, mark::RETURN)]
        .into_iter()
        .any(|(number, mark)| {
            let has = |attribute: RuleAttribute| rule.attributes.contains(&attribute);
            has(RuleAttribute::Priority(number))
                && has(RuleAttribute::FwMark(mark))
                && has(RuleAttribute::FwMask(mark::MASK))
        })
}

fn table_of(route: &RouteMessage) -> Option<u32> {
    route
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Table(table) if [CAPTURE, RETURN].contains(table) => Some(*table),
            _ => None,
        })
}

/// What is there already is as good as made.
fn there(done: Result<(), rtnetlink::Error>) -> Result<(), rtnetlink::Error> {
    match done {
        Err(error) if is(&error, libc::EEXIST) => Ok(()),
        done => done,
    }
}

fn is(error: &rtnetlink::Error, errno: i32) -> bool {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.raw_code() == -errno,
        _ => false,
    }
}

/// Runs `work` with a netlink socket of the namespace, which is closed at the end.
async fn with(
    netns: &Netns,
    what: &'static str,
    work: impl AsyncFnOnce(&Handle) -> Result<(), rtnetlink::Error>,
) -> Result<(), CaptureError> {
    let (connection, handle, _) = netns
        .enter(rtnetlink::new_connection)
        .and_then(|result| result)
        .map_err(namespace(what))?;
    tokio::select! {
        // Ends only when all handles are gone, and ours is not.
        () = connection => Err(CaptureError::Namespace { what, why: "the netlink socket closed".into() }),
        done = work(&handle) => done.map_err(|error| CaptureError::Namespace { what, why: error.to_string() }),
    }
}

fn namespace(what: &'static str) -> impl FnOnce(io::Error) -> CaptureError {
    move |error| CaptureError::Namespace {
        what,
        why: error.to_string(),
    }
}

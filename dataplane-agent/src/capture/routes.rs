//! Puts rules, routes and settings in place in a pod's network namespace, and takes them away.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::future::ready;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

use dataplane_ebpf::mark;
use futures_util::TryStreamExt;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteMessage, RouteScope, RouteType,
};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage};
use rtnetlink::{Handle, IpVersion, LinkUnspec, RouteMessageBuilder};

use super::CaptureError;
use super::routing::{CAPTURE, LO, LOCAL, PREFERENCE, RETURN, Route, Routing, Rule, RuleKind};
use crate::sys::netns::{Interfaces, Netns};

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

/// Makes rules and routes what they are to be, and says what was not there.
///
/// # Errors
/// The namespace cannot be entered; the kernel refuses.
pub async fn put(netns: &Netns, want: &Routing) -> Result<Routing, CaptureError> {
    let done = with(netns, "set routes", async |handle| {
        let (is, first) = read(handle, want).await?;
        let lacks = want.lacks(&is);
        // What fails for one family is no reason to leave the other without.
        let mut done = Ok(());
        for route in &lacks.routes {
            let request = handle.route().add(message(route)).replace();
            done = done.and(request.execute().await);
        }
        for rule in &lacks.rules {
            done = done.and(there(add_rule(handle, rule).await));
        }
        for route in want.stale(&is) {
            done = done.and(gone(handle.route().del(message(&route)).execute().await));
        }
        done.map(|()| (lacks, first))
    });
    let (lacks, first) = done.await?;
    match first {
        true => Ok(lacks),
        false => Err(CaptureError::Namespace {
            what: "put rules before all others",
            why: "another rule of preference 0 was there first, and what is captured would leave by it".into(),
        }),
    }
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
    let routing = Routing::of(&[address], &Interfaces::default());
    put(netns, &routing).await.map(|_| ())
}

/// Takes rules and routes away, however far [`put`] came.
///
/// # Errors
/// The namespace cannot be entered; the kernel refuses.
pub async fn remove(netns: &Netns) -> Result<(), CaptureError> {
    with(netns, "remove routes", async |handle| {
        for version in [IpVersion::V4, IpVersion::V6] {
            for rule in rules(handle, version.clone()).await?.ours {
                gone(handle.rule().del(rule).execute().await)?;
            }
            for route in routes(handle, version).await? {
                // It may have gone with its interface.
                gone(handle.route().del(route).execute().await)?;
            }
        }
        Ok(())
    })
    .await
}

/// What there is of ours, of the families that are wanted; and whether our rules are, or will be, before
/// all that could take their packets elsewhere.
async fn read(handle: &Handle, want: &Routing) -> Result<(Routing, bool), rtnetlink::Error> {
    let (mut is, mut first) = (Routing::default(), true);
    for (v4, version) in [(true, IpVersion::V4), (false, IpVersion::V6)] {
        if want.has(v4) {
            let rules = rules(handle, version.clone()).await?;
            first &= rules.hidden.is_empty();
            is.rules.extend(rules.ours.iter().filter_map(rule_of));
            let routes = routes(handle, version).await?;
            is.routes.extend(routes.iter().filter_map(route_of));
        }
    }
    Ok((is, first))
}

/// The rules of a family.
#[derive(Default)]
struct Rules {
    ours: Vec<RuleMessage>,
    /// Those of ours before which there is another one that their packets fit: the kernel puts a rule
    /// after all that have its preference.
    hidden: BTreeSet<RuleKind>,
}

/// All rules of a family that are ours; none where the kernel does not have it.
async fn rules(handle: &Handle, version: IpVersion) -> Result<Rules, rtnetlink::Error> {
    let all = handle.rule().get(version).execute();
    // Of however many there are of the pod's own none is kept.
    let rules = all.try_fold(Rules::default(), |mut rules, rule| {
        if rule_of(&rule).is_some() {
            rules.ours.push(rule);
        } else {
            let found = |kind: &RuleKind| {
                let mut ours = rules.ours.iter().filter_map(rule_of);
                ours.any(|rule| rule.kind == *kind)
            };
            let hidden = RuleKind::ALL.into_iter();
            let hidden = hidden.filter(|kind| !found(kind) && hides(&rule, kind.mark()));
            rules.hidden.extend(hidden.collect::<Vec<_>>());
        }
        ready(Ok(rules))
    });
    match rules.await {
        Err(error) if is(&error, libc::EAFNOSUPPORT) || is(&error, libc::EOPNOTSUPP) => {
            Ok(Rules::default())
        }
        rules => rules,
    }
}

/// Whether a rule of somebody else's has our preference, and may fit packets of this mark that begin in
/// the namespace; that for the kernel's local addresses takes nothing of ours.
fn hides(rule: &RuleMessage, of: u32) -> bool {
    let (mut preference, mut table) = (0, u32::from(rule.header.table));
    let (mut mark, mut mask, mut comes_in) = (0, 0, false);
    for attribute in &rule.attributes {
        match attribute {
            RuleAttribute::Priority(is) => preference = *is,
            RuleAttribute::Table(is) => table = *is,
            RuleAttribute::FwMark(is) => mark = *is,
            RuleAttribute::FwMask(is) => mask = *is,
            RuleAttribute::Iifname(name) => comes_in = name != "lo",
            _ => {}
        }
    }
    let inverted = rule.header.flags.contains(RuleFlags::Invert);
    let fits = !comes_in && (mark ^ of) & mask & mark::MASK == 0;
    preference == PREFERENCE && table != LOCAL && (fits || inverted)
}

/// All routes of a family that are in our tables.
async fn routes(
    handle: &Handle,
    version: IpVersion,
) -> Result<Vec<RouteMessage>, rtnetlink::Error> {
    let all = match version {
        IpVersion::V4 => RouteMessageBuilder::<Ipv4Addr>::new().build(),
        IpVersion::V6 => RouteMessageBuilder::<Ipv6Addr>::new().build(),
    };
    let all = handle.route().get(all).execute();
    let ours = all.try_filter(|route| ready(table_of(route).is_some()));
    ours.try_collect().await
}

/// The netlink message of a route.
fn message(route: &Route) -> RouteMessage {
    let mut message = RouteMessageBuilder::<Ipv4Addr>::new()
        .table_id(route.table)
        .kind(RouteType::Local)
        .output_interface(route.output)
        .priority(route.output)
        .build();
    if route.v4 {
        message.header.scope = RouteScope::Host;
    } else {
        message.header.address_family = AddressFamily::Inet6;
    }
    if let Some(source) = route.source {
        let source = match source {
            IpAddr::V4(v4) => RouteAddress::Inet(v4),
            IpAddr::V6(v6) => RouteAddress::Inet6(v6),
        };
        message.attributes.push(RouteAttribute::PrefSource(source));
    }
    message
}

/// Which of ours a route is, if it is one.
fn route_of(message: &RouteMessage) -> Option<Route> {
    let mut route = Route {
        v4: message.header.address_family == AddressFamily::Inet,
        table: table_of(message)?,
        output: 0,
        source: None,
    };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(output) => route.output = *output,
            RouteAttribute::PrefSource(RouteAddress::Inet(v4)) => route.source = Some((*v4).into()),
            RouteAttribute::PrefSource(RouteAddress::Inet6(v6)) => {
                route.source = Some((*v6).into());
            }
            _ => {}
        }
    }
    let local = message.header.kind == RouteType::Local;
    (local && message.header.destination_prefix_length == 0).then_some(route)
}

async fn add_rule(handle: &Handle, rule: &Rule) -> Result<(), rtnetlink::Error> {
    let request = handle
        .rule()
        .add()
        .priority(PREFERENCE)
        .fw_mark(rule.kind.mark())
        .table_id(rule.kind.table())
        .action(RuleAction::ToTable);
    let masked = RuleAttribute::FwMask(mark::MASK);
    if rule.v4 {
        let mut request = request.v4();
        request.message_mut().attributes.push(masked);
        request.execute().await
    } else {
        let mut request = request.v6();
        request.message_mut().attributes.push(masked);
        request.execute().await
    }
}

/// Which of ours a rule is, if it is one, whatever its place.
fn rule_of(message: &RuleMessage) -> Option<Rule> {
    let has = |attribute: RuleAttribute| message.attributes.contains(&attribute);
    let kind = RuleKind::ALL.into_iter().find(|kind| {
        message.header.action == RuleAction::ToTable
            && has(RuleAttribute::Table(kind.table()))
            && has(RuleAttribute::FwMark(kind.mark()))
            && has(RuleAttribute::FwMask(mark::MASK))
    })?;
    Some(Rule {
        v4: message.header.family == AddressFamily::Inet,
        kind,
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

/// What is not there is as good as taken away.
fn gone(done: Result<(), rtnetlink::Error>) -> Result<(), rtnetlink::Error> {
    match done {
        Err(error) if is(&error, libc::ESRCH) || is(&error, libc::ENOENT) => Ok(()),
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
async fn with<T>(
    netns: &Netns,
    what: &'static str,
    work: impl AsyncFnOnce(&Handle) -> Result<T, rtnetlink::Error>,
) -> Result<T, CaptureError> {
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

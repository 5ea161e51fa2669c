//! Adds rules, routes and settings in a pod's network namespace, and removes them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::ops::ControlFlow;
use std::path::Path;

use dataplane_ebpf::mark;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteMessage, RouteScope, RouteType,
};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::{Handle, LinkUnspec, RouteMessageBuilder};

use super::CaptureError;
use super::routing::{CAPTURE, LO, LOCAL, PREFERENCE, RETURN, Route, Routing, Rule, RuleKind};
use crate::sys::dump::dump;
use crate::sys::interfaces::{self, Interfaces};
use crate::sys::netns::Netns;
use crate::sys::processes;

/// Settings below `/proc/sys` by which packets that are sent without a socket carry the mark of the packet
/// that they answer, and so stay inside.
const SYSCTLS: [&str; 3] = [
    "net/ipv4/tcp_fwmark_accept",
    "net/ipv4/fwmark_reflect",
    "net/ipv6/fwmark_reflect",
];

/// Reads the settings that [`set_sysctls`] will change. Settings of a family that the kernel lacks are left out.
///
/// # Errors
/// The namespace cannot be entered; a setting cannot be read.
pub fn read_sysctls(netns: &Netns) -> Result<BTreeMap<String, String>, CaptureError> {
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

/// Settings that make a namespace forward, below `/proc/sys`.
const FORWARDING: [&str; 2] = ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"];

/// Returns `true` if the pod has several interfaces with addresses and forwards between them. A new namespace
/// takes the machine's setting, which says nothing of a pod with only one.
///
/// # Errors
/// The namespace cannot be entered; a setting cannot be read.
pub fn forwards(netns: &Netns, interfaces: &Interfaces) -> io::Result<bool> {
    let used = interfaces.links.values().filter(|own| !own.is_empty());
    if used.count() < 2 {
        return Ok(false);
    }
    netns.enter(|| {
        let mut on = false;
        for name in FORWARDING {
            match fs::read_to_string(Path::new("/proc/sys").join(name)) {
                Ok(value) => on |= value.trim() != "0",
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(on)
    })?
}

/// Writes settings.
///
/// # Errors
/// The namespace cannot be entered; a setting cannot be written.
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

/// Adds missing rules and routes, and removes stale routes. Returns what was missing.
///
/// # Errors
/// The namespace cannot be entered; the kernel refuses; other rules come before ours.
pub async fn put(netns: &Netns, want: &Routing) -> Result<Routing, CaptureError> {
    let (is, hidden) = read(netns, want).map_err(namespace("read rules and routes"))?;
    let done = with_netlink(netns, "set routes", async |handle| {
        let missing = want.missing_from(&is);
        // An error for one family does not keep the other from its rules and routes.
        let mut done = Ok(());
        for route in &missing.routes {
            let request = handle.route().add(route_message(route)).replace();
            done = done.and(request.execute().await);
        }
        for rule in &missing.rules {
            let mut request = handle.rule().add();
            *request.message_mut() = rule_message(rule);
            done = done.and(ignore_exists(request.execute().await));
        }
        for route in want.stale(&is) {
            done = done.and(ignore_missing(
                handle.route().del(route_message(&route)).execute().await,
            ));
        }
        done.map(|()| missing)
    });
    let missing = done.await?;
    match hidden {
        None => Ok(missing),
        Some(why) => Err(CaptureError::Namespace {
            what: "put rules and routes before all others",
            why,
        }),
    }
}

/// Tries in an empty namespace what is done in a pod's, for a loopback address: a kernel may have a family
/// without its policy routing.
///
/// # Errors
/// The namespace cannot be entered; the kernel refuses.
pub async fn trial(netns: &Netns, address: IpAddr) -> Result<(), CaptureError> {
    let names = read_sysctls(netns)?;
    set_sysctls(netns, names.keys().map(|name| (name, "1")))?;
    if address.is_ipv6() {
        // Namespaces may begin without IPv6 by the machine's default, which says nothing of pods.
        let disabled = "net/ipv6/conf/all/disable_ipv6".to_owned();
        set_sysctls(netns, [(&disabled, "0")])?;
    }
    with_netlink(netns, "set lo up", async |handle| {
        let up = LinkUnspec::new_with_index(LO).up().build();
        handle.link().set(up).execute().await
    })
    .await?;
    let routing = Routing::of(&[address], &Interfaces::default());
    put(netns, &routing).await.map(|_| ())
}

/// Removes all rules and routes that [`put`] has made, even in part.
///
/// # Errors
/// The namespace cannot be entered; the kernel refuses.
pub async fn remove(netns: &Netns) -> Result<(), CaptureError> {
    let what = "remove routes";
    with_netlink(netns, what, async |handle| {
        for v4 in [true, false] {
            for kind in RuleKind::ALL {
                let rule = rule_message(&Rule { v4, kind });
                ignore_missing(handle.rule().del(rule).execute().await)?;
            }
        }
        Ok(())
    })
    .await?;
    // By what they are, however many others are in these tables.
    let links = interfaces::indices(netns).map_err(namespace(what))?;
    let ours = [(CAPTURE, LO), (RETURN, LO)].into_iter();
    let ours = ours.chain(links.into_iter().map(|link| (CAPTURE, link)));
    with_netlink(netns, what, async |handle| {
        for (table, output) in ours {
            for v4 in [true, false] {
                let route = route_message(&Route {
                    v4,
                    table,
                    output,
                    source: None, // whatever it is
                });
                // The route may have gone with its interface.
                ignore_missing(handle.route().del(route).execute().await)?;
            }
        }
        Ok(())
    })
    .await?;
    Ok(())
}

/// Counts the network namespaces of this machine that have rules of ours.
///
/// # Errors
/// The machine's namespaces cannot be listed, or one cannot be searched.
pub fn namespaces_with_rules() -> Result<usize, CaptureError> {
    let look = || {
        let mut count = 0;
        for found in processes::namespaces()?.namespaces.values() {
            // A namespace that went away has no rules; one that a user made may have any.
            let Ok(netns) = Netns::open(&found.path) else {
                continue;
            };
            if netns.is_the_hosts()? {
                let none =
                    rules(&netns, true)?.ours.is_empty() && rules(&netns, false)?.ours.is_empty();
                count += usize::from(!none);
            }
        }
        Ok(count)
    };
    look().map_err(namespace("look for rules"))
}

/// Reads our rules and routes, of the wanted families. The text says why others come, or may come, before them.
fn read(netns: &Netns, want: &Routing) -> io::Result<(Routing, Option<String>)> {
    let (mut is, mut hidden) = (Routing::default(), None);
    for v4 in [true, false] {
        if want.has(v4) {
            let rules = rules(netns, v4)?;
            hidden = hidden.or(rules.hidden);
            let ours = rules.ours.into_iter().map(|kind| Rule { v4, kind });
            is.rules.extend(ours);
            let routes = routes(netns, v4)?;
            let mut wanted = want.routes.iter().filter(|route| route.v4 == v4);
            let lacks = wanted.any(|route| !routes.ours.contains(route));
            hidden = hidden.or(routes.hidden.filter(|_| lacks));
            is.routes.extend(routes.ours);
        }
    }
    Ok((is, hidden))
}

/// The rules of one family.
#[derive(Default)]
struct Rules {
    /// Our rules that are in their place.
    ours: BTreeSet<RuleKind>,
    /// Why another rule that matches the same packets comes before one of ours, or would: the kernel adds a
    /// rule after all of its preference.
    hidden: Option<String>,
}

/// How many of others' rules with our preference, or of others' local routes in one of our tables, are read before
/// ours, for each family.
const OTHERS: usize = 1024;

/// Reads the rules of a family up to ours, however many others follow; none if the kernel lacks the family.
fn rules(netns: &Netns, v4: bool) -> io::Result<Rules> {
    let mut of = RuleMessage::default();
    of.header.family = family(v4);
    let mut rules = Rules::default();
    let mut others = 0;
    let each = |message| {
        let RouteNetlinkMessage::NewRule(rule) = message else {
            return ControlFlow::Continue(());
        };
        // The kernel sends rules in the order of their preferences.
        if preference(&rule) > PREFERENCE {
            return ControlFlow::Break(());
        }
        if let Some(kind) = kind_of(&rule) {
            rules.ours.insert(kind);
        } else {
            others += 1;
            let mut after = RuleKind::ALL.into_iter();
            if after.any(|kind| !rules.ours.contains(&kind) && hides(&rule, kind.mark())) {
                let why = "another rule of preference 0 was there first, and what is captured would leave by it";
                rules.hidden = Some(why.into());
            } else if others > OTHERS {
                let why =
                    format!("more than {OTHERS} other rules of preference 0 were there first");
                rules.hidden = Some(why);
            }
        }
        // Later rules take none of our packets.
        match rules.hidden.is_some() || rules.ours.len() == RuleKind::ALL.len() {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    };
    ignore_no_table(dump(netns, RouteNetlinkMessage::GetRule(of), each))?;
    Ok(rules)
}

/// Returns `true` if another's rule may match packets of this mark that begin in the namespace. The kernel's
/// rule for local addresses does not count: it takes none of ours.
fn hides(rule: &RuleMessage, of: u32) -> bool {
    let mut table = u32::from(rule.header.table);
    let (mut mark, mut mask, mut comes_in) = (0, 0, false);
    for attribute in &rule.attributes {
        match attribute {
            RuleAttribute::Table(is) => table = *is,
            RuleAttribute::FwMark(is) => mark = *is,
            RuleAttribute::FwMask(is) => mask = *is,
            RuleAttribute::Iifname(name) => comes_in = name != "lo",
            _ => {}
        }
    }
    let inverted = rule.header.flags.contains(RuleFlags::Invert);
    let fits = !comes_in && (mark ^ of) & mask & mark::MASK == 0;
    table != LOCAL && (fits || inverted)
}

/// Returns a rule's preference; the kernel omits 0.
fn preference(rule: &RuleMessage) -> u32 {
    let mut attributes = rule.attributes.iter();
    let is = attributes.find_map(|attribute| match attribute {
        RuleAttribute::Priority(is) => Some(*is),
        _ => None,
    });
    is.unwrap_or_default()
}

/// The routes of one family in our tables.
#[derive(Default)]
struct Routes {
    /// Those that may be ours.
    ours: Vec<Route>,
    /// Why ours are not known: there are too many others.
    hidden: Option<String>,
}

/// Reads our routes of a family; none if the kernel lacks the family. The kernel is asked for the local routes of
/// our tables only.
fn routes(netns: &Netns, v4: bool) -> io::Result<Routes> {
    let mut routes = Routes::default();
    for table in [CAPTURE, RETURN] {
        let mut of = RouteMessage::default();
        of.header.address_family = family(v4);
        of.header.kind = RouteType::Local;
        of.attributes.push(RouteAttribute::Table(table));
        let mut others = 0;
        let each = |message| {
            let RouteNetlinkMessage::NewRoute(route) = message else {
                return ControlFlow::Continue(());
            };
            if let Some(ours) = route_of(&route)
                && (ours.v4, ours.table) == (v4, table)
            {
                routes.ours.push(ours);
            } else {
                others += 1;
            }
            match others > OTHERS {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            }
        };
        ignore_no_table(dump(netns, RouteNetlinkMessage::GetRoute(of), each))?;
        if others > OTHERS {
            let why = format!("more than {OTHERS} other local routes are in table {table}");
            routes.hidden = Some(why);
        }
    }
    Ok(routes)
}

fn family(v4: bool) -> AddressFamily {
    match v4 {
        true => AddressFamily::Inet,
        false => AddressFamily::Inet6,
    }
}

/// Returns the netlink message of a route.
fn route_message(route: &Route) -> RouteMessage {
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

/// Returns our route for a netlink message, if it is one.
fn route_of(message: &RouteMessage) -> Option<Route> {
    let mut route = Route {
        v4: message.header.address_family == AddressFamily::Inet,
        table: table_of(message)?,
        output: 0,
        source: None,
    };
    let mut metric = 0;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(output) => route.output = *output,
            RouteAttribute::Priority(is) => metric = *is,
            RouteAttribute::PrefSource(RouteAddress::Inet(v4)) => route.source = Some((*v4).into()),
            RouteAttribute::PrefSource(RouteAddress::Inet6(v6)) => {
                route.source = Some((*v6).into());
            }
            _ => {}
        }
    }
    let local = message.header.kind == RouteType::Local;
    let everywhere = message.header.destination_prefix_length == 0;
    (local && everywhere && metric == route.output).then_some(route)
}

/// Returns the netlink message of a rule.
fn rule_message(rule: &Rule) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = family(rule.v4);
    message.header.action = RuleAction::ToTable;
    message.attributes = vec![
        RuleAttribute::Priority(PREFERENCE),
        RuleAttribute::Table(rule.kind.table()),
        RuleAttribute::FwMark(rule.kind.mark()),
        RuleAttribute::FwMask(mark::MASK),
    ];
    message
}

/// Returns which of our rules a netlink message is, if it is one.
fn kind_of(message: &RuleMessage) -> Option<RuleKind> {
    let has = |attribute: RuleAttribute| message.attributes.contains(&attribute);
    RuleKind::ALL.into_iter().find(|kind| {
        message.header.action == RuleAction::ToTable
            && has(RuleAttribute::Table(kind.table()))
            && has(RuleAttribute::FwMark(kind.mark()))
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

/// Counts what already exists as made.
fn ignore_exists(done: Result<(), rtnetlink::Error>) -> Result<(), rtnetlink::Error> {
    match done {
        Err(error) if is(&error, libc::EEXIST) => Ok(()),
        done => done,
    }
}

/// Counts what is missing as removed, also where the kernel lacks the family.
fn ignore_missing(done: Result<(), rtnetlink::Error>) -> Result<(), rtnetlink::Error> {
    let none = [
        libc::ESRCH,
        libc::ENOENT,
        libc::EAFNOSUPPORT,
        libc::EOPNOTSUPP,
    ];
    match done {
        Err(error) if none.iter().any(|errno| is(&error, *errno)) => Ok(()),
        done => done,
    }
}

/// Counts a missing table, or a family that the kernel lacks, as an empty dump.
fn ignore_no_table(told: io::Result<()>) -> io::Result<()> {
    let none = [libc::ENOENT, libc::EAFNOSUPPORT, libc::EOPNOTSUPP];
    match told {
        Err(error) if none.map(Some).contains(&error.raw_os_error()) => Ok(()),
        told => told,
    }
}

fn is(error: &rtnetlink::Error, errno: i32) -> bool {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.raw_code() == -errno,
        _ => false,
    }
}

/// Runs `work` with a netlink socket in the namespace, and closes it at the end.
async fn with_netlink<T>(
    netns: &Netns,
    what: &'static str,
    work: impl AsyncFnOnce(&Handle) -> Result<T, rtnetlink::Error>,
) -> Result<T, CaptureError> {
    let (connection, handle, _) = netns
        .enter(rtnetlink::new_connection)
        .and_then(|result| result)
        .map_err(namespace(what))?;
    tokio::select! {
        // It ends only when all handles are gone, and we hold one.
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

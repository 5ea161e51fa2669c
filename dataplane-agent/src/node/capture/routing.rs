//! The rules and routes that keep marked packets inside a pod, as data.
//!
//! | mark | preference | table | route |
//! |---|---|---|---|
//! | CAPTURE | 0 | 15001 | `local default dev lo src <pod address>`, and the same for each interface |
//! | RETURN | 0 | 15006 | `local default dev lo` |
//!
//! A rule without a preference gets one before the second existing rule, so ours stay before those that an
//! app or a CNI plugin adds later only at preference 0. Rules are masked, since the application may set bits
//! of its own.
//!
//! An interface's route has the interface's first own address as its source. The kernel takes what comes to
//! an address as received by the interface that has it, so with another source the answer would not reach a
//! socket that is bound to the interface. An interface without an address has no route, and the connect hook
//! refuses at once a socket that is bound to it.

use std::collections::BTreeSet;
use std::net::IpAddr;

use dataplane_ebpf::address::Ip;
use dataplane_ebpf::mark;
use dataplane_ebpf::pod::ADDRESSES;

use crate::sys::interfaces::Interfaces;

/// The table of captured connections.
pub const CAPTURE: u32 = 15001;
/// The table of the agent's connections to the app.
pub const RETURN: u32 = 15006;
/// The table of the namespace's own addresses (`RT_TABLE_LOCAL`).
pub const LOCAL: u32 = 255;
/// The index of `lo`, in every namespace.
pub const LO: u32 = 1;
/// The preference of our rules.
pub const PREFERENCE: u32 = 0;

/// The rules and routes of one pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Routing {
    /// The rules.
    pub rules: BTreeSet<Rule>,
    /// The routes.
    pub routes: BTreeSet<Route>,
}

/// A policy rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rule {
    /// `true` for IPv4, `false` for IPv6.
    pub v4: bool,
    /// The kind of rule.
    pub kind: RuleKind,
}

/// The kinds of rules; each family has one of each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum RuleKind {
    /// Captured connections use the table [`CAPTURE`].
    Capture,
    /// Connections between agent and app use the table [`RETURN`].
    Return,
}

/// A route to everywhere, `local default dev <output> src <source>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Route {
    /// `true` for IPv4, `false` for IPv6.
    pub v4: bool,
    /// [`CAPTURE`] or [`RETURN`].
    pub table: u32,
    /// The interface's index; also the route's metric, so that `lo` comes first.
    pub output: u32,
    /// The source address of a connection that is not bound to one.
    pub source: Option<IpAddr>,
}

impl RuleKind {
    /// All kinds.
    pub const ALL: [Self; 2] = [Self::Capture, Self::Return];

    /// Returns the mark that the rule matches.
    pub fn mark(self) -> u32 {
        match self {
            Self::Capture => mark::CAPTURE,
            Self::Return => mark::RETURN,
        }
    }

    /// Returns the table that the rule selects.
    pub fn table(self) -> u32 {
        match self {
            Self::Capture => CAPTURE,
            Self::Return => RETURN,
        }
    }
}

impl Route {
    /// Returns `true` if adding this route replaces the other one.
    pub fn replaces(&self, other: &Self) -> bool {
        (self.v4, self.table, self.output) == (other.v4, other.table, other.output)
    }
}

impl Routing {
    /// Returns the rules and routes for a pod with these addresses and interfaces. The first address of each
    /// family is the default source.
    pub fn of(addresses: &[IpAddr], interfaces: &Interfaces) -> Self {
        let mut routing = Self::default();
        for v4 in [true, false] {
            let first = |of: &[IpAddr]| of.iter().find(|address| address.is_ipv4() == v4).copied();
            let Some(source) = first(addresses) else {
                continue;
            };
            routing
                .rules
                .extend(RuleKind::ALL.map(|kind| Rule { v4, kind }));
            let known = |own: &IpAddr| own.is_ipv4() == v4 && addresses.contains(own);
            let captured = |output, source| Route {
                v4,
                table: CAPTURE,
                output,
                source: Some(source),
            };
            routing.routes.insert(captured(LO, source));
            let links = interfaces.links.iter().filter_map(|(&index, own)| {
                let source = own.iter().copied().find(known)?;
                Some(captured(index, source))
            });
            routing.routes.extend(links.take(ADDRESSES));
            routing.routes.insert(Route {
                v4,
                table: RETURN,
                output: LO,
                source: None,
            });
        }
        routing
    }

    /// Returns the interfaces by which the pod is captured, as keys of the kernel programs.
    pub fn interfaces(&self) -> impl Iterator<Item = Ip> {
        let captured = self.routes.iter().filter(|route| route.table == CAPTURE);
        captured.map(|route| {
            let family = if route.v4 { Ip::v4(0) } else { Ip::NONE };
            Ip::interface(route.output, &family)
        })
    }

    /// Returns `true` if there are rules of this family.
    pub fn has(&self, v4: bool) -> bool {
        self.rules.iter().any(|rule| rule.v4 == v4)
    }

    /// Returns the parts of `self` that are missing from `is`.
    pub fn missing_from(&self, is: &Self) -> Self {
        Self {
            rules: &self.rules - &is.rules,
            routes: &self.routes - &is.routes,
        }
    }

    /// Returns existing routes that are not in `self` and that no route of `self` replaces.
    pub fn stale(&self, is: &Self) -> Vec<Route> {
        let taken = |route: &Route| self.routes.iter().any(|own| own.replaces(route));
        let is = is.routes.iter().filter(|route| self.has(route.v4));
        is.filter(|route| !taken(route)).copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::{btree_map, btree_set, vec};
    use proptest::prelude::*;

    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    fn interfaces(links: &[(u32, &[&str])]) -> Interfaces {
        let links = links
            .iter()
            .map(|(index, own)| (*index, own.iter().map(|text| ip(text)).collect()));
        Interfaces {
            links: links.collect(),
            ..Interfaces::default()
        }
    }

    #[test]
    fn a_socket_that_is_bound_to_an_interface_comes_from_its_address() {
        let of = interfaces(&[
            (2, &["10.1.0.5", "fd00::5"]),
            (3, &["192.168.7.1"]),
            (4, &[]),
        ]);
        let own = ["10.1.0.5", "fd00::5", "192.168.7.1"].map(ip);
        let routing = Routing::of(&own, &of);
        let capture = |v4| {
            let routes = routing.routes.iter();
            let routes = routes.filter(|route| route.table == CAPTURE && route.v4 == v4);
            routes
                .map(|route| (route.output, route.source))
                .collect::<Vec<_>>()
        };
        assert_eq!(
            capture(true),
            [
                (LO, Some(ip("10.1.0.5"))),
                (2, Some(ip("10.1.0.5"))),
                (3, Some(ip("192.168.7.1")))
            ]
        );
        assert_eq!(
            capture(false),
            [(LO, Some(ip("fd00::5"))), (2, Some(ip("fd00::5")))]
        );
    }

    #[test]
    fn a_family_without_an_address_has_neither_rules_nor_routes() {
        let routing = Routing::of(&[ip("10.1.0.5")], &interfaces(&[(2, &["10.1.0.5"])]));
        assert!(routing.has(true) && !routing.has(false));
        assert!(routing.routes.iter().all(|route| route.v4));
    }

    #[test]
    fn a_changed_source_replaces_the_route_and_a_gone_interface_takes_it_away() {
        let addresses = ["10.1.0.5", "192.168.7.1", "192.168.7.2", "192.168.8.1"].map(ip);
        let before = Routing::of(
            &addresses,
            &interfaces(&[
                (2, &["10.1.0.5"]),
                (3, &["192.168.7.1"]),
                (4, &["192.168.8.1"]),
            ]),
        );
        let after = Routing::of(
            &addresses,
            &interfaces(&[(2, &["10.1.0.5"]), (3, &["192.168.7.2"])]),
        );
        let missing = after.missing_from(&before);
        assert_eq!(missing.rules.len(), 0);
        let sources: Vec<_> = missing.routes.iter().map(|route| route.source).collect();
        assert_eq!(sources, [Some(ip("192.168.7.2"))]);
        let stale: Vec<_> = after
            .stale(&before)
            .iter()
            .map(|route| route.output)
            .collect();
        assert_eq!(stale, [4]);
    }

    proptest! {
        /// Whatever was there, adding what is missing and removing what is stale makes it what is wanted.
        #[test]
        fn what_is_mended_lacks_nothing(
            own in vec(1..9_u8, 1..4),
            links in btree_map(2..6_u32, vec(1..9_u8, 0..3), 0..4),
            lost in btree_set(0..12_usize, 0..12),
            before in btree_map(2..9_u32, vec(1..9_u8, 0..3), 0..4),
        ) {
            let address = |last: &u8| IpAddr::from([10, 0, 0, *last]);
            let of = |links: &std::collections::BTreeMap<u32, Vec<u8>>| {
                let mut own: Vec<IpAddr> = own.iter().map(address).collect();
                own.extend(links.values().flatten().map(address));
                let links = links.iter().map(|(index, own)| (*index, own.iter().map(address).collect()));
                Routing::of(&own, &Interfaces { links: links.collect(), ..Interfaces::default() })
            };
            let want = of(&links);
            let mut is = of(&before);
            let mut place = 0;
            let mut kept = || { place += 1; !lost.contains(&(place - 1)) };
            is.rules.retain(|_| kept());
            is.routes.retain(|_| kept());
            let missing = want.missing_from(&is);
            let stale = want.stale(&is);
            is.routes.retain(|route| {
                !stale.contains(route) && !missing.routes.iter().any(|new| new.replaces(route))
            });
            is.rules.extend(&missing.rules);
            is.routes.extend(&missing.routes);
            prop_assert_eq!(is, want);
        }
    }
}

//! The parts that keep a pod captured and that can be lost while the agent runs: anybody with CAP_NET_ADMIN
//! in the pod, or root on the machine, may flush, detach or remove them. Each look restores what is lost, and
//! counts it here.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};

use super::routing::Routing;

/// A part of capture.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// A policy rule in the pod's namespace.
    Rule,
    /// A route in the pod's namespace.
    Route,
    /// A setting below `/proc/sys` in the pod's namespace.
    Setting,
    /// The pod's program, or its pin.
    Steer,
    /// One of the agent's listeners in the pod.
    Listener,
    /// An entry of the pod in a kernel map.
    Entry,
    /// A program of the node, or its pin.
    Program,
    /// The pin of a map.
    Pin,
}

impl Part {
    /// All parts, in the order of their slots.
    pub const ALL: [Self; 8] = [
        Self::Rule,
        Self::Route,
        Self::Setting,
        Self::Steer,
        Self::Listener,
        Self::Entry,
        Self::Program,
        Self::Pin,
    ];

    /// Returns the part's word in logs and metrics.
    pub fn word(self) -> &'static str {
        match self {
            Self::Rule => "rule",
            Self::Route => "route",
            Self::Setting => "setting",
            Self::Steer => "steer",
            Self::Listener => "listener",
            Self::Entry => "entry",
            Self::Program => "program",
            Self::Pin => "pin",
        }
    }
}

/// The parts that a look found lost.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct LostParts(BTreeSet<Part>);

impl LostParts {
    /// Adds a part.
    pub fn add(&mut self, part: Part) {
        self.0.insert(part);
    }

    /// Adds rules and routes that were missing now and there before: what a new interface does not have yet
    /// was never lost.
    pub fn add_routing(&mut self, lacked: &Routing, before: &Routing) {
        if !lacked.rules.is_disjoint(&before.rules) {
            self.add(Part::Rule);
        }
        if !lacked.routes.is_disjoint(&before.routes) {
            self.add(Part::Route);
        }
    }

    /// Returns `true` if this part was lost.
    pub fn has(&self, part: Part) -> bool {
        self.0.contains(&part)
    }

    /// Returns `true` if nothing was lost.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl std::fmt::Display for LostParts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (place, part) in self.0.iter().enumerate() {
            let comma = if place == 0 { "" } else { ", " };
            write!(f, "{comma}{}", part.word())?;
        }
        Ok(())
    }
}

/// How often each part was restored.
#[derive(Debug, Default)]
pub struct Repairs([AtomicU64; Part::ALL.len()]);

impl Repairs {
    /// Counts restored parts.
    pub fn count(&self, lost: &LostParts) {
        for part in &lost.0 {
            self.0[*part as usize].fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Returns all counts by the parts' words.
    pub fn all(&self) -> Vec<(&'static str, u64)> {
        let count = |part: Part| self.0[part as usize].load(Ordering::Relaxed);
        let parts = Part::ALL.into_iter();
        parts.map(|part| (part.word(), count(part))).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;
    use crate::sys::interfaces::Interfaces;

    fn routing(links: &[u32]) -> Routing {
        let own: IpAddr = "10.1.0.5".parse().expect("an address");
        let links = links.iter().map(|index| (*index, vec![own]));
        let interfaces = Interfaces {
            links: links.collect(),
            ..Interfaces::default()
        };
        Routing::of(&[own], &interfaces)
    }

    #[test]
    fn a_new_interfaces_route_was_not_lost() {
        let (before, after) = (routing(&[2]), routing(&[2, 3]));
        let mut lost = LostParts::default();
        lost.add_routing(&after.missing_from(&before), &before);
        assert!(lost.is_empty(), "{lost}");
        lost.add_routing(&after.missing_from(&Routing::default()), &before);
        assert_eq!(lost.to_string(), "rule, route");
    }

    #[test]
    fn each_part_is_counted_under_its_word() {
        let repairs = Repairs::default();
        for part in Part::ALL {
            let mut lost = LostParts::default();
            lost.add(part);
            repairs.count(&lost);
            assert!(repairs.all().contains(&(part.word(), 1)), "{lost}");
        }
    }
}

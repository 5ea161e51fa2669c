//! Address ranges, looked up by the longest prefix.

use std::cmp::Reverse;
use std::net::IpAddr;
use std::sync::Arc;

use imbl::OrdMap;
use ipnet::IpNet;

use super::claims::Claims;

/// The owners of address ranges, by network. A clone shares its contents.
#[derive(Debug)]
pub(super) struct Ranges<T> {
    claims: Claims<IpNet, T>,
    /// Number of ranges of each family (`true`: IPv4) and prefix length, the longest first: the lengths to try.
    lengths: OrdMap<(bool, Reverse<u8>), usize>,
}

impl<T> Clone for Ranges<T> {
    fn clone(&self) -> Self {
        Self {
            claims: self.claims.clone(),
            lengths: self.lengths.clone(),
        }
    }
}

impl<T> Default for Ranges<T> {
    fn default() -> Self {
        Self {
            claims: Claims::default(),
            lengths: OrdMap::default(),
        }
    }
}

impl<T> Ranges<T> {
    /// Returns the owner of the longest prefix that contains an address.
    pub(super) fn of(&self, network: &str, address: IpAddr) -> Option<&Arc<T>> {
        let lengths = self.lengths.keys();
        let own = lengths.filter(|(v4, _)| *v4 == address.is_ipv4());
        own.filter_map(|(_, Reverse(length))| IpNet::new(address, *length).ok())
            .find_map(|range| self.claims.of(network, &range.trunc()).first())
    }

    pub(super) fn insert(
        &mut self,
        network: &Arc<str>,
        range: IpNet,
        claim: &Arc<T>,
        holds_before: impl Fn(&T, &T) -> bool,
    ) {
        *self.lengths.entry(length(range)).or_default() += 1;
        self.claims
            .insert(network, range.trunc(), claim, holds_before);
    }

    pub(super) fn remove(&mut self, network: &Arc<str>, range: IpNet, claim: &Arc<T>) {
        if let Some(count) = self.lengths.get_mut(&length(range)) {
            *count -= 1;
            if *count == 0 {
                self.lengths.remove(&length(range));
            }
        }
        self.claims.remove(network, &range.trunc(), claim);
    }
}

fn length(range: IpNet) -> (bool, Reverse<u8>) {
    (range.addr().is_ipv4(), Reverse(range.prefix_len()))
}

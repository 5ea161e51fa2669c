//! The interfaces of a network namespace, and their addresses. A pod can make any number of both, so no more are
//! read than here is said.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::io;
use std::net::IpAddr;
use std::ops::ControlFlow;

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressHeader, AddressHeaderFlags, AddressMessage};
use netlink_packet_route::link::{
    LinkAttribute, LinkExtentMask, LinkFlags, LinkHeader, LinkMessage,
};
use rtnetlink::packet_core::{
    DecodeError, NetlinkDeserializable, NetlinkHeader, NlasIterator, parse_ip,
};

use super::dump::dump;
use super::netns::Netns;

/// Most interfaces that a namespace may have.
const MAX_INTERFACES: usize = 1024;
/// Most addresses that they may have, of both families.
const MAX_ADDRESSES: usize = 16_384;

/// Size of the head of an address's message (`struct ifaddrmsg`), in bytes.
const ADDRESS_HEADER: usize = 8;

/// The interfaces of a namespace, and their addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Interfaces {
    /// Addresses that can be reached from outside: neither loopback nor link-local ones. Those on `lo` come last,
    /// and only of families that another interface has too.
    pub addresses: Vec<IpAddr>,
    /// The interfaces except `lo`, by index, each with those of `addresses` that it has and that are in use.
    pub links: BTreeMap<u32, Vec<IpAddr>>,
    /// Those of `addresses` that no interface may use: duplicate address detection has not ended, or has found
    /// a duplicate.
    pub tentative: BTreeSet<IpAddr>,
}

impl Interfaces {
    /// Reads the interfaces of a namespace.
    ///
    /// # Errors
    /// It cannot be entered; it has more than are read ([`is_of_the_namespace`]).
    pub fn of(netns: &Netns) -> io::Result<Self> {
        let addresses = AddressMessage::default();
        let mut reading = Reading::default();
        for of in [all_links(), RouteNetlinkMessage::GetAddress(addresses)] {
            let mut added = Ok(());
            dump(netns, of, |entry| {
                added = reading.add(entry);
                match added {
                    Ok(()) => ControlFlow::Continue(()),
                    Err(_) => ControlFlow::Break(()),
                }
            })?;
            added?;
        }
        Ok(reading.end())
    }
}

/// Returns the indices of all interfaces of a namespace except `lo`, however many there are.
///
/// # Errors
/// It cannot be entered; the kernel reports one.
pub fn indices(netns: &Netns) -> io::Result<Vec<u32>> {
    let mut all = Vec::new();
    dump(netns, all_links(), |entry| {
        if let Entry::Interface { index, is_lo } = entry
            && !is_lo
        {
            all.push(index);
        }
        ControlFlow::Continue(())
    })?;
    Ok(all)
}

fn all_links() -> RouteNetlinkMessage {
    let mut links = LinkMessage::default();
    let mask = LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]);
    links.attributes.push(mask);
    RouteNetlinkMessage::GetLink(links)
}

/// Returns `true` if an error is of what a namespace has: more interfaces or addresses than are read, or what cannot
/// be read. Other errors are the machine's.
pub fn is_of_the_namespace(error: &io::Error) -> bool {
    use io::ErrorKind::{InvalidData, QuotaExceeded};
    matches!(error.kind(), InvalidData | QuotaExceeded)
        || error.raw_os_error() == Some(libc::EMSGSIZE)
}

fn too_many(most: usize, what: &str) -> io::Error {
    let why = format!("it has more than {most} {what}");
    io::Error::new(io::ErrorKind::QuotaExceeded, why)
}

/// What is read of an entry of a dump. Of an interface's attributes nothing is: there are many kinds.
#[derive(Clone, Copy, Debug)]
enum Entry {
    Interface {
        index: u32,
        is_lo: bool,
    },
    Address {
        index: u32,
        address: IpAddr,
        is_tentative: bool,
    },
    Other,
}

impl NetlinkDeserializable for Entry {
    type Error = DecodeError;

    fn deserialize(header: &NetlinkHeader, payload: &[u8]) -> Result<Self, DecodeError> {
        Ok(match header.message_type {
            libc::RTM_NEWLINK => {
                let link = LinkHeader::parse(payload)?;
                Self::Interface {
                    index: link.index,
                    is_lo: link.flags.contains(LinkFlags::Loopback),
                }
            }
            libc::RTM_NEWADDR => Self::of_address(payload)?,
            _ => Self::Other,
        })
    }
}

impl Entry {
    /// Reads an address. A pod chooses the label, which may be no text, so nothing is read that is not needed.
    fn of_address(payload: &[u8]) -> Result<Self, DecodeError> {
        use AddressHeaderFlags as Flag;
        let header = AddressHeader::parse(payload)?;
        let mut own = None;
        for attribute in NlasIterator::new(payload.get(ADDRESS_HEADER..).unwrap_or_default()) {
            let attribute = attribute?;
            match attribute.kind() {
                // Of an interface with a peer the kernel says both addresses, and the own one as the local one.
                libc::IFA_LOCAL => own = parse_ip(attribute.value()).ok(),
                libc::IFA_ADDRESS if own.is_none() => own = parse_ip(attribute.value()).ok(),
                _ => {}
            }
        }
        Ok(match own {
            Some(address) => Self::Address {
                index: header.index,
                address,
                is_tentative: header.flags.contains(Flag::Tentative)
                    && !header.flags.contains(Flag::Optimistic),
            },
            None => Self::Other,
        })
    }
}

/// What has been read of a namespace. The kernel lists interfaces first, and then their addresses.
#[derive(Default)]
struct Reading {
    found: Interfaces,
    /// Number of the addresses so far.
    addresses: usize,
    /// Index of `lo`.
    lo: Option<u32>,
    of_lo: Vec<IpAddr>,
    /// The elements of `found.addresses`.
    seen: HashSet<IpAddr>,
}

impl Reading {
    /// Takes an entry.
    ///
    /// # Errors
    /// It is one too many.
    fn add(&mut self, entry: Entry) -> io::Result<()> {
        match entry {
            Entry::Interface { index, is_lo: true } => self.lo = Some(index),
            Entry::Interface { index, .. } => {
                self.found.links.entry(index).or_default();
                if self.found.links.len() > MAX_INTERFACES {
                    return Err(too_many(MAX_INTERFACES, "interfaces"));
                }
            }
            Entry::Address {
                index,
                address,
                is_tentative,
            } => {
                self.addresses += 1;
                if self.addresses > MAX_ADDRESSES {
                    return Err(too_many(MAX_ADDRESSES, "addresses"));
                }
                self.add_address(index, address, is_tentative);
            }
            Entry::Other => {}
        }
        Ok(())
    }

    fn add_address(&mut self, index: u32, address: IpAddr, is_tentative: bool) {
        let of_one_link = matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local());
        if of_one_link || address.is_loopback() {
            return;
        }
        if self.lo == Some(index) {
            self.of_lo.push(address);
            return;
        }
        let Some(link) = self.found.links.get_mut(&index) else {
            return; // it has just come, which is an event
        };
        match is_tentative {
            true => _ = self.found.tentative.insert(address),
            false => link.push(address),
        }
        if self.seen.insert(address) {
            self.found.addresses.push(address);
        }
    }

    fn end(mut self) -> Interfaces {
        let mut found = self.found;
        if !found.tentative.is_empty() {
            // An address that is tentative on one interface may be in use on another.
            for used in found.links.values().flatten().chain(&self.of_lo) {
                found.tentative.remove(used);
            }
        }
        // Addresses on `lo` alone cannot be reached: they count only if the pod has another one of their family.
        let has = |v4| found.addresses.iter().any(|of| of.is_ipv4() == v4);
        let (has_v4, has_v6) = (has(true), has(false));
        self.of_lo.retain(|of| {
            let has_other = if of.is_ipv4() { has_v4 } else { has_v6 };
            has_other && self.seen.insert(*of)
        });
        found.addresses.extend(self.of_lo);
        found
    }
}

#[cfg(test)]
mod tests {
    use netlink_packet_route::address::AddressAttribute;
    use rtnetlink::packet_core::{Emitable, Parseable};

    use super::*;

    fn read(message: &AddressMessage) -> Entry {
        let mut bytes = vec![0; message.buffer_len()];
        message.emit(&mut bytes);
        Entry::of_address(&bytes).expect("an address")
    }

    #[test]
    fn an_address_is_not_used_until_it_is_known_to_be_nobody_elses() {
        let own: IpAddr = "fd00::5".parse().expect("an address");
        let is_used = |flags| {
            let mut message = AddressMessage::default();
            message.header = AddressHeader {
                index: 11,
                flags: AddressHeaderFlags::from_bits_retain(flags),
                ..AddressHeader::default()
            };
            message.attributes.push(AddressAttribute::Address(own));
            let mut reading = Reading::default();
            let (index, is_lo) = (11, false);
            for entry in [Entry::Interface { index, is_lo }, read(&message)] {
                reading.add(entry).expect("few");
            }
            let found = reading.end();
            assert_eq!(found.addresses, [own]);
            found.links[&11] == [own] && found.tentative.is_empty()
        };
        assert!(!is_used(0x40), "being looked for");
        assert!(!is_used(0xc8), "somebody has it");
        assert!(is_used(0xc4), "optimistic");
        assert!(is_used(0x80));
    }

    #[test]
    fn the_local_address_of_two_is_a_pods_own() {
        let [own, peer] = ["10.0.0.1", "10.0.0.2"].map(|of| of.parse().expect("an address"));
        let mut message = AddressMessage::default();
        message.attributes.push(AddressAttribute::Local(own));
        message.attributes.push(AddressAttribute::Address(peer));
        assert!(matches!(read(&message), Entry::Address { address, .. } if address == own));
    }

    #[test]
    fn an_address_is_read_whatever_its_label_is() {
        let attribute =
            |kind: u16, value: [u8; 4]| [&[8, 0], &kind.to_ne_bytes()[..], &value].concat();
        let tentative = 0x40;
        let message = [
            vec![2, 24, tentative, 0, 7, 0, 0, 0],
            attribute(libc::IFA_ADDRESS, [10, 0, 0, 1]),
            attribute(libc::IFA_LOCAL, [10, 0, 0, 2]),
            attribute(libc::IFA_LABEL, [0xff, 0xfe, b'x', 0]),
        ];
        let read = Entry::of_address(&message.concat()).expect("an address");
        let own = IpAddr::from([10, 0, 0, 2]);
        assert!(
            matches!(read, Entry::Address { index: 7, address, is_tentative: true } if address == own),
            "{read:?}"
        );
        assert!(
            AddressMessage::parse(&message.concat()).is_err(),
            "the label is no text"
        );
    }

    #[test]
    fn no_more_interfaces_and_addresses_are_read_than_a_pod_may_have() {
        let interface = |index| Entry::Interface {
            index,
            is_lo: index == 1,
        };
        let address = |number: u32| Entry::Address {
            index: 2,
            address: IpAddr::from(number.to_be_bytes()),
            is_tentative: false,
        };
        let mut reading = Reading::default();
        let last = u32::try_from(MAX_INTERFACES + 1).expect("few");
        for index in 1..=last {
            reading.add(interface(index)).expect("it may have it");
        }
        let error = reading.add(interface(last + 1)).expect_err("one too many");
        assert!(is_of_the_namespace(&error), "{error}");
        let last = u32::try_from(MAX_ADDRESSES).expect("few");
        for number in 1..=last {
            reading.add(address(number)).expect("it may have it");
        }
        let error = reading.add(address(last + 1)).expect_err("one too many");
        assert!(is_of_the_namespace(&error), "{error}");
    }
}

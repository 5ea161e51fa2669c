//! Source ports for the agent's connections to an app in a client's name.
//!
//! Whether a port is free depends on the pair of client and app's address, and only the kernel knows: live
//! connections have ports, and some that ended lately. So the next port to try follows the last free one, or is
//! random if that was not free. Ports of one burst then lie side by side, and the first try after it is free as a
//! rule; if most are live, a few tries find one.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::sync::{Mutex, PoisonError};

use rand::Rng;

/// Ports that the agent uses when it connects in a client's name. They are outside the range that clients use, since
/// the kernel finds an established socket before any program runs.
pub(super) const SPOOFED_PORTS: RangeInclusive<u16> = 10000..=32767;
/// Number of ports that are tried for one connection. With 20,000 live ones of a client to one address of an app, one
/// in ten million million finds none.
pub(super) const TRIES: usize = 256;
/// Number of pairs that are remembered; when there are more, all are forgotten.
const PAIRS: usize = 4096;

/// The next port to try, for each client and address of the app.
#[derive(Debug, Default)]
pub struct Ports(Mutex<HashMap<(IpAddr, SocketAddr), u16>>);

impl Ports {
    /// Returns the next port to try.
    pub fn next(&self, from: IpAddr, to: SocketAddr) -> u16 {
        let mut pairs = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if pairs.len() >= PAIRS && !pairs.contains_key(&(from, to)) {
            pairs.clear();
        }
        let next = pairs.entry((from, to)).or_insert_with(anywhere);
        let port = *next;
        *next = match port == *SPOOFED_PORTS.end() {
            true => *SPOOFED_PORTS.start(),
            false => port + 1,
        };
        port
    }

    /// Continues at a random port, since the last one was not free.
    pub fn jump(&self, from: IpAddr, to: SocketAddr) {
        let mut pairs = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(next) = pairs.get_mut(&(from, to)) {
            *next = anywhere();
        }
    }
}

fn anywhere() -> u16 {
    rand::rng().random_range(SPOOFED_PORTS)
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeSet, VecDeque};

    use super::*;

    fn pair() -> (IpAddr, SocketAddr) {
        let app = "10.1.0.5:80".parse().expect("an address");
        ("192.0.2.1".parse().expect("an address"), app)
    }

    /// Takes a port that is not live, as `to_app` does. Returns it and the number of tries.
    fn take(ports: &Ports, live: &mut BTreeSet<u16>) -> Option<(u16, usize)> {
        let (from, to) = pair();
        (1..=TRIES).find_map(|tries| {
            let port = ports.next(from, to);
            assert!(SPOOFED_PORTS.contains(&port));
            if live.insert(port) {
                return Some((port, tries));
            }
            ports.jump(from, to);
            None
        })
    }

    #[test]
    fn ten_thousand_connections_that_stay_meet_no_taken_port_but_by_the_first_place() {
        let ports = Ports::default();
        let mut live = BTreeSet::new();
        for _ in 0..10_000 {
            let (_, tries) = take(&ports, &mut live).expect("a port is free");
            assert_eq!(tries, 1);
        }
    }

    #[test]
    fn c10_none_fails_while_connections_come_and_go_beside_many_that_stay() {
        let ports = Ports::default();
        let mut live = BTreeSet::new();
        let mut short = VecDeque::new();
        for number in 0..100_000 {
            let (port, _) = take(&ports, &mut live).expect("a port is free");
            // The first 10,000 all stay; of the rest the last 5,000 are live.
            if number >= 10_000 {
                short.push_back(port);
            }
            if short.len() > 5_000 {
                live.remove(&short.pop_front().expect("there are some"));
            }
        }
        assert_eq!(live.len(), 15_000);
    }

    #[test]
    fn pairs_are_bounded_and_apart() {
        let ports = Ports::default();
        let (from, to) = pair();
        let first = ports.next(from, to);
        ports.next("192.0.2.2".parse().expect("an address"), to);
        let second = ports.next(from, to);
        assert!(second == first + 1 || second == *SPOOFED_PORTS.start());
        for number in 0..10_000_u32 {
            ports.next(IpAddr::from(number.to_be_bytes()), to);
        }
        assert!(ports.0.lock().expect("not poisoned").len() <= PAIRS);
    }
}

//! What the programs decide, as pure functions: no map, no context; tested on the host.

use crate::address::Ip;
use crate::event::Reason;
use crate::pod::{Addresses, listener};

/// The port of HBONE.
pub const HBONE_PORT: u16 = 15008;

/// What becomes of a connection that a process of an enrolled pod asks for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Connect {
    /// It stays in the pod: not our business.
    Local,
    /// It goes to the agent.
    Capture,
    /// It is refused.
    Refuse(Reason),
}

/// Decides a connect to `to` in a namespace that is no pod's. `of_pod`: the process is in an enrolled
/// pod's cgroup, and the namespace is not the host's. Its pod's routes are in another namespace, and it
/// would leave in clear.
#[inline(always)]
pub fn connect_elsewhere(to: &Ip, of_pod: bool) -> Connect {
    if of_pod && !to.is_loopback() && !to.is_unspecified() {
        Connect::Refuse(Reason::ForeignCgroup)
    } else {
        Connect::Local
    }
}

/// Decides a pod's connect to `to`. `foreign`: the process is in another enrolled pod's cgroup.
#[inline(always)]
pub fn connect(pod: &Addresses, to: &Ip, foreign: bool) -> Connect {
    if foreign {
        Connect::Refuse(Reason::ForeignCgroup)
    } else if to.is_loopback() || to.is_unspecified() || pod.owns(to) {
        Connect::Local
    } else if pod.has_family(to.is_v4()) {
        Connect::Capture
    } else {
        // Without a source address there is no capture route, and it would leave by another.
        Connect::Refuse(Reason::NoAddress)
    }
}

/// Where a SYN that arrives in an enrolled pod's namespace goes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Steer {
    /// To whoever listens in the pod.
    App,
    /// To the agent: the pod wants out, and the capture route brought its SYN back.
    Outbound,
    /// To the agent: somebody wants in, in clear.
    Inbound,
    /// To the agent: a peer's tunnel.
    Hbone,
}

impl Steer {
    /// The place of the listener that it goes to.
    #[inline(always)]
    pub const fn listener(self) -> Option<u32> {
        match self {
            Self::App => None,
            Self::Outbound => Some(listener::OUTBOUND),
            Self::Inbound => Some(listener::INBOUND),
            Self::Hbone => Some(listener::HBONE),
        }
    }
}

/// Decides by addresses, since for a connection to the pod's own address the kernel reports the
/// interface that owns it and not `lo`. The one exception is `by_lo` to an own address, which only
/// the agent's connections to the app show.
///
/// What is not the pod's own and neither came by `lo` nor from the pod is an address that the pod
/// got after its enrolment: the agent takes it as plaintext from outside, never as the pod's wish.
/// From such an address to itself goes past the agent, which would dial it in vain for ever.
#[inline(always)]
pub fn steer(pod: &Addresses, from: &Ip, to: &Ip, to_port: u16, by_lo: bool) -> Steer {
    if to.is_loopback() || from == to {
        Steer::App
    } else if pod.owns(to) {
        if by_lo || pod.owns(from) {
            Steer::App
        } else if to_port == HBONE_PORT {
            Steer::Hbone
        } else {
            Steer::Inbound
        }
    } else if by_lo || pod.owns(from) {
        Steer::Outbound
    } else {
        Steer::Inbound
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use std::net::IpAddr;
    use std::vec::Vec;

    use proptest::prelude::*;

    use super::*;

    fn ip(text: &str) -> Ip {
        text.parse::<IpAddr>().expect("an address").into()
    }

    fn pod(addresses: &[&str]) -> Addresses {
        let mut pod = Addresses::default();
        for (place, address) in pod.all.iter_mut().zip(addresses) {
            *place = ip(address);
        }
        pod
    }

    #[test]
    fn a_connection_to_oneself_is_local_in_every_spelling() {
        let pod = pod(&["10.1.0.5", "fd00::5"]);
        for to in [
            "127.0.0.1",
            "127.9.9.9",
            "::1",
            "0.0.0.0",
            "::",
            "10.1.0.5",
            "::ffff:10.1.0.5",
            "::ffff:127.0.0.1",
            "fd00::5",
        ] {
            assert_eq!(connect(&pod, &ip(to), false), Connect::Local, "{to}");
        }
        for to in [
            "10.1.0.6",
            "::ffff:10.1.0.6",
            "fd00::6",
            "169.254.169.254",
            "fe80::1",
        ] {
            assert_eq!(connect(&pod, &ip(to), false), Connect::Capture, "{to}");
        }
    }

    #[test]
    fn a_family_without_an_address_is_refused_not_passed() {
        assert_eq!(
            connect(&pod(&["10.1.0.5"]), &ip("fd00::6"), false),
            Connect::Refuse(Reason::NoAddress)
        );
        assert_eq!(
            connect(&pod(&["fd00::5"]), &ip("1.2.3.4"), false),
            Connect::Refuse(Reason::NoAddress)
        );
        assert_eq!(
            connect(&Addresses::default(), &ip("1.2.3.4"), false),
            Connect::Refuse(Reason::NoAddress)
        );
    }

    #[test]
    fn another_pods_process_is_refused_everywhere() {
        assert_eq!(
            connect(&pod(&["10.1.0.5"]), &ip("127.0.0.1"), true),
            Connect::Refuse(Reason::ForeignCgroup)
        );
    }

    #[test]
    fn a_pods_process_in_another_namespace_reaches_only_that_namespace() {
        for (to, of_pod, expected) in [
            ("1.2.3.4", false, Connect::Local),
            ("127.0.0.1", true, Connect::Local),
            ("::", true, Connect::Local),
            ("1.2.3.4", true, Connect::Refuse(Reason::ForeignCgroup)),
            ("fd00::1", true, Connect::Refuse(Reason::ForeignCgroup)),
        ] {
            assert_eq!(connect_elsewhere(&ip(to), of_pod), expected, "{to}");
        }
    }

    #[test]
    fn syns_are_steered_by_addresses() {
        let pod = pod(&["10.1.0.5", "fd00::5", "192.168.7.5"]);
        let cases = [
            ("10.2.0.9", "10.1.0.5", 80, false, Steer::Inbound),
            ("10.2.0.9", "10.1.0.5", 15008, false, Steer::Hbone),
            ("10.2.0.9", "10.1.0.5", 15008, true, Steer::App),
            ("10.2.0.9", "10.1.0.5", 80, true, Steer::App),
            ("10.1.0.5", "10.1.0.5", 15008, false, Steer::App),
            ("10.1.0.5", "192.168.7.5", 80, false, Steer::App),
            ("127.0.0.1", "127.0.0.1", 80, true, Steer::App),
            ("10.1.0.5", "1.2.3.4", 15008, true, Steer::Outbound),
            ("10.1.0.5", "1.2.3.4", 80, false, Steer::Outbound),
            ("9.9.9.9", "192.168.7.5", 80, false, Steer::Inbound),
            ("9.9.9.9", "192.168.7.6", 80, false, Steer::Inbound),
            ("192.168.7.6", "192.168.7.6", 15001, true, Steer::App),
            ("fd00::9", "fd00::5", 80, false, Steer::Inbound),
        ];
        for (from, to, port, by_lo, expected) in cases {
            assert_eq!(
                steer(&pod, &ip(from), &ip(to), port, by_lo),
                expected,
                "{from} > {to}:{port} by_lo={by_lo}"
            );
        }
    }

    #[test]
    fn loopback_and_unspecified_agree_with_the_standard_library() {
        proptest!(|(octets: [u8; 16], v4: bool)| {
            let address = if v4 {
                IpAddr::from([octets[0], octets[1], octets[2], octets[3]])
            } else {
                IpAddr::from(octets).to_canonical()
            };
            let ip = Ip::from(address);
            prop_assert_eq!(IpAddr::from(ip), address);
            prop_assert_eq!(ip.is_loopback(), address.is_loopback());
            prop_assert_eq!(ip.is_unspecified(), address.is_unspecified());
            prop_assert_eq!(ip.is_v4(), address.is_ipv4());
        });
    }

    proptest! {
        /// Nothing from outside ever reaches the app past the agent.
        #[test]
        fn from_outside_only_the_agent_is_reached(own: Vec<[u8; 4]>, from: [u8; 4], to: [u8; 4], port: u16) {
            let mut pod = Addresses::default();
            for (place, octets) in pod.all.iter_mut().zip(&own) {
                *place = IpAddr::from(*octets).into();
            }
            let (from, to) = (Ip::from(IpAddr::from(from)), Ip::from(IpAddr::from(to)));
            if !pod.owns(&from) && !to.is_loopback() && from != to {
                prop_assert!(matches!(steer(&pod, &from, &to, port, false), Steer::Inbound | Steer::Hbone));
            }
        }

        /// What the pod sends elsewhere never reaches a listener of its own.
        #[test]
        fn what_leaves_the_pod_reaches_the_agent(own: [u8; 4], to: [u8; 4], port: u16, by_lo: bool) {
            let mut pod = Addresses::default();
            pod.all[0] = IpAddr::from(own).into();
            let (from, to) = (pod.all[0], Ip::from(IpAddr::from(to)));
            if !pod.owns(&to) && !to.is_loopback() && !to.is_unspecified() && from != Ip::NONE {
                prop_assert_eq!(steer(&pod, &from, &to, port, by_lo), Steer::Outbound);
            }
        }

        /// The application's own mark bits survive, and ours are set or gone.
        #[test]
        fn marks_keep_the_applications_bits(old: u32) {
            use crate::mark;
            prop_assert_eq!(mark::after_connect(old, true) & mark::MASK, mark::CAPTURE);
            prop_assert_eq!(mark::after_connect(old, true) & !mark::MASK, old & !mark::MASK);
            prop_assert_ne!(mark::after_connect(old, false) & mark::MASK, mark::CAPTURE);
            prop_assert_eq!(mark::after_connect(old, false) & !mark::MASK, old & !mark::MASK);
        }
    }
}

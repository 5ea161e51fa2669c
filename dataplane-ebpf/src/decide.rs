//! The decisions of the programs, as pure functions: they use no map and no context, and are tested on the host.

use crate::address::Ip;
use crate::event::Reason;
use crate::listener::ListenerKind;

/// The decision about a connect of a process in the pods' cgroup.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Connect {
    /// Its namespace is no pod's: nothing is done.
    Pass,
    /// It stays in the pod: it may send by `lo` only.
    Local,
    /// It goes to the agent.
    Capture,
    /// It is refused.
    Refuse(Reason),
}

/// Decides a connect to `to` in a namespace that is no pod's. `of_pod`: the process is in an enrolled pod's
/// cgroup, and the namespace is not the host's. The pod's routes are in another namespace, so the connection
/// would leave in clear.
#[inline(always)]
pub fn connect_elsewhere(to: &Ip, of_pod: bool) -> Connect {
    if of_pod && !(to.is_loopback() | to.is_unspecified()) {
        Connect::Refuse(Reason::ForeignCgroup)
    } else {
        Connect::Pass
    }
}

/// The facts about a pod's connect.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Asked {
    /// The process is in another enrolled pod's cgroup.
    pub foreign: bool,
    /// It goes to an address of the pod itself.
    pub own: bool,
    /// The pod has an address of that family to send from.
    pub family: bool,
    /// The socket is bound to no interface, or to one that has an address of that family.
    pub interface: bool,
}

/// Decides a pod's connect to `to`.
#[inline(always)]
pub fn connect(asked: Asked, to: &Ip) -> Connect {
    if asked.foreign {
        Connect::Refuse(Reason::ForeignCgroup)
    } else if asked.own | to.is_loopback() | to.is_unspecified() {
        Connect::Local
    } else if !asked.family {
        // Without a source address there is no capture route, and the connection would leave by another one.
        Connect::Refuse(Reason::NoAddress)
    } else if !asked.interface {
        // The packets would be sent by that interface and dropped, and the connect would wait in vain.
        Connect::Refuse(Reason::NoRoute)
    } else {
        Connect::Capture
    }
}

/// Where a SYN that arrives in an enrolled pod's namespace goes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Steer {
    /// To the pod's own listener, if there is one.
    App,
    /// To this listener of the agent. To that for what the pod connects to: the capture route has brought its SYN back.
    Agent(ListenerKind),
}

impl Steer {
    /// Returns the decision while the pod leaves. A connection to the pod reaches the app. A SYN that the pod
    /// has sent by the capture route, and retransmits until it is answered, was meant for somebody else: the
    /// app's own listener must not get it, if there is one on that port.
    #[inline(always)]
    pub const fn of_one_that_leaves(self) -> Self {
        match self {
            Self::Agent(ListenerKind::Outbound) => self,
            Self::App | Self::Agent(ListenerKind::Inbound | ListenerKind::Hbone) => Self::App,
        }
    }
}

/// Which ends of a SYN are the pod's own addresses.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Owns {
    /// The pod has the source.
    pub from: bool,
    /// The pod has the destination.
    pub to: bool,
}

/// Decides by addresses, since for a connection to the pod's own address the kernel reports the interface
/// that owns it and not `lo`. The one exception is `by_lo` to an own address, which is only so for the
/// agent's connections to the app. The pod reaches loopback addresses by `lo`; a SYN to one by another
/// interface is from outside, let in by `route_localnet`.
///
/// A SYN from one own address to another is the pod's if the pod has `begun` it: the pod may have lost the
/// source address since, and its new owner would come by the same interface. A SYN from an address to itself
/// needs no such proof: the answer stays in the pod, so nobody else can end the handshake.
///
/// A destination that is not known as own, of a SYN that neither came by `lo` nor from the pod, is an address
/// that the pod got a moment ago, or one beyond the maximum: the agent treats the SYN as plaintext from
/// outside, never as the pod's own. A SYN from such an address to itself passes the agent by, which would
/// otherwise dial itself for ever.
#[inline(always)]
pub fn steer(
    owns: Owns,
    from: &Ip,
    to: &Ip,
    to_port: u16,
    by_lo: bool,
    begun: impl FnOnce() -> bool,
) -> Steer {
    if from.is(to) {
        Steer::App
    } else if owns.to | to.is_loopback() {
        if by_lo || (owns.from && begun()) {
            Steer::App
        } else if to_port == ListenerKind::Hbone.port() {
            Steer::Agent(ListenerKind::Hbone)
        } else {
            Steer::Agent(ListenerKind::Inbound)
        }
    } else if by_lo || owns.from {
        Steer::Agent(ListenerKind::Outbound)
    } else {
        Steer::Agent(ListenerKind::Inbound)
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use std::net::IpAddr;
    use std::vec::Vec;

    use proptest::collection::vec;
    use proptest::prelude::*;
    use proptest::sample::select;

    use super::*;

    const APP: Steer = Steer::App;
    const OUTBOUND: Steer = Steer::Agent(ListenerKind::Outbound);
    const INBOUND: Steer = Steer::Agent(ListenerKind::Inbound);
    const HBONE: Steer = Steer::Agent(ListenerKind::Hbone);

    fn ip(text: &str) -> Ip {
        text.parse::<IpAddr>().expect("an address").into()
    }

    /// The addresses in the programs' map, and whether the pod has begun the connection in question.
    struct Pod(Vec<Ip>, bool);

    impl Pod {
        fn owns(&self, ip: &Ip) -> bool {
            self.0.contains(ip)
        }

        fn connect(&self, to: &Ip, foreign: bool) -> Connect {
            let asked = Asked {
                foreign,
                own: self.owns(to),
                family: self.0.iter().any(|own| own.family() == to.family()),
                interface: true,
            };
            connect(asked, to)
        }

        fn steer(&self, from: &Ip, to: &Ip, to_port: u16, by_lo: bool) -> Steer {
            let owns = Owns {
                from: self.owns(from),
                to: self.owns(to),
            };
            steer(owns, from, to, to_port, by_lo, || self.1)
        }
    }

    fn pod(addresses: &[&str]) -> Pod {
        Pod(addresses.iter().map(|address| ip(address)).collect(), true)
    }

    /// Generates few addresses, so that two of them are often the same.
    fn some() -> impl Strategy<Value = Ip> {
        let few = ["10.1.0.5", "10.1.0.6", "127.0.0.1", "127.0.0.9", "::1"];
        select(few.map(ip).to_vec())
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
            assert_eq!(pod.connect(&ip(to), false), Connect::Local, "{to}");
        }
        for to in [
            "10.1.0.6",
            "::ffff:10.1.0.6",
            "fd00::6",
            "169.254.169.254",
            "fe80::1",
        ] {
            assert_eq!(pod.connect(&ip(to), false), Connect::Capture, "{to}");
        }
    }

    #[test]
    fn a_family_without_an_address_is_refused_not_passed() {
        assert_eq!(
            pod(&["10.1.0.5"]).connect(&ip("fd00::6"), false),
            Connect::Refuse(Reason::NoAddress)
        );
        assert_eq!(
            pod(&["fd00::5"]).connect(&ip("1.2.3.4"), false),
            Connect::Refuse(Reason::NoAddress)
        );
        assert_eq!(
            pod(&[]).connect(&ip("1.2.3.4"), false),
            Connect::Refuse(Reason::NoAddress)
        );
    }

    #[test]
    fn an_interface_without_an_address_is_refused_not_passed() {
        let asked = Asked {
            foreign: false,
            own: false,
            family: true,
            interface: false,
        };
        assert_eq!(
            connect(asked, &ip("1.2.3.4")),
            Connect::Refuse(Reason::NoRoute)
        );
        assert_eq!(connect(asked, &ip("127.0.0.1")), Connect::Local);
    }

    #[test]
    fn another_pods_process_is_refused_everywhere() {
        assert_eq!(
            pod(&["10.1.0.5"]).connect(&ip("127.0.0.1"), true),
            Connect::Refuse(Reason::ForeignCgroup)
        );
    }

    #[test]
    fn a_pods_process_in_another_namespace_reaches_only_that_namespace() {
        for (to, of_pod, expected) in [
            ("1.2.3.4", false, Connect::Pass),
            ("127.0.0.1", true, Connect::Pass),
            ("::", true, Connect::Pass),
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
            ("10.2.0.9", "10.1.0.5", 80, false, INBOUND),
            ("10.2.0.9", "10.1.0.5", 15008, false, HBONE),
            ("10.2.0.9", "10.1.0.5", 15008, true, APP),
            ("10.2.0.9", "10.1.0.5", 80, true, APP),
            ("10.2.0.9", "10.1.0.5", 15007, false, INBOUND),
            ("10.2.0.9", "10.1.0.5", 15009, false, INBOUND),
            ("10.1.0.5", "10.1.0.5", 15008, false, APP),
            ("10.1.0.5", "192.168.7.5", 80, false, APP),
            ("127.0.0.1", "127.0.0.1", 80, true, APP),
            ("10.1.0.5", "127.0.0.1", 80, true, APP),
            ("::1", "::1", 80, true, APP),
            ("192.168.7.6", "127.0.0.1", 80, false, INBOUND),
            ("127.0.0.9", "127.0.0.1", 80, false, INBOUND),
            ("10.1.0.5", "1.2.3.4", 15008, true, OUTBOUND),
            ("192.168.7.6", "1.2.3.4", 80, true, OUTBOUND),
            ("10.1.0.5", "1.2.3.4", 80, false, OUTBOUND),
            ("9.9.9.9", "192.168.7.5", 80, false, INBOUND),
            ("9.9.9.9", "192.168.7.6", 80, false, INBOUND),
            ("192.168.7.6", "192.168.7.6", 15001, true, APP),
            ("fd00::9", "fd00::5", 80, false, INBOUND),
        ];
        for (from, to, port, by_lo, expected) in cases {
            assert_eq!(
                pod.steer(&ip(from), &ip(to), port, by_lo),
                expected,
                "{from} > {to}:{port} by_lo={by_lo}"
            );
        }
    }

    #[test]
    fn who_has_got_an_address_of_the_pods_is_not_taken_for_it() {
        let pod = Pod(std::vec![ip("10.1.0.5"), ip("192.168.7.5")], false);
        for (from, to, by_lo, expected) in [
            ("192.168.7.5", "10.1.0.5", false, INBOUND),
            ("192.168.7.5", "10.1.0.5", true, APP),
            ("10.1.0.5", "10.1.0.5", false, APP),
            ("10.1.0.5", "127.0.0.1", false, INBOUND),
            ("10.1.0.5", "127.0.0.1", true, APP),
        ] {
            let steered = pod.steer(&ip(from), &ip(to), 80, by_lo);
            assert_eq!(steered, expected, "{from} > {to} by_lo={by_lo}");
        }
    }

    #[test]
    fn of_a_pod_that_leaves_only_what_it_sent_itself_reaches_the_agent() {
        for (steer, leaving) in [
            (APP, APP),
            (OUTBOUND, OUTBOUND),
            (INBOUND, APP),
            (HBONE, APP),
        ] {
            assert_eq!(steer.of_one_that_leaves(), leaving, "{steer:?}");
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

    #[test]
    fn addresses_at_the_edges_are_what_they_are() {
        let all = [
            "0.0.0.0",
            "::",
            "127.0.0.0",
            "127.255.255.255",
            "126.255.255.255",
            "128.0.0.0",
            "::1",
            "::2",
            "::100:0",
            "0.0.0.1",
            "::7f00:1",
            "1::",
            "0:1::1",
            "255.255.255.255",
            "::ffff:0:0:0",
            "::fffe:7f00:1",
            "8000::1",
            "::8000:0:0:1",
        ];
        for text in all {
            let (address, ip) = (text.parse::<IpAddr>().expect("an address"), ip(text));
            assert_eq!(ip.is_loopback(), address.is_loopback(), "{text}");
            assert_eq!(ip.is_unspecified(), address.is_unspecified(), "{text}");
            assert_eq!(ip.is_v4(), address.is_ipv4(), "{text}");
            let unspecified = if address.is_ipv4() { "0.0.0.0" } else { "::" };
            assert_eq!(ip.family(), self::ip(unspecified), "{text}");
            let interface = Ip::interface(3, &ip);
            assert_eq!(
                interface.words,
                [u32::MAX, u32::MAX, address.is_ipv4().into(), 3]
            );
            for other in all {
                assert_eq!(ip.is(&self::ip(other)), text == other, "{text} {other}");
            }
        }
        let IpAddr::V6(v6) = "1:2::3".parse().expect("an address") else {
            panic!("of IPv6")
        };
        let (v4, v6) = (u32::from_ne_bytes([10, 1, 0, 5]), Ip::from(IpAddr::V6(v6)));
        assert_eq!(Ip::v4_if_zero(0, v4, v6.words), ip("10.1.0.5"));
        assert_eq!(Ip::v4_if_zero(8, v4, v6.words), v6);
    }

    proptest! {
        /// Nothing from outside ever reaches the app past the agent, whatever its source address. A SYN from
        /// an address to itself is no exception: the answer stays in the pod.
        #[test]
        fn from_outside_only_the_agent_is_reached(own in vec(some(), 0..4), from in some(), to in some(), port: u16) {
            let pod = Pod(own, false);
            if from != to {
                let steered = pod.steer(&from, &to, port, false);
                prop_assert_ne!(steered, APP);
                prop_assert!(pod.owns(&from) || steered != OUTBOUND);
            }
        }

        /// What the pod sends elsewhere never reaches a listener of its own.
        #[test]
        fn what_leaves_the_pod_reaches_the_agent(own: [u8; 4], to: [u8; 4], port: u16, by_lo: bool) {
            let (from, to) = (Ip::from(IpAddr::from(own)), Ip::from(IpAddr::from(to)));
            let pod = Pod(std::vec![from], true);
            if !pod.owns(&to) && !to.is_loopback() && !to.is_unspecified() && from != Ip::NONE {
                prop_assert_eq!(pod.steer(&from, &to, port, by_lo), OUTBOUND);
            }
        }

        /// The application's own mark bits are kept, and ours are set or cleared.
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

//! IP addresses as maps and programs hold them: 128 bits, IPv4 in the form `::ffff:a.b.c.d`.

/// An address, as four words in network byte order. Two spellings of one IPv4 address are equal.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, Ord, PartialEq, PartialOrd)]
pub struct Ip {
    /// The four words, each in network byte order.
    pub words: [u32; 4],
}

const MAPPED: u32 = 0x0000_ffff_u32.to_be();

impl Ip {
    /// No address: `::`, which no pod has.
    pub const NONE: Self = Self { words: [0; 4] };

    /// From an IPv4 address in network byte order.
    #[inline(always)]
    pub const fn v4(word: u32) -> Self {
        Self {
            words: [0, 0, MAPPED, word],
        }
    }

    /// From an IPv6 address, four words in network byte order.
    #[inline(always)]
    pub const fn v6(words: [u32; 4]) -> Self {
        Self { words }
    }

    /// The unspecified address of its family, `0.0.0.0` or `::`.
    #[inline(always)]
    pub const fn family(&self) -> Self {
        Self {
            words: [0, 0, if self.is_v4() { MAPPED } else { 0 }, 0],
        }
    }

    /// Stands for an interface that has an address of a family, where addresses are keys. Nobody has
    /// it: it is one of multicast.
    #[inline(always)]
    pub const fn interface(index: u32, v4: bool) -> Self {
        Self {
            words: [u32::MAX, u32::MAX, v4 as u32, index],
        }
    }

    /// Whether it is an IPv4 address, in either spelling.
    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        self.words[0] == 0 && self.words[1] == 0 && self.words[2] == MAPPED
    }

    /// `127.0.0.0/8` or `::1`.
    #[inline(always)]
    pub const fn is_loopback(&self) -> bool {
        if self.is_v4() {
            self.words[3] & 0xff00_0000_u32.to_be() == 0x7f00_0000_u32.to_be()
        } else {
            self.words[0] == 0
                && self.words[1] == 0
                && self.words[2] == 0
                && self.words[3] == 1_u32.to_be()
        }
    }

    /// `0.0.0.0` or `::`; to connect there is to connect to loopback.
    #[inline(always)]
    pub const fn is_unspecified(&self) -> bool {
        self.words[0] == 0
            && self.words[1] == 0
            && self.words[3] == 0
            && (self.words[2] == 0 || self.words[2] == MAPPED)
    }

    /// The bytes, in the order they are written.
    pub fn octets(&self) -> [u8; 16] {
        let mut octets = [0; 16];
        for (chunk, word) in octets.chunks_exact_mut(4).zip(self.words) {
            chunk.copy_from_slice(&word.to_ne_bytes());
        }
        octets
    }

    /// From bytes in the order they are written.
    pub fn from_octets(octets: [u8; 16]) -> Self {
        let mut words = [0; 4];
        for (word, chunk) in words.iter_mut().zip(octets.chunks_exact(4)) {
            *word = u32::from_ne_bytes([chunk[0], chunk[1], chunk[2], chunk[3]]);
        }
        Self { words }
    }
}

impl From<core::net::IpAddr> for Ip {
    fn from(address: core::net::IpAddr) -> Self {
        let v6 = match address {
            core::net::IpAddr::V4(v4) => v4.to_ipv6_mapped(),
            core::net::IpAddr::V6(v6) => v6,
        };
        Self::from_octets(v6.octets())
    }
}

impl From<Ip> for core::net::IpAddr {
    fn from(ip: Ip) -> Self {
        core::net::Ipv6Addr::from(ip.octets()).to_canonical()
    }
}

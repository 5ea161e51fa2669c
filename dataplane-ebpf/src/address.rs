//! IP addresses as maps and programs hold them: 128 bits, IPv4 in the form `::ffff:a.b.c.d`.
//!
//! Questions about an address are answered by arithmetic and without branches: the verifier walks through all
//! that follows a branch once for each way.

/// An address, as four words in network byte order. Both spellings of an IPv4 address are equal.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, Ord, PartialEq, PartialOrd)]
pub struct Ip {
    /// The four words, each in network byte order.
    pub words: [u32; 4],
}

/// Returns all bits if the number is 0, none otherwise: the borrow of subtracting 1.
#[inline(always)]
const fn all_if_zero(number: u32) -> u32 {
    ((number as u64).wrapping_sub(1) >> 32) as u32
}

/// Returns `true` if one of two numbers is 0. The product of two 32-bit numbers fits into 64 bits.
#[inline(always)]
const fn is_any_zero(one: u32, other: u32) -> bool {
    one as u64 * other as u64 == 0
}

const MAPPED: u32 = 0x0000_ffff_u32.to_be();

impl Ip {
    /// No address: `::`, which no pod has.
    pub const NONE: Self = Self { words: [0; 4] };

    /// Converts an IPv4 address in network byte order.
    #[inline(always)]
    pub const fn v4(word: u32) -> Self {
        Self {
            words: [0, 0, MAPPED, word],
        }
    }

    /// Converts an IPv6 address, four words in network byte order.
    #[inline(always)]
    pub const fn v6(words: [u32; 4]) -> Self {
        Self { words }
    }

    /// Converts the fields that a kernel context has for both families: the IPv4 field if the number is 0, or
    /// else the IPv6 field.
    #[inline(always)]
    pub const fn v4_if_zero(number: u32, v4: u32, v6: [u32; 4]) -> Self {
        let is_v4 = all_if_zero(number);
        let [a, b, c, d] = v6;
        Self {
            words: [
                a & !is_v4,
                b & !is_v4,
                (c & !is_v4) | (MAPPED & is_v4),
                (d & !is_v4) | (v4 & is_v4),
            ],
        }
    }

    /// Returns the unspecified address of its family, `0.0.0.0` or `::`.
    #[inline(always)]
    pub const fn family(&self) -> Self {
        Self {
            words: [0, 0, MAPPED & all_if_zero(self.not_v4()), 0],
        }
    }

    /// Returns the key that stands, among keys of addresses, for an interface with an address of this family.
    /// It is a multicast address, so no interface has it.
    #[inline(always)]
    pub const fn interface(index: u32, family: &Self) -> Self {
        Self {
            words: [u32::MAX, u32::MAX, 1 & all_if_zero(family.not_v4()), index],
        }
    }

    /// Returns `true` for an IPv4 address, in either spelling.
    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        self.not_v4() == 0
    }

    /// Returns `true` for `127.0.0.0/8` and `::1`.
    #[inline(always)]
    pub const fn is_loopback(&self) -> bool {
        let [a, b, c, d] = self.words;
        let not_v4 = self.not_v4() | ((d & 0xff00_0000_u32.to_be()) ^ 0x7f00_0000_u32.to_be());
        let not_v6 = a | b | c | (d ^ 1_u32.to_be());
        is_any_zero(not_v4, not_v6)
    }

    /// Returns `true` for `0.0.0.0` and `::`. Connecting there is connecting to loopback.
    #[inline(always)]
    pub const fn is_unspecified(&self) -> bool {
        let [a, b, c, d] = self.words;
        is_any_zero(self.not_v4() | d, a | b | c | d)
    }

    /// Returns `true` if both are the same address.
    #[inline(always)]
    pub const fn is(&self, other: &Self) -> bool {
        let ([a, b, c, d], [e, f, g, h]) = (self.words, other.words);
        (a ^ e) | (b ^ f) | (c ^ g) | (d ^ h) == 0
    }

    /// Returns 0 for an IPv4 address.
    #[inline(always)]
    const fn not_v4(&self) -> u32 {
        self.words[0] | self.words[1] | (self.words[2] ^ MAPPED)
    }

    /// Returns the bytes in network order.
    pub fn octets(&self) -> [u8; 16] {
        let mut octets = [0; 16];
        for (chunk, word) in octets.chunks_exact_mut(4).zip(self.words) {
            chunk.copy_from_slice(&word.to_ne_bytes());
        }
        octets
    }

    /// Converts bytes in network order.
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

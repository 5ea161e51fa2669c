//! IP addresses and CIDR blocks of the configuration. An IPv4-mapped IPv6 address, such as `::ffff:10.1.0.5`,
//! is read as its IPv4 address, since connections have it in that form.

use std::net::IpAddr;
use std::str::FromStr;

use ipnet::{IpNet, Ipv4Net};
use serde::{Deserialize, Deserializer, de};

/// An address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Address(pub(crate) IpAddr);

/// A CIDR block, or one address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cidr(pub(crate) IpNet);

impl FromStr for Address {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let address: IpAddr = text.parse().map_err(|_| "is not an IP address")?;
        Ok(Self(address.to_canonical()))
    }
}

impl FromStr for Cidr {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Ok(Address(address)) = text.parse() {
            return Ok(Self(address.into()));
        }
        let block: IpNet = text.parse().map_err(|_| "is not an IP address or block")?;
        let IpNet::V6(v6) = block else {
            return Ok(Self(block));
        };
        let Some(v4) = v6.addr().to_ipv4_mapped() else {
            return Ok(Self(block));
        };
        let length = v6.prefix_len().checked_sub(96);
        let v4 = length.and_then(|length| Ipv4Net::new(v4, length).ok());
        let v4 =
            v4.ok_or("has more than IPv4 in it, and an address that stands for one of IPv4")?;
        Ok(Self(v4.into()))
    }
}

/// Parses the text; the error has the text and what is wrong with it.
fn read<'de, D: Deserializer<'de>, T: FromStr<Err = &'static str>>(
    deserializer: D,
) -> Result<T, D::Error> {
    let text = String::deserialize(deserializer)?;
    text.parse()
        .map_err(|what| de::Error::custom(format_args!("`{text}` {what}")))
}

impl<'de> Deserialize<'de> for Address {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        read(deserializer)
    }
}

impl<'de> Deserialize<'de> for Cidr {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        read(deserializer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stands_for_ipv4_is_ipv4() {
        let address = |text: &str| text.parse::<Address>().map(|Address(is)| is.to_string());
        for (text, is) in [
            ("10.1.0.5", "10.1.0.5"),
            ("::ffff:10.1.0.5", "10.1.0.5"),
            ("::FFFF:a01:5", "10.1.0.5"),
            ("fd00::1", "fd00::1"),
            ("::10.1.0.5", "::a01:5"),
        ] {
            assert_eq!(address(text), Ok(is.to_owned()), "{text}");
        }
        assert!(address("10.1.0.05").is_err());
        let block = |text: &str| text.parse::<Cidr>().map(|Cidr(is)| is.to_string());
        for (text, is) in [
            ("10.0.0.0/8", "10.0.0.0/8"),
            ("10.1.0.5", "10.1.0.5/32"),
            ("::ffff:10.0.0.0/104", "10.0.0.0/8"),
            ("::ffff:10.1.0.5", "10.1.0.5/32"),
            ("::ffff:0:0/96", "0.0.0.0/0"),
            ("fd00::/16", "fd00::/16"),
            ("::/0", "::/0"),
        ] {
            assert_eq!(block(text), Ok(is.to_owned()), "{text}");
        }
        for text in ["::ffff:10.0.0.0/95", "::ffff:0:0/0", "10.0.0.0/33", "x"] {
            assert!(block(text).is_err(), "{text}");
        }
    }
}

//! Ethernet addresses.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use xxhash_rust::xxh3::xxh3_64;

/// The Ethernet address of a guest's network card: unicast, never all zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MacAddress([u8; 6]);

impl MacAddress {
    /// The address of card number `index` of the machine `name`, the same wherever it is computed.
    ///
    /// The first byte is QEMU's customary 0x52, which marks a locally administered unicast address; the other 40 bits
    /// come from a hash, so that among 10,000 cards two share an address with a probability of 5 in 100,000.
    pub fn derived(name: &str, index: usize) -> Self {
        let hash = xxh3_64(format!("{name}/{index}").as_bytes()).to_le_bytes();
        Self([0x52, hash[0], hash[1], hash[2], hash[3], hash[4]])
    }

    /// The six bytes in the order of transmission.
    pub const fn octets(self) -> [u8; 6] {
        self.0
    }
}

/// A text that isn't the address of a card.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" isn't a unicast Ethernet address; write six bytes such as \"52:54:00:12:34:56\"")]
pub struct MacAddressError(String);

impl FromStr for MacAddress {
    type Err = MacAddressError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || MacAddressError(text.escape_default().to_string());
        let mut octets = [0; 6];
        let mut parts = text.split(':');
        for octet in &mut octets {
            let part = parts.next().ok_or_else(error)?;
            if part.len() != 2 || !part.bytes().all(|byte| byte.is_ascii_hexdigit()) {
                return Err(error());
            }
            *octet = u8::from_str_radix(part, 16).map_err(|_| error())?;
        }
        let multicast = octets[0] & 1 == 1;
        if parts.next().is_some() || multicast || octets == [0; 6] { Err(error()) } else { Ok(Self(octets)) }
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl Serialize for MacAddress {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for MacAddress {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_str(MacVisitor)
    }
}

struct MacVisitor;

impl de::Visitor<'_> for MacVisitor {
    type Value = MacAddress;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an Ethernet address such as \"52:54:00:12:34:56\"")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<MacAddress, E> {
        text.parse().map_err(E::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn derived_addresses_never_change() {
        assert_eq!(MacAddress::derived("web1", 0), MacAddress::derived("web1", 0));
        assert_ne!(MacAddress::derived("web1", 0), MacAddress::derived("web1", 1));
        assert_ne!(MacAddress::derived("web1", 0), MacAddress::derived("web2", 0));
        let text = MacAddress::derived("web1", 0).to_string();
        assert_eq!(text.parse(), Ok(MacAddress::derived("web1", 0)));
    }

    #[test]
    fn nonsense_is_refused() {
        for text in
            ["", "52:54", "01:00:5e:00:00:01", "00:00:00:00:00:00", "52:54:00:12:34:56:78", "5:4:0:1:3:5"]
        {
            assert!(text.parse::<MacAddress>().is_err(), "{text}");
        }
    }
}

//! The networks that the pods of a routed cluster have their addresses of. Pure.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Networks that a cluster may have: each is a route on every node.
pub const MAX_NETWORKS: usize = 64;

/// One network: an address whose bits beyond the prefix are zero, and the prefix' length.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PodNetwork {
    address: IpAddr,
    prefix: u8,
}

/// Why a text names no network that pods can be in.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadNetwork {
    /// Not `ADDRESS/PREFIX`.
    #[error("`{0}` is not a network: write one like 10.77.0.0/24 or fd77::/64")]
    Syntax(String),
    /// An address in a network, not the network's.
    #[error("{given} has bits set behind its prefix: write {meant} for the network that it is in")]
    HostBits {
        /// What was written.
        given: String,
        /// The network.
        meant: PodNetwork,
    },
    /// Addresses that no pod may have.
    #[error(
        "{0} holds addresses that are no host's: name a network of global, private or unique local addresses"
    )]
    NotForHosts(String),
}

impl PodNetwork {
    /// The network that `address` is in.
    ///
    /// # Errors
    /// The prefix is longer than the address, or there are no hosts in such a network.
    pub fn around(address: IpAddr, prefix: u8) -> Result<Self, BadNetwork> {
        let address = match address {
            IpAddr::V4(v4) if prefix <= 32 => {
                IpAddr::V4(Ipv4Addr::from_bits(v4.to_bits() & mask4(prefix)))
            }
            IpAddr::V6(v6) if prefix <= 128 => {
                IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() & mask6(prefix)))
            }
            IpAddr::V4(_) | IpAddr::V6(_) => {
                return Err(BadNetwork::Syntax(format!("{address}/{prefix}")));
            }
        };
        let network = Self { address, prefix };
        match NOT_FOR_HOSTS.iter().any(|not| not.overlaps(network)) {
            true => Err(BadNetwork::NotForHosts(network.to_string())),
            false => Ok(network),
        }
    }

    /// Its first address.
    pub fn address(self) -> IpAddr {
        self.address
    }

    /// How many bits of an address say that it is in here.
    pub fn prefix(self) -> u8 {
        self.prefix
    }

    /// Whether it has this address.
    pub fn contains(self, address: IpAddr) -> bool {
        match (self.address, address) {
            (IpAddr::V4(network), IpAddr::V4(address)) => {
                address.to_bits() & mask4(self.prefix) == network.to_bits()
            }
            (IpAddr::V6(network), IpAddr::V6(address)) => {
                address.to_bits() & mask6(self.prefix) == network.to_bits()
            }
            (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => false,
        }
    }

    /// Whether an address is in both.
    pub fn overlaps(self, other: Self) -> bool {
        // Two prefixes are nested or apart.
        self.contains(other.address) || other.contains(self.address)
    }

    /// Whether it is one of IPv4.
    pub fn is_ipv4(self) -> bool {
        self.address.is_ipv4()
    }
}

/// What the kernel routes in no table of its own, or to nobody (RFC 6890): unspecified, loopback, link-local, multicast and
/// reserved addresses, and IPv4 within IPv6.
const NOT_FOR_HOSTS: [PodNetwork; 7] = [
    v4([0, 0, 0, 0], 8),
    v4([127, 0, 0, 0], 8),
    v4([169, 254, 0, 0], 16),
    v4([224, 0, 0, 0], 3),
    v6([0, 0], 8),
    v6([0xfe80, 0], 10),
    v6([0xff00, 0], 8),
];

const fn v4([a, b, c, d]: [u8; 4], prefix: u8) -> PodNetwork {
    PodNetwork {
        address: IpAddr::V4(Ipv4Addr::new(a, b, c, d)),
        prefix,
    }
}

const fn v6([a, b]: [u16; 2], prefix: u8) -> PodNetwork {
    PodNetwork {
        address: IpAddr::V6(Ipv6Addr::new(a, b, 0, 0, 0, 0, 0, 0)),
        prefix,
    }
}

const fn mask4(prefix: u8) -> u32 {
    match prefix {
        0 => 0,
        _ => u32::MAX << (32 - prefix as u32),
    }
}

const fn mask6(prefix: u8) -> u128 {
    match prefix {
        0 => 0,
        _ => u128::MAX << (128 - prefix as u32),
    }
}

impl FromStr for PodNetwork {
    type Err = BadNetwork;

    fn from_str(text: &str) -> Result<Self, BadNetwork> {
        let syntax = || BadNetwork::Syntax(text.to_owned());
        let (address, prefix) = text.split_once('/').ok_or_else(syntax)?;
        let address: IpAddr = address.parse().map_err(|_| syntax())?;
        // `u8` takes `+8` and `08` as well.
        let prefix = Some(prefix)
            .filter(|digits| digits.bytes().all(|digit| digit.is_ascii_digit()))
            .and_then(|digits| digits.parse().ok())
            .ok_or_else(syntax)?;
        let network = Self::around(address, prefix).map_err(|error| match error {
            BadNetwork::Syntax(_) => syntax(),
            other => other,
        })?;
        if network.address != address {
            return Err(BadNetwork::HostBits {
                given: text.to_owned(),
                meant: network,
            });
        }
        Ok(network)
    }
}

impl TryFrom<String> for PodNetwork {
    type Error = BadNetwork;

    fn try_from(text: String) -> Result<Self, BadNetwork> {
        text.parse()
    }
}

impl From<PodNetwork> for String {
    fn from(network: PodNetwork) -> Self {
        network.to_string()
    }
}

impl fmt::Display for PodNetwork {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

/// All networks of a cluster's pods: at least one, none within another, in order of their addresses. The same on every node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<PodNetwork>", into = "Vec<PodNetwork>")]
pub struct PodNetworks(Vec<PodNetwork>);

/// Why a list of networks is none of a cluster's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadNetworks {
    /// There is none.
    #[error("needs at least one network, such as 10.77.0.0/24: pods get no other addresses")]
    Empty,
    /// More than nodes keep routes for.
    #[error("names {0} networks, and there may be {MAX_NETWORKS}: join them to larger ones")]
    TooMany(usize),
    /// One address would be in both.
    #[error("names {0} and {1}, which overlap: keep the larger one")]
    Overlap(PodNetwork, PodNetwork),
}

impl PodNetworks {
    /// The networks, in order.
    pub fn iter(&self) -> impl Iterator<Item = PodNetwork> {
        self.0.iter().copied()
    }

    /// Whether there are networks of IPv6 among them.
    pub fn has_ipv6(&self) -> bool {
        self.iter().any(|network| !network.is_ipv4())
    }

    /// The network that an address is in.
    pub fn of(&self, address: IpAddr) -> Option<PodNetwork> {
        self.iter().find(|network| network.contains(address))
    }
}

impl TryFrom<Vec<PodNetwork>> for PodNetworks {
    type Error = BadNetworks;

    fn try_from(mut networks: Vec<PodNetwork>) -> Result<Self, BadNetworks> {
        if networks.is_empty() {
            return Err(BadNetworks::Empty);
        }
        if networks.len() > MAX_NETWORKS {
            return Err(BadNetworks::TooMany(networks.len()));
        }
        networks.sort();
        // In order of their addresses, what lies within a network comes right behind it.
        for pair in networks.windows(2) {
            if let [one, next] = pair
                && one.overlaps(*next)
            {
                return Err(BadNetworks::Overlap(*one, *next));
            }
        }
        Ok(Self(networks))
    }
}

impl From<PodNetworks> for Vec<PodNetwork> {
    fn from(networks: PodNetworks) -> Self {
        networks.0
    }
}

impl fmt::Display for PodNetworks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, network) in self.0.iter().enumerate() {
            if at > 0 {
                f.write_str(", ")?;
            }
            write!(f, "{network}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn networks(list: &[&str]) -> Result<PodNetworks, BadNetworks> {
        let list: Vec<PodNetwork> = list.iter().map(|text| text.parse().unwrap()).collect();
        list.try_into()
    }

    #[test]
    fn a_network_is_written_as_it_was_read() {
        for text in [
            "10.77.0.0/24",
            "fd77::/64",
            "10.0.0.1/32",
            "2001:db8::1/128",
        ] {
            assert_eq!(text.parse::<PodNetwork>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn what_is_no_network_says_what_to_write() {
        for text in [
            "",
            "10.77.0.0",
            "10.77.0.0/33",
            "fd77::/129",
            "a/8",
            "10.0.0.0/+8",
        ] {
            let error = text.parse::<PodNetwork>().unwrap_err().to_string();
            assert!(error.contains("10.77.0.0/24"), "{text}: {error}");
        }
        let error = "10.77.0.9/24"
            .parse::<PodNetwork>()
            .unwrap_err()
            .to_string();
        assert!(error.contains("write 10.77.0.0/24"), "{error}");
    }

    #[test]
    fn addresses_that_are_no_hosts_are_no_pods() {
        for text in [
            "0.0.0.0/0",
            "127.0.0.0/8",
            "169.254.1.0/24",
            "232.0.0.0/8",
            "::/0",
            "::1/128",
        ] {
            let error = text.parse::<PodNetwork>().unwrap_err();
            assert_eq!(error, BadNetwork::NotForHosts(text.to_owned()));
        }
        for text in ["fe80::/64", "ff02::/16", "::ffff:10.0.0.0/104"] {
            let error = text.parse::<PodNetwork>().unwrap_err();
            assert!(matches!(error, BadNetwork::NotForHosts(_)), "{text}");
        }
    }

    #[test]
    fn networks_of_a_cluster_are_apart() {
        let list = networks(&["fd77::/64", "10.77.0.0/24", "10.77.1.0/24"]).unwrap();
        assert_eq!(list.to_string(), "10.77.0.0/24, 10.77.1.0/24, fd77::/64");
        let at = |text: &str| list.of(text.parse().unwrap()).map(|n| n.to_string());
        assert_eq!(at("10.77.1.9").as_deref(), Some("10.77.1.0/24"));
        assert_eq!(at("fd77::9").as_deref(), Some("fd77::/64"));
        assert_eq!(at("10.78.0.1"), None);
        assert_eq!(networks(&[]), Err(BadNetworks::Empty));
        let overlap = networks(&["10.77.0.128/25", "fd77::/64", "10.77.0.0/24"]);
        let said = overlap.unwrap_err().to_string();
        assert!(said.contains("10.77.0.0/24 and 10.77.0.128/25"), "{said}");
        assert!(networks(&["fd77::/64", "fd77::/64"]).is_err());
    }
}

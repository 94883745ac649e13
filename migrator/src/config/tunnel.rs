//! The key `tunnel`: `off`, or a section.

use serde::de::value::MapAccessDeserializer;
use serde::de::{Error, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

/// The port that RFC 7348 has for VXLAN.
const VXLAN_PORT: u16 = 4789;
/// VXLAN network identifiers have 24 bits.
pub(super) const VNI_MAX: u32 = (1 << 24) - 1;
/// What every IPv6 link takes (RFC 8200), and the longest IPv4 packet.
pub(super) const MTU_RANGE: std::ops::RangeInclusive<u32> = 1280..=65535;

/// What late frames of a departed pod go through.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tunnel {
    /// The service relays them.
    #[default]
    Off,
    /// The kernel's VXLAN.
    Vxlan {
        /// Network identifier, the same on every node.
        vni: u32,
        /// UDP port, the same on every node.
        port: u16,
        /// The longest packet that pods are sent, if it is shorter than the bridge takes.
        mtu: Option<u32>,
    },
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Kind {
    Vxlan,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Section {
    kind: Kind,
    vni: u32,
    #[serde(default = "vxlan_port")]
    port: u16,
    #[serde(default)]
    mtu: Option<u32>,
}

fn vxlan_port() -> u16 {
    VXLAN_PORT
}

impl<'de> Deserialize<'de> for Tunnel {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OffOrSection;
        impl<'de> Visitor<'de> for OffOrSection {
            type Value = Tunnel;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("`off`, or a section like { kind: vxlan, vni: 7077, port: 4789 }")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Tunnel, E> {
                match text {
                    "off" => Ok(Tunnel::Off),
                    _ => Err(E::invalid_value(serde::de::Unexpected::Str(text), &self)),
                }
            }

            /// What older YAML takes `off` for.
            fn visit_bool<E: Error>(self, on: bool) -> Result<Tunnel, E> {
                match on {
                    false => Ok(Tunnel::Off),
                    true => Err(E::invalid_value(serde::de::Unexpected::Bool(on), &self)),
                }
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Tunnel, A::Error> {
                let section = Section::deserialize(MapAccessDeserializer::new(map))?;
                let Kind::Vxlan = section.kind;
                Ok(Tunnel::Vxlan {
                    vni: section.vni,
                    port: section.port,
                    mtu: section.mtu,
                })
            }
        }
        deserializer.deserialize_any(OffOrSection)
    }
}

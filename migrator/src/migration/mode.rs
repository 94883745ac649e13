//! How the memory of a migration crosses, as the user wishes it.

use serde::{Deserialize, Serialize};

/// When the guest's memory crosses.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// All of it before the guest moves. What a guest does that writes faster than the link carries, [`OnStall`] says.
    Precopy,
    /// None of it before the guest moves: it moves at once, and waits for each page that it touches.
    Postcopy,
    /// One pass before; the rest afterwards, unless it fits the downtime limit.
    Hybrid,
    /// Before, as long as that gets on; the rest afterwards.
    #[default]
    Auto,
}

impl std::fmt::Display for Mode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Precopy => "precopy",
            Self::Postcopy => "postcopy",
            Self::Hybrid => "hybrid",
            Self::Auto => "auto",
        })
    }
}

/// What is done when rounds do not get on and the mode is [`Mode::Precopy`].
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum OnStall {
    /// Rounds go on until the guest is calmer or the user cancels.
    Wait,
    /// The guest's CPUs are slowed in steps until rounds get on; if that does not help, the migration fails.
    #[default]
    Throttle,
    /// The migration fails.
    Fail,
}

/// When images cross that the destination lacks.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum ImagesMode {
    /// Before the guest moves what it read first, a small part; the rest afterwards, from any node that has it.
    #[default]
    Demand,
    /// All of them before the guest moves, which then depends on nobody.
    Complete,
}

/// Steps of the throttle: the part of the time, in percent, for which the guest's CPUs stand still.
pub const THROTTLE_STEPS: [u8; 6] = [20, 40, 60, 75, 85, 95];

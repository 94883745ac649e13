//! The key `forwarding`: what a node goes on doing for pods that have left it.

use std::ops::RangeInclusive;
use std::time::Duration;

use serde::Deserialize;

/// Up to a year; the programs count seconds in 32 bits.
const LIMITS_S: RangeInclusive<u32> = 1..=31_536_000;

/// What a node goes on doing for pods that have left it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Forwarding {
    /// How long a flow may live on whose address translation needs this node, in seconds.
    pub bound_limit_s: u32,
}

impl Default for Forwarding {
    fn default() -> Self {
        Self {
            bound_limit_s: 3600,
        }
    }
}

impl Forwarding {
    /// The same as a duration.
    pub fn bound_limit(self) -> Duration {
        Duration::from_secs(u64::from(self.bound_limit_s))
    }

    pub(super) fn check(self) -> Result<(), (&'static str, String)> {
        if LIMITS_S.contains(&self.bound_limit_s) {
            return Ok(());
        }
        let (least, most) = (LIMITS_S.start(), LIMITS_S.end());
        Err((
            "forwarding.bound_limit_s",
            format!("must be between {least} and {most}"),
        ))
    }
}

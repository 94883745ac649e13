//! `cargo xtask test soak --switchovers N --aborts N`: a pod moves to and fro as fast as it can, or is kept from it at a
//! random step, under every kind of traffic, from outside and from a pod on each node. Nothing may be lost, doubled or
//! reordered within a flow, on the way there and on the way back.
//!
//! The programs that send and receive are `xtask/src/bin/flows`. docs/testing.md says what is checked.

mod abort;
mod drive;
pub mod kind;
mod look;
mod peers;
mod pods;
mod summary;
pub mod tally;
#[cfg(test)]
mod tests;

pub use abort::Way;
pub use drive::run;
pub use summary::{Flow, Move, Summary};

/// What to do, and with what load.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Instead: move a pod so many times under every kind of traffic, from outside and from pods on both nodes
    #[arg(long, default_value_t = 0)]
    pub switchovers: u32,
    /// Instead, or then: begin so many moves and end them at a random step
    #[arg(long, default_value_t = 0)]
    pub aborts: u32,
    /// With these: packets a second of each of the three senders, over all kinds
    #[arg(long, default_value_t = RATE)]
    pub rate: u32,
    /// With these: what random choices follow from; the time if not given
    #[arg(long)]
    pub seed: Option<u64>,
    /// With these: look at all flows after so many moves, and after the last
    #[arg(long, default_value_t = CHECK_EVERY)]
    pub check_every: u32,
}

/// What two CPUs that emulate three guests bear with room to spare.
pub const RATE: u32 = 96;
/// Looking takes some requests to the guests.
pub const CHECK_EVERY: u32 = 10;

impl Default for Options {
    fn default() -> Self {
        Self {
            switchovers: 0,
            aborts: 0,
            rate: RATE,
            seed: None,
            check_every: CHECK_EVERY,
        }
    }
}

impl Options {
    /// Whether it was asked for.
    pub fn is_wanted(&self) -> bool {
        self.switchovers > 0 || self.aborts > 0
    }
}

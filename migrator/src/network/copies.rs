//! Broadcast and multicast frames reach both nodes. In the overlap of a switchover the destination gets
//! one copy down the log and one of its own: each pair counts once. Pure: time comes in.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use twox_hash::XxHash3_64;

use super::sys::VNET_HEADER;

/// How far apart the two copies of one frame may reach the destination. A sender that repeats a frame
/// (ARP does, once a second) must not have its second one taken for a copy of the first.
const SKEW: Duration = Duration::from_millis(50);

/// The copies that came down the log and have not met their twin.
#[derive(Debug, Default)]
pub(crate) struct Copies {
    seen: HashMap<u64, Vec<Instant>>,
}

impl Copies {
    /// A group frame came down the log.
    pub(crate) fn logged(&mut self, frame: &[u8], now: Instant) {
        self.seen.entry(content(frame)).or_default().push(now);
    }

    /// Whether a group frame that came directly, at `arrived`, is the twin of a logged one. Each logged
    /// frame meets one twin.
    pub(crate) fn is_twin(&mut self, frame: &[u8], arrived: Instant) -> bool {
        let Some(times) = self.seen.get_mut(&content(frame)) else {
            return false;
        };
        // A copy that came down the log later than this one came directly is a twin at any distance:
        // the log may be slow. One that came long before is an earlier frame with the same content.
        let found = times
            .iter()
            .position(|logged| arrived.saturating_duration_since(*logged) <= SKEW);
        match found {
            Some(at) => {
                times.remove(at);
                true
            }
            None => false,
        }
    }
}

/// The frame without its virtio-net header: that one tells what a path did about checksums.
fn content(frame: &[u8]) -> u64 {
    XxHash3_64::oneshot(frame.get(VNET_HEADER..).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(n: u8) -> Vec<u8> {
        vec![n; 60]
    }

    #[test]
    fn each_logged_frame_meets_one_twin() {
        let now = Instant::now();
        let mut copies = Copies::default();
        copies.logged(&frame(1), now);
        copies.logged(&frame(1), now);
        assert!(!copies.is_twin(&frame(2), now));
        assert!(copies.is_twin(&frame(1), now));
        assert!(copies.is_twin(&frame(1), now));
        assert!(!copies.is_twin(&frame(1), now));
    }

    #[test]
    fn a_repeated_frame_is_not_a_twin_of_the_earlier_one() {
        let now = Instant::now();
        let mut copies = Copies::default();
        copies.logged(&frame(1), now);
        assert!(!copies.is_twin(&frame(1), now + Duration::from_secs(1)));
        assert!(copies.is_twin(&frame(1), now + SKEW));
    }

    #[test]
    fn a_slow_log_still_finds_the_twin() {
        let now = Instant::now();
        let mut copies = Copies::default();
        copies.logged(&frame(1), now + Duration::from_millis(400));
        assert!(copies.is_twin(&frame(1), now));
    }

    #[test]
    fn the_virtio_header_does_not_count() {
        let now = Instant::now();
        let mut copies = Copies::default();
        let mut other = frame(1);
        other[0] = 9;
        copies.logged(&frame(1), now);
        assert!(copies.is_twin(&other, now));
    }
}

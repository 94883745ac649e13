//! A limit of bytes a second that several connections share.

use std::num::NonZeroU64;
use std::sync::Mutex;
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

/// Bytes that may go out at once after a pause, as time at the limit.
const BURST: Duration = Duration::from_millis(20);

/// Hands out the right to send, in the order in which it is asked for.
#[derive(Debug)]
pub(super) struct Pace {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    limit: Option<NonZeroU64>,
    /// When everything that was granted has gone out at the limit.
    free_at: Instant,
}

impl Pace {
    pub(super) fn new(limit: Option<NonZeroU64>) -> Self {
        Self {
            state: Mutex::new(State {
                limit,
                free_at: Instant::now(),
            }),
        }
    }

    /// Ends the limit for whoever asks from now on.
    pub(super) fn lift(&self) {
        self.lock().limit = None;
    }

    /// Waits until `bytes` more may go out.
    pub(super) async fn wait(&self, bytes: u64) {
        let until = self.lock().grant(bytes, Instant::now());
        if let Some(until) = until {
            sleep_until(until).await;
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        // A panic between two assignments of plain values leaves nothing torn.
        self.state
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl State {
    fn grant(&mut self, bytes: u64, now: Instant) -> Option<Instant> {
        let limit = self.limit?;
        let start = self.free_at.max(now - BURST);
        self.free_at = start + Duration::from_secs_f64(bytes as f64 / limit.get() as f64);
        (self.free_at > now).then_some(self.free_at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_of_grants_holds_the_limit_and_one_burst() {
        let start = Instant::now();
        let mut state = State {
            limit: NonZeroU64::new(1_000_000),
            free_at: start,
        };
        let mut now = start + Duration::from_secs(5);
        let end = now + Duration::from_secs(1);
        let mut sent = 0u64;
        while now < end {
            sent += 10_000;
            now = state.grant(10_000, now).map_or(now, |until| until.max(now));
        }
        assert!(
            (1_000_000..=1_040_000).contains(&sent),
            "{sent} bytes in a second"
        );
    }

    #[test]
    fn without_a_limit_nothing_waits() {
        let now = Instant::now();
        let mut state = State {
            limit: None,
            free_at: now,
        };
        assert_eq!(state.grant(u64::MAX, now), None);
    }
}

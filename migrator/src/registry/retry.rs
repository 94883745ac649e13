//! When a request that failed is tried again. Pure: it is told what happened, and says how long to wait.

use std::time::Duration;

/// Tries in a row that bring nothing before it is given up.
const FRUITLESS: u32 = 5;

/// Tries in all: a registry that sends a few bytes each time must not keep us for ever.
const TRIES: u32 = 50;

/// The first wait; each further one is twice as long.
const FIRST_WAIT: Duration = Duration::from_millis(250);

/// The longest wait of our own choice.
const LONGEST_WAIT: Duration = Duration::from_secs(8);

/// The longest `Retry-After` that is waited for; beyond it the user is told when to come again.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a try came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Failed {
    /// A cause that may pass: the link, or a 5xx answer.
    Passing {
        /// Whether bytes came before it failed.
        progress: bool,
    },
    /// The registry asks for a pause (429 or 503).
    Asked {
        /// Its `Retry-After`, if it named one.
        after: Option<Duration>,
    },
    /// A cause that stays.
    Lasting,
}

/// The tries of one request.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Retries {
    fruitless: u32,
    all: u32,
}

impl Retries {
    /// How long to wait before the next try; `None` if there is none.
    pub(super) fn after(&mut self, failed: Failed) -> Option<Duration> {
        self.all += 1;
        let (progress, asked) = match failed {
            Failed::Lasting => return None,
            Failed::Passing { progress } => (progress, None),
            Failed::Asked { after } => (false, after),
        };
        self.fruitless = if progress { 1 } else { self.fruitless + 1 };
        if self.fruitless >= FRUITLESS || self.all >= TRIES {
            return None;
        }
        let own = FIRST_WAIT.saturating_mul(1 << (self.fruitless - 1));
        match asked {
            Some(asked) if asked > PATIENCE => None,
            Some(asked) => Some(asked.max(FIRST_WAIT)),
            None => Some(own.min(LONGEST_WAIT)),
        }
    }

    /// Tries so far.
    pub(super) fn tries(&self) -> u32 {
        self.all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STUCK: Failed = Failed::Passing { progress: false };
    const BROKEN: Failed = Failed::Passing { progress: true };

    #[test]
    fn waits_grow_and_end() {
        let mut retries = Retries::default();
        let waits: Vec<_> = std::iter::from_fn(|| retries.after(STUCK)).collect();
        let ms: Vec<_> = waits.iter().map(Duration::as_millis).collect();
        assert_eq!(ms, [250, 500, 1000, 2000]);
        assert_eq!(retries.tries(), 5);
    }

    #[test]
    fn progress_begins_the_count_anew_but_not_for_ever() {
        let mut retries = Retries::default();
        for _ in 0..TRIES - 1 {
            assert_eq!(retries.after(BROKEN), Some(FIRST_WAIT));
        }
        assert_eq!(retries.after(BROKEN), None);
    }

    #[test]
    fn a_pause_that_is_asked_for_is_kept_if_it_is_short() {
        let asked = |seconds| Failed::Asked {
            after: Some(Duration::from_secs(seconds)),
        };
        let mut retries = Retries::default();
        assert_eq!(retries.after(asked(7)), Some(Duration::from_secs(7)));
        assert_eq!(retries.after(asked(0)), Some(FIRST_WAIT));
        assert_eq!(retries.after(asked(61)), None);
    }

    #[test]
    fn what_stays_is_not_tried_again() {
        assert_eq!(Retries::default().after(Failed::Lasting), None);
    }
}

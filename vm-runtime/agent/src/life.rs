//! When a container that has ended is started again, and how it fares until then. Pure: time comes in.

use std::time::{Duration, Instant};

use guest_agent::protocol::settings::{Condition, Reason, Restart};

/// The second restart's wait; the first comes at once, as the kubelet has it.
const FIRST_WAIT: Duration = Duration::from_secs(10);

/// The longest wait: the kubelet's.
const LONGEST_WAIT: Duration = Duration::from_secs(300);

/// A container that has run for so long has recovered: the kubelet's rule.
const RECOVERED: Duration = Duration::from_secs(600);

/// Waits between restarts: 0, 10, 20, 40 ... 300 s.
#[derive(Debug, Default)]
struct Backoff {
    next: Duration,
}

impl Backoff {
    /// How long to wait after a life of this length.
    fn wait(&mut self, ran: Duration) -> Duration {
        if ran >= RECOVERED {
            self.next = Duration::ZERO;
        }
        let wait = self.next;
        self.next = (wait * 2).clamp(FIRST_WAIT, LONGEST_WAIT);
        wait
    }
}

/// A container's lives, one after the other.
#[derive(Debug, Default)]
pub(crate) struct Life {
    restarts: u32,
    backoff: Backoff,
    began: Option<Instant>,
    again_at: Option<Instant>,
    ready: bool,
    reason: Option<Reason>,
    last_code: Option<i32>,
    unhealthy: bool,
}

impl Life {
    /// It runs; `ready` unless a probe has to say so first.
    pub(crate) fn started(&mut self, ready: bool, now: Instant) {
        self.began = Some(now);
        self.again_at = None;
        self.ready = ready;
        self.unhealthy = false;
    }

    /// A probe has found that it must end. False if that is known.
    pub(crate) fn condemn(&mut self) -> bool {
        !std::mem::replace(&mut self.unhealthy, true)
    }

    /// Sets whether it is ready. True if that is news.
    pub(crate) fn set_ready(&mut self, ready: bool) -> bool {
        std::mem::replace(&mut self.ready, ready) != ready
    }

    /// It has ended.
    pub(crate) fn ended(&mut self, policy: Restart, code: i32, oom: bool, now: Instant) {
        self.ready = false;
        self.last_code = Some(code);
        self.reason = Some(match (oom, self.unhealthy, code) {
            (true, _, _) => Reason::OomKilled,
            (false, true, _) => Reason::Unhealthy,
            (false, false, 0) => Reason::Completed,
            (false, false, _) => Reason::Error,
        });
        let again = match policy {
            Restart::Never => false,
            Restart::OnFailure => code != 0 || self.unhealthy,
            Restart::Always => true,
        };
        if again {
            self.wait(now);
        }
    }

    /// It could not be started again: it is tried once more later.
    pub(crate) fn not_started(&mut self, now: Instant) {
        self.reason = Some(Reason::StartError);
        self.began = None;
        self.wait(now);
    }

    fn wait(&mut self, now: Instant) {
        let ran = self.began.map_or(Duration::ZERO, |began| now - began);
        self.again_at = Some(now + self.backoff.wait(ran));
    }

    /// It is to be started again now. True once.
    pub(crate) fn take_due(&mut self, now: Instant) -> bool {
        let due = self.again_at.is_some_and(|at| at <= now);
        if due {
            self.again_at = None;
            self.restarts += 1;
        }
        due
    }

    /// When it is to be started again.
    pub(crate) fn again_at(&self) -> Option<Instant> {
        self.again_at
    }

    /// It is not started again: the pod ends.
    pub(crate) fn give_up(&mut self) {
        self.again_at = None;
    }

    /// As the host is told.
    pub(crate) fn condition(&self, container: &str, now: Instant) -> Condition {
        let left = |at: Instant| at.saturating_duration_since(now).as_millis();
        Condition {
            container: container.to_owned(),
            restarts: self.restarts,
            ready: self.ready,
            reason: self.reason,
            last_code: self.last_code,
            waits_ms: self
                .again_at
                .map(|at| u64::try_from(left(at)).unwrap_or(u64::MAX)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn waits_double_up_to_five_minutes_and_begin_anew_after_ten_good_ones() {
        let mut backoff = Backoff::default();
        let waits: Vec<u64> = (0..8).map(|_| backoff.wait(SECOND).as_secs()).collect();
        assert_eq!(waits, [0, 10, 20, 40, 80, 160, 300, 300]);
        assert_eq!(backoff.wait(600 * SECOND), Duration::ZERO);
        assert_eq!(backoff.wait(SECOND), 10 * SECOND);
    }

    #[test]
    fn the_policy_decides_which_end_is_the_last() {
        let now = Instant::now();
        let again = |policy, code, unhealthy: bool| {
            let mut life = Life::default();
            life.started(true, now);
            if unhealthy {
                assert!(life.condemn() && !life.condemn());
            }
            life.ended(policy, code, false, now);
            life.again_at().is_some()
        };
        assert!(!again(Restart::Never, 1, false) && !again(Restart::Never, 1, true));
        assert!(!again(Restart::OnFailure, 0, false) && again(Restart::OnFailure, 1, false));
        // A probe that fails is a failure, however politely the program ends.
        assert!(again(Restart::OnFailure, 0, true));
        assert!(again(Restart::Always, 0, false));
    }

    #[test]
    fn what_is_told_is_why_it_ended_and_how_often_it_began() {
        let now = Instant::now();
        let mut life = Life::default();
        life.started(false, now);
        assert!(life.set_ready(true) && !life.set_ready(true));
        life.ended(Restart::Always, 137, true, now);
        assert!(life.take_due(now) && !life.take_due(now));
        life.started(true, now);
        life.ended(Restart::Always, 1, false, now);
        assert!(!life.take_due(now));
        let told = life.condition("c", now + SECOND);
        assert_eq!((told.restarts, told.ready), (1, false));
        assert_eq!(
            (told.reason, told.last_code),
            (Some(Reason::Error), Some(1))
        );
        assert_eq!(told.waits_ms, Some(9_000));
        life.give_up();
        assert_eq!(life.condition("c", now).waits_ms, None);
    }
}

//! When a container is checked, and what the results come to. Pure: time and results come in.

use std::time::{Duration, Instant};

use guest_agent::protocol::settings::{Check, ContainerSettings, Probe};
use nix::unistd::Pid;

/// What a probe has found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Finding {
    /// It must end, and may be started again.
    Unhealthy,
    /// It takes requests.
    Ready,
    /// It takes none.
    NotReady,
}

/// One probe of a container that runs.
#[derive(Debug)]
struct Prober {
    probe: Probe,
    next: Instant,
    /// The process that checks, and until when it may.
    under_way: Option<(Pid, Instant)>,
    good: u32,
    bad: u32,
}

impl Prober {
    fn new(probe: &Probe, began: Instant) -> Self {
        Self {
            probe: probe.clone(),
            next: began + seconds(probe.initial_delay_s),
            under_way: None,
            good: 0,
            bad: 0,
        }
    }

    fn wakes(&self) -> Instant {
        self.under_way.map_or(self.next, |(_, until)| until)
    }

    /// Counts a result: `Some(true)` is a success of the probe, `Some(false)` a failure.
    fn result(&mut self, good: bool) -> Option<bool> {
        self.under_way = None;
        let (count, other, enough) = match good {
            true => (&mut self.good, &mut self.bad, self.probe.successes),
            false => (&mut self.bad, &mut self.good, self.probe.failures),
        };
        *count = count.saturating_add(1);
        *other = 0;
        (*count >= enough).then_some(good)
    }
}

fn seconds(n: u32) -> Duration {
    Duration::from_secs(n.into())
}

/// The probes of a container that runs.
#[derive(Debug)]
pub(crate) struct Health {
    startup: Option<Prober>,
    liveness: Option<Prober>,
    readiness: Option<Prober>,
}

impl Health {
    /// Of a container that has just begun.
    pub(crate) fn new(settings: &ContainerSettings, now: Instant) -> Self {
        let prober = |probe: &Option<Probe>| probe.as_ref().map(|probe| Prober::new(probe, now));
        Self {
            startup: prober(&settings.startup),
            liveness: prober(&settings.liveness),
            readiness: prober(&settings.readiness),
        }
    }

    /// Whether it is ready before any probe has said so.
    pub(crate) fn begins_ready(&self) -> bool {
        self.startup.is_none() && self.readiness.is_none()
    }

    /// When there is something to do.
    pub(crate) fn wakes(&self) -> Option<Instant> {
        self.active().map(Prober::wakes).min()
    }

    /// Until the startup probe has succeeded, there is no other.
    fn active(&self) -> impl Iterator<Item = &Prober> {
        let others = [&self.liveness, &self.readiness].into_iter().flatten();
        let others = others.filter(|_| self.startup.is_none());
        self.startup.iter().chain(others)
    }

    fn active_mut(&mut self) -> impl Iterator<Item = &mut Prober> {
        let begun = self.startup.is_none();
        let others = [&mut self.liveness, &mut self.readiness];
        let others = others.into_iter().flatten().filter(move |_| begun);
        self.startup.iter_mut().chain(others)
    }

    /// Begins what is due by `begin`, and ends what takes too long by `kill`.
    pub(crate) fn tick(
        &mut self,
        now: Instant,
        mut begin: impl FnMut(&Check, Duration) -> Option<Pid>,
        mut kill: impl FnMut(Pid),
    ) -> Vec<Finding> {
        let mut results = Vec::new();
        for (at, prober) in self.active_mut().enumerate() {
            if let Some((pid, until)) = prober.under_way {
                if until <= now {
                    kill(pid);
                    results.push((at, prober.result(false)));
                }
            } else if prober.next <= now {
                prober.next = now + seconds(prober.probe.period_s);
                let limit = seconds(prober.probe.timeout_s);
                match begin(&prober.probe.check, limit) {
                    Some(pid) => prober.under_way = Some((pid, now + limit)),
                    None => results.push((at, prober.result(false))),
                }
            }
        }
        let found = results
            .into_iter()
            .filter_map(|(at, r)| self.find(at, r?, now));
        found.collect()
    }

    /// Takes the end of a process, if it was one of these.
    pub(crate) fn reaped(&mut self, pid: Pid, good: bool, now: Instant) -> Option<Vec<Finding>> {
        let mut probers = self.active_mut().enumerate();
        let ours = |p: &Prober| p.under_way.is_some_and(|(one, _)| one == pid);
        let (at, prober) = probers.find(|(_, p)| ours(p))?;
        let result = prober.result(good);
        drop(probers);
        let found = result.and_then(|result| self.find(at, result, now));
        Some(found.into_iter().collect())
    }

    /// What the result of the active probe number `at` comes to.
    fn find(&mut self, at: usize, good: bool, now: Instant) -> Option<Finding> {
        if self.startup.is_some() {
            if !good {
                return Some(Finding::Unhealthy);
            }
            self.startup = None;
            // Their first delay counts from the container's start; it is over, most of the time.
            for prober in [&mut self.liveness, &mut self.readiness]
                .into_iter()
                .flatten()
            {
                prober.next = prober.next.max(now);
            }
            return self.readiness.is_none().then_some(Finding::Ready);
        }
        match (at == 0 && self.liveness.is_some(), good) {
            (true, true) => None,
            (true, false) => Some(Finding::Unhealthy),
            (false, true) => Some(Finding::Ready),
            (false, false) => Some(Finding::NotReady),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn probe(initial_delay_s: u32, failures: u32) -> Option<Probe> {
        Some(Probe {
            check: Check::Exec(vec!["true".into()]),
            initial_delay_s,
            period_s: 10,
            timeout_s: 2,
            successes: 1,
            failures,
        })
    }

    fn settings() -> ContainerSettings {
        ContainerSettings::default()
    }

    #[test]
    fn a_liveness_probe_condemns_after_so_many_failures_in_a_row() {
        let began = Instant::now();
        let mut settings = settings();
        settings.liveness = probe(5, 2);
        let mut health = Health::new(&settings, began);
        assert!(health.begins_ready());
        assert_eq!(health.wakes(), Some(began + 5 * SECOND));
        let mut now = began + 5 * SECOND;
        for (good, found) in [
            (false, None),
            (true, None),
            (false, None),
            (false, Some(Finding::Unhealthy)),
        ] {
            let pid = Pid::from_raw(7);
            assert!(health.tick(now, |_, _| Some(pid), |_| ()).is_empty());
            assert!(health.reaped(Pid::from_raw(8), good, now).is_none());
            let findings = health.reaped(pid, good, now).unwrap();
            assert_eq!(findings.first().copied(), found);
            now += 10 * SECOND;
        }
    }

    #[test]
    fn what_takes_too_long_or_cannot_begin_has_failed() {
        let began = Instant::now();
        let mut settings = settings();
        settings.readiness = probe(0, 1);
        let mut health = Health::new(&settings, began);
        assert!(!health.begins_ready());
        let pid = Pid::from_raw(7);
        assert!(health.tick(began, |_, _| Some(pid), |_| ()).is_empty());
        let mut killed = None;
        let late = began + 2 * SECOND;
        let found = health.tick(late, |_, _| None, |pid| killed = Some(pid));
        assert_eq!((found, killed), (vec![Finding::NotReady], Some(pid)));
        // Its end comes later and means nothing.
        assert!(health.reaped(pid, true, late).is_none());
        let found = health.tick(began + 10 * SECOND, |_, _| None, |_| ());
        assert_eq!(found, [Finding::NotReady]);
    }

    #[test]
    fn nothing_else_is_checked_until_the_startup_probe_succeeds() {
        let began = Instant::now();
        let mut settings = settings();
        (settings.startup, settings.liveness) = (probe(0, 3), probe(0, 1));
        settings.readiness = probe(0, 1);
        let mut health = Health::new(&settings, began);
        let mut begun = 0;
        let start = |n: i32| Some(Pid::from_raw(n));
        health.tick(
            began,
            |_, _| {
                begun += 1;
                start(begun)
            },
            |_| (),
        );
        assert_eq!(begun, 1);
        assert!(
            health
                .reaped(Pid::from_raw(1), true, began)
                .unwrap()
                .is_empty()
        );
        health.tick(
            began,
            |_, _| {
                begun += 1;
                start(begun)
            },
            |_| (),
        );
        assert_eq!(begun, 3);
        // Liveness is the second, readiness the third.
        assert!(
            health
                .reaped(Pid::from_raw(2), true, began)
                .unwrap()
                .is_empty()
        );
        let found = health.reaped(Pid::from_raw(3), true, began).unwrap();
        assert_eq!(found, [Finding::Ready]);
    }
}

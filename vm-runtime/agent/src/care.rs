//! Looking after containers that run: probes, what they find, asking to end, and starting again.

use std::time::{Duration, Instant};

use guest_agent::protocol::message::{Configuration, Event};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::checks;
use crate::containers::Container;
use crate::outbox::Outbox;
use crate::probes::Finding;

/// Between the signal that asks and the one that makes, if the pod names no time: the kubelet's.
const GRACE: Duration = Duration::from_secs(30);

impl Container {
    /// When there is something to do for it.
    pub(crate) fn wakes(&self) -> Option<Instant> {
        let probes = self.health.as_ref().and_then(|health| health.wakes());
        let times = [probes, self.kill_at, self.life.again_at()];
        times.into_iter().flatten().min()
    }

    /// Does what is due.
    pub(crate) fn tick(&mut self, pod: &Configuration, outbox: &mut Outbox, now: Instant) {
        if self.kill_at.is_some_and(|at| at <= now) {
            self.kill_at = None;
            self.kill();
        }
        if self.life.take_due(now) {
            self.start_again(pod, outbox, now);
        }
        // Taken out: what begins a check borrows the rest.
        let Some(mut health) = self.health.take() else {
            return;
        };
        let begin = |check: &_, limit| {
            let entrance = self.entrance()?;
            let begun = checks::begin(check, &entrance, limit);
            begun
                .inspect_err(|failure| {
                    eprintln!(
                        "guest-agent: a probe of {}: {}",
                        self.spec.name, failure.message
                    );
                })
                .ok()
        };
        // It may have ended by itself.
        let end = |pid: Pid| kill(pid, Signal::SIGKILL).unwrap_or_default();
        let findings = health.tick(now, begin, end);
        self.health = Some(health);
        self.act(&findings, pod, outbox, now);
    }

    fn start_again(&mut self, pod: &Configuration, outbox: &mut Outbox, now: Instant) {
        match self.start(pod, now) {
            Ok(pid) => {
                outbox.event(Event::Started {
                    container: self.spec.name.clone(),
                    pid: pid.as_raw(),
                });
            }
            Err(failure) => {
                outbox.event(Event::Error {
                    context: format!("starting the container {} again", self.spec.name),
                    message: failure.message,
                });
                self.life.not_started(now);
            }
        }
        self.tell(outbox, now);
    }

    /// Takes the end of a process of its own: its first, a probe's, or the one before its end. False if it is none of these.
    pub(crate) fn child_ended(
        &mut self,
        pid: Pid,
        code: i32,
        pod: &Configuration,
        outbox: &mut Outbox,
        now: Instant,
    ) -> bool {
        if self.reaped(pid, code) {
            return true;
        }
        if self.pre_stop == Some(pid) {
            self.pre_stop = None;
            self.signal(self.stop_signal());
            return true;
        }
        let health = self.health.as_mut();
        let Some(findings) = health.and_then(|health| health.reaped(pid, code == 0, now)) else {
            return false;
        };
        self.act(&findings, pod, outbox, now);
        true
    }

    fn act(
        &mut self,
        findings: &[Finding],
        pod: &Configuration,
        outbox: &mut Outbox,
        now: Instant,
    ) {
        for finding in findings {
            let news = match finding {
                Finding::Ready => self.life.set_ready(true),
                Finding::NotReady => self.life.set_ready(false),
                Finding::Unhealthy => {
                    if self.life.condemn() {
                        let grace = pod.settings.grace_s.map(|s| Duration::from_secs(s.into()));
                        self.ask_to_end(now + grace.unwrap_or(GRACE));
                    }
                    false
                }
            };
            if news {
                self.tell(outbox, now);
            }
        }
    }

    /// Asks it to end, after its `preStop` if it has one, and makes it at `kill_at`.
    pub(crate) fn ask_to_end(&mut self, kill_at: Instant) {
        self.kill_at = Some(self.kill_at.map_or(kill_at, |at| at.min(kill_at)));
        if self.pre_stop.is_some() {
            return;
        }
        let command = self.settings.pre_stop.as_ref();
        let begun = command.and_then(|argv| {
            let begun = checks::command(argv, &self.entrance()?);
            // As if it had failed at once: the container ends all the same.
            begun
                .inspect_err(|failure| {
                    eprintln!(
                        "guest-agent: preStop of {}: {}",
                        self.spec.name, failure.message
                    );
                })
                .ok()
        });
        self.pre_stop = begun;
        if begun.is_none() {
            self.signal(self.stop_signal());
        }
    }

    fn stop_signal(&self) -> Signal {
        let named = self.settings.stop_signal;
        let named = named.and_then(|number| Signal::try_from(number).ok());
        named.unwrap_or(Signal::SIGTERM)
    }

    /// Ends it and all that it has started.
    pub(crate) fn kill(&self) {
        self.signal(Signal::SIGKILL);
        if let Some(cgroup) = self.cgroup() {
            cgroup.kill();
        }
    }
}

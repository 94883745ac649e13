//! The pod: configured once, started once, stopped once.

use std::time::{Duration, Instant};

use guest_agent::protocol::message::{
    Configuration, ContainerStatus, Event, Failure, FailureKind, Identity, RequestId, Status,
};
use guest_agent::protocol::settings::Condition;
use nix::unistd::Pid;

use crate::boot::set_sysctl;
use crate::containers::{Container, failed};
use crate::disks;
use crate::identity;
use crate::network;
use crate::outbox::Outbox;

#[derive(Default)]
pub(crate) struct Pod {
    configuration: Option<Configuration>,
    pub(crate) containers: Vec<Container>,
    started: bool,
    /// StopPod requests that wait for the end.
    stopping: Vec<RequestId>,
    /// It was to get an identity of its own, and has not.
    nameless: bool,
}

/// A [`Failure`] of class State.
fn wrong_time(message: &str) -> Failure {
    Failure {
        kind: FailureKind::State,
        message: message.into(),
    }
}

/// A DNS label: it becomes part of a path and of mount options.
fn is_label(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    !name.is_empty() && name.len() <= 63 && name.chars().all(plain)
}

impl Pod {
    /// Becomes another guest than the one that was saved.
    pub(crate) fn identify(&mut self, identity: &Identity) -> Result<(), Failure> {
        if self.configuration.is_some() {
            return Err(wrong_time(
                "the guest is configured already: identify it before",
            ));
        }
        // What the host has sent behind this must not find half an identity.
        self.nameless = true;
        identity::take(identity).map_err(failed)?;
        self.nameless = false;
        Ok(())
    }

    pub(crate) fn configure(&mut self, wanted: Configuration) -> Result<(), Failure> {
        if let Some(have) = &self.configuration {
            return match *have == wanted {
                true => Ok(()),
                false => Err(wrong_time(
                    "the guest is configured already, and otherwise: start a new VM",
                )),
            };
        }
        if self.nameless {
            return Err(wrong_time(
                "the guest has got no identity of its own: start a new VM",
            ));
        }
        for container in &wanted.containers {
            for name in [&container.name, &container.disk] {
                if !is_label(name) {
                    return Err(Failure {
                        kind: FailureKind::Invalid,
                        message: format!("`{name}` is not a name of a-z, 0-9 and `-`, 63 at most"),
                    });
                }
            }
        }
        disks::attach().map_err(failed)?;
        nix::unistd::sethostname(&wanted.hostname).map_err(failed)?;
        network::loopback().map_err(failed)?;
        for interface in &wanted.interfaces {
            network::configure(interface).map_err(failed)?;
        }
        for storage in &wanted.storage {
            let mounts = storage.mounts.iter().map(|mount| &mount.disk);
            for disk in storage.layer.iter().chain(mounts) {
                if !is_label(disk) {
                    return Err(Failure {
                        kind: FailureKind::Invalid,
                        message: format!("`{disk}` is not the serial of a disk"),
                    });
                }
            }
        }
        for (key, value) in &wanted.sysctls {
            set_sysctl(key, value).map_err(failed)?;
        }
        let settings = wanted.container_settings.iter().cloned();
        let settings = settings.chain(std::iter::repeat_with(Default::default));
        let before = wanted.output_offsets.iter().copied();
        let before = before.chain(std::iter::repeat((0, 0)));
        self.containers = std::iter::zip(wanted.containers.iter().cloned(), settings)
            .zip(before)
            .map(|((spec, settings), before)| Container::new(spec, settings, before, &wanted))
            .collect();
        self.configuration = Some(wanted);
        Ok(())
    }

    pub(crate) fn start(&mut self, outbox: &mut Outbox) -> Result<(), Failure> {
        let Some(configuration) = &self.configuration else {
            return Err(wrong_time(
                "the guest is not configured: send Configure first",
            ));
        };
        if std::mem::replace(&mut self.started, true) {
            return Ok(());
        }
        for container in &mut self.containers {
            let name = container.spec.name.clone();
            let pid = container
                .start(configuration, Instant::now())
                .map_err(|f| Failure {
                    kind: f.kind,
                    message: format!("container `{name}`: {}", f.message),
                })?;
            outbox.event(Event::Started {
                container: name,
                pid: pid.as_raw(),
            });
            container.tell(outbox, Instant::now());
        }
        Ok(())
    }

    /// The container of this name, or the failure that says there is none.
    pub(crate) fn container(&self, name: &str) -> Result<&Container, Failure> {
        self.containers
            .iter()
            .find(|c| c.spec.name == name)
            .ok_or_else(|| {
                let names: Vec<&str> = self
                    .containers
                    .iter()
                    .map(|c| c.spec.name.as_str())
                    .collect();
                Failure {
                    kind: FailureKind::NoContainer,
                    message: format!(
                        "the pod has no container `{name}`; it has: {}",
                        names.join(", ")
                    ),
                }
            })
    }

    /// Asks every container to end, the last one first. Answered by [`Self::finish`].
    pub(crate) fn stop(&mut self, id: RequestId, grace: Duration, now: Instant) {
        self.started = true;
        // A second request can shorten the grace, never lengthen it. A year is as good as for ever.
        let at = now + grace.min(Duration::from_secs(365 * 86400));
        for container in self.containers.iter_mut().rev() {
            container.life.give_up();
            container.health = None;
            match self.stopping.is_empty() {
                true => container.ask_to_end(at),
                false => container.kill_at = container.kill_at.map(|old| old.min(at)),
            }
        }
        self.stopping.push(id);
    }

    /// When there is something to do.
    pub(crate) fn wakes(&self) -> Option<Instant> {
        self.containers.iter().filter_map(Container::wakes).min()
    }

    /// Does what is due, tells what has ended, and answers StopPod at the end of all.
    pub(crate) fn finish(&mut self, outbox: &mut Outbox, now: Instant) -> Vec<RequestId> {
        let Some(configuration) = &self.configuration else {
            return std::mem::take(&mut self.stopping);
        };
        let stopping = !self.stopping.is_empty();
        for container in &mut self.containers {
            container.finish(outbox, stopping, now);
            container.tick(configuration, outbox, now);
        }
        if !stopping || !self.containers.iter().all(Container::is_over) {
            return Vec::new();
        }
        if !configuration.storage.is_empty() {
            // Nothing that was written is lost, and the next mount has nothing to repair.
            for container in self.containers.iter_mut().rev() {
                container.let_go();
            }
            disks::unmount_all();
        }
        outbox.event(Event::Stopped);
        std::mem::take(&mut self.stopping)
    }

    /// Takes the end of a process, if it belongs to a container. False if not.
    pub(crate) fn child_ended(&mut self, pid: Pid, code: i32, outbox: &mut Outbox) -> bool {
        let Some(configuration) = &self.configuration else {
            return false;
        };
        let now = Instant::now();
        let mut containers = self.containers.iter_mut();
        containers.any(|c| c.child_ended(pid, code, configuration, outbox, now))
    }

    /// How each container fares.
    pub(crate) fn conditions(&self) -> Vec<Condition> {
        let now = Instant::now();
        self.containers.iter().map(|c| c.condition(now)).collect()
    }

    pub(crate) fn status(&self) -> Status {
        Status {
            configured: self.configuration.is_some(),
            started: self.started,
            containers: self
                .containers
                .iter()
                .map(|c| ContainerStatus {
                    name: c.spec.name.clone(),
                    state: c.state(),
                })
                .collect(),
        }
    }
}

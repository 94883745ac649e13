//! Accidents, and what must hold in spite of them.

use super::*;
use crate::migration::sim::accidents::Accident;

impl World {
    pub(super) fn crash(&mut self, side: Side) {
        if !self.node(side).up {
            return;
        }
        for link in 0..self.links.len() {
            if self.lives(link, side) {
                self.cut(link, false);
            }
        }
        let node = self.node(side);
        node.up = false;
        node.life += 1;
        node.movers += 1;
        node.outbox.clear();
        node.link = None;
        node.timer = None;
        match side {
            Side::Source => self.source = None,
            Side::Destination => {
                self.destination = None;
                self.awaited = false;
            }
        }
        let time = self.now + self.delay(400_000);
        self.at(time, Event::Restart { side });
    }

    pub(super) fn restart(&mut self, side: Side) {
        let now = self.now;
        let node = self.node(side);
        node.up = true;
        node.finished = true;
        let vm_alive = !matches!(node.vm, Vm::None | Vm::Dead);
        let owner = node.owner.clone();
        match side {
            Side::Source => {
                let started = |r: &SourceRecord| r.state == SourceState::Started;
                if let Some(record) = self.source_record.clone().filter(started) {
                    self.s.finished = false;
                    let (machine, out) = Source::recover(now, record, owner, vm_alive);
                    self.source = Some(machine);
                    self.post(side, out.into_iter().map(Out::Source).collect());
                }
            }
            Side::Destination => {
                let open = |r: &DestinationRecord| match r.state {
                    DestinationState::Prepared | DestinationState::Owner { resumed: false } => true,
                    DestinationState::Owner { resumed: true } => self.missing,
                    DestinationState::Settled | DestinationState::Discarded { .. } => false,
                };
                if let Some(record) = self.destination_record.clone().filter(open) {
                    self.d.finished = false;
                    let (machine, out) =
                        Destination::recover(now, record, owner, vm_alive, self.missing);
                    self.destination = Some(machine);
                    self.post(side, out.into_iter().map(Out::Destination).collect());
                } else if self
                    .destination_record
                    .as_ref()
                    .is_some_and(|r| matches!(r.state, DestinationState::Discarded { .. }))
                {
                    // The journal knows nothing to recover; what the crash left of the VM, the start of the service removes.
                    self.d.vm = Vm::None;
                    self.missing = false;
                }
            }
        }
    }

    /// An accident happens now.
    pub(in crate::migration::sim) fn strike(&mut self, accident: Accident) {
        let reason = "accident".to_owned();
        match accident {
            Accident::CrashSource => self.crash(Side::Source),
            Accident::CrashDestination => self.crash(Side::Destination),
            Accident::CrashBoth => {
                self.crash(Side::Source);
                self.crash(Side::Destination);
            }
            Accident::CutAndLose | Accident::CutAndDeliver => {
                for link in 0..self.links.len() {
                    self.cut(link, accident == Accident::CutAndLose);
                }
            }
            Accident::Outage => {
                self.no_dial_before = self.now + 20_000_000;
                for link in 0..self.links.len() {
                    self.cut(link, true);
                }
            }
            Accident::Cancel => self.feed(In::Source(source::Input::Cancel)),
            Accident::CancelDestination => {
                self.feed(In::Destination(destination::Input::Cancel));
            }
            Accident::SourceVmDies => {
                if matches!(self.s.vm, Vm::Running | Vm::Paused) {
                    self.vm_died = true;
                    self.s.vm = Vm::Dead;
                    self.feed(In::Source(source::Input::VmDied { reason }));
                }
            }
            Accident::DestinationVmDies => {
                if !matches!(self.d.vm, Vm::None | Vm::Dead) {
                    self.missing = false;
                    // Before the grant this is the source's good luck.
                    let granted = self.destination_record.as_ref().map(|r| r.verdict());
                    self.vm_died |= granted == Some(Some(Verdict::Running)) || self.granting();
                    self.d.vm = Vm::Dead;
                    self.feed(In::Destination(destination::Input::VmDied { reason }));
                }
            }
            Accident::SourceFails => self.feed(In::Source(source::Input::Failed { reason })),
            // After the grant it is nothing: only a resume that fails for good is the death of the VM.
            Accident::DestinationFails => {
                self.feed(In::Destination(destination::Input::Failed { reason }));
            }
            Accident::SourceDiskFull => self.s.disk_full = true,
            Accident::DestinationDiskFull => self.d.disk_full = true,
            Accident::Double => self.double = true,
        }
    }

    /// The destination has taken the grant and not yet resumed.
    pub(super) fn granting(&self) -> bool {
        self.destination.as_ref().is_some_and(Destination::granted)
    }

    /// What must hold after every step.
    pub(in crate::migration::sim) fn check(&self) {
        let both = self.s.vm == Vm::Running && self.d.vm == Vm::Running;
        assert!(!both, "two run the guest\n{self:?}");
        assert!(!(self.s.owns() && self.d.owns()), "two own it\n{self:?}");
        if self.s.vm == Vm::Running {
            assert!(self.s.owns(), "the source runs without the right\n{self:?}");
            assert!(self.disk_here, "the source runs without its disk\n{self:?}");
        }
        if self.d.vm == Vm::Running && self.missing && !self.vm_died {
            assert_ne!(self.s.vm, Vm::None, "the guest's pages are gone\n{self:?}");
        }
        if self.d.vm == Vm::Running {
            assert!(
                self.d.owns(),
                "the destination runs without the right\n{self:?}"
            );
        }
    }

    /// What must hold at the end.
    pub(in crate::migration::sim) fn check_end(&self) {
        let running = [self.s.vm, self.d.vm].map(|vm| u8::from(vm == Vm::Running));
        let running: u8 = running.iter().sum();
        if !self.vm_died {
            assert_eq!(running, 1, "nobody runs the guest\n{self:?}");
        }
        assert!(self.source.is_none(), "the source is not done\n{self:?}");
        assert!(
            self.destination.is_none(),
            "the destination is not done\n{self:?}"
        );
        let owners = u8::from(self.s.owns()) + u8::from(self.d.owns());
        assert_eq!(owners, 1, "not one owner\n{self:?}");
        assert!(
            !self.missing || self.vm_died,
            "the guest still lacks pages\n{self:?}"
        );
        assert!(!self.held, "the gate still holds packets\n{self:?}");
        if self.s.owns() {
            assert!(
                !self.tracking && !self.agent_detached,
                "not all undone\n{self:?}"
            );
            assert_eq!(self.d.vm, Vm::None, "something is left behind\n{self:?}");
        } else {
            assert_eq!(self.s.vm, Vm::None, "the old VM is left behind\n{self:?}");
        }
        let record = self.source_record.as_ref().map(|r| &r.state);
        assert!(
            record != Some(&SourceState::Started),
            "the journal is open\n{self:?}"
        );
    }
}

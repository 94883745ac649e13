//! What the nodes do for their machines: the movers, the journal, the door.

use super::*;

impl World {
    pub(super) fn carry_out(&mut self, side: Side) {
        let Some(out) = self.node(side).outbox.pop_front() else {
            return;
        };
        match out {
            Out::Source(out) => self.at_source(out),
            Out::Destination(out) => self.at_destination(out),
        }
        let now = self.now;
        let node = self.node(side);
        if !node.outbox.is_empty() {
            let life = node.life;
            self.at(now, Event::Outbox { life, side });
        }
    }

    pub(super) fn write(&mut self, entry: Entry, side: Side) {
        match entry {
            Entry::Owner(record) => self.node(side).owner = Some(record),
            Entry::Source(record) => self.source_record = Some(record),
            Entry::Destination(record) => {
                if record.state == (DestinationState::Owner { resumed: false }) {
                    self.d.owner = Some(record.owner());
                }
                self.destination_record = Some(record);
            }
        }
    }

    pub(super) fn at_source(&mut self, out: source::Output) {
        use source::{Input, Output};
        let step = match out {
            Output::Send(message) => return self.send(Side::Source, self.s.link, message),
            Output::Journal(_) if std::mem::take(&mut self.s.disk_full) => {
                self.s.outbox.clear();
                let reason = "disk full".to_owned();
                return self.feed(In::Source(Input::JournalFailed { reason }));
            }
            Output::Journal(entry) | Output::Note(entry) => return self.write(entry, Side::Source),
            Output::SendImages(_) => Input::ImagesSent,
            Output::SendDisks => {
                assert!(self.setting.disks, "{self:?}");
                self.tracking = true;
                self.place_blocks(1);
                Input::DisksSent
            }
            Output::SendLastBlocks => {
                assert!(self.s.vm != Vm::Running, "{self:?}");
                self.place_blocks(2);
                Input::LastBlocksSent {
                    round: 2,
                    bytes: 65536,
                }
            }
            Output::StartTracking => {
                self.tracking = true;
                Input::TrackingStarted
            }
            Output::SendRound { round } => {
                self.place(round);
                Input::RoundSent {
                    pages: 1000,
                    bytes: 4_100_000,
                }
            }
            Output::Scan => Input::Scanned {
                dirtied: 10,
                pending: 10,
            },
            Output::DetachAgent => {
                self.agent_detached = true;
                Input::AgentDetached { state: vec![1] }
            }
            Output::Hold => {
                self.held = true;
                Input::Held
            }
            Output::DrainTap => Input::Drained,
            Output::StopVm => Input::Stopped { at_unix_us: 1 },
            Output::ReadResidue => Input::ResidueRead,
            Output::SendFlows => {
                assert!(self.setting.flows, "{self:?}");
                let flows = crate::wire::message::Flows(vec![1].into());
                self.send(Side::Source, self.s.link, flows.into());
                Input::FlowsSent {
                    bound: 0,
                    unserved: 0,
                }
            }
            Output::SendLastPages { round } => {
                self.place(round);
                Input::LastPagesSent { pages: 10 }
            }
            Output::SendStale { last } => {
                self.send(Side::Source, self.s.link, StaleEnd { last }.into());
                Input::StaleSent { last, pages: 10 }
            }
            Output::PushPages => {
                let time = self.now + self.delay(50_000);
                if let Some(link) = self.s.link {
                    self.at(time, Event::Pages { link });
                }
                return;
            }
            Output::ServeFaults | Output::Throttle { .. } => return,
            Output::SaveState => {
                let end = crate::wire::message::StateEnd { bytes: 1 };
                self.send(Side::Source, self.s.link, end.into());
                Input::StateSent
            }
            Output::SendHashes => {
                let end = crate::wire::message::HashesEnd { pages: 1 };
                self.send(Side::Source, self.s.link, end.into());
                Input::HashesSent
            }
            Output::Rollback(rollback) => {
                self.s.movers += 1;
                if rollback.resume_vm && self.s.vm == Vm::Paused {
                    self.s.vm = Vm::Running;
                }
                self.held &= !rollback.release_hold;
                self.tracking &= !rollback.stop_tracking;
                self.agent_detached &= !rollback.attach_agent;
                Input::RolledBack
            }
            Output::Forward => Input::Forwarded,
            Output::Release => {
                self.s.vm = Vm::None;
                // Its files go with it.
                assert!(self.disk_is_whole_there(), "{self:?}");
                self.disk_here = false;
                self.held = false;
                let ledger = Ledger::default();
                Input::Released { ledger }
            }
            Output::Redial => {
                let (life, time) = (self.s.life, self.now + self.delay(3_000));
                return self.at(time, Event::Dialed { life });
            }
            Output::WakeAt(at) => return self.wake(Side::Source, at),
            Output::CancelRefused => {
                self.cancel_refused = true;
                return;
            }
            Output::Finish(_) => {
                self.s.finished = true;
                self.source = None;
                return self.hang_up(Side::Source);
            }
        };
        self.done(In::Source(step));
    }

    /// The pages of a round arrive beside the control connection.
    pub(super) fn place(&mut self, round: u32) {
        self.done(In::Destination(destination::Input::RoundPlaced { round }));
    }

    /// What the guest has written by now arrives as well, and is durable once the round is placed.
    fn place_blocks(&mut self, round: u32) {
        self.sent_of_disk[round as usize] = self.written;
        self.done(In::Destination(destination::Input::BlocksPlaced { round }));
    }

    /// Whether the destination's disk has everything that the guest wrote at the source.
    fn disk_is_whole_there(&self) -> bool {
        !self.setting.disks || self.durable == self.written || self.vm_died
    }

    pub(super) fn wake(&mut self, side: Side, at: u64) {
        let time = at.max(self.now);
        let node = self.node(side);
        node.timer = Some(at);
        let life = node.life;
        self.at(time, Event::Tick { life, at, side });
    }

    pub(super) fn hang_up(&mut self, side: Side) {
        if let Some(link) = self.node(side).link.take() {
            self.cut(link, false);
        }
    }

    pub(super) fn at_destination(&mut self, out: destination::Output) {
        use destination::{Input, Output};
        let step = match out {
            Output::Send(message) => return self.send(Side::Destination, self.d.link, message),
            Output::Journal(_) if std::mem::take(&mut self.d.disk_full) => {
                self.d.outbox.clear();
                let reason = "disk full".to_owned();
                return self.feed(In::Destination(Input::JournalFailed { reason }));
            }
            Output::Journal(entry) | Output::Note(entry) => {
                return self.write(entry, Side::Destination);
            }
            Output::Check(_) => Input::Checked(self.verdict_of_check()),
            Output::ReceiveImages(_) => Input::ImagesReceived,
            Output::PrepareMemory => Input::MemoryPrepared,
            Output::PrepareVm => {
                self.d.vm = Vm::Incoming;
                Input::VmPrepared
            }
            Output::Verify => Input::Verified {
                pages: 100,
                mismatched: 0,
            },
            Output::MarkStale { last } => {
                self.missing = true;
                Input::StaleMarked { last }
            }
            Output::AwaitPages if self.missing => {
                self.awaited = true;
                return;
            }
            Output::AwaitPages => Input::PagesHere {
                faults: FaultFigures::default(),
            },
            Output::SendWanted => {
                let wanted = Wanted { pages: 10 };
                return self.send(Side::Destination, self.d.link, wanted.into());
            }
            Output::EndState => Input::StateLoaded,
            Output::PodFailed { .. } => {
                self.missing = false;
                self.d.vm = Vm::Dead;
                return;
            }
            Output::OpenNetwork => {
                // No packet before the entries that let it pass.
                assert_eq!(self.flows, self.setting.flows, "{self:?}");
                return;
            }
            Output::LoadState | Output::Adopt { .. } => return,
            Output::Resume if self.d.vm == Vm::Dead => Input::ResumeFailed {
                reason: "no VM".to_owned(),
            },
            Output::Resume => {
                assert!(matches!(self.d.vm, Vm::Loaded | Vm::Running), "{self:?}");
                assert!(self.disk_is_whole_there(), "{self:?}");
                self.d.vm = Vm::Running;
                let steps = Vec::new();
                Input::Resumed {
                    at_unix_us: 2,
                    steps,
                }
            }
            Output::Discard => {
                self.d.movers += 1;
                self.d.vm = Vm::None;
                self.missing = false;
                self.durable = 0;
                Input::Discarded
            }
            Output::SendBye => return self.bye(self.d.link),
            Output::WakeAt(at) => return self.wake(Side::Destination, at),
            Output::CancelRefused => return,
            Output::Finish(_) => {
                self.d.finished = true;
                self.destination = None;
                return self.hang_up(Side::Destination);
            }
        };
        self.done(In::Destination(step));
    }

    pub(super) fn bye(&mut self, link: Option<usize>) {
        let bye = Bye {
            migration: ID,
            ledger: Ledger::default(),
        };
        self.send(Side::Destination, link, bye.into());
    }

    pub(super) fn verdict_of_check(&self) -> Result<Vec<ImageWant>, Refuse> {
        if self.destination_record.is_some() {
            return Err(Refuse {
                code: RefuseCode::Busy,
                reason: "known".to_owned(),
            });
        }
        let want = ImageWant {
            image: 0,
            chunks: vec![1],
        };
        Ok(Vec::from_iter(self.setting.images.then_some(want)))
    }

    pub(super) fn deliver(&mut self, link: usize, to: Side, message: Control) {
        if !self.lives(link, to) {
            return;
        }
        let current = self.node(to).link == Some(link);
        match to {
            Side::Source if current || self.setting.late => {
                self.feed(In::Source(source::Input::Peer(message)));
            }
            Side::Source => {}
            Side::Destination => self.deliver_to_destination(link, current, message),
        }
    }

    pub(super) fn deliver_to_destination(&mut self, link: usize, current: bool, message: Control) {
        match (message, self.destination.is_some()) {
            (Control::Offer(offer), false) if !self.d.finished => {
                self.d.link = Some(link);
                self.destination = Some(Destination::new(offer, "a".to_owned()));
                self.input(0, In::Destination(destination::Input::Begin));
                if !self.links[link].up {
                    // Whoever accepts from a dead link hears of its death after the last byte.
                    let (side, time) = (Side::Destination, self.now + self.delay(3_000_000));
                    self.at(time, Event::Lost { link, side });
                }
            }
            (Control::Query(_), true) if !current => {
                if let Some(old) = self.d.link.replace(link) {
                    self.cut(old, !self.setting.late);
                }
                self.feed(In::Destination(destination::Input::Asked));
            }
            (Control::Flows(_), true) => self.flows = true,
            (message, true) if current || self.setting.late => {
                self.feed(In::Destination(destination::Input::Peer(message)));
            }
            // Nobody but the machine that is about to be there can say what the guest lacks.
            (Control::Query(_), false) if self.missing && self.d.vm != Vm::None => {}
            // What the journal answers once there is no machine.
            (Control::Query(_), false) => {
                let verdict = self.answer();
                let migration = ID;
                let reply = QueryReply {
                    migration,
                    verdict,
                    wants_pages: false,
                };
                self.send(Side::Destination, Some(link), reply.into());
            }
            (Control::Released(_), false) => {
                if let Some(record) = &mut self.destination_record
                    && record.verdict() == Some(Verdict::Running)
                {
                    record.state = DestinationState::Settled;
                }
                self.bye(Some(link));
            }
            _ => {}
        }
    }

    pub(super) fn answer(&mut self) -> Verdict {
        let record = self.destination_record.take();
        let known = record.as_ref().and_then(DestinationRecord::verdict);
        self.destination_record = Some(match record {
            Some(record) if known.is_some() => record,
            _ => DestinationRecord {
                migration: ID,
                pod: String::new(),
                from: "a".to_owned(),
                epoch: Epoch(0),
                state: DestinationState::Discarded {
                    reason: String::new(),
                },
            },
        });
        known.unwrap_or(Verdict::Discarded)
    }
}

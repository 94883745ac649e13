//! The straight way, a step at a time.

use vm_runtime::units::Epoch;

use super::{Destination, Disks, Input, Loading, Outcome, Output, Receiving, State};
use crate::migration::journal::{DestinationState, Entry};
use crate::wire::message::{
    Accept, Control, DiskAck, FaultFigures, MemoryComplete, Prepared, Ready, RoundAck, Running,
    StaleAck, Verdict, VmWaits,
};

impl Destination {
    /// Messages of the source. Late and doubled ones meet a state that does not wait for them, and are nothing.
    pub(super) fn peer(&mut self, message: Control, out: &mut Vec<Output>) {
        let early = self.before_grant();
        match (message, &mut self.state) {
            (Control::ImageDone(_), State::Images { all_sent, .. }) => {
                *all_sent = true;
                self.prepare_if_complete(out);
            }
            (Control::MemoryDone(done), State::Receiving(receiving)) => {
                receiving.last = Some(done.round);
                self.load_if_complete(out);
            }
            (Control::DisksDone(done), State::Receiving(_) | State::Loading(_)) => {
                if let Some(disks) = &mut self.disks {
                    disks.last = Some(done.round);
                }
                self.ready_if_complete(out);
            }
            (Control::StateEnd(_), State::Receiving(receiving)) => receiving.state = true,
            (Control::StateEnd(_), State::Loading(_)) => out.push(Output::EndState),
            (Control::HashesEnd(_), State::Receiving(receiving)) => {
                receiving.hashes = true;
                self.load_if_complete(out);
            }
            (Control::HashesEnd(_), State::Loading(loading))
                if !loading.comparing && loading.verified.is_none() =>
            {
                loading.comparing = true;
                out.push(Output::Verify);
            }
            (Control::StaleEnd(end), State::Receiving(receiving)) => {
                self.wants_pages = true;
                match receiving.vm {
                    true => out.push(Output::MarkStale { last: end.last }),
                    // The last ones come after the guest's stop, and that after `VmWaits`.
                    false => receiving.stale = true,
                }
            }
            (Control::Handover(handover), State::Receiving(_)) => {
                self.handover = Some(handover);
                self.load_if_complete(out);
            }
            (Control::Grant(grant), State::Ready) => self.take_grant(grant.epoch, out),
            (Control::Abort(abort), _) if early => {
                let reason = format!("{}: {}", self.record.from, abort.reason);
                self.discard(&reason, out);
            }
            (Control::Abort(abort), State::Resuming | State::Running) if self.wants_pages => {
                let reason = format!("{}: {}", self.record.from, abort.reason);
                self.failed(&reason, out);
            }
            (Control::Query(query), _) if query.migration == self.record.migration => {
                self.asked(out);
            }
            (Control::Released(released), State::Running)
                if released.migration == self.record.migration =>
            {
                self.settled(out);
            }
            _ => {}
        }
    }

    /// Steps of the way there; a step that nobody waits for belongs to what was discarded.
    pub(super) fn step(&mut self, step: Input, out: &mut Vec<Output>) {
        match (step, &mut self.state) {
            (Input::Checked(Err(refuse)), State::Checking) => self.refuse(refuse, out),
            (Input::Checked(Ok(wants)), State::Checking) => {
                out.push(Output::Journal(Entry::Destination(self.record.clone())));
                let none = wants.is_empty();
                if !none {
                    out.push(Output::ReceiveImages(wants.clone()));
                }
                out.push(Output::Send(Accept { wants }.into()));
                self.state = State::Images {
                    received: none,
                    all_sent: none,
                };
                self.prepare_if_complete(out);
            }
            (Input::ImagesReceived, State::Images { received, .. }) => {
                *received = true;
                self.prepare_if_complete(out);
            }
            (Input::MemoryPrepared, State::Preparing) => {
                self.state = State::Receiving(Receiving::default());
                out.push(Output::Send(Prepared.into()));
                out.push(Output::PrepareVm);
            }
            (Input::VmPrepared, State::Receiving(receiving)) => {
                receiving.vm = true;
                out.push(Output::Send(VmWaits.into()));
                if std::mem::take(&mut receiving.stale) {
                    out.push(Output::MarkStale { last: false });
                }
                self.load_if_complete(out);
            }
            (Input::RoundPlaced { round }, State::Receiving(receiving)) => {
                receiving.placed = receiving.placed.max(round);
                out.push(Output::Send(RoundAck { round }.into()));
                self.load_if_complete(out);
            }
            (Input::BlocksPlaced { round }, State::Receiving(_) | State::Loading(_)) => {
                if let Some(disks) = &mut self.disks {
                    disks.placed = disks.placed.max(round);
                    out.push(Output::Send(DiskAck { round }.into()));
                }
                self.ready_if_complete(out);
            }
            (Input::StaleMarked { last: false }, State::Receiving(_)) => {
                out.push(Output::Send(StaleAck.into()));
            }
            (Input::StaleMarked { last: true }, State::Receiving(receiving)) => {
                receiving.marked = true;
                self.load_if_complete(out);
            }
            (Input::PagesHere { faults }, State::Running) => self.pages_here(faults, out),
            (
                Input::Verified {
                    pages,
                    mismatched: 0,
                },
                State::Loading(loading),
            ) => {
                loading.verified = Some(pages);
                self.ready_if_complete(out);
            }
            (Input::Verified { pages, mismatched }, State::Loading(_)) => {
                let reason = format!("{mismatched} of {pages} pages differ from the source's");
                self.failed(&reason, out);
            }
            (Input::StateLoaded, State::Loading(loading)) => {
                loading.loaded = true;
                self.ready_if_complete(out);
            }
            (Input::Resumed { at_unix_us, steps }, State::Resuming) => {
                self.resumed(at_unix_us, steps, out);
            }
            (Input::Discarded, State::Discarding { reason }) => {
                let reason = std::mem::take(reason);
                self.state = State::Done;
                out.push(Output::Finish(Outcome::Failed { reason }));
            }
            _ => {}
        }
    }

    pub(super) fn prepare_if_complete(&mut self, out: &mut Vec<Output>) {
        if let State::Images {
            received: true,
            all_sent: true,
        } = self.state
        {
            self.state = State::Preparing;
            out.push(Output::PrepareMemory);
        }
    }

    pub(super) fn load_if_complete(&mut self, out: &mut Vec<Output>) {
        let State::Receiving(receiving) = self.state else {
            return;
        };
        let memory =
            receiving.marked || receiving.last.is_some_and(|last| last == receiving.placed);
        // The device state loads while it comes.
        if !(receiving.vm && memory && self.handover.is_some()) {
            return;
        }
        let comparing = self.verify && receiving.hashes;
        self.state = State::Loading(Loading {
            loaded: false,
            comparing,
            // Without a verification nothing is compared, and nothing is waited for.
            verified: (!self.verify).then_some(0),
        });
        out.push(Output::LoadState);
        if receiving.state {
            out.push(Output::EndState);
        }
        if comparing {
            out.push(Output::Verify);
        }
    }

    /// The state is loaded, the disks are durable, and every page has been compared if that was asked for.
    pub(super) fn ready_if_complete(&mut self, out: &mut Vec<Output>) {
        if !self.disks.is_none_or(Disks::complete) {
            return;
        }
        if let State::Loading(Loading {
            loaded: true,
            verified: Some(verified),
            ..
        }) = self.state
        {
            self.state = State::Ready;
            let mismatched = 0;
            out.push(Output::Send(
                Ready {
                    verified,
                    mismatched,
                }
                .into(),
            ));
        }
    }

    /// The one step that gives this node the right: durable before the gate opens, and before a single instruction.
    pub(super) fn take_grant(&mut self, epoch: Epoch, out: &mut Vec<Output>) {
        if epoch != self.record.epoch {
            let reason = format!(
                "a grant for epoch {epoch} came, {} was offered",
                self.record.epoch
            );
            return self.failed(&reason, out);
        }
        self.record.state = DestinationState::Owner { resumed: false };
        self.state = State::Resuming;
        out.extend([
            Output::Journal(Entry::Destination(self.record.clone())),
            Output::OpenNetwork,
            Output::Resume,
        ]);
    }

    pub(super) fn resumed(
        &mut self,
        resumed_at_unix_us: u64,
        steps: Vec<(String, u64)>,
        out: &mut Vec<Output>,
    ) {
        self.state = State::Running;
        self.record.state = DestinationState::Owner { resumed: true };
        self.tell_running(resumed_at_unix_us, steps, out);
        let handover = self.handover.take();
        out.push(Output::Adopt { handover });
        if self.wants_pages {
            out.push(Output::AwaitPages);
        }
        out.push(Output::Note(Entry::Destination(self.record.clone())));
    }

    pub(super) fn tell_running(
        &mut self,
        resumed_at_unix_us: u64,
        steps: Vec<(String, u64)>,
        out: &mut Vec<Output>,
    ) {
        if !self.link {
            return;
        }
        out.push(Output::Send(match std::mem::take(&mut self.asked) {
            true => self.reply(Verdict::Running),
            false => Control::Running(Running {
                epoch: self.record.epoch,
                resumed_at_unix_us,
                steps,
                failed: self.pod_failed.clone(),
            }),
        }));
    }

    /// The guest lacks nothing any more, be it that it is gone.
    pub(super) fn pages_here(&mut self, faults: FaultFigures, out: &mut Vec<Output>) {
        if std::mem::take(&mut self.wants_pages) && self.link {
            out.push(Output::Send(MemoryComplete { faults }.into()));
        }
    }

    pub(super) fn settled(&mut self, out: &mut Vec<Output>) {
        self.record.state = DestinationState::Settled;
        out.push(Output::Note(Entry::Destination(self.record.clone())));
        out.push(Output::SendBye);
        self.finish(true, out);
    }

    pub(super) fn finish(&mut self, settled: bool, out: &mut Vec<Output>) {
        self.state = State::Done;
        out.push(Output::Finish(match self.pod_failed.take() {
            None => Outcome::Completed { settled },
            Some(reason) => Outcome::PodFailed { reason },
        }));
    }
}

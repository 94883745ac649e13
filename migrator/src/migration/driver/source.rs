//! Runs the source's machine.

use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::JoinSet;
use tokio::time::{Instant as TokioInstant, sleep_until};

use super::clock::unix_us;
use super::depart::{end_pod, figures};
use super::link::{Link, LinkEvent};
use super::prepare;
use super::report::Figures;
use super::source_steps::{self as steps, Lanes, View};
use super::steps::blocking_journal;
use crate::api::error::chain;
use crate::daemon::migrations::Ticket;
use crate::daemon::node::Node;
use crate::memory::send::PageSender;
use crate::memory::track::Tracking;
use crate::migration::journal::Entry;
use crate::migration::source::{Input, Outcome, Output, Rollback, Source};
use crate::migration::status::{self, Phase};
use crate::pods::{MigrationEnd, PodHandle, PodResources};
use crate::wire::bulk::Urgent;
use crate::wire::conn::Connection;
use crate::wire::control::ControlSender;
use crate::wire::message::{Control, Ledger};
use crate::wire::session::Session;

/// One machine and what it works with.
pub(super) struct Run {
    pub(super) node: Arc<Node>,
    pub(super) pod: PodHandle,
    /// Gone once the pod has left.
    pub(super) resources: Option<Arc<PodResources>>,
    ticket: Option<Ticket>,
    pub(super) figures: Figures,
    machine: Source,
    pub(super) addr: std::net::SocketAddr,
    pub(super) inputs: UnboundedSender<Input>,
    queue: UnboundedReceiver<Input>,
    pub(super) dialed: UnboundedSender<Session>,
    sessions: UnboundedReceiver<Session>,
    began: Instant,
    wake: Option<TokioInstant>,
    /// Steps under way; a rollback cancels them.
    steps: JoinSet<()>,
    /// Tasks that outlive a rollback: the pump of the packet log, the watch on the VM.
    pub(super) helpers: JoinSet<()>,
    pub(super) link: Option<Link>,
    pub(super) lanes: Option<Lanes>,
    pub(super) urgent: Option<Connection<Urgent>>,
    pub(super) tracking: Tracking,
    view: View,
    held_at_unix_us: u64,
    done: bool,
}

impl Run {
    pub(super) fn new(
        node: Arc<Node>,
        pod: PodHandle,
        resources: Option<Arc<PodResources>>,
        ticket: Ticket,
        figures: Figures,
        machine: Source,
        addr: std::net::SocketAddr,
    ) -> Self {
        let (inputs, queue) = unbounded_channel();
        let (dialed, sessions) = unbounded_channel();
        let pages = pod.spec().memory.pages();
        let mut run = Self {
            node,
            pod,
            resources,
            ticket: Some(ticket),
            figures,
            machine,
            addr,
            inputs,
            queue,
            dialed,
            sessions,
            began: Instant::now(),
            wake: None,
            steps: JoinSet::new(),
            helpers: JoinSet::new(),
            link: None,
            lanes: None,
            urgent: None,
            tracking: Tracking::new(pages),
            view: View::default(),
            held_at_unix_us: 0,
            done: false,
        };
        run.watch_vm();
        run
    }

    fn watch_vm(&mut self) {
        if let Some(resources) = &self.resources {
            let vm = Arc::clone(&resources.vm);
            let inputs = self.inputs.clone();
            self.helpers.spawn(async move {
                let reason = match vm.wait_exit().await {
                    Ok(exit) => prepare::died(&exit),
                    Err(error) => chain(&error),
                };
                // The machine may be done.
                let _ = inputs.send(Input::VmDied { reason });
            });
        }
    }

    pub(super) fn attach(&mut self, session: Session, limit: Option<NonZeroU64>) {
        let Session {
            control,
            data,
            urgent,
            ..
        } = session;
        self.link = Some(Link::start(control, self.inputs.clone(), convert));
        self.urgent = urgent;
        if let Some(resources) = &self.resources
            && !data.is_empty()
        {
            let (readers, writers): (Vec<_>, Vec<_>) =
                data.into_iter().map(Connection::split).unzip();
            let memory = resources.vm.memory();
            self.lanes = Some(Lanes {
                sender: Arc::new(PageSender::start(&memory, writers, limit)),
                _readers: readers,
            });
        }
    }

    fn now(&self) -> u64 {
        self.began.elapsed().as_micros() as u64
    }

    pub(super) async fn run(mut self, first: Input) {
        self.input(first).await;
        self.events().await;
    }

    /// Until the machine is done.
    pub(super) async fn events(mut self) {
        let mut cancelled = false;
        let mut refresh = tokio::time::interval(Duration::from_millis(100));
        while !self.done {
            let wake = self.wake;
            let cancel = self.ticket.as_ref().map(|ticket| ticket.cancel.clone());
            let input = tokio::select! {
                Some(input) = self.queue.recv() => input,
                Some(session) = self.sessions.recv() => {
                    self.relinked(session).await;
                    Input::LinkUp
                }
                () = sleep_until(wake.unwrap_or_else(TokioInstant::now)), if wake.is_some() => {
                    self.wake = None;
                    Input::Tick
                }
                () = async { if let Some(cancel) = &cancel { cancel.cancelled().await } }, if !cancelled && cancel.is_some() => {
                    cancelled = true;
                    Input::Cancel
                }
                () = self.node.shutdown.cancelled(), if !cancelled => {
                    cancelled = true;
                    Input::Cancel
                }
                _ = refresh.tick() => {
                    self.show(None);
                    continue;
                }
            };
            self.input(input).await;
        }
    }

    async fn input(&mut self, input: Input) {
        self.note(&input);
        let now = self.now();
        let outputs = self.machine.handle(now, input);
        self.carry_out(outputs).await;
    }

    /// What inputs say for the report.
    fn note(&mut self, input: &Input) {
        let memory = &mut self.figures.memory;
        match input {
            Input::RoundSent { .. } | Input::LastPagesSent { .. } => memory.rounds += 1,
            Input::Stopped { at_unix_us } => {
                self.figures.frozen_at_unix_us = *at_unix_us;
                let held = at_unix_us.saturating_sub(self.held_at_unix_us);
                self.figures.phases.push(("held_before".to_owned(), held));
            }
            Input::Peer(Control::Ready(ready)) => {
                memory.pages_verified = ready.verified;
                memory.mismatched = ready.mismatched;
            }
            Input::Peer(Control::Running(running)) => self.figures.running(running),
            Input::LinkLost { reason } => {
                tracing::warn!(
                    pod = self.pod.name(),
                    reason,
                    "the link to the destination is lost"
                );
            }
            Input::Failed { reason } => {
                tracing::warn!(
                    pod = self.pod.name(),
                    reason,
                    "a step of the migration failed"
                );
            }
            _ => {}
        }
        if self.figures.frozen_at_unix_us > 0 && self.figures.downtime_us == 0 {
            let at = unix_us().saturating_sub(self.figures.frozen_at_unix_us);
            if let Some(name) = freeze_step(input) {
                self.figures.phases.push((name.to_owned(), at));
            }
        }
    }

    /// A journal that fails is the machine's very next input, and what followed it is dropped.
    pub(super) async fn carry_out(&mut self, outputs: Vec<Output>) {
        let mut outputs = outputs;
        while let Some(reason) = self.carry_out_once(outputs).await {
            let now = self.now();
            outputs = self.machine.handle(now, Input::JournalFailed { reason });
        }
        self.show(None);
    }

    async fn carry_out_once(&mut self, outputs: Vec<Output>) -> Option<String> {
        for output in outputs {
            match output {
                Output::Journal(entry) => {
                    if let Err(reason) = self.write(entry).await {
                        return Some(reason);
                    }
                }
                Output::Note(entry) => {
                    if let Err(reason) = self.write(entry).await {
                        tracing::error!(pod = self.pod.name(), reason, "the journal stays behind");
                    }
                }
                Output::Rollback(what) => self.roll_back(what).await,
                Output::Finish(outcome) => self.finish(outcome).await,
                Output::Send(message) => self.send(message).await,
                other => self.begin_step(other).await,
            }
        }
        None
    }

    async fn write(&self, entry: Entry) -> Result<(), String> {
        blocking_journal(&self.node, move |journal| journal.apply(&entry)).await
    }

    async fn send(&mut self, message: Control) {
        if let Some(link) = &self.link {
            // A lost link is reported by its reader, with the cause.
            let _ = link.control.send(message).await;
        }
    }

    async fn begin_step(&mut self, output: Output) {
        self.show(phase_of(&output));
        match output {
            Output::WakeAt(at) => {
                self.wake = Some((self.began + Duration::from_micros(at)).into());
            }
            Output::CancelRefused => {
                tracing::info!(
                    pod = self.pod.name(),
                    "too late to cancel: the guest is handed over"
                );
            }
            Output::Redial => self.redial(),
            Output::KillVm => self.kill_vm(),
            Output::Hold => {
                self.held_at_unix_us = unix_us();
                self.hold();
            }
            Output::Forward => self.forward().await,
            Output::Release => self.release(),
            Output::SaveState => self.step(steps::save_state(self.parts(), self.control())),
            Output::SendHashes => {
                let view = Arc::clone(&self.view);
                self.step(steps::send_hashes(self.parts(), view, self.control()));
            }
            Output::SendImages(wants) => {
                let node = Arc::clone(&self.node);
                self.step(steps::send_images(node, self.parts(), self.sender(), wants));
            }
            Output::StartTracking => {
                if self.machine.verifies() {
                    let view = Arc::clone(&self.view);
                    self.helpers.spawn(steps::map_memory(self.parts(), view));
                }
                self.step(steps::start_tracking(self.parts(), self.tracking.clone()));
            }
            Output::SendRound { round } => {
                self.step(steps::send_round(
                    self.sender(),
                    self.tracking.clone(),
                    round,
                ));
            }
            Output::Scan => self.step(steps::scan(self.tracking.clone())),
            Output::DetachAgent => self.step(steps::detach_agent(self.parts())),
            Output::DrainTap => self.step(steps::drain_tap(self.parts())),
            Output::StopVm => self.step(steps::stop_vm(self.parts())),
            Output::ReadResidue => self.step(steps::read_residue(self.parts())),
            Output::SendLastPages { round } => {
                self.step(steps::send_last_pages(
                    self.sender(),
                    self.tracking.clone(),
                    round,
                ));
            }
            Output::Send(_)
            | Output::Journal(_)
            | Output::Note(_)
            | Output::Rollback(_)
            | Output::Finish(_) => {}
        }
    }

    pub(super) fn parts(&self) -> Option<Arc<PodResources>> {
        self.resources.clone()
    }

    fn control(&self) -> Option<ControlSender> {
        self.link.as_ref().map(|link| link.control.clone())
    }

    fn sender(&self) -> Option<Arc<PageSender>> {
        self.lanes.as_ref().map(|lanes| Arc::clone(&lanes.sender))
    }

    /// Runs a step beside the machine.
    pub(super) fn step(
        &mut self,
        step: impl Future<Output = Result<Input, String>> + Send + 'static,
    ) {
        while self.steps.try_join_next().is_some() {}
        let inputs = self.inputs.clone();
        self.steps.spawn(async move {
            let input = step.await.unwrap_or_else(|reason| Input::Failed { reason });
            // The machine may be done.
            let _ = inputs.send(input);
        });
    }

    async fn roll_back(&mut self, what: Rollback) {
        self.steps.shutdown().await;
        let problems = steps::roll_back(self.resources.as_deref(), &self.tracking, what).await;
        for reason in problems {
            let _ = self.inputs.send(Input::Failed { reason });
        }
        let _ = self.inputs.send(Input::RolledBack);
    }

    async fn finish(&mut self, outcome: Outcome) {
        self.done = true;
        self.steps.shutdown().await;
        let (end, outcome, source, destination) = match outcome {
            Outcome::Completed {
                source,
                destination,
            } => (
                None,
                status::Outcome::Completed,
                source,
                destination.unwrap_or_default(),
            ),
            Outcome::Failed { reason } => {
                let epoch = self.owner_epoch().await;
                let end = Some(MigrationEnd::Kept { epoch });
                (
                    end,
                    status::Outcome::Failed(reason),
                    Ledger::default(),
                    Ledger::default(),
                )
            }
            Outcome::PodFailed { reason } => {
                let end = Some(MigrationEnd::Died {
                    reason: reason.clone(),
                });
                (
                    end,
                    status::Outcome::Failed(reason),
                    Ledger::default(),
                    Ledger::default(),
                )
            }
        };
        if let Some(end) = end {
            end_pod(&self.pod, end).await;
        }
        if let Some(sender) = self.sender() {
            self.figures.memory.bytes_sent = sender.bytes_sent();
        }
        // What was queued is written before the connection closes.
        if let Some(link) = self.link.take() {
            let _ = link.control.flush().await;
        }
        self.helpers.shutdown().await;
        if let Some(ticket) = self.ticket.take() {
            let figures = std::mem::replace(
                &mut self.figures,
                figures(&self.node, &ticket, &self.pod, ""),
            );
            ticket
                .finish(figures.report(outcome, source, destination))
                .await;
        }
    }

    /// The epoch that the journal gives this node.
    async fn owner_epoch(&self) -> vm_runtime::units::Epoch {
        let name = self.pod.name().to_owned();
        match blocking_journal(&self.node, move |journal| journal.owner(&name)).await {
            Ok(Some(owner)) => owner.epoch,
            Ok(None) | Err(_) => self.pod.view().epoch,
        }
    }

    /// Shows watchers where it stands.
    fn show(&self, phase: Option<Phase>) {
        let Some(ticket) = &self.ticket else { return };
        let rounds = self.machine.convergence();
        let pages_left = self.tracking.pending();
        let in_doubt = self.machine.in_doubt() && self.link.is_none();
        let bytes_sent = self
            .sender()
            .map_or(self.figures.memory.bytes_sent, |sender| sender.bytes_sent());
        ticket.update(|status| {
            if let Some(phase) = phase {
                status.phase = phase;
            }
            if in_doubt {
                status.phase = Phase::InDoubt;
            }
            status.round = rounds.rounds();
            status.bytes_sent = bytes_sent;
            status.pages_left = pages_left;
            status.bandwidth_bytes_per_s = rounds.bandwidth_bytes_per_s();
            status.dirty_bytes_per_s = rounds.dirty_bytes_per_s();
            let predicted = rounds.predict_downtime_us(pages_left);
            status.predicted_downtime_ms = if predicted == u64::MAX {
                0.0
            } else {
                predicted as f64 / 1e3
            };
        });
    }
}

fn convert(event: LinkEvent) -> Input {
    match event {
        LinkEvent::Message(message) => Input::Peer(message),
        LinkEvent::Lost(reason) => Input::LinkLost { reason },
    }
}

fn phase_of(output: &Output) -> Option<Phase> {
    match output {
        Output::SendImages(_) => Some(Phase::Image),
        Output::StartTracking | Output::SendRound { .. } => Some(Phase::Precopy),
        Output::Hold | Output::StopVm => Some(Phase::Switchover),
        Output::Forward => Some(Phase::Forwarding),
        _ => None,
    }
}

/// Names of the moments in the freeze, each with the microseconds since the stop began.
fn freeze_step(input: &Input) -> Option<&'static str> {
    match input {
        Input::Stopped { .. } => Some("stopped"),
        Input::LastPagesSent { .. } => Some("pages_sent"),
        Input::StateSent => Some("state_sent"),
        Input::ResidueRead => Some("residue_read"),
        Input::HashesSent => Some("hashes_sent"),
        Input::Peer(Control::Ready(_)) => Some("ready"),
        _ => None,
    }
}

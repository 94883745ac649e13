//! Runs the source's machine.

use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use vm_runtime::units::PageRange;

use super::clock::unix_us;
use super::depart::{end_pod, figures};
use super::flows::{self, NewFlows};
use super::link::{Link, LinkEvent};
use super::report::Figures;
use super::runner::{JournalFailed, News, Runner, Side};
use super::source_disks::Disks;
use super::source_link::Loss;
use super::source_status::phase_of;
use super::source_steps::{self as steps, Lanes};
use super::source_throttle::{self, Slowed};
use super::steps::blocking_journal;
use crate::block::transfer::Outgoing;
use crate::daemon::migrations::Ticket;
use crate::daemon::node::Node;
use crate::memory::compress::Compress;
use crate::memory::postcopy::{PageServer, PushQueue};
use crate::memory::send::PageSender;
use crate::memory::track::{Holes, Tracking};
use crate::migration::source::{Input, Outcome, Output, Rollback, Source};
use crate::migration::status;
use crate::network::OnOverflow;
use crate::pods::{MigrationEnd, PodHandle, PodResources};
use crate::wire::bulk::Urgent;
use crate::wire::conn::Connection;
use crate::wire::control::ControlSender;
use crate::wire::fault::Fault;
use crate::wire::message::{Control, Ledger, ListPiece};
use crate::wire::session::Session;

/// One machine and what it works with.
pub(super) struct Run {
    pub(super) runner: Runner<Input>,
    pub(super) machine: Source,
    pub(super) pod: PodHandle,
    /// Gone once the pod has left.
    pub(super) resources: Option<Arc<PodResources>>,
    pub(super) ticket: Option<Ticket>,
    pub(super) figures: Figures,
    pub(super) addr: std::net::SocketAddr,
    /// Of the link that is up, or was last.
    pub(super) loss: Loss,
    pub(super) dialed: UnboundedSender<Session>,
    sessions: UnboundedReceiver<Session>,
    pub(super) lanes: Option<Lanes>,
    pub(super) urgent: Option<Connection<Urgent>>,
    pub(super) faults: Vec<Connection<Fault>>,
    /// Answers who waits for pages of the stopped guest.
    pub(super) server: Option<Arc<PageServer>>,
    /// What the destination said that its guest lacks.
    pub(super) wanted: Vec<PageRange>,
    pub(super) tracking: Tracking,
    /// The pod's writable disks.
    pub(super) disks: Disks,
    /// The part of the downtime that pages and blocks may take, in microseconds.
    pub(super) content_limit_us: u64,
    pub(super) slowed: Slowed,
    /// What is being pushed.
    pub(super) queue: Option<Arc<PushQueue>>,
    /// When the round under way began, by the machine's clock.
    pub(super) round_began: u64,
    /// Data connections of a link that is dialed again.
    pub(super) connections: u8,
    pub(super) compress: Compress,
    pub(super) on_overflow: OnOverflow,
    pub(super) held_at_unix_us: u64,
    /// Flows that begin while the pod moves.
    pub(super) news: NewFlows,
    /// What the other end of the link speaks.
    pub(super) version: u16,
    /// The lists of its images, until they have been sent.
    pub(super) lists: Vec<ListPiece>,
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
        let (dialed, sessions) = unbounded_channel();
        let pages = pod.spec().memory.pages();
        let holes = match machine.verifies() {
            true => Holes::Walked,
            false => Holes::Counted,
        };
        let defaults = &node.config.migration;
        let (connections, compress) = (defaults.connections, defaults.compress);
        let disks = resources.as_ref().map(|resources| {
            let disks = resources.disks.iter().filter_map(|disk| disk.local());
            disks.cloned().collect()
        });
        let shared = resources.as_ref().map(|resources| {
            let shared = resources
                .disks
                .iter()
                .filter(|disk| disk.shared().is_some());
            shared.filter_map(|disk| disk.served().cloned()).collect()
        });
        let mut runner = Runner::new(node, pod.name().to_owned(), ticket.cancel.clone());
        if let Some(resources) = &resources {
            runner.watch_vm(Arc::clone(&resources.vm));
        }
        Self {
            loss: Loss::new(runner.inputs.clone()),
            runner,
            machine,
            pod,
            resources,
            ticket: Some(ticket),
            figures,
            addr,
            dialed,
            sessions,
            lanes: None,
            urgent: None,
            faults: Vec::new(),
            server: None,
            wanted: Vec::new(),
            tracking: Tracking::new(pages, holes),
            disks: Disks::new(Outgoing::new(disks.unwrap_or_default()))
                .with_shared(shared.unwrap_or_default()),
            content_limit_us: 0,
            slowed: Slowed::default(),
            queue: None,
            round_began: 0,
            connections,
            compress,
            on_overflow: OnOverflow::default(),
            held_at_unix_us: 0,
            news: NewFlows::default(),
            version: 0,
            lists: Vec::new(),
        }
    }

    pub(super) fn attach(&mut self, session: Session, limit: Option<NonZeroU64>) {
        let Session {
            control,
            data,
            urgent,
            faults,
            version,
            ..
        } = session;
        self.faults = faults;
        self.version = version;
        let inputs = self.runner.inputs.clone();
        self.loss = Loss::new(inputs.clone());
        let loss = self.loss.clone();
        let convert = move |event| match event {
            LinkEvent::Message(message) => Some(Input::Peer(message)),
            LinkEvent::Lost(reason) => loss.input(reason),
        };
        self.runner.link = Some(Link::start(control, inputs, convert));
        self.urgent = urgent;
        if let Some(resources) = &self.resources
            && !data.is_empty()
        {
            let (readers, writers): (Vec<_>, Vec<_>) =
                data.into_iter().map(Connection::split).unzip();
            let memory = resources.vm.memory();
            self.lanes = Some(Lanes {
                sender: Arc::new(PageSender::start(&memory, writers, limit, self.compress)),
                _readers: readers,
            });
        }
    }

    /// Until the machine is done.
    pub(super) async fn events(mut self) {
        let mut refresh = tokio::time::interval(Duration::from_millis(100));
        while !self.runner.done {
            let input = tokio::select! {
                input = self.runner.next() => input,
                Some(session) = self.sessions.recv() => {
                    self.relinked(session).await;
                    Input::LinkUp
                }
                _ = refresh.tick() => {
                    self.show(None);
                    continue;
                }
            };
            self.input(input).await;
        }
    }

    pub(super) fn parts(&self) -> Option<Arc<PodResources>> {
        self.resources.clone()
    }

    pub(super) fn control(&self) -> Option<ControlSender> {
        self.runner.link.as_ref().map(|link| link.control.clone())
    }

    pub(super) fn sender(&self) -> Option<Arc<PageSender>> {
        self.lanes.as_ref().map(|lanes| Arc::clone(&lanes.sender))
    }

    async fn roll_back(&mut self, what: Rollback) {
        self.runner.steps.shutdown().await;
        self.server = None;
        if what.stop_tracking {
            self.disks.let_go();
        }
        if what.unthrottle
            && let Err(reason) = source_throttle::end(&self.slowed).await
        {
            self.runner.tell(Input::Failed { reason });
        }
        let problems = steps::roll_back(self.resources.as_deref(), &self.tracking, what).await;
        for reason in problems {
            self.runner.tell(Input::Failed { reason });
        }
        self.runner.tell(Input::RolledBack);
    }

    async fn finish(&mut self, outcome: Outcome) {
        self.runner.steps.shutdown().await;
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
            Outcome::Refused { reason } => {
                let epoch = self.owner_epoch().await;
                let end = Some(MigrationEnd::Kept { epoch });
                let books = self.books_kept().await;
                let outcome = status::Outcome::Refused(reason);
                (end, outcome, books, Ledger::default())
            }
            Outcome::Failed { reason } => {
                let epoch = self.owner_epoch().await;
                let end = Some(MigrationEnd::Kept { epoch });
                let books = self.books_kept().await;
                let outcome = status::Outcome::Failed(reason);
                (end, outcome, books, Ledger::default())
            }
            Outcome::PodFailed { reason } => {
                let end = Some(MigrationEnd::Died {
                    reason: reason.clone(),
                    epoch: self.owner_epoch().await,
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
            self.figures.memory.bytes_raw = sender.bytes_raw();
            self.figures.memory.compress = sender.compressed_with();
        }
        self.figures.disk = self.disks.report();
        self.figures.memory.throttle_percent = self.machine.throttle_percent();
        self.runner.close().await;
        if let Some(ticket) = self.ticket.take() {
            let figures = std::mem::replace(
                &mut self.figures,
                figures(&self.runner.node, &ticket, &self.pod, ""),
            );
            ticket
                .finish(figures.report(outcome, source, destination))
                .await;
        }
    }

    /// The epoch that the journal gives this node.
    async fn owner_epoch(&self) -> vm_runtime::units::Epoch {
        let name = self.pod.name().to_owned();
        match blocking_journal(&self.runner.node, move |journal| journal.owner(&name)).await {
            Ok(Some(owner)) => owner.epoch,
            Ok(None) | Err(_) => self.pod.view().epoch,
        }
    }
}

impl Side for Run {
    type Input = Input;
    type Output = Output;

    fn handle(&mut self, input: Input) -> Vec<Output> {
        if let Input::Peer(Control::PageBits(bits)) = &input {
            self.take_wanted(bits);
            return Vec::new();
        }
        if let Input::Peer(Control::DiskAck(ack)) = &input {
            self.disks.acknowledge(ack.round);
            return Vec::new();
        }
        if let Input::Peer(Control::FlowsTaken(taken)) = &input {
            self.figures.flows_taken(*taken);
            return Vec::new();
        }
        if let Input::Peer(Control::ImagesMoved(moved)) = &input {
            self.figures.images_moved(*moved);
            return Vec::new();
        }
        if let Input::Peer(Control::BoundTaken(taken)) = &input {
            self.figures.bound_taken(*taken, self.news.bound());
            return Vec::new();
        }
        self.note(&input);
        self.machine.handle(self.runner.now(), input)
    }

    async fn carry_out_one(&mut self, output: Output) -> Result<(), JournalFailed> {
        if let Some(phase) = phase_of(&output) {
            self.show(Some(phase));
        }
        match output {
            Output::Send(message) => {
                if let (Control::Grant(_), Some(parts)) = (&message, &self.resources) {
                    // The guest stands still and has flushed; before the destination can hear of it.
                    parts.disks.iter().for_each(|disk| disk.let_go());
                }
                let offers = matches!(message, Control::Offer(_));
                self.runner.send(message).await;
                if offers {
                    for piece in std::mem::take(&mut self.lists) {
                        self.runner.send(piece).await;
                    }
                }
            }
            Output::Journal(entry) => self.runner.journal(entry).await?,
            Output::Note(entry) => self.runner.note(entry).await,
            Output::WakeAt(at) => self.runner.wake_at(at),
            Output::CancelRefused => {
                tracing::info!(
                    pod = self.pod.name(),
                    "too late to cancel: the guest is handed over"
                );
            }
            Output::Redial => self.redial(),
            Output::Hold => {
                self.held_at_unix_us = unix_us();
                self.hold();
            }
            Output::Forward => self.forward().await,
            Output::Release => self.release(),
            Output::SaveState => self
                .runner
                .step(steps::save_state(self.parts(), self.control())),
            Output::SendHashes => self
                .runner
                .step(steps::send_hashes(self.sender(), self.control())),
            Output::SendImages(wants) => {
                let node = Arc::clone(&self.runner.node);
                self.runner
                    .step(steps::send_images(node, self.parts(), self.sender(), wants));
            }
            Output::SendDisks => self.send_disks(),
            Output::SendLastBlocks => self.send_last_blocks(),
            Output::StartTracking => {
                self.runner
                    .step(steps::start_tracking(self.parts(), self.tracking.clone()));
            }
            Output::SendRound { round } => {
                self.round_began = self.runner.now();
                self.runner.step(steps::send_round(
                    self.sender(),
                    self.tracking.clone(),
                    self.disks.clone(),
                    round,
                ));
            }
            Output::Scan => {
                let (tracking, disks) = (self.tracking.clone(), self.disks.clone());
                self.runner.step(steps::scan(tracking, disks));
            }
            Output::DetachAgent => self.runner.step(steps::detach_agent(self.parts())),
            Output::DrainTap => self.runner.step(steps::drain_tap(self.parts())),
            Output::StopVm => {
                // QEMU waits for the writes that are under way.
                self.disks.let_go();
                let slowed = Arc::clone(&self.slowed);
                self.runner.step(steps::stop_vm(self.parts(), slowed));
            }
            Output::SendFlows => {
                let news = self.news.clone();
                self.runner.step(flows::send(
                    self.parts(),
                    self.control(),
                    news,
                    self.version,
                ));
            }
            Output::ReadResidue => self.runner.step(steps::read_residue(self.parts())),
            Output::SendLastPages { round } => {
                self.runner.step(steps::send_last_pages(
                    self.sender(),
                    self.tracking.clone(),
                    round,
                ));
            }
            Output::SendStale { last } => self.send_stale(last),
            Output::ServeFaults => self.serve_faults(),
            Output::PushPages => self.push_pages(),
            Output::Throttle { percent } => self.throttle(percent),
            Output::Rollback(what) => self.roll_back(what).await,
            Output::Finish(outcome) => self.finish(outcome).await,
        }
        Ok(())
    }

    fn all_carried_out(&mut self) {
        self.show(None);
    }
}

impl From<News> for Input {
    fn from(news: News) -> Self {
        match news {
            News::Tick => Self::Tick,
            News::Cancel => Self::Cancel,
            News::VmDied { reason } => Self::VmDied { reason },
            News::Failed { reason } => Self::Failed { reason },
            News::JournalFailed { reason } => Self::JournalFailed { reason },
        }
    }
}

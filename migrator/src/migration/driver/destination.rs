//! Runs the destination's machine.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::DuplexStream;
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use vm_runtime::units::PageRange;
use vm_runtime::vm::Vm;

use super::arrive::{Relinked, question};
use super::clock::Steps;
use super::destination_disks::{Barriers, Filling, make_durable};
use super::device_state::MAX_STATE;
use super::images::Images;
use super::link::{Link, LinkEvent};
use super::packets;
use super::prepare::{self, Built, Chunk, Prepared};
use super::runner::{JournalFailed, News, Runner, Side};
use super::shared_disks;
use super::steps::wire_ledger;
use crate::api::error::chain;
use crate::daemon::node::Node;
use crate::memory::receive::{self, Arrival, Target};
use crate::memory::verify::PageHashes;
use crate::migration::destination::{Destination, Input, Output};
use crate::network::Port;
use crate::pods::{PodDisk, PodHandle, PodResources};
use crate::wire::bulk::Urgent;
use crate::wire::conn::Connection;
use crate::wire::fault::Fault;
use crate::wire::id::MigrationId;
use crate::wire::lists::ImageList;
use crate::wire::message::{Bye, Control, Ledger, Offer};
use crate::wire::preamble::VERSION_CHUNKS;

/// Chunks and barriers that wait for the conductor.
const ARRIVALS: usize = 64;
/// How long the freeze waits for the pod's output to be in its folder, which takes a millisecond. What is not there when
/// a service is killed after the grant is lost.
const KEEPS_WITHIN: Duration = Duration::from_millis(20);

/// One machine and what it works with.
pub(super) struct Run {
    pub(super) runner: Runner<Input>,
    pub(super) machine: Destination,
    pub(super) offer: Option<Box<Offer>>,
    /// The lists of its images, if they followed it, until they are looked at.
    pub(super) lists: Vec<ImageList>,
    /// What comes over the link, so that device state and hashes need not pass the machine.
    pub(super) link_events: UnboundedReceiver<LinkEvent>,
    pub(super) relinked: UnboundedReceiver<Relinked>,
    pub(super) registered: Option<MigrationId>,
    pub(super) urgent: Option<Connection<Urgent>>,
    pub(super) lanes: usize,
    pub(super) faults: Vec<Connection<Fault>>,
    /// Pages that will be missing, as they come in.
    pub(super) stale: Vec<PageRange>,
    pub(super) target: Arc<OnceLock<Target>>,
    /// The pod's writable disks, from when its memory is there.
    pub(super) disks: Filling,
    /// Those of its disks that do not move.
    pub(super) shared_disks: Vec<Arc<PodDisk>>,
    pub(super) hashes: Option<Arc<PageHashes>>,
    pub(super) theirs: Vec<(vm_runtime::units::PageIndex, Vec<u64>)>,
    /// The device state, as it comes, and how much of it has come.
    pub(super) state: UnboundedSender<Bytes>,
    pub(super) state_bytes: usize,
    /// What has come of it and nobody loads yet.
    pub(super) waiting_state: Option<UnboundedReceiver<Bytes>>,
    /// Where the device state goes in: the VMM listens already.
    pub(super) loader: Option<DuplexStream>,
    pub(super) chunks: Option<mpsc::Receiver<Chunk>>,
    pub(super) images: Images,
    pub(super) prepared: Arc<tokio::sync::Mutex<Option<Prepared>>>,
    /// The VM and the port that are being built.
    pub(super) built: Built,
    /// The VM and the port once they exist.
    pub(super) parts: Option<(Arc<Vm>, Port)>,
    /// Where the time of the freeze goes on this side.
    pub(super) times: Steps,
    /// A pod that a restarted service found.
    pub(super) found: Option<(PodHandle, Arc<PodResources>)>,
    /// The pod's output, on its way into its folder.
    pub(super) keeping: Option<JoinHandle<()>>,
    /// Entries of connection tracking, on their way into the kernel.
    pub(super) taking: Option<JoinHandle<()>>,
    /// What the other end of the link speaks.
    pub(super) version: u16,
    /// The pod's own task watches its VM.
    pub(super) adopted: bool,
}

impl Run {
    pub(super) fn new(node: Arc<Node>, machine: Destination) -> Self {
        let (_, link_events) = unbounded_channel();
        let (relink, relinked) = unbounded_channel();
        let (state, waiting_state) = unbounded_channel();
        let id = machine.migration();
        node.arrivals.enter(id, machine.pod(), relink);
        // Only the source's user can wish to cancel.
        let user = CancellationToken::new();
        Self {
            runner: Runner::new(node, machine.pod().to_owned(), user),
            machine,
            offer: None,
            lists: Vec::new(),
            link_events,
            relinked,
            registered: Some(id),
            urgent: None,
            lanes: 0,
            faults: Vec::new(),
            stale: Vec::new(),
            target: Arc::new(OnceLock::new()),
            disks: Filling::default(),
            shared_disks: Vec::new(),
            hashes: None,
            theirs: Vec::new(),
            state,
            state_bytes: 0,
            waiting_state: Some(waiting_state),
            loader: None,
            chunks: None,
            images: Images::default(),
            prepared: Arc::new(tokio::sync::Mutex::new(None)),
            built: Built::default(),
            parts: None,
            times: Steps::default(),
            found: None,
            keeping: None,
            taking: None,
            version: 0,
            adopted: false,
        }
    }

    pub(super) fn take_link(&mut self, link: Link, events: UnboundedReceiver<LinkEvent>) {
        self.runner.link = Some(link);
        self.link_events = events;
    }

    /// Starts to read the data connections.
    pub(super) fn receive(&mut self, data: Vec<Connection<crate::wire::bulk::Data>>) {
        let (arrivals, mut arrived) = mpsc::channel(ARRIVALS);
        let (to_images, chunks) = mpsc::channel(ARRIVALS);
        self.chunks = Some(chunks);
        let readers = data.into_iter().map(Connection::into_reader);
        receive::start(readers.collect(), &self.target, &arrivals);
        let (lanes, inputs) = (self.lanes, self.runner.inputs.clone());
        let (target, disks) = (Arc::clone(&self.target), Arc::clone(&self.disks));
        self.runner.helpers.spawn(async move {
            let mut rounds_of_disks = Barriers::new(lanes);
            let mut reached = vec![0u32; lanes];
            let mut placed = 0;
            while let Some(arrival) = arrived.recv().await {
                match arrival {
                    Arrival::Chunk { digest, raw } => {
                        // Nobody wants it any more: the run is over or the images are complete.
                        let _ = to_images.send(Chunk { digest, raw }).await;
                    }
                    Arrival::Barrier { lane, round } => {
                        reached[lane] = round;
                        let all = reached.iter().copied().min().unwrap_or(0);
                        if all > placed {
                            placed = all;
                            // While the guest runs at the source: the freeze is short of time.
                            prepare::hash_placed(&target).await;
                            let _ = inputs.send(Input::RoundPlaced { round: all });
                        }
                    }
                    Arrival::DiskBarrier { lane, round } => {
                        if let Some(round) = rounds_of_disks.reached(lane, round) {
                            make_durable(&disks, round, &inputs);
                        }
                    }
                    Arrival::Ended(error) => {
                        let _ = inputs.send(Input::Failed {
                            reason: chain(&error),
                        });
                        return;
                    }
                }
            }
        });
    }

    pub(super) fn watch_vm(&mut self) {
        if let Some(vm) = self.vm() {
            self.runner.watch_vm(vm);
        }
    }

    /// Until the machine is done.
    pub(super) async fn events(mut self) {
        while !self.runner.done {
            let input = tokio::select! {
                Some(event) = self.link_events.recv() => match self.link_event(event) {
                    Some(input) => input,
                    None => continue,
                },
                input = self.runner.next() => input,
                Some(asked) = self.relinked.recv() => {
                    self.relink(asked).await;
                    continue;
                }
            };
            self.input(input).await;
        }
        if let Some(id) = self.registered.take() {
            self.runner.node.arrivals.leave(id);
        }
        // Who asked in the last moment is answered by the journal.
        self.relinked.close();
        while let Some(asked) = self.relinked.recv().await {
            let (node, peer) = (
                Arc::clone(&self.runner.node),
                self.machine.source().to_owned(),
            );
            self.runner
                .node
                .tasks
                .spawn(async move { question(&node, peer, asked).await });
        }
    }

    /// Takes out what is not for the machine.
    fn link_event(&mut self, event: LinkEvent) -> Option<Input> {
        match event {
            LinkEvent::Lost(reason) => {
                self.runner.link = None;
                if self.machine.granted() {
                    self.fence_source();
                }
                Some(Input::LinkLost { reason })
            }
            LinkEvent::Message(Control::StateChunk(chunk)) => {
                self.state_bytes += chunk.0.len();
                if self.state_bytes > MAX_STATE {
                    let reason =
                        format!("the source sends more than {MAX_STATE} bytes of device state");
                    return Some(Input::Failed { reason });
                }
                // Whoever loads it may have failed, and says so.
                drop(self.state.send(chunk.0));
                None
            }
            LinkEvent::Message(Control::Flows(frame)) => {
                self.take_flows(frame);
                None
            }
            LinkEvent::Message(Control::Bound(frame)) => {
                self.take_bound(frame);
                None
            }
            LinkEvent::Message(Control::PageBits(bits)) => match self.take_stale(&bits) {
                Ok(()) => None,
                Err(reason) => Some(Input::Failed { reason }),
            },
            LinkEvent::Message(Control::PageHashes(hashes)) => {
                let pages = self.target.get().map_or(0, |target| target.memory.pages());
                let known: usize = self.theirs.iter().map(|(_, piece)| piece.len()).sum();
                let more: Vec<u64> = hashes.iter().collect();
                if (known + more.len()) as u64 > pages {
                    let reason =
                        "the source sends more page hashes than the guest has pages".to_owned();
                    return Some(Input::Failed { reason });
                }
                self.theirs.push((hashes.first, more));
                None
            }
            LinkEvent::Message(message) => {
                if let Control::Handover(handover) = &message {
                    self.keep_logs(handover);
                }
                Some(Input::Peer(message))
            }
        }
    }

    async fn relink(&mut self, asked: Relinked) {
        let Relinked {
            link,
            events,
            urgent,
            data,
            faults,
            version,
            first,
        } = asked;
        self.version = version;
        self.take_link(link, events);
        self.urgent = urgent;
        self.faults = faults;
        self.lanes = data.len();
        self.receive(data);
        self.pump();
        match first {
            Control::Query(_) => self.input(Input::Asked).await,
            first => self.input(Input::Peer(first)).await,
        }
    }

    /// Starts to take the packet log from the urgent connection.
    pub(super) fn pump(&mut self) {
        let Some(port) = self.port() else { return };
        self.expect_bound(&port);
        if let Some(urgent) = self.urgent.take() {
            let target = Arc::clone(&self.target);
            self.runner.helpers.spawn(async move {
                let lost = packets::pump_in(urgent, port.clone()).await;
                // A guest that lacks pages cannot go on without the source: its packets wait for the log as well.
                let pager = target.get().and_then(|target| target.pager.get());
                if pager.is_none_or(|pager| pager.left() == 0) {
                    port.source_is_away();
                }
                // The control connection tells when that matters.
                tracing::debug!(error = chain(&lost), "the packet log's connection ended");
            });
        }
    }

    fn time_input(&mut self, input: &mut Input) {
        match input {
            Input::StateLoaded => self.times.end("load_state"),
            Input::Verified { .. } => self.times.end("compare_pages"),
            Input::Resumed { steps, .. } => {
                self.images.resumed(&self.runner.node);
                self.times.end("resume");
                *steps = self.times.take();
            }
            _ => {}
        }
    }
}

impl Side for Run {
    type Input = Input;
    type Output = Output;

    fn handle(&mut self, mut input: Input) -> Vec<Output> {
        if let Input::Failed { reason } = &input
            && self.machine.granted()
        {
            tracing::warn!(reason, "after the grant");
        }
        self.time_input(&mut input);
        if matches!(input, Input::VmPrepared) {
            self.take_vm();
        }
        self.machine.handle(self.runner.now(), input)
    }

    async fn carry_out_one(&mut self, output: Output) -> Result<(), JournalFailed> {
        match output {
            Output::Send(message) => {
                if matches!(message, Control::Ready(_)) {
                    self.seal_disks();
                    self.images.arrived(&self.runner.node);
                }
                // From the grant on, a service that is killed must find them again. A disk that is busy goes on beside the freeze.
                if let (Control::Ready(_), Some(keeping)) = (&message, self.keeping.take()) {
                    let _ = timeout(KEEPS_WITHIN, keeping).await;
                    self.flows_taken().await;
                }
                let runs = matches!(message, Control::Running(_));
                self.runner.send(message).await;
                if runs && self.version >= VERSION_CHUNKS {
                    self.runner.send(self.images.figures()).await;
                }
            }
            Output::Journal(entry) => {
                self.times.begin("journal");
                self.runner.journal(entry).await?;
                self.times.end("journal");
            }
            Output::Note(entry) => self.runner.note(entry).await,
            Output::Check(offer) => self.check(*offer).await,
            Output::ReceiveImages(_) => {
                if let Some(chunks) = self.chunks.take() {
                    let images = self.images.take_incoming();
                    self.runner.step(prepare::receive_images(images, chunks));
                }
            }
            Output::PrepareMemory => self.make_memory().await,
            Output::PrepareVm => self.prepare_vm(),
            Output::Verify => {
                self.times.begin("compare_pages");
                let theirs = std::mem::take(&mut self.theirs);
                self.runner
                    .step(prepare::verify(Arc::clone(&self.target), theirs));
            }
            Output::LoadState => {
                self.times = Steps::default();
                self.times.begin("load_state");
                if let (Some(sink), Some(state)) = (self.loader.take(), self.waiting_state.take()) {
                    self.runner.helpers.spawn(prepare::feed(sink, state));
                }
            }
            // What was sent is still given out.
            Output::EndState => self.state = unbounded_channel().0,
            Output::OpenNetwork => {
                self.times.begin("open_network");
                self.flows_taken().await;
                self.open_network().await;
                self.times.end("open_network");
            }
            Output::Resume => {
                self.times.begin("resume");
                let resume = prepare::resume(self.vm());
                let (shared, epoch) = (self.shared_disks.clone(), self.machine.epoch());
                self.runner.step(async move {
                    let failed = |reason| Input::ResumeFailed { reason };
                    let resumed = async {
                        shared_disks::take(shared, epoch).await?;
                        resume.await
                    };
                    Ok(resumed.await.unwrap_or_else(failed))
                });
            }
            Output::MarkStale { last } => self.mark_stale(last),
            Output::AwaitPages => self.await_pages(),
            Output::SendWanted => self.send_wanted().await,
            Output::Adopt { handover } => self.adopt(handover),
            Output::PodFailed { reason } => {
                self.end_pager();
                self.pod_failed(reason).await;
            }
            Output::Discard => self.discard().await,
            Output::SendBye => {
                self.tell_flows().await;
                let ledger = match self.port() {
                    Some(port) => port
                        .ledger()
                        .await
                        .map_or_else(|_| Ledger::default(), |l| wire_ledger(&l)),
                    None => Ledger::default(),
                };
                let migration = self.machine.migration();
                self.runner.send(Bye { migration, ledger }).await;
            }
            Output::WakeAt(at) => self.runner.wake_at(at),
            Output::CancelRefused => tracing::info!("too late to cancel: this node runs the guest"),
            Output::Finish(outcome) => self.finish(outcome).await,
        }
        Ok(())
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

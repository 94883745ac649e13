//! Runs the destination's machine.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use tokio::io::DuplexStream;
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::JoinSet;
use tokio::time::{Instant as TokioInstant, sleep_until};
use vm_runtime::vm::Vm;

use super::arrive::{Relinked, question};
use super::clock::Steps;
use super::device_state::MAX_STATE;
use super::link::{Link, LinkEvent};
use super::packets;
use super::prepare::{self, Chunk, Images, Prepared};
use super::steps::blocking_journal;
use crate::api::error::chain;
use crate::daemon::node::Node;
use crate::memory::receive::{self, Arrival, Target};
use crate::memory::verify::PageHashes;
use crate::migration::destination::{Destination, Input, Output};
use crate::migration::journal::Entry;
use crate::network::Port;
use crate::pods::{PodHandle, PodResources};
use crate::wire::bulk::Urgent;
use crate::wire::conn::Connection;
use crate::wire::id::MigrationId;
use crate::wire::message::{Bye, Control, Ledger, Offer};

/// Chunks and barriers that wait for the conductor.
const ARRIVALS: usize = 64;

/// One machine and what it works with.
pub(super) struct Run {
    pub(super) node: Arc<Node>,
    pub(super) machine: Destination,
    pub(super) offer: Option<Box<Offer>>,
    pub(super) inputs: UnboundedSender<Input>,
    pub(super) queue: UnboundedReceiver<Input>,
    /// What comes over the link, so that device state and hashes need not pass the machine.
    pub(super) link_events: UnboundedReceiver<LinkEvent>,
    pub(super) link: Option<Link>,
    pub(super) relinked: UnboundedReceiver<Relinked>,
    pub(super) registered: Option<MigrationId>,
    pub(super) began: Instant,
    pub(super) wake: Option<TokioInstant>,
    pub(super) steps: JoinSet<()>,
    pub(super) helpers: JoinSet<()>,
    pub(super) urgent: Option<Connection<Urgent>>,
    pub(super) lanes: usize,
    pub(super) target: Arc<OnceLock<Target>>,
    pub(super) hashes: Option<Arc<PageHashes>>,
    pub(super) theirs: Vec<(vm_runtime::units::PageIndex, Vec<u64>)>,
    pub(super) state: Vec<u8>,
    /// Where the device state goes in: the VMM listens already.
    pub(super) loader: Option<DuplexStream>,
    pub(super) chunks: Option<mpsc::Receiver<Chunk>>,
    pub(super) images: Images,
    pub(super) prepared: Arc<tokio::sync::Mutex<Option<Prepared>>>,
    /// The VM and the port once they exist.
    pub(super) parts: Option<(Arc<Vm>, Port)>,
    /// Where the time of the freeze goes on this side.
    pub(super) times: Steps,
    /// A pod that a restarted service found.
    pub(super) found: Option<(PodHandle, Arc<PodResources>)>,
    /// The pod's own task watches its VM.
    pub(super) adopted: bool,
    pub(super) done: bool,
}

impl Run {
    pub(super) fn new(node: Arc<Node>, machine: Destination) -> Self {
        let (inputs, queue) = unbounded_channel();
        let (_, link_events) = unbounded_channel();
        let (relink, relinked) = unbounded_channel();
        let id = machine.migration();
        node.arrivals.lock().insert(id, relink);
        Self {
            node,
            machine,
            offer: None,
            inputs,
            queue,
            link_events,
            link: None,
            relinked,
            registered: Some(id),
            began: Instant::now(),
            wake: None,
            steps: JoinSet::new(),
            helpers: JoinSet::new(),
            urgent: None,
            lanes: 0,
            target: Arc::new(OnceLock::new()),
            hashes: None,
            theirs: Vec::new(),
            state: Vec::new(),
            loader: None,
            chunks: None,
            images: Images::default(),
            prepared: Arc::new(tokio::sync::Mutex::new(None)),
            parts: None,
            times: Steps::default(),
            found: None,
            adopted: false,
            done: false,
        }
    }

    pub(super) fn take_link(&mut self, link: Link, events: UnboundedReceiver<LinkEvent>) {
        self.link = Some(link);
        self.link_events = events;
    }

    /// Starts to read the data connections.
    pub(super) fn receive(&mut self, data: Vec<Connection<crate::wire::bulk::Data>>) {
        let (arrivals, mut arrived) = mpsc::channel(ARRIVALS);
        let (to_images, chunks) = mpsc::channel(ARRIVALS);
        self.chunks = Some(chunks);
        let readers = data.into_iter().map(|connection| connection.split().0);
        receive::start(readers.collect(), &self.target, &arrivals);
        let (lanes, inputs) = (self.lanes, self.inputs.clone());
        let target = Arc::clone(&self.target);
        self.helpers.spawn(async move {
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
        let vm = match (&self.parts, &self.found) {
            (Some((vm, _)), _) => Arc::clone(vm),
            (None, Some((_, resources))) => Arc::clone(&resources.vm),
            (None, None) => return,
        };
        let inputs = self.inputs.clone();
        self.helpers.spawn(async move {
            let reason = match vm.wait_exit().await {
                Ok(exit) => prepare::died(&exit),
                Err(error) => chain(&error),
            };
            let _ = inputs.send(Input::VmDied { reason });
        });
    }

    /// Until the machine is done.
    pub(super) async fn events(mut self) {
        let mut cancelled = false;
        while !self.done {
            let wake = self.wake;
            let input = tokio::select! {
                Some(event) = self.link_events.recv() => match self.link_event(event) {
                    Some(input) => input,
                    None => continue,
                },
                Some(input) = self.queue.recv() => input,
                Some(asked) = self.relinked.recv() => {
                    self.relink(asked).await;
                    continue;
                }
                () = sleep_until(wake.unwrap_or_else(TokioInstant::now)), if wake.is_some() => {
                    self.wake = None;
                    Input::Tick
                }
                () = self.node.shutdown.cancelled(), if !cancelled => {
                    cancelled = true;
                    Input::Cancel
                }
            };
            self.input(input).await;
        }
        if let Some(id) = self.registered.take() {
            self.node.arrivals.lock().remove(&id);
        }
        // Who asked in the last moment is answered by the journal.
        self.relinked.close();
        while let Some(asked) = self.relinked.recv().await {
            let (node, peer) = (Arc::clone(&self.node), self.machine.source().to_owned());
            self.node
                .tasks
                .spawn(async move { question(&node, peer, asked).await });
        }
    }

    /// Takes out what is not for the machine.
    fn link_event(&mut self, event: LinkEvent) -> Option<Input> {
        match event {
            LinkEvent::Lost(reason) => {
                self.link = None;
                Some(Input::LinkLost { reason })
            }
            LinkEvent::Message(Control::StateChunk(chunk)) => {
                if self.state.len() + chunk.0.len() > MAX_STATE {
                    let reason =
                        format!("the source sends more than {MAX_STATE} bytes of device state");
                    return Some(Input::Failed { reason });
                }
                self.state.extend_from_slice(&chunk.0);
                None
            }
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
            LinkEvent::Message(message) => Some(Input::Peer(message)),
        }
    }

    async fn relink(&mut self, asked: Relinked) {
        let Relinked {
            link,
            events,
            urgent,
            first,
        } = asked;
        self.take_link(link, events);
        self.urgent = urgent;
        self.pump();
        match first {
            Control::Query(_) => self.input(Input::Asked).await,
            first => self.input(Input::Peer(first)).await,
        }
    }

    /// Starts to take the packet log from the urgent connection.
    pub(super) fn pump(&mut self) {
        let port = match (&self.parts, &self.found) {
            (Some((_, port)), _) => port.clone(),
            (None, Some((_, resources))) => resources.port.clone(),
            (None, None) => return,
        };
        if let Some(urgent) = self.urgent.take() {
            self.helpers.spawn(async move {
                let lost = packets::pump_in(urgent, port).await;
                // The control connection tells when that matters.
                tracing::debug!(error = chain(&lost), "the packet log's connection ended");
            });
        }
    }

    pub(super) async fn input(&mut self, input: Input) {
        if let Input::Failed { reason } = &input
            && self.machine.granted()
        {
            tracing::warn!(reason, "after the grant");
        }
        let outputs = self.handle(input);
        self.carry_out(outputs).await;
    }

    fn handle(&mut self, mut input: Input) -> Vec<Output> {
        self.time_input(&mut input);
        let now = self.began.elapsed().as_micros() as u64;
        self.machine.handle(now, input)
    }

    fn time_input(&mut self, input: &mut Input) {
        match input {
            Input::StateLoaded => self.times.end("load_state"),
            Input::Verified { .. } => self.times.end("compare_pages"),
            Input::Resumed { steps, .. } => {
                self.times.end("resume");
                *steps = self.times.take();
            }
            _ => {}
        }
    }

    /// A journal that fails is the machine's very next input, and what followed it is dropped.
    pub(super) async fn carry_out(&mut self, outputs: Vec<Output>) {
        let mut outputs = outputs;
        while let Some(reason) = self.carry_out_once(outputs).await {
            outputs = self.handle(Input::JournalFailed { reason });
        }
    }

    async fn carry_out_once(&mut self, outputs: Vec<Output>) -> Option<String> {
        for output in outputs {
            match output {
                Output::Journal(entry) => {
                    self.times.begin("journal");
                    if let Err(reason) = self.write(entry).await {
                        return Some(reason);
                    }
                    self.times.end("journal");
                }
                Output::Note(entry) => {
                    if let Err(reason) = self.write(entry).await {
                        tracing::error!(reason, "the journal stays behind");
                    }
                }
                other => self.begin(other).await,
            }
        }
        None
    }

    async fn write(&self, entry: Entry) -> Result<(), String> {
        blocking_journal(&self.node, move |journal| journal.apply(&entry)).await
    }

    pub(super) async fn send(&self, message: impl Into<Control>) {
        if let Some(link) = &self.link {
            // A lost link is reported by its reader, with the cause.
            let _ = link.control.send(message).await;
        }
    }

    async fn begin(&mut self, output: Output) {
        match output {
            Output::Send(message) => self.send(message).await,
            Output::Check(offer) => self.check(*offer).await,
            Output::ReceiveImages(_) => {
                if let Some(chunks) = self.chunks.take() {
                    let images = std::mem::take(&mut self.images);
                    self.step(prepare::receive_images(images, chunks));
                }
            }
            Output::PrepareVm => self.prepare_vm().await,
            Output::Verify => {
                self.times.begin("compare_pages");
                let theirs = std::mem::take(&mut self.theirs);
                self.step(prepare::verify(Arc::clone(&self.target), theirs));
            }
            Output::LoadState => {
                self.times = Steps::default();
                self.times.begin("load_state");
                let state = std::mem::take(&mut self.state);
                if let Some(sink) = self.loader.take() {
                    self.helpers.spawn(prepare::feed(sink, state));
                }
            }
            Output::OpenNetwork => {
                self.times.begin("open_network");
                self.open_network().await;
                self.times.end("open_network");
            }
            Output::Resume => {
                self.times.begin("resume");
                self.step(prepare::resume(self.vm()));
            }
            Output::Adopt { handover } => self.adopt(handover),
            Output::PodFailed { reason } => self.pod_failed(reason).await,
            Output::Discard => self.discard().await,
            Output::SendBye => {
                let ledger = match self.port() {
                    Some(port) => port.ledger().await.map_or_else(
                        |_| Ledger::default(),
                        |l| super::source_steps::wire_ledger(&l),
                    ),
                    None => Ledger::default(),
                };
                let migration = self.machine.migration();
                self.send(Bye { migration, ledger }).await;
            }
            Output::WakeAt(at) => self.wake = Some((self.began + Duration::from_micros(at)).into()),
            Output::CancelRefused => tracing::info!("too late to cancel: this node runs the guest"),
            Output::Finish(outcome) => self.finish(outcome).await,
            Output::Journal(_) | Output::Note(_) => {}
        }
    }

    pub(super) fn step(
        &mut self,
        step: impl Future<Output = Result<Input, String>> + Send + 'static,
    ) {
        while self.steps.try_join_next().is_some() {}
        let inputs = self.inputs.clone();
        self.steps.spawn(async move {
            let input = step.await.unwrap_or_else(|reason| Input::Failed { reason });
            let _ = inputs.send(input);
        });
    }
}

//! Runs the destination's machine.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use tokio::io::DuplexStream;
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::JoinSet;
use tokio::time::{Instant as TokioInstant, sleep_until, timeout};
use vm_runtime::vm::Vm;

use super::device_state::MAX_STATE;
use super::link::{Link, LinkEvent};
use super::packets;
use super::prepare::{self, Chunk, Images, Prepared};
use super::source::blocking;
use crate::api::error::chain;
use crate::daemon::node::Node;
use crate::memory::receive::{self, Arrival, Target};
use crate::memory::verify::PageHashes;
use crate::migration::destination::{Destination, Input, Outcome, Output};
use crate::migration::journal::{DestinationRecord, Entry};
use crate::network::{Port, Stage};
use crate::pods::{MigrationEnd, PodHandle, PodResources};
use crate::wire::bulk::Urgent;
use crate::wire::conn::Connection;
use crate::wire::id::MigrationId;
use crate::wire::message::{self, Bye, Control, Ledger, Offer, QueryReply, StateChunk};
use crate::wire::session::Session;

/// For the first message of a session.
const FIRST_MESSAGE: Duration = Duration::from_secs(10);
/// Chunks and barriers that wait for the conductor.
const ARRIVALS: usize = 64;

/// The machines of this node that await a source which lost its link, by migration.
#[derive(Clone, Debug, Default)]
pub struct Arrivals {
    running: Arc<Mutex<HashMap<MigrationId, UnboundedSender<Relinked>>>>,
}

/// A session of a source that came back, with its first message.
#[derive(Debug)]
pub(super) struct Relinked {
    link: Link,
    events: UnboundedReceiver<LinkEvent>,
    urgent: Option<Connection<Urgent>>,
    first: Control,
}

impl Arrivals {
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<MigrationId, UnboundedSender<Relinked>>> {
        // Every change is one call on the map.
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Serves a session that another node dialed.
pub(super) async fn incoming(node: Arc<Node>, session: Session) {
    let Session {
        peer,
        control,
        data,
        urgent,
        ..
    } = session;
    let (sender, mut events) = unbounded_channel();
    let link = Link::start(control, sender, |event| event);
    let first = match timeout(FIRST_MESSAGE, events.recv()).await {
        Ok(Some(LinkEvent::Message(message))) => message,
        Ok(Some(LinkEvent::Lost(reason))) => {
            tracing::info!(peer, reason, "a session ended before it began");
            return;
        }
        Ok(None) | Err(_) => {
            tracing::warn!(peer, "a session said nothing");
            return;
        }
    };
    match first {
        Control::Offer(offer) => {
            if offer.source != peer || urgent.is_none() || data.is_empty() {
                tracing::warn!(
                    peer,
                    source = offer.source,
                    "an offer that its certificate does not fit, or without data connections"
                );
                return;
            }
            let mut run = Run::new(node, Destination::new(offer.clone(), peer));
            run.offer = Some(offer);
            run.take_link(link, events);
            run.urgent = urgent;
            run.lanes = data.len();
            run.receive(data);
            run.input(Input::Begin).await;
            run.events().await;
        }
        first @ (Control::Query(_) | Control::Released(_)) => {
            let asked = Relinked {
                link,
                events,
                urgent,
                first,
            };
            question(&node, peer, asked).await;
        }
        other => tracing::warn!(
            peer,
            message = other.name(),
            "a session began with an unexpected message"
        ),
    }
}

fn subject(message: &Control) -> Option<MigrationId> {
    match message {
        Control::Query(query) => Some(query.migration),
        Control::Released(released) => Some(released.migration),
        _ => None,
    }
}

/// A source asks after its link was lost: the machine that runs answers, or else the journal.
async fn question(node: &Arc<Node>, peer: String, asked: Relinked) {
    let Some(id) = subject(&asked.first) else {
        return;
    };
    let machine = node.arrivals.lock().get(&id).cloned();
    let mut asked = match machine {
        Some(machine) => match machine.send(asked) {
            Ok(()) => return,
            // It ended in this moment: the journal has its last word.
            Err(mpsc::error::SendError(asked)) => asked,
        },
        None => asked,
    };
    let mut next = Some(asked.first);
    while let Some(message) = next.take() {
        let answer = match message {
            Control::Query(query) => {
                let peer = peer.clone();
                let verdict =
                    blocking(node, move |journal| journal.answer(query.migration, &peer)).await;
                verdict.map(|verdict| {
                    Some(Control::QueryReply(QueryReply {
                        migration: query.migration,
                        verdict,
                    }))
                })
            }
            Control::Released(released) => {
                let peer = peer.clone();
                let settled = blocking(node, move |journal| {
                    journal.settle(released.migration, &peer)
                })
                .await;
                settled.map(|()| {
                    Some(Control::Bye(Bye {
                        migration: released.migration,
                        ledger: Ledger::default(),
                    }))
                })
            }
            _ => Ok(None),
        };
        match answer {
            Ok(Some(answer)) => {
                if asked.link.control.send(answer).await.is_err() {
                    return;
                }
            }
            Ok(None) => {}
            Err(reason) => {
                tracing::error!(peer, reason, "cannot answer who runs a pod");
                return;
            }
        }
        next = match asked.events.recv().await {
            Some(LinkEvent::Message(message)) => Some(message),
            Some(LinkEvent::Lost(_)) | None => None,
        };
    }
}

/// Ends a migration to here that an earlier service left open after the grant.
pub(super) async fn recover(
    node: Arc<Node>,
    record: DestinationRecord,
    pod: Option<(PodHandle, Arc<PodResources>)>,
) {
    let name = record.pod.clone();
    let owner = match blocking(&node, move |journal| journal.owner(&name)).await {
        Ok(owner) => owner,
        Err(reason) => {
            tracing::error!(
                pod = record.pod,
                reason,
                "its journal cannot be read: left alone"
            );
            return;
        }
    };
    tracing::info!(
        pod = record.pod,
        from = record.from,
        "going on with a pod that was granted to this node"
    );
    let (machine, first) = Destination::recover(0, record, owner, pod.is_some());
    let mut run = Run::new(node, machine);
    run.found = pod;
    run.watch_vm();
    run.carry_out(first).await;
    run.events().await;
}

/// One machine and what it works with.
struct Run {
    node: Arc<Node>,
    machine: Destination,
    offer: Option<Box<Offer>>,
    inputs: UnboundedSender<Input>,
    queue: UnboundedReceiver<Input>,
    /// What comes over the link, so that device state and hashes need not pass the machine.
    link_events: UnboundedReceiver<LinkEvent>,
    link: Option<Link>,
    relinked: UnboundedReceiver<Relinked>,
    registered: Option<MigrationId>,
    began: Instant,
    wake: Option<TokioInstant>,
    steps: JoinSet<()>,
    helpers: JoinSet<()>,
    urgent: Option<Connection<Urgent>>,
    lanes: usize,
    target: Arc<OnceLock<Target>>,
    hashes: Option<Arc<PageHashes>>,
    theirs: Vec<(vm_runtime::units::PageIndex, Vec<u64>)>,
    state: Vec<u8>,
    /// Where the device state goes in: the VMM listens already.
    loader: Option<DuplexStream>,
    chunks: Option<mpsc::Receiver<Chunk>>,
    images: Images,
    prepared: Arc<tokio::sync::Mutex<Option<Prepared>>>,
    /// The VM and the port once they exist.
    parts: Option<(Arc<Vm>, Port)>,
    /// A pod that a restarted service found.
    found: Option<(PodHandle, Arc<PodResources>)>,
    done: bool,
}

impl Run {
    fn new(node: Arc<Node>, machine: Destination) -> Self {
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
            found: None,
            done: false,
        }
    }

    fn take_link(&mut self, link: Link, events: UnboundedReceiver<LinkEvent>) {
        self.link = Some(link);
        self.link_events = events;
    }

    /// Starts to read the data connections.
    fn receive(&mut self, data: Vec<Connection<crate::wire::bulk::Data>>) {
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

    fn watch_vm(&mut self) {
        let vm = match (&self.parts, &self.found) {
            (Some((vm, _)), _) => Arc::clone(vm),
            (None, Some((_, resources))) => Arc::clone(&resources.vm),
            (None, None) => return,
        };
        let inputs = self.inputs.clone();
        self.helpers.spawn(async move {
            let reason = match vm.wait_exit().await {
                Ok(exit) => format!("{exit:?}"),
                Err(error) => chain(&error),
            };
            let _ = inputs.send(Input::VmDied { reason });
        });
    }

    /// Until the machine is done.
    async fn events(mut self) {
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
    fn pump(&mut self) {
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

    async fn input(&mut self, input: Input) {
        if let Input::Failed { reason } = &input
            && self.machine.granted()
        {
            tracing::warn!(reason, "after the grant");
        }
        let outputs = self.handle(input);
        self.carry_out(outputs).await;
    }

    fn handle(&mut self, input: Input) -> Vec<Output> {
        let now = self.began.elapsed().as_micros() as u64;
        self.machine.handle(now, input)
    }

    /// A journal that fails is the machine's very next input, and what followed it is dropped.
    async fn carry_out(&mut self, outputs: Vec<Output>) {
        let mut outputs = outputs;
        while let Some(reason) = self.carry_out_once(outputs).await {
            outputs = self.handle(Input::JournalFailed { reason });
        }
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
                        tracing::error!(reason, "the journal stays behind");
                    }
                }
                other => self.begin(other).await,
            }
        }
        None
    }

    async fn write(&self, entry: Entry) -> Result<(), String> {
        blocking(&self.node, move |journal| journal.apply(&entry)).await
    }

    async fn send(&self, message: impl Into<Control>) {
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
                let theirs = std::mem::take(&mut self.theirs);
                self.step(prepare::verify(Arc::clone(&self.target), theirs));
            }
            Output::LoadState => {
                let state = std::mem::take(&mut self.state);
                if let Some(sink) = self.loader.take() {
                    self.helpers.spawn(prepare::feed(sink, state));
                }
            }
            Output::OpenNetwork => self.open_network().await,
            Output::Resume => self.step(prepare::resume(self.vm())),
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

    fn step(&mut self, step: impl Future<Output = Result<Input, String>> + Send + 'static) {
        while self.steps.try_join_next().is_some() {}
        let inputs = self.inputs.clone();
        self.steps.spawn(async move {
            let input = step.await.unwrap_or_else(|reason| Input::Failed { reason });
            let _ = inputs.send(input);
        });
    }

    fn vm(&self) -> Option<Arc<Vm>> {
        match (&self.parts, &self.found) {
            (Some((vm, _)), _) => Some(Arc::clone(vm)),
            (None, Some((_, resources))) => Some(Arc::clone(&resources.vm)),
            (None, None) => None,
        }
    }

    fn port(&self) -> Option<Port> {
        match (&self.parts, &self.found) {
            (Some((_, port)), _) => Some(port.clone()),
            (None, Some((_, resources))) => Some(resources.port.clone()),
            (None, None) => None,
        }
    }

    async fn check(&mut self, offer: Offer) {
        let checked = prepare::check(&self.node, &offer).await;
        let checked = match checked {
            Ok((pod, images, wants)) => {
                *self.prepared.lock().await = Some(pod);
                self.images = images;
                Ok(wants)
            }
            Err(refuse) => {
                tracing::info!(
                    pod = offer.pod.name,
                    from = offer.source,
                    reason = refuse.reason,
                    "refused a pod"
                );
                Err(refuse)
            }
        };
        let _ = self.inputs.send(Input::Checked(checked));
    }

    async fn prepare_vm(&mut self) {
        let verify = self
            .offer
            .as_ref()
            .is_some_and(|offer| offer.options.verify);
        let built = prepare::build(&self.prepared, &self.target, verify).await;
        match built {
            Ok((vm, port)) => {
                self.hashes = self.target.get().and_then(|target| target.hashes.clone());
                let (sink, source) = tokio::io::duplex(StateChunk::MAX);
                self.loader = Some(sink);
                self.step(prepare::load_state(Arc::clone(&vm), source));
                self.parts = Some((vm, port));
                self.watch_vm();
                self.pump();
                let _ = self.inputs.send(Input::VmPrepared);
            }
            Err(reason) => drop(self.inputs.send(Input::Failed { reason })),
        }
    }

    async fn open_network(&mut self) {
        let Some(port) = self.port() else { return };
        if port.stage() != Stage::Incoming {
            return;
        }
        if let Err(error) = port.open().await {
            let reason = chain(&error);
            let _ = self.inputs.send(Input::Failed { reason });
        }
    }

    fn adopt(&mut self, handover: Option<message::Handover>) {
        let epoch = self.machine.epoch();
        let settling = self.port();
        self.helpers.spawn(async move {
            if let Some(port) = settling
                && port.stage() == Stage::Opened
                && let Err(error) = port.settle().await
            {
                tracing::error!(error = chain(&error), "the pod's gate does not settle");
            }
        });
        let prepared = Arc::clone(&self.prepared);
        let found = self.found.clone();
        // Not a step: a pod that runs here is this node's, whatever else comes to an end.
        self.node.tasks.spawn(async move {
            match found {
                Some((pod, _)) => {
                    let end = MigrationEnd::Kept { epoch };
                    if let Err(error) = pod.end_migration(end).await {
                        tracing::error!(
                            pod = pod.name(),
                            error = chain(&error),
                            "cannot end the migration"
                        );
                    }
                }
                None => prepare::adopt(&prepared, handover, epoch).await,
            }
        });
    }

    async fn pod_failed(&mut self, reason: String) {
        tracing::error!(
            pod = self.machine.pod(),
            reason,
            "the pod is granted to this node, and its guest is gone"
        );
        if let Some((pod, _)) = &self.found {
            let end = MigrationEnd::Died { reason };
            if let Err(error) = pod.end_migration(end).await {
                tracing::error!(
                    pod = pod.name(),
                    error = chain(&error),
                    "cannot end the migration"
                );
            }
            return;
        }
        // Before its adoption nobody else knows the pod; afterwards its own task sees the end of its VM.
        if let Some(problem) = prepare::discard(&self.prepared).await {
            tracing::error!(reason = problem, "something of the pod is left behind");
        }
        let name = self.machine.pod().to_owned();
        if let Err(reason) = blocking(&self.node, move |journal| journal.stop_owner(&name)).await {
            tracing::error!(reason, "the journal stays behind");
        }
    }

    async fn discard(&mut self) {
        self.steps.shutdown().await;
        self.images = Images::default();
        self.parts = None;
        if let Some(reason) = prepare::discard(&self.prepared).await {
            tracing::error!(reason, "something of a discarded pod is left behind");
        }
        let _ = self.inputs.send(Input::Discarded);
    }

    async fn finish(&mut self, outcome: Outcome) {
        self.done = true;
        let pod = self.machine.pod();
        match outcome {
            Outcome::Completed { settled } => tracing::info!(pod, settled, "a pod has arrived"),
            Outcome::Failed { reason } => tracing::warn!(pod, reason, "a pod has not arrived"),
            Outcome::PodFailed { reason } => {
                tracing::error!(pod, reason, "a pod arrived and failed")
            }
        }
        self.steps.shutdown().await;
        if let Some(link) = self.link.take() {
            let _ = link.control.flush().await;
        }
        self.helpers.shutdown().await;
    }
}

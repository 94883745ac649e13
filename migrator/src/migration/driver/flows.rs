//! Entries of connection tracking, which move with the pod: over the control connection while the guest stands still, and over the urgent one in
//! front of the first packet of a flow that begins later. Flows that the source goes on translating are told of in the same way.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::time::timeout;

use super::depart::peer_addr;
use super::destination::Run as DestinationRun;
use crate::api::error::chain;
use crate::migration::destination::Input as DestinationInput;
use crate::migration::source::Input;
use crate::network::Port;
use crate::network::conntrack::{
    Bound as BoundFlow, Flow, FlowNews, Flows as Found, Keeper, Known,
};
use crate::pods::PodResources;
use crate::wire::bulk::Urgent;
use crate::wire::control::ControlSender;
use crate::wire::message::{Bound, BoundTaken, Flows, FlowsTaken};
use crate::wire::preamble::{VERSION_BOUND, VERSION_FLOWS};

/// How long the grant waits for entries that the kernel is being told. It takes some microseconds for each.
const TAKES_WITHIN: Duration = Duration::from_secs(1);

/// News of flows that begin, once somebody listens. Outlives a link.
#[derive(Clone, Debug, Default)]
pub(super) struct NewFlows(Arc<Told>);

#[derive(Debug, Default)]
struct Told {
    heard: OnceLock<Mutex<Heard>>,
    /// What has been given out: a link that is lost may have lost it.
    frames: Mutex<Vec<Urgent>>,
}

#[derive(Debug)]
struct Heard {
    news: FlowNews,
    home: AtHome,
    /// Bound flows among them, and how many of these are not served.
    bound: (u64, u64),
}

/// What keeps bound flows here; `None`: the destination is too old to lead any back.
#[derive(Clone, Debug)]
struct AtHome(Option<Keeper>);

impl AtHome {
    /// What the destination is told of these, and how many are not served.
    fn keep(&self, flows: &[Flow]) -> (Vec<BoundFlow>, u64) {
        match &self.0 {
            Some(keeper) => {
                let kept = keeper.keep(flows);
                (kept.bound, kept.unserved)
            }
            None => (Vec::new(), flows.len() as u64),
        }
    }

    fn problem(&self) -> &str {
        match &self.0 {
            Some(keeper) => keeper
                .problem()
                .unwrap_or("the programs read no packets of their kind, or there are too many"),
            None => "the destination's version does not lead flows back: update it",
        }
    }
}

impl NewFlows {
    /// Flows that have begun since the last call, as frames.
    pub(super) fn take(&self) -> Vec<Urgent> {
        let Some(heard) = self.0.heard.get() else {
            return Vec::new();
        };
        // Every call leaves it whole.
        let mut heard = heard.lock().unwrap_or_else(PoisonError::into_inner);
        let Found { free, bound } = heard.news.take();
        let (kept, unserved) = heard.home.keep(&bound);
        heard.bound.0 += bound.len() as u64;
        heard.bound.1 += unserved;
        let free = frames(&free).into_iter().map(Urgent::Flows);
        let bound = bound_frames(&kept).into_iter().map(Urgent::Bound);
        let frames: Vec<Urgent> = free.chain(bound).collect();
        self.told().extend(frames.iter().cloned());
        frames
    }

    /// What was taken before, for a new link.
    pub(super) fn again(&self) -> Vec<Urgent> {
        self.told().clone()
    }

    /// How many of them were bound, and how many of these are not served.
    pub(super) fn bound(&self) -> (u64, u64) {
        let heard = self.0.heard.get();
        heard.map_or((0, 0), |heard| {
            heard.lock().unwrap_or_else(PoisonError::into_inner).bound
        })
    }

    fn told(&self) -> std::sync::MutexGuard<'_, Vec<Urgent>> {
        self.0.frames.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn frames(flows: &[Flow]) -> Vec<Flows> {
    let parts = flows.chunks(Flows::MAX);
    parts
        .map(|part| Flows(Bytes::from(Flow::encode_all(part))))
        .collect()
}

fn bound_frames(flows: &[BoundFlow]) -> Vec<Bound> {
    let parts = flows.chunks(Bound::MAX);
    parts
        .map(|part| Bound(Bytes::from(BoundFlow::encode_all(part))))
        .collect()
}

/// Source: listens, then sends what there is, so that no flow is in neither. What fails is told, and leaves the migration alone.
pub(super) async fn send(
    parts: Option<Arc<PodResources>>,
    control: Option<ControlSender>,
    news: NewFlows,
    version: u16,
) -> Result<Input, String> {
    let (mut bound, mut unserved) = (0, 0);
    if let (Some(parts), Some(control)) = (parts, control) {
        match listen_and_read(&parts.port, &news, version).await {
            Ok(found) => {
                (bound, unserved) = (found.bound, found.unserved);
                for frame in frames(&found.free) {
                    // A lost link is reported by its reader.
                    let _ = control.send(frame).await;
                }
                for frame in bound_frames(&found.told) {
                    let _ = control.send(frame).await;
                }
            }
            Err(reason) => tracing::warn!(
                pod = parts.spec.name,
                reason,
                "its entries of connection tracking do not move"
            ),
        }
    }
    Ok(Input::FlowsSent { bound, unserved })
}

/// What there is at the freeze.
struct Read {
    free: Vec<Flow>,
    /// Flows that this node, or one before it, goes on translating.
    told: Vec<BoundFlow>,
    bound: u64,
    unserved: u64,
}

async fn listen_and_read(port: &Port, news: &NewFlows, version: u16) -> Result<Read, String> {
    let told = |error| chain(&error);
    let home = AtHome(match version >= VERSION_BOUND {
        true => Some(port.keeper().await.map_err(told)?),
        false => None,
    });
    if let Some(opened) = port.flow_news().await.map_err(told)? {
        // Once: a guest is stopped once in a run.
        let _ = news.0.heard.set(Mutex::new(Heard {
            news: opened,
            home: home.clone(),
            bound: (0, 0),
        }));
    }
    let Found { free, bound } = port.flows().await.map_err(told)?;
    let elsewhere = port.flows_elsewhere();
    let count = (bound.len() + elsewhere.len()) as u64;
    let (mut kept, mut unserved) = home.keep(&bound);
    match home.0 {
        Some(_) => kept.extend(elsewhere),
        None => unserved += elsewhere.len() as u64,
    }
    if unserved > 0 {
        tracing::warn!(
            flows = unserved,
            reason = home.problem(),
            "flows that this node translates break when the pod leaves"
        );
    }
    Ok(Read {
        free,
        told: kept,
        bound: count,
        unserved,
    })
}

/// Destination: makes entries of what came in a frame. What the kernel refuses is counted.
///
/// # Errors
/// The frame holds no flows of this pod.
pub(super) async fn take(port: &Port, frame: &Flows, known: Known) -> Result<(), String> {
    let flows = port.read_flows(&frame.0).map_err(|error| chain(&error))?;
    if let Err(error) = port.take_flows(flows, known).await {
        tracing::warn!(
            error = chain(&error),
            "entries of connection tracking are not taken"
        );
    }
    Ok(())
}

/// Destination: leads the flows that came in a frame back to the nodes that translate them. What cannot be is counted.
///
/// # Errors
/// The frame holds no flows of this pod.
pub(super) async fn take_bound(port: &Port, frame: &Bound) -> Result<(), String> {
    let bound = port.read_bound(&frame.0).map_err(|error| chain(&error))?;
    if let Err(error) = port.lead_bound(&bound).await {
        tracing::warn!(
            error = chain(&error),
            "flows that another node translates are not led there"
        );
    }
    Ok(())
}

impl DestinationRun {
    /// Begins to make entries; those of frames that came before are made before.
    pub(super) fn take_flows(&mut self, frame: Flows) {
        if let Some(port) = self.port() {
            self.take_next(async move { take(&port, &frame, Known::Update).await });
        }
    }

    /// Begins to lead bound flows back.
    pub(super) fn take_bound(&mut self, frame: Bound) {
        if let Some(port) = self.port() {
            self.take_next(async move { take_bound(&port, &frame).await });
        }
    }

    // Without a port nothing is taken: the guest stops only when this node's VM, and with it the port, is there, so the peer is none of ours.
    fn take_next(&mut self, take: impl Future<Output = Result<(), String>> + Send + 'static) {
        let inputs = self.runner.inputs.clone();
        let before = self.taking.take();
        self.taking = Some(tokio::spawn(async move {
            if let Some(before) = before {
                // A panic in it has been reported.
                let _ = before.await;
            }
            if let Err(reason) = take.await {
                // The machine may be done.
                let _ = inputs.send(DestinationInput::Failed { reason });
            }
        }));
    }

    /// Finds out which way bound flows will take, before the freeze is short of time.
    pub(super) fn expect_bound(&self, port: &Port) {
        if self.version < VERSION_BOUND {
            return;
        }
        let node = &self.runner.node;
        // From a node that is none of the `peers` a pod can come, but nothing can be led back to it.
        if let Some(source) = peer_addr(node, self.machine.source()) {
            let nodes = node
                .config
                .peers
                .values()
                .map(|addr| addr.ip().to_canonical());
            port.comes_from(source.ip(), nodes.collect());
        }
    }

    /// Waits until what came is in the kernel.
    pub(super) async fn flows_taken(&mut self) {
        if let Some(taking) = self.taking.take()
            && timeout(TAKES_WITHIN, taking).await.is_err()
        {
            tracing::warn!("the kernel takes entries of connection tracking too slowly");
        }
    }

    /// Tells the source what became of its flows.
    pub(super) async fn tell_flows(&mut self) {
        let port = self.port();
        if self.version >= VERSION_FLOWS {
            let taken = port.as_ref().map(Port::taken_flows).unwrap_or_default();
            self.runner
                .send(FlowsTaken {
                    moved: taken.moved,
                    failed: taken.failed,
                    untracked: taken.untracked,
                })
                .await;
        }
        if self.version >= VERSION_BOUND {
            let led = port.as_ref().map(Port::led_flows).unwrap_or_default();
            self.runner
                .send(BoundTaken {
                    served: led.served,
                    unserved: led.unserved,
                })
                .await;
        }
    }
}

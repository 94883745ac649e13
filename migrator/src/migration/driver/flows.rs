//! Entries of connection tracking, which move with the pod: over the control connection while the guest stands still, and over the urgent one in
//! front of the first packet of a flow that begins later.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::time::timeout;

use super::destination::Run as DestinationRun;
use crate::api::error::chain;
use crate::migration::source::Input;
use crate::network::Port;
use crate::network::conntrack::{Flow, FlowNews, Flows as Found, Known};
use crate::pods::PodResources;
use crate::wire::control::ControlSender;
use crate::wire::message::{Flows, FlowsTaken};
use crate::wire::preamble::VERSION_FLOWS;

/// How long the grant waits for entries that the kernel is being told. It takes some microseconds for each.
const TAKES_WITHIN: Duration = Duration::from_secs(1);

/// News of flows that begin, once somebody listens. Outlives a link.
#[derive(Clone, Debug, Default)]
pub(super) struct NewFlows(Arc<Told>);

#[derive(Debug, Default)]
struct Told {
    news: OnceLock<Mutex<FlowNews>>,
    /// What has been given out: a link that is lost may have lost it.
    frames: Mutex<Vec<Flows>>,
}

impl NewFlows {
    /// Flows that have begun since the last call, as frames.
    pub(super) fn take(&self) -> Vec<Flows> {
        let Some(news) = self.0.news.get() else {
            return Vec::new();
        };
        // Every call leaves it whole.
        let mut news = news.lock().unwrap_or_else(PoisonError::into_inner);
        let frames = frames(&news.take());
        self.told().extend(frames.iter().cloned());
        frames
    }

    /// What was taken before, for a new link.
    pub(super) fn again(&self) -> Vec<Flows> {
        self.told().clone()
    }

    fn told(&self) -> std::sync::MutexGuard<'_, Vec<Flows>> {
        self.0.frames.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn frames(flows: &[Flow]) -> Vec<Flows> {
    let parts = flows.chunks(Flows::MAX);
    parts
        .map(|part| Flows(Bytes::from(Flow::encode_all(part))))
        .collect()
}

/// Source: listens, then sends what there is, so that no flow is in neither. What fails is told, and leaves the migration alone.
pub(super) async fn send(
    parts: Option<Arc<PodResources>>,
    control: Option<ControlSender>,
    news: NewFlows,
) -> Result<Input, String> {
    let mut bound = 0;
    if let (Some(parts), Some(control)) = (parts, control) {
        match listen_and_read(&parts.port, &news).await {
            Ok(found) => {
                bound = found.bound.len() as u64;
                for frame in frames(&found.free) {
                    // A lost link is reported by its reader.
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
    Ok(Input::FlowsSent { bound })
}

async fn listen_and_read(port: &Port, news: &NewFlows) -> Result<Found, String> {
    let told = |error| chain(&error);
    if let Some(opened) = port.flow_news().await.map_err(told)? {
        // Once: a guest is stopped once in a run.
        let _ = news.0.news.set(Mutex::new(opened));
    }
    port.flows().await.map_err(told)
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

impl DestinationRun {
    /// Begins to make entries; those of frames that came before are made before.
    pub(super) fn take_flows(&mut self, frame: Flows) {
        let (Some(port), inputs) = (self.port(), self.runner.inputs.clone()) else {
            // The guest stops only when this node's VM, and with it the port, is there: the peer is none of ours.
            return;
        };
        let before = self.taking.take();
        self.taking = Some(tokio::spawn(async move {
            if let Some(before) = before {
                // A panic in it has been reported.
                let _ = before.await;
            }
            if let Err(reason) = take(&port, &frame, Known::Update).await {
                // The machine may be done.
                let _ = inputs.send(crate::migration::destination::Input::Failed { reason });
            }
        }));
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
        if self.version < VERSION_FLOWS {
            return;
        }
        let taken = self
            .port()
            .map(|port| port.taken_flows())
            .unwrap_or_default();
        self.runner
            .send(FlowsTaken {
                moved: taken.moved,
                failed: taken.failed,
                untracked: taken.untracked,
            })
            .await;
    }
}

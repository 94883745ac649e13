//! The source's steps, one function each. What they return is what the machine is told.

use std::io;
use std::sync::Arc;
use std::thread::available_parallelism;
use std::time::{Duration, SystemTime};

use tokio::time::{Instant, sleep, sleep_until};
use vm_runtime::agent_client::{AgentClient, AgentState};
use vm_runtime::spec::DiskSpec;
use vm_runtime::units::{Epoch, PageIndex};
use vm_runtime::vm::{RunState, Vm};

use super::clock::unix_us;
use super::device_state;
use super::handoff::{Handoff, LOG_TAIL};
use super::report::Books;
use super::source_disks::Disks;
use super::source_throttle::{Slowed, at_full_speed};
use super::steps::{blocking, wire_ledger};
use crate::api::error::chain;
use crate::daemon::node::Node;
use crate::image::Digest;
use crate::memory::send::PageSender;
use crate::memory::track::{TrackError, Tracking};
use crate::memory::verify::hash_all;
use crate::migration::source::{Input, Rollback};
use crate::network::{Port, PortError, Stage};
use crate::pods::{MigrationEnd, PodHandle, PodResources};
use crate::volumes::remove_moved;
use crate::wire::bulk::Data;
use crate::wire::conn::Reader;
use crate::wire::control::ControlSender;
use crate::wire::message::{HashesEnd, ImageWant, Ledger, PageHashes};

/// How long the guest's agent gets to acknowledge what it was sent. What is left travels with the pod.
const AGENT_LIMIT: Duration = Duration::from_millis(200);
/// How long a running guest gets to empty its TAP queue. Its frames wait in the park meanwhile.
const DRAIN_LIMIT: Duration = Duration::from_millis(100);
/// Least time between two scans: what passes between the decision to freeze and the stop.
const SCAN_LEAST: Duration = Duration::from_millis(10);
/// The announcements end 450 ms after the resume; until then neighbours may still learn.
const FORWARD_LEAST: Duration = Duration::from_millis(600);
/// Forwarding ends when nothing has needed it for this long.
const FORWARD_QUIET: Duration = Duration::from_millis(200);
/// Forwarding ends at the latest after this long, as the sum of what bridges and neighbours take to learn.
const FORWARD_MOST: Duration = Duration::from_secs(10);

/// How long images of a pod that has left are kept for its new node.
const KEPT_FOR_PEERS: Duration = Duration::from_secs(3600);
/// How long a chunk that the destination wants may take to come here.
const CHUNK_WITHIN: Duration = Duration::from_secs(30);

type Step = Result<Input, String>;
type Parts = Option<Arc<PodResources>>;
type Sender = Option<Arc<PageSender>>;

/// The data connections. The destination never writes to them; the halves that read keep them open.
#[derive(Debug)]
pub(super) struct Lanes {
    pub(super) sender: Arc<PageSender>,
    pub(super) _readers: Vec<Reader<Data>>,
}

fn need<T>(part: Option<T>, what: &str) -> Result<T, String> {
    part.ok_or_else(|| format!("{what} is gone"))
}

pub(super) async fn send_images(
    node: Arc<Node>,
    parts: Parts,
    sender: Sender,
    wants: Vec<ImageWant>,
) -> Step {
    let (parts, sender) = (need(parts, "the pod")?, need(sender, "the link")?);
    let mut turn = 0;
    for want in wants {
        let disk = parts
            .vm_spec
            .disks
            .get(want.image as usize)
            .ok_or_else(|| {
                format!(
                    "the destination wants image {}, which was not offered",
                    want.image
                )
            })?;
        let digest: Digest = disk.image_digest.parse().map_err(|error| chain(&error))?;
        for index in want.chunks {
            let (images, shutdown) = (Arc::clone(&node.images), node.shutdown.clone());
            let chunk = blocking(move || {
                let record = images.record(&digest).map_err(|error| chain(&error))?;
                // It may not be here itself yet.
                let until = std::time::Instant::now() + CHUNK_WITHIN;
                let over = || shutdown.is_cancelled() || std::time::Instant::now() >= until;
                let chunk = images.chunks().wait(&record, index, &over);
                chunk.map_err(|_| {
                    format!(
                        "chunk {index} of image `{}` is nowhere to be had",
                        record.name
                    )
                })
            })
            .await?;
            let content = Digest::of(&chunk);
            sender
                .chunk(turn, content.0, chunk)
                .await
                .map_err(|error| chain(&error))?;
            turn += 1;
        }
    }
    Ok(Input::ImagesSent)
}

pub(super) async fn start_tracking(parts: Parts, tracking: Tracking) -> Step {
    let parts = need(parts, "the pod")?;
    blocking(move || tracking.start(&parts.vm).map_err(|error| chain(&error))).await?;
    Ok(Input::TrackingStarted)
}

pub(super) async fn send_round(
    sender: Sender,
    tracking: Tracking,
    disks: Disks,
    round: u32,
) -> Step {
    let sender = need(sender, "the link")?;
    let pages = async {
        let sent = sender.round(round, &tracking.take(), round == 1).await;
        sent.map_err(|error| chain(&error))
    };
    let (sent, blocks) = tokio::try_join!(pages, disks.beside(&sender))?;
    Ok(Input::RoundSent {
        pages: sent.pages + blocks.pages(),
        // As many as its pages have: what is left is predicted in pages, which will be compressed as well.
        bytes: sent.bytes + sent.saved + blocks.bytes(),
    })
}

async fn scan_now(tracking: &Tracking) -> Result<(u64, u64), String> {
    let tracking = tracking.clone();
    blocking(move || tracking.scan().map_err(|error: TrackError| chain(&error))).await
}

/// Not before [`SCAN_LEAST`] has passed since the scan before: a guest that writes the same few pages over and
/// over looks, in a shorter time, as if it wrote new ones at that rate.
pub(super) async fn scan(tracking: Tracking, disks: Disks) -> Step {
    if let Some(last) = tracking.scanned_at() {
        sleep_until((last + SCAN_LEAST).into()).await;
    }
    let (dirtied, pending) = scan_now(&tracking).await?;
    // A round of disks takes all that is marked: so what is marked is what was written since, and what is left.
    let blocks = disks.pages_left();
    Ok(Input::Scanned {
        dirtied: dirtied + blocks,
        pending: pending + blocks,
    })
}

pub(super) async fn detach_agent(parts: Parts) -> Step {
    let parts = need(parts, "the pod")?;
    let agent = match parts.agent.get() {
        Some(agent) => detach(&parts.spec.name, &agent).await,
        None => None,
    };
    let logs = Arc::clone(&parts.logs);
    let state = blocking(move || {
        let logs = logs.tail(LOG_TAIL).map_err(|error| chain(&error))?;
        Handoff { agent, logs }.encode()
    })
    .await?;
    Ok(Input::AgentDetached { state })
}

/// `None`: the link to the agent begins anew at the destination.
async fn detach(pod: &str, agent: &AgentClient) -> Option<AgentState> {
    if !agent.detach(AGENT_LIMIT).await {
        tracing::info!(
            pod,
            "the agent has not acknowledged everything: the rest travels"
        );
    }
    agent
        .state()
        .await
        .inspect_err(|error| {
            tracing::warn!(
                pod,
                error = chain(error),
                "the agent's link does not travel"
            )
        })
        .ok()
}

pub(super) async fn drain_tap(parts: Parts) -> Step {
    let parts = need(parts, "the pod")?;
    if !parts.port.drain_tap(DRAIN_LIMIT).await {
        tracing::info!(
            pod = parts.spec.name,
            "the guest does not empty its queue: the rest travels"
        );
    }
    Ok(Input::Drained)
}

pub(super) async fn stop_vm(parts: Parts, slowed: Slowed) -> Step {
    let parts = need(parts, "the pod")?;
    at_full_speed(&slowed).await?;
    let at_unix_us = unix_us();
    parts.vm.stop().await.map_err(|error| chain(&error))?;
    if let Some(agent) = parts.agent.get() {
        takes_no_more(&parts.vm, &agent).await?;
    }
    Ok(Input::Stopped { at_unix_us })
}

/// Waits until the VMM of a stopped guest takes nothing more of what its agent was sent, which goes into guest memory. Its main loop does that, and
/// answers us as well: between two answers it has looked at everything once.
async fn takes_no_more(vm: &Vm, agent: &AgentClient) -> Result<(), String> {
    // An agent that is gone has nothing more to get.
    let mut left = agent.unread().await.unwrap_or(0);
    let mut same = 0;
    while left > 0 && same < 2 {
        vm.query_status().await.map_err(|error| chain(&error))?;
        let now = agent.unread().await.unwrap_or(0);
        same = if now == left { same + 1 } else { 0 };
        left = now;
    }
    Ok(())
}

pub(super) async fn read_residue(parts: Parts) -> Step {
    let parts = need(parts, "the pod")?;
    parts.port.residue().await.map_err(|error| chain(&error))?;
    Ok(Input::ResidueRead)
}

pub(super) async fn send_last_pages(sender: Sender, tracking: Tracking, round: u32) -> Step {
    let sender = need(sender, "the link")?;
    sender.lift_limit();
    scan_now(&tracking).await?;
    let sent = sender
        .round(round, &tracking.take(), false)
        .await
        .map_err(|error| chain(&error))?;
    Ok(Input::LastPagesSent { pages: sent.pages })
}

pub(super) async fn save_state(parts: Parts, control: Option<ControlSender>) -> Step {
    let (parts, control) = (need(parts, "the pod")?, need(control, "the link")?);
    device_state::save(&parts.vm, &control)
        .await
        .map_err(|error| chain(&error))?;
    Ok(Input::StateSent)
}

pub(super) async fn send_hashes(sender: Sender, control: Option<ControlSender>) -> Step {
    let (sender, control) = (need(sender, "the link")?, need(control, "the link")?);

    let hashes = blocking(move || {
        // The other half of the machine belongs to the last pages and the device state.
        let threads = available_parallelism().map_or(1, |cpus| cpus.get().div_ceil(2));
        hash_all(sender.reader(), threads).map_err(|error: io::Error| chain(&error))
    })
    .await?;

    let lost = |error| chain(&error);
    for (index, piece) in hashes.chunks(PageHashes::MAX_PAGES).enumerate() {
        let first = PageIndex((index * PageHashes::MAX_PAGES) as u64);
        let message = PageHashes::new(first, piece);
        control.send(message).await.map_err(lost)?;
    }
    let pages = hashes.len() as u64;
    control.send(HashesEnd { pages }).await.map_err(lost)?;

    Ok(Input::HashesSent)
}

/// Undoes what is marked. Returns what could not be undone.
pub(super) async fn roll_back(
    parts: Option<&PodResources>,
    tracking: &Tracking,
    what: Rollback,
) -> Vec<String> {
    let mut problems = Vec::new();
    let Some(parts) = parts else { return problems };
    // Before the guest runs: where that fails, somebody else may write, and it must not.
    let back = take_back(parts).await;
    let may_run = back.is_ok();
    problems.extend(back.err());
    if what.stop_tracking {
        let tracking = tracking.clone();
        let stopped = blocking(move || {
            tracking.stop();
            Ok(())
        });
        problems.extend(stopped.await.err());
    }
    if what.release_hold
        && let Err(error) = end_hold(&parts.port).await
    {
        problems.push(chain(&error));
    }
    // After the gate: what the guest sends on its first instruction must go out.
    if what.resume_vm && may_run {
        problems.extend(resume(parts).await.err());
    }
    if what.attach_agent
        && let Some(agent) = parts.agent.get()
        && let Err(error) = agent.reattach()
    {
        problems.push(chain(&error));
    }
    problems
}

/// Takes shared disks back that were let go for a grant that was not sent, or was not taken.
async fn take_back(parts: &PodResources) -> Result<(), String> {
    let disks = parts.disks.clone();
    if disks.iter().all(|disk| disk.shared().is_none()) {
        return Ok(());
    }
    blocking(move || {
        let mut disks = disks.iter();
        disks.try_for_each(|disk| disk.take_back().map_err(|error| chain(&error)))
    })
    .await
    .inspect_err(|reason| {
        tracing::error!(
            pod = parts.spec.name,
            reason,
            "its guest stands still: its shared disks are not to be had back"
        );
    })
}

/// The step that began the hold is cancelled, and may have been so before the port came to it.
async fn end_hold(port: &Port) -> Result<(), PortError> {
    match port.stage_by_now().await? {
        Stage::Holding => port.rollback().await,
        _ => Ok(()),
    }
}

async fn resume(parts: &PodResources) -> Result<(), String> {
    let told = |error| chain(&error);
    // Without a save under way this does nothing.
    parts.vm.abort_save().await.map_err(told)?;
    match parts.vm.query_status().await.map_err(told)? {
        RunState::Running => Ok(()),
        RunState::Paused
        | RunState::Saved
        | RunState::Saving
        | RunState::Incoming
        | RunState::Other(_) => parts.vm.cont().await.map_err(told),
    }
}

/// Waits until everything parked has been acknowledged and nothing needs the old way any more.
pub(super) async fn forwarded(parts: Arc<PodResources>) -> Step {
    let began = Instant::now();
    let mut last = (began, u64::MAX);
    while began.elapsed() < FORWARD_MOST {
        let Ok(ledger) = parts.port.ledger().await else {
            break;
        };
        // What goes out of the uplink finds its way without this port as well.
        let forwarded = ledger.forwarded - ledger.reasons.sent_out;
        if ledger.held > 0 || forwarded != last.1 {
            last = (Instant::now(), forwarded);
        }
        if began.elapsed() >= FORWARD_LEAST && last.0.elapsed() >= FORWARD_QUIET {
            break;
        }
        sleep(Duration::from_millis(20)).await;
    }
    Ok(Input::Forwarded)
}

pub(super) async fn release(
    parts: Parts,
    pod: PodHandle,
    to: String,
    books: Books,
    node: Arc<Node>,
    granted: Epoch,
) -> Step {
    let mut ledger = Ledger::default();
    if let Some(parts) = parts {
        if let Some(agent) = parts.agent.get() {
            // Whoever waits for a command in the guest is told that it is gone from here.
            agent.close();
        }
        match parts.disks.iter().all(|disk| disk.served().is_some()) {
            true => parts.vm.kill().await,
            // It has images of Ceph open: one that is killed keeps their locks for half a minute.
            false => parts.vm.quit().await,
        }
        .map_err(|error| chain(&error))?;
        parts.disks.iter().for_each(|disk| disk.close());
        let booked = parts.port.release().await.map_err(|error| chain(&error))?;
        ledger = wire_ledger(&booked);
        // Once: this step runs once.
        let _ = books.set(booked);
    }
    // The destination has them, durably. Before the folder goes: a service that is killed in between finds the pod, and does it again.
    let (spec, vm) = (pod.spec().clone(), pod.vm_spec().clone());
    let destination = to.clone();
    blocking(move || {
        keep_images(&node, &vm.disks);
        remove_moved(&node.volumes, &spec, &vm);
        node.storage.hand_over_all(&vm, &destination, granted);
        Ok(())
    })
    .await?;
    let end = MigrationEnd::MovedAway { to };
    if let Err(error) = pod.end_migration(end).await {
        tracing::error!(
            pod = pod.name(),
            error = chain(&error),
            "files of the pod are left behind"
        );
    }
    Ok(Input::Released { ledger })
}

/// The destination may still lack some of the images: they stay for a while, whoever clears away.
fn keep_images(node: &Node, disks: &[DiskSpec]) {
    for disk in disks {
        let digest = disk.image_digest.parse::<Digest>();
        let record = digest
            .ok()
            .and_then(|digest| node.images.record(&digest).ok());
        if let Some(record) = record
            && let Err(error) =
                node.images
                    .lease_at_least(&record, SystemTime::now(), KEPT_FOR_PEERS)
        {
            tracing::warn!(
                image = record.name,
                error = chain(&error),
                "the image has no lease"
            );
        }
    }
}

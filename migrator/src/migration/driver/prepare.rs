//! The destination's steps, one function each. What they return is what the machine is told.

use std::sync::{Arc, OnceLock, PoisonError};

use bytes::Bytes;
use tokio::io::{AsyncWriteExt, DuplexStream};
use tokio::sync::{Mutex, mpsc};
use tokio_util::sync::CancellationToken;
use vm_runtime::units::{Epoch, PageIndex};
use vm_runtime::vm::{Vm, VmExit};

use std::time::Duration;

use super::checks::{self, Facts};
use super::clock::unix_us;
use super::depart::end_pod;
use super::destination_disks::{Filling, fill};
use super::handoff::Handoff;
use super::images::{self, Images};
use super::shared_disks;
use super::steps::blocking;
use crate::api::error::chain;
use crate::daemon::node::Node;
use crate::image::Incoming;
use crate::memory::postcopy::Pager;
use crate::memory::receive::Target;
use crate::memory::verify::{PageHashes, ZERO_HASH};
use crate::migration::destination::Input;
use crate::network::Port;
use crate::pods::incoming::IncomingPod;
use crate::pods::plan::VMM_OVERHEAD;
use crate::pods::{MigrationEnd, PodError, PodHandle, PodRecord};
use crate::wire::lists::ImageList;
use crate::wire::message::{Handover, ImageWant, Offer, Refuse, RefuseCode};

/// How long the end of a VMM may take to show, after its monitor has gone silent.
const EXIT_SHOWS_WITHIN: Duration = Duration::from_millis(500);
/// How long a resumed guest is left alone before its agent is spoken to.
const AFTER_RESUME: Duration = Duration::from_millis(250);

/// A pod that is being made ready.
pub(super) type Prepared = IncomingPod;
type Shared = Mutex<Option<Prepared>>;
type Step = Result<Input, String>;

/// A chunk of an image, as it came.
#[derive(Debug)]
pub(super) struct Chunk {
    pub(super) digest: [u8; 32],
    pub(super) raw: Bytes,
}

fn refuse(code: RefuseCode, reason: String) -> Refuse {
    Refuse { code, reason }
}

/// Looks whether this node can take the pod. If it can, its name and addresses are taken from here on.
pub(super) async fn check(
    node: &Arc<Node>,
    offer: &Offer,
    lists: Vec<ImageList>,
) -> Result<(Prepared, Images, Vec<ImageWant>), Refuse> {
    let internal = |reason| refuse(RefuseCode::Internal, reason);
    checks::check(
        offer,
        &Facts {
            node: node.name().to_owned(),
            qemu_version: super::offer::version(node.qemu.version),
            machine_types: node.qemu.machine_types.clone(),
            cpu: vm_runtime::spec::CPU.to_owned(),
            accel: node.accel,
            kernel_sha256: node.guest.kernel_sha256.clone(),
            initramfs_sha256: node.guest.initramfs_sha256.clone(),
            memory_available: crate::doctor::available_memory(),
            huge_available: vm_runtime::memory::huge_pages_available(),
            vmm_overhead: VMM_OVERHEAD,
            disk_available: crate::doctor::available_disk(&node.config.state_dir),
            missing_features: crate::doctor::missing_kernel_features(),
            routed: checks::routed(node),
        },
    )?;
    shared_disks::check(node, offer).await?;
    let record: PodRecord = serde_json::from_str(&offer.record)
        .map_err(|error| internal(format!("the pod's record cannot be read: {error}")))?;
    let pod = IncomingPod::prepare(node, offer.pod.clone(), offer.vm.clone(), record)
        .await
        .map_err(|error| {
            refuse(
                code_of(&error),
                format!("{}: {}", node.name(), chain(&error)),
            )
        })?;
    let mut pod = pod;
    let checked = match pod.make_disks().await {
        Ok(()) => images::take_in(node, offer, lists)
            .await
            .map_err(|reason| (RefuseCode::Image, reason)),
        Err(error) => Err((RefuseCode::Disk, chain(&error))),
    };
    match checked {
        Ok((images, wants)) => Ok((pod, images, wants)),
        Err((code, reason)) => {
            if let Err(error) = pod.discard().await {
                tracing::error!(
                    error = chain(&error),
                    "something of a refused pod is left behind"
                );
            }
            Err(refuse(code, format!("{}: {reason}", node.name())))
        }
    }
}

fn code_of(error: &PodError) -> RefuseCode {
    match error {
        PodError::NameTaken(_) => RefuseCode::NameTaken,
        PodError::AddressTaken { .. } => RefuseCode::AddressTaken,
        PodError::Memory { .. } | PodError::HugePages { .. } => RefuseCode::Memory,
        _ => RefuseCode::Internal,
    }
}

/// Takes chunks until every image that must be complete is.
pub(super) async fn receive_images(images: Vec<Incoming>, chunks: mpsc::Receiver<Chunk>) -> Step {
    Images::receive(images, chunks).await?;
    Ok(Input::ImagesReceived)
}

/// Makes the guest's memory. From here on pages are placed.
pub(super) async fn make_memory(
    prepared: &Shared,
    target: &OnceLock<Target>,
    disks: &Filling,
    verify: bool,
) -> Result<(), String> {
    let mut prepared = prepared.lock().await;
    let pod = prepared.as_mut().ok_or("the pod is gone")?;
    let memory = pod.make_memory().map_err(|error| chain(&error))?;
    let hashes = verify.then(|| Arc::new(PageHashes::new(memory.pages())));
    let sink = fill(pod.disks(), disks);
    if target.set(Target::new(memory, hashes, sink)).is_err() {
        return Err("the guest's memory was made twice".to_owned());
    }
    Ok(())
}

/// What [`build`] makes.
pub(super) type Built = Arc<std::sync::Mutex<Option<(Arc<Vm>, Port)>>>;

/// Makes gate and VM, while pages are placed.
pub(super) async fn build(prepared: Arc<Shared>, built: Built) -> Step {
    let mut prepared = prepared.lock().await;
    let pod = prepared.as_mut().ok_or("the pod is gone")?;
    let made = pod.build().await.map_err(|error| chain(&error))?;
    *built.lock().unwrap_or_else(PoisonError::into_inner) = Some(made);
    Ok(Input::VmPrepared)
}

/// Hashes what has been placed so far, if the migration verifies.
pub(super) async fn hash_placed(target: &Arc<OnceLock<Target>>) {
    let target = Arc::clone(target);
    let hashed = blocking(move || match target.get() {
        Some(Target {
            memory,
            hashes: Some(hashes),
            ..
        }) => hashes.refresh(memory).map_err(|error| error.to_string()),
        Some(Target { hashes: None, .. }) | None => Ok(0),
    });
    if let Err(error) = hashed.await {
        // The verification reads again, and reports it.
        tracing::warn!(error, "the guest's memory cannot be read");
    }
}

pub(super) async fn verify(
    target: Arc<OnceLock<Target>>,
    theirs: Vec<(PageIndex, Vec<u64>)>,
) -> Step {
    blocking(move || {
        let Some(Target {
            memory,
            hashes: Some(hashes),
            ..
        }) = target.get()
        else {
            return Err("there is nothing to verify".to_owned());
        };
        let pages: u64 = theirs.iter().map(|(_, piece)| piece.len() as u64).sum();
        if pages != memory.pages() {
            return Err(format!(
                "the source hashed {pages} pages of {}",
                memory.pages()
            ));
        }
        // What is missing is compared when it comes, and from before it is known what that is: devices that load their state have
        // pages fetched meanwhile.
        let pager = target.get().and_then(|target| target.pager.get());
        let missing = pager.map_or_else(Vec::new, |pager| {
            pager.expect(in_order(&theirs));
            pager.missing()
        });
        let is_missing = |page: &PageIndex| {
            let word = missing.get((page.0 / 64) as usize);
            word.is_some_and(|word| word >> (page.0 % 64) & 1 == 1)
        };
        hashes
            .finish(memory)
            .map_err(|error| format!("the guest's memory cannot be read: {error}"))?;
        let differ: Vec<PageIndex> = theirs
            .iter()
            .flat_map(|(first, piece)| hashes.compare(*first, piece))
            .filter(|page| !is_missing(page))
            .collect();
        if let Some(page) = differ.first() {
            let theirs = theirs.iter().find_map(|(first, piece)| {
                let at = page.0.checked_sub(first.0)?;
                piece.get(usize::try_from(at).ok()?)
            });
            tracing::error!(
                page = page.0,
                count = differ.len(),
                zero_there = theirs == Some(&ZERO_HASH),
                zero_here = hashes.is_zero(*page),
                "pages differ"
            );
        }
        Ok(Input::Verified {
            pages,
            mismatched: differ.len() as u64,
        })
    })
    .await
}

/// The hashes of all pages, of which there is one each.
fn in_order(pieces: &[(PageIndex, Vec<u64>)]) -> Vec<u64> {
    let mut pieces: Vec<_> = pieces.iter().collect();
    pieces.sort_by_key(|(first, _)| first.0);
    pieces
        .into_iter()
        .flat_map(|(_, hashes)| hashes)
        .copied()
        .collect()
}

/// Begun before the freeze, so that the VMM listens when the state comes: see [`feed`].
pub(super) async fn load_state(vm: Arc<Vm>, mut source: DuplexStream) -> Step {
    let Err(error) = vm.load_state(&mut source).await else {
        return Ok(Input::StateLoaded);
    };
    // A VMM that has ended says more by how it ended than by what it left undone.
    match tokio::time::timeout(EXIT_SHOWS_WITHIN, vm.wait_exit()).await {
        Ok(Ok(exit)) => Err(died(&exit)),
        Ok(Err(_)) | Err(_) => Err(chain(&error)),
    }
}

/// How a VMM ended, for people.
pub(super) fn died(exit: &VmExit) -> String {
    let reason = exit.reason.as_deref().or(exit.status.as_deref());
    format!("QEMU ended ({})", reason.unwrap_or("no reason is known"))
}

/// Gives the state to [`load_state`], as it comes.
pub(super) async fn feed(mut sink: DuplexStream, mut state: mpsc::UnboundedReceiver<Bytes>) {
    while let Some(piece) = state.recv().await {
        // A loader that fails closes its end, and reports why.
        if sink.write_all(&piece).await.is_err() {
            return;
        }
    }
    let _ = sink.shutdown().await;
}

pub(super) async fn resume(vm: Option<Arc<Vm>>) -> Step {
    let vm = vm.ok_or("the VM is gone")?;
    // Not asked first whether it runs: one that does takes it as well, and QEMU reads its commands byte by byte (3 to 4 us each).
    vm.cont().await.map_err(|error| chain(&error))?;
    let at_unix_us = unix_us();
    Ok(Input::Resumed {
        at_unix_us,
        steps: Vec::new(),
    })
}

/// Makes the resumed pod one of this node's: its logs, its agent, its clock. With a pager it counts as migrating.
pub(super) async fn adopt(
    prepared: &Shared,
    handover: Option<Handover>,
    epoch: Epoch,
    pager: &Option<Arc<Pager>>,
    migration: String,
) -> Option<PodHandle> {
    let pod = prepared.lock().await.take()?;
    let name = pod.spec().name.clone();
    let state = handover.and_then(|handover| {
        Handoff::decode(&handover.agent)
            .inspect_err(|reason| tracing::error!(pod = name, reason, "its agent is asked anew"))
            .ok()?
            .agent
    });
    // The guest's first moments, when an emulator has everything to translate anew, belong to its own work.
    tokio::time::sleep(AFTER_RESUME).await;
    let migration = pager.as_ref().map(|_| migration);
    pod.adopt(epoch, state, migration)
        .inspect_err(|pod| tracing::error!(pod = pod.spec().name, "resumed before it was built"))
        .ok()
}

/// The pod may be moved on, or stopped, once its guest lacks no page.
pub(super) async fn kept_when_whole(
    pod: &PodHandle,
    pager: &Pager,
    epoch: Epoch,
    shutdown: &CancellationToken,
) {
    tokio::select! {
        () = pager.ended() => end_pod(pod, MigrationEnd::Kept { epoch }).await,
        // The next service finds it, and what it lacks.
        () = shutdown.cancelled() => {}
    }
}

/// Removes what was made for a pod that does not come. Returns what could not be removed.
pub(super) async fn discard(prepared: &Shared) -> Option<String> {
    let pod = prepared.lock().await.take()?;
    pod.discard().await.err().map(|error| chain(&error))
}

//! A guest that gives memory back: the host gets it, and the destination of a move does too.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, ensure};
use migrator::memory::track::{Holes, Tracking};
use vm_runtime::memory::GuestMemory;
use vm_runtime::units::{Bytes, PAGE_SIZE};
use vm_runtime::vm::Vm;
use xtask::process::poll_until;

use crate::guest::{HOG_BYTES, Program};
use crate::lab::{Lab, counts_past, hashes};
use crate::link::Link;

/// The guest tells of free memory two seconds after it became so (`PAGE_REPORTING_DELAY` in Linux), and has to boot.
const SOON: Duration = Duration::from_secs(60);
/// What stays of the memory that was given back: the guest's allocator may keep some of it, in blocks that are too small to be told of.
const KEPT: u64 = HOG_BYTES / 8;

fn data(memory: &GuestMemory) -> Result<u64> {
    let pages: u64 = memory.data_ranges()?.iter().map(|range| range.len()).sum();
    Ok(pages * PAGE_SIZE as u64)
}

/// Waits until the memory holds no more than `limit` bytes of data.
async fn shrinks(memory: &Arc<GuestMemory>, limit: u64) -> Result<()> {
    let watched = Arc::clone(memory);
    let shrunk = tokio::task::spawn_blocking(move || {
        poll_until(SOON, || data(&watched).is_ok_and(|data| data <= limit))
    });
    ensure!(
        shrunk.await?,
        "the memory keeps {} of data, and should have {} at most",
        Bytes(data(memory)?),
        Bytes(limit)
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_that_the_guest_gives_back_is_a_hole_soon_and_is_not_sent() -> Result<()> {
    let lab = Lab::with(Program::Hog).await?;
    let vm = Vm::boot(&lab.spec(), lab.resources("vm", &lab.qemu)?).await?;
    let memory = vm.memory();
    // Taken.
    counts_past(vm.dir(), 0).await?;
    let full = data(&memory)?;
    ensure!(full > HOG_BYTES, "{} of data", Bytes(full));
    // Given back.
    shrinks(&memory, full - HOG_BYTES + KEPT).await?;

    // A first pass now sends little.
    vm.stop().await?;
    let tracking = Tracking::new(memory.pages(), Holes::Walked);
    tracking.start(&vm)?;
    let mut link = Link::new(&memory, GuestMemory::create("destination", memory.len())?)?;
    let sent = link.round(&tracking).await?;
    ensure!(
        sent.bytes <= full - HOG_BYTES + KEPT,
        "{} sent, {} were data when it was full",
        Bytes(sent.bytes),
        Bytes(full)
    );
    ensure!(
        hashes(&memory)? == hashes(&link.destination)?,
        "they differ"
    );
    tracking.stop();
    vm.kill().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_sent_and_then_given_back_is_zero_at_the_destination() -> Result<()> {
    let lab = Lab::with(Program::Hog).await?;
    let vm = Vm::boot(&lab.spec(), lab.resources("vm", &lab.qemu)?).await?;
    let memory = vm.memory();
    counts_past(vm.dir(), 0).await?;
    let tracking = Tracking::new(memory.pages(), Holes::Walked);
    tracking.start(&vm)?;
    let mut link = Link::new(&memory, GuestMemory::create("destination", memory.len())?)?;
    // Everything crosses while the guest has it, and the guest gives it back.
    let full = data(&memory)?;
    link.round(&tracking).await?;
    let came = data(&link.destination)?;
    ensure!(came > HOG_BYTES, "{} of data came", Bytes(came));
    shrinks(&memory, full - HOG_BYTES + KEPT).await?;
    // Rounds go on as they do in a migration, the last one of the stopped guest.
    for _ in 0..3 {
        tracking.scan()?;
        link.round(&tracking).await?;
    }
    vm.stop().await?;
    tracking.scan()?;
    link.round(&tracking).await?;
    tracking.stop();
    let (ours, theirs) = (hashes(&memory)?, hashes(&link.destination)?);
    let differ = ours.iter().zip(&theirs).filter(|(a, b)| a != b).count();
    ensure!(differ == 0, "{differ} pages differ");
    // The destination has got the room back, too.
    let left = data(&link.destination)?;
    ensure!(left <= came - HOG_BYTES + KEPT, "{} of data", Bytes(left));
    vm.kill().await?;
    Ok(())
}

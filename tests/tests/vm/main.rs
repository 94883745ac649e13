//! A real QEMU with a real kernel: boot, track, save, move, roll back, find again.
//!
//! Needs root and `MIGRATOR_GUEST_DIR` (a folder with the guest kernel `vmlinuz`); `cargo xtask
//! test` sets it.
#![allow(missing_docs, unreachable_pub)]

mod balloon;
mod guest;
mod incoming;
mod lab;
mod large_pages;
mod link;
mod succession;
mod throttle;

use std::collections::HashSet;
use std::io;
use std::mem::ManuallyDrop;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use anyhow::bail;
use lab::{Lab, copy, count, counts_past, hashes};
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::oneshot;
use vm_runtime::memory::DirtyTracker;
use vm_runtime::probe::{probe_accel, resolve, try_accel};
use vm_runtime::qemu::QemuBinary;
use vm_runtime::spec::{Accel, AccelChoice};
use vm_runtime::vm::{AttachError, RunState, SpawnError, Vm, VmRecord};

/// Moves a guest as the migration does, checks that nothing differs, and gives back the new VM.
async fn moved(lab: &Lab, from: &Vm, name: &str, qemu: &QemuBinary) -> anyhow::Result<Arc<Vm>> {
    let to = Vm::incoming(&lab.spec(), lab.resources(name, qemu)?).await?;
    assert_eq!(to.query_status().await?, RunState::Incoming);

    // QEMU waits for the state already when the source stops.
    let (sender, receiver) = oneshot::channel::<Vec<u8>>();
    let to = Arc::new(to);
    let loading = tokio::spawn({
        let to = Arc::clone(&to);
        async move {
            let (mut ours, mut theirs) = tokio::io::duplex(1 << 20);
            let feed = async move {
                let state = receiver.await.expect("the state comes");
                ours.write_all(&state).await.expect("it is taken");
            };
            tokio::join!(to.load_state(&mut theirs), feed).0
        }
    });

    let began = Instant::now();
    from.stop().await?;
    let stopped = began.elapsed();
    let last = count(from.dir()).unwrap();
    let before = hashes(&from.memory())?;
    let mut state = Vec::new();
    let saved = from.save_state(&mut state).await?;
    assert_eq!(saved.bytes.0, state.len() as u64);
    assert_eq!(from.query_status().await?, RunState::Saved);
    assert!(
        hashes(&from.memory())? == before,
        "saving wrote to guest memory"
    );

    let pages = copy(&from.memory(), &to.memory())?;
    let loaded = match sender.send(state) {
        Ok(()) => loading.await??,
        Err(_) => bail!("the loading VM did not wait for its state"),
    };
    assert_eq!(to.query_status().await?, RunState::Paused);
    assert!(hashes(&to.memory())? == before, "the memory differs");
    let began = Instant::now();
    to.cont().await?;
    let resumed = began.elapsed();
    eprintln!(
        "stop {stopped:?}, save {:?} ({}), load {:?} ({:?} after the last byte), cont {resumed:?}; {pages} pages",
        saved.took, saved.bytes, loaded.took, loaded.after_last_byte
    );
    counts_past(to.dir(), last + 20).await?;
    assert_eq!(from.query_status().await?, RunState::Saved);
    Ok(to)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_moves_and_counts_on() -> anyhow::Result<()> {
    let lab = Lab::new().await?;
    let first = lab.booted("first").await?;
    let second = moved(&lab, &first, "second", &lab.qemu).await?;
    first.quit().await?;
    // And once more: what was loaded can be saved.
    let third = moved(&lab, &second, "third", &lab.qemu).await?;
    second.quit().await?;
    third.quit().await?;
    let exit = third.wait_exit().await?;
    assert_eq!(exit.reason.as_deref(), Some("host-qmp-quit"));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_moves_between_qemu_versions() -> anyhow::Result<()> {
    let lab = Lab::new().await?;
    let Some(other) = lab.other_qemu().await? else {
        eprintln!("skipped: MIGRATOR_QEMU10_DIR names no second QEMU");
        return Ok(());
    };
    let first = lab.booted("first").await?;
    let second = moved(&lab, &first, "second", &other).await?;
    first.kill().await?;
    let third = moved(&lab, &second, "third", &lab.qemu).await?;
    second.kill().await?;
    third.kill().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dirty_tracking_sees_what_the_guest_writes() -> anyhow::Result<()> {
    let lab = Lab::new().await?;
    let vm = lab.booted("vm").await?;
    let memory = vm.memory();

    // A service that was killed while tracking leaves its registration: starting works again.
    let _killed = ManuallyDrop::new(DirtyTracker::start(vm.uffd(), vm.pid(), &memory)?);
    let began = Instant::now();
    let mut tracker = DirtyTracker::start(vm.uffd(), vm.pid(), &memory)?;
    let started = began.elapsed();

    for _ in 0..3 {
        tracker.stop();
        let began = Instant::now();
        tracker = DirtyTracker::start(vm.uffd(), vm.pid(), &memory)?;
        eprintln!("start again {:?}", began.elapsed());
    }

    let base = hashes(&memory)?;
    let mut seen: HashSet<u64> = tracker
        .scan()?
        .iter()
        .flat_map(|r| r.start.0..r.end.0)
        .collect();
    for _ in 0..3 {
        let now = count(vm.dir()).unwrap();
        counts_past(vm.dir(), now + 2).await?;
        let began = Instant::now();
        let ranges = tracker.scan()?;
        let took = began.elapsed();
        let pages: HashSet<u64> = ranges.iter().flat_map(|r| r.start.0..r.end.0).collect();
        eprintln!(
            "start {started:?}, scan {took:?}: {} pages in {} ranges",
            pages.len(),
            ranges.len()
        );
        assert!(
            pages.len() as u64 >= guest::WRITTEN_PAGES,
            "{}",
            pages.len()
        );
        assert!((pages.len() as u64) < memory.pages() / 4, "{}", pages.len());
        seen.extend(pages);
    }
    vm.stop().await?;
    seen.extend(tracker.scan()?.iter().flat_map(|r| r.start.0..r.end.0));
    assert_eq!(tracker.scan()?, [], "a stopped guest writes");
    // Whatever changed was reported.
    for (page, (old, new)) in base.iter().zip(hashes(&memory)?).enumerate() {
        assert!(
            *old == new || seen.contains(&(page as u64)),
            "page {page} was missed"
        );
    }
    tracker.stop();
    vm.cont().await?;
    counts_past(vm.dir(), count(vm.dir()).unwrap() + 5).await?;
    vm.kill().await?;
    let gone = DirtyTracker::start(vm.uffd(), vm.pid(), &memory);
    assert!(gone.is_err());
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_saved_guest_can_go_on_where_it_was() -> anyhow::Result<()> {
    let lab = Lab::new().await?;
    let vm = lab.booted("vm").await?;
    for _ in 0..3 {
        vm.stop().await?;
        vm.save_state(&mut tokio::io::sink()).await?;
        let last = count(vm.dir()).unwrap();
        vm.cont().await?;
        counts_past(vm.dir(), last + 10).await?;
    }
    vm.kill().await?;
    Ok(())
}

/// A destination whose link breaks after some bytes.
struct Breaks(usize);

impl AsyncWrite for Breaks {
    fn poll_write(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.0.checked_sub(buf.len()) {
            Some(rest) => {
                self.0 = rest;
                Poll::Ready(Ok(buf.len()))
            }
            None => Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// A destination that takes nothing and never fails.
struct Stuck;

impl AsyncWrite for Stuck {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, _: &[u8]) -> Poll<io::Result<usize>> {
        Poll::Pending
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_save_that_breaks_is_undone() -> anyhow::Result<()> {
    let lab = Lab::new().await?;
    let vm = lab.booted("vm").await?;
    for limit in [0, 1 << 10, 100 << 10] {
        vm.stop().await?;
        vm.save_state(&mut Breaks(limit)).await.unwrap_err();
        let last = count(vm.dir()).unwrap();
        vm.cont().await?;
        counts_past(vm.dir(), last + 5).await?;
    }
    // Nobody takes the state, and the caller loses patience.
    vm.stop().await?;
    let patience = Duration::from_millis(100);
    tokio::time::timeout(patience, vm.save_state(&mut Stuck))
        .await
        .unwrap_err();
    vm.abort_save().await?;
    let last = count(vm.dir()).unwrap();
    vm.cont().await?;
    counts_past(vm.dir(), last + 5).await?;
    // And after all that, a good one.
    let moved = moved(&lab, &vm, "second", &lab.qemu).await?;
    moved.kill().await?;
    vm.kill().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broken_state_ends_the_incoming_vm_with_its_reason() -> anyhow::Result<()> {
    let lab = Lab::new().await?;
    let vm = Vm::incoming(&lab.spec(), lab.resources("vm", &lab.qemu)?).await?;
    let error = vm
        .load_state(&mut &b"no state at all"[..])
        .await
        .unwrap_err();
    eprintln!("{error}");
    vm.kill().await?;
    vm.wait_exit().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restarted_service_finds_its_vm() -> anyhow::Result<()> {
    let lab = Lab::new().await?;
    let vm = lab.booted("vm").await?;
    let identity = vm.memory().identity()?;
    let dir = vm.dir().to_owned();
    let record = vm.record();
    drop(vm);
    assert_eq!(VmRecord::load(&dir)?, record);
    let last = count(&dir).unwrap();
    counts_past(&dir, last + 5).await?;

    let vm = Vm::attach(&record).await?;
    assert_eq!(vm.query_status().await?, RunState::Running);
    assert_eq!(vm.memory().identity()?, identity);
    assert!(vm.park()?.is_some());
    let mut tracker = DirtyTracker::start(vm.uffd(), vm.pid(), &vm.memory())?;
    let now = count(&dir).unwrap();
    counts_past(&dir, now + 2).await?;
    assert!(!tracker.scan()?.is_empty());
    tracker.stop();
    let moved = moved(&lab, &vm, "second", &lab.qemu).await?;
    moved.kill().await?;

    vm.kill().await?;
    assert_eq!(vm.wait_exit().await?.reason, None);
    let gone = Vm::attach(&record).await.unwrap_err();
    assert!(matches!(gone, AttachError::Gone { .. }), "{gone}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_qemu_that_does_not_start_says_why_and_leaves_nothing() -> anyhow::Result<()> {
    let lab = Lab::new().await?;
    let mut resources = lab.resources("vm", &lab.qemu)?;
    resources.kernel = "/nonexistent/vmlinuz".into();
    let dir = resources.dir.clone();
    match Vm::boot(&lab.spec(), resources).await.unwrap_err() {
        SpawnError::Died { log } => assert!(log.contains("/nonexistent/vmlinuz"), "{log}"),
        other => panic!("{other}"),
    }
    assert!(VmRecord::load(&dir).is_err());
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_panics_ends_its_vm() -> anyhow::Result<()> {
    let lab = Lab::new().await?;
    let mut spec = lab.spec();
    spec.cmdline.push_str(" rdinit=/nonexistent");
    let vm = Vm::boot(&spec, lab.resources("vm", &lab.qemu)?).await?;
    let exit = tokio::time::timeout(Duration::from_secs(120), vm.wait_exit()).await??;
    assert_eq!(exit.reason.as_deref(), Some("guest-reset"));
    assert_eq!(exit.status.as_deref(), Some("exit status: 0"));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_accelerator_is_chosen_by_a_boot_that_works() -> anyhow::Result<()> {
    let lab = Lab::new().await?;
    // The emulator always works: this proves the boot sector, and that its end is recognised.
    try_accel(&lab.qemu, Accel::Tcg).await?;
    let began = Instant::now();
    let (accel, reason) = probe_accel(&lab.qemu).await;
    eprintln!("{accel:?} in {:?}: {reason}", began.elapsed());
    let strict = resolve(&lab.qemu, AccelChoice::Kvm).await;
    assert_eq!(strict.is_ok(), accel == Accel::Kvm);
    Ok(())
}

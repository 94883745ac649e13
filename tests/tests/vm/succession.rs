//! One QEMU takes over from another: the same memory, and nothing written to it that the guest has not written.

use std::time::Instant;

use anyhow::{Context, Result};
use vm_runtime::qemu::QemuBinary;
use vm_runtime::vm::{AttachError, HandOver, RunState, SpawnError, Successor, Vm, VmRecord};

use crate::lab::{Lab, count, counts_past, hashes};

/// A successor of `vm`, whose guest stands still, started without a trace in guest memory.
async fn started(lab: &Lab, vm: &Vm, qemu: &QemuBinary) -> Result<Successor> {
    let before = hashes(&vm.memory())?;
    let data = vm.memory().data_ranges()?;
    let next = vm.successor(lab.successor(qemu)?).await?;
    assert!(
        hashes(&vm.memory())? == before,
        "its start wrote to guest memory"
    );
    assert_eq!(
        vm.memory().data_ranges()?,
        data,
        "its start filled holes of guest memory"
    );
    Ok(next)
}

/// Replaces the QEMU of a VM whose guest stands still, and looks at its memory at each step.
async fn replaced(lab: &Lab, vm: &Vm, qemu: &QemuBinary) -> Result<Vm> {
    vm.stop().await?;
    let next = started(lab, vm, qemu).await?;
    let last = count(lab.console()).unwrap();
    let before = hashes(&vm.memory())?;
    assert_eq!(vm.hand_over(&next).await?.stopped, None, "it ran");
    assert_eq!(vm.query_status().await?, RunState::Saved);
    next.take_tap().await?;
    vm.suspend()?;
    assert!(
        hashes(&next.memory())? == before,
        "the state's way wrote to guest memory"
    );
    next.cont().await?;
    next.prevail().await?;
    counts_past(lab.console(), last + 20).await?;
    Ok(next.into_vm().await)
}

/// Replaces the QEMU of a VM whose guest runs, in no time.
async fn replaced_live(lab: &Lab, vm: &Vm, qemu: &QemuBinary) -> Result<Vm> {
    let next = vm.successor(lab.successor(qemu)?).await?;
    let began = Instant::now();
    let HandOver { stopped, bytes } = vm.hand_over(&next).await?;
    let stopped = stopped.context("it did not run")?;
    let passed = stopped.elapsed();
    next.take_tap().await?;
    vm.suspend()?;
    next.cont().await?;
    let downtime = stopped.elapsed();
    eprintln!(
        "{:?}: stopped after {:?}, state {passed:?}, downtime {downtime:?}, {bytes:?}",
        qemu.version,
        stopped.duration_since(began)
    );
    let last = count(lab.console()).unwrap();
    counts_past(lab.console(), last + 20).await?;
    next.prevail().await?;
    Ok(next.into_vm().await)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_goes_on_in_another_qemu_on_the_same_memory() -> Result<()> {
    let lab = Lab::new().await?;
    let other = lab.other_qemu().await?;
    let first = lab.booted("vm").await?;
    let home = first.dir().to_owned();
    let identity = first.memory().identity()?;

    let mut vm = first;
    for live in [false, true] {
        for qemu in [other.as_ref().unwrap_or(&lab.qemu), &lab.qemu] {
            let next = match live {
                false => replaced(&lab, &vm, qemu).await?,
                true => replaced_live(&lab, &vm, qemu).await?,
            };
            assert_eq!(VmRecord::load(&home)?, next.record());
            // The end of the one before leaves the record of this one alone.
            vm.kill().await?;
            assert_eq!(VmRecord::load(&home)?, next.record());
            assert_eq!(next.memory().identity()?, identity);
            vm = next;
        }
    }
    vm.kill().await?;
    assert!(VmRecord::load(&home).is_err());
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_successor_that_gives_up_leaves_the_guest_where_it_was() -> Result<()> {
    let lab = Lab::new().await?;
    let vm = lab.booted("vm").await?;
    // After each step that can fail.
    for steps in 0..4 {
        let next = vm.successor(lab.successor(&lab.qemu)?).await?;
        let last = count(lab.console()).unwrap();
        counts_past(lab.console(), last + 2).await?;
        if steps > 0 {
            vm.hand_over(&next).await?;
        }
        if steps > 1 {
            next.take_tap().await?;
        }
        if steps > 2 {
            vm.suspend()?;
        }
        next.give_up().await?;
        vm.wake()?;
        assert_eq!(VmRecord::load(vm.dir())?, vm.record());
        let last = count(lab.console()).unwrap();
        vm.cont().await?;
        counts_past(lab.console(), last + 5).await?;
    }
    vm.kill().await?;
    Ok(())
}

/// How far a service came with an upgrade before it was killed.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
enum Came {
    Started,
    HandedOver,
    TookTap,
    Suspended,
    Resumed,
    Prevailed,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restarted_service_finds_one_guest_wherever_an_upgrade_was_cut_short() -> Result<()> {
    let lab = Lab::new().await?;
    let mut vm = lab.booted("vm").await?;
    let home = vm.dir().to_owned();
    for came in [
        Came::Started,
        Came::HandedOver,
        Came::TookTap,
        Came::Suspended,
        Came::Resumed,
        Came::Prevailed,
    ] {
        let next = vm.successor(lab.successor(&lab.qemu)?).await?;
        if came >= Came::HandedOver {
            vm.hand_over(&next).await?;
        }
        if came >= Came::TookTap {
            next.take_tap().await?;
        }
        if came >= Came::Suspended {
            vm.suspend()?;
        }
        if came >= Came::Resumed {
            next.cont().await?;
        }
        if came >= Came::Prevailed {
            next.prevail().await?;
        }
        let pids = (vm.pid(), next.pid());
        drop((vm, next));

        vm = Vm::find(&home).await?;
        let (wanted, gone) = match came >= Came::Suspended {
            true => (pids.1, pids.0),
            false => (pids.0, pids.1),
        };
        assert_eq!(vm.pid(), wanted, "{came:?}");
        assert!(!is_qemu(gone), "{came:?}: there are two");
        assert_eq!(VmRecord::load(&home)?, vm.record(), "{came:?}");
        let last = count(lab.console()).unwrap();
        vm.cont().await?;
        counts_past(lab.console(), last + 5).await?;
    }

    // And if the first one is out of it before the other one has its state, there is no guest.
    let next = vm.successor(lab.successor(&lab.qemu)?).await?;
    vm.suspend()?;
    let pids = [vm.pid(), next.pid()];
    drop((vm, next));
    let error = Vm::find(&home).await.unwrap_err();
    assert!(matches!(error, AttachError::Gone { .. }), "{error}");
    assert!(!pids.into_iter().any(is_qemu), "one is left");
    Ok(())
}

/// Whether a process of this number lives, and is a QEMU.
fn is_qemu(pid: i32) -> bool {
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&line).contains("qemu-system")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_successor_that_does_not_start_says_why_and_leaves_nothing() -> Result<()> {
    let lab = Lab::new().await?;
    let vm = lab.booted("vm").await?;
    let mut qemu = lab.qemu.clone();
    qemu.path = "/bin/true".into();
    let error = vm.successor(lab.successor(&qemu)?).await.unwrap_err();
    assert!(matches!(error, SpawnError::Died { .. }), "{error}");
    qemu.machine_types.retain(|machine| machine == "pc-q35-6.0");
    let error = vm.successor(lab.successor(&qemu)?).await.unwrap_err();
    assert!(error.to_string().contains(&vm.spec().machine), "{error}");
    let last = count(lab.console()).unwrap();
    counts_past(lab.console(), last + 5).await?;
    vm.kill().await?;
    Ok(())
}

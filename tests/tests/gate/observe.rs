//! What the programs tell: nothing unless they are asked, and never at the cost of a verdict.

use std::time::Duration;

use migrator_ebpf::{
    Counter, Direction, Gate, LOGGED_WORD, Mode, TRACE_HEAD, TRACE_RING_BYTES, TraceEvent, names,
};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;

use crate::bench::{Bench, NEXT, REDIRECT, SLOT, bucket_of};
use crate::frames::frames;

fn now_ns() -> anyhow::Result<u64> {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC)?;
    Ok(u64::try_from(Duration::from(now).as_nanos())?)
}

fn watch(bench: &mut Bench, until_ns: u64) -> anyhow::Result<()> {
    Ok(bench.trace.set(u32::from(SLOT), until_ns, 0)?)
}

const MINUTE_NS: u64 = 60_000_000_000;

#[test]
fn a_watched_pod_shows_every_frame_as_it_was_decided() -> anyhow::Result<()> {
    let mut bench = Bench::new()?;
    bench.set(Mode::Hold, true, 7)?;
    watch(&mut bench, now_ns()? + MINUTE_NS)?;
    for frame in frames() {
        let before = now_ns()?;
        assert_eq!(bench.run(names::GATE, &frame)?, REDIRECT, "{}", frame.name);
        assert_eq!(bench.run(names::GUARD, &frame)?, NEXT, "{}", frame.name);
        let events = bench.events();
        let [gate, guard] = events.as_slice() else {
            panic!("{} events of {}", events.len(), frame.name);
        };
        let copied = frame.bytes.len().min(TRACE_HEAD);
        for event in [gate, guard] {
            assert_eq!(event.head(), &frame.bytes[..copied], "{}", frame.name);
            assert_eq!(event.length as usize, frame.bytes.len(), "{}", frame.name);
            assert_eq!(event.slot, SLOT);
            assert_eq!(event.vlan_protocol, 0, "no tag beside the frame");
            let gate = Gate {
                mode: Mode::Hold,
                may_send: true,
                slot: SLOT,
                epoch: 7,
            };
            assert_eq!(event.gate(), gate);
            assert!((before..now_ns()?).contains(&event.at_ns));
        }
        assert_eq!(gate.counter(), Some(Counter::ParkedHold));
        assert_eq!(gate.direction(), Direction::In);
        assert_eq!(gate.bucket, bucket_of(&frame));
        assert_eq!(guard.counter(), Some(Counter::Sent));
        assert_eq!(guard.direction(), Direction::Out);
    }
    Ok(())
}

#[test]
fn a_settled_gate_shows_its_frames_with_their_bucket() -> anyhow::Result<()> {
    let mut bench = Bench::new()?;
    bench.set(Mode::Local, true, 7)?;
    bench.settle()?;
    watch(&mut bench, now_ns()? + MINUTE_NS)?;
    for frame in frames() {
        assert_eq!(bench.run(names::GATE, &frame)?, NEXT, "{}", frame.name);
        let events = bench.events();
        let [event] = events.as_slice() else {
            panic!("{} events of {}", events.len(), frame.name);
        };
        assert_eq!(event.counter(), Some(Counter::Passed), "{}", frame.name);
        assert_eq!(event.bucket, bucket_of(&frame), "{}", frame.name);
        assert_eq!(event.gate().epoch, 7);
    }
    Ok(())
}

#[test]
fn nobody_watches_by_default_nor_beyond_the_time_that_was_set() -> anyhow::Result<()> {
    let mut bench = Bench::new()?;
    bench.set(Mode::Local, true, 1)?;
    let frame = frames().remove(2);
    for until in [0, 1, now_ns()?] {
        watch(&mut bench, until)?;
        assert_eq!(bench.run(names::GATE, &frame)?, NEXT);
        assert_eq!(bench.run(names::GUARD, &frame)?, NEXT);
        assert!(bench.events().is_empty(), "until {until}");
    }
    // Another pod's.
    bench
        .trace
        .set(u32::from(SLOT) + 1, now_ns()? + MINUTE_NS, 0)?;
    watch(&mut bench, 0)?;
    bench.run(names::GATE, &frame)?;
    assert!(bench.events().is_empty());
    Ok(())
}

#[test]
fn a_full_ring_counts_what_it_missed_and_changes_no_verdict() -> anyhow::Result<()> {
    let mut bench = Bench::new()?;
    bench.set(Mode::Hold, true, 1)?;
    watch(&mut bench, now_ns()? + MINUTE_NS)?;
    let frame = frames().remove(2);
    let more = TRACE_RING_BYTES as usize / size_of::<TraceEvent>() + 100;
    for _ in 0..more {
        assert_eq!(bench.run(names::GATE, &frame)?, REDIRECT);
    }
    assert_eq!(
        bench.count(u32::from(SLOT), Counter::ParkedHold)?,
        more as u64
    );
    let told = bench.events().len();
    let missed = bench.missed.get(&u32::from(SLOT), 0)?;
    assert!(told > 0 && missed > 0, "{told} told, {missed} missed");
    assert_eq!(told as u64 + missed, more as u64);
    bench.run(names::GATE, &frame)?;
    assert_eq!(bench.events().len(), 1, "there is room again");
    Ok(())
}

#[test]
fn each_flip_is_logged_once_however_many_frames_see_it() -> anyhow::Result<()> {
    // Each CPU logs by itself.
    let before = sched_getaffinity(Pid::from_raw(0))?;
    let mut one = CpuSet::new();
    let first = (0..CpuSet::count()).find(|cpu| before.is_set(*cpu).unwrap_or(false));
    one.set(first.expect("a CPU"))?;
    sched_setaffinity(Pid::from_raw(0), &one)?;
    let mut bench = Bench::new()?;
    let frame = frames().remove(2);
    for (epoch, mode) in [(1, Mode::Local), (2, Mode::Hold), (3, Mode::Local)] {
        bench.set(mode, true, epoch)?;
        for _ in 0..100 {
            bench.run(names::GATE, &frame)?;
            bench.run(names::GUARD, &frame)?;
        }
        assert_eq!(bench.logged(), 1, "epoch {epoch}");
        // Which is no flip.
        bench.settle()?;
        bench.run(names::GATE, &frame)?;
        assert_eq!(bench.logged(), 0, "epoch {epoch}");
    }
    // The word that was logged is no counter.
    for counter in Counter::ALL {
        assert_ne!(counter as usize, LOGGED_WORD);
    }
    sched_setaffinity(Pid::from_raw(0), &before)?;
    Ok(())
}

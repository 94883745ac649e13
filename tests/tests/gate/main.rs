//! Every verdict of the programs, by `BPF_PROG_TEST_RUN`: no device, no traffic.
//!
//! The kernel runs the program on a frame that it gives to the loopback device of the caller's
//! namespace: so that is the device which gets a slot here.
#![allow(missing_docs, unreachable_pub)]

mod bench;
mod bound;
mod frames;
mod matrix;
mod observe;
mod steer;
mod tunnel;

use bench::{Bench, DROP, LOOPBACK, NEXT, REDIRECT, SLOT};
use frames::{POD, frames};
use migrator_ebpf::{Counter, Device, Gate, MAX_SLOTS, Mode, NO_SLOT_ROW, names};

#[test]
fn an_open_gate_queues_a_frame_behind_its_bucket_until_that_is_done() -> anyhow::Result<()> {
    let mut bench = Bench::new()?;
    let (waiting, other) = (frames().remove(2), frames().remove(3));
    bench.set(Mode::Hold, true, 1)?;
    assert_eq!(bench.run(names::GATE, &waiting)?, REDIRECT);
    bench.set(Mode::Local, true, 2)?;
    assert_eq!(bench.run(names::GATE, &waiting)?, REDIRECT);
    assert_eq!(bench.run(names::GATE, &other)?, NEXT);
    bench.let_wait(&waiting, 0)?;
    assert_eq!(bench.run(names::GATE, &waiting)?, NEXT);
    Ok(())
}

#[test]
fn a_device_without_a_slot_and_a_foreign_word_let_nothing_through() -> anyhow::Result<()> {
    let mut bench = Bench::new()?;
    for frame in frames() {
        let foreign = Gate {
            mode: Mode::Local,
            may_send: true,
            slot: SLOT + 1,
            epoch: 1,
        };
        bench.gates.set(u32::from(SLOT), foreign.to_word(), 0)?;
        let change = bench.change(names::GATE, &frame)?;
        assert_eq!(change.verdict, DROP, "{}", frame.name);
        assert_eq!(change.counted, [(Counter::RefusedNoSlot, 1)]);
        assert_eq!(change.parked, []);
        let change = bench.change(names::GUARD, &frame)?;
        assert_eq!(change.verdict, DROP, "{}", frame.name);
        assert_eq!(change.counted, [(Counter::Blocked, 1)]);
    }
    let frame = frames().remove(1);
    bench.devices.remove(&LOOPBACK)?;
    assert_eq!(bench.run(names::GATE, &frame)?, DROP);
    assert_eq!(bench.run(names::GUARD, &frame)?, DROP);
    assert_eq!(bench.count(NO_SLOT_ROW, Counter::RefusedNoSlot)?, 1);
    assert_eq!(bench.count(NO_SLOT_ROW, Counter::Blocked)?, 1);
    let outside = Device {
        park: LOOPBACK,
        out: 0,
        tunnel: 0,
        uplink: 0,
        slot: MAX_SLOTS as u16,
        mac: POD,
    };
    bench.devices.insert(LOOPBACK, outside, 0)?;
    assert_eq!(bench.run(names::GATE, &frame)?, DROP);
    Ok(())
}

//! Every verdict of the programs, by `BPF_PROG_TEST_RUN`: no device, no traffic.
//!
//! The kernel runs the program on a frame that it gives to the loopback device of the caller's
//! namespace: so that is the device which gets a slot here.

use aya::maps::{Array, HashMap, MapData, PerCpuArray};
use aya::programs::{SchedClassifier, TestRun, TestRunOptions};
use aya::{Ebpf, EbpfLoader};
use migrator_ebpf::{
    Counter, CounterRow, Device, FrameBytes, Gate, MAX_SLOTS, Mode, NO_SLOT_ROW, bucket,
    bucket_index, names,
};
use migrator_tests::netns::{BpfDir, require_root};
use nix::mount::{MsFlags, mount};

const LOOPBACK: u32 = 1;
const SLOT: u16 = 3;
const POD: [u8; 6] = [0x52, 0x54, 0, 0, 0, 0x10];
const PEER: [u8; 6] = [0x52, 0x54, 0, 0, 0, 0x01];

/// linux/bpf.h `TCX_NEXT`, `TCX_DROP`, `TCX_REDIRECT`, as the test run returns them.
const NEXT: u32 = -1i32 as u32;
const DROP: u32 = 2;
const REDIRECT: u32 = 7;

struct Bench {
    programs: Ebpf,
    gates: Array<MapData, u64>,
    parked: Array<MapData, u64>,
    done: Array<MapData, u64>,
    devices: HashMap<MapData, u32, Device>,
    counters: PerCpuArray<MapData, CounterRow>,
    _dir: BpfDir,
}

impl Bench {
    fn new() -> anyhow::Result<Self> {
        require_root();
        let dir = BpfDir::new()?;
        let none: Option<&str> = None;
        mount(Some("bpf"), dir.path(), Some("bpf"), MsFlags::empty(), none)?;
        let mut programs = EbpfLoader::new()
            .default_map_pin_directory(dir.path())
            .load(migrator::network::PROGRAMS)?;
        for name in [names::GATE, names::GUARD] {
            let program: &mut SchedClassifier = programs
                .program_mut(name)
                .expect("in the object")
                .try_into()?;
            program.load()?;
        }
        let mut take = |name| programs.take_map(name).expect("in the object");
        let mut bench = Self {
            gates: Array::try_from(take(names::GATES))?,
            parked: Array::try_from(take(names::PARKED))?,
            done: Array::try_from(take(names::DONE))?,
            devices: HashMap::try_from(take(names::DEVICES))?,
            counters: PerCpuArray::try_from(take(names::COUNTERS))?,
            programs,
            _dir: dir,
        };
        let device = Device {
            park: LOOPBACK,
            uplink: 0,
            slot: SLOT,
            mac: POD,
        };
        bench.devices.insert(LOOPBACK, device, 0)?;
        Ok(bench)
    }

    fn set(&mut self, mode: Mode, may_send: bool) -> anyhow::Result<()> {
        let gate = Gate {
            mode,
            may_send,
            slot: SLOT,
            epoch: 1,
        };
        Ok(self.gates.set(u32::from(SLOT), gate.to_word(), 0)?)
    }

    fn run(&self, program: &'static str, frame: &[u8]) -> anyhow::Result<u32> {
        let program = self.programs.program(program).expect("in the object");
        let program: &SchedClassifier = program.try_into()?;
        let options = TestRunOptions {
            data_in: Some(frame),
            ..TestRunOptions::default()
        };
        Ok(program.test_run(options)?.return_value)
    }

    fn count(&self, row: u32, counter: Counter) -> anyhow::Result<u64> {
        let rows = self.counters.get(&row, 0)?;
        Ok(rows.iter().map(|row| row.get(counter)).sum())
    }

    /// Runs the gate, and checks that exactly `counter` of the slot went up by one.
    fn gate(&self, frame: &[u8], counter: Counter) -> anyhow::Result<u32> {
        let row = u32::from(SLOT);
        let mut before = Vec::new();
        for c in Counter::ALL {
            before.push(self.count(row, c)?);
        }
        let verdict = self.run(names::GATE, frame)?;
        for (c, before) in Counter::ALL.into_iter().zip(before) {
            let up = self.count(row, c)? - before;
            assert_eq!(up, u64::from(c == counter), "{c:?} on {frame:02x?}");
        }
        Ok(verdict)
    }

    fn parked(&self, frame: &[u8]) -> anyhow::Result<u64> {
        let index = bucket_index(SLOT, bucket(&FrameBytes(frame)));
        Ok(self.parked.get(&index, 0)?)
    }

    fn finish(&mut self, frame: &[u8]) -> anyhow::Result<()> {
        let index = bucket_index(SLOT, bucket(&FrameBytes(frame)));
        let parked = self.parked.get(&index, 0)?;
        Ok(self.done.set(index, parked, 0)?)
    }
}

fn frame(to: [u8; 6], from: [u8; 6], kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = [to, from].concat();
    frame.extend(kind.to_be_bytes());
    frame.extend(payload);
    frame
}

fn ipv4(fragment: u16) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 28, 0, 1];
    packet.extend(fragment.to_be_bytes());
    packet.extend([64, 17, 0, 0, 10, 77, 0, 1, 10, 77, 0, 10]);
    packet.extend([0, 7, 0, 7, 0, 8, 0, 0]);
    packet
}

fn ipv6(next: u8) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0, 0, 8, next, 255, 0xfd];
    packet.extend([0; 14]);
    packet.push(1);
    packet.push(0xfd);
    packet.extend([0; 14]);
    packet.extend([10, 135, 0, 0, 0, 0, 0, 0, 0]);
    packet
}

/// Every kind of frame a gate meets from others.
fn frames() -> Vec<(&'static str, Vec<u8>)> {
    const GROUP4: [u8; 6] = [1, 0, 0x5e, 0, 0, 1];
    const GROUP6: [u8; 6] = [0x33, 0x33, 0xff, 0, 0, 0x10];
    let arp = [0, 1, 8, 0, 6, 4, 0, 1];
    let tagged = [vec![0, 42, 0x08, 0x00], ipv4(0)].concat();
    vec![
        ("arp", frame([0xff; 6], PEER, 0x0806, &arp)),
        ("ipv4", frame(POD, PEER, 0x0800, &ipv4(0))),
        ("ipv6", frame(POD, PEER, 0x86dd, &ipv6(17))),
        (
            "neighbour discovery",
            frame(GROUP6, PEER, 0x86dd, &ipv6(58)),
        ),
        ("broadcast", frame([0xff; 6], PEER, 0x0800, &ipv4(0))),
        ("multicast", frame(GROUP4, PEER, 0x0800, &ipv4(0))),
        ("first fragment", frame(POD, PEER, 0x0800, &ipv4(0x2000))),
        ("later fragment", frame(POD, PEER, 0x0800, &ipv4(185))),
        ("vlan", frame(POD, PEER, 0x8100, &tagged)),
        // The kernel runs no test on a cut IP packet, unless a tag hides it.
        ("runt", frame(POD, PEER, 0x0806, &[0])),
        ("cut ipv4", frame(POD, PEER, 0x8100, &[0, 1, 0x08, 0x00])),
        (
            "cut ipv6",
            frame(POD, PEER, 0x8100, &[0, 1, 0x86, 0xdd, 0x60]),
        ),
        ("junk", frame(POD, PEER, 0xdead, &[0xa5; 46])),
        ("length field", frame(POD, PEER, 0x0026, &[0x42; 38])),
    ]
}

#[test]
fn an_open_gate_passes_every_kind_of_frame() -> anyhow::Result<()> {
    let mut bench = Bench::new()?;
    bench.set(Mode::Local, true)?;
    for (name, frame) in frames() {
        assert_eq!(bench.gate(&frame, Counter::Passed)?, NEXT, "{name}");
        assert_eq!(bench.parked(&frame)?, 0, "{name}");
    }
    Ok(())
}

#[test]
fn a_holding_gate_parks_every_kind_of_frame_in_its_bucket() -> anyhow::Result<()> {
    let mut bench = Bench::new()?;
    for (mode, counter) in [
        (Mode::Hold, Counter::ParkedHold),
        (Mode::Forward, Counter::ParkedForward),
    ] {
        bench.set(mode, true)?;
        for (name, frame) in frames() {
            let before = bench.parked(&frame)?;
            assert_eq!(bench.gate(&frame, counter)?, REDIRECT, "{name}");
            let after = bench.parked(&frame)?;
            assert_eq!(after, before + 1, "{name}: both sides agree on the bucket");
        }
    }
    Ok(())
}

#[test]
fn a_shut_gate_drops_every_kind_of_frame() -> anyhow::Result<()> {
    let mut bench = Bench::new()?;
    bench.set(Mode::Shut, false)?;
    for (name, frame) in frames() {
        assert_eq!(bench.gate(&frame, Counter::RefusedShut)?, DROP, "{name}");
        assert_eq!(bench.parked(&frame)?, 0, "{name}");
    }
    Ok(())
}

#[test]
fn an_open_gate_queues_a_frame_behind_its_bucket_until_that_is_done() -> anyhow::Result<()> {
    let mut bench = Bench::new()?;
    let waiting = frame(POD, PEER, 0x0800, &ipv4(0));
    let other = frame(POD, PEER, 0x86dd, &ipv6(17));
    bench.set(Mode::Hold, true)?;
    bench.gate(&waiting, Counter::ParkedHold)?;
    bench.set(Mode::Local, true)?;
    assert_eq!(bench.gate(&waiting, Counter::ParkedLocal)?, REDIRECT);
    assert_eq!(bench.gate(&other, Counter::Passed)?, NEXT);
    bench.finish(&waiting)?;
    assert_eq!(bench.gate(&waiting, Counter::Passed)?, NEXT);
    Ok(())
}

#[test]
fn the_pods_own_announcement_is_shown_and_not_parked() -> anyhow::Result<()> {
    let mut bench = Bench::new()?;
    let echo = frame([0xff; 6], POD, 0x0806, &[0; 46]);
    for mode in [Mode::Hold, Mode::Forward] {
        bench.set(mode, true)?;
        assert_eq!(bench.gate(&echo, Counter::RefusedEcho)?, REDIRECT);
        assert_eq!(bench.parked(&echo)?, 0);
    }
    bench.set(Mode::Local, true)?;
    assert_eq!(bench.gate(&echo, Counter::Passed)?, NEXT);
    bench.set(Mode::Shut, true)?;
    assert_eq!(bench.gate(&echo, Counter::RefusedShut)?, DROP);
    Ok(())
}

#[test]
fn the_guard_lets_out_only_a_guest_that_may_send() -> anyhow::Result<()> {
    let mut bench = Bench::new()?;
    let row = u32::from(SLOT);
    for mode in [Mode::Shut, Mode::Local, Mode::Hold, Mode::Forward] {
        for (may_send, verdict, counter) in
            [(true, NEXT, Counter::Sent), (false, DROP, Counter::Blocked)]
        {
            bench.set(mode, may_send)?;
            for (name, frame) in frames() {
                let before = bench.count(row, counter)?;
                assert_eq!(bench.run(names::GUARD, &frame)?, verdict, "{mode:?} {name}");
                assert_eq!(bench.count(row, counter)?, before + 1, "{mode:?} {name}");
            }
        }
    }
    Ok(())
}

#[test]
fn a_device_without_a_slot_and_a_foreign_word_let_nothing_through() -> anyhow::Result<()> {
    let mut bench = Bench::new()?;
    let (_, frame) = frames().remove(1);
    let foreign = Gate {
        mode: Mode::Local,
        may_send: true,
        slot: SLOT + 1,
        epoch: 1,
    };
    bench.gates.set(u32::from(SLOT), foreign.to_word(), 0)?;
    assert_eq!(bench.gate(&frame, Counter::RefusedNoSlot)?, DROP);
    assert_eq!(bench.run(names::GUARD, &frame)?, DROP);
    bench.devices.remove(&LOOPBACK)?;
    assert_eq!(bench.run(names::GATE, &frame)?, DROP);
    assert_eq!(bench.run(names::GUARD, &frame)?, DROP);
    assert_eq!(bench.count(NO_SLOT_ROW, Counter::RefusedNoSlot)?, 1);
    assert_eq!(bench.count(NO_SLOT_ROW, Counter::Blocked)?, 1);
    let outside = Device {
        park: LOOPBACK,
        uplink: 0,
        slot: MAX_SLOTS as u16,
        mac: POD,
    };
    bench.devices.insert(LOOPBACK, outside, 0)?;
    assert_eq!(bench.run(names::GATE, &frame)?, DROP);
    Ok(())
}

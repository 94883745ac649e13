//! Every verdict of the uplink's program, by `BPF_PROG_TEST_RUN`: no traffic. What it counts and redirects to are real maps; the TAP that it
//! leads to is the loopback device, which the kernel only looks up in a test run.

mod bench;
mod frames;
mod onward;

use aya::programs::{SchedClassifier, TestRun, TestRunOptions};
use bench::{Bench, LOOPBACK, REDIRECT, SLOT};
use frames::{POD, UDP, fast_frames, frame, ipv4, ipv6, other_frames, plain, udp};
use migrator_ebpf::{
    Counter, Device, Direction, FrameBytes, Gate, Mode, TRACE_HEAD, TraceEvent, bucket, names,
    settle,
};

#[test]
fn an_open_gate_lets_every_fast_kind_straight_through() -> anyhow::Result<()> {
    let bench = Bench::new()?;
    for (name, frame) in fast_frames() {
        bench.is_fast(name, &frame);
    }
    Ok(())
}

#[test]
fn other_kinds_are_left_to_the_kernel_in_any_mode() -> anyhow::Result<()> {
    let mut bench = Bench::new()?;
    for mode in [Mode::Local, Mode::Hold, Mode::Forward, Mode::Shut] {
        bench.set(mode)?;
        for (name, frame) in other_frames() {
            bench.is_left(name, &frame, 0);
        }
    }
    Ok(())
}

#[test]
fn a_gate_that_is_not_open_gets_every_frame_and_each_is_counted() -> anyhow::Result<()> {
    let mut bench = Bench::new()?;
    for mode in [Mode::Hold, Mode::Forward, Mode::Shut] {
        // Latched before, under another word.
        for (name, frame) in fast_frames() {
            bench.set(mode)?;
            bench.is_left(name, &frame, 1);
        }
    }
    Ok(())
}

#[test]
fn a_bucket_stays_with_the_kernel_until_what_it_got_has_arrived() -> anyhow::Result<()> {
    let mut bench = Bench::new()?;
    let (udp, udp6) = (plain(), fast_frames().remove(1).1);
    bench.is_fast("before", &udp);
    bench.set(Mode::Hold)?;
    bench.is_left("held", &udp, 1);
    bench.is_left("held", &udp, 1);
    bench.set(Mode::Local)?;
    bench.is_left("behind two", &udp, 1);
    bench.is_fast("another bucket", &udp6);
    bench.arrive(&udp, 2)?;
    bench.is_left("behind the third", &udp, 1);
    bench.arrive(&udp, 2)?;
    bench.is_fast("all have arrived", &udp);
    // A count that is wrong does not open it either.
    bench.set(Mode::Local)?;
    bench.arrive(&udp, 1)?;
    bench.is_left("one too many", &udp, 1);
    Ok(())
}

#[test]
fn a_bucket_stays_with_the_kernel_until_what_is_parked_is_done() -> anyhow::Result<()> {
    let mut bench = Bench::new()?;
    let udp = plain();
    let index = Bench::index(&udp);
    bench.parked.set(index, 5, 0)?;
    bench.done.set(index, 4, 0)?;
    bench.is_left("one is parked", &udp, 1);
    bench.arrive(&udp, 1)?;
    bench.is_left("still", &udp, 1);
    bench.arrive(&udp, 1)?;
    bench.done.set(index, 5, 0)?;
    bench.is_fast("done", &udp);
    Ok(())
}

#[test]
fn nothing_but_the_gates_word_ends_the_fast_way() -> anyhow::Result<()> {
    let mut bench = Bench::new()?;
    let udp = plain();
    let index = Bench::index(&udp);
    bench.is_fast("first", &udp);
    // Others of the bucket are under way: this flow's frames are in the batch, and must stay together.
    bench.passed.set(index, 9, 0)?;
    bench.parked.set(index, 9, 0)?;
    bench.is_fast("latched", &udp);
    bench.set(Mode::Local)?;
    bench.is_left("a new word", &udp, 1);
    Ok(())
}

#[test]
fn a_gate_that_settles_is_the_same_to_the_fast_way() -> anyhow::Result<()> {
    let mut bench = Bench::new()?;
    let udp = plain();
    let index = Bench::index(&udp);
    bench.is_fast("first", &udp);
    let word = bench.gates.get(&u32::from(SLOT), 0)?;
    bench.gates.set(u32::from(SLOT), settle(word), 0)?;
    // Would not be opened now; but it is the word that it was opened under.
    bench.passed.set(index, 9, 0)?;
    bench.is_fast("latched, and settled", &udp);
    Ok(())
}

#[test]
fn a_watched_pod_shows_what_takes_the_fast_way_and_the_gate_shows_the_rest() -> anyhow::Result<()> {
    let mut bench = Bench::new()?;
    bench.trace.set(u32::from(SLOT), u64::MAX, 0)?;
    for (name, frame) in fast_frames() {
        bench.is_fast(name, &frame);
        let event = bench.ring.next().expect(name);
        let event = TraceEvent::from_bytes(&event).expect("a whole event");
        assert_eq!(event.counter(), Some(Counter::Fast), "{name}");
        assert_eq!(event.direction(), Direction::In, "{name}");
        assert_eq!(event.slot, SLOT);
        assert_eq!(event.gate().mode, Mode::Local);
        assert_eq!(event.bucket, bucket(&FrameBytes(&frame)), "{name}");
        assert_eq!(event.length as usize, frame.len(), "{name}");
        assert_eq!(event.vlan_protocol, 0);
        let copied = frame.len().min(TRACE_HEAD);
        assert_eq!(event.head(), &frame[..copied], "{name}");
    }
    for (name, frame) in other_frames() {
        bench.run(&frame)?;
        assert!(bench.ring.next().is_none(), "{name} will come to the gate");
    }
    Ok(())
}

#[test]
fn what_is_too_long_keeps_its_bucket_closed() -> anyhow::Result<()> {
    const SEVERAL: u64 = 1 << 20;
    let bench = Bench::new()?;
    let long = frame(POD, 0x0800, &ipv4(UDP, 0, 0, &udp(1473, 0)));
    bench.is_left("one byte too long", &long, SEVERAL);
    let mut short = plain();
    short[17] += 1;
    bench.is_left("says more than there is", &short, 1);
    Ok(())
}

#[test]
fn a_tap_that_is_not_up_yet_and_a_foreign_word_leave_all_to_the_kernel() -> anyhow::Result<()> {
    let mut bench = Bench::new()?;
    let udp = plain();
    bench.taps.remove(u32::from(SLOT))?;
    bench.is_left("no tap", &udp, 1);
    bench.taps.insert(u32::from(SLOT), LOOPBACK, None, 0)?;
    bench.arrive(&udp, 1)?;
    let foreign = Gate {
        mode: Mode::Local,
        may_send: true,
        slot: SLOT + 1,
        epoch: 9,
    };
    bench.gates.set(u32::from(SLOT), foreign.to_word(), 0)?;
    bench.is_left("foreign word", &udp, 1);
    Ok(())
}

/// One's complement sum of a datagram and its pseudo-header.
fn sum(frame: &[u8], addresses: std::ops::Range<usize>, at: usize) -> u16 {
    let mut bytes = [&frame[addresses], &frame[at..]].concat();
    if bytes.len() % 2 == 1 {
        bytes.push(0);
    }
    bytes.extend([0, UDP]);
    bytes.extend((frame.len() as u16 - at as u16).to_be_bytes());
    let pairs = bytes.chunks(2);
    let sum = pairs.map(|pair| u64::from(u16::from_be_bytes([pair[0], pair[1]])));
    migrator_ebpf::fold(sum.sum())
}

#[test]
fn an_unfinished_checksum_is_finished() -> anyhow::Result<()> {
    let bench = Bench::new()?;
    for len in [0, 1, 18, 55, 56, 57, 120, 121, 1471, 1472] {
        for (kind, packet, addresses, at) in [
            (0x0800, ipv4(UDP, 0, 0, &udp(len, 0)), 26..34, 34),
            (0x0800, ipv4(UDP, 0, 3, &udp(len.min(1400), 0)), 26..34, 46),
            (0x86dd, ipv6(UDP, &udp(len.min(1400), 0)), 22..54, 54),
        ] {
            let mut partial = frame(POD, kind, &packet);
            // What the sender leaves: the sum of the pseudo-header alone.
            let mut header = partial[..at + 8].to_vec();
            header[at..].fill(0);
            let len = partial.len() - at;
            let pseudo = sum(&header, addresses.clone(), at);
            // `sum` took the length of what it was given.
            let pseudo = migrator_ebpf::fold(u64::from(pseudo) + len as u64 + (0xffff - 8));
            partial[at + 6..at + 8].copy_from_slice(&pseudo.to_be_bytes());
            let (action, out) = bench.run(&partial)?;
            assert_eq!(action, REDIRECT, "{len}");
            assert_eq!(sum(&out, addresses, at), 0xffff, "{len} {kind:x}");
            let mut as_before = out.clone();
            as_before[at + 6..at + 8].copy_from_slice(&pseudo.to_be_bytes());
            assert_eq!(as_before, partial);
        }
    }
    Ok(())
}

#[test]
fn the_gate_counts_what_came_by_the_uplink_and_nothing_else() -> anyhow::Result<()> {
    let mut bench = Bench::new()?;
    // In a test run the frame comes from the loopback device, and goes there.
    for (uplink, counted) in [(LOOPBACK, 1), (0, 0), (LOOPBACK + 1, 0)] {
        let device = Device {
            park: LOOPBACK,
            out: 0,
            tunnel: 0,
            uplink,
            slot: SLOT,
            mac: POD,
        };
        bench.devices.insert(LOOPBACK, device, 0)?;
        for mode in [Mode::Local, Mode::Hold] {
            bench.set(mode)?;
            for (name, frame) in fast_frames() {
                assert_eq!(gate_counts(&bench, &frame)?, counted, "{name}, {uplink}");
            }
            for (name, frame) in other_frames() {
                // The gate of a TAP sees frames for its own pod, and the kernel tests no cut IP packet.
                if !matches!(name, "another's" | "cut ip" | "runt") {
                    assert_eq!(gate_counts(&bench, &frame)?, 0, "{name}");
                }
            }
        }
    }
    Ok(())
}

/// What the gate adds to `arrived` of a frame's bucket.
pub(crate) fn gate_counts(bench: &Bench, frame: &[u8]) -> anyhow::Result<u64> {
    /// linux/bpf.h `struct __sk_buff`, up to `ingress_ifindex` and beyond.
    const SK_BUFF: usize = 192;
    const INGRESS_IFINDEX: usize = 36;
    let mut context = vec![0u8; SK_BUFF];
    context[INGRESS_IFINDEX..INGRESS_IFINDEX + 4].copy_from_slice(&LOOPBACK.to_ne_bytes());
    let index = Bench::index(frame);
    let before = bench.arrived.get(&index, 0)?;
    let program = bench.programs.program(names::GATE).expect("in the object");
    let program: &SchedClassifier = program.try_into()?;
    program.test_run(TestRunOptions {
        data_in: Some(frame),
        ctx_in: Some(&context),
        ..TestRunOptions::default()
    })?;
    Ok(bench.arrived.get(&index, 0)? - before)
}

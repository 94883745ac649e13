//! The whole matrix: each mode, kind of frame, state of its bucket, and right to send. What the programs should do is written down
//! here once more, on its own.

use migrator_ebpf::{Brief, Counter, INJECTED_MARK, INJECTED_PRIORITY, Mode, names};

use crate::bench::{Bench, Change, DROP, LOOPBACK, NEXT, REDIRECT, SLOT, bucket_of};
use crate::frames::{Frame, echo, frames, is_group};

const MODES: [Mode; 5] = [
    Mode::Shut,
    Mode::Local,
    Mode::Hold,
    Mode::Forward,
    Mode::Tunnel,
];

/// What the gate of a slot without a tunnel does, which does not depend on the right to send: verdict, counter, and whether a bucket waits for the frame.
fn expected(mode: Mode, is_echo: bool, is_group: bool, waiting: u64) -> (u32, Counter, bool) {
    match (mode, is_echo, waiting) {
        (Mode::Shut, _, _) => (DROP, Counter::RefusedShut, false),
        (Mode::Local, _, 0) => (NEXT, Counter::Passed, false),
        (Mode::Local, _, _) => (REDIRECT, Counter::ParkedLocal, true),
        (Mode::Hold | Mode::Forward, true, _) => (REDIRECT, Counter::RefusedEcho, false),
        (Mode::Hold, false, _) => (REDIRECT, Counter::ParkedHold, true),
        (Mode::Forward, false, _) => (REDIRECT, Counter::ParkedForward, true),
        (Mode::Tunnel, true, _) => (DROP, Counter::RefusedEcho, false),
        (Mode::Tunnel, false, 0) if is_group => (DROP, Counter::RefusedGroup, false),
        (Mode::Tunnel, false, _) => (REDIRECT, Counter::ParkedForward, true),
    }
}

fn all() -> impl Iterator<Item = (bool, Frame)> {
    let others = frames().into_iter().map(|frame| (false, frame));
    others.chain([(true, echo())])
}

#[test]
fn the_gate_decides_by_mode_and_bucket_alone() -> anyhow::Result<()> {
    let mut bench = Bench::new()?;
    let mut epoch = 0;
    for mode in MODES {
        for may_send in [false, true] {
            for (is_echo, frame) in all() {
                for waiting in [0, 1, 5] {
                    epoch += 1;
                    bench.set(mode, may_send, epoch)?;
                    bench.let_wait(&frame, waiting)?;
                    let change = bench.change(names::GATE, &frame)?;
                    let (verdict, counter, parks) =
                        expected(mode, is_echo, is_group(&frame), waiting);
                    let expected = Change {
                        verdict,
                        counted: vec![(counter, 1)],
                        parked: match parks {
                            true => vec![(bucket_of(&frame), 1)],
                            false => vec![],
                        },
                    };
                    let what = format!("{mode:?}, {may_send}, {}, {waiting} wait", frame.name);
                    assert_eq!(change, expected, "{what}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn a_settled_gate_passes_by_its_word_alone_and_no_other_gate_settles() -> anyhow::Result<()> {
    let mut bench = Bench::new()?;
    let brief = Brief {
        slot: SLOT,
        uplink: 0,
    };
    let mut epoch = 0;
    for mode in MODES {
        // With a brief of the device, and without one.
        for word in [brief.to_word(), 0] {
            bench.briefs.set(LOOPBACK, word, 0)?;
            for (is_echo, frame) in all() {
                for waiting in [0, 5] {
                    epoch += 1;
                    bench.set(mode, true, epoch)?;
                    bench.settle()?;
                    bench.let_wait(&frame, waiting)?;
                    let change = bench.change(names::GATE, &frame)?;
                    // The service says that nothing waits, so the counters are not asked.
                    let said = if mode == Mode::Local { 0 } else { waiting };
                    let (verdict, counter, parks) = expected(mode, is_echo, is_group(&frame), said);
                    let parked = match parks {
                        true => vec![(bucket_of(&frame), 1)],
                        false => vec![],
                    };
                    let expected = Change {
                        verdict,
                        counted: vec![(counter, 1)],
                        parked,
                    };
                    let what = format!("{mode:?}, {word:x}, {}, {waiting} wait", frame.name);
                    assert_eq!(change, expected, "{what}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn what_the_service_injects_passes_in_any_mode_and_is_noted() -> anyhow::Result<()> {
    let mut bench = Bench::new()?;
    let slot = u32::from(SLOT);
    let marks = (INJECTED_MARK, INJECTED_PRIORITY);
    for (epoch, mode) in (1..).zip(MODES) {
        bench.set(mode, false, epoch)?;
        for (is_echo, frame) in all() {
            let what = format!("{mode:?}, {}", frame.name);
            bench.let_wait(&frame, 5)?;
            bench.injected.set(slot, 10, 0)?;
            // Nothing to note, and a number.
            for (next, noted) in [(0, 10), (12, 12)] {
                bench.injected_next.set(slot, next, 0)?;
                let result = bench.run_marked(&frame, marks)?;
                assert_eq!(result, (NEXT, (0, 0)), "{what}");
                assert_eq!(bench.injected.get(&slot, 0)?, noted, "{what}");
            }
            // One mark is not enough.
            bench.injected_next.set(slot, 15, 0)?;
            for marks in [(INJECTED_MARK, 0), (0, INJECTED_PRIORITY)] {
                let (verdict, after) = bench.run_marked(&frame, marks)?;
                let expected = expected(mode, is_echo, is_group(&frame), 5);
                assert_eq!((verdict, after), (expected.0, marks), "{what}");
                assert_eq!(bench.injected.get(&slot, 0)?, 12, "{what}");
            }
        }
    }
    Ok(())
}

#[test]
fn the_guard_decides_by_the_right_to_send_alone() -> anyhow::Result<()> {
    let mut bench = Bench::new()?;
    for mode in MODES {
        for (may_send, verdict, counter) in
            [(true, NEXT, Counter::Sent), (false, DROP, Counter::Blocked)]
        {
            for (_, frame) in all() {
                for waiting in [0, 1] {
                    bench.set(mode, may_send, 1)?;
                    bench.let_wait(&frame, waiting)?;
                    let change = bench.change(names::GUARD, &frame)?;
                    let expected = Change {
                        verdict,
                        counted: vec![(counter, 1)],
                        parked: vec![],
                    };
                    assert_eq!(change, expected, "{mode:?}, {may_send}, {}", frame.name);
                }
            }
        }
    }
    Ok(())
}

#[test]
fn fragments_and_tags_stay_in_the_bucket_of_their_flow() {
    let of = |name: &str| {
        let frame = frames().into_iter().find(|frame| frame.name == name);
        bucket_of(&frame.expect("one of the kinds"))
    };
    for name in ["first fragment", "later fragment", "one tag", "gso"] {
        assert_eq!(of(name), of("ipv4"), "{name}");
    }
    for name in ["first ipv6 fragment", "later ipv6 fragment", "two tags"] {
        assert_eq!(of(name), of("ipv6"), "{name}");
    }
}

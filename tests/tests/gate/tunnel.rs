//! The verdicts of a gate whose pod has gone for good: through the tunnel, or out of the uplink. And of the program at the tunnel's other end.

use migrator_ebpf::{Counter, Device, Landing, Mode, NO_SLOT_ROW, Tunnel, landing_key, names};

use crate::bench::{Bench, DROP, LOOPBACK, NEXT, REDIRECT, SLOT, bucket_of};
use crate::frames::{Frame, POD, echo, frames, is_group};

const TUNNEL: Tunnel = Tunnel {
    device: LOOPBACK,
    vni: 77,
    family: 4,
    remote: [127, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
};

fn lead(bench: &mut Bench, tunnel: Tunnel) -> anyhow::Result<()> {
    Ok(bench.tunnels.set(u32::from(SLOT), tunnel, 0)?)
}

/// Runs the gate: the verdict, the one counter that books the frame, and whether its bucket, and no other, has one more that is parked.
fn expect(
    bench: &Bench,
    frame: &Frame,
    counter: Counter,
    verdict: u32,
    parks: bool,
) -> anyhow::Result<()> {
    let change = bench.change(names::GATE, frame)?;
    assert_eq!(change.counted, [(counter, 1)], "{}", frame.name);
    assert_eq!(change.verdict, verdict, "{}", frame.name);
    let parked = parks.then(|| (bucket_of(frame), 1));
    let expected: Vec<_> = parked.into_iter().collect();
    assert_eq!(change.parked, expected, "{}", frame.name);
    Ok(())
}

#[test]
fn a_frame_goes_into_the_tunnel_of_either_family_and_a_group_frame_nowhere() -> anyhow::Result<()> {
    let mut bench = Bench::new()?;
    bench.set(Mode::Tunnel, false, 1)?;
    let v6 = Tunnel {
        family: 6,
        remote: [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1],
        ..TUNNEL
    };
    for tunnel in [TUNNEL, v6] {
        lead(&mut bench, tunnel)?;
        for frame in frames() {
            let (counter, verdict) = match is_group(&frame) {
                false => (Counter::ForwardedTunnel, REDIRECT),
                true => (Counter::RefusedGroup, DROP),
            };
            expect(&bench, &frame, counter, verdict, false)?;
        }
    }
    Ok(())
}

#[test]
fn a_bucket_that_waits_is_relayed_until_all_of_it_is_acknowledged() -> anyhow::Result<()> {
    let mut bench = Bench::new()?;
    lead(&mut bench, TUNNEL)?;
    bench.set(Mode::Tunnel, false, 1)?;
    for frame in frames().iter().filter(|frame| !is_group(frame)) {
        for waiting in [1, 5] {
            bench.let_wait(frame, waiting)?;
            expect(&bench, frame, Counter::ParkedForward, REDIRECT, true)?;
        }
        bench.let_wait(frame, 0)?;
        expect(&bench, frame, Counter::ForwardedTunnel, REDIRECT, false)?;
    }
    Ok(())
}

#[test]
fn without_a_tunnel_every_frame_is_relayed() -> anyhow::Result<()> {
    let mut bench = Bench::new()?;
    bench.set(Mode::Tunnel, false, 1)?;
    for frame in frames().iter().filter(|frame| !is_group(frame)) {
        bench.let_wait(frame, 0)?;
        expect(&bench, frame, Counter::ParkedForward, REDIRECT, true)?;
    }
    Ok(())
}

#[test]
fn an_echo_of_the_pod_is_dropped_once_the_old_way_has_ended() -> anyhow::Result<()> {
    let mut bench = Bench::new()?;
    bench.set(Mode::Tunnel, false, 1)?;
    lead(&mut bench, TUNNEL)?;
    expect(&bench, &echo(), Counter::RefusedEcho, DROP, false)
}

#[test]
fn a_frame_that_came_through_no_tunnel_does_not_land() -> anyhow::Result<()> {
    let mut bench = Bench::new()?;
    bench.set(Mode::Local, true, 1)?;
    let landing = Landing {
        tap: LOOPBACK,
        vni: 0,
        slot: SLOT,
        spare: 0,
    };
    bench.landings.insert(landing_key(POD), landing, 0)?;
    for (refused, frame) in (1..).zip(frames()) {
        let change = bench.change(names::LANDING, &frame)?;
        assert_eq!(change.verdict, DROP, "{}", frame.name);
        assert_eq!(change.counted, [], "{}", frame.name);
        let counted = bench.count(NO_SLOT_ROW, Counter::RefusedNoSlot)?;
        assert_eq!(counted, refused, "{}", frame.name);
    }
    Ok(())
}

#[test]
fn what_comes_from_the_nodes_own_bridge_goes_out_of_the_uplink_once_the_network_has_changed()
-> anyhow::Result<()> {
    let mut bench = Bench::new()?;
    lead(&mut bench, TUNNEL)?;
    // A frame of a test run came in by no device, so not by this one.
    let device = Device {
        park: LOOPBACK,
        out: LOOPBACK,
        tunnel: 0,
        uplink: 0,
        slot: SLOT,
        mac: POD,
    };
    bench.devices.insert(LOOPBACK, device, 0)?;
    for (mode, group, parks) in [
        (Mode::Hold, Counter::ParkedHold, true),
        (Mode::Forward, Counter::ParkedForward, true),
        (Mode::Tunnel, Counter::RefusedGroup, false),
    ] {
        bench.set(mode, false, 1)?;
        for frame in frames() {
            for waiting in [0, 5] {
                bench.let_wait(&frame, waiting)?;
                if !is_group(&frame) {
                    expect(&bench, &frame, Counter::SentOut, REDIRECT, false)?;
                } else if parks || waiting > 0 {
                    let group = if parks { group } else { Counter::ParkedForward };
                    expect(&bench, &frame, group, REDIRECT, true)?;
                } else {
                    expect(&bench, &frame, group, DROP, false)?;
                }
            }
        }
        let verdict = match mode {
            Mode::Tunnel => DROP,
            Mode::Shut | Mode::Local | Mode::Hold | Mode::Forward => REDIRECT,
        };
        bench.let_wait(&echo(), 0)?;
        expect(&bench, &echo(), Counter::RefusedEcho, verdict, false)?;
    }
    bench.set(Mode::Local, true, 2)?;
    for frame in frames() {
        bench.let_wait(&frame, 0)?;
        expect(&bench, &frame, Counter::Passed, NEXT, false)?;
    }
    Ok(())
}

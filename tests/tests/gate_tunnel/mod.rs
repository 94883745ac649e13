//! The verdicts of a gate that may use the tunnel, and of the program at the tunnel's other end.

use super::*;

const TUNNEL: Tunnel = Tunnel {
    device: LOOPBACK,
    vni: 77,
    family: 4,
    remote: [127, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
};

fn lead(bench: &mut Bench, tunnel: Tunnel) -> anyhow::Result<()> {
    Ok(bench.tunnels.set(u32::from(SLOT), tunnel, 0)?)
}

#[test]
fn a_frame_goes_into_the_tunnel_of_either_family_and_a_group_frame_nowhere() -> anyhow::Result<()> {
    let mut bench = Bench::new()?;
    bench.set(Mode::Tunnel, false)?;
    let v6 = Tunnel {
        family: 6,
        remote: [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1],
        ..TUNNEL
    };
    for tunnel in [TUNNEL, v6] {
        lead(&mut bench, tunnel)?;
        for (name, frame) in frames() {
            let (counter, verdict) = match frame[0] & 1 {
                0 => (Counter::ForwardedTunnel, REDIRECT),
                _ => (Counter::RefusedGroup, DROP),
            };
            assert_eq!(bench.gate(&frame, counter)?, verdict, "{name}");
            assert_eq!(bench.parked(&frame)?, 0, "{name}");
        }
    }
    Ok(())
}

#[test]
fn a_bucket_that_waits_is_relayed_until_all_of_it_is_acknowledged() -> anyhow::Result<()> {
    let mut bench = Bench::new()?;
    lead(&mut bench, TUNNEL)?;
    let waiting = frame(POD, PEER, 0x0800, &ipv4(0));
    let other = frame(POD, PEER, 0x86dd, &ipv6(17));
    bench.set(Mode::Forward, false)?;
    bench.gate(&waiting, Counter::ParkedForward)?;
    bench.set(Mode::Tunnel, false)?;
    assert_eq!(bench.gate(&waiting, Counter::ParkedForward)?, REDIRECT);
    assert_eq!(bench.parked(&waiting)?, 2);
    assert_eq!(bench.gate(&other, Counter::ForwardedTunnel)?, REDIRECT);
    bench.finish(&waiting)?;
    assert_eq!(bench.gate(&waiting, Counter::ForwardedTunnel)?, REDIRECT);
    assert_eq!(bench.parked(&waiting)?, 2);
    Ok(())
}

#[test]
fn without_a_tunnel_every_frame_is_relayed() -> anyhow::Result<()> {
    let mut bench = Bench::new()?;
    bench.set(Mode::Tunnel, false)?;
    let frame = frame(POD, PEER, 0x0800, &ipv4(0));
    assert_eq!(bench.gate(&frame, Counter::ParkedForward)?, REDIRECT);
    assert_eq!(bench.parked(&frame)?, 1);
    bench.finish(&frame)?;
    lead(&mut bench, TUNNEL)?;
    assert_eq!(bench.gate(&frame, Counter::ForwardedTunnel)?, REDIRECT);
    Ok(())
}

#[test]
fn an_echo_of_the_pod_is_dropped_once_the_old_way_has_ended() -> anyhow::Result<()> {
    let mut bench = Bench::new()?;
    bench.set(Mode::Tunnel, false)?;
    lead(&mut bench, TUNNEL)?;
    let echo = frame([0xff; 6], POD, 0x0806, &[0; 46]);
    assert_eq!(bench.gate(&echo, Counter::RefusedEcho)?, DROP);
    Ok(())
}

#[test]
fn a_frame_that_came_through_no_tunnel_does_not_land() -> anyhow::Result<()> {
    let mut bench = Bench::new()?;
    bench.set(Mode::Local, true)?;
    let landing = Landing {
        tap: LOOPBACK,
        vni: 0,
        slot: SLOT,
        spare: 0,
    };
    bench.landings.insert(landing_key(POD), landing, 0)?;
    let mut refused = 0;
    for (name, frame) in frames() {
        assert_eq!(bench.run(names::LANDING, &frame)?, DROP, "{name}");
        refused += 1;
        assert_eq!(bench.count(u32::from(SLOT), Counter::Landed)?, 0, "{name}");
        let counted = bench.count(NO_SLOT_ROW, Counter::RefusedNoSlot)?;
        assert_eq!(counted, refused, "{name}");
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
        slot: SLOT,
        mac: POD,
    };
    bench.devices.insert(LOOPBACK, device, 0)?;
    for (mode, group, echo) in [
        (Mode::Hold, Counter::ParkedHold, REDIRECT),
        (Mode::Forward, Counter::ParkedForward, REDIRECT),
        (Mode::Tunnel, Counter::ParkedForward, DROP),
    ] {
        bench.set(mode, false)?;
        for (name, frame) in frames() {
            let before = bench.parked(&frame)?;
            let counter = if frame[0] & 1 == 0 {
                Counter::SentOut
            } else {
                group
            };
            assert_eq!(bench.gate(&frame, counter)?, REDIRECT, "{mode:?} {name}");
            let parked = bench.parked(&frame)? - before;
            assert_eq!(parked, u64::from(counter == group), "{mode:?} {name}");
        }
        let own = frame([0xff; 6], POD, 0x0806, &[0; 46]);
        assert_eq!(bench.gate(&own, Counter::RefusedEcho)?, echo, "{mode:?}");
    }
    bench.set(Mode::Local, true)?;
    let frame = frame(POD, PEER, 0x9999, b"a bucket with nothing parked");
    assert_eq!(bench.gate(&frame, Counter::Passed)?, NEXT);
    Ok(())
}

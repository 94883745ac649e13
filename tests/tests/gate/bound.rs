//! The guard's verdicts on flows that another node translates.

use migrator_ebpf::{Counter, FrameBytes, Lead, Mark, Mode, Tunnel, marked, names, sent_key};

use crate::bench::{Bench, DROP, LOOPBACK, NEXT, REDIRECT, SLOT};
use crate::frames::{Frame, frames};

const HOME: Tunnel = Tunnel {
    device: LOOPBACK,
    vni: marked(77, Mark::Home),
    family: 4,
    remote: [127, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
};

fn expect(bench: &Bench, frame: &Frame, counter: Counter, verdict: u32) -> anyhow::Result<()> {
    let change = bench.change(names::GUARD, frame)?;
    assert_eq!(change.counted, [(counter, 1)], "{}", frame.name);
    assert_eq!(change.verdict, verdict, "{}", frame.name);
    Ok(())
}

#[test]
fn a_frame_of_a_bound_flow_goes_into_the_tunnel_and_every_other_out() -> anyhow::Result<()> {
    let mut bench = Bench::new()?;
    bench.set(Mode::Local, true, 1)?;
    let mut led = 0;
    for frame in frames() {
        let Some(key) = sent_key(&FrameBytes(&frame.bytes), SLOT) else {
            bench.led.set(u32::from(SLOT), 1, 0)?;
            expect(&bench, &frame, Counter::Sent, NEXT)?;
            continue;
        };
        led += 1;
        let lead = Lead {
            tunnel: HOME,
            until_s: 1,
        };
        bench.leads.insert(key, lead, 0)?;
        // Only where the slot is said to have any.
        bench.led.set(u32::from(SLOT), 0, 0)?;
        expect(&bench, &frame, Counter::Sent, NEXT)?;
        bench.led.set(u32::from(SLOT), 1, 0)?;
        expect(&bench, &frame, Counter::SentBound, REDIRECT)?;
        bench.set(Mode::Local, false, 2)?;
        expect(&bench, &frame, Counter::Blocked, DROP)?;
        bench.set(Mode::Local, true, 3)?;
        // Ended: its home has sent a frame back.
        let ended = Lead { until_s: 0, ..lead };
        bench.leads.insert(key, ended, 0)?;
        expect(&bench, &frame, Counter::Sent, NEXT)?;
        bench.leads.remove(&key)?;
        expect(&bench, &frame, Counter::Sent, NEXT)?;
    }
    assert!(led > 3, "{led} frames have a flow");
    Ok(())
}

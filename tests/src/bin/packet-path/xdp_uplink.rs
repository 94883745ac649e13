//! From the uplink to the TAP: by the uplink's program, and by the bridge.
//!
//! UDP takes the fast way; TCP of the same size is left to the kernel, and goes over the bridge and through the
//! gate. A run ends before the TAP's queue is full; then the queue is read, and every frame must be there.

use std::os::fd::AsFd;

use anyhow::{Result, ensure};
use migrator::network::{Port, VNET_HEADER, XdpChoice};

use crate::ground::{GATED, Ground, mac};
use crate::live::{FRAME, FRAMES, Live, TCP, UDP, frame};
use crate::schedule::{Place, settle};
use crate::tell;

/// Measures and prints.
///
/// # Errors
/// The network cannot be made, or a frame does not arrive.
pub(crate) fn measure(runs: u32) -> Result<()> {
    let ground = Ground::new(XdpChoice::On)?;
    let port = ground.attach(GATED)?;
    ground.within(|| -> Result<()> {
        settle(Place::Sender)?;
        let live = Live::load(&ground)?;
        // The first run of each is to warm up.
        for run in 0..=runs {
            for (side, protocol) in [("ours", UDP), ("peer", TCP)] {
                let measured = once(&ground, &port, &live, protocol);
                if run > 0 {
                    tell(side, measured);
                } else {
                    measured?;
                }
            }
        }
        Ok(())
    })
}

fn once(
    ground: &Ground,
    port: &Port,
    live: &Live,
    protocol: u8,
) -> Result<Vec<(&'static str, f64)>> {
    let before = ground.reasons(port)?;
    let took = live.receive(&frame(mac(GATED).0, [10, 77, 0, 10], protocol))?;
    drain(port, protocol)?;
    let now = ground.reasons(port)?;
    let took_it = match protocol {
        UDP => now.fast - before.fast,
        _ => now.passed - before.passed,
    };
    ensure!(took_it >= u64::from(FRAMES), "{before:?} {now:?}");
    Ok(took.figures(FRAMES))
}

/// Every frame must be in the TAP's queue.
fn drain(port: &Port, protocol: u8) -> Result<()> {
    let tap = port.tap_fd()?;
    let mut buffer = vec![0; 2_000];
    let mut count = 0;
    while let Ok(len) = nix::unistd::read(tap.as_fd(), &mut buffer) {
        let frame = &buffer[VNET_HEADER..len];
        count += u32::from(frame.len() == FRAME && frame[23] == protocol);
    }
    ensure!(count == FRAMES, "{count} of {FRAMES} frames arrived");
    Ok(())
}

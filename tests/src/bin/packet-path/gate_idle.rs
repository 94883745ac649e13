//! The cost of an open gate: frames to a port with the programs, and to one without them, as fast as one thread can send.
//!
//! The sender's thread does everything up to the TAP's queue itself: a veth hands a frame to the soft interrupt of the same CPU, which
//! runs before the send returns. So its CPU time is that of the path. Slices of the two sides take turns within a run, and a run's
//! figure is the median of its slices: a neighbour on the machine spoils slices, not runs.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Result, ensure};
use aya::sys::{Stats, enable_stats};
use migrator::network::XdpChoice;
use migrator_tests::packet::PacketSocket;

use crate::frames::{Frames, Kind};
use crate::ground::{BARE, GATED, Ground, TO_BRIDGE, mac};
use crate::guest::{Guest, Inbox};
use crate::schedule::{Place, cpu_time, settle};
use crate::sender::{BUFFER, send};
use crate::{DEADLINE, median, note, tell};

/// Frames of a slice: fewer than a TAP's queue holds, so none is lost whatever the reader does.
const SLICE: u64 = 20_000;
/// Slices of each side in a run.
const SLICES: u32 = 30;
const QUICK_SLICES: u32 = 12;

/// One port with its reader.
struct Side {
    frames: Frames,
    inbox: Arc<Inbox>,
    sent: u64,
    rates: Vec<f64>,
    cpu_ns: Vec<f64>,
}

impl Side {
    fn new(kind: Kind, slot: u16) -> Side {
        Side {
            frames: Frames::new(kind, mac(slot)),
            inbox: Arc::default(),
            sent: 0,
            rates: Vec::new(),
            cpu_ns: Vec::new(),
        }
    }

    /// Sends a slice, and waits until the reader has it.
    fn slice(&mut self, socket: &PacketSocket) -> Result<()> {
        let (begun, before) = (Instant::now(), cpu_time()?);
        for number in self.sent..self.sent + SLICE {
            send(socket, self.frames.number(number))?;
        }
        let (took, used) = (begun.elapsed(), cpu_time()? - before);
        self.sent += SLICE;
        self.rates.push(SLICE as f64 / took.as_secs_f64());
        self.cpu_ns.push(used.as_nanos() as f64 / SLICE as f64);
        ensure!(
            self.inbox.wait_for(self.sent),
            "of {} frames {} have arrived after {DEADLINE:?}",
            self.sent,
            self.inbox.count()
        );
        Ok(())
    }

    fn take(&mut self) -> Vec<(&'static str, f64)> {
        let (rates, cpu_ns) = (
            std::mem::take(&mut self.rates),
            std::mem::take(&mut self.cpu_ns),
        );
        vec![("rate", median(&rates)), ("CPU time", median(&cpu_ns))]
    }
}

/// Measures and prints.
///
/// # Errors
/// The network cannot be made, or a frame does not arrive.
pub(crate) fn measure(kind: Kind, runs: u32, quick: bool) -> Result<()> {
    let ground = Ground::new(XdpChoice::Off)?;
    let (gated, bare) = (ground.attach(GATED)?, ground.attach_bare()?);
    let (mut ours, mut peer) = (Side::new(kind, GATED), Side::new(kind, BARE));
    let guests = [
        Guest::start(gated.tap_fd()?, &ours.inbox, Place::Receiver, true),
        Guest::start(bare.tap_fd()?, &peer.inbox, Place::Receiver, true),
    ];
    let slices = if quick { QUICK_SLICES } else { SLICES };
    let ground = &ground;
    let measured = std::thread::scope(|scope| -> Result<()> {
        // The sender of this case is the thread that takes the times.
        let thread = scope.spawn(move || -> Result<()> {
            let socket = ground
                .outside
                .netns
                .spawn(|| PacketSocket::sender(TO_BRIDGE, BUFFER))
                .join()
                .map_err(|_| anyhow::anyhow!("the outside cannot be entered"))??;
            settle(Place::Sender)?;
            // Caches and neighbours.
            ours.slice(&socket)?;
            peer.slice(&socket)?;
            for _ in 0..runs {
                ours.take();
                peer.take();
                for slice in 0..slices {
                    if slice % 2 == 0 {
                        ours.slice(&socket)?;
                        peer.slice(&socket)?;
                    } else {
                        peer.slice(&socket)?;
                        ours.slice(&socket)?;
                    }
                }
                let (mut mine, theirs) = (ours.take(), peer.take());
                mine.push((
                    "program",
                    program_ns(ground, &mut ours, &mut peer, &socket)?,
                ));
                tell("ours", Ok(mine));
                tell("peer", Ok(theirs));
            }
            for side in [&ours, &peer] {
                crate::guest::faultless(side.inbox.defects(side.sent))?;
            }
            Ok(())
        });
        match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    });
    for guest in guests {
        guest.stop()?;
    }
    note(
        "one thread sends and carries each frame to the TAP's queue: the rate is what its CPU can do, sender included",
    );
    measured
}

/// The gate's own time for a frame, by the kernel's count; and a proof that it runs on the one side only.
fn program_ns(
    ground: &Ground,
    ours: &mut Side,
    peer: &mut Side,
    socket: &PacketSocket,
) -> Result<f64> {
    // Only now: counting costs every program of the machine two reads of the clock.
    let _counts = enable_stats(Stats::RunTime)?;
    let before = ground.gate()?;
    ours.slice(socket)?;
    let between = ground.gate()?;
    peer.slice(socket)?;
    let after = ground.gate()?;
    let runs = between.run_count() - before.run_count();
    ensure!(
        runs >= SLICE,
        "the gate ran {runs} times for {SLICE} frames"
    );
    let stray = after.run_count() - between.run_count();
    ensure!(
        stray < SLICE / 100,
        "the gate ran {stray} times on the port without it"
    );
    let time = between.run_time() - before.run_time();
    Ok(time.as_nanos() as f64 / runs as f64)
}

//! A hold of 30 ms under 300,000 frames a second, then a rollback: what of it is lost, and how fast the guest gets it. Beside it a plain
//! packet socket that takes the same frames off a device, keeps them, and sends them into a TAP through another.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use migrator::network::{Port, PortError, Stage, XdpChoice, tap_name};
use migrator_tests::packet::PacketSocket;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::sync::mpsc;

use crate::frames::{Frames, Kind, number_of};
use crate::ground::{BARE, GATED, Ground, RAW, TO_BRIDGE, TO_RAW, mac};
use crate::guest::{BUFFER, Defects, Guest, Inbox};
use crate::schedule::{Place, settle};
use crate::sender::{self, Sender, Sent, send};
use crate::{note, tell};

/// Frames a second.
const RATE: u64 = 300_000;
/// How long the gate holds.
const HOLD: Duration = Duration::from_millis(30);
/// Frames that pass before it does.
const BEFORE: u64 = 3_000;
/// How long the guest gets to empty its TAP, as in a migration.
const DRAINS_WITHIN: Duration = Duration::from_millis(5);
/// What the plain socket may keep in the kernel: a hold of the largest frames.
const SOCKET_BUFFER: usize = 1 << 30;
/// A sender that is this share of the rate is at its rate.
const ENOUGH: f64 = 0.97;

/// Measures and prints.
///
/// # Errors
/// The network cannot be made.
pub(crate) fn measure(kind: Kind, runs: u32) -> Result<()> {
    let ground = Ground::new(XdpChoice::Off)?;
    let (port, bare) = (ground.attach(GATED)?, ground.attach_bare()?);
    // The first runs of both warm the machine up.
    ours(&ground, &port, kind)?;
    peer(&ground, &bare, kind)?;
    let mut offered = Vec::new();
    for _ in 0..runs {
        let run = ours(&ground, &port, kind);
        if let Ok(run) = &run {
            offered.push(run.sent.rate());
        }
        tell("ours", run.map(Run::figures));
        tell("peer", peer(&ground, &bare, kind).map(Run::figures));
    }
    let offered = crate::median(&offered);
    if offered < RATE as f64 * ENOUGH {
        note(&format!(
            "the sender is the bottleneck: it offers {offered:.0} of {RATE} frames a second"
        ));
    }
    Ok(())
}

struct Run {
    sent: Sent,
    defects: Defects,
    /// Frames that waited, and how long the guest needed to get them.
    waited: u64,
    drained_in: Duration,
}

impl Run {
    fn figures(self) -> Vec<(&'static str, f64)> {
        let Defects {
            lost,
            doubled,
            overtaken,
        } = self.defects;
        vec![
            ("lost", lost as f64),
            ("doubled or overtaken", (doubled + overtaken) as f64),
            ("offered", self.sent.rate()),
            ("parked", self.waited as f64),
            (
                "drain rate",
                self.waited as f64 / self.drained_in.as_secs_f64(),
            ),
        ]
    }
}

fn ours(ground: &Ground, port: &Port, kind: Kind) -> Result<Run> {
    let inbox = Arc::new(Inbox::default());
    let guest = Guest::start(port.tap_fd()?, &inbox, Place::Receiver, false);
    let frames = Frames::new(kind, mac(GATED));
    let sender = Sender::start(&ground.outside, TO_BRIDGE, frames, RATE);
    sender.wait_for(BEFORE)?;
    let begun = Instant::now();
    // What the log is sent to: nobody, as in a migration whose link is gone. It is kept all the same.
    let (sink, log) = mpsc::unbounded_channel();
    drop(log);
    let held = port.clone();
    ground.call(async move {
        held.hold(sink).await?;
        held.drain_tap(DRAINS_WITHIN).await;
        Ok::<_, PortError>(())
    })??;
    guest.stop()?;
    let held = port.clone();
    ground.call(async move { held.residue().await })??;
    // Not a wait for anything: this is how long the gate holds.
    std::thread::sleep(HOLD.saturating_sub(begun.elapsed()));
    let sent = sender.stop()?;
    let waited = sent.frames.saturating_sub(inbox.count());
    let begun = Instant::now();
    // The sender has left its CPU.
    let guest = Guest::start(port.tap_fd()?, &inbox, Place::Sender, false);
    let held = port.clone();
    ground.call(async move { held.rollback().await })??;
    let local = port.clone();
    ground.call(async move { local.reached(Stage::Local).await })??;
    finish(guest, &inbox, sent, waited, begun)
}

/// Waits for the last frame, and counts.
fn finish(guest: Guest, inbox: &Inbox, sent: Sent, waited: u64, begun: Instant) -> Result<Run> {
    // Frames that are lost are waited for as well, until the deadline.
    inbox.wait_for(sent.frames);
    guest.stop()?;
    ensure!(
        waited > 0,
        "nothing was parked of {} frames in {HOLD:?}",
        sent.frames
    );
    let last = inbox.last().context("the guest got nothing")?;
    Ok(Run {
        sent,
        defects: inbox.defects(sent.frames),
        waited,
        drained_in: last.saturating_duration_since(begun),
    })
}

fn peer(ground: &Ground, bare: &Port, kind: Kind) -> Result<Run> {
    let runs = Arc::new(AtomicBool::new(true));
    let goes_on = Arc::clone(&runs);
    let open = ground
        .netns
        .spawn(|| PacketSocket::receiver(RAW, SOCKET_BUFFER));
    let socket = open
        .join()
        .map_err(|_| anyhow!("the receiver panicked"))??;
    let keeper = std::thread::spawn(move || keep(&socket, &goes_on));
    let frames = Frames::new(kind, mac(BARE));
    let sender = Sender::start(&ground.outside, TO_RAW, frames, RATE);
    sender.wait_for(1)?;
    std::thread::sleep(HOLD);
    let sent = sender.stop()?;
    runs.store(false, Ordering::Release);
    let kept = keeper
        .join()
        .map_err(|_| anyhow!("the receiver panicked"))??;
    let inbox = Arc::new(Inbox::default());
    let tap = bare.tap_fd()?;
    let begun = Instant::now();
    let guest = Guest::start(tap, &inbox, Place::Sender, false);
    let waited = kept.len() as u64;
    let inject = ground.netns.spawn(move || -> Result<()> {
        settle(Place::Receiver)?;
        let socket = PacketSocket::sender(&tap_name(BARE), sender::BUFFER)?;
        kept.iter().try_for_each(|frame| send(&socket, frame))
    });
    inject
        .join()
        .map_err(|_| anyhow!("the injector panicked"))??;
    finish(guest, &inbox, sent, waited, begun)
}

/// Takes frames until nobody sends any more and none is left.
fn keep(socket: &PacketSocket, goes_on: &AtomicBool) -> Result<Vec<Box<[u8]>>> {
    settle(Place::Receiver)?;
    let mut buffer = vec![0; BUFFER];
    let mut kept = Vec::new();
    loop {
        // Asked first, so that what came before the end is still taken.
        let last = !goes_on.load(Ordering::Acquire);
        while let Some(length) = socket.receive(&mut buffer)? {
            let frame = &buffer[..length];
            if number_of(frame).is_some() {
                kept.push(frame.into());
            }
        }
        if last {
            return Ok(kept);
        }
        let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::from(5u8))?;
    }
}

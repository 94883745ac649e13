//! A hold of 30 ms under 300,000 frames a second, then a rollback: what of it is lost, and how fast the guest gets it. Beside it plain
//! sockets that take the same frames off a device, keep them, and send them into a TAP.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use migrator::network::{Port, PortError, Stage, XdpChoice};
use tokio::sync::mpsc;

use crate::frames::Kind;
use crate::ground::{BARE, GATED, Ground, TO_BRIDGE, TO_RAW, mac};
use crate::guest::{Defects, Guest, Inbox};
use crate::plain::{Plain, Sockets};
use crate::schedule::Place;
use crate::sender::{Sender, Sent};
use crate::{note, tell};

/// How long the gate holds.
const HOLD: Duration = Duration::from_millis(30);
/// Frames that pass before it does.
const BEFORE: u64 = 3_000;
/// How long the guest gets to empty its TAP, as in a migration.
const DRAINS_WITHIN: Duration = Duration::from_millis(5);
/// A sender that is this share of the rate is at its rate.
const ENOUGH: f64 = 0.97;

/// Measures and prints.
///
/// # Errors
/// The network cannot be made.
pub(crate) fn measure(kind: Kind, sockets: Sockets, rate: u64, runs: u32) -> Result<()> {
    // Only a veth with a program takes what the kernel makes; it cuts segments, and takes none of these whole.
    let xdp = match kind {
        Kind::Small | Kind::Large => XdpChoice::On,
        Kind::Segments => XdpChoice::Off,
    };
    let ground = Ground::new(xdp)?;
    let (port, bare) = (ground.attach(GATED)?, ground.attach_bare()?);
    let plain = Plain::new(&ground, sockets, kind != Kind::Segments)?;
    // The first runs of both warm the machine up.
    ours(&ground, &port, kind, rate)?;
    peer(&ground, &bare, &plain, (kind, rate))?;
    let mut offered = Vec::new();
    for _ in 0..runs {
        let run = ours(&ground, &port, kind, rate);
        if let Ok(run) = &run {
            offered.push(run.sent.rate());
        }
        tell("ours", run.map(Run::figures));
        tell(
            "peer",
            peer(&ground, &bare, &plain, (kind, rate)).map(Run::figures),
        );
    }
    let offered = crate::median(&offered);
    let limit = match offered < rate as f64 * ENOUGH {
        true => ", which is what the sender manages",
        false => "",
    };
    note(&format!(
        "{offered:.0} of {rate} frames a second offered to ours{limit}"
    ));
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

fn ours(ground: &Ground, port: &Port, kind: Kind, rate: u64) -> Result<Run> {
    let inbox = Arc::new(Inbox::default());
    let guest = Guest::start(port.tap_fd()?, &inbox, Place::Receiver, false);
    let sender = Sender::start(&ground.outside, TO_BRIDGE, (kind, mac(GATED)), rate)?;
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

fn peer(ground: &Ground, bare: &Port, plain: &Plain, (kind, rate): (Kind, u64)) -> Result<Run> {
    let keeper = plain.keep(ground)?;
    let sender = Sender::start(&ground.outside, TO_RAW, (kind, mac(BARE)), rate)?;
    sender.wait_for(1)?;
    std::thread::sleep(HOLD);
    let sent = sender.stop()?;
    let kept = keeper.stop()?;
    let inbox = Arc::new(Inbox::default());
    let tap = bare.tap_fd()?;
    let guest = Guest::start(tap, &inbox, Place::Sender, false);
    let waited = kept.len() as u64;
    let begun = plain.inject(ground, &kept)?;
    finish(guest, &inbox, sent, waited, begun)
}

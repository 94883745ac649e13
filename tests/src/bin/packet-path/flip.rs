//! From the store that closes the gate to the first frame on the new way.
//!
//! The sender looks at the gate's word before each frame and takes the time before the look and after the send. Its last look at the old
//! word began before the store, and the first frame that was parked was past the gate when its send returned:
//!
//! ```text
//!   sender   look  send | look  send | look  send |
//!   word     old        | old   ^store          new
//!            way: TAP          TAP         park
//!                         '----- at most -----'
//! ```
//!
//! So the time between the two is an upper bound, and the sender's pace is its resolution.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use aya::maps::{Array, Map, MapData};
use migrator::network::{LogKind, Port, Stage, XdpChoice};
use migrator_ebpf::{flip_of, names};
use migrator_tests::packet::PacketSocket;
use tokio::sync::mpsc;

use crate::frames::{Frames, Kind, number_of};
use crate::ground::{GATED, Ground, TO_BRIDGE, mac};
use crate::guest::{Guest, Inbox, faultless};
use crate::schedule::{Place, settle};
use crate::sender::{BUFFER, send};
use crate::{DEADLINE, median, note, tell};

/// Flips of a run.
const FLIPS: u32 = 40;
const QUICK_FLIPS: u32 = 20;
/// Frames that pass before a flip.
const BEFORE: u64 = 2_000;
/// A run-away sender ends here.
const FRAMES_MAX: u64 = 200_000;

/// What the sender knows of each frame.
#[derive(Clone, Copy, Debug)]
struct Look {
    /// The gate's word before it was sent.
    word: u64,
    /// Before that look.
    from: Instant,
    /// When the send had returned.
    until: Instant,
}

/// Measures and prints.
///
/// # Errors
/// The network cannot be made.
pub(crate) fn measure(runs: u32, quick: bool) -> Result<()> {
    let ground = Ground::new(XdpChoice::Off)?;
    let port = ground.attach(GATED)?;
    let flips = if quick { QUICK_FLIPS } else { FLIPS };
    let mut rates = Vec::new();
    // Once to warm up.
    flip(&ground, &port, &mut Vec::new())?;
    for _ in 0..runs {
        tell("ours", run(&ground, &port, flips, &mut rates));
    }
    note(&format!(
        "an upper bound: the sender's pace is the resolution, {:.1} us a frame",
        1e6 / median(&rates)
    ));
    Ok(())
}

fn run(
    ground: &Ground,
    port: &Port,
    flips: u32,
    rates: &mut Vec<f64>,
) -> Result<Vec<(&'static str, f64)>> {
    let (mut bounds_us, mut holds_us) = (Vec::new(), Vec::new());
    for _ in 0..flips {
        let (bound, hold) = flip(ground, port, rates)?;
        bounds_us.push(bound.as_nanos() as f64 / 1e3);
        holds_us.push(hold.as_nanos() as f64 / 1e3);
    }
    Ok(vec![
        ("store to the first parked", median(&bounds_us)),
        (
            "slowest of a run",
            bounds_us.iter().copied().fold(0.0, f64::max),
        ),
        ("the call of hold", median(&holds_us)),
    ])
}

/// One flip there and back: from the store to the first frame on the new way, and how long the call took.
fn flip(ground: &Ground, port: &Port, rates: &mut Vec<f64>) -> Result<(Duration, Duration)> {
    let inbox = Arc::new(Inbox::default());
    let guest = Guest::start(port.tap_fd()?, &inbox, Place::Receiver, false);
    let words = words(ground)?;
    let (runs, sent) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicU64::new(0)));
    let (goes_on, progress) = (Arc::clone(&runs), Arc::clone(&sent));
    let sender = ground
        .outside
        .netns
        .spawn(move || look_and_send(&words, &goes_on, &progress));
    let until = Instant::now() + DEADLINE;
    while sent.load(Ordering::Acquire) < BEFORE {
        ensure!(
            !sender.is_finished() && Instant::now() < until,
            "the sender does not send"
        );
        std::thread::yield_now();
    }
    let (sink, mut log) = mpsc::unbounded_channel();
    let held = port.clone();
    let hold = ground.call(async move {
        let begun = Instant::now();
        held.hold(sink).await.map(|()| begun.elapsed())
    })??;
    let first = ground.call(async move {
        loop {
            let item = log.recv().await?;
            if item.kind == LogKind::Frame
                && let Some(number) = number_of(&item.frame)
            {
                return Some(number);
            }
        }
    })?;
    runs.store(false, Ordering::Release);
    let looks = match sender.join() {
        Ok(result) => result?,
        Err(panic) => std::panic::resume_unwind(panic),
    };
    let first = first.context("nothing was parked")?;
    let back = port.clone();
    ground.call(async move {
        back.rollback().await?;
        back.reached(Stage::Local).await
    })??;
    let count = looks.len() as u64;
    inbox.wait_for(count);
    guest.stop()?;
    faultless(inbox.defects(count))?;
    if let (Some(first), Some(last)) = (looks.first(), looks.last()) {
        rates.push(count as f64 / (last.until - first.from).as_secs_f64());
    }
    Ok((bound(&looks, first)?, hold))
}

fn words(ground: &Ground) -> Result<Array<MapData, u64>> {
    let data = MapData::from_pin(ground.map(names::GATES))?;
    Ok(Array::try_from(Map::Array(data))?)
}

fn look_and_send(
    words: &Array<MapData, u64>,
    goes_on: &AtomicBool,
    progress: &AtomicU64,
) -> Result<Vec<Look>> {
    settle(Place::Sender)?;
    let socket = PacketSocket::sender(TO_BRIDGE, BUFFER)?;
    let mut frames = Frames::new(Kind::Small, mac(GATED));
    let mut looks = Vec::with_capacity(FRAMES_MAX as usize);
    for number in 0..FRAMES_MAX {
        if !goes_on.load(Ordering::Acquire) {
            break;
        }
        let from = Instant::now();
        let word = flip_of(words.get(&u32::from(GATED), 0)?);
        send(&socket, frames.number(number))?;
        looks.push(Look {
            word,
            from,
            until: Instant::now(),
        });
        progress.store(number + 1, Ordering::Release);
    }
    Ok(looks)
}

/// From the last look at the old word until the first parked frame was past the gate.
fn bound(looks: &[Look], first: u64) -> Result<Duration> {
    let old = looks.first().context("nothing was sent")?.word;
    let last_old = looks
        .iter()
        .take_while(|look| look.word == old)
        .last()
        .context("no look at the old word")?;
    let parked = usize::try_from(first)
        .ok()
        .and_then(|first| looks.get(first))
        .context("a frame was parked that was not sent")?;
    Ok(parked.until.saturating_duration_since(last_old.from))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bound_is_from_the_last_look_at_the_old_word_to_the_end_of_the_first_parked_send() {
        let start = Instant::now();
        let at = |us| start + Duration::from_micros(us);
        let look = |word, from, until| Look {
            word,
            from: at(from),
            until: at(until),
        };
        let looks = [look(1, 0, 2), look(1, 3, 5), look(2, 6, 8), look(2, 9, 11)];
        assert_eq!(bound(&looks, 1).unwrap(), Duration::from_micros(2));
        assert_eq!(bound(&looks, 2).unwrap(), Duration::from_micros(5));
        assert!(bound(&looks, 4).is_err());
        assert!(bound(&[], 0).is_err());
    }
}

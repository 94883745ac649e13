//! The thread that sends numbered frames at a steady rate, until it is told to stop.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use migrator_tests::packet::PacketSocket;

use crate::DEADLINE;
use crate::frames::Frames;
use crate::ground::Outside;
use crate::schedule::{Place, settle};

/// Frames that leave one after the other, before the pace is looked at again.
const BURST: u64 = 30;

/// What a sender may have on its way: a receiver that keeps the largest frames must not slow it down.
pub(crate) const BUFFER: usize = 1 << 30;

/// What was sent.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sent {
    /// Frames, numbered from 0.
    pub(crate) frames: u64,
    /// How long that took.
    pub(crate) took: Duration,
}

impl Sent {
    /// Frames a second.
    pub(crate) fn rate(self) -> f64 {
        self.frames as f64 / self.took.as_secs_f64()
    }
}

/// A running sender.
pub(crate) struct Sender {
    runs: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    thread: JoinHandle<Result<Sent>>,
}

impl Sender {
    /// Sends `rate` frames a second out of a device of the outside, or as many as it can.
    pub(crate) fn start(
        outside: &Outside,
        device: &'static str,
        mut frames: Frames,
        rate: u64,
    ) -> Sender {
        let runs = Arc::new(AtomicBool::new(true));
        let sent = Arc::new(AtomicU64::new(0));
        let (go_on, progress) = (Arc::clone(&runs), Arc::clone(&sent));
        let thread = outside.netns.spawn(move || {
            settle(Place::Sender)?;
            let socket = PacketSocket::sender(device, BUFFER)?;
            let pace = Duration::from_nanos(BURST * 1_000_000_000 / rate);
            let begun = Instant::now();
            let (mut due, mut number) = (begun, 0);
            while go_on.load(Ordering::Acquire) {
                for _ in 0..BURST {
                    send(&socket, frames.number(number))?;
                    number += 1;
                }
                progress.store(number, Ordering::Release);
                due += pace;
                // Sleeping is not exact enough: ten bursts fit a millisecond.
                while Instant::now() < due {
                    std::hint::spin_loop();
                }
            }
            Ok(Sent {
                frames: number,
                took: begun.elapsed(),
            })
        });
        Sender { runs, sent, thread }
    }

    /// Waits until so many frames have left.
    ///
    /// # Errors
    /// The sender has failed.
    pub(crate) fn wait_for(&self, frames: u64) -> Result<()> {
        let until = Instant::now() + DEADLINE;
        while self.sent.load(Ordering::Acquire) < frames {
            ensure!(
                !self.thread.is_finished() && Instant::now() < until,
                "the sender does not get to {frames} frames"
            );
            std::thread::yield_now();
        }
        Ok(())
    }

    /// Ends it.
    ///
    /// # Errors
    /// It has failed.
    pub(crate) fn stop(self) -> Result<Sent> {
        self.runs.store(false, Ordering::Release);
        match self.thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

/// Gives one frame to the device, as soon as it takes it.
///
/// # Errors
/// It never does.
pub(crate) fn send(socket: &PacketSocket, frame: &[u8]) -> Result<()> {
    if socket.send(frame)? {
        return Ok(());
    }
    let until = Instant::now() + DEADLINE;
    while !socket.send(frame)? {
        ensure!(Instant::now() < until, "the device's queue stays full");
        std::hint::spin_loop();
    }
    Ok(())
}

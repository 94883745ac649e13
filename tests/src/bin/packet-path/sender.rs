//! Numbered frames at a steady rate, until the sender is told to stop.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};
use migrator_tests::packet::PacketSocket;
use vm_runtime::units::MacAddress;

use crate::DEADLINE;
use crate::flood::Flood;
use crate::frames::{Frames, Kind};
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

/// What makes frames.
enum Source {
    /// The kernel.
    Kernel(Arc<Flood>),
    /// A thread that sends one after the other: what is not cut yet is longer than the kernel makes.
    Thread(Arc<Progress>),
}

#[derive(Default)]
struct Progress {
    stop: AtomicBool,
    sent: AtomicU64,
}

/// A running sender.
pub(crate) struct Sender {
    source: Source,
    thread: JoinHandle<Result<Sent>>,
}

impl Sender {
    /// Sends `rate` frames a second out of a device of the outside, or as many as it can.
    ///
    /// # Errors
    /// The kernel lacks something.
    pub(crate) fn start(
        outside: &Outside,
        device: &'static str,
        (kind, pod): (Kind, MacAddress),
        rate: u64,
    ) -> Result<Sender> {
        let frames = Frames::new(kind, pod);
        if kind == Kind::Segments {
            let progress = Arc::new(Progress::default());
            let told = Arc::clone(&progress);
            return Ok(Sender {
                source: Source::Thread(progress),
                thread: outside
                    .netns
                    .spawn(move || send_all(frames, device, rate, &told)),
            });
        }
        let flood = outside
            .netns
            .spawn(move || Flood::new(&frames, device, rate));
        let flood = flood.join().map_err(|_| anyhow!("the sender panicked"))??;
        let flood = Arc::new(flood);
        let runs = Arc::clone(&flood);
        Ok(Sender {
            source: Source::Kernel(flood),
            thread: outside.netns.spawn(move || {
                settle(Place::Sender)?;
                runs.run()?;
                runs.sent()
            }),
        })
    }

    fn sent(&self) -> Result<u64> {
        match &self.source {
            Source::Kernel(flood) => Ok(flood.sent()?.frames),
            Source::Thread(progress) => Ok(progress.sent.load(Ordering::Acquire)),
        }
    }

    /// Waits until so many frames have left.
    ///
    /// # Errors
    /// The sender has failed.
    pub(crate) fn wait_for(&self, frames: u64) -> Result<()> {
        let until = Instant::now() + DEADLINE;
        while self.sent()? < frames {
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
        match &self.source {
            Source::Kernel(flood) => flood.stop()?,
            Source::Thread(progress) => progress.stop.store(true, Ordering::Release),
        }
        match self.thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

fn send_all(mut frames: Frames, device: &str, rate: u64, progress: &Progress) -> Result<Sent> {
    settle(Place::Sender)?;
    let socket = PacketSocket::sender(device, BUFFER)?;
    let pace = Duration::from_nanos(BURST * 1_000_000_000 / rate);
    let begun = Instant::now();
    let (mut due, mut number) = (begun, 0);
    while !progress.stop.load(Ordering::Acquire) {
        for _ in 0..BURST {
            send(&socket, frames.number(number))?;
            number += 1;
        }
        progress.sent.store(number, Ordering::Release);
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

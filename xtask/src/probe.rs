//! A UDP probe: numbered packets to the pod's echo at a steady rate, every answer timed by the client's kernel.

use std::io::IoSliceMut;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg, setsockopt, sockopt};
use nix::sys::time::TimeSpec;

use crate::silence::{
    Answer, RoundTrip, Summary, Tally, longest, round_trips, summarise, unanswered,
};
use crate::{netns, sched};

/// Bytes of UDP payload: number, nonce, zeros.
const PAYLOAD: usize = 64;
/// Receive buffer in bytes: seconds of answers in one burst must not be lost here.
const BUFFER: usize = 32 << 20;
/// How long the next answer is awaited after the last packet, or after the last answer: a guest that is behind gives them all the same.
const SILENCE: Duration = Duration::from_secs(2);
/// The same once every packet is answered: what comes then is a double.
const QUIET: Duration = Duration::from_millis(500);
/// How long answers are awaited at all.
const LINGER: Duration = Duration::from_secs(30);

/// A running probe.
pub struct Probe {
    stop: Arc<AtomicBool>,
    sender: JoinHandle<Sent>,
    receiver: JoinHandle<Vec<Answer>>,
    live: Arc<Live>,
}

/// What both threads tell while they run.
#[derive(Default)]
struct Live {
    sent: AtomicU64,
    answered: AtomicU64,
    tally: Mutex<Tally>,
}

struct Sent {
    /// When each packet left, by its number.
    at_us: Vec<u64>,
    /// Packets that the kernel refused to take; they are not part of `at_us`.
    refused: u64,
    last_error: Option<std::io::Error>,
}

/// Everything that a probe recorded.
#[derive(Debug)]
pub struct Record {
    sent_us: Vec<u64>,
    answers: Vec<Answer>,
    /// Packets that the kernel refused to take, with the last reason; they do not count as sent.
    pub refused: Option<(u64, String)>,
}

impl Record {
    /// Loss, doubles, order, silence.
    pub fn summary(&self) -> Summary {
        summarise(&self.sent_us, &self.answers)
    }

    /// How long each answered packet took, in the order in which these left.
    pub fn round_trips(&self) -> Vec<RoundTrip> {
        round_trips(&self.sent_us, &self.answers)
    }

    /// Longest silence in milliseconds around a moment (microseconds of Unix time): 200 ms before to 1500 ms after.
    pub fn blackout_ms(&self, frozen_at_unix_us: u64) -> f64 {
        longest(
            &self.answers,
            self.sent_us.last().copied(),
            frozen_at_unix_us.saturating_sub(200_000),
            frozen_at_unix_us + 1_500_000,
        )
    }

    /// Packets that left before a moment (microseconds of Unix time) and were never answered.
    pub fn lost_before(&self, at_unix_us: u64) -> usize {
        unanswered(&self.sent_us, &self.answers, usize::MAX)
            .iter()
            .filter(|(_, left_us)| *left_us < at_unix_us)
            .count()
    }

    /// The first packets that were never answered, and when they left, in microseconds of Unix time.
    pub fn unanswered(&self) -> Vec<(u64, u64)> {
        unanswered(&self.sent_us, &self.answers, 8)
    }
}

impl Probe {
    /// Starts sending `rate` packets a second from the namespace to an echo.
    ///
    /// # Errors
    /// The namespace cannot be entered, or there is no route to the target.
    pub fn start(netns: &str, target: SocketAddr, rate: u32) -> Result<Probe> {
        let socket = Arc::new(netns::within(netns, || open(target))?);
        let stop = Arc::new(AtomicBool::new(false));
        let live = Arc::new(Live::default());
        // Tells this probe's answers from those of an earlier one.
        let nonce = now_us() ^ u64::from(std::process::id()).rotate_left(48);
        let receiver = {
            let (socket, stop, live) = (socket.clone(), stop.clone(), live.clone());
            std::thread::Builder::new()
                .name("probe-rx".into())
                .spawn(move || receive(&socket, nonce, &stop, &live))?
        };
        let sender = {
            let (stop, live) = (stop.clone(), live.clone());
            let interval = Duration::from_secs(1) / rate;
            std::thread::Builder::new()
                .name("probe-tx".into())
                .spawn(move || send(&socket, target, nonce, interval, &stop, &live))?
        };
        Ok(Probe {
            stop,
            sender,
            receiver,
            live,
        })
    }

    /// Answers so far.
    pub fn answered(&self) -> u64 {
        self.live.answered.load(Ordering::Relaxed)
    }

    /// Packets so far.
    pub fn sent(&self) -> u64 {
        self.live.sent.load(Ordering::Relaxed)
    }

    /// Doubles and order so far, and up to which packet none is missing.
    pub fn tally(&self) -> Tally {
        self.live
            .tally
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Stops sending, waits for late answers, and returns everything.
    ///
    /// # Errors
    /// A thread of the probe panicked.
    pub fn stop(self) -> Result<Record> {
        self.stop.store(true, Ordering::Relaxed);
        let sent = self
            .sender
            .join()
            .map_err(|_| anyhow!("the probe's sender panicked"))?;
        let answers = self
            .receiver
            .join()
            .map_err(|_| anyhow!("the probe's receiver panicked"))?;
        let refused = sent
            .last_error
            .map(|error| (sent.refused, error.to_string()));
        Ok(Record {
            sent_us: sent.at_us,
            answers,
            refused,
        })
    }
}

/// Sends one datagram to an echo every 100 ms until it answers; whether it did within `limit`.
///
/// # Errors
/// The namespace cannot be entered.
pub fn answers(netns: &str, target: SocketAddr, limit: Duration) -> Result<bool> {
    let socket = netns::within(netns, || open(target))?;
    socket.set_read_timeout(Some(Duration::from_millis(100)))?;
    let deadline = Instant::now() + limit;
    let mut buffer = [0; PAYLOAD];
    while Instant::now() < deadline {
        // No neighbour yet is no answer yet.
        let started = Instant::now();
        let _ = socket.send_to(b"ready?", target);
        if socket.recv(&mut buffer).is_ok() {
            return Ok(true);
        }
        std::thread::sleep(Duration::from_millis(100).saturating_sub(started.elapsed()));
    }
    Ok(false)
}

fn open(target: SocketAddr) -> Result<UdpSocket> {
    // Not connected: an ICMP error for one packet must not make the kernel refuse the next.
    let socket = UdpSocket::bind(if target.is_ipv4() {
        "0.0.0.0:0"
    } else {
        "[::]:0"
    })
    .context("cannot open a UDP socket")?;
    setsockopt(&socket, sockopt::RcvBufForce, &BUFFER)
        .context("cannot enlarge the receive buffer: this needs root")?;
    setsockopt(&socket, sockopt::ReceiveTimestampns, &true)
        .context("the kernel does not time received packets")?;
    Ok(socket)
}

fn send(
    socket: &UdpSocket,
    target: SocketAddr,
    nonce: u64,
    interval: Duration,
    stop: &AtomicBool,
    live: &Live,
) -> Sent {
    sched::prefer_this_thread();
    // 50 us of the default slack would be a quarter of the interval.
    let _ = nix::sys::prctl::set_timerslack(1);
    let mut sent = Sent {
        at_us: Vec::with_capacity(1 << 20),
        refused: 0,
        last_error: None,
    };
    let mut packet = [0; PAYLOAD];
    packet[8..16].copy_from_slice(&nonce.to_le_bytes());
    let mut due = Instant::now();
    while !stop.load(Ordering::Relaxed) {
        packet[..8].copy_from_slice(&(sent.at_us.len() as u64).to_le_bytes());
        let at = now_us();
        match socket.send_to(&packet, target) {
            Ok(_) => {
                sent.at_us.push(at);
                live.sent.fetch_add(1, Ordering::Relaxed);
            }
            Err(error) => {
                sent.refused += 1;
                sent.last_error = Some(error);
            }
        }
        due += interval;
        let early = due.saturating_duration_since(Instant::now());
        if !early.is_zero() {
            std::thread::sleep(early);
        }
    }
    sent
}

fn receive(socket: &UdpSocket, nonce: u64, stop: &AtomicBool, live: &Live) -> Vec<Answer> {
    sched::prefer_this_thread();
    let mut answers = Vec::with_capacity(1 << 20);
    let mut packet = [0; PAYLOAD];
    let mut control = nix::cmsg_space!(TimeSpec);
    let mut ending: Option<Ending> = None;
    // Poll so that the end is noticed also while nothing comes.
    let _ = socket.set_read_timeout(Some(Duration::from_millis(50)));
    loop {
        if ending.is_none() && stop.load(Ordering::Relaxed) {
            ending = Some(Ending::begin(Instant::now()));
        }
        let (sent, answered) = (&live.sent, &live.answered);
        if let Some(ending) = &ending
            && ending.is_over(
                Instant::now(),
                answered.load(Ordering::Relaxed) >= sent.load(Ordering::Relaxed),
            )
        {
            return answers;
        }
        let mut space = [IoSliceMut::new(&mut packet)];
        let Ok(message) = recvmsg::<()>(
            socket.as_raw_fd(),
            &mut space,
            Some(&mut control),
            MsgFlags::empty(),
        ) else {
            continue;
        };
        let at_us = message
            .cmsgs()
            .ok()
            .and_then(|mut messages| messages.find_map(kernel_time))
            .unwrap_or_else(now_us);
        if message.bytes == PAYLOAD && packet[8..16] == nonce.to_le_bytes() {
            let mut number = [0; 8];
            number.copy_from_slice(&packet[..8]);
            let sequence = u64::from_le_bytes(number);
            answers.push(Answer { sequence, at_us });
            if let Some(ending) = &mut ending {
                ending.last = Instant::now();
            }
            live.answered.fetch_add(1, Ordering::Relaxed);
            live.tally
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .add(sequence);
        }
    }
}

/// What comes after the last packet.
struct Ending {
    began: Instant,
    /// The last answer, or its begin.
    last: Instant,
}

impl Ending {
    fn begin(now: Instant) -> Self {
        Self {
            began: now,
            last: now,
        }
    }

    /// Whether nothing is awaited any more.
    fn is_over(&self, now: Instant, all_answered: bool) -> bool {
        let silence = if all_answered { QUIET } else { SILENCE };
        now.duration_since(self.last) >= silence || now.duration_since(self.began) >= LINGER
    }
}

/// When the kernel received the packet (SO_TIMESTAMPNS, CLOCK_REALTIME): our own scheduling is not in it.
fn kernel_time(message: ControlMessageOwned) -> Option<u64> {
    if let ControlMessageOwned::ScmTimestampns(time) = message {
        let (seconds, nanoseconds) = (
            u64::try_from(time.tv_sec()).ok()?,
            u64::try_from(time.tv_nsec()).ok()?,
        );
        return Some(seconds * 1_000_000 + nanoseconds / 1_000);
    }
    None
}

/// Microseconds of Unix time.
pub fn now_us() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| {
            u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_blackout_is_the_silence_around_the_freeze() {
        let at = |sequence, at_us| Answer { sequence, at_us };
        let record = Record {
            sent_us: vec![0; 4],
            answers: vec![
                at(0, 10_000_000),
                at(1, 10_030_000),
                at(2, 20_000_000),
                at(3, 20_000_200),
            ],
            refused: None,
        };
        assert_eq!(record.blackout_ms(10_010_000), 9_970.0);
        assert_eq!(record.blackout_ms(20_200_100), 0.2);
    }

    #[test]
    fn losses_are_told_from_those_of_before() {
        let record = Record {
            sent_us: vec![1_000, 2_000, 3_000, 4_000],
            answers: vec![Answer {
                sequence: 1,
                at_us: 2_500,
            }],
            refused: None,
        };
        assert_eq!(record.lost_before(1_000), 0);
        assert_eq!(record.lost_before(3_000), 1);
        assert_eq!(record.lost_before(5_000), 3);
    }

    #[test]
    fn a_probe_waits_as_long_as_answers_come() {
        let begin = Instant::now();
        let mut ending = Ending::begin(begin);
        assert!(!ending.is_over(begin + QUIET / 2, true));
        assert!(ending.is_over(begin + QUIET, true));
        assert!(!ending.is_over(begin + QUIET, false));
        assert!(ending.is_over(begin + SILENCE, false));
        ending.last = begin + SILENCE;
        assert!(!ending.is_over(begin + SILENCE + QUIET, false));
        ending.last = begin + LINGER;
        assert!(ending.is_over(begin + LINGER, false));
    }
}

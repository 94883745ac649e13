//! Connection tracking moves with the pod: entries are read at the source, made at the destination before its first packet, and fade
//! at the source. See docs/conntrack.md for what moves, when, and what does not.
//!
//! [`flow`] is what an entry is, [`codec`] how ctnetlink writes it, [`socket`] the conversation. The files above know no sockets.
//! What cannot move is led back: [`home`] is the node that translates, [`lead`] the one where the pod is, [`bound`] what the one tells the other.

mod bound;
mod codec;
mod flow;
mod home;
mod lead;
mod port;
mod socket;

use std::io;
use std::net::IpAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use nix::errno::Errno;

pub use bound::Bound;
pub use flow::{Flow, FlowError, Key, SeqAdj, State, Tuple};
pub(super) use home::keep;
pub use home::{Keeper, Kept};
pub(super) use lead::Homeward;
pub use lead::Led;
use port::blocking;
pub use port::{FlowNews, Flows};
use socket::{Change, Socket};

/// There if the kernel has connection tracking, built in or loaded, whatever the namespace.
const TRACKING: &str = "/proc/sys/net/netfilter/nf_conntrack_max";
/// How many entries the namespace of the calling thread has.
const COUNT: &str = "/proc/sys/net/netfilter/nf_conntrack_count";

/// The kernel does not tell of its connection tracking, or takes nothing.
#[derive(Debug, thiserror::Error)]
#[error(
    "could not {action} connection tracking: the service needs root, and the kernel CONFIG_NF_CT_NETLINK"
)]
pub struct ConntrackError {
    action: &'static str,
    source: io::Error,
}

fn failed(action: &'static str) -> impl Fn(io::Error) -> ConntrackError {
    move |source| ConntrackError { action, source }
}

/// What became of flows that another node sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Taken {
    /// Made here, or brought up to date.
    pub moved: u64,
    /// Refused by this kernel.
    pub failed: u64,
    /// This kernel tracks no connections, so that none was made.
    pub untracked: u64,
}

/// What is done with an entry that this node has already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Known {
    /// It is brought up to date: the other node has seen the flow last.
    Update,
    /// It is left alone: this node may have seen more of the flow.
    Keep,
}

/// Whether this kernel tracks connections. If not, whoever asks ctnetlink would load the module.
pub(super) fn is_tracking() -> bool {
    Path::new(TRACKING).exists()
}

/// Flows of a pod with these addresses, in the namespace of the calling thread. Blocks.
///
/// # Errors
/// See [`ConntrackError`].
pub(super) fn dump(pod: &[IpAddr]) -> Result<Vec<Flow>, ConntrackError> {
    // The kernel looks through the table of all namespaces to find that there is nothing, and a guest stands still meanwhile.
    let none = std::fs::read_to_string(COUNT).is_ok_and(|count| count.trim() == "0");
    if none || !is_tracking() {
        return Ok(Vec::new());
    }
    let dumped = Socket::open().and_then(|mut socket| socket.dump(pod));
    dumped.map_err(failed("read"))
}

/// Entries that one pod may bring: what a large machine's kernel tracks in all by default.
const MOST: u64 = 262_144;

/// The entries that this node has made for one pod, so that it can take them back.
#[derive(Clone, Debug, Default)]
pub(super) struct Made(Arc<Mutex<Book>>);

#[derive(Debug, Default)]
struct Book {
    made: Vec<Flow>,
    taken: Taken,
    /// Those that come too late are not made.
    closed: bool,
}

impl Made {
    /// Makes entries of these flows. Blocks.
    ///
    /// # Errors
    /// See [`ConntrackError`]. A flow that the kernel refuses is none: it is counted.
    pub(super) fn take(&self, flows: &[Flow], known: Known) -> Result<(), ConntrackError> {
        // Held throughout, so that nothing is made behind `undo`.
        let mut book = self.lock();
        if book.closed {
            return Ok(());
        }
        let count = flows.len() as u64;
        if !is_tracking() {
            book.taken.untracked += count;
            return Ok(());
        }
        let moved = book.taken.moved;
        let result = match moved + count <= MOST {
            true => book.take(flows, known),
            false => Ok(()),
        };
        // Refused, beyond the limit, or not come to.
        book.taken.failed += count - (book.taken.moved - moved);
        result
    }

    /// The pod is here for good: what was made is its own.
    pub(super) fn keep(&self) {
        self.lock().made = Vec::new();
    }

    /// Counts flows that are not to be made.
    pub(super) fn refuse(&self, flows: &[Flow]) {
        let mut book = self.lock();
        for flow in flows {
            tracing::warn!(
                ?flow,
                "an entry that this node's own address is translated by is not taken"
            );
            book.taken.failed += 1;
        }
    }

    /// What became of all flows so far.
    pub(super) fn taken(&self) -> Taken {
        self.lock().taken
    }

    /// Removes what was made; nothing is made any more. Blocks.
    ///
    /// # Errors
    /// See [`ConntrackError`].
    pub(super) fn undo(&self) -> Result<(), ConntrackError> {
        let mut book = self.lock();
        book.closed = true;
        let made = std::mem::take(&mut book.made);
        if made.is_empty() {
            return Ok(());
        }
        let made: Vec<&Flow> = made.iter().collect();
        let removed = Socket::open().and_then(|mut socket| socket.change(Change::Delete, &made));
        // Whatever is gone already has ended by itself.
        removed.map(drop).map_err(failed("write"))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Book> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Book {
    fn take(&mut self, flows: &[Flow], known: Known) -> Result<(), ConntrackError> {
        let told = failed("write");
        let mut socket = Socket::open().map_err(&told)?;
        let all: Vec<&Flow> = flows.iter().collect();
        let mut there = Vec::new();
        // A kernel without the helper: the flow itself can still live on.
        let mut helpless = Vec::new();
        let results = socket.change(Change::Create, &all).map_err(&told)?;
        for (flow, result) in flows.iter().zip(results) {
            match result {
                Ok(()) => self.made(flow.clone()),
                // From an earlier stay, or because the flow passes here anyway.
                Err(Errno::EEXIST) => match known {
                    Known::Update => there.push(flow),
                    Known::Keep => self.taken.moved += 1,
                },
                Err(_) if !flow.helper.is_empty() => helpless.push(Flow {
                    helper: String::new(),
                    ..flow.clone()
                }),
                Err(errno) => refused(flow, errno),
            }
        }
        let all: Vec<&Flow> = helpless.iter().collect();
        let results = socket.change(Change::Create, &all).map_err(&told)?;
        for (flow, result) in helpless.iter().zip(results) {
            match result {
                Ok(()) => self.made(flow.clone()),
                Err(errno) => refused(flow, errno),
            }
        }
        let results = socket.change(Change::Update, &there).map_err(&told)?;
        for (flow, result) in there.into_iter().zip(results) {
            match result {
                Ok(()) => self.taken.moved += 1,
                Err(errno) => refused(flow, errno),
            }
        }
        Ok(())
    }

    fn made(&mut self, flow: Flow) {
        self.taken.moved += 1;
        self.made.push(flow);
    }
}

fn refused(flow: &Flow, errno: Errno) {
    tracing::warn!(?flow, %errno, "an entry of connection tracking is not taken");
}

/// Lets these flows go after so many seconds, unless packets of them still come by. Blocks.
///
/// # Errors
/// See [`ConntrackError`].
pub(super) fn fade(flows: &[Flow], seconds: u32) -> Result<(), ConntrackError> {
    // Those that would go sooner, go sooner.
    let flows: Vec<&Flow> = flows
        .iter()
        .filter(|flow| flow.timeout_s > seconds)
        .collect();
    if flows.is_empty() {
        return Ok(());
    }
    let faded = Socket::open().and_then(|mut socket| socket.change(Change::Fade(seconds), &flows));
    faded.map(drop).map_err(failed("write"))
}

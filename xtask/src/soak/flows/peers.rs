//! The programs that send and receive, as the driver speaks with them.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use super::kind::CONTROL_PORT;
use crate::netns;

/// For an order's answer, from a guest that may be standing still for a while.
const ANSWERS_WITHIN: Duration = Duration::from_secs(20);

/// One flow where it arrives, as the programs tell of it.
#[derive(Clone, Debug, Default, Deserialize)]
pub(super) struct Tally {
    pub(super) received: u64,
    pub(super) next: u64,
    pub(super) missing: u64,
    pub(super) first_missing: Vec<u64>,
    pub(super) doubled: u64,
    pub(super) reordered: u64,
    pub(super) changed: u64,
    pub(super) events: Vec<Event>,
}

impl Tally {
    /// Of so many that were sent, how many have not come.
    pub(super) fn lost(&self, sent: u64) -> u64 {
        self.missing + sent.saturating_sub(self.next)
    }

    /// Whether there is something that waiting does not mend.
    pub(super) fn is_wrong(&self) -> bool {
        self.doubled + self.reordered + self.changed > 0
    }
}

/// Something that must not be.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Event {
    pub(super) what: String,
    pub(super) number: u64,
    pub(super) count: u64,
    /// By the clock of the guest that saw it.
    pub(super) at_us: u64,
}

/// What arrived at the receiver of one sender's packets of one kind.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Arrived {
    pub(super) sender: u16,
    pub(super) kind: usize,
    pub(super) tally: Tally,
}

/// What a sender sent of one kind, and the answers.
#[derive(Clone, Debug, Default, Deserialize)]
pub(super) struct Sent {
    pub(super) sent: u64,
    pub(super) refused: u64,
    pub(super) refusal: String,
    pub(super) first_missing_left_us: u64,
    pub(super) answers: Tally,
}

/// Messages on TCP connections.
#[derive(Clone, Debug, Default, Deserialize)]
pub(super) struct Streams {
    pub(super) connections: u64,
    pub(super) sent: u64,
    pub(super) received: u64,
    pub(super) faults: Vec<String>,
}

/// All that a receiver tells.
#[derive(Clone, Debug, Default, Deserialize)]
pub(super) struct ReceiverStats {
    pub(super) flows: Vec<Arrived>,
    pub(super) streams: Streams,
    pub(super) counters: BTreeMap<String, u64>,
}

/// All that a sender tells.
#[derive(Clone, Debug, Default, Deserialize)]
pub(super) struct SenderStats {
    pub(super) flows: Vec<Sent>,
    pub(super) streams: Streams,
    pub(super) counters: BTreeMap<String, u64>,
}

/// A program that takes orders.
#[derive(Clone, Debug)]
pub(super) struct Peer {
    /// The namespace that it is spoken to from.
    pub(super) netns: String,
    /// Where it is.
    pub(super) address: IpAddr,
}

impl Peer {
    /// Sends an order; its answer.
    pub(super) fn order<T: for<'a> Deserialize<'a>>(&self, order: &str) -> Result<T> {
        let address = SocketAddr::new(self.address, CONTROL_PORT);
        let mut socket = netns::within(&self.netns, || {
            TcpStream::connect_timeout(&address, ANSWERS_WITHIN)
                .with_context(|| format!("nobody takes orders at {address}"))
        })?;
        socket.set_read_timeout(Some(ANSWERS_WITHIN))?;
        socket.write_all(format!("{order}\n").as_bytes())?;
        let mut line = String::new();
        BufReader::new(socket)
            .read_line(&mut line)
            .with_context(|| format!("{address} does not answer `{order}`"))?;
        if line.starts_with(r#"{"error""#) {
            bail!("{address} does not carry out `{order}`: {line}");
        }
        serde_json::from_str(&line).with_context(|| format!("{address} answers `{order}`: {line}"))
    }

    /// As [`order`](Self::order), if the answer says nothing.
    pub(super) fn tell(&self, order: &str) -> Result<()> {
        self.order::<serde_json::Value>(order).map(drop)
    }
}

//! What a port asks of its thread, and where both stand.

use std::sync::Arc;
use std::time::Instant;

use migrator_ebpf::Tunnel;
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::oneshot;

use super::super::allowance::OnOverflow;
use super::super::endpoints::EndMarks;
use super::super::error::PortError;
use super::super::ledger::Tally;
use super::super::log::LogItem;
use super::backlog::Backlog;

/// Where a port stands in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// The pod lives here and gets its frames.
    Local,
    /// Source: frames are parked, logged and kept.
    Holding,
    /// Source: the log goes back into the pod's own TAP.
    RollingBack,
    /// Source: the pod lives elsewhere; frames are relayed.
    Forwarding,
    /// Destination: the gate is shut; the log is injected.
    Incoming,
    /// Destination: the pod lives here; its own frames wait behind the log.
    Opened,
    /// Destination: waits for the end of the log.
    Settling,
    /// Nothing is taken any more.
    Released,
}

impl std::fmt::Display for Stage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Local => "local",
            Self::Holding => "holding",
            Self::RollingBack => "rolling back",
            Self::Forwarding => "forwarding",
            Self::Incoming => "incoming",
            Self::Opened => "opened",
            Self::Settling => "settling",
            Self::Released => "released",
        })
    }
}

pub(crate) type Reply<T> = oneshot::Sender<T>;

/// What the port asks of its thread.
#[derive(Debug)]
pub(crate) enum Command {
    Hold(UnboundedSender<LogItem>, Reply<Result<(), PortError>>),
    Resend(UnboundedSender<LogItem>, Reply<Result<(), PortError>>),
    OnOverflow(OnOverflow),
    DrainTap(Instant, Reply<bool>),
    Residue(Reply<Result<u64, PortError>>),
    Ack(u64),
    Rollback(Reply<Result<(), PortError>>),
    Forward(Reply<Result<(), PortError>>),
    /// The node's own bridge sends nothing here any more: the end marker follows what is in the park.
    End,
    /// The end marker follows when all of these have come.
    AwaitMarks(Arc<EndMarks>, Reply<Result<(), PortError>>),
    /// There is a tunnel to where the pod has gone.
    Tunnel(Tunnel, Reply<Result<(), PortError>>),
    Input(LogItem),
    Open(Reply<Result<(), PortError>>),
    Settle(Reply<Result<(), PortError>>),
    /// The connection that the log comes over has ended.
    SourceAway,
    /// Bring buckets that wait for lost frames up to date; whether to book those frames as lost in a crash.
    Resync(bool),
    Tally(Reply<Tally>),
    Backlog(Reply<(Tally, Backlog)>),
    /// Shut the gate: whatever still comes counts elsewhere.
    Shut(Reply<()>),
    /// Take what is in the park, then take nothing more.
    Drain(Reply<Tally>),
    /// End the thread, and leave everything as it is for the next service.
    Detach,
}

//! What a watcher sees of a migration, and the report it ends with.

use serde::{Deserialize, Serialize};

use crate::memory::compress::Compress;

/// Where a migration is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Dialing, and the destination's checks.
    Handshake,
    /// Chunks of images that the destination lacks.
    Image,
    /// First pass and rounds; the guest runs.
    Precopy,
    /// The guest stands still.
    Switchover,
    /// The destination runs the guest, which still lacks pages: they cross, and the source forwards what comes to it.
    Postcopy,
    /// The destination runs the guest; the source forwards what still comes to it.
    Forwarding,
    /// The grant was sent, and no answer came: the source asks until one does.
    InDoubt,
    /// Over; see the outcome.
    Done,
}

/// How a migration ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "result", content = "reason")]
pub enum Outcome {
    /// The destination runs the guest.
    Completed,
    /// The destination did not take the pod; the source runs the guest, as before.
    Refused(String),
    /// The source runs the guest, as before.
    Failed(String),
}

/// Memory figures of one migration.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MemoryReport {
    /// Guest RAM in bytes.
    pub bytes_ram: u64,
    /// Page bytes sent, headers included.
    pub bytes_sent: u64,
    /// Bytes of the pages that they stand for, those of zeros left out: what would have been sent without compression.
    #[serde(default)]
    pub bytes_raw: u64,
    /// What most of these pages were compressed with; `none` if they were not.
    #[serde(default = "uncompressed")]
    pub compress: Compress,
    /// Rounds, the first pass and the last one included.
    pub rounds: u32,
    /// Each round, in order.
    #[serde(default)]
    pub history: Vec<RoundReport>,
    /// Part of the time, in percent, for which the guest's CPUs stood still at the end of pre-copy.
    #[serde(default)]
    pub throttle_percent: u8,
    /// What the guest waited for after its resume; absent if it lacked nothing.
    #[serde(default)]
    pub faults: Option<FaultReport>,
    /// Pages compared by hash before the grant; 0 without `--verify`.
    pub pages_verified: u64,
    /// Pages that differed: anything but 0 aborts the migration.
    pub mismatched: u64,
}

fn uncompressed() -> Compress {
    Compress::None
}

/// What became of the pod's writable disks. All of it crosses before the grant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskReport {
    /// How many.
    pub disks: u32,
    /// Their size in bytes.
    pub bytes_size: u64,
    /// Bytes of them that were sent, holes and repetitions included.
    pub bytes: u64,
    /// Bytes on the wire, headers included.
    pub bytes_sent: u64,
    /// Rounds, the bulk and the last one included.
    pub rounds: u32,
    /// Of the bytes, those that crossed while the guest stood still.
    pub frozen_bytes: u64,
}

/// What of the pod's images was at the destination.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageReport {
    /// Their size in bytes.
    pub bytes_size: u64,
    /// Bytes of them that were there before.
    pub bytes_here: u64,
    /// Bytes of them that crossed before the guest resumed.
    pub bytes_before_resume: u64,
}

/// One round.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RoundReport {
    /// From 1.
    pub round: u32,
    /// Pages sent, zero pages included.
    pub pages: u64,
    /// Bytes sent, headers included.
    pub bytes: u64,
    /// From its first read to the destination's acknowledgement, in microseconds.
    pub duration_us: u64,
    /// Pages that the guest wrote since the scan before.
    pub dirtied: u64,
    /// Downtime that was predicted after it, in milliseconds.
    pub predicted_downtime_ms: f64,
}

/// Waits for pages after the resume.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FaultReport {
    /// Pages that were missing at the resume.
    pub missing: u64,
    /// Waits.
    pub count: u64,
    /// Half of them were shorter, in microseconds: from when the destination's service heard of the wait to the page in its place.
    pub p50_us: u64,
    /// 99 in 100 were shorter.
    pub p99_us: u64,
    /// 999 in 1,000 were shorter.
    pub p999_us: u64,
    /// The longest.
    pub max_us: u64,
    /// Upper bound in microseconds and count of each class of waits that has any.
    pub histogram: Vec<(u64, u64)>,
    /// From the resume to the last page, in microseconds.
    pub took_us: u64,
    /// Pages that were not the source's and came again; only compared with `--verify`.
    pub mismatched: u64,
}

/// Packet figures of one migration: each packet is counted once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PacketReport {
    /// Frames that either gate saw from the hold to the end of forwarding.
    pub seen: u64,
    /// Frames handed to the guest.
    pub delivered: u64,
    /// Frames still held: 0 at the end.
    pub held: u64,
    /// Of the delivered ones, those that the source sent on.
    pub forwarded: u64,
    /// Of those, the ones that went through the kernel's tunnel and not over the wire.
    #[serde(default)]
    pub tunnelled: u64,
    /// Frames refused with a reason (the other node's copy counts).
    pub refused: u64,
    /// Frames lost, for whatever reason.
    pub lost: u64,
    /// Of the lost ones, those that the source dropped because more came than it may keep: only with `--on-overflow drop`.
    #[serde(default)]
    pub lost_overflow: u64,
    /// Of the lost ones, those that found the source's queue full.
    #[serde(default)]
    pub lost_park: u64,
    /// `seen` less everything else, which must be 0: the books do not balance otherwise.
    #[serde(default)]
    pub unaccounted: i64,
}

/// What became of the pod's entries of connection tracking.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConntrackReport {
    /// Entries that are at the destination.
    pub moved: u64,
    /// Entries that its kernel refused.
    pub failed: u64,
    /// Entries that were not made because its kernel does not track connections.
    pub untracked: u64,
    /// Entries whose translation needs the source, or a node before it: they do not move, and their packets go on through that node.
    pub bound: u64,
    /// How many of them do not, so that their connections break; the log says why.
    #[serde(default)]
    pub bound_unserved: u64,
}

/// The final report of one migration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MigrationReport {
    /// Migration id, 32 hex digits.
    pub id: String,
    /// Pod.
    pub pod: String,
    /// Source node.
    pub from: String,
    /// Destination node.
    pub to: String,
    /// How the memory crossed: `precopy`, or `postcopy` if some of it came after the resume.
    pub mode: String,
    /// How it ended.
    pub outcome: Outcome,
    /// Milliseconds from the request until the guest runs at the destination and has all of its memory.
    pub total_ms: f64,
    /// Milliseconds from the source's stop to the destination's resume.
    pub downtime_ms: f64,
    /// Unix time of the freeze, in microseconds; 0 if it never froze.
    pub frozen_at_unix_us: u64,
    /// Memory figures.
    pub memory: MemoryReport,
    /// Writable disks; absent if the pod has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<DiskReport>,
    /// The images; absent if the destination did not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub images: Option<ImageReport>,
    /// Packet figures.
    pub packets: PacketReport,
    /// Connection tracking.
    #[serde(default)]
    pub conntrack: ConntrackReport,
    /// Microseconds of each step of the downtime, in order.
    pub phases: Vec<(String, u64)>,
}

/// One line of `migrate --watch` and the answer of `status`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MigrationStatus {
    /// Migration id, 32 hex digits.
    pub id: String,
    /// Pod.
    pub pod: String,
    /// Source node.
    pub from: String,
    /// Destination node.
    pub to: String,
    /// Where it is.
    pub phase: Phase,
    /// Round under way, from 1; 0 before the first.
    pub round: u32,
    /// Page bytes sent so far.
    pub bytes_sent: u64,
    /// Pages still to send, as last counted.
    pub pages_left: u64,
    /// Frame bytes of writable disks sent so far.
    #[serde(default)]
    pub disk_bytes_sent: u64,
    /// Bytes of writable disks that were written since they were sent.
    #[serde(default)]
    pub disk_bytes_left: u64,
    /// Measured bandwidth, bytes a second.
    pub bandwidth_bytes_per_s: u64,
    /// Measured dirty rate, bytes a second.
    pub dirty_bytes_per_s: u64,
    /// Predicted downtime were it frozen now, in milliseconds.
    pub predicted_downtime_ms: f64,
    /// Part of the time, in percent, for which the guest's CPUs stand still.
    #[serde(default)]
    pub throttle_percent: u8,
    /// Present when the phase is `done`.
    pub report: Option<MigrationReport>,
}

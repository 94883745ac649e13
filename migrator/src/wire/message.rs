//! What crosses the control connection.

mod control;
mod disks;
mod flows;
mod images;
mod places;
mod postcopy;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use vm_runtime::pod::PodSpec;
use vm_runtime::spec::VmSpec;
use vm_runtime::units::{self, Epoch, PageIndex};

pub use control::Control;
pub use disks::{DiskAck, DiskOffer, DisksDone};
pub use flows::{Bound, BoundTaken, Flows, FlowsTaken};
pub use images::{ChunksWanted, ImageLists, ImagesMoved, ListLengths, ListPiece};
pub use places::{EndWanted, Places, PlacesAck, PodPlace};
pub use postcopy::{FaultFigures, MemoryComplete, PageBits, StaleAck, StaleEnd, Wanted};

use crate::network::PodNetworks;
use crate::wire::id::MigrationId;

/// Structs of other crates cross the wire as JSON text inside the message, so that a neighbouring version may add fields.
mod json_text {
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de, ser};

    pub(super) fn serialize<T: Serialize, S: Serializer>(
        value: &T,
        s: S,
    ) -> Result<S::Ok, S::Error> {
        s.serialize_str(&serde_json::to_string(value).map_err(ser::Error::custom)?)
    }

    pub(super) fn deserialize<'de, T, D>(d: D) -> Result<T, D::Error>
    where
        T: de::DeserializeOwned,
        D: Deserializer<'de>,
    {
        serde_json::from_str(&String::deserialize(d)?).map_err(de::Error::custom)
    }
}

/// The source asks the destination to take a pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// This migration.
    pub migration: MigrationId,
    /// The epoch that the grant will carry: the one that follows the source's own.
    pub epoch: Epoch,
    /// Name of the source node; must be the name in its certificate.
    pub source: String,
    /// The pod.
    #[serde(with = "json_text")]
    pub pod: PodSpec,
    /// The VM, its machine type and CPU model included.
    #[serde(with = "json_text")]
    pub vm: VmSpec,
    /// Guest RAM.
    pub ram: units::Bytes,
    /// Version of the source's QEMU, such as `7.2.22`.
    pub qemu_version: String,
    /// What the user chose, as far as the destination needs it.
    pub options: OfferOptions,
    /// The pod's record at the source (container states, creation time), JSON. Opaque here.
    pub record: String,
    /// The images that its disks are made of.
    pub images: Vec<ImageOffer>,
    /// How pods are routed at the source; `None` if they are on a bridge.
    #[serde(skip)]
    pub routed: Option<RoutedOffer>,
    /// Its writable disks. From version 3 on.
    #[serde(skip)]
    pub disks: Vec<DiskOffer>,
    /// The lists of its images follow. From version 4 on; `None`: they are in the images' records.
    #[serde(skip)]
    pub lists: Option<ImageLists>,
}

/// What the destination must have in common with a source whose pods are routed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoutedOffer {
    /// The networks of all pods of the cluster.
    pub pods: PodNetworks,
    /// The longest packet of pods, in bytes.
    pub mtu: u32,
}

/// Choices of the user that the destination must know.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OfferOptions {
    /// Compare every page by hash before the grant.
    pub verify: bool,
}

/// One image of the pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageOffer {
    /// The image's record (digest, size; the chunks' digests unless they follow), JSON. Opaque here.
    pub record: String,
}

/// The destination takes the pod, if it gets these chunks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accept {
    /// Per image that lacks something: what it lacks. Empty when every image is there.
    pub wants: Vec<ImageWant>,
}

/// Chunks that the destination lacks of one image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageWant {
    /// Index into [`Offer::images`].
    pub image: u32,
    /// Chunk indices, ascending.
    pub chunks: Vec<u32>,
}

/// The destination does not take the pod, and has kept nothing of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refuse {
    /// For programs.
    pub code: RefuseCode,
    /// For people: what does not fit, and what to do.
    pub reason: String,
}

/// Why a destination refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RefuseCode {
    /// Not enough memory.
    Memory,
    /// Its QEMU is older than the source's.
    QemuVersion,
    /// Its QEMU does not know the machine type.
    MachineType,
    /// Its processor or QEMU does not offer the CPU model.
    CpuModel,
    /// Another accelerator: state saved under one does not load under the other.
    Accel,
    /// Its kernel lacks a feature.
    KernelFeature,
    /// An image is not there and cannot be built.
    Image,
    /// An address or MAC of the pod is in use there.
    AddressTaken,
    /// A pod of that name is there.
    NameTaken,
    /// It has another guest kernel or initramfs.
    GuestKernel,
    /// The pod or the node is in another migration, or this migration's id was decided before.
    Busy,
    /// No protocol version in common, or a message of another version.
    Version,
    /// The check itself failed.
    Internal,
    /// Its pods are on the network in another way, or on another network.
    Topology,
    /// No room for the pod's writable disks. Only said to a source that offers such.
    Disk,
}

/// All chunks that were wanted have been sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageDone;

/// The destination has made the guest's memory: pages may come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prepared;

/// The destination's VM waits for its state; until then the guest goes on at the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmWaits;

/// Every page of a round has been sent, and a barrier behind them on each data connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoundEnd {
    /// The round, from 1.
    pub round: u32,
    /// Pages sent in it, zero pages included.
    pub pages: u64,
}

/// Every page of a round is in the destination's memory. Only then the next round may start: pages of two rounds
/// never overtake each other on different connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoundAck {
    /// The round.
    pub round: u32,
}

/// The guest stands still, and this round was the last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryDone {
    /// The last round.
    pub round: u32,
    /// Pages sent in it, zero pages included.
    pub pages: u64,
}

/// The device state follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StateBegin;

/// A piece of the device state, in order. Raw bytes on the wire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateChunk(pub Bytes);

impl StateChunk {
    /// Bytes of device state that fit one frame with room to spare.
    pub const MAX: usize = 256 << 10;
}

/// The device state is complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StateEnd {
    /// Its size in bytes.
    pub bytes: u64,
}

/// What the destination needs besides memory and device state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Handover {
    /// Unix time of the guest's stop, in microseconds.
    pub stopped_at_unix_us: u64,
    /// State of the link to the guest agent and of the container logs. Opaque here.
    pub agent: Vec<u8>,
}

/// Hashes of consecutive pages of the frozen source. On the wire: `u64` first page, then `u64` hashes, little-endian.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageHashes {
    /// Page of the first hash.
    pub first: PageIndex,
    /// Eight bytes a page: see [`PageHashes::iter`].
    pub hashes: Bytes,
}

impl PageHashes {
    /// Pages whose hashes fit one frame.
    pub const MAX_PAGES: usize = 64 << 10;

    /// Hashes of the pages from `first` on.
    pub fn new(first: PageIndex, hashes: &[u64]) -> Self {
        let hashes: Vec<u8> = hashes.iter().flat_map(|h| h.to_le_bytes()).collect();
        Self {
            first,
            hashes: hashes.into(),
        }
    }

    /// The hashes, in page order.
    pub fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        let (hashes, _) = self.hashes.as_chunks::<8>();
        hashes.iter().map(|h| u64::from_le_bytes(*h))
    }
}

/// Every page's hash has been sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HashesEnd {
    /// Pages hashed.
    pub pages: u64,
}

/// Everything is loaded at the destination; it could run the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ready {
    /// Pages compared by hash; 0 without `verify`.
    pub verified: u64,
    /// Pages that differed.
    pub mismatched: u64,
}

/// The right to run the guest. The source has journaled that it gave it away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    /// Must be the offer's.
    pub epoch: Epoch,
}

/// The destination runs the guest. It has journaled that it owns it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Running {
    /// The granted epoch.
    pub epoch: Epoch,
    /// Unix time of the resume by the destination's clock, in microseconds.
    pub resumed_at_unix_us: u64,
    /// Microseconds of each step at the destination, in order.
    pub steps: Vec<(String, u64)>,
    /// The grant was taken and the guest could not be resumed: the pod failed at the destination.
    pub failed: Option<String>,
}

/// What a gate did with the packets of one migration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ledger {
    /// Frames that the gate saw.
    pub seen: u64,
    /// Handed to the guest here.
    pub delivered: u64,
    /// Still held.
    pub held: u64,
    /// Sent on to the other node.
    pub forwarded: u64,
    /// Refused with a reason.
    pub refused: u64,
    /// Lost.
    pub lost: u64,
}

/// The source has nothing left of the pod, and asks the destination to close the books.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Released {
    /// The migration: this may come over a link that opened with a [`Query`].
    pub migration: MigrationId,
    /// The source's packets.
    pub ledger: Ledger,
}

/// Before the grant: this side has given up, and keeps nothing (destination) or goes on by itself (source).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Abort {
    /// Why, for people.
    pub reason: String,
}

/// After a lost link: who runs the guest?
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Query {
    /// The migration.
    pub migration: MigrationId,
}

/// The answer to [`Query`]. It is final: it is in the destination's journal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueryReply {
    /// The migration asked about.
    pub migration: MigrationId,
    /// Who runs the guest.
    pub verdict: Verdict,
    /// The guest runs and lacks pages: which ones follows.
    pub wants_pages: bool,
}

/// Whose the guest is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// The destination took the grant: the source's copy must never run again.
    Running,
    /// The destination never took the grant, and never will: the source's copy goes on.
    Discarded,
}

/// Both sides send one every half second.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ping {
    /// The sender's clock in microseconds; comes back in [`Pong`].
    pub stamp_us: u64,
}

/// The answer to [`Ping`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pong {
    /// The ping's.
    pub stamp_us: u64,
}

/// The destination has closed the books: the answer to [`Released`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bye {
    /// The migration.
    pub migration: MigrationId,
    /// The destination's packets.
    pub ledger: Ledger,
}

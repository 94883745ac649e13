//! The wire between two nodes. This page is its specification.
//!
//! # Connections
//!
//! TLS 1.3 over TCP, certificates on both sides ([`tls`]). A node's certificate carries the DNS name `<node>.migrator`: the dialer
//! checks it against the node it meant, the listener against the names of its peers. A *session* is one control connection, and
//! as its shape says N data connections, one urgent connection and two fault connections, tied together by a session id ([`preamble`]):
//!
//! ```text
//! dialer                                          listener
//!   | TLS handshake                                  |
//!   | preamble: magic, versions, role, shape, id --->|
//!   |<--------- reply: magic, version or refusal ----|
//!   | frames <-------------------------------------->|
//! ```
//!
//! Preamble and reply are 32 and 12 bytes that never change. The listener chooses the highest version both speak; what a frame
//! holds is decided by that version, so an unknown type or trailing bytes are errors, not extensions. A session whose connections have
//! not all come within 10 s is dropped.
//!
//! # Frames
//!
//! `u32` little-endian length of what follows, `u8` type, payload ([`frame`]). Length 0 and type 0 are invalid. A frame is at most 1 MiB on
//! the control lane, 1 MiB and 64 bytes on the data lane, 128 KiB on the urgent lane, 64 KiB and 64 bytes on the fault lane; the length is
//! checked before anything is allocated.
//!
//! | lane | types | payload |
//! |---|---|---|
//! | control | `0x01`-`0x1e`, `0x20`-`0x28`, `0x31`-`0x33` ([`message`]) | postcard; `StateChunk`, `PageHashes`, `PageBits`, `Flows`, `Bound` and `ListPiece` raw |
//! | data | `0x41` Pages, `0x42` Zeros, `0x43` Barrier, `0x44` Chunk, `0x45` Packed, `0x46`-`0x49` Blocks, `0x4a` Absent ([`bulk`]) | fixed header, raw bytes |
//! | urgent | `0x61` Packet, `0x62` PacketAck, `0x63` Flows, `0x64` Bound ([`bulk`]) | fixed header, raw bytes |
//! | fault | `0x71` Request, `0x72` Pages ([`mod@fault`]) | fixed header, raw bytes |
//!
//! Version 2 adds `Flows` (both lanes) and `FlowsTaken`. Version 3 adds `Bound` (both lanes) and `BoundTaken`, [`Offer::disks`](message::Offer::disks),
//! `Blocks`, `DiskAck` and `DisksDone`. Over a session of an earlier version they are not sent; a pod with writable disks does not move over one.
//! Version 4 adds sessions of the shape *chunks* with `ChunksWanted` and `Absent`, [`Offer::lists`](message::Offer::lists), `ListPiece`, and
//! `ImagesMoved`. It knows disks on shared storage ([`SharedDisk`](vm_runtime::spec::SharedDisk) in the offered VM), which need no message of their own.
//!
//! # A migration
//!
//! ```text
//! source                                          destination
//!   | Offer ListPiece* ----------------------------->|  checks; on failure Refuse, and nothing is kept
//!   |<--------------------------------- Accept{wants}|
//!   | Chunk* (data), ImageDone --------------------->|  only if something is wanted
//!   |<--------------------------------------Prepared |  its memory is there; the VM is being started
//!   | Pages* Zeros* Barrier(n) (data) -------------->|
//!   | RoundEnd(n) ---------------------------------->|
//!   |<----------------------------------- RoundAck(n)|  every barrier seen, every page placed; then the next round
//!   .   ...                                          .
//!   |<-------------------------------------- VmWaits |  some time after Prepared: the VM waits, its gate is shut
//!   | gate to HOLD, stop: Packet* (urgent) --------->|  the log flows from here to the end, PacketAck comes back
//!   | Flows* --------------------------------------->|  the pod's entries of connection tracking
//!   | Bound* --------------------------------------->|  its flows that the source goes on translating
//!   | Handover ------------------------------------->|
//!   | Pages* Zeros* Barrier(last) (data) ----------->|  in parallel with
//!   | StateBegin StateChunk* StateEnd -------------->|  the device state
//!   | MemoryDone(last) ----------------------------->|
//!   | PageHashes* HashesEnd ------------------------>|  only with verify
//!   | journal HandedOver                             |
//!   |<--------------------------------------- Ready  |  memory placed, hashes compared, device state loaded
//!   | Grant ---------------------------------------->|  journal Owner; gate opens; the guest resumes
//!   |<------------------------------------- Running  |
//!   | Packet* until End (urgent) ------------------->|  the source's node forwards until the neighbours have learned;
//!   |                                                |  Flows, Bound (urgent) go before the first packet of a flow that is new
//!   | Released ------------------------------------->|  nothing is left at the source
//!   |<------------------------ FlowsTaken, BoundTaken |
//!   |<------------------------------------------ Bye |  the journal entry may be forgotten
//! ```
//!
//! With post-copy the guest stops before all of its memory has crossed. What is missing crosses afterwards; the source's guest stands still
//! and its pages no longer change, so the order in which they arrive is of no importance:
//!
//! ```text
//! source                                          destination
//!   | PageBits* StaleEnd{last: false} -------------->|  pages that are not there or too old become missing: whoever touches one waits
//!   |<------------------------------------- StaleAck |
//!   | gate to HOLD, stop                             |
//!   | PageBits* StaleEnd{last: true} --------------->|  in the place of the last round: what was written since
//!   | device state, Ready, Grant, Running            |  as above; devices may wait for pages already
//!   |<----------------------------- Request (fault)  |  somebody waits for a page
//!   | Pages (fault) -------------------------------->|
//!   | Pages* Zeros* (data) ------------------------->|  the others, hottest first
//!   |<------------------------------ MemoryComplete  |  now the source's copy dies
//! ```
//!
//! A pod with writable disks brings them along. Their rounds are counted apart and run before and beside those of memory; the guest's disks
//! are complete and durable at the destination before there is a grant, also with post-copy:
//!
//! ```text
//! source                                          destination
//!   | Offer{disks} --------------------------------->|  room for them?
//!   |<--------------------------------------Prepared |
//!   | Blocks* Barrier(n) (data) -------------------->|  what is allocated, then what was written since
//!   |<------------------------------------ DiskAck(n)|  placed and synced; then the next round
//!   .   ...                                          .
//!   | stop                                           |
//!   | Blocks* Barrier(last) (data) ----------------->|  beside the last pages and the device state
//!   | DisksDone(last) ------------------------------>|
//!   |<--------------------------------------- Ready  |  and every block is durable
//! ```
//!
//! Before the grant either side may send `Abort` and go its way: the destination has journaled that it discarded the guest before it
//! says so, the source has not given the right away. `Abort` crossing a `Grant` therefore means the same as the answer `Discarded`.
//!
//! # Chunks
//!
//! A node that lacks chunks of an image asks any peer for them, over a session of the shape *chunks* that it dials: control, and one data connection. It has nothing to do
//! with any migration, and a peer that is asked need not know the image. Many requests may be under way; each is answered once, in any order. The asker checks length and digest.
//!
//! ```text
//! dialer                                          listener
//!   | ChunksWanted{digests} (control) -------------->|
//!   |<------------------------------- Chunk (data) --|  as its digest says
//!   |<------------------------------ Absent (data) --|  it is not there
//! ```
//!
//! Which chunks an image has, and in which order they were read, follows the offer in pieces of 512 KiB ([`lists`]). The offer says how long the lists are: at most 262,144 chunks
//! of all images together, 64 GiB. Of an earlier version the digests are in the offer itself, which is one message: images of more than 3.3 GiB do not go over it.
//! An offer whose lists say `later` lets the destination run the guest before its images are complete: it then wants nothing up front, and says with `ImagesMoved`, behind
//! `Running`, what had come by then.
//!
//! # Places
//!
//! In a routed cluster each node dials each of its peers, and keeps a session of the shape *places* for as long as it lives. On it the dialer tells
//! of its own pods only, so a pair of nodes has two. The listener believes it about them as far as epochs allow, and acknowledges what its
//! programs know. Nobody has more than 512 pods; whoever claims more, or has another `vni`, loses the connection.
//!
//! ```text
//! dialer                                          listener
//!   | Places{seq, whole} --------------------------->|  what the dialer has; what the listener thought it had besides is gone
//!   |<--------------------------------- PlacesAck{seq}|
//!   | Places{seq} ---------------------------------->|  a pod has come (granted, started), or is gone (stopped)
//!   |<--------------------------------- PlacesAck{seq}|
//!   | EndWanted{pod, at, nonce} -------------------->|  a pod has left the dialer; said again until enough markers have come
//!   |            end markers, in the tunnel <========|  behind the listener's last frame for the pod by way of the dialer
//! ```
//!
//! # Lost links
//!
//! Both sides send `Ping` every 500 ms and answer with `Pong` ([`control`]); silence for 3 s, or any error on any connection, is the loss of the
//! session. A destination without the grant journals Discarded and keeps nothing. A source that has journaled HandedOver is in
//! doubt, and dials sessions of the shape *resume* until it knows:
//!
//! ```text
//! source                                          destination
//!   | Query(migration) ----------------------------->|  a destination still without the grant discards now, and the old
//!   |                                                |  session is void; an unknown migration is journaled as Discarded first
//!   |<--------------------- QueryReply(Running) -----|  the source's copy dies, the log goes on from the last ack
//!   |<--------------------- QueryReply(Discarded) ---|  the source goes on, in a new epoch
//! ```
//!
//! If the guest runs and lacks pages, `PageBits* Wanted` follow the reply: these are what the source sends from here on.
//!
//! Either answer is final.

pub mod batch;
pub mod bulk;
pub mod codec;
pub mod conn;
pub mod control;
pub mod fault;
pub mod frame;
pub mod id;
pub mod inflow;
mod listener;
pub mod lists;
pub mod message;
pub mod preamble;
pub mod session;
pub mod tls;

#[cfg(test)]
pub(crate) mod golden;
#[cfg(test)]
pub(crate) mod link_tests;

pub use batch::Batch;
pub use bulk::{Data, PacketKind, Urgent};
pub use conn::{Connection, LinkError, Reader, Writer};
pub use control::{ControlReceiver, ControlSender};
pub use fault::Fault;
pub use id::{MigrationId, SessionId};
pub use message::Control;
pub use preamble::Shape;
pub use session::{DialError, Limits, Listener, Session, dial, dial_shape};
pub use tls::TlsConfig;

//! What the programs say of what they do: each new word of a gate to the log, and each frame of a pod that somebody watches to a ring.
//! Neither changes what becomes of a frame.

use aya_ebpf::helpers::generated::bpf_skb_load_bytes;
use aya_ebpf::helpers::{bpf_get_smp_processor_id, bpf_ktime_get_ns, bpf_xdp_load_bytes};
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, RingBuf};
use aya_ebpf::programs::{TcContext, XdpContext};
use aya_log_ebpf::debug;
use core::intrinsics::{AtomicOrdering, atomic_xadd};
use migrator_ebpf::{
    Counter, CounterRow, Direction, Gate, LOGGED_WORD, MAX_SLOTS, TRACE_HEAD, TRACE_RING_BYTES,
    TraceEvent, flip_of, is_watched,
};

use super::{BPF_F_MMAPABLE, read};

// Not pinned: what the programs of a former service write has no reader.
#[map]
static TRACE: Array<u64> = Array::with_max_entries(MAX_SLOTS, BPF_F_MMAPABLE);
#[map]
static TRACE_MISSED: Array<u64> = Array::with_max_entries(MAX_SLOTS, BPF_F_MMAPABLE);
#[map]
static TRACE_RING: RingBuf = RingBuf::with_byte_size(TRACE_RING_BYTES, 0);

/// Logs a word that this CPU sees for the first time: once a flip and CPU, however many frames come.
#[inline(always)]
pub(crate) fn note_word(ctx: &TcContext, row: &mut CounterRow, slot: u32, word: u64) {
    let flip = flip_of(word);
    if row.0[LOGGED_WORD] == flip {
        return;
    }
    row.0[LOGGED_WORD] = flip;
    log_word(ctx, slot, word);
}

#[inline(never)]
fn log_word(ctx: &TcContext, slot: u32, word: u64) {
    let gate = Gate::from_word(word);
    // SAFETY: a helper without arguments.
    let cpu = unsafe { bpf_get_smp_processor_id() };
    // Numbers only: a name would be a table in a section of its own.
    debug!(
        ctx,
        "gate of slot {}: mode {}, may send {}, epoch {}, seen on cpu {}",
        slot,
        gate.mode as u32,
        gate.may_send as u32,
        gate.epoch,
        cpu
    );
}

/// A frame where a program sees it.
pub(crate) trait Seen {
    /// Its length in bytes.
    fn length(&self) -> u32;
    /// The tag that the kernel keeps beside it, and that tag's EtherType; 0: there is none.
    fn tag(&self) -> (u16, u16);
    /// Copies `len` bytes from `offset` on; false if there are fewer.
    ///
    /// # Safety
    /// `to` has room for them.
    unsafe fn copy(&self, offset: u32, to: *mut u8, len: u32) -> bool;
}

impl Seen for TcContext {
    #[inline(always)]
    fn length(&self) -> u32 {
        // SAFETY: the context that the kernel passed in.
        unsafe { (*self.skb.skb).len }
    }

    #[inline(always)]
    fn tag(&self) -> (u16, u16) {
        // SAFETY: as above.
        unsafe {
            let skb = self.skb.skb;
            match (*skb).vlan_present {
                0 => ((*skb).vlan_tci as u16, 0),
                _ => (
                    (*skb).vlan_tci as u16,
                    u16::from_be((*skb).vlan_proto as u16),
                ),
            }
        }
    }

    #[inline(always)]
    unsafe fn copy(&self, offset: u32, to: *mut u8, len: u32) -> bool {
        // SAFETY: the caller lends `len` bytes.
        unsafe { bpf_skb_load_bytes(self.skb.skb.cast(), offset, to.cast(), len) == 0 }
    }
}

impl Seen for XdpContext {
    #[inline(always)]
    fn length(&self) -> u32 {
        (self.data_end() - self.data()) as u32
    }

    #[inline(always)]
    fn tag(&self) -> (u16, u16) {
        // What an untagged pod is sent on the fast way has none.
        (0, 0)
    }

    #[inline(always)]
    unsafe fn copy(&self, offset: u32, to: *mut u8, len: u32) -> bool {
        // SAFETY: the caller lends `len` bytes.
        unsafe { bpf_xdp_load_bytes(self.ctx, offset, to.cast(), len) == 0 }
    }
}

/// Tells of a frame, if its pod is watched; only then is its bucket asked for.
#[inline(always)]
pub(crate) fn trace(
    frame: &impl Seen,
    slot: u16,
    word: u64,
    counter: Counter,
    bucket: impl FnOnce() -> u8,
    direction: Direction,
) {
    let until = read(&TRACE, u32::from(slot));
    // SAFETY: a helper without arguments.
    if is_watched(until, || unsafe { bpf_ktime_get_ns() }) {
        tell(frame, slot, word, counter as u8, bucket(), direction as u8);
    }
}

#[inline(always)]
fn tell(frame: &impl Seen, slot: u16, word: u64, counter: u8, bucket: u8, direction: u8) {
    let Some(mut entry) = TRACE_RING.reserve::<TraceEvent>(0) else {
        if let Some(missed) = TRACE_MISSED.get_ptr_mut(u32::from(slot)) {
            // SAFETY: an aligned `u64` of a live map, changed by atomic additions only.
            unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(missed, 1) };
        }
        return;
    };
    let event = entry.as_mut_ptr();
    let (tci, protocol) = frame.tag();
    // SAFETY: the ring lends a whole event, written here field by field, and read by nobody before it is submitted.
    unsafe {
        (*event).at_ns = bpf_ktime_get_ns();
        (*event).word = word;
        (*event).length = frame.length();
        (*event).slot = slot;
        (*event).vlan_tci = tci;
        (*event).vlan_protocol = protocol;
        (*event).counter = counter;
        (*event).direction = direction;
        (*event).bucket = bucket;
        (*event).unused = [0; 2];
        (*event).copied = copy_head(frame, &raw mut (*event).head);
    }
    entry.submit(0);
}

/// As much of the frame as it has and the event takes. The verifier wants to see each length: whole, then by the piece.
#[inline(always)]
unsafe fn copy_head(frame: &impl Seen, head: *mut [u8; TRACE_HEAD]) -> u8 {
    const PIECE: usize = 8;
    let to = head.cast::<u8>();
    // SAFETY: the caller lends `TRACE_HEAD` bytes, and no call writes beyond them.
    unsafe {
        if frame.copy(0, to, TRACE_HEAD as u32) {
            return TRACE_HEAD as u8;
        }
        let mut copied = 0;
        while copied + PIECE <= TRACE_HEAD {
            if !frame.copy(copied as u32, to.add(copied), PIECE as u32) {
                break;
            }
            copied += PIECE;
        }
        while copied < TRACE_HEAD {
            if !frame.copy(copied as u32, to.add(copied), 1) {
                break;
            }
            copied += 1;
        }
        copied as u8
    }
}

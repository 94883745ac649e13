//! The programs of the fast way. Why nothing is overtaken on it is in `migrator_ebpf`'s module `uplink`.

use core::mem::MaybeUninit;

use aya_ebpf::bindings::xdp_action::XDP_PASS;
use aya_ebpf::helpers::{bpf_xdp_get_buff_len, bpf_xdp_load_bytes, bpf_xdp_store_bytes};
use aya_ebpf::macros::{map, raw_tracepoint, xdp};
use aya_ebpf::maps::{Array, DevMapHash, HashMap, PerCpuArray};
use aya_ebpf::programs::{RawTracePointContext, XdpContext};
use migrator_ebpf::{
    BUCKETS, Bytes, Counter, Direction, Extent, Gate, Local, MAC_LEN, MAX_SLOTS, Mode, NO_SLOT_ROW,
    Probe, UdpSegment, bucket, bucket_index, extent, flip_of, is_fast_kind, latch_index, may_open,
    udp_segment,
};

use super::observe::trace;
use super::onward::{self, Late};
use super::{BPF_F_MMAPABLE, COUNTERS, DEVICES, DONE, GATES, PARKED, add, count, read};

#[map]
static LOCALS: HashMap<[u8; MAC_LEN], Local> = HashMap::pinned(2 * MAX_SLOTS, 0);
#[map]
static TAPS: DevMapHash = DevMapHash::pinned(MAX_SLOTS, 0);
#[map]
static PASSED: Array<u64> = Array::pinned(MAX_SLOTS * BUCKETS, BPF_F_MMAPABLE);
#[map]
pub(crate) static ARRIVED: Array<u64> = Array::pinned(MAX_SLOTS * BUCKETS, BPF_F_MMAPABLE);
/// For one receive queue; the service makes it larger.
#[map]
static LATCHES: Array<u64> = Array::pinned(MAX_SLOTS * BUCKETS, 0);
/// The TAP whose batch this CPU is about to hand over: its interface index, or [`WIRE`], or 0.
#[map]
pub(super) static HANDING_OVER: PerCpuArray<u32> = PerCpuArray::pinned(1, 0);

/// Added to `passed` by something that may be several frames: the gate counts them one by one, and must not
/// catch up before the service has looked.
const SEVERAL: u64 = 1 << 20;

/// A part of the frame that is being summed up. Not on the stack, which has 512 bytes.
#[map]
static SUMMED: PerCpuArray<[u64; CHUNK / 8]> = PerCpuArray::with_max_entries(1, 0);

/// No interface index: the batch leaves the node.
pub(super) const WIRE: u32 = 1 << 31;

/// What begins before here is read in place, which is quicker: Ethernet's and IP's own headers, at places known to the compiler.
const IN_PLACE: usize = 34;

/// Bytes that are summed up at a time, and how often: more than the longest frame that a program without fragments gets, a page.
const CHUNK: usize = 128;
const CHUNKS: usize = 32;

pub(super) struct Frame<'a>(pub(super) &'a XdpContext);

impl Bytes for Frame<'_> {
    #[inline(always)]
    fn load<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        if offset < IN_PLACE {
            let start = self.0.data() + offset;
            // SAFETY: the bytes lie within the frame, as compared; alignment does not matter.
            return (start + N <= self.0.data_end())
                .then(|| unsafe { (start as *const [u8; N]).read_unaligned() });
        }
        let mut bytes = MaybeUninit::<[u8; N]>::uninit();
        // SAFETY: the helper writes all `N` bytes, or fails.
        unsafe {
            let to = bytes.as_mut_ptr().cast();
            (bpf_xdp_load_bytes(self.0.ctx, offset as u32, to, N as u32) == 0)
                .then(|| bytes.assume_init())
        }
    }
}

/// Its first bytes, read in place.
#[inline(always)]
fn ethernet(ctx: &XdpContext) -> Option<[u8; 14]> {
    let start = ctx.data();
    // SAFETY: the bytes lie within the frame, as compared; alignment does not matter.
    (start + 14 <= ctx.data_end()).then(|| unsafe { (start as *const [u8; 14]).read_unaligned() })
}

/// XDP: what comes in by the uplink.
#[xdp]
fn uplink(ctx: XdpContext) -> u32 {
    let Some([a, b, c, d, e, f, g, h, i, j, k, l, high, low]) = ethernet(&ctx) else {
        return XDP_PASS;
    };
    // SAFETY: the map value is copied, and only ever replaced as a whole.
    let Some(local) = (unsafe { LOCALS.get(&[a, b, c, d, e, f]).copied() }) else {
        return XDP_PASS;
    };
    let frame = Frame(&ctx);
    let kind = u16::from_be_bytes([high, low]);
    let len = ctx.data_end() - ctx.data();
    if !is_fast_kind(&frame, kind) {
        if kind == Probe::ETHERTYPE {
            return onward::ask(&ctx, local.slot, len).unwrap_or(XDP_PASS);
        }
        return XDP_PASS;
    }
    let bucket = bucket(&frame);
    let index = bucket_index(local.slot, bucket);
    let extent = extent(&frame, kind, len, usize::from(local.frame_max));
    let word = read(&GATES, u32::from(local.slot));
    let gate = Gate::from_word(word);
    let action = match gate.mode {
        _ if gate.slot != local.slot => None,
        Mode::Local if extent == Extent::Whole => redirect(&ctx, &frame, kind, local, bucket, word),
        // The gate drops the pod's own echo.
        Mode::Tunnel if [g, h, i, j, k, l] != [a, b, c, d, e, f] => {
            let is_whole = extent == Extent::Whole;
            let late = Late {
                kind,
                local,
                bucket,
                word,
                len,
                is_whole,
            };
            onward::send_on(&ctx, &late)
        }
        Mode::Local | Mode::Tunnel | Mode::Shut | Mode::Hold | Mode::Forward => None,
    };
    if let Some(action) = action {
        return action;
    }
    let frames = match extent {
        Extent::Whole => 1,
        Extent::TooLong => SEVERAL,
        // SAFETY: `ctx` is the context that the kernel passed in.
        Extent::Elsewhere if unsafe { bpf_xdp_get_buff_len(ctx.ctx) } > len as u64 => SEVERAL,
        Extent::Elsewhere => 1,
    };
    add(&PASSED, index, frames);
    XDP_PASS
}

/// The latch of a bucket, of the queue that the frame came by.
#[inline(always)]
pub(super) fn latch(ctx: &XdpContext, index: u32) -> Option<*mut u64> {
    LATCHES.get_ptr_mut(latch_index(ctx.rx_queue_index(), index))
}

/// See [`may_open`], also for the order in which these are read.
#[inline(always)]
pub(super) fn is_open(index: u32) -> bool {
    let arrived = read(&ARRIVED, index);
    let passed = read(&PASSED, index);
    let done = read(&DONE, index);
    may_open(arrived, passed, done, read(&PARKED, index))
}

/// To the pod's TAP. `None`: the kernel's way.
#[inline(always)]
fn redirect(
    ctx: &XdpContext,
    frame: &Frame<'_>,
    kind: u16,
    local: Local,
    bucket: u8,
    word: u64,
) -> Option<u32> {
    let index = bucket_index(local.slot, bucket);
    let slot = u32::from(local.slot);
    let latch = latch(ctx, index)?;
    // SAFETY: an aligned `u64` of a live map, used by one receive queue, which is polled by one CPU at a time.
    let latched = unsafe { latch.read() } == flip_of(word);
    if !latched && !is_open(index) {
        return None;
    }
    // Only looks the TAP up; the kernel acts on what this program returns.
    let action = TAPS.redirect(slot, u64::from(XDP_PASS)).ok()?;
    if let Some(segment) = udp_segment(frame, kind) {
        finish(ctx, segment)?;
    }
    // SAFETY: as above.
    unsafe { latch.write(flip_of(word)) };
    count(slot, Counter::Fast);
    trace(
        ctx,
        local.slot,
        word,
        Counter::Fast,
        || bucket,
        Direction::In,
    );
    Some(action)
}

/// Finishes a checksum that its sender has left to the device.
#[inline(never)]
pub(super) fn finish(ctx: &XdpContext, segment: UdpSegment) -> Option<()> {
    let sum = sum(ctx, segment.at, segment.len)?;
    // The sum of words in this machine's order is the checksum in this machine's order (RFC 1071).
    let mut bytes = UdpSegment::finished(sum).to_ne_bytes();
    let offset = segment.checksum_at() as u32;
    // SAFETY: the helper reads the two bytes, and checks the offset.
    let stored = unsafe { bpf_xdp_store_bytes(ctx.ctx, offset, bytes.as_mut_ptr().cast(), 2) };
    (stored == 0).then_some(())
}

/// The sum of `len` bytes from `at` on, in words of this machine's order. `None`: they are not all there.
#[inline(always)]
pub(super) fn sum(ctx: &XdpContext, at: usize, len: usize) -> Option<u64> {
    u64::try_from(sum_or_minus(ctx, at, len)).ok()
}

/// A function of its own for its stack, and a number for what a function of its own can return. Negative: they are not all there.
#[inline(never)]
fn sum_or_minus(ctx: &XdpContext, mut at: usize, mut left: usize) -> i64 {
    let mut sum = 0;
    for _ in 0..CHUNKS {
        if left < CHUNK {
            break;
        }
        let Some(part) = chunk(ctx, at, CHUNK) else {
            return -1;
        };
        sum += part;
        at += CHUNK;
        left -= CHUNK;
    }
    if left != 0 {
        let Some(part) = chunk(ctx, at, left) else {
            return -1;
        };
        sum += part;
    }
    sum as i64
}

/// Sums up 1 to [`CHUNK`] bytes, more being an error; only the last chunk may be a short or odd one.
#[inline(always)]
fn chunk(ctx: &XdpContext, at: usize, len: usize) -> Option<u64> {
    let words: *mut u64 = SUMMED.get_ptr_mut(0)?.cast();
    for i in 0..CHUNK / 8 {
        // SAFETY: within this CPU's value. Volatile, or it becomes a call that zeroes byte by byte.
        unsafe { words.add(i).write_volatile(0) };
    }
    // SAFETY: a value of this function's own. The compiler knows its range, and the verifier does not: so it must not know.
    let len = unsafe { (&raw const len).read_volatile() };
    if len == 0 || len > CHUNK {
        return None;
    }
    // SAFETY: the helper writes `len` bytes, no more than there are, or fails.
    let loaded = unsafe { bpf_xdp_load_bytes(ctx.ctx, at as u32, words.cast(), len as u32) };
    if loaded != 0 {
        return None;
    }
    let mut sum = 0;
    let mut i = 0;
    while i < CHUNK / 8 {
        // SAFETY: within this CPU's value, which nothing else uses while this program runs.
        let word = unsafe { words.add(i).read() };
        sum += (word & 0xffff_ffff) + (word >> 32);
        i += 1;
    }
    Some(sum)
}

/// XDP, for each frame of a batch right before the kernel hands it to a TAP (`bq_xmit_all` in Linux's kernel/bpf/devmap.c).
#[xdp(map = "devmap")]
fn into_tap(ctx: XdpContext) -> u32 {
    if let Some(tap) = HANDING_OVER.get_ptr_mut(0) {
        // SAFETY: `ctx` is the context that the kernel passed in; the value is this CPU's.
        unsafe { *tap = (*ctx.ctx).egress_ifindex };
    }
    XDP_PASS
}

/// After the batch: books what the TAP's full queue did not take. Every batch of the machine comes by here; one that is ours was announced
/// by [`into_tap`] or `onto_wire`, on this CPU and with nothing between.
#[raw_tracepoint(tracepoint = "xdp_devmap_xmit")]
fn tap_full(ctx: RawTracePointContext) -> i32 {
    let Some(tap) = HANDING_OVER.get_ptr_mut(0) else {
        return 0;
    };
    // SAFETY: the value is this CPU's.
    let ifindex = unsafe { tap.replace(0) };
    // Arguments: from, to, sent, drops, error.
    let (drops, error): (i32, i32) = (ctx.arg(3), ctx.arg(4));
    if ifindex == 0 || drops <= 0 {
        return 0;
    }
    if ifindex == WIRE {
        if let Some(row) = COUNTERS.get_ptr_mut(NO_SLOT_ROW) {
            // SAFETY: as below.
            unsafe { (*row).0[Counter::ForwardedXdpLost as usize] += drops as u64 };
        }
        return 0;
    }
    // SAFETY: the map value is only read.
    let Some(device) = (unsafe { DEVICES.get(&ifindex) }) else {
        return 0;
    };
    if let Some(row) = COUNTERS.get_ptr_mut(u32::from(device.slot)) {
        // SAFETY: the map holds whole rows, and this CPU's is written with soft interrupts off.
        unsafe {
            (*row).0[Counter::FastLost as usize] += drops as u64;
            if error == 0 {
                (*row).0[Counter::FastFull as usize] += 1;
            }
        }
    }
    0
}

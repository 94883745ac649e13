//! Frames of a departed pod, sent on from the uplink with the tunnel's headers around them. When, and why nothing is overtaken: `migrator_ebpf`'s module `uplink`.

use aya_ebpf::bindings::xdp_action::{XDP_DROP, XDP_PASS};
use aya_ebpf::helpers::{bpf_get_prandom_u32, bpf_xdp_adjust_head, bpf_xdp_store_bytes};
use aya_ebpf::macros::{map, xdp};
use aya_ebpf::maps::{DevMapHash, HashMap};
use aya_ebpf::programs::XdpContext;
use migrator_ebpf::{
    Bytes, Counter, Direction, Local, MAX_SLOTS, OUTER_V4, OUTER_V6, Outer, Probe, bucket_index,
    fill_v4, fill_v6, flip_of, spilled, udp_segment,
};

use super::count;
use super::observe::{Seen, trace};
use super::xdp::{Frame, HANDING_OVER, WIRE, finish, is_open, latch, sum};

/// linux/bpf.h: each replacement is an entry of its own, so a program reads one whole.
const BPF_F_NO_PREALLOC: u32 = 1;

#[map]
pub(crate) static OUTERS: HashMap<u32, Outer> = HashMap::pinned(MAX_SLOTS, BPF_F_NO_PREALLOC);
#[map]
static WAYS_OUT: DevMapHash = DevMapHash::pinned(MAX_SLOTS, 0);

/// Index of the loopback device, in every network namespace.
const LOOPBACK: u32 = 1;

/// What the uplink's program knows of a frame.
pub(super) struct Late {
    pub(super) kind: u16,
    pub(super) local: Local,
    pub(super) bucket: u8,
    /// The gate's word.
    pub(super) word: u64,
    pub(super) len: usize,
    /// All of it is here, and it is no longer than the pod takes.
    pub(super) is_whole: bool,
}

/// A frame behind headers that are not written yet.
struct Behind<'a>(&'a XdpContext, u32);

impl Seen for Behind<'_> {
    #[inline(always)]
    fn length(&self) -> u32 {
        self.0.length() - self.1
    }

    #[inline(always)]
    fn tag(&self) -> (u16, u16) {
        self.0.tag()
    }

    #[inline(always)]
    unsafe fn copy(&self, offset: u32, to: *mut u8, len: u32) -> bool {
        // SAFETY: the caller lends `len` bytes.
        unsafe { self.0.copy(self.1 + offset, to, len) }
    }
}

/// Sends a frame on. `None`: the kernel's way.
#[inline(always)]
pub(super) fn send_on(ctx: &XdpContext, late: &Late) -> Option<u32> {
    let slot = u32::from(late.local.slot);
    // SAFETY: the map value is only read, and an entry is only ever replaced as a whole.
    let outer = unsafe { OUTERS.get(&slot) }?;
    let index = bucket_index(late.local.slot, late.bucket);
    let latch = latch(ctx, index)?;
    // SAFETY: an aligned `u64` of a live map, used by one receive queue, which is polled by one CPU at a time.
    let seen = unsafe { latch.read() };
    let is_latched = seen == flip_of(late.word);
    if !is_latched && (seen == spilled(late.word) || !is_open(index)) {
        return None;
    }
    let action = match late.is_whole && late.len <= outer.frame_max as usize {
        true => wrap(ctx, late, outer),
        false => None,
    };
    if action.is_none() && !is_latched {
        return None;
    }
    let state = match action {
        Some(_) => flip_of(late.word),
        None => spilled(late.word),
    };
    // SAFETY: as above.
    unsafe { latch.write(state) };
    if action.is_some() {
        count(slot, Counter::ForwardedXdp);
    }
    action
}

/// Puts the headers around a frame. `None`: it cannot be sent, and is as it was.
#[inline(always)]
fn wrap(ctx: &XdpContext, late: &Late, outer: &Outer) -> Option<u32> {
    // Only looks the device up; the kernel acts on what this program returns.
    let action = WAYS_OUT.redirect(outer.device, u64::from(XDP_PASS)).ok()?;
    let segment = udp_segment(&Frame(ctx), late.kind);
    let room = outer.len as i32;
    // SAFETY: the context that the kernel passed in; nothing that was read of the frame's place is used any more.
    if unsafe { bpf_xdp_adjust_head(ctx.ctx, -room) } != 0 {
        return None;
    }
    let finished = match segment {
        Some(segment) => finish(ctx, segment.behind(outer.len as usize)),
        None => Some(()),
    };
    if finished.is_none() || put(ctx, late.bucket, late.len, outer).is_none() {
        // SAFETY: as above. What was taken is given back, so it cannot fail.
        unsafe { bpf_xdp_adjust_head(ctx.ctx, room) };
        return None;
    }
    let behind = Behind(ctx, outer.len);
    let (slot, word) = (late.local.slot, late.word);
    let counter = Counter::ForwardedXdp;
    trace(&behind, slot, word, counter, || late.bucket, Direction::In);
    Some(action)
}

/// Writes the headers in front of a frame of `len` bytes.
#[inline(always)]
fn put(ctx: &XdpContext, bucket: u8, len: usize, outer: &Outer) -> Option<()> {
    let mut headers = outer.headers;
    let from = (&raw mut headers).cast();
    let stored = if outer.is_v6() {
        let inner = sum(ctx, OUTER_V6, len)?;
        fill_v6(&mut headers, outer.sum, len as u16, bucket, inner);
        // SAFETY: the helper reads that many bytes of them, and checks that the frame has them.
        unsafe { bpf_xdp_store_bytes(ctx.ctx, 0, from, OUTER_V6 as u32) }
    } else {
        // SAFETY: a helper without arguments.
        let id = unsafe { bpf_get_prandom_u32() } as u16;
        fill_v4(&mut headers, outer.sum, len as u16, bucket, id);
        // SAFETY: as above.
        unsafe { bpf_xdp_store_bytes(ctx.ctx, 0, from, OUTER_V4 as u32) }
    };
    (stored == 0).then_some(())
}

/// A question that the service has this program send by this way, see [`Probe`]. From the network none comes in by the loopback device.
#[inline(always)]
pub(super) fn ask(ctx: &XdpContext, slot: u16, len: usize) -> Option<u32> {
    // SAFETY: the context that the kernel passed in.
    if unsafe { (*ctx.ctx).ingress_ifindex } != LOOPBACK {
        return None;
    }
    let (kind, _) = Probe::parse(Frame(ctx).load(12)?)?;
    // SAFETY: as in `send_on`.
    let outer = unsafe { OUTERS.get(&u32::from(slot)) }?;
    if kind != Probe::ASK {
        return None;
    }
    let action = WAYS_OUT.redirect(outer.device, u64::from(XDP_DROP)).ok()?;
    // SAFETY: as in `wrap`.
    if unsafe { bpf_xdp_adjust_head(ctx.ctx, -(outer.len as i32)) } != 0 {
        return None;
    }
    match put(ctx, 0, len, outer) {
        Some(()) => Some(action),
        None => Some(XDP_DROP),
    }
}

/// XDP, for each frame of a batch right before the kernel hands it to the device that it leaves by: as `into_tap`.
#[xdp(map = "devmap")]
fn onto_wire(_ctx: XdpContext) -> u32 {
    if let Some(device) = HANDING_OVER.get_ptr_mut(0) {
        // SAFETY: the value is this CPU's.
        unsafe { *device = WIRE };
    }
    XDP_PASS
}

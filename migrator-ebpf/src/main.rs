//! The dataplane programs of a pod's TAP: the gate in front of the guest (tcx egress), and the guard
//! behind it (tcx ingress); [`xdp`] has those of the fast way. The verdicts themselves are `migrator_ebpf::verdict`, tested on the host.

#![no_std]
#![no_main]
// The target has no compare-and-swap, so `AtomicU64` lacks `fetch_add` here; the intrinsic becomes the
// one instruction that BPF has for it.
#![allow(internal_features)]
#![feature(core_intrinsics)]

mod home;
mod observe;
mod onward;
mod overlay;
mod steer;
mod xdp;

use core::intrinsics::{AtomicOrdering, atomic_xadd};

use aya_ebpf::helpers::bpf_redirect;
use aya_ebpf::macros::{classifier, map};
use aya_ebpf::maps::{Array, HashMap, PerCpuArray};
use aya_ebpf::programs::TcContext;
use aya_log_ebpf::debug;
use migrator_ebpf::{
    BRIEFS_MAX, BUCKETS, Brief, Bytes, Counter, CounterRow, Device, Direction, Gate, INJECTED_MARK,
    INJECTED_PRIORITY, MAX_SLOTS, NO_SLOT_ROW, Verdict, bucket, bucket_index, is_fast_kind,
    is_group, is_own_echo, is_settled, verdict,
};
use onward::OUTERS;

/// linux/bpf.h: the map can be mapped into user memory.
pub(crate) const BPF_F_MMAPABLE: u32 = 1 << 10;

/// linux/bpf.h `tcx_action_base`: on to the next program, if any, then as if there were none.
const TCX_NEXT: i32 = -1;
/// linux/bpf.h `tcx_action_base`.
const TCX_DROP: i32 = 2;

#[map]
pub(crate) static GATES: Array<u64> = Array::pinned(MAX_SLOTS, BPF_F_MMAPABLE);
#[map]
pub(crate) static DEVICES: HashMap<u32, Device> = HashMap::pinned(2 * MAX_SLOTS, 0);
// Not pinned: each service fills it before its programs take over.
#[map]
static BRIEFS: Array<u64> = Array::with_max_entries(BRIEFS_MAX, BPF_F_MMAPABLE);
#[map]
pub(crate) static PARKED: Array<u64> = Array::pinned(MAX_SLOTS * BUCKETS, BPF_F_MMAPABLE);
#[map]
pub(crate) static DONE: Array<u64> = Array::pinned(MAX_SLOTS * BUCKETS, BPF_F_MMAPABLE);
#[map]
static INJECTED: Array<u64> = Array::pinned(MAX_SLOTS, BPF_F_MMAPABLE);
#[map]
static INJECTED_NEXT: Array<u64> = Array::pinned(MAX_SLOTS, BPF_F_MMAPABLE);
#[map]
pub(crate) static COUNTERS: PerCpuArray<CounterRow> = PerCpuArray::pinned(MAX_SLOTS + 1, 0);

struct Skb<'a>(&'a TcContext);

impl Bytes for Skb<'_> {
    #[inline(always)]
    fn load<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.0.load(offset).ok()
    }
}

/// linux/if_packet.h.
const PACKET_BROADCAST: u32 = 1;
const PACKET_MULTICAST: u32 = 2;

/// Books the frame. All hooks run with soft interrupts off, so nothing on this CPU comes between.
#[inline(always)]
pub(crate) fn count(row: u32, counter: Counter) {
    if let Some(row) = COUNTERS.get_ptr_mut(row) {
        // SAFETY: the map holds whole rows, and this CPU's is written only here.
        unsafe { (*row).0[counter as usize] += 1 };
    }
}

/// Books the frame of a slot, and logs the gate's word if it is new.
#[inline(always)]
fn book(ctx: &TcContext, slot: u16, word: u64, counter: Counter) {
    let slot = u32::from(slot);
    if let Some(row) = COUNTERS.get_ptr_mut(slot) {
        // SAFETY: as above.
        let row = unsafe { &mut *row };
        row.0[counter as usize] += 1;
        observe::note_word(ctx, row, slot, word);
    }
}

#[inline(always)]
pub(crate) fn read(map: &Array<u64>, index: u32) -> u64 {
    match map.get_ptr(index) {
        // SAFETY: an aligned `u64` of a live map; user space stores whole words.
        Some(value) => unsafe { value.read_volatile() },
        None => 0,
    }
}

/// Adds to a counter that several CPUs share.
#[inline(always)]
pub(crate) fn add(map: &Array<u64>, index: u32, frames: u64) {
    if let Some(value) = map.get_ptr_mut(index) {
        // SAFETY: an aligned `u64` of a live map, changed by atomic additions only.
        unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(value, frames) };
    }
}

/// Whether the uplink's program has counted this frame, which came by the uplink, when it left it to the kernel.
#[inline(always)]
fn is_counted(skb: &Skb<'_>) -> bool {
    // SAFETY: `skb` is the context that the kernel passed in.
    let kind = unsafe {
        let skb = skb.0.skb.skb;
        if (*skb).vlan_present != 0
            || matches!((*skb).pkt_type, PACKET_BROADCAST | PACKET_MULTICAST)
        {
            return false;
        }
        u16::from_be((*skb).protocol as u16)
    };
    is_fast_kind(skb, kind)
}

/// Counts such a frame. GRO may have made it of many.
#[inline(always)]
fn arrived(skb: &Skb<'_>, index: u32) {
    // SAFETY: `skb` is the context that the kernel passed in.
    let segments = unsafe { (*skb.0.skb.skb).gso_segs };
    add(&xdp::ARRIVED, index, u64::from(segments.max(1)));
}

#[inline(always)]
fn device(ctx: &TcContext) -> Option<Device> {
    // SAFETY: `skb` is the context that the kernel passed in; the map value is only read.
    unsafe {
        let ifindex = (*ctx.skb.skb).ifindex;
        DEVICES.get(&ifindex).copied()
    }
}

/// What the gate does while nothing waits for the pod in `slot`; `None`: it must look closer.
#[inline(always)]
fn pass_settled(ctx: &TcContext, slot: u16, uplink: u32) -> Option<i32> {
    let word = read(&GATES, u32::from(slot));
    if !is_settled(word, slot) {
        return None;
    }
    let skb = Skb(ctx);
    let counter = Counter::Passed;
    book(ctx, slot, word, counter);
    observe::trace(ctx, slot, word, counter, || bucket(&skb), Direction::In);
    // SAFETY: `skb` is the context that the kernel passed in.
    let came_by = unsafe { (*ctx.skb.skb).ingress_ifindex };
    if uplink != 0 && came_by == uplink && is_counted(&skb) {
        arrived(&skb, bucket_index(slot, bucket(&skb)));
    }
    Some(TCX_NEXT)
}

/// A frame that the service injects: it has been here before, on this node or on the one that the pod came from. The service sends it in the same
/// call that this runs in, so nothing can come between the frame's way into the TAP and the note of it.
#[inline(always)]
fn pass_injected(ctx: &TcContext) -> bool {
    // SAFETY: `skb` is the context that the kernel passed in.
    unsafe {
        let skb = ctx.skb.skb;
        if (*skb).mark != INJECTED_MARK || (*skb).priority != INJECTED_PRIORITY {
            return false;
        }
        (*skb).mark = 0;
        (*skb).priority = 0;
    }
    let Some(device) = device(ctx) else {
        return true;
    };
    let slot = u32::from(device.slot);
    let next = read(&INJECTED_NEXT, slot);
    if next != 0
        && let Some(injected) = INJECTED.get_ptr_mut(slot)
    {
        // SAFETY: an aligned `u64` of a live map, which nobody else writes while the service is in this call.
        unsafe { injected.write_volatile(next) };
    }
    true
}

/// tcx egress: frames for the guest.
#[classifier]
fn gate(ctx: TcContext) -> i32 {
    if pass_injected(&ctx) {
        return TCX_NEXT;
    }
    // SAFETY: `skb` is the context that the kernel passed in.
    let ifindex = unsafe { (*ctx.skb.skb).ifindex };
    if let Some(brief) = Brief::from_word(read(&BRIEFS, ifindex))
        && let Some(action) = pass_settled(&ctx, brief.slot, brief.uplink)
    {
        return action;
    }
    gate_closely(&ctx)
}

#[inline(always)]
fn gate_closely(ctx: &TcContext) -> i32 {
    let Some(device) = device(ctx) else {
        count(NO_SLOT_ROW, Counter::RefusedNoSlot);
        debug!(ctx, "gate: a device without a slot");
        return TCX_DROP;
    };
    if let Some(action) = pass_settled(ctx, device.slot, device.uplink) {
        return action;
    }
    let skb = Skb(ctx);
    let slot = u32::from(device.slot);
    // SAFETY: `skb` is the context that the kernel passed in.
    let came_by = unsafe { (*ctx.skb.skb).ingress_ifindex };
    let is_counted = device.uplink != 0 && came_by == device.uplink && is_counted(&skb);
    let bucket = bucket(&skb);
    let index = bucket_index(device.slot, bucket);
    // `done` first: it only grows towards `parked`, so an old value parks one frame too many, a value
    // newer than `parked`'s could let one overtake.
    let done = read(&DONE, index);
    let parked = read(&PARKED, index);
    let word = read(&GATES, slot);
    let verdict = verdict(
        Gate::from_word(word),
        device.slot,
        is_own_echo(&skb, device.mac),
        parked,
        done,
    );
    let is_group = is_group(&skb);
    let is_own = came_by != device.out && (device.tunnel == 0 || came_by != device.tunnel);
    let verdict = if device.out != 0 && is_own && !is_group {
        verdict.of_own_bridge()
    } else {
        verdict.of_group(is_group)
    };
    let mut into_tunnel = None;
    let verdict = match verdict {
        // SAFETY: the map value is not read.
        Verdict::Tunnel(_) if is_counted && unsafe { OUTERS.get(&slot) }.is_some() => {
            // The uplink's program sends such frames on itself, and must know of each other one when the guest has it.
            Verdict::Park(Counter::ParkedForward)
        }
        Verdict::Tunnel(_) => {
            into_tunnel = overlay::into_tunnel(ctx, slot);
            match into_tunnel {
                Some(_) => verdict,
                None => Verdict::Park(Counter::ParkedForward),
            }
        }
        other => other,
    };
    let counter = verdict.counter();
    book(ctx, device.slot, word, counter);
    observe::trace(ctx, device.slot, word, counter, || bucket, Direction::In);
    let action = match verdict {
        Verdict::Pass(_) => TCX_NEXT,
        Verdict::Park(_) => {
            add(&PARKED, index, 1);
            redirect(device.park)
        }
        Verdict::Show(_) => {
            debug!(ctx, "gate: slot {} hears its own address", slot);
            redirect(device.park)
        }
        Verdict::Out(_) => redirect(device.out),
        Verdict::Drop(Counter::RefusedNoSlot) => {
            debug!(ctx, "gate: slot {} holds no word of its own", slot);
            TCX_DROP
        }
        Verdict::Tunnel(_) => into_tunnel.unwrap_or(TCX_DROP),
        Verdict::Drop(_) => TCX_DROP,
    };
    if is_counted {
        // After `parked`: the uplink's program must not find it arrived, and nothing parked.
        arrived(&skb, index);
    }
    action
}

#[inline(always)]
fn redirect(park: u32) -> i32 {
    // SAFETY: a helper without memory arguments.
    unsafe { bpf_redirect(park, 0) as i32 }
}

/// tcx ingress: frames from the guest. Nothing leaves a guest that may not run here.
#[classifier]
fn guard(ctx: TcContext) -> i32 {
    let Some(device) = device(&ctx) else {
        count(NO_SLOT_ROW, Counter::Blocked);
        debug!(&ctx, "guard: a device without a slot");
        return TCX_DROP;
    };
    let word = read(&GATES, u32::from(device.slot));
    let gate = Gate::from_word(word);
    let (counter, action) = if gate.slot != device.slot || !gate.may_send {
        (Counter::Blocked, TCX_DROP)
    } else {
        match home::lead(&ctx, device.slot) {
            Some(action) => (Counter::SentBound, action),
            None => (Counter::Sent, TCX_NEXT),
        }
    };
    book(&ctx, device.slot, word, counter);
    observe::trace(&ctx, device.slot, word, counter, || 0, Direction::Out);
    action
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// The kernel lets only programs under the GPL call some helpers; these are offered under it as well.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

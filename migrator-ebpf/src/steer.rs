//! The routed way out of this node: tcx egress of the tunnel's device.
//!
//! The kernel routes whatever is for a pod of another node, or comes in for one, to the tunnel's device. What it has no metadata for is looked up here, and given
//! some. What has some already was sent by the gate of a departed pod, or by `landing`, and only gets its lane.

use aya_ebpf::bindings::bpf_tunnel_key;
use aya_ebpf::helpers::{bpf_redirect, bpf_set_hash, bpf_skb_get_tunnel_key};
use aya_ebpf::macros::{classifier, map};
use aya_ebpf::maps::{Array, HashMap, PerCpuArray};
use aya_ebpf::programs::TcContext;
use migrator_ebpf::{
    EndMarker, Endpoint, GATEWAY_MAC, HERE, MAC_LEN, MAX_ENDPOINTS, MAX_NODES, Place, Steered,
    Tunnel, destination_address, is_group, landing_key, lane_hash, lane_of, next_ttl,
};

use super::overlay::{LANDINGS, TTL, enter, zero_key};
use super::{BPF_F_MMAPABLE, Skb, TCX_DROP, TCX_NEXT, read};

// An address has an entry of its own, and a pod two.
#[map]
static ENDPOINTS: HashMap<[u8; 16], Endpoint> = HashMap::pinned(2 * MAX_ENDPOINTS, 0);
#[map]
static PLACES: Array<u64> = Array::pinned(MAX_ENDPOINTS, BPF_F_MMAPABLE);
#[map]
static NODES: Array<Tunnel> = Array::pinned(MAX_NODES, 0);
#[map]
static STEERED: PerCpuArray<u64> = PerCpuArray::pinned(Steered::ALL.len() as u32, 0);

/// errno(3) of the tunnel's key, if there is one and it is of the other family.
const EPROTO: i64 = 71;

#[inline(always)]
pub(super) fn count(counter: Steered) {
    if let Some(value) = STEERED.get_ptr_mut(counter as u32) {
        // SAFETY: an aligned `u64` of this CPU's own; soft interrupts are off.
        unsafe { *value += 1 };
    }
}

/// Whether this node is one of a routed cluster.
#[inline(always)]
pub(super) fn is_in_use() -> bool {
    matches!(NODES.get(u32::from(HERE)), Some(own) if own.device != 0)
}

/// Whether the frame was given its way already.
#[inline(always)]
fn has_metadata(ctx: &TcContext) -> bool {
    let mut key = zero_key();
    let size = size_of::<bpf_tunnel_key>() as u32;
    // SAFETY: the context that the kernel passed in, and a whole key that lives through the call.
    let result = unsafe { bpf_skb_get_tunnel_key(ctx.skb.skb, &mut key, size, 0) } as i64;
    result == 0 || result == -EPROTO
}

/// Everything for one node leaves in one order: of a lane, and of one band of the queueing discipline.
#[inline(always)]
fn set_lane(ctx: &TcContext, lane: u16) {
    // SAFETY: the context that the kernel passed in, whose priority a program may write.
    unsafe {
        (*ctx.skb.skb).priority = 0;
        bpf_set_hash(ctx.skb.skb, lane_hash(lane));
    }
}

#[inline(always)]
fn dropped(counter: Steered) -> i32 {
    count(counter);
    TCX_DROP
}

/// tcx egress of the tunnel's device.
#[classifier]
fn steer(ctx: TcContext) -> i32 {
    let skb = Skb(&ctx);
    if has_metadata(&ctx) {
        set_lane(&ctx, lane_of(&skb));
        count(Steered::Departed);
        return TCX_NEXT;
    }
    if let Some(marker) = EndMarker::of(&skb) {
        set_lane(&ctx, marker.part);
        return send(&ctx, marker.node, TTL, Steered::Marker);
    }
    if is_group(&skb) {
        return dropped(Steered::NoIp);
    }
    let Some(address) = destination_address(&skb) else {
        return dropped(Steered::NoIp);
    };
    // SAFETY: the map value is only read.
    let Some(endpoint) = (unsafe { ENDPOINTS.get(&address) }) else {
        return dropped(Steered::Unknown);
    };
    let place = Place::from_word(read(&PLACES, endpoint.index));
    if !address_frame(&ctx, endpoint.mac) {
        return dropped(Steered::Nowhere);
    }
    if place.node == HERE {
        return into_tap(endpoint.mac);
    }
    set_lane(&ctx, lane_of(&skb));
    send(&ctx, place.node, TTL, Steered::Sent)
}

/// From the gateway to the pod.
#[inline(always)]
fn address_frame(ctx: &TcContext, mac: [u8; MAC_LEN]) -> bool {
    let [a, b, c, d, e, f] = mac;
    let [g, h, i, j, k, l] = GATEWAY_MAC;
    ctx.store(0, &[a, b, c, d, e, f, g, h, i, j, k, l], 0)
        .is_ok()
}

#[inline(always)]
fn into_tap(mac: [u8; MAC_LEN]) -> i32 {
    // SAFETY: the map value is only read.
    match unsafe { LANDINGS.get(&landing_key(mac)) } {
        Some(landing) => {
            count(Steered::Here);
            // SAFETY: a helper without memory arguments.
            unsafe { bpf_redirect(landing.tap, 0) as i32 }
        }
        None => dropped(Steered::Nowhere),
    }
}

#[inline(always)]
fn send(ctx: &TcContext, node: u16, ttl: u8, counter: Steered) -> i32 {
    match NODES.get(u32::from(node)) {
        Some(tunnel) if tunnel.device != 0 && enter(ctx, tunnel, ttl) => {
            count(counter);
            TCX_NEXT
        }
        _ => dropped(Steered::Nowhere),
    }
}

/// A frame out of the tunnel for a pod that has left this node, and whose place is known: on to there. `None`: it is not known, or is here.
#[inline(always)]
pub(super) fn follow(ctx: &TcContext, key: &bpf_tunnel_key) -> Option<i32> {
    let skb = Skb(ctx);
    let address = destination_address(&skb)?;
    // SAFETY: the map value is only read.
    let endpoint = unsafe { ENDPOINTS.get(&address) }?;
    let place = Place::from_word(read(&PLACES, endpoint.index));
    if place.node == HERE {
        return None;
    }
    let tunnel = NODES.get(u32::from(place.node))?;
    if tunnel.device == 0 || tunnel.vni != key.tunnel_id {
        return None;
    }
    let Some(ttl) = next_ttl(key.tunnel_ttl) else {
        return Some(dropped(Steered::TooFar));
    };
    if !enter(ctx, tunnel, ttl) {
        return Some(dropped(Steered::Nowhere));
    }
    count(Steered::Relayed);
    // SAFETY: a helper without memory arguments.
    Some(unsafe { bpf_redirect(tunnel.device, 0) as i32 })
}

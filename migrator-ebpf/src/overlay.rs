//! The tunnel's two ends: into it at the node that a pod has left, out of it at the one where it lives.
//!
//! A frame that comes out of the tunnel goes to the TAP of its pod, or nowhere: never to the bridge, so it cannot run in
//! circles through uplinks. The pod's gate then decides; only if that pod has left as well, it sends the frame on.

use core::mem::{size_of, zeroed};

use aya_ebpf::bindings::{BPF_F_TUNINFO_IPV6, BPF_F_ZERO_CSUM_TX, bpf_tunnel_key};
use aya_ebpf::helpers::{bpf_redirect, bpf_skb_get_tunnel_key, bpf_skb_set_tunnel_key};
use aya_ebpf::macros::{classifier, map};
use aya_ebpf::maps::{Array, HashMap};
use aya_ebpf::programs::TcContext;
use aya_log_ebpf::debug;
use migrator_ebpf::{
    Bytes, Counter, EndMarker, Landing, MAX_SLOTS, NO_SLOT_ROW, Probe, Steered, Tunnel,
    destination_mac, landing_key,
};

use super::{BPF_F_MMAPABLE, DEVICES, Skb, TCX_DROP, count, home, steer};

#[map]
static TUNNELS: Array<Tunnel> = Array::pinned(MAX_SLOTS, 0);
#[map]
pub(super) static LANDINGS: HashMap<u64, Landing> = HashMap::pinned(2 * MAX_SLOTS, 0);
#[map]
static PROBED: Array<u64> = Array::pinned(MAX_SLOTS, BPF_F_MMAPABLE);

/// Hops that an outer packet may take: what Linux gives its own (`IPDEFTTL` in linux/ip.h).
pub(super) const TTL: u8 = 64;

#[inline(always)]
pub(super) fn zero_key() -> bpf_tunnel_key {
    // SAFETY: integers only: all zeroes are a valid value.
    unsafe { zeroed() }
}

/// Sends an outer IPv4 packet without a UDP checksum, as RFC 7348 wants it; in IPv6 it must have one.
#[inline(always)]
fn set_key(ctx: &TcContext, key: &mut bpf_tunnel_key, v6: bool) -> bool {
    let flags = if v6 {
        BPF_F_TUNINFO_IPV6
    } else {
        BPF_F_ZERO_CSUM_TX
    };
    let size = size_of::<bpf_tunnel_key>() as u32;
    // SAFETY: the context that the kernel passed in, and a whole key that lives through the call.
    unsafe { bpf_skb_set_tunnel_key(ctx.skb.skb, key, size, u64::from(flags)) == 0 }
}

/// Sends a frame to where the slot's pod has gone. `None`: there is no tunnel for it.
#[inline(always)]
pub(super) fn into_tunnel(ctx: &TcContext, slot: u32) -> Option<i32> {
    let tunnel = TUNNELS.get(slot)?;
    if tunnel.device == 0 {
        return None;
    }
    if !enter(ctx, tunnel, TTL) {
        return None;
    }
    // SAFETY: a helper without memory arguments.
    Some(unsafe { bpf_redirect(tunnel.device, 0) as i32 })
}

/// Says of a frame where the tunnel's device is to send it. False: the kernel refuses.
#[inline(always)]
pub(super) fn enter(ctx: &TcContext, tunnel: &Tunnel, ttl: u8) -> bool {
    let v6 = tunnel.family == 6;
    let mut key = zero_key();
    key.tunnel_id = tunnel.vni;
    key.tunnel_ttl = ttl;
    let word = |i: usize| {
        [
            tunnel.remote[i],
            tunnel.remote[i + 1],
            tunnel.remote[i + 2],
            tunnel.remote[i + 3],
        ]
    };
    if v6 {
        key.__bindgen_anon_1.remote_ipv6 = [
            u32::from_ne_bytes(word(0)),
            u32::from_ne_bytes(word(4)),
            u32::from_ne_bytes(word(8)),
            u32::from_ne_bytes(word(12)),
        ];
    } else {
        // The helper takes it in the host's order.
        key.__bindgen_anon_1.remote_ipv4 = u32::from_be_bytes(word(0));
    }
    set_key(ctx, &mut key, v6)
}

/// The key of a frame that came out of the tunnel, and whether its outer packet is IPv6.
#[inline(always)]
fn arrived_with(ctx: &TcContext) -> Option<(bpf_tunnel_key, bool)> {
    let size = size_of::<bpf_tunnel_key>() as u32;
    let mut key = zero_key();
    // The helper refuses the family that is not the packet's.
    // SAFETY: the context that the kernel passed in, and a whole key that lives through the call.
    if unsafe { bpf_skb_get_tunnel_key(ctx.skb.skb, &mut key, size, 0) } == 0 {
        return Some((key, false));
    }
    let flags = u64::from(BPF_F_TUNINFO_IPV6);
    // SAFETY: as above.
    if unsafe { bpf_skb_get_tunnel_key(ctx.skb.skb, &mut key, size, flags) } == 0 {
        return Some((key, true));
    }
    None
}

/// tcx ingress of the tunnel's device: frames that other nodes forward.
#[classifier]
fn landing(ctx: TcContext) -> i32 {
    match land(&ctx) {
        Some(action) => action,
        None => {
            count(NO_SLOT_ROW, Counter::RefusedNoSlot);
            debug!(&ctx, "landing: a frame for no pod of this node");
            TCX_DROP
        }
    }
}

#[inline(always)]
fn land(ctx: &TcContext) -> Option<i32> {
    let skb = Skb(ctx);
    let (key, v6) = arrived_with(ctx)?;
    let rest = skb.load::<{ Probe::LEN - 12 }>(12);
    let probe = match rest {
        Some(rest) => Probe::parse(rest),
        None => None,
    };
    if let Some((Probe::ANSWER, probe)) = probe {
        if let Some(probed) = PROBED.get_ptr_mut(u32::from(probe.slot)) {
            // SAFETY: an aligned `u64` of a live map; user space only reads it.
            unsafe { probed.write_volatile(probe.number) };
        }
        return Some(TCX_DROP);
    }
    // Not an `Option` any more: the verifier refuses the undefined half of a `None`.
    let asks = matches!(probe, Some((Probe::ASK, _)));
    let mac = destination_mac(&skb)?;
    // SAFETY: the map value is only read.
    let landing = match unsafe { LANDINGS.get(&landing_key(mac)) } {
        Some(landing) if landing.vni == key.tunnel_id => landing,
        Some(_) => return home::land(ctx, key, v6),
        None => {
            return match home::land(ctx, key, v6) {
                Some(action) => Some(action),
                None => steer::follow(ctx, &key),
            };
        }
    };
    if asks {
        return Some(answer(ctx, key, v6));
    }
    if EndMarker::of(&skb).is_some() {
        if !steer::is_in_use() {
            return None;
        }
        // SAFETY: the map value is only read.
        let device = unsafe { DEVICES.get(&landing.tap) }?;
        steer::count(Steered::MarkerCame);
        // Behind what came on its lane: all of that is in the park.
        // SAFETY: a helper without memory arguments.
        return Some(unsafe { bpf_redirect(device.park, 0) as i32 });
    }
    count(u32::from(landing.slot), Counter::Landed);
    // SAFETY: a helper without memory arguments.
    Some(unsafe { bpf_redirect(landing.tap, 0) as i32 })
}

/// Answers a probe.
#[inline(always)]
fn answer(ctx: &TcContext, key: bpf_tunnel_key, v6: bool) -> i32 {
    if ctx.store(Probe::KIND_AT, &Probe::ANSWER, 0).is_err() {
        return TCX_DROP;
    }
    send_back(ctx, key, key.tunnel_id, v6)
}

/// Sends a frame back to the node that it came from.
#[inline(always)]
pub(super) fn send_back(ctx: &TcContext, key: bpf_tunnel_key, vni: u32, v6: bool) -> i32 {
    let mut back = zero_key();
    back.tunnel_id = vni;
    back.tunnel_ttl = TTL;
    back.__bindgen_anon_1 = key.__bindgen_anon_1;
    if !set_key(ctx, &mut back, v6) {
        return TCX_DROP;
    }
    // SAFETY: reads a field of the context that the kernel passed in; then a helper without memory arguments.
    unsafe { bpf_redirect((*ctx.skb.skb).ifindex, 0) as i32 }
}

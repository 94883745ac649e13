//! The two ends of the way home: from the guest into the tunnel at the node where it runs, out of the tunnel at the one that translates its flow.

use aya_ebpf::bindings::{BPF_F_INGRESS, bpf_tunnel_key};
use aya_ebpf::helpers::bpf_redirect;
use aya_ebpf::helpers::generated::bpf_skb_change_type;
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap};
use aya_ebpf::programs::TcContext;
use migrator_ebpf::{
    Counter, Home, Lead, MAX_BOUND, Mark, NO_SLOT, NO_SLOT_ROW, OWN_VNI, SentKey, landing_key,
    mark_of, marked, sent_key, source_mac,
};

use super::overlay::{LANDINGS, TTL, enter, send_back};
use super::{BPF_F_MMAPABLE, Skb, TCX_DROP, TCX_NEXT, count, read};

/// linux/bpf.h: memory for entries that there are, not for all that there could be.
const BPF_F_NO_PREALLOC: u32 = 1;
/// linux/if_packet.h.
const PACKET_HOST: u32 = 0;

#[map]
static LEADS: HashMap<SentKey, Lead> = HashMap::pinned(MAX_BOUND, BPF_F_NO_PREALLOC);
#[map]
static HOMES: HashMap<SentKey, Home> = HashMap::pinned(MAX_BOUND, BPF_F_NO_PREALLOC);
#[map]
static LED: Array<u64> = Array::pinned(OWN_VNI + 1, BPF_F_MMAPABLE);

/// Sends a frame of the guest to the node that translates its flow. `None`: this one does, or nobody.
#[inline(always)]
pub(super) fn lead(ctx: &TcContext, slot: u16) -> Option<i32> {
    if read(&LED, u32::from(slot)) == 0 {
        return None;
    }
    // SAFETY: `skb` is the context that the kernel passed in.
    if unsafe { (*ctx.skb.skb).vlan_present } != 0 {
        return None;
    }
    let key = sent_key(&Skb(ctx), slot)?;
    // SAFETY: the map value is only read.
    let lead = unsafe { LEADS.get(&key) }?;
    if lead.until_s == 0 || !enter(ctx, &lead.tunnel, TTL) {
        return None;
    }
    // SAFETY: a helper without memory arguments.
    Some(unsafe { bpf_redirect(lead.tunnel.device, 0) as i32 })
}

/// A frame out of the tunnel that is for no pod of this node. `None`: it bears no mark of this network, or is of no use to anybody.
#[inline(always)]
pub(super) fn land(ctx: &TcContext, key: bpf_tunnel_key, v6: bool) -> Option<i32> {
    match mark_of(read(&LED, OWN_VNI) as u32, key.tunnel_id)? {
        Mark::Home => come_home(ctx, key, v6),
        Mark::Back => come_back(ctx),
    }
}

/// The node's own stack takes it, as if the pod were still here: its connection tracking knows what to translate.
///
/// On a bridge the frame comes in by the bridge itself and not by a port, so no port learns the pod's address.
#[inline(always)]
fn come_home(ctx: &TcContext, key: bpf_tunnel_key, v6: bool) -> Option<i32> {
    let sent = sent_key(&Skb(ctx), NO_SLOT)?;
    // SAFETY: the map value is only read.
    let Some(home) = (unsafe { HOMES.get(&sent) }) else {
        let vni = marked(read(&LED, OWN_VNI) as u32, Mark::Back);
        return Some(send_back(ctx, key, vni, v6));
    };
    count(NO_SLOT_ROW, Counter::Homed);
    if home.device == 0 {
        // For the kernel it is for the pod's gateway, and thus for somebody else.
        // SAFETY: the context that the kernel passed in.
        return match unsafe { bpf_skb_change_type(ctx.skb.skb, PACKET_HOST) } {
            0 => Some(TCX_NEXT),
            _ => Some(TCX_DROP),
        };
    }
    let device = home.device;
    if ctx.store(0, &home.mac, 0).is_err() {
        return Some(TCX_DROP);
    }
    // SAFETY: a helper without memory arguments.
    Some(unsafe { bpf_redirect(device, u64::from(BPF_F_INGRESS)) as i32 })
}

/// Its home does not know the flow any more: it is led nowhere from now on, and this frame goes on from the TAP as if it had just come.
#[inline(always)]
fn come_back(ctx: &TcContext) -> Option<i32> {
    let skb = Skb(ctx);
    let mac = source_mac(&skb)?;
    // SAFETY: the map value is only read.
    let landing = unsafe { LANDINGS.get(&landing_key(mac)) }?;
    let sent = sent_key(&skb, landing.slot)?;
    let lead = LEADS.get_ptr_mut(&sent)?;
    // The entry stays for those that come behind this one; the service removes it.
    // SAFETY: an aligned `u32` of a live map value, which user space never changes.
    unsafe { (&raw mut (*lead).until_s).write_volatile(0) };
    // SAFETY: a helper without memory arguments.
    Some(unsafe { bpf_redirect(landing.tap, u64::from(BPF_F_INGRESS)) as i32 })
}

//! A frame for a pod that has left, sent on from the uplink with the tunnel's headers around it; beside it what the kernel does by itself
//! with a frame that comes in and goes out.
//!
//! ```text
//!   eth0 [uplink: XDP, TUNNEL] ------------- und0 ---- und1     ours
//!   eth0 - br0 - vxl0, with a static entry - und0 ---- und1     a bridge and the kernel's VXLAN
//!   eth0 - br0 - mt1 [gate: TUNNEL] - mvxlan - und0 ---- und1     our own way of all but small packets
//!   raw0 -------------- routed ------------- und0 ---- und1     Linux routing, with nothing put around
//! ```
//!
//! Where the frames go to, they are for nobody, and the kernel drops them at once. Each must have been sent.

use anyhow::{Context, Result, ensure};
use aya::maps::xdp::DevMapHash;
use aya::maps::{Array, HashMap, Map, MapData};
use migrator::network::{Port, TUNNEL_DEVICE, TunnelConfig, XdpChoice};
use migrator_ebpf::{Ends, Gate, Mode, Outer, Tunnel, names};
use nix::net::if_::if_nametoindex;

use crate::frames::checksum;
use crate::ground::{GATED, Ground, RAW, UPLINK, mac};
use crate::live::{FRAMES, Live, TCP, Took, UDP, frame};
use crate::schedule::{Place, settle};
use crate::tell;

/// Frames of a run.
const ALL: u32 = FRAMES;
/// So many at a time where they are routed: the kernel makes 64 frames and has them come in again and again, while routing takes one off the time to
/// live of each. 255 is enough for these.
const PART: u32 = ALL / 4;

const TUNNEL: TunnelConfig = TunnelConfig {
    vni: 77,
    port: 4789,
    mtu: Some(1500),
};
/// Behind the kernel's tunnel.
const STATION: [u8; 6] = [0x02, 0, 0, 0, 0, 0x99];
/// The device that all leave by, its own address, and what is at the other end.
const OUT: &str = "und0";
const OUT_MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 0x97];
const NEXT_MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 0x98];
const RAW_MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 0x96];
/// What a device may send of its own meanwhile: discovery.
const STRAY: u64 = 100;

/// What ours is measured against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Peer {
    /// A bridge with a VXLAN port.
    Vxlan,
    /// Our own gate, with the kernel's VXLAN: the way of what XDP leaves to the kernel.
    Gate,
    /// Plain routing.
    Route,
}

impl Peer {
    fn frame(self) -> (&'static str, Vec<u8>) {
        match self {
            Self::Vxlan => (UPLINK, frame(STATION, [10, 77, 0, 99], UDP)),
            Self::Gate => (UPLINK, frame(mac(GATED).0, [10, 77, 0, 10], TCP)),
            Self::Route => (RAW, frame(RAW_MAC, [10, 78, 0, 3], UDP)),
        }
    }

    /// How many frames at a time, of both sides.
    fn part(self) -> u32 {
        match self {
            Self::Vxlan | Self::Gate => ALL,
            Self::Route => PART,
        }
    }

    fn prepare(self, ground: &Ground) -> Result<()> {
        let netns = &ground.netns;
        match self {
            Self::Vxlan => {
                netns.ip("link add vxl0 type vxlan id 78 dstport 4790 local 10.78.0.1 dev und0 ttl 64 nolearning noudpcsum")?;
                netns.ip("link set vxl0 master br0 up")?;
                crate::ground::wait_for_port(netns, "vxl0")?;
                for entry in ["master static", "dst 10.78.0.2 self"] {
                    let entry = format!("fdb append 02:00:00:00:00:99 dev vxl0 {entry}");
                    netns.run("bridge", &entry)?;
                }
            }
            Self::Gate => {}
            Self::Route => {
                netns.ip("link set raw0 address 02:00:00:00:00:96")?;
                // Of the frames' source, so that no filter of the kernel's wonders about it.
                netns.ip("addr add 10.77.0.2/24 dev raw0")?;
                // The kernel writes the next hop's address into the frames, which come in again: so it is the one that they come with.
                netns.ip("neigh add 10.78.0.3 lladdr 02:00:00:00:00:96 dev und0 nud permanent")?;
                ground.within(|| std::fs::write("/proc/sys/net/ipv4/ip_forward", "1"))?;
            }
        }
        Ok(())
    }
}

/// Measures and prints.
///
/// # Errors
/// The network cannot be made, or a frame is not sent.
pub(crate) fn measure(peer: Peer, runs: u32) -> Result<()> {
    let ground = Ground::with(XdpChoice::On, Some(TUNNEL))?;
    way_out(&ground)?;
    peer.prepare(&ground)?;
    let port = ground.attach(GATED)?;
    ground.within(|| -> Result<()> {
        settle(Place::Sender)?;
        let live = Live::load(&ground)?;
        depart(&ground, &live)?;
        let ours = (UPLINK, frame(mac(GATED).0, [10, 77, 0, 10], UDP));
        let (part, peer) = (peer.part(), peer.frame());
        // The first run of each is to warm up.
        for run in 0..=runs {
            for (side, from) in [("ours", &ours), ("peer", &peer)] {
                let measured = once(&ground, &port, &live, (side == "ours", part), from);
                if run > 0 {
                    tell(side, measured);
                } else {
                    measured?;
                }
            }
        }
        Ok(())
    })
}

fn once(
    ground: &Ground,
    port: &Port,
    live: &Live,
    (is_ours, part): (bool, u32),
    (device, frame): &(&str, Vec<u8>),
) -> Result<Vec<(&'static str, f64)>> {
    let mut frame = frame.clone();
    frame[22] = u8::MAX;
    frame[24..26].fill(0);
    let sum = checksum(&frame[14..34]);
    frame[24..26].copy_from_slice(&sum.to_be_bytes());
    let (before, booked) = (sent(ground)?, ground.reasons(port)?.forwarded_xdp);
    let all = u64::from(ALL);
    let mut took = Took::NONE;
    for _ in 0..ALL / part {
        took = took.and(live.receive_by(device, &frame, part)?);
    }
    let (sent, booked) = (
        sent(ground)? - before,
        ground.reasons(port)?.forwarded_xdp - booked,
    );
    ensure!(
        (all..all + STRAY).contains(&sent),
        "{OUT} sent {sent} of {ALL} frames"
    );
    let expected = if is_ours { all } else { 0 };
    ensure!(booked == expected, "{booked} of {ALL} went by XDP");
    Ok(took.figures(ALL))
}

/// Frames that have left.
fn sent(ground: &Ground) -> Result<u64> {
    let shown = ground
        .netns
        .run("ip", &format!("-s -j link show dev {OUT}"))?;
    let shown: serde_json::Value = serde_json::from_str(&shown)?;
    shown[0]["stats64"]["tx"]["packets"]
        .as_u64()
        .with_context(|| format!("`ip` does not say what {OUT} has sent"))
}

/// The network between the nodes.
fn way_out(ground: &Ground) -> Result<()> {
    let (netns, outside) = (&ground.netns, &ground.outside.netns);
    netns.ip("link add und0 type veth peer name und1")?;
    let path = outside.path();
    netns.ip(&format!("link set und1 netns {}", path.display()))?;
    netns.ip("link set und0 address 02:00:00:00:00:97")?;
    for (netns, end) in [(netns, OUT), (outside, "und1")] {
        netns.ip(&format!("link set {end} mtu 1600 up"))?;
    }
    // Or a veth takes nothing by XDP. It is so for all that is measured.
    outside.collect("und1")?;
    netns.ip("addr add 10.78.0.1/24 dev und0")?;
    netns.ip("neigh add 10.78.0.2 lladdr 02:00:00:00:00:98 dev und0 nud permanent")
}

/// The gate as it is at the end of a move, when all that was relayed is acknowledged. How it gets there is measured elsewhere.
fn depart(ground: &Ground, live: &Live) -> Result<()> {
    let pin =
        |name| -> Result<Map> { Ok(Map::from_map_data(MapData::from_pin(ground.map(name))?)?) };
    let device = if_nametoindex(OUT)?;
    let ends = Ends::V4([10, 78, 0, 1], [10, 78, 0, 2]);
    let hop = [NEXT_MAC, OUT_MAC];
    let outer = Outer::new(device, 1514, hop, ends, (TUNNEL.vni, TUNNEL.port));
    let mut outers: HashMap<MapData, u32, Outer> = pin(names::OUTERS)?.try_into()?;
    outers.insert(u32::from(GATED), outer, 0)?;
    let mut ways_out: DevMapHash<MapData> = pin(names::WAYS_OUT)?.try_into()?;
    ways_out.insert(device, device, Some(live.onto_wire()?), 0)?;
    let mut remote = [0; 16];
    remote[..4].copy_from_slice(&[10, 78, 0, 2]);
    let mut tunnels: Array<MapData, Tunnel> = pin(names::TUNNELS)?.try_into()?;
    let tunnel = Tunnel {
        device: if_nametoindex(TUNNEL_DEVICE)?,
        vni: TUNNEL.vni,
        family: 4,
        remote,
    };
    tunnels.set(u32::from(GATED), tunnel, 0)?;
    let mut gates: Array<MapData, u64> = pin(names::GATES)?.try_into()?;
    let before = Gate::from_word(gates.get(&u32::from(GATED), 0)?);
    let gate = Gate {
        mode: Mode::Tunnel,
        may_send: false,
        epoch: before.epoch + 1,
        ..before
    };
    Ok(gates.set(u32::from(GATED), gate.to_word(), 0)?)
}

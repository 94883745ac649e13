//! A frame for a pod that has left, from the uplink through the tunnel and out; beside it what a bridge does with a frame that only passes
//! through. (Not a router: it would change the frames, which the kernel makes once.)
//!
//! ```text
//!   eth0 - br0 - mt1 [gate: TUNNEL] - mvxlan - und0 ---- und1       ours
//!          br0 ------------------------------ prt0 ---- prt1      a bridge
//! ```
//!
//! Where the frames go to, they are for nobody, and the kernel drops them at once. Each must have been sent.

use anyhow::{Context, Result, ensure};
use aya::maps::{Array, Map, MapData};
use migrator::network::{TUNNEL_DEVICE, TunnelConfig, XdpChoice};
use migrator_ebpf::{Gate, Mode, Tunnel, names};
use nix::net::if_::if_nametoindex;

use crate::ground::{GATED, Ground, mac, wait_for_port};
use crate::live::{FRAMES, Live, UDP, frame};
use crate::schedule::{Place, settle};
use crate::tell;

const TUNNEL: TunnelConfig = TunnelConfig {
    vni: 77,
    port: 4789,
    mtu: Some(1500),
};
/// Behind the bridge's other port.
const STATION: [u8; 6] = [0x02, 0, 0, 0, 0, 0x99];
/// What a device may send of its own meanwhile: discovery.
const STRAY: u64 = 100;

/// Measures and prints.
///
/// # Errors
/// The network cannot be made, or a frame is not sent.
pub(crate) fn measure(runs: u32) -> Result<()> {
    let ground = Ground::with(XdpChoice::Off, Some(TUNNEL))?;
    ways_out(&ground)?;
    let port = ground.attach(GATED)?;
    ground.within(|| -> Result<()> {
        settle(Place::Sender)?;
        depart(&ground)?;
        let live = Live::load(&ground)?;
        let pod = frame(mac(GATED).0, [10, 77, 0, 10], UDP);
        let passing = frame(STATION, [10, 77, 0, 99], UDP);
        for run in 0..=runs {
            for (side, frame, out) in [("ours", &pod, "und0"), ("peer", &passing, "prt0")] {
                let before = ground.reasons(&port)?;
                let measured = once(&ground, &live, frame, out);
                let now = ground.reasons(&port)?;
                let tunnelled = now.forwarded_tunnel - before.forwarded_tunnel;
                let expected = if side == "ours" { u64::from(FRAMES) } else { 0 };
                ensure!(tunnelled == expected, "{side}: {before:?} {now:?}");
                // The first run of each is to warm up.
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

fn once(ground: &Ground, live: &Live, frame: &[u8], out: &str) -> Result<Vec<(&'static str, f64)>> {
    let before = sent(ground, out)?;
    let took = live.receive(frame)?;
    let sent = sent(ground, out)? - before;
    let all = u64::from(FRAMES);
    ensure!(
        (all..all + STRAY).contains(&sent),
        "{out} sent {sent} of {FRAMES} frames"
    );
    Ok(took.figures())
}

/// Frames that a device has sent.
fn sent(ground: &Ground, device: &str) -> Result<u64> {
    let shown = ground
        .netns
        .run("ip", &format!("-s -j link show dev {device}"))?;
    let shown: serde_json::Value = serde_json::from_str(&shown)?;
    shown[0]["stats64"]["tx"]["packets"]
        .as_u64()
        .with_context(|| format!("`ip` does not say what {device} has sent"))
}

/// The underlay, and another port of the bridge.
fn ways_out(ground: &Ground) -> Result<()> {
    let netns = &ground.netns;
    for (inner, outer) in [("und0", "und1"), ("prt0", "prt1")] {
        netns.ip(&format!("link add {inner} type veth peer name {outer}"))?;
        let outside = &ground.outside.netns;
        let path = outside.path();
        netns.ip(&format!("link set {outer} netns {}", path.display()))?;
        for (netns, end) in [(netns, inner), (outside, outer)] {
            netns.ip(&format!("link set {end} mtu 1600 up"))?;
        }
    }
    netns.ip("addr add 10.78.0.1/24 dev und0")?;
    netns.ip("neigh add 10.78.0.2 lladdr 02:00:00:00:00:98 dev und0 nud permanent")?;
    netns.ip("link set prt0 master br0")?;
    wait_for_port(netns, "prt0")?;
    let entry = "fdb replace 02:00:00:00:00:99 dev prt0 master static";
    netns.run("bridge", entry).map(drop)
}

/// The gate as it is at the end of a move, when all that was relayed is acknowledged. How it gets there is measured elsewhere.
fn depart(ground: &Ground) -> Result<()> {
    let pin =
        |name| -> Result<Map> { Ok(Map::from_map_data(MapData::from_pin(ground.map(name))?)?) };
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

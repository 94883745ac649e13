//! The namespaces, the node's network, and its ports.

use std::future::Future;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use aya::maps::{Array, Map, MapData, MapInfo};
use aya::programs::{ProgramInfo, loaded_programs};
use migrator::network::{
    NodeNetConfig, NodeNetwork, ParkLimits, PodNetId, Port, Reasons, Role, TunnelConfig, XdpChoice,
    tap_name,
};
use migrator_ebpf::{ABI, is_settled, names};
use migrator_tests::jobs::Jobs;
use migrator_tests::netns::{BpfDir, Netns, require_root, take_segments_whole};
use tempfile::TempDir;
use vm_runtime::units::MacAddress;

use crate::DEADLINE;
use crate::schedule::{Place, settle};

/// The slot of the port that is measured.
pub(crate) const GATED: u16 = 1;
/// The slot of the port whose programs are taken away.
pub(crate) const BARE: u16 = 2;
/// The bridge's uplink.
pub(crate) const UPLINK: &str = "eth0";
/// The same, seen from outside.
pub(crate) const TO_BRIDGE: &str = "out0";
/// The way to a device that is no port of a bridge.
pub(crate) const TO_RAW: &str = "out1";
/// That device.
pub(crate) const RAW: &str = "raw0";

/// Where the sender is.
pub(crate) struct Outside {
    pub(crate) netns: Netns,
}

/// A node with one pod, or two.
pub(crate) struct Ground {
    pub(crate) outside: Outside,
    pub(crate) netns: Netns,
    jobs: Jobs,
    network: NodeNetwork,
    dir: BpfDir,
    _spool: TempDir,
}

/// The address of the pod in a slot.
pub(crate) fn mac(slot: u16) -> MacAddress {
    MacAddress([0x52, 0x54, 0, 0, 1, slot as u8])
}

impl Ground {
    /// Makes all of it; the kernel takes it down with this value.
    ///
    /// # Errors
    /// The kernel lacks something.
    ///
    /// # Panics
    /// Not root.
    pub(crate) fn new(xdp: XdpChoice) -> Result<Ground> {
        Ground::with(xdp, None)
    }

    /// As [`new`](Self::new), with a tunnel.
    ///
    /// # Errors
    /// The kernel lacks something.
    ///
    /// # Panics
    /// Not root.
    pub(crate) fn with(xdp: XdpChoice, tunnel: Option<TunnelConfig>) -> Result<Ground> {
        require_root();
        let (outside, netns) = (Netns::new()?, Netns::new()?);
        netns.ip("link add br0 type bridge forward_delay 0 mcast_snooping 0")?;
        for (inner, outer) in [(UPLINK, TO_BRIDGE), (RAW, TO_RAW)] {
            netns.ip(&format!("link add {inner} type veth peer name {outer}"))?;
            netns.ip(&format!(
                "link set {outer} netns {}",
                outside.path().display()
            ))?;
            outside.ip(&format!("link set {outer} up"))?;
        }
        netns.ip("link set eth0 master br0 up")?;
        netns.ip(&format!("link set {RAW} up"))?;
        netns.ip("link set br0 up")?;
        wait_for_port(&netns, UPLINK)?;
        let jobs = Jobs::start_after(&netns, || {
            // The threads of ports come from here. What takes the sender's CPU away takes the offered frames away.
            if let Err(error) = settle(Place::Receiver) {
                eprintln!("packet-path: {error:#}");
            }
        });
        // In memory, as the service has it: on a disk, the file of parked frames would be what is measured.
        let (dir, spool) = (BpfDir::new()?, tempfile::tempdir_in("/dev/shm")?);
        let config = NodeNetConfig {
            ground: migrator::network::Ground::Bridge("br0".into()),
            uplink: UPLINK.into(),
            xdp,
            bpffs: dir.path().to_owned(),
            spool_dir: spool.path().join("spool"),
            tunnel,
            park: ParkLimits {
                bytes: 1 << 30,
                bytes_per_pod: 1 << 30,
            },
            bound_limit: std::time::Duration::from_secs(3600),
            cluster: None,
        };
        let network = jobs.call(NodeNetwork::open(config))??;
        Ok(Ground {
            outside: Outside { netns: outside },
            netns,
            jobs,
            network,
            dir,
            _spool: spool,
        })
    }

    /// A future of the node's network, run where it belongs.
    ///
    /// # Errors
    /// It takes too long.
    pub(crate) fn call<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> Result<T> {
        self.jobs.call(work)
    }

    /// The port of a pod that runs here, as a VMM leaves it whose guest takes TCP segments whole.
    ///
    /// # Errors
    /// The network has none to give.
    pub(crate) fn attach(&self, slot: u16) -> Result<Port> {
        let pod = PodNetId {
            name: format!("pod{slot}"),
            mac: mac(slot),
            v4: Some([10, 77, 0, slot as u8].into()),
            v6: None,
        };
        let network = self.network.clone();
        let attached =
            self.call(async move { network.attach(&pod, slot, Role::Local, None).await });
        let port = attached??;
        take_segments_whole(port.tap_fd()?.as_fd())?;
        wait_for_port(&self.netns, &tap_name(slot))?;
        self.wait_until_settled(slot)?;
        Ok(port)
    }

    /// A gate that has just opened has the service look first whether anything waits.
    fn wait_until_settled(&self, slot: u16) -> Result<()> {
        let words: Array<MapData, u64> =
            Array::try_from(Map::Array(MapData::from_pin(self.map(names::GATES))?))?;
        let until = Instant::now() + DEADLINE;
        while !is_settled(words.get(&u32::from(slot), 0)?, slot) {
            ensure!(
                Instant::now() < until,
                "the gate of slot {slot} does not settle"
            );
            std::thread::yield_now();
        }
        Ok(())
    }

    /// Runs `work` on a thread inside the node.
    ///
    /// # Panics
    /// The namespace cannot be entered, or `work` panics.
    pub(crate) fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                self.netns.enter();
                work()
            });
            match thread.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// The same, with nothing of ours on its TAP.
    ///
    /// # Errors
    /// As [`attach`](Self::attach), or a pin cannot be removed.
    pub(crate) fn attach_bare(&self) -> Result<Port> {
        let port = self.attach(BARE)?;
        // A link without a pin and without a descriptor detaches its program.
        for entry in std::fs::read_dir(self.pins())?.flatten() {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if name.starts_with("link_") && name.ends_with(&format!("_{BARE}")) {
                std::fs::remove_file(entry.path())?;
            }
        }
        Ok(port)
    }

    /// What a port has done with frames.
    ///
    /// # Errors
    /// It is gone.
    pub(crate) fn reasons(&self, port: &Port) -> Result<Reasons> {
        let port = port.clone();
        Ok(self.call(async move { port.ledger().await })??.reasons)
    }

    /// Where the programs' maps and links are pinned.
    pub(crate) fn pins(&self) -> PathBuf {
        self.dir.path().join(format!("v{ABI}"))
    }

    /// Where a map is pinned.
    pub(crate) fn map(&self, name: &str) -> PathBuf {
        self.pins().join(name)
    }

    /// What the kernel says of this node's gate. Other nodes of the machine have programs of the same name: this node's is the one
    /// that uses its map.
    ///
    /// # Errors
    /// There is none.
    pub(crate) fn gate(&self) -> Result<ProgramInfo> {
        let words = MapInfo::from_pin(self.map(names::GATES))?.id();
        loaded_programs()
            .flatten()
            .find(|program| {
                program.name_as_str() == Some(names::GATE)
                    && matches!(program.map_ids(), Ok(Some(maps)) if maps.contains(&words))
            })
            .context("the gate is not loaded")
    }
}

/// A bridge forwards on a port only when it has heard of its carrier, which takes the kernel a second.
pub(crate) fn wait_for_port(netns: &Netns, port: &str) -> Result<()> {
    // Opened before the first look, so that no change is missed.
    let news = netns.link_news()?;
    let until = Instant::now() + DEADLINE;
    loop {
        let shown = netns.run("bridge", &format!("link show dev {port}"))?;
        if shown.contains("state forwarding") {
            return Ok(());
        }
        news.wait(until)
            .with_context(|| format!("{port} does not forward"))?;
    }
}

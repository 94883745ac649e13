//! What cases with guests run on: the lab with one QEMU, and in it the two guests that are compared. Dropping it takes all of it down.

mod image;
pub(super) mod load;
pub(super) mod ours;
pub(super) mod peer;
mod pod;

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::runtime::Runtime;
use vm_runtime::probe;
use vm_runtime::qemu::{QemuBinary, QemuConfig};
use vm_runtime::spec::AccelChoice;

use self::load::{Load, Work};
use self::ours::Ours;
use self::peer::{Ground, Memory, Peer, TAPS};
use self::pod::Guest;
use crate::lab::{Lab, Node, Owner};
use crate::project::Project;
use crate::{cmd, qemu10};

/// A guest boots in 5 s under emulation, on an idle machine.
const BOOTS_WITHIN: Duration = Duration::from_secs(120);
/// What has not moved after this does not converge.
const MOVES_WITHIN: Duration = Duration::from_secs(120);
/// The longest predicted downtime that lets either side freeze the guest: QEMU's default, and ours.
const DOWNTIME_LIMIT_MS: u32 = 300;
/// Between two steps of a run: a load that was just begun comes to its rate, a guest that was just moved comes to rest.
const SETTLES: Duration = Duration::from_millis(500);

/// One move of a guest, on either side.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Moved {
    /// From the request until nothing is left to do.
    pub(super) total_ms: f64,
    /// What the start of the destination's QEMU took before that; 0 where the total has it in it.
    pub(super) start_ms: f64,
    /// From the source's stop to the destination's resume.
    pub(super) downtime_ms: f64,
    /// When the source stopped, in microseconds of Unix time.
    pub(super) stopped_at_unix_us: u64,
}

impl Moved {
    /// A guest that stood still for so long, and went on where it was.
    fn on_the_spot(stopped_at_unix_us: u64, downtime_ms: f64) -> Moved {
        Moved {
            total_ms: downtime_ms,
            start_ms: 0.0,
            downtime_ms,
            stopped_at_unix_us,
        }
    }
}

/// Begins the load of a run.
///
/// # Errors
/// The guest does not answer.
pub(super) fn settle(load: &Load, work: Work) -> Result<()> {
    load.set(work)?;
    std::thread::sleep(SETTLES);
    Ok(())
}

/// Which QEMU both sides run on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Which {
    /// The unpacked one.
    Ten,
    /// The one that is installed: 7.2 on Debian 12.
    Installed,
}

impl Which {
    /// As in the names of cases.
    pub(super) fn name(self) -> &'static str {
        match self {
            Which::Ten => "qemu10",
            Which::Installed => "installed",
        }
    }
}

/// A lab that is up, with what a peer needs beside it.
pub(super) struct Stage {
    which: Which,
    /// Of the guests' writable disks; 0 without one.
    disk_mib: u32,
    // In this order they are dropped: first the guests, then the lab.
    pair: Option<Pair>,
    lab: LabGuard,
    ground: Arc<Ground>,
    _runtime: Runtime,
}

/// The guests of one size. The one that is not measured idles meanwhile.
pub(super) struct Pair {
    mib: u32,
    memory: Memory,
    pub(super) ours: Ours,
    pub(super) peer: Peer,
}

/// Takes the lab down.
struct LabGuard(Lab);

impl Drop for LabGuard {
    fn drop(&mut self) {
        if let Err(error) = self.0.down() {
            println!("bench: {error:#}");
        }
    }
}

impl Stage {
    /// Brings the lab up on this QEMU, with the image on both nodes.
    ///
    /// # Errors
    /// A lab of the user's is up, or this one does not come up.
    pub(super) fn up(project: &Project, which: Which) -> Result<Stage> {
        Self::up_with_disks(project, which, 0)
    }

    /// The same; guests have a writable disk of so many MiB.
    ///
    /// # Errors
    /// As for [`Stage::up`].
    pub(super) fn up_with_disks(project: &Project, which: Which, disk_mib: u32) -> Result<Stage> {
        let lab = Lab::new(project)?;
        let mine = lab.state()?.owner != Some(Owner::User);
        if !mine && Node::ALL.iter().any(|node| lab.is_running(*node)) {
            bail!(
                "a lab is up: the benchmark would replace it, so take it down first with `cargo xtask lab down`"
            );
        }
        let image = image::ensure(project)?;
        let (program, config) = match which {
            Which::Ten => {
                let qemu = qemu10::ensure(project)?;
                let config = QemuConfig {
                    binary: Some(qemu.binary),
                    lib_dir: Some(qemu.lib_dir),
                    data_dirs: qemu.data_dirs,
                };
                ("10", config)
            }
            Which::Installed => ("qemu-system-x86_64", QemuConfig::default()),
        };
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .context("cannot start a runtime")?;
        let qemu = runtime.block_on(QemuBinary::open(&config))?;
        let program = match which {
            Which::Ten => program.into(),
            Which::Installed => qemu.path.to_string_lossy(),
        };
        let lab = LabGuard(lab.with_qemu(&program));
        println!("bench: bringing the lab up with QEMU {}", version(&qemu));
        lab.0.up(Owner::Demo)?;
        for node in Node::ALL {
            cmd::output(lab.0.on(node).args(["image", "import"]).arg(&image))?;
        }
        let choice = match std::env::var("MIGRATOR_ACCEL").as_deref() {
            Ok("kvm") => AccelChoice::Kvm,
            Ok("tcg") => AccelChoice::Tcg,
            Ok(_) | Err(_) => AccelChoice::Auto,
        };
        let (accel, why) = runtime.block_on(probe::resolve(&qemu, choice))?;
        println!("bench: guests run under {accel}: {why}");
        let ground = Arc::new(Ground {
            disk: imported(&lab.0)?,
            lab: lab.0.clone(),
            runtime: runtime.handle().clone(),
            qemu,
            accel,
            kernel: project.kernel(),
            initramfs: project.initramfs(),
        });
        peers_network(&ground)?;
        Ok(Stage {
            which,
            disk_mib,
            pair: None,
            lab,
            ground,
            _runtime: runtime,
        })
    }

    /// The lab.
    pub(super) fn lab(&self) -> &Lab {
        &self.lab.0
    }

    /// The QEMU of both sides, for people.
    pub(super) fn qemu(&self) -> String {
        format!("QEMU {}", version(&self.ground.qemu))
    }

    /// Which QEMU that is.
    pub(super) fn which(&self) -> Which {
        self.which
    }

    /// Both guests with so much RAM, well and idle. Guests of another size, or of other memory for the peer, end first; one
    /// that is not well is started anew.
    ///
    /// # Errors
    /// One does not start.
    pub(super) fn pair(&mut self, mib: u32, memory: Memory) -> Result<&mut Pair> {
        let (ours, peer) = match self.pair.take() {
            Some(pair) if pair.mib == mib && pair.memory == memory => {
                (Some(pair.ours), Some(pair.peer))
            }
            Some(pair) if pair.mib == mib => (Some(pair.ours), None),
            Some(_) | None => (None, None),
        };
        let ours = match ours.and_then(Ours::well) {
            Some(ours) => ours,
            None => {
                println!("bench: booting a guest of {mib} MiB under migrator");
                Ours::start(&self.lab.0, Guest::ours(mib, self.disk_mib))?
            }
        };
        let peer = match peer.and_then(Peer::well) {
            Some(peer) => peer,
            None => {
                println!("bench: booting a guest of {mib} MiB under QEMU alone");
                Peer::start(&self.ground, Guest::peer(mib, self.disk_mib), memory)?
            }
        };
        ours.load.set(Work::Idle)?;
        peer.load.set(Work::Idle)?;
        Ok(self.pair.insert(Pair {
            mib,
            memory,
            ours,
            peer,
        }))
    }
}

fn version(qemu: &QemuBinary) -> String {
    let (major, minor, micro) = qemu.version;
    format!("{major}.{minor}.{micro}")
}

/// The block device of node a's image, put together from its chunks.
fn imported(lab: &Lab) -> Result<PathBuf> {
    let images = lab.node_dir(Node::A).join("state/images");
    let entries = std::fs::read_dir(&images)
        .with_context(|| format!("cannot list {}", images.display()))?
        .flatten();
    let found: Vec<PathBuf> = entries
        .map(|entry| entry.path().join("record.json"))
        .filter(|path| path.is_file())
        .collect();
    let [record] = &found[..] else {
        bail!(
            "{} holds {} images where one was imported",
            images.display(),
            found.len()
        );
    };
    let record: serde_json::Value = serde_json::from_slice(&std::fs::read(record)?)?;
    let chunks = record["chunks"]
        .as_array()
        .context("the record has no chunks")?;
    let path = lab.node_dir(Node::A).join("image.erofs");
    let mut file = std::fs::File::create(&path)?;
    for chunk in chunks {
        let hex = chunk.as_str().and_then(|text| text.strip_prefix("sha256:"));
        let hex = hex.context("a chunk without a digest")?;
        let chunk = images.join("chunks").join(&hex[..2]).join(hex);
        file.write_all(&std::fs::read(chunk)?)?;
    }
    Ok(path)
}

/// Ports of the bridges for the peer's TAPs, and certificates under the names that QEMU looks for.
fn peers_network(ground: &Ground) -> Result<()> {
    for node in Node::ALL {
        let netns = ground.lab.netns(node.name());
        for tap in TAPS {
            for words in [
                format!("-n {netns} tuntap add dev {tap} mode tap vnet_hdr"),
                format!("-n {netns} link set {tap} master br0"),
                format!("-n {netns} link set {tap} up"),
            ] {
                cmd::output(&mut cmd::command("ip", words.split(' ')))?;
            }
        }
        let (from, to) = (ground.lab.node_dir(node), ground.tls_dir(node));
        std::fs::create_dir_all(&to).with_context(|| format!("cannot make {}", to.display()))?;
        for (ours, theirs) in [
            ("ca.pem", "ca-cert.pem"),
            ("cert.pem", "server-cert.pem"),
            ("key.pem", "server-key.pem"),
            ("cert.pem", "client-cert.pem"),
            ("key.pem", "client-key.pem"),
        ] {
            std::os::unix::fs::symlink(from.join(ours), to.join(theirs))
                .with_context(|| format!("cannot link {theirs}"))?;
        }
    }
    Ok(())
}

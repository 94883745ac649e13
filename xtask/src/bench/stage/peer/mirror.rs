//! A move with a writable disk, as libvirt makes it: `blockdev-mirror` to an NBD export of the destination, then the migration, which
//! holds with the guest stopped until the mirror has ended.

use std::fs::File;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::args::WRITABLE_NODE;
use super::{How, MOVES_WITHIN, Moved, Peer, UNLIMITED, Watch};
use crate::cmd;
use crate::lab::Node;
use crate::probe::now_us;

/// Where the destination's disk is exported.
const PORT: &str = "7791";
const JOB: &str = "mirror";
const TARGET: &str = "target0";
/// Those of our own disks: migrator/src/block/mkfs.rs.
const MKE2FS: [&str; 10] = [
    "-q",
    "-F",
    "-t",
    "ext4",
    "-m",
    "0",
    "-e",
    "remount-ro",
    "-E",
    "lazy_itable_init=1,lazy_journal_init=1,nodiscard",
];

impl Peer {
    /// An empty file system for the guest's first boot, if it has a disk.
    pub(super) fn make_disk(&self) -> Result<()> {
        if self.guest.disk_mib == 0 {
            return Ok(());
        }
        self.make_file(Node::A)?;
        let mut mke2fs = std::process::Command::new("mke2fs");
        cmd::output(mke2fs.args(MKE2FS).arg(self.ground.writable(Node::A))).map(drop)
    }

    /// One hole of the disk's size.
    fn make_file(&self, node: Node) -> Result<()> {
        let path = self.ground.writable(node);
        let file =
            File::create(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(file.set_len(u64::from(self.guest.disk_mib) << 20)?)
    }

    /// Moves the guest and its disk to the other node. The total begins with the mirror.
    ///
    /// # Errors
    /// It does not arrive, or does not answer there. The guest is gone then.
    pub(in crate::bench) fn migrate_with_disk(&mut self) -> Result<Moved> {
        let how = How::default();
        let source = self.take()?;
        let (from, to) = (source.node, source.node.other());
        let requested_at = now_us();
        self.make_file(to)?;
        let destination = self.destination(&source, how)?;
        let address = json!({ "type": "inet", "data": { "host": to.address(), "port": PORT } });
        destination.execute("nbd-server-start", json!({ "addr": address }))?;
        let export =
            json!({ "type": "nbd", "id": "disk", "node-name": WRITABLE_NODE, "writable": true });
        destination.execute("block-export-add", export)?;
        let mut watch = Watch::new(&source, &destination)?;
        let deadline = Instant::now() + MOVES_WITHIN;
        let runtime = self.ground.runtime.clone();
        let begun_at = now_us();
        let server = json!({ "type": "inet", "host": to.address(), "port": PORT });
        let node = json!({ "driver": "nbd", "node-name": TARGET, "export": WRITABLE_NODE, "server": server });
        source.execute("blockdev-add", node)?;
        let mirror =
            json!({ "job-id": JOB, "device": WRITABLE_NODE, "target": TARGET, "sync": "full" });
        source.execute("blockdev-mirror", mirror)?;
        watch.until(&runtime, deadline, |course| course.mirrors.then_some(()))?;
        // From here on a write is over when both sides have it: nothing is left to be copied in the freeze.
        let change = json!({ "id": JOB, "type": "mirror", "copy-mode": "write-blocking" });
        source.execute("block-job-change", change)?;
        source.set_capabilities(&[("pause-before-switchover", true)])?;
        self.begin(&source, how, UNLIMITED)?;
        watch.until(&runtime, deadline, |course| course.is_held.then_some(()))?;
        // Of a mirror that is ready, this is its end.
        source.execute("block-job-cancel", json!({ "device": JOB }))?;
        watch.until(&runtime, deadline, |course| course.mirrored.then_some(()))?;
        // QEMU takes its disk over only if nobody else may write to it.
        destination.execute("nbd-server-stop", Value::Null)?;
        source.execute("migrate-continue", json!({ "state": "pre-switchover" }))?;
        let moved = watch.until(&runtime, deadline, |course| {
            course.moved(requested_at, begun_at)
        });
        let moved = moved
            .with_context(|| format!("{}; {}", source.last_words(), destination.last_words()))?;
        drop(source);
        self.arrived(destination)?;
        std::fs::remove_file(self.ground.writable(from))?;
        Ok(moved)
    }
}
